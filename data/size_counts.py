"""Counts of picture sizes and of how they fill the buckets, for data.stats; memory holds one window of samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.buckets import Size, assign_buckets, group_window

WINDOW_MICRO_BATCHES = 64
_SHORT_SIDES = (1, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # px, where a class begins
# Width over height; the limits stand between the ratios that cameras and papers have: 9:16, 2:3, 3:4, 4:5, 1:1, 5:4 …
_ASPECTS = (0.0, 0.4, 0.53, 0.61, 0.7, 0.77, 0.91, 1.1, 1.3, 1.42, 1.65, 1.9, 2.5)
_COLUMNS = ("samples", "kept", "enlarged", "grouped", "moved", "moved_kept")  # of the table of buckets; all are sums


class SizeCounts:
    """Counts sizes and buckets; holds one window of samples at a time."""

    def __init__(self, buckets: Sequence[Size], micro_batch_size: int) -> None:
        self._buckets = buckets  # none: every sample is stored in a shape of its own
        self._micro_batch_size = micro_batch_size
        self._waiting = np.zeros((0, 2), np.int64)
        self._unreadable = 0
        self._short = np.zeros(len(_SHORT_SIDES), np.int64)
        self._aspects = np.zeros(len(_ASPECTS), np.int64)
        self._by_bucket: dict[Size, np.ndarray] = {bucket: np.zeros(len(_COLUMNS)) for bucket in buckets}

    def add(self, sides: np.ndarray) -> None:
        """Adds samples, (N, 2) px, in their order."""
        readable = sides.min(axis=1) > 0
        self._unreadable += int(np.count_nonzero(~readable))
        sides = sides[readable]
        self._short += histogram(sides.min(axis=1), _SHORT_SIDES)
        self._aspects += histogram(sides[:, 0] / sides[:, 1], _ASPECTS)
        self._waiting = np.concatenate([self._waiting, sides])
        window = WINDOW_MICRO_BATCHES * self._micro_batch_size
        while len(self._waiting) >= window:
            self._add_window(self._waiting[:window])
            self._waiting = self._waiting[window:]

    def facts(self) -> dict[str, Any]:
        """All of it, as plain values."""
        if len(self._waiting):
            self._add_window(self._waiting)
            self._waiting = self._waiting[:0]
        found = sorted(self._by_bucket, key=lambda size: (size[0] * size[1], size[0] / size[1]))
        order = self._buckets or found
        table = np.array([self._by_bucket[bucket] for bucket in order]).reshape(-1, len(_COLUMNS))
        total, kept, enlarged, grouped, moved, moved_kept = table.sum(axis=0)
        return {
            "unreadable_images": self._unreadable,
            "short_side_px": classes(_SHORT_SIDES, samples=self._short),
            "aspect_ratio": classes(_ASPECTS, samples=self._aspects),
            "buckets": {
                "micro_batch_size": self._micro_batch_size,
                "window_micro_batches": WINDOW_MICRO_BATCHES,
                "kept_area": ratio(kept, total),
                "enlarged_share": ratio(enlarged, total),
                "moved_share": ratio(moved, grouped),
                "moved_kept_area": ratio(moved_kept, moved),
                "fill": [_bucket_facts(bucket, row, total) for bucket, row in zip(order, table, strict=True)],
            },
        }

    def _add_window(self, sides: np.ndarray) -> None:
        own, target = sides, sides.copy()
        if self._buckets:
            own = np.asarray(self._buckets, np.int64)[assign_buckets(sides[:, 0], sides[:, 1], self._buckets)]
            target = own.copy()
        whole = len(own) // self._micro_batch_size * self._micro_batch_size  # the set's last few fill no micro-batch
        for shape, members in group_window(own[:whole], self._micro_batch_size, fixed=not self._buckets):
            target[members] = shape
        is_moved = (own != target).any(axis=1)
        # A stored sample is cut as it is; a picture is cropped anew, and the crop depends on the aspect ratio alone.
        kept_after = target.prod(axis=1) / own.prod(axis=1) if not self._buckets else _crop_keeps(sides, target)
        columns = (
            np.ones(len(own)),
            _crop_keeps(sides, own),
            (own > sides).any(axis=1),
            np.arange(len(own)) < whole,
            is_moved,
            np.where(is_moved, kept_after, 0),
        )
        values = np.stack(columns, axis=1)  # (N, columns)
        shapes, number = np.unique(own, axis=0, return_inverse=True)
        for place, (width, height) in enumerate(shapes.tolist()):
            row = self._by_bucket.setdefault((width, height), np.zeros(len(_COLUMNS)))
            row += values[number.reshape(-1) == place].sum(axis=0)


def _bucket_facts(bucket: Size, row: np.ndarray, total: float) -> dict[str, Any]:
    samples, kept, enlarged, grouped, moved, _ = row
    return {
        "width": bucket[0],
        "height": bucket[1],
        "samples": int(samples),
        "share": ratio(samples, total),
        "kept_area": ratio(kept, samples),
        "enlarged_share": ratio(enlarged, samples),
        "moved_share": ratio(moved, grouped),
    }


def _crop_keeps(sides: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Share of each picture's area that the largest crop with the target's aspect ratio holds, (N,)."""
    proportion = (sides[:, 0] * target[:, 1]) / (sides[:, 1] * target[:, 0])
    return np.minimum(proportion, 1 / proportion)


def histogram(values: np.ndarray, starts: Sequence[float], counts: np.ndarray | None = None) -> np.ndarray:
    """Counts per class, (len(starts),); a class reaches from its start up to the next one's, the last without end."""
    places = np.searchsorted(starts, values, side="right") - 1
    return np.bincount(places, counts, minlength=len(starts)).astype(np.int64)


def classes(starts: Sequence[float], **counts: Any) -> list[dict[str, Any]]:
    """One row per class, the empty ones at both ends left out; `below` is None for the last, endless class."""
    rows = []
    for place, (start, end) in enumerate(zip(starts, [*starts[1:], None], strict=True)):
        rows.append({"from": start, "below": end} | {name: int(column[place]) for name, column in counts.items()})
    used = [place for place, row in enumerate(rows) if any(row[name] for name in counts)]
    return rows[used[0] : used[-1] + 1] if used else []


def ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
