"""Encoded samples: what is packed comes back, damage is noticed, batches are laid out as promised."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load as safetensors_load

from data.decode import BadImage
from data.encoded import (
    EncodedSample,
    EncoderShape,
    Encoding,
    bfloat16_bits,
    collate,
    cut_box,
    encoded_size,
    float8_bits,
    pack_sample,
    unpack_sample,
)
from data.errors import DataError

ENCODING = Encoding(
    autoencoder="a" * 64,
    text_encoders="b" * 64,
    latents="moments",
    text_padding="masked",
    text_dtype="bfloat16",
    channels=3,
    downsampling=8,
    encoders={
        "clip": EncoderShape(width=6, pooled=4, max_tokens=7),
        "t5": EncoderShape(width=10, pooled=0, max_tokens=9),
    },
    source="c" * 64,
    sizes=[[48, 32]],
    settings={"crop": "centre"},
)
FLOAT8 = replace(ENCODING, text_dtype="float8_e4m3fn")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(encoding: Encoding = ENCODING, width: int = 48, height: int = 32, seed: int = 0, lengths=(3, 5)):
    """A sample of two captions, its numbers drawn from a seed, and its tokens as they were before rounding."""
    sample = EncodedSample(
        moments=bfloat16_bits(numbers(encoding.latent_channels, height // 8, width // 8, seed=seed)),
        captions=[("a red seven", 1.0), ("ein naïves „Bild“ \ud800", 0.5)][: len(lengths)],
        tokens={},
        scales={},
        lengths={},
        pooled={},
        size=(640, 427),
        box=(0, 1, 640, 427),
        width=width,
        height=height,
        meta={"url": "https://example.com/ä?", "score": 5.5, "nested": {"a": [None, True]}},
    )
    whole = {}
    for number, (name, shape) in enumerate(encoding.encoders.items()):
        whole[name] = numbers(sum(lengths), shape.width, seed=seed + 1 + number)
        sample.lengths[name] = list(lengths)
        if encoding.text_dtype == "float8_e4m3fn":
            sample.tokens[name], sample.scales[name] = float8_bits(whole[name])
        else:
            sample.tokens[name] = bfloat16_bits(whole[name])
        if shape.pooled:
            sample.pooled[name] = bfloat16_bits(numbers(len(lengths), shape.pooled, seed=seed + 9))
    return sample, whole


def arrays(sample: EncodedSample):
    yield sample.moments
    for group in (sample.tokens, sample.scales, sample.pooled):
        yield from group.values()


@pytest.mark.parametrize("encoding", [ENCODING, FLOAT8])
def test_what_is_packed_comes_back_without_a_copy(encoding: Encoding) -> None:
    sample, _ = make(encoding)
    blob = pack_sample(sample)
    assert blob == pack_sample(make(encoding)[0])
    assert encoded_size(blob) == (48, 32)
    buffer = np.frombuffer(b"x" * 3 + blob, np.uint8)  # somewhere in a shard
    found = unpack_sample(memoryview(buffer)[3:], encoding)
    for one, other in zip(arrays(sample), arrays(found), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)
        assert np.shares_memory(other, buffer)
    for name in ("captions", "lengths", "size", "box", "width", "height", "meta"):
        assert getattr(found, name) == getattr(sample, name)


def test_the_safetensors_library_reads_it() -> None:
    sample, _ = make(FLOAT8)
    tensors = safetensors_load(pack_sample(sample))
    assert set(tensors) == {"latents", "clip.tokens", "clip.scales", "clip.pooled", "t5.tokens", "t5.scales"}
    assert tensors["t5.tokens"].dtype == torch.float8_e4m3fn and tensors["clip.pooled"].dtype == torch.bfloat16
    assert torch.equal(tensors["latents"].view(torch.uint16), torch.from_numpy(sample.moments))
    assert torch.equal(tensors["t5.scales"], torch.from_numpy(sample.scales["t5"]))


def test_forty_tokens_of_a_t5_xxl_take_no_more_than_their_own() -> None:
    encoders = {"t5": EncoderShape(width=4096, pooled=0, max_tokens=256)}
    encoding = replace(ENCODING, channels=16, encoders=encoders, sizes=[[256, 256]])
    text_bytes, latent_bytes = 40 * 4096 * 2, 2 * 16 * 32 * 32 * 2
    assert text_bytes + latent_bytes == 393_216
    blob = pack_sample(make(encoding, 256, 256, lengths=(40,))[0])
    assert text_bytes + latent_bytes < len(blob) < 400_000
    half = pack_sample(make(replace(encoding, text_dtype="float8_e4m3fn"), 256, 256, lengths=(40,))[0])
    assert text_bytes // 2 + 4 * 40 + latent_bytes < len(half) < 240_000


def test_float8_keeps_each_token_to_its_own_scale() -> None:
    tokens = numbers(50, 512) * torch.logspace(-6, 6, 50)[:, None]
    tokens[3] = 0.0
    tokens[4, 7] = 1e5  # an outlier, as CLIP has them: the others lose nothing but the smallest
    codes, scales = float8_bits(tokens)
    found = torch.from_numpy(codes).view(torch.float8_e4m3fn).float() * torch.from_numpy(scales)[:, None]
    assert torch.isfinite(found).all() and not found[3].any()
    error = (found - tokens).norm(dim=1) / tokens.norm(dim=1).clamp_min(1e-30)
    assert error.max() < 0.03
    steps = torch.from_numpy(scales)[:, None] * 2.0**-9  # subnormal numbers have a fixed step
    assert bool(((found - tokens).abs() <= torch.maximum(tokens.abs() * 2.0**-4, steps) * 1.0001).all())


@pytest.mark.parametrize("encoding", [ENCODING, FLOAT8])
def test_a_batch_holds_the_chosen_captions_and_the_middle_of_the_latents(encoding: Encoding) -> None:
    one, one_text = make(encoding, 48, 32, seed=1, lengths=(3, 5))
    two, two_text = make(encoding, 64, 40, seed=2, lengths=(2,))
    batch = collate([one, None, two], 40, 32, [1, 0, 0], encoding)
    assert batch.moments.shape == (3, 6, 4, 5) and batch.moments.dtype == torch.bfloat16
    whole = [torch.from_numpy(sample.moments).view(torch.bfloat16) for sample in (one, two)]
    assert torch.equal(batch.moments[0], whole[0][:, :, 0:5])
    assert torch.equal(batch.moments[2], whole[1][:, 0:4, 1:6])
    assert not batch.moments[1].any()
    for name, shape in encoding.encoders.items():
        assert batch.masks[name].tolist() == [[True] * 5, [False] * 5, [True] * 2 + [False] * 3]
        features = batch.features(name, "cpu")
        assert features.shape == (3, 5, shape.width) and features.dtype == torch.float32
        bound = 2.0**-8 if encoding is ENCODING else 2.0**-4
        torch.testing.assert_close(features[0], one_text[name][3:], rtol=bound, atol=1e-2)
        torch.testing.assert_close(features[2, :2], two_text[name], rtol=bound, atol=1e-2)
        assert not features[1].any() and not features[2, 2:].any()
    assert torch.equal(batch.pooled["clip"][0].view(torch.uint16), torch.from_numpy(one.pooled["clip"][1]))
    assert set(batch.pooled) == {"clip"} and not batch.pooled["clip"][1].any()
    nothing = collate([None, None], 40, 32, [0, 0], encoding)
    assert nothing.moments.shape == (2, 6, 4, 5) and nothing.tokens["t5"].shape == (2, 1, 10)
    with pytest.raises(ValueError, match="48x32 px cannot be cut to 56x32"):
        collate([one], 56, 32, [0], encoding)


def test_the_box_follows_the_cut() -> None:
    sample, _ = make(ENCODING, 48, 32)
    sample.box = (10, 0, 490, 320)  # ten px of the original per px
    assert cut_box(sample, 48, 32) == sample.box
    assert cut_box(sample, 32, 32) == (90, 0, 410, 320)
    assert cut_box(sample, 48, 16) == (10, 80, 490, 240)


@pytest.mark.parametrize("encoding", [ENCODING, FLOAT8])
def test_no_damage_gets_past_as_anything_but_a_bad_sample(encoding: Encoding) -> None:
    blob = pack_sample(make(encoding)[0])
    header = 8 + int.from_bytes(blob[:8], "little")
    for end in (0, 4, 8, 20, header - 1, header, header + 5, len(blob) - 1):
        with pytest.raises(BadImage):
            unpack_sample(blob[:end], encoding)
    survivors = 0
    for place in range(header):
        for flip in (0x01, 0x10):
            damaged = bytearray(blob)
            damaged[place] ^= flip
            try:
                sample = unpack_sample(bytes(damaged), encoding)
            except BadImage:
                continue
            survivors += 1  # a letter of a caption, a number of the box
            assert collate([sample], sample.width, sample.height, [1], encoding).moments.shape == (1, 6, 4, 6)
    assert survivors < header


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [-72, 216]},  # into the header
        {"data_offsets": [0, 0], "shape": [0, 4, 6]},
        {"shape": [-1, 4, 6]},
        {"shape": [6, 4, 6.0]},
        {"shape": 6},
        {"dtype": "F64"},
        {"dtype": ["BF16"]},
        {"data_offsets": [0, 2**80]},
    ],
)
def test_a_header_that_lies_is_damage(change: dict) -> None:
    blob = pack_sample(make()[0])
    base = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:base])
    assert header["latents"] == {"dtype": "BF16", "shape": [6, 4, 6], "data_offsets": [0, 288]}
    header["latents"] |= change
    text = json.dumps(header).encode()
    with pytest.raises(BadImage, match="damaged"):
        unpack_sample(len(text).to_bytes(8, "little") + text + blob[base:], ENCODING)


@pytest.mark.parametrize(
    "other",
    [
        replace(ENCODING, channels=4),
        replace(ENCODING, latents="sample"),
        replace(ENCODING, downsampling=4),
        replace(ENCODING, text_dtype="float8_e4m3fn"),
        replace(ENCODING, encoders={**ENCODING.encoders, "t5": EncoderShape(width=10, pooled=0, max_tokens=4)}),
        replace(ENCODING, encoders={**ENCODING.encoders, "t5": EncoderShape(width=5, pooled=0, max_tokens=9)}),
        replace(ENCODING, encoders={**ENCODING.encoders, "third": EncoderShape(width=5, pooled=0, max_tokens=9)}),
    ],
)
def test_a_sample_of_another_encoding_is_bad(other: Encoding) -> None:
    with pytest.raises(BadImage):
        unpack_sample(pack_sample(make(ENCODING)[0]), other)


def test_an_encoding_survives_its_json_and_strange_ones_are_refused() -> None:
    fields = ENCODING.to_dict()
    assert Encoding.from_dict(fields, "here") == ENCODING
    for change in (
        {"latents": "mean"},
        {"text_dtype": "float16"},
        {"channels": 0},
        {"downsampling": "8"},
        {"encoders": {"clip": {"width": 6, "pooled": 4}}},
        {"encoders": []},
        {"sizes": [[0, 32]]},
        {"more": 1},
    ):
        with pytest.raises(DataError, match="here: its index describes no encoding that is known"):
            Encoding.from_dict({**fields, **change}, "here")
    del fields["source"]
    with pytest.raises(DataError, match="encode it again"):
        Encoding.from_dict(fields, "here")
