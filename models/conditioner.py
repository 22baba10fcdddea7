"""All text encoders together: captions to what the DiT is told, in the layout of SD3 (arXiv:2403.03206, 4.1)."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.text_tower import TextEncoder

_CHUNK = 16  # captions per forward pass; always the same shape, so that a caption's features never depend on its batch
_CACHE_BYTES = 128 * 2**20  # per encoder
_MIN_CACHE_ROWS = 512  # a cache of fewer captions than this would only cost
# Masked text is cut behind the batch's longest, rounded up to this many tokens: few shapes, so that neither kernels nor
# a compiled graph are chosen anew for every batch, and rows that start where the attention kernels of GPUs want them.
_LENGTH_MULTIPLE = 8

TextPadding = Literal["attended", "masked"]


@dataclass(frozen=True)
class TextCondition:
    """What the DiT is told of a batch of captions.

    Attributes:
        text_embeds: (B, L, D) float32.
        pooled: (B, P) float32.
        text_mask: (B, L) bool, True = keep; None keeps all.
    """

    text_embeds: Tensor
    pooled: Tensor
    text_mask: Tensor | None = None

    def to(self, device: torch.device) -> "TextCondition":
        """The same on a device."""
        mask = None if self.text_mask is None else self.text_mask.to(device)
        return TextCondition(self.text_embeds.to(device), self.pooled.to(device), mask)


@dataclass(frozen=True)
class TextFeatures:
    """What one encoder makes of a batch of captions.

    Attributes:
        tokens: (B, L, D) float32; L at most the encoder's max_tokens.
        mask: (B, L) bool on the CPU, so that its lengths cost no host sync; True = a token of the caption, not padding.
        pooled: (B, P) float32; P = 0 for T5.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class JointEncoders(nn.Module):
    """Several frozen text encoders and their joint layout; `models.text_encoder.Conditioner` builds and saves them.

    The CLIP features stand beside each other in the channels, padded with zeros to D; the T5 tokens follow behind
    them; the pooled vectors of the CLIPs stand beside each other. With masked padding both parts end, each for itself,
    soon behind the longest text of the batch: L is a batch's own, at most num_tokens.

    Attributes:
        encoders: In order, the CLIPs before the T5.
        names: Their labels.
        dropout: Their dropout probabilities, for training to draw from.
        text_dim: D.
        pooled_dim: P.
        num_tokens: The largest L, which every batch has if padding is attended to.

    Args:
        encoders: One or more of kind "clip", all with the same max_tokens, and at most one of kind "t5".
        text_padding: See above.

    Raises:
        ModelError: The encoders do not go together.
    """

    def __init__(self, encoders: list[TextEncoder], text_padding: TextPadding = "attended") -> None:
        super().__init__()
        self.text_padding = text_padding
        clips = [encoder for encoder in encoders if encoder.config.kind == "clip"]
        t5s = [encoder for encoder in encoders if encoder.config.kind == "t5"]
        self.names = [encoder.config.name for encoder in encoders]
        if len(set(self.names)) < len(self.names):
            raise ModelError(f"two text encoders have the same name: {', '.join(self.names)}: rename one")
        if not clips or len(t5s) > 1 or encoders != clips + t5s:
            raise ModelError("the text encoders must be one or more of kind clip, then at most one of kind t5")
        if len({encoder.config.max_tokens for encoder in clips}) > 1:
            raise ModelError("the CLIP text encoders stand side by side: give all of them the same max_tokens")
        self.encoders = nn.ModuleList(encoders)
        self.dropout = [encoder.config.dropout for encoder in encoders]
        self.clip_tokens = clips[0].config.max_tokens
        self.num_tokens = self.clip_tokens + sum(encoder.config.max_tokens for encoder in t5s)
        self.text_dim = max([sum(encoder.width for encoder in clips)] + [encoder.width for encoder in t5s])
        self.pooled_dim = sum(encoder.pooled_dim for encoder in clips)
        self._caches = [_RowCache(self._row_floats(encoder)) for encoder in encoders]
        self._nulls: dict[tuple[int, torch.device | None], TextFeatures] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "JointEncoders":
        super()._apply(fn, recurse)  # a move to another device or type
        for cache in self._caches:
            cache.clear()
        self._nulls.clear()
        return self

    def train(self, mode: bool = True) -> "JointEncoders":
        """Stays in evaluation mode: the encoders are frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: list[str], drop: Tensor | None = None) -> TextCondition:
        """Encodes captions; repeated ones come from a bounded cache.

        Args:
            captions: B texts; "" is the null condition.
            drop: (B, E) bool on the CPU, True replaces the caption by "" for that encoder; None drops nothing.

        Returns:
            The condition on the encoders' device.
        """
        return self._lay_out(self.recall(captions, drop))

    @torch.no_grad()
    def recall(self, captions: list[str], drop: Tensor | None = None) -> list[TextFeatures]:
        """What each encoder makes of captions, in order, as `encode` asks for it: `join` makes the condition of it."""
        features = []
        for number in range(len(self.names)):
            heard = captions
            if drop is not None:
                dropped = drop[:, number].tolist()
                heard = ["" if gone else caption for caption, gone in zip(captions, dropped, strict=True)]
            features.append(self._cached(number, heard))
        return features

    @torch.no_grad()
    def features(self, captions: list[str]) -> list[TextFeatures]:
        """What each encoder makes of captions, in order; nothing is looked up in the cache or kept there."""
        return [self._split(number, *self._encode_rows(number)(captions)) for number in range(len(self.names))]

    @torch.no_grad()
    def join(self, features: Sequence[TextFeatures], drop: Tensor | None = None) -> TextCondition:
        """The condition that `encode` would give, from features that were made before.

        Args:
            features: Of B captions by each encoder, in order, on one device; attended padding is among them.
            drop: (B, E) bool on the CPU, True replaces an encoder's features by those of "".

        Returns:
            The condition on the features' device.
        """
        return self._lay_out(self.with_nulls(features, drop))

    @torch.no_grad()
    def with_nulls(self, features: Sequence[TextFeatures], drop: Tensor | None = None) -> list[TextFeatures]:
        """Features of B captions by each encoder with those that `drop` (B, E) names replaced by its features of ""."""
        heard = []
        for number, stored in enumerate(features):
            gone = None if drop is None else drop[:, number]
            if gone is not None and gone.any():
                stored = _replace(stored, gone, self.null_features(number, stored.tokens.device))
            heard.append(stored)
        return heard

    def _lay_out(self, features: Sequence[TextFeatures]) -> TextCondition:
        clip_length, length = self._lengths(features)
        embeds = features[0].tokens.new_zeros(len(features[0].tokens), length, self.text_dim)
        mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        pooled, channel, part = [], 0, slice(0, clip_length)
        for encoder, own in zip(self.text_encoders(), features, strict=True):
            if encoder.config.kind == "t5":
                channel, part = 0, slice(clip_length, length)
            tokens = own.tokens[:, : part.stop - part.start]  # (B, L_encoder, D_encoder)
            places = slice(part.start, part.start + tokens.shape[1])
            embeds[:, places, channel : channel + encoder.width] = tokens
            mask[:, places] |= own.mask[:, : tokens.shape[1]]
            pooled.append(own.pooled)
            channel += encoder.width
        text_mask = mask.to(embeds.device, non_blocking=True) if self.text_padding == "masked" else None
        return TextCondition(embeds, torch.cat(pooled, dim=1), text_mask)

    def _lengths(self, features: Sequence[TextFeatures]) -> tuple[int, int]:
        """Tokens of the CLIP part and of the whole layout: all, or what the longest texts of this batch need."""
        if self.text_padding == "attended":
            return self.clip_tokens, self.num_tokens
        longest = {"clip": 0, "t5": 0}
        for encoder, own in zip(self.text_encoders(), features, strict=True):
            longest[encoder.config.kind] = max(longest[encoder.config.kind], int(own.mask.sum(1).max()))
        clip, t5 = (math.ceil(length / _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE for length in longest.values())
        clip, t5 = min(clip, self.clip_tokens), min(t5, self.num_tokens - self.clip_tokens)
        return clip, clip + t5

    def null(self) -> TextCondition:
        """The condition of one empty caption, B = 1."""
        return self.encode([""])

    def text_encoders(self) -> list[TextEncoder]:
        """The encoders in order."""
        return [encoder for encoder in self.encoders if isinstance(encoder, TextEncoder)]

    # A caption's features travel and are cached as one row, its tokens and its pooled vector; beside the rows, on the
    # CPU, how many tokens are its own.

    def _row_floats(self, encoder: TextEncoder) -> int:
        return encoder.config.max_tokens * encoder.width + encoder.pooled_dim

    def _cached(self, number: int, captions: list[str]) -> TextFeatures:
        return self._split(number, *self._caches[number].get(captions, self._encode_rows(number)))

    @torch.no_grad()
    def null_features(self, number: int, device: torch.device | None = None) -> TextFeatures:
        """An encoder's features of "", without masked padding; made once, however large they are.

        Args:
            number: Of the encoder.
            device: Where features and pooled vector shall lie; None = where the encoder is. The mask is on the CPU.
        """
        key = number, device
        if key not in self._nulls:
            if device is None:
                null = self._split(number, *self._encode_rows(number)([""]))
                length = int(null.mask.sum()) if self.text_padding == "masked" else null.tokens.shape[1]
                null = TextFeatures(null.tokens[:, :length], null.mask[:, :length], null.pooled)
            else:
                null = self.null_features(number)
                null = TextFeatures(null.tokens.to(device), null.mask, null.pooled.to(device))
            self._nulls[key] = null
        return self._nulls[key]

    def _split(self, number: int, rows: Tensor, lengths: Tensor) -> TextFeatures:
        """Rows (B, L·D + P) of an encoder taken apart."""
        encoder = self.text_encoders()[number]
        length, end = encoder.config.max_tokens, encoder.config.max_tokens * encoder.width
        mask = torch.arange(length) < lengths[:, None]
        return TextFeatures(rows[:, :end].view(-1, length, encoder.width), mask, rows[:, end:])

    def _encode_rows(self, number: int) -> "_Encode":
        """A function from captions to an encoder's rows and lengths."""
        encoder, masked = self.text_encoders()[number], self.text_padding == "masked"
        device_type = next(encoder.parameters()).device.type

        def encode(captions: list[str]) -> tuple[Tensor, Tensor]:
            rows, lengths = [], []
            for start in range(0, len(captions), _CHUNK):
                chunk = captions[start : start + _CHUNK]
                with torch.autocast(device_type, enabled=False):  # rows are cached: they must not depend on the caller
                    tokens, mask, pooled = encoder.encode(chunk + [""] * (_CHUNK - len(chunk)), masked)
                row = [tokens.flatten(1), *([] if pooled is None else [pooled])]
                rows.append(torch.cat(row, dim=1)[: len(chunk)])
                lengths.append(mask.sum(1)[: len(chunk)])
            return torch.cat(rows), torch.cat(lengths)

        return encode


def _replace(stored: TextFeatures, gone: Tensor, null: TextFeatures) -> TextFeatures:
    """Features of B captions with those that are gone, (B,) bool, replaced by the only one of `null`."""
    length = max(stored.tokens.shape[1], null.tokens.shape[1])

    def choose(new: Tensor, old: Tensor) -> Tensor:
        where = gone.to(old.device, non_blocking=True).view(-1, *(1,) * (old.ndim - 1))
        return torch.where(where, new, old)

    def longer(features: TextFeatures) -> tuple[Tensor, Tensor]:
        behind = length - features.mask.shape[1]
        return F.pad(features.tokens, (0, 0, 0, behind)), F.pad(features.mask, (0, behind))

    (null_tokens, null_mask), (tokens, mask) = longer(null), longer(stored)
    return TextFeatures(choose(null_tokens, tokens), choose(null_mask, mask), choose(null.pooled, stored.pooled))


_Encode = Callable[[list[str]], tuple[Tensor, Tensor]]  # captions to rows (B, row), and how many tokens are theirs (B,)


class _RowCache:
    """The last captions' rows in one table, so that a batch is one gather. The least recently used go first."""

    def __init__(self, row_floats: int) -> None:
        capacity = _CACHE_BYTES // (4 * row_floats)
        self.capacity = capacity if capacity >= _MIN_CACHE_ROWS else 0  # captions
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._places: OrderedDict[str, int] = OrderedDict()  # caption to row of the table, oldest first
        self._table = torch.empty(0, 0)
        self._lengths = torch.empty(0, dtype=torch.int64)  # beside the rows, on the CPU

    def get(self, captions: list[str], encode: _Encode) -> tuple[Tensor, Tensor]:
        """Rows (B, row) and lengths (B,) of the captions; `encode` is asked for those that are not here, each once."""
        unique = list(dict.fromkeys(captions))
        if len(unique) > self.capacity:
            order = {caption: place for place, caption in enumerate(unique)}
            rows, lengths = encode(unique)
            picked = [order[caption] for caption in captions]
            return rows[_index(picked, rows)], lengths[picked]
        missing = []
        for caption in unique:
            if caption in self._places:
                self._places.move_to_end(caption)
            else:
                missing.append(caption)
        if missing:
            self._store(missing, *encode(missing))
        picked = [self._places[caption] for caption in captions]
        return self._table[_index(picked, self._table)], self._lengths[picked]

    def _store(self, captions: list[str], rows: Tensor, lengths: Tensor) -> None:
        new_places = []
        for caption in captions:
            full = len(self._places) >= self.capacity
            place = self._places.popitem(last=False)[1] if full else len(self._places)
            self._places[caption] = place
            new_places.append(place)
        if max(new_places) >= len(self._table):  # grow by doubling: most runs never need the whole capacity
            size = min(self.capacity, max(2 * len(self._table), 2 * len(self._places)))
            self._table = _grown(self._table, rows, size)
            self._lengths = _grown(self._lengths, lengths, size)
        self._table[_index(new_places, rows)], self._lengths[new_places] = rows, lengths


def _index(places: list[int], table: Tensor) -> Tensor:
    """An index beside the table. torch would make one of a list, and have the host wait for the copy to a GPU."""
    return torch.tensor(places).to(table.device, non_blocking=True)


def _grown(table: Tensor, like: Tensor, size: int) -> Tensor:
    """A longer table with the old one at its beginning."""
    grown = like.new_empty(size, *like.shape[1:])
    if len(table):
        grown[: len(table)] = table
    return grown
