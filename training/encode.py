"""`darkroom encode`: pictures and captions to latents and text features, shard by shard. Format: docs/encode.md.

A shard of the result is a function of its source shard and the recipe alone: no rank, batch or attempt before it
matters. So ranks share the shards without talking, and whoever was stopped begins its shard anew.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from data.buckets import make_buckets
from data.encoded import EncoderShape, Encoding
from data.errors import DataError
from data.index import STAMP
from data.object_store import Store, join, open_store
from data.shards import INDEX, Index, ShardInfo, load_index, shard_done, write_index, write_shard
from launch.runtime import PreemptionFlag, ranks
from training.config import EncodeRecipe
from training.encode_shard import QUARANTINE, Encoder, encode_shard
from training.errors import Preempted, TrainingError
from training.frozen import Frozen, load_networks

_LEAST_SEEN = 1000  # samples before which a few bad ones are no reason to stop
_LINE_EVERY_S = 10.0
_REQUESTS = 16  # to the store at a time


def encode(recipe: EncodeRecipe, quiet: bool = False) -> dict[str, Any] | None:
    """Encodes this rank's shards; whoever finds all shards there writes the index.

    Returns:
        What the whole set holds, or None where other ranks are still at work.

    Raises:
        TrainingError: `out` holds something else, too many samples are bad, or sizes and networks do not go together.
        DataError: the source cannot be read.
        Preempted: a signal asked to stop.
    """
    process = ranks()
    source, store = load_index(recipe.shards), open_store(recipe.out)
    if source.encoding is not None:
        raise TrainingError(f"{recipe.shards} is encoded already; give the data set that it was made of")
    frozen = load_networks(recipe.autoencoder, recipe.text_encoders, recipe.text_padding)
    frozen.to(torch.device("cuda", process.local_rank) if torch.cuda.is_available() else torch.device("cpu"))
    encoding = encoding_of(recipe, frozen, source)
    claim(store, encoding)
    encoder = Encoder(recipe, frozen, encoding, source)
    mine = range(process.rank, len(source.shards), process.world_size)
    progress = _Progress(sum(source.shards[number].samples for number in mine), quiet or process.rank != 0)
    tally = _Tally(recipe)
    found = 0  # shards that were done before
    with PreemptionFlag() as stop:

        def count(seen: int, bad: int) -> None:
            progress.add(seen)
            tally.add(seen, bad)
            if stop:
                raise Preempted(f"preempted: {store.url} is not complete; the same command goes on")

        there = _done(store, source)
        for number in mine:
            shard = source.shards[number]
            done = there.get(shard.name)
            if done is None:
                write_shard(encode_shard(encoder, number, store, count), store, shard.name, encoded=True)
            else:
                found += 1
                count(shard.samples, shard.samples - done.samples)
    summary = _finish(recipe, source, store, encoding)
    return summary and {**summary, "shards_found_done": found}


def encoding_of(recipe: EncodeRecipe, frozen: Frozen, source: Index) -> Encoding:
    """What the recipe makes of the source with these networks.

    Raises:
        TrainingError: a picture size is no multiple of the autoencoder's downsampling.
    """
    downsampling = frozen.autoencoder.config.downsampling
    sizes = make_buckets(recipe.image_size, recipe.buckets)
    for width, height in sizes:
        if width % downsampling or height % downsampling:
            raise TrainingError(
                f"pictures of {width}x{height} px: both sides must be multiples of {downsampling}, the autoencoder's "
                "downsampling; change image_size or buckets"
            )
    bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and frozen.device.type == "cuda")
    settings = {
        "crop": recipe.crop,
        "captions": json.loads(json.dumps(asdict(recipe.captions))),  # lists, as they come back from a file
        "precision": "bfloat16" if bfloat16 else "float32",
        "seed": recipe.seed,
    }
    return Encoding(
        autoencoder=frozen.autoencoder_fingerprint,
        text_encoders=frozen.conditioner.fingerprint,
        latents=recipe.latents,
        text_padding=recipe.text_padding,
        text_dtype=recipe.text_dtype,
        channels=frozen.autoencoder.config.latent_channels,
        downsampling=downsampling,
        encoders={
            encoder.config.name: EncoderShape(
                width=encoder.width, pooled=encoder.pooled_dim, max_tokens=encoder.config.max_tokens
            )
            for encoder in frozen.conditioner.text_encoders()
        },
        source=source.fingerprint,
        sizes=[list(size) for size in sizes],
        settings=settings,
    )


def claim(store: Store, encoding: Encoding) -> None:
    """Writes the stamp, or compares with the one there: shards of two encodings never stand side by side.

    Raises:
        TrainingError: the place holds something else.
    """
    if not store.exists(STAMP):
        other = next((key for key, _ in store.list()), None)
        if other and not store.exists(STAMP):  # another rank may have been quick
            raise TrainingError(f"{store.url} holds {other} and no {STAMP}: it is no encoded set; give another out")
    wanted = encoding.to_dict()
    if store.put_if_absent(json.dumps(wanted, indent=1).encode(), STAMP):
        return
    with store.open_range(STAMP) as file:
        data = file.read()
    try:
        found = dict(json.loads(data))
    except (ValueError, TypeError):
        raise TrainingError(f"{join(store.url, STAMP)} is damaged; give another out, or remove the folder") from None
    for old, new in ((found, wanted), (found.get("settings"), wanted["settings"])):
        for name, value in new.items():
            was = old.get(name) if isinstance(old, dict) else None
            if was != value and name != "settings":
                raise TrainingError(
                    f"{store.url} was begun with {name} {was!r}, the recipe now gives {value!r}; "
                    "restore it, or give another out"
                )


class _Tally:
    """Counts samples and refuses too many bad ones."""

    def __init__(self, recipe: EncodeRecipe) -> None:
        self.recipe = recipe
        self.seen = self.bad = 0

    def add(self, seen: int, bad: int) -> None:
        """Counts samples of which some could not be used.

        Raises:
            TrainingError: they are too many by now.
        """
        self.seen += seen
        self.bad += bad
        if self.bad > self.recipe.max_bad_fraction * max(self.seen, _LEAST_SEEN):
            raise TrainingError(
                f"{self.bad} of {self.seen} samples of {self.recipe.shards} could not be used, more than "
                f"max_bad_fraction {self.recipe.max_bad_fraction}; {join(self.recipe.out, QUARANTINE)} names them and "
                "why: mend the data, or raise the fraction"
            )


def _done(store: Store, source: Index) -> dict[str, ShardInfo]:
    """Which of the source's shards are encoded already, by name; many small requests, so many at a time."""
    present = {key for key, _ in store.list()}
    names = [shard.name for shard in source.shards if shard.name in present]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return {done.name: done for done in pool.map(partial(shard_done, store), names) if done is not None}


def _finish(recipe: EncodeRecipe, source: Index, store: Store, encoding: Encoding) -> dict[str, Any] | None:
    """Writes the index if every shard is there, and says what the set holds."""
    found = _done(store, source)
    shards = [found[shard.name] for shard in source.shards if shard.name in found]
    if len(shards) < len(source.shards):
        return None
    samples, size_bytes = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
    skipped = source.num_samples - samples
    _Tally(recipe).add(source.num_samples, skipped)
    index = load_index(recipe.out) if store.exists(INDEX) else write_index(store, shards, encoding.to_dict())
    if index.shards != tuple(shards):
        raise DataError(f"{join(store.url, INDEX)}: is not of the shards there; delete it and give the command again")
    return {
        "url": index.url,
        "fingerprint": index.fingerprint,
        "samples": samples,
        "skipped": skipped,
        "shards": len(shards),
        "bytes": size_bytes,
        "bytes_per_sample": round(size_bytes / samples),
    }


class _Progress:
    """A line now and then."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.total, self.quiet = total, quiet
        self.done = 0
        self.started_s = self.last_s = time.monotonic()

    def add(self, samples: int) -> None:
        """Counts samples done."""
        self.done += samples
        now = time.monotonic()
        if self.quiet or (now - self.last_s < _LINE_EVERY_S and self.done < self.total):
            return
        self.last_s = now
        rate = self.done / max(now - self.started_s, 1e-9)
        line = f"{self.done:,} of {self.total:,} samples  {rate:.0f}/s  ETA {(self.total - self.done) / rate:.0f} s"
        print(line, file=sys.stderr, flush=True)
