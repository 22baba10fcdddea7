"""All text encoders together: captions to what the DiT is told, in the layout of SD3 (arXiv:2403.03206, 4.1)."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.text_tower import TextEncoder

_CHUNK = 16  # captions per forward pass; always the same shape, so that a caption's features never depend on its batch
_CACHE_BYTES = 128 * 2**20  # per encoder
_MIN_CACHE_ROWS = 512  # a cache of fewer captions than this would only cost


@dataclass(frozen=True)
class TextCondition:
    """What the DiT is told of a batch of captions.

    Attributes:
        text_embeds: (B, L, D) float32.
        pooled: (B, P) float32.
        text_mask: (B, L) bool, True = keep; None keeps all. The conditioner gives None: as in SD3, padding is attended
            to, and so serving needs no mask either.
    """

    text_embeds: Tensor
    pooled: Tensor
    text_mask: Tensor | None = None


class JointEncoders(nn.Module):
    """Several frozen text encoders and their joint layout; `models.text_encoder.Conditioner` builds and saves them.

    The CLIP features stand beside each other in the channels, padded with zeros to D; the T5 tokens follow behind
    them; the pooled vectors of the CLIPs stand beside each other.

    Attributes:
        encoders: In order, the CLIPs before the T5.
        names: Their labels.
        dropout: Their dropout probabilities, for training to draw from.
        text_dim: D.
        pooled_dim: P.
        num_tokens: L.

    Args:
        encoders: One or more of kind "clip", all with the same max_tokens, and at most one of kind "t5".

    Raises:
        ModelError: The encoders do not go together.
    """

    def __init__(self, encoders: list[TextEncoder]) -> None:
        super().__init__()
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
        self._caches = [_RowCache(e.config.max_tokens * e.width + e.pooled_dim) for e in encoders]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "JointEncoders":
        super()._apply(fn, recurse)  # a move to another device or type
        for cache in self._caches:
            cache.clear()
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
        device_type = next(self.parameters()).device.type
        with torch.autocast(device_type, enabled=False):  # features are cached: they must not depend on the caller
            rows = self._rows(captions, drop)
        return self._lay_out(rows)

    def _rows(self, captions: list[str], drop: Tensor | None) -> list[Tensor]:
        """Per encoder, (B, L·D + P): its tokens and pooled vector in one row."""
        rows = []
        for number, cache in enumerate(self._caches):
            heard = captions
            if drop is not None:
                dropped = drop[:, number].tolist()
                heard = ["" if gone else caption for caption, gone in zip(captions, dropped, strict=True)]
            rows.append(cache.get(heard, self._encode_rows(number)))
        return rows

    def _lay_out(self, rows: list[Tensor]) -> TextCondition:
        embeds = rows[0].new_zeros(len(rows[0]), self.num_tokens, self.text_dim)
        pooled, channel, first = [], 0, 0
        for encoder, row in zip(self.text_encoders(), rows, strict=True):
            length, width = encoder.config.max_tokens, encoder.width
            if encoder.config.kind == "t5":
                channel, first = 0, self.clip_tokens
            tokens = row[:, : length * width].view(-1, length, width)
            embeds[:, first : first + length, channel : channel + width] = tokens  # (B, L_encoder, D_encoder)
            pooled.append(row[:, length * width :])
            channel += width
        return TextCondition(embeds, torch.cat(pooled, dim=1))

    def null(self) -> TextCondition:
        """The condition of one empty caption, B = 1."""
        return self.encode([""])

    def text_encoders(self) -> list[TextEncoder]:
        """The encoders in order."""
        return [encoder for encoder in self.encoders if isinstance(encoder, TextEncoder)]

    def _encode_rows(self, number: int) -> Callable[[list[str]], Tensor]:
        """A function from captions to an encoder's rows."""
        encoder = self.text_encoders()[number]

        def encode(captions: list[str]) -> Tensor:
            parts = []
            for start in range(0, len(captions), _CHUNK):
                chunk = captions[start : start + _CHUNK]
                tokens, _, pooled = encoder.encode(chunk + [""] * (_CHUNK - len(chunk)))
                row = tokens.flatten(1)
                row = row if pooled is None else torch.cat((row, pooled), dim=1)
                parts.append(row[: len(chunk)])
            return torch.cat(parts)

        return encode


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

    def get(self, captions: list[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
        """(B, row) of the captions; `encode` is asked for those that are not here, each once."""
        unique = list(dict.fromkeys(captions))
        if len(unique) > self.capacity:
            order = {caption: place for place, caption in enumerate(unique)}
            return encode(unique)[[order[caption] for caption in captions]]
        missing = []
        for caption in unique:
            if caption in self._places:
                self._places.move_to_end(caption)
            else:
                missing.append(caption)
        if missing:
            self._store(missing, encode(missing))
        return self._table[[self._places[caption] for caption in captions]]

    def _store(self, captions: list[str], rows: Tensor) -> None:
        new_places = []
        for caption in captions:
            full = len(self._places) >= self.capacity
            place = self._places.popitem(last=False)[1] if full else len(self._places)
            self._places[caption] = place
            new_places.append(place)
        if max(new_places) >= len(self._table):  # grow by doubling: most runs never need the whole capacity
            grown = rows.new_empty(min(self.capacity, max(2 * len(self._table), 2 * len(self._places))), rows.shape[1])
            if len(self._table):
                grown[: len(self._table)] = self._table
            self._table = grown
        self._table[new_places] = rows
