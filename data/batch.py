"""What the loader gives: one micro-batch of one shape."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from data.encoded import EncodedBatch
from data.streams import Position
from data.transforms import to_float


@dataclass(kw_only=True)
class Batch:
    """One micro-batch of one shape: pictures, or what `darkroom encode` made of them.

    A bad sample keeps its place: weight 0, a grey image, an empty caption, a line in `bad`.
    """

    pixels: Tensor  # (B, 3, H, W) uint8; (B, 3, 0, 0) if encoded
    encoded: EncodedBatch | None = None
    captions: list[str]
    keys: list[str]
    sample_numbers: Tensor  # (B,) int64: run-wide number of each sample, the key of all its randomness
    weights: Tensor  # (B,) float32: 1, or 0 for a masked sample
    sizes: Tensor  # (B, 2) int32: width and height of the original as displayed, px
    crops: Tensor  # (B, 4) int32: left, top, right, bottom of what is kept of it, px
    bad: list[dict[str, Any]]  # {"key", "shard", "sample_number", "reason"} of each masked sample
    metas: list[dict[str, Any]]  # the sample's JSON, or {}
    visits: Tensor  # (B,) int64: data set, epoch and sample, see data.streams.unpack_visits
    filtered: Tensor  # (F,) int64: visits that a filter refused since the stream's last micro-batch
    filtered_by: dict[str, int] = field(default_factory=dict)  # rule: how many of them
    stream: int
    positions: tuple[Position, ...]  # of the stream's window once this batch is behind; for the cursor

    def images(self, device: torch.device | str = "cpu") -> Tensor:
        """The pictures on a device, (B, 3, H, W) float32 in [-1, 1]; they travel as bytes."""
        return to_float(self.pixels.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which copies to a GPU do not hold up the host; DataLoader calls it."""
        pinned: dict[str, Any] = {k: value.pin_memory() for k, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **pinned, encoded=self.encoded and self.encoded.pin_memory())
