"""One shard of pictures and captions as encoded samples, in the order of the shard. See training/encode.py."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data.buckets import Size, assign_buckets, make_buckets
from data.captions import candidates
from data.decode import BadImage
from data.encoded import EncodedSample, Encoding, bfloat16_bits, float8_bits, pack_sample
from data.object_store import Store, join
from data.shards import Index, RawSample, load_rows, read_rows
from data.transforms import Picture, load_picture, to_float
from models import prng
from models.conditioner import TextFeatures
from training.config import EncodeRecipe
from training.errors import TrainingError
from training.frozen import Frozen

QUARANTINE = "quarantine"
_WINDOW_BATCHES = 8  # read and decoded together, so that rare shapes fill their batches too


def encode_shard(
    encoder: "Encoder", shard_no: int, store: Store, count: Callable[[int, int], None]
) -> Iterator[dict[str, Any]]:
    """Yields the samples of a shard for `write_shard`; those that cannot be used go into a list in the store.

    Args:
        encoder: the recipe and its networks.
        shard_no: number in the source's index.
        store: where the encoded set is made.
        count: is told (seen, bad) after every few batches, and may stop the work by raising.

    Raises:
        TrainingError: no sample of the shard can be used.
        DataError: the shard cannot be read.
    """
    shard = encoder.source.shards[shard_no]
    records: list[dict[str, Any]] = []
    try:
        for window in encoder.windows(shard_no):
            encoder.encode(window)
            bad = [sample for sample in window if sample.blob is None]
            records += [{"key": each.raw.key, "row": each.row, "reason": each.problem} for each in bad]
            count(len(window), len(bad))
            for sample in window:
                if sample.blob is not None:
                    yield {"__key__": sample.raw.key, "safetensors": sample.blob}
    finally:  # before anything could say that the shard is done
        key = f"{QUARANTINE}/{shard.name.removesuffix('.tar')}.jsonl"
        if records:
            store.put_bytes("".join(json.dumps(record) + "\n" for record in records).encode(), key)
        else:
            store.delete(key)
    if len(records) == shard.samples:
        place, reason = join(encoder.source.url, shard.name), records[0]["reason"]
        raise TrainingError(f"{place}: no sample can be used (first: {reason}); mend the shard, or remove it")


@dataclass(kw_only=True)
class Prepared:
    """A sample on its way: its picture and captions, or why there are none."""

    raw: RawSample
    row: int  # in its shard
    shape: Size  # (width, height) px of its bucket
    number: int  # of the sample in the whole source: the key of its randomness
    picture: Picture | None = None
    captions: list[tuple[str, float]] = field(default_factory=list)
    problem: str | None = None
    blob: bytes | None = None  # in the end


class Encoder:
    """Encodes samples as a recipe says."""

    def __init__(self, recipe: EncodeRecipe, frozen: Frozen, encoding: Encoding, source: Index) -> None:
        self.recipe, self.frozen, self.encoding, self.source = recipe, frozen, encoding, source
        self._shapes = make_buckets(recipe.image_size, recipe.buckets)

    def windows(self, shard_no: int) -> Iterator[list[Prepared]]:
        """The shard's samples, decoded, some batches at a time; the next ones are made while these are worked on."""
        samples, size = self.source.shards[shard_no].samples, _WINDOW_BATCHES * self.recipe.batch_size
        firsts = iter(range(0, samples, size))
        with ThreadPoolExecutor(self.recipe.num_threads) as decoders, ThreadPoolExecutor(1) as reader:

            def window(first: int) -> list[Prepared]:
                raws = read_rows(self.source, shard_no, first, min(first + size, samples))
                return list(decoders.map(self._prepare, self._rows(shard_no, first, raws)))

            ahead = reader.submit(window, next(firsts))
            for first in firsts:
                present, ahead = ahead.result(), reader.submit(window, first)
                yield present
            yield ahead.result()

    def _rows(self, shard_no: int, first: int, raws: list[RawSample]) -> Iterator[Prepared]:
        rows = load_rows(self.source, shard_no)
        span = slice(first, first + len(raws))
        buckets = assign_buckets(rows.widths[span], rows.heights[span], self._shapes)
        start = sum(shard.samples for shard in self.source.shards[:shard_no])
        for row, (raw, bucket) in enumerate(zip(raws, buckets.tolist(), strict=True), start=first):
            yield Prepared(raw=raw, row=row, shape=self._shapes[bucket], number=start + row)

    def _prepare(self, sample: Prepared) -> Prepared:
        """Decodes one sample; runs in a thread."""
        recipe, raw = self.recipe, sample.raw
        try:
            if raw.problem:
                raise BadImage(raw.problem)
            sample.captions = candidates(raw.text, raw.meta, recipe.captions)
            if not sample.captions:
                raise BadImage("empty caption")
            width, height = sample.shape
            sample.picture = load_picture(
                bytes(raw.image), width, height, crop=recipe.crop, seed=recipe.seed, sample_number=sample.number
            )
        except BadImage as error:
            sample.problem = str(error)
        return sample

    def encode(self, window: list[Prepared]) -> None:
        """Gives every sample of a window its blob, or a problem; a batch holds samples of one shape."""
        groups: dict[Size, list[Prepared]] = {}
        for sample in window:
            if sample.problem is None:
                groups.setdefault(sample.shape, []).append(sample)
        for group in groups.values():
            for first in range(0, len(group), self.recipe.batch_size):
                self._encode_batch(group[first : first + self.recipe.batch_size])

    def _encode_batch(self, batch: list[Prepared]) -> None:
        """Gives every sample of a batch of one shape its blob, or a problem."""
        latents = self._latents(batch)
        latents_finite, bits = _finite(latents), bfloat16_bits(latents)
        conditioner = self.frozen.conditioner
        features = conditioner.features([caption for sample in batch for caption, _ in sample.captions])
        texts = {name: _StoredText(own, self.encoding) for name, own in zip(conditioner.names, features, strict=True)}
        first = 0
        for place, sample in enumerate(batch):
            captions = slice(first, first + len(sample.captions))
            first = captions.stop
            if not latents_finite[place]:
                sample.problem = "its latents are not finite"
            elif not all(all(text.finite[captions]) for text in texts.values()):
                sample.problem = "the features of a caption are not finite"
            else:
                sample.blob = self._blob(sample, bits[place], texts, captions)

    def _blob(self, sample: Prepared, latents: np.ndarray, texts: dict[str, "_StoredText"], captions: slice) -> bytes:
        assert sample.picture is not None
        encoded = EncodedSample(
            moments=latents,
            captions=sample.captions,
            tokens={},
            scales={},
            lengths={},
            pooled={},
            size=sample.picture.size,
            box=sample.picture.box,
            width=sample.shape[0],
            height=sample.shape[1],
            meta=sample.raw.meta,
        )
        for name, text in texts.items():
            text.give(encoded, name, captions)
        return pack_sample(encoded)

    @torch.no_grad()
    def _latents(self, batch: list[Prepared]) -> torch.Tensor:
        """(B, 2C, h, w) posterior mean and standard deviation, or (B, C, h, w), a sample; raw."""
        autoencoder, device = self.frozen.autoencoder, self.frozen.device
        pixels = torch.stack([sample.picture.pixels for sample in batch if sample.picture is not None])
        bfloat16 = self.encoding.settings["precision"] == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            posterior = autoencoder.encode(to_float(pixels.to(device)))
        mean, std = posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())  # (B, C, h, w)
        if self.recipe.latents == "moments":
            return torch.cat((mean, std), dim=1)
        numbers = torch.tensor([sample.number for sample in batch], device=device)
        return mean + std * prng.normal(self.recipe.seed, prng.POSTERIOR, numbers, tuple(mean.shape[1:]))


class _StoredText:
    """One encoder's features of a batch of captions, as they are stored."""

    def __init__(self, features: TextFeatures, encoding: Encoding) -> None:
        self.finite = [
            tokens and pooled for tokens, pooled in zip(_finite(features.tokens), _finite(features.pooled), strict=True)
        ]
        keep = features.mask if encoding.text_padding == "masked" else torch.ones_like(features.mask)
        self.lengths: list[int] = keep.sum(1).tolist()
        self.ends = np.cumsum(self.lengths)
        tokens = features.tokens[keep]  # (sum of lengths, D)
        float8 = encoding.text_dtype == "float8_e4m3fn"
        self.scales: np.ndarray | None = None
        if float8:
            self.tokens, self.scales = float8_bits(tokens)
        else:
            self.tokens = bfloat16_bits(tokens)
        self.pooled = bfloat16_bits(features.pooled)  # (captions, P)

    def give(self, sample: EncodedSample, name: str, captions: slice) -> None:
        """Adds the features of some captions to a sample."""
        lengths = self.lengths[captions]
        end = int(self.ends[captions.stop - 1])
        tokens = slice(end - sum(lengths), end)
        sample.tokens[name], sample.lengths[name] = self.tokens[tokens], lengths
        if self.scales is not None:
            sample.scales[name] = self.scales[tokens]
        if self.pooled.shape[1]:
            sample.pooled[name] = self.pooled[captions]


def _finite(values: torch.Tensor) -> list[bool]:
    """Per row, whether all of it is finite."""
    return torch.isfinite(values).flatten(1).all(1).tolist()
