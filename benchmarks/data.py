"""Reading speed of one core: from tar shards to float tensors, against webdataset with open_clip's own transform.

Rows `640x480`, `1024x768`, `2048x1536`: shards of JPEG + text + JSON (photographs.py; quality 90, 4:2:0) become batches
of 32 pictures of 256 x 256 and their captions. Ours is the training loader with all it does: ranged reads, checks of
every header against the index, shuffling, captions, cropping, masks; the peer reads front to back. Both are endless, so
that no start is timed, and both run on one thread; the clock is CPU time. Before that, every picture of ours must have
a PSNR of 40 dB against Pillow's full decode, crop and antialiased bicubic resize, and every caption come from both.

Row `encoded`: shards of encoded samples (latents of 256 x 256 px at one eighth, 8 x 32 x 32, and 20 tokens of width
768 with a pooled vector, all bfloat16: 48 kB) become batches of 64. Ours is the training loader again, with captions,
JSON and checks; the peer is webdataset with safetensors' load and torch.stack, and gives the tensors alone. Every
tensor must be equal to the bit.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: this folder would hide the package `data`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import open_clip
import safetensors.torch
import torch
import webdataset
from PIL import Image

from benchmarks.common import Row, compare, main
from benchmarks.photographs import jpeg, photograph
from data.encoded import EncodedSample, EncoderShape, Encoding, bfloat16_bits, pack_sample
from data.loader import Batch, LoaderConfig, build_loader
from data.shards import write_shards

SIZE = 256  # px, side of the result
BATCH = 32
ENCODED_BATCH = 64
NUM_ENCODED = 2048
LEAST_DB = 40.0
NUM_SAMPLES = {(640, 480): 128, (1024, 768): 96, (2048, 1536): 64}
PACKAGES = ("torch", "simplejpeg", "pillow", "webdataset", "open-clip-torch", "safetensors")
UNIT = "samples/s/core"


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Returns the rows that were asked for."""
    sizes = [size for size in NUM_SAMPLES if _name(*size) in arguments.rows]
    rows = [_pictures(width, height, arguments.rounds) for width, height in sizes]
    return rows + ([_encoded(arguments.rounds)] if "encoded" in arguments.rows else [])


def _name(width: int, height: int) -> str:
    return f"{width}x{height}"


def _pictures(width: int, height: int, rounds: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder:
        num_samples = NUM_SAMPLES[width, height]
        originals = {f"photograph {n}": jpeg(photograph(width, height, n)) for n in range(num_samples)}
        samples = (
            {"__key__": f"{n:06d}", "jpg": data, "txt": caption, "json": {"caption": caption, "number": n}}
            for n, (caption, data) in enumerate(originals.items())
        )
        write_shards(samples, folder, "shard", num_samples // 4)
        ours, peer = _ours(folder), _peer(folder)
        lowest = _check(ours, peer, originals)
        print(f"{_name(width, height)}: lowest PSNR of {num_samples} pictures {lowest:.1f} dB", file=sys.stderr)
        batches = num_samples // BATCH * 2
        return compare(
            _name(width, height),
            lambda: sum(len(_finished(next(ours))) for _ in range(batches)),
            lambda: sum(len(next(peer)[0]) for _ in range(batches)),
            unit=UNIT,
            packages=PACKAGES,
            rounds=rounds,
        )


def _ours(folder: str, micro_batch_size: int = BATCH) -> Iterator[Batch]:
    config = LoaderConfig(shards=folder, image_size=SIZE, num_streams=1)
    return iter(build_loader(config, seed=0, micro_batch_size=micro_batch_size, rank=0, world_size=1))


def _finished(batch: Batch) -> torch.Tensor:
    """What the model sees, (B, 3, SIZE, SIZE) float32."""
    return batch.images()


def _peer(folder: str) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """open_clip's own pipeline for evaluation, without its tokenizer, over and over."""
    transform = open_clip.image_transform(SIZE, is_train=False)
    tars = sorted(str(path) for path in Path(folder).glob("*.tar"))
    pipeline: Any = webdataset.DataPipeline(
        webdataset.SimpleShardList(tars),
        webdataset.tarfile_to_samples(),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=transform),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(BATCH, partial=False),
    )
    return iter(pipeline.repeat())


def _check(ours: Iterator[Batch], peer: Iterator[tuple[torch.Tensor, list[str]]], originals: dict[str, bytes]) -> float:
    """Reads one epoch of both; returns the lowest PSNR of ours in dB."""
    lowest, seen_by_us, seen_by_peer = np.inf, set(), set()
    for _ in range(len(originals) // BATCH):
        batch, (images, captions) = next(ours), next(peer)
        finished = _finished(batch)
        assert finished.shape == images.shape == (BATCH, 3, SIZE, SIZE), (finished.shape, images.shape)
        assert finished.dtype == images.dtype == torch.float32
        assert bool(batch.weights.all()), batch.bad
        for picture, caption in zip(finished, batch.captions, strict=True):
            lowest = min(lowest, _psnr_db(picture, originals[caption]))
        seen_by_us.update(batch.captions)
        seen_by_peer.update(captions)
    assert seen_by_us == seen_by_peer == set(originals), "an epoch must hold every sample"
    assert lowest >= LEAST_DB, f"{lowest:.1f} dB, at least {LEAST_DB}"
    return float(lowest)


def _psnr_db(picture: torch.Tensor, original: bytes) -> float:
    """Of a picture in [-1, 1] against Pillow's full decode, centre crop and antialiased bicubic resize."""
    full = Image.open(io.BytesIO(original)).convert("RGB")
    side = min(full.size)
    left, top = (full.width - side) // 2, (full.height - side) // 2
    square = full.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    error = (picture.permute(1, 2, 0).numpy() + 1) * 127.5 - np.asarray(square, np.float32)
    return float(10 * np.log10(255**2 / np.mean(error**2)))


def _encoded(rounds: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder:
        _write_encoded(folder)
        ours, peer = _ours(folder, ENCODED_BATCH), _encoded_peer(folder)
        _check_encoded(ours, peer)
        batches = LoaderConfig.window_micro_batches * 2  # whole windows, as each begins with its plan
        return compare(
            "encoded",
            lambda: sum(len(next(ours).keys) for _ in range(batches)),
            lambda: sum(len(next(peer)["keys"]) for _ in range(batches)),
            unit=UNIT,
            packages=PACKAGES,
            rounds=rounds,
        )


def _write_encoded(folder: str) -> None:
    encoding = Encoding(
        autoencoder="a" * 64,
        text_encoders="b" * 64,
        latents="moments",
        text_padding="masked",
        text_dtype="bfloat16",
        channels=4,
        downsampling=8,
        encoders={"clip": EncoderShape(width=768, pooled=768, max_tokens=77)},
        source="c" * 64,
        sizes=[[SIZE, SIZE]],
        settings={},
    )
    random = torch.Generator().manual_seed(0)
    samples = (
        {"__key__": f"{number:06d}", "safetensors": pack_sample(_encoded_sample(number, random))}
        for number in range(NUM_ENCODED)
    )
    write_shards(samples, folder, "shard", NUM_ENCODED // 4, encoding=encoding.to_dict())


def _encoded_sample(number: int, random: torch.Generator) -> EncodedSample:
    return EncodedSample(
        moments=bfloat16_bits(torch.randn(8, SIZE // 8, SIZE // 8, generator=random)),
        captions=[(f"caption {number}", 1.0)],
        tokens={"clip": bfloat16_bits(torch.randn(20, 768, generator=random))},
        scales={},
        lengths={"clip": [20]},
        pooled={"clip": bfloat16_bits(torch.randn(1, 768, generator=random))},
        size=(640, 480),
        box=(80, 0, 560, 480),
        width=SIZE,
        height=SIZE,
        meta={"number": number},
    )


def _encoded_peer(folder: str) -> Iterator[dict[str, Any]]:
    def stacked(samples: list[tuple[str, dict[str, torch.Tensor]]]) -> dict[str, Any]:
        names = samples[0][1]
        tensors = {name: torch.stack([tensors[name] for _, tensors in samples]) for name in names}
        return {"keys": [key for key, _ in samples], **tensors}

    pipeline: Any = webdataset.DataPipeline(
        webdataset.SimpleShardList(sorted(str(path) for path in Path(folder).glob("*.tar"))),
        webdataset.tarfile_to_samples(),
        webdataset.map(lambda sample: (sample["__key__"], safetensors.torch.load(sample["safetensors"]))),
        webdataset.batched(ENCODED_BATCH, collation_fn=stacked, partial=False),
    )
    return iter(pipeline.repeat())


def _check_encoded(ours: Iterator[Batch], peer: Iterator[dict[str, Any]]) -> None:
    """Reads one epoch of both and compares every tensor."""
    read: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    for _ in range(NUM_ENCODED // ENCODED_BATCH):
        batch = next(ours)
        assert batch.encoded is not None and bool(batch.weights.all()), batch.bad
        assert bool(batch.encoded.masks["clip"].all())
        parts = batch.encoded.moments, batch.encoded.tokens["clip"], batch.encoded.pooled["clip"]
        read.update(zip(batch.keys, zip(*parts, strict=True), strict=True))
    for _ in range(NUM_ENCODED // ENCODED_BATCH):
        batch_of_peer = next(peer)
        names = ("latents", "clip.tokens", "clip.pooled")
        for place, key in enumerate(batch_of_peer["keys"]):
            for one, name in zip(read.pop(key), names, strict=True):
                other = batch_of_peer[name][place].view(one.shape)
                assert one.dtype == other.dtype == torch.bfloat16 and torch.equal(one, other), (key, name)
    assert not read, "an epoch must hold every sample"


if __name__ == "__main__":
    main(__doc__ or "", measure, [*(_name(*size) for size in NUM_SAMPLES), "encoded"])
