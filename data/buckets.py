"""Which shape each picture trains in, and which samples share a micro-batch: pure functions of sizes.

Sides are in pixels and a size is (width, height). The user's page is docs/data.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Size = tuple[int, int]

# Shapes whose areas differ by less than this factor count as one resolution: rounding to `multiple` costs a bucket up
# to a quarter of its area, while resolutions worth having apart differ by far more.
_SAME_RESOLUTION = 0.7
_MAX_RESOLUTION = 8000  # px; no picture larger than its square is ever decoded (data.decode)
_MAX_SHAPES = 10_000  # of one resolution


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """The shapes that pictures train in."""

    resolutions: tuple[int, ...] = ()  # px, sides of the squares whose areas the buckets keep; () = image_size alone
    max_aspect_ratio: float = 2.0  # longest side over shortest, at least 1; 1 = squares alone
    multiple: int = 64  # px, every side is a multiple of it

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"multiple={self.multiple}: must be at least 1 pixel")
        if not (math.isfinite(self.max_aspect_ratio) and self.max_aspect_ratio >= 1):
            raise ValueError(f"max_aspect_ratio={self.max_aspect_ratio}: is longest over shortest side; give 1 or more")
        if len(set(self.resolutions)) < len(self.resolutions):
            raise ValueError(f"resolutions={list(self.resolutions)}: one is given twice; keep one")
        for resolution in self.resolutions:
            _check_resolution(resolution, self.multiple)


def make_buckets(image_size: int, config: BucketConfig | None) -> tuple[Size, ...]:
    """Returns the shapes (width, height) in pixels, sorted by resolution, then by width over height.

    For a resolution r these are, for every long side, the largest short side (both multiples of `multiple`) that keeps
    the area within r², in both orientations, as far as the aspect ratio is allowed. The square r x r is always there.

    Args:
        image_size: px; the one resolution if the config names none.
        config: None = the square of image_size alone.

    Raises:
        ValueError: a resolution that is no multiple of `multiple`.
    """
    if config is None:
        _check_resolution(image_size, 1)
        return ((image_size, image_size),)
    buckets: dict[Size, None] = {}  # keeps order; two resolutions may share an extreme shape
    for resolution in sorted(config.resolutions or (image_size,)):
        _check_resolution(resolution, config.multiple)
        shapes: set[Size] = set()
        for long in range(resolution, resolution**2 // config.multiple + 1, config.multiple):
            short = resolution**2 // long // config.multiple * config.multiple
            if long > config.max_aspect_ratio * short:
                break
            if len(shapes) > _MAX_SHAPES:
                raise ValueError(
                    f"multiple={config.multiple}: more than {_MAX_SHAPES} buckets of resolution {resolution}; raise it"
                )
            shapes |= {(long, short), (short, long)}
        buckets |= dict.fromkeys(sorted(shapes, key=_aspect))
    return tuple(buckets)


def assign_buckets(
    widths: Sequence[int] | np.ndarray, heights: Sequence[int] | np.ndarray, buckets: Sequence[Size]
) -> np.ndarray:
    """Returns the number of each picture's bucket, (N,) int64.

    In each resolution the picture's bucket is the one nearest in log(width / height). Of the resolutions, the largest
    whose bucket fits into the picture (nothing is enlarged) is taken, and the smallest where none fits. A picture of
    0 x 0 pixels, which cannot be read, gets a valid bucket too. No logarithm is computed, so that every machine agrees.

    Args:
        widths, heights: px of the pictures as displayed, N each.
        buckets: as `make_buckets` returns them.
    """
    width, height = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    aspect = np.maximum(width, 1) / np.maximum(height, 1)
    chosen = np.zeros(len(aspect), np.int64)
    for turn, (first, end) in enumerate(_resolution_ranges(buckets)):
        sides = np.asarray(buckets[first:end], np.int64)  # (K, 2)
        aspects = sides[:, 0] / sides[:, 1]
        # The middle between two logarithms is the geometric mean.
        nearest = np.searchsorted(np.sqrt(aspects[:-1] * aspects[1:]), aspect)
        fits = (width >= sides[nearest, 0]) & (height >= sides[nearest, 1])
        chosen = np.where(fits | (turn == 0), first + nearest, chosen)
    return chosen


def group_window(own: Sequence[Size] | np.ndarray, micro_batch_size: int, fixed: bool) -> list[tuple[Size, list[int]]]:
    """Splits a window of samples into micro-batches of one shape each; every sample is in exactly one.

    First come the full groups: samples of one shape, in order of arrival, each group as soon as it is complete. The
    leftovers are sorted by resolution, aspect ratio and arrival and cut into runs, so that a sample moves to a shape
    near its own; from one resolution to the next the aspect ratios turn back, so that a run across both holds like
    ones. A run's shape is

    - fixed=False (pictures, which can be cropped anew): that of the middle one among its members of the smallest
      resolution, so that no picture is asked for more than its own resolution;
    - fixed=True (stored latents, which can only be cut): the smallest width and the smallest height in the run.

    Areas within 30 % of the largest count as one resolution.

    Args:
        own: (width, height) px of each sample's own bucket, in order of arrival, N of them. Samples of 0 x 0, which
            cannot be read, go with any others.
        micro_batch_size: samples in a micro-batch; divides N.
        fixed: see above.

    Returns:
        N / micro_batch_size pairs: the shape and the places of its samples in `own`.

    Raises:
        ValueError: micro_batch_size does not divide N.
    """
    if micro_batch_size < 1 or len(own) % micro_batch_size:
        raise ValueError(f"a window of {len(own)} samples is no multiple of micro_batch_size={micro_batch_size}")
    if not len(own):
        return []
    sides = _with_unreadable(np.asarray(own, np.int64))  # (N, 2)
    _, first, shape = np.unique(sides[:, 0] << 32 | sides[:, 1], return_index=True, return_inverse=True)
    shapes = sides[first]  # (K, 2), the distinct ones
    by_shape = np.argsort(shape, kind="stable")
    counts = np.bincount(shape)
    place_in_shape = np.arange(len(own)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_full = place_in_shape < np.repeat(counts // micro_batch_size * micro_batch_size, counts)
    full = by_shape[is_full].reshape(-1, micro_batch_size)
    full = full[np.argsort(full[:, -1])]
    groups = [(_size(sides[members[0]]), members.tolist()) for members in full]

    resolution = _resolution_ranks(shapes[:, 0] * shapes[:, 1])  # (K,)
    left = np.sort(by_shape[~is_full])
    aspect = shapes[:, 0] / shapes[:, 1] * np.where(resolution % 2, 1, -1)
    for members in left[np.lexsort((aspect[shape[left]], resolution[shape[left]]))].reshape(-1, micro_batch_size):
        ranks = resolution[shape[members]]
        if fixed:
            target = _size(sides[members].min(axis=0))
        else:
            target = _size(sides[members[np.count_nonzero(ranks == ranks[0]) // 2]])
        groups.append((target, members.tolist()))
    return groups


def _check_resolution(resolution: int, multiple: int) -> None:
    if resolution < 1 or resolution % multiple:
        raise ValueError(f"resolution {resolution} is no multiple of multiple={multiple}; change one of them")
    if resolution > _MAX_RESOLUTION:
        raise ValueError(f"resolution {resolution} is more than {_MAX_RESOLUTION} px; lower it")


def _aspect(size: Size) -> float:
    return size[0] / size[1]


def _size(sides: np.ndarray) -> Size:
    return int(sides[0]), int(sides[1])


def _with_unreadable(sides: np.ndarray) -> np.ndarray:
    """Gives samples without a size that of the first one with a size."""
    readable = sides.min(axis=1) > 0
    if readable.all():
        return sides
    stand_in = sides[np.argmax(readable)] if readable.any() else np.ones(2, np.int64)
    return np.where(readable[:, None], sides, stand_in)


def _resolution_ranges(buckets: Sequence[Size]) -> list[tuple[int, int]]:
    """[first, end) of each resolution: aspect ratios ascend within one, and every one reaches from <= 1 to >= 1."""
    starts = [n for n in range(len(buckets)) if n == 0 or _aspect(buckets[n]) <= _aspect(buckets[n - 1])]
    return list(zip(starts, [*starts[1:], len(buckets)], strict=True))


def _resolution_ranks(areas: np.ndarray) -> np.ndarray:
    """A number per area that is equal for areas of one resolution and larger for larger ones, (K,)."""
    ranks = np.zeros(len(areas), np.int64)
    top = math.inf
    for number in np.argsort(-areas, kind="stable"):
        if areas[number] < _SAME_RESOLUTION * top:
            top = areas[number]
            ranks[areas <= top] -= 1
    return ranks
