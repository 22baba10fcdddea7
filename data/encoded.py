"""Samples that the frozen networks have seen: latents and text features as stored, and a batch of them.

A sample is one safetensors blob. Half-precision numbers are kept as their bits in numpy arrays that point into the
shard's own buffer: a sample is unpacked without a copy, and copied once, into its batch. Format: docs/encode.md.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from data.decode import BadImage
from data.errors import DataError

Latents = Literal["moments", "sample"]
TextPadding = Literal["attended", "masked"]
TextDtype = Literal["bfloat16", "float8_e4m3fn"]

FLOAT8_MAX = 448.0  # largest finite float8_e4m3fn
_STORED: dict[str, np.dtype[Any]] = {  # the name in safetensors, and what its bits are kept as
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(np.uint16),
    "F8_E4M3": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in _STORED.items()}
_ALIGNMENT = 8  # bytes; the header is padded to it with spaces
_DAMAGED = (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """What one text encoder gives."""

    width: int  # D, features per token
    pooled: int  # P, features of the pooled vector; 0 = none
    max_tokens: int  # L, tokens of a caption at most


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What a set's samples were made with: index.json's "encoding"."""

    latents: Latents  # "moments" = posterior mean and standard deviation, "sample" = one sample of it
    text_padding: TextPadding  # "masked" = tokens of the caption alone, "attended" = all max_tokens
    text_dtype: TextDtype  # of the tokens
    autoencoder: str  # fingerprint
    text_encoders: str  # fingerprint of all of them
    channels: int  # C
    downsampling: int  # px of a picture per latent, each way
    encoders: dict[str, EncoderShape]  # by label, in order
    source: str  # fingerprint of the pictures' data set
    sizes: list[list[int]]  # (width, height) px that pictures were brought to
    settings: dict[str, Any]  # what else decided the content: crop, captions, precision, seed

    def to_dict(self) -> dict[str, Any]:
        """Plain values for index.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], place: str) -> "Encoding":
        """Reads what `to_dict` gave; `place` is the data set's address, for the message.

        Raises:
            DataError: a field is missing, unknown or not possible.
        """
        try:
            shapes = {name: EncoderShape(**shape) for name, shape in fields["encoders"].items()}
            encoding = cls(**{**fields, "encoders": shapes})
            counts = [encoding.channels, encoding.downsampling, *(px for size in encoding.sizes for px in size)]
            for shape in shapes.values():
                counts += [shape.width, shape.max_tokens, shape.pooled + 1]
            known = (
                encoding.latents in ("moments", "sample")
                and encoding.text_padding in ("attended", "masked")
                and encoding.text_dtype in ("bfloat16", "float8_e4m3fn")
                and all(type(count) is int and count >= 1 for count in counts)
            )
        except (KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise DataError(f"{place}: its index describes no encoding that is known here; encode it again, or update")
        return encoding

    @property
    def latent_channels(self) -> int:
        """Channels of a stored sample's latents."""
        return self.channels * (2 if self.latents == "moments" else 1)


@dataclass(kw_only=True, slots=True)
class EncodedSample:
    """One sample as stored. bfloat16 stands as the uint16 of its bits, float8 as uint8; arrays may be read-only views.

    The tokens of all captions stand behind each other; `lengths` says how many are whose.
    """

    moments: np.ndarray  # (2C, h, w) bfloat16: posterior mean and standard deviation, raw; or (C, h, w), one sample
    captions: list[tuple[str, float]]  # candidates and their weights
    tokens: dict[str, np.ndarray]  # encoder to (sum of lengths, D) bfloat16 or float8
    scales: dict[str, np.ndarray]  # encoder to (sum of lengths,) float32, what float8 tokens are to be times; else {}
    lengths: dict[str, list[int]]  # encoder to tokens per caption
    pooled: dict[str, np.ndarray]  # encoder to (captions, P) bfloat16; only encoders that have one
    size: tuple[int, int]  # (width, height) px of the original as displayed
    box: tuple[int, int, int, int]  # (left, top, right, bottom) px of the original: what the encoded picture shows
    width: int  # px of the encoded picture
    height: int  # px
    meta: dict[str, Any]  # the original's JSON


@dataclass(kw_only=True)
class EncodedBatch:
    """A batch of encoded samples, on the host. A masked sample is zeros."""

    moments: torch.Tensor  # (B, 2C, h, w) bfloat16, or (B, C, h, w); raw: not normalised
    tokens: dict[str, torch.Tensor]  # encoder to (B, L, D) bfloat16 or float8, zeros behind a caption's tokens
    scales: dict[str, torch.Tensor]  # encoder to (B, L) float32 where the tokens are float8; else {}
    masks: dict[str, torch.Tensor]  # encoder to (B, L) bool, True = stored; L is the longest of the batch
    pooled: dict[str, torch.Tensor]  # encoder to (B, P) bfloat16; only encoders that have one

    def features(self, name: str, device: torch.device | str) -> torch.Tensor:
        """An encoder's tokens as (B, L, D) float32 on a device."""
        tokens = self.tokens[name].to(device, non_blocking=True).float()
        if name in self.scales:
            tokens *= self.scales[name].to(device, non_blocking=True)[:, :, None]
        return tokens

    def pin_memory(self) -> "EncodedBatch":
        """The same in page-locked memory."""
        parts = {field: getattr(self, field) for field in ("tokens", "scales", "masks", "pooled")}
        pinned = {field: {name: part.pin_memory() for name, part in each.items()} for field, each in parts.items()}
        return EncodedBatch(moments=self.moments.pin_memory(), **pinned)


def bfloat16_bits(tensor: torch.Tensor) -> np.ndarray:
    """The tensor rounded to bfloat16, as uint16 on the CPU."""
    return tensor.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()


def float8_bits(tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n, D) as float8_e4m3fn (uint8) and (n,) float32 scales: a token's largest number becomes 448."""
    tokens = tokens.detach().float()
    largest = tokens.abs().amax(dim=1)
    scales = torch.where(largest > 0, largest / FLOAT8_MAX, 1.0)
    # Division may round past 448 by an ulp, and beyond it float8_e4m3fn is NaN.
    codes = (tokens / scales[:, None]).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).cpu().numpy(), scales.cpu().numpy()


def pack_sample(sample: EncodedSample) -> bytes:
    """The sample as a safetensors blob; equal samples give equal bytes (the library orders metadata at random)."""
    arrays = {"latents": sample.moments}
    for name, tokens in sample.tokens.items():
        arrays[f"{name}.tokens"] = tokens
    arrays |= {f"{name}.scales": scales for name, scales in sample.scales.items()}
    arrays |= {f"{name}.pooled": pooled for name, pooled in sample.pooled.items()}
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))  # so each lies on its own size
    facts = {
        "captions": sample.captions,
        "lengths": sample.lengths,
        "size": sample.size,
        "box": sample.box,
        "meta": sample.meta,
    }
    metadata = {"width": str(sample.width), "height": str(sample.height), "sample": _json(facts)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": (begin, end)}
    text = _json(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays.values())])


def unpack_sample(data: bytes | memoryview, encoding: Encoding) -> EncodedSample:
    """Reads what `pack_sample` made, as views into `data`.

    Raises:
        BadImage: it is damaged, or was not made with this encoding.
    """
    try:
        header, base = _header(data)
        metadata = header.pop("__metadata__")
        arrays = {name: _view(data, base, entry) for name, entry in header.items()}
        facts = json.loads(metadata["sample"])
        tokens = {name: arrays[f"{name}.tokens"] for name in encoding.encoders}
        scaled = encoding.encoders if encoding.text_dtype == "float8_e4m3fn" else ()
        sample = EncodedSample(
            moments=arrays["latents"],
            captions=[(text, weight) for text, weight in facts["captions"]],
            tokens=tokens,
            scales={name: arrays[f"{name}.scales"] for name in scaled},
            lengths=facts["lengths"],
            pooled={name: arrays[f"{name}.pooled"] for name, shape in encoding.encoders.items() if shape.pooled},
            size=tuple(facts["size"]),
            box=tuple(facts["box"]),
            width=int(metadata["width"]),
            height=int(metadata["height"]),
            meta=facts["meta"],
        )
        fits = _fits(sample, encoding)
    except _DAMAGED as error:
        raise BadImage(f"damaged encoded sample ({type(error).__name__})") from error
    if not fits:
        raise BadImage("encoded sample that does not fit the encoding of its set")
    return sample


def encoded_size(data: bytes | memoryview) -> tuple[int, int]:
    """Reads (width, height) in px of the encoded picture from the header of a sample.

    Raises:
        BadImage: it is damaged.
    """
    try:
        metadata = _header(data)[0]["__metadata__"]
        return int(metadata["width"]), int(metadata["height"])
    except _DAMAGED as error:
        raise BadImage(f"damaged encoded sample ({type(error).__name__})") from error


def cut_box(sample: EncodedSample, width: int, height: int) -> tuple[int, int, int, int]:
    """What of the original `collate` leaves to see when it cuts the sample to width x height px, like `box`."""
    left, top, right, bottom = sample.box
    across, down = (right - left) / sample.width, (bottom - top) / sample.height  # px of the original per px
    x, y = (sample.width - width) // 2, (sample.height - height) // 2
    return (
        round(left + x * across),
        round(top + y * down),
        round(left + (x + width) * across),
        round(top + (y + height) * down),
    )


def collate(
    samples: Sequence[EncodedSample | None], width: int, height: int, choices: Sequence[int], encoding: Encoding
) -> EncodedBatch:
    """Copies samples into one batch.

    Args:
        samples: B samples of the set; None is a masked one and becomes zeros.
        width: px of every picture of the batch; the middle of larger latents is cut out.
        height: px.
        choices: B numbers: which caption each sample trains with.
        encoding: of the set.

    Raises:
        ValueError: a sample is smaller than the batch's pictures.
    """
    rows, columns = height // encoding.downsampling, width // encoding.downsampling
    moments = np.zeros((len(samples), encoding.latent_channels, rows, columns), np.uint16)
    for place, sample in enumerate(samples):
        if sample is not None:
            top, left = sample.moments.shape[1] - rows, sample.moments.shape[2] - columns
            if top < 0 or left < 0:
                raise ValueError(f"an encoded {sample.width}x{sample.height} px cannot be cut to {width}x{height}")
            top, left = top // 2, left // 2
            moments[place] = sample.moments[:, top : top + rows, left : left + columns]
    batch = EncodedBatch(moments=_bfloat16(moments), tokens={}, scales={}, masks={}, pooled={})
    for name, shape in encoding.encoders.items():
        _collate_text(batch, name, shape, samples, choices, encoding)
    return batch


def _collate_text(
    batch: EncodedBatch,
    name: str,
    shape: EncoderShape,
    samples: Sequence[EncodedSample | None],
    choices: Sequence[int],
    encoding: Encoding,
) -> None:
    """Adds one encoder's features to the batch."""
    float8 = encoding.text_dtype == "float8_e4m3fn"
    lengths = [
        0 if sample is None else sample.lengths[name][choice] for sample, choice in zip(samples, choices, strict=True)
    ]
    longest = max([1, *lengths])
    tokens = np.zeros((len(samples), longest, shape.width), np.uint8 if float8 else np.uint16)
    scales = np.zeros((len(samples), longest), np.float32) if float8 else None
    pooled = np.zeros((len(samples), shape.pooled), np.uint16)
    for place, (sample, choice, length) in enumerate(zip(samples, choices, lengths, strict=True)):
        if sample is None:
            continue
        first = sum(sample.lengths[name][:choice])
        tokens[place, :length] = sample.tokens[name][first : first + length]
        if scales is not None:
            scales[place, :length] = sample.scales[name][first : first + length]
        if shape.pooled:
            pooled[place] = sample.pooled[name][choice]
    batch.tokens[name] = torch.from_numpy(tokens).view(torch.float8_e4m3fn) if float8 else _bfloat16(tokens)
    batch.masks[name] = torch.from_numpy(np.arange(longest) < np.array(lengths)[:, None])
    if scales is not None:
        batch.scales[name] = torch.from_numpy(scales)
    if shape.pooled:
        batch.pooled[name] = _bfloat16(pooled)


def _bfloat16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _header(data: bytes | memoryview) -> tuple[dict[str, Any], int]:
    """The header and where the tensors' bytes begin (https://github.com/huggingface/safetensors, "Format")."""
    base = 8 + int.from_bytes(data[:8], "little")
    if base > len(data):
        raise ValueError("cut short")
    return json.loads(bytes(data[8:base])), base


def _view(data: bytes | memoryview, base: int, entry: dict[str, Any]) -> np.ndarray:
    dtype, shape, (begin, end) = _STORED[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not 0 <= begin < end or min(shape) < 1:
        raise ValueError("impossible offsets or shape")
    return np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, base + begin).reshape(shape)


def _fits(sample: EncodedSample, encoding: Encoding) -> bool:
    channels, rows, columns = sample.moments.shape
    if (
        channels != encoding.latent_channels
        or (columns * encoding.downsampling, rows * encoding.downsampling) != (sample.width, sample.height)
        or sample.moments.dtype != np.uint16
        or not sample.captions
        or not all(isinstance(text, str) and weight > 0 for text, weight in sample.captions)
        or not isinstance(sample.meta, dict)
        or [type(number) for number in (*sample.size, *sample.box)] != [int] * 6
    ):
        return False
    dtype = np.uint8 if encoding.text_dtype == "float8_e4m3fn" else np.uint16
    for name, shape in encoding.encoders.items():
        tokens, lengths = sample.tokens[name], sample.lengths[name]
        if (
            tokens.dtype != dtype
            or [type(length) for length in lengths] != [int] * len(sample.captions)
            or not 1 <= min(lengths) <= max(lengths) <= shape.max_tokens
            or tokens.shape != (sum(lengths), shape.width)
            or (name in sample.scales and sample.scales[name].shape != (len(tokens),))
            or (shape.pooled and sample.pooled[name].shape != (len(lengths), shape.pooled))
        ):
            return False
    return True
