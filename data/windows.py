"""One stream's micro-batches: reads its blocks, leaves out what the filters refuse, and cuts windows into buckets.

A window holds a fixed number of micro-batches' samples, in the stream's order. Samples of one bucket make micro-batches
among themselves; what is left over in the window joins its neighbours (data.buckets.group_window), so a window comes
out even: no sample waits for a rare bucket, none is dropped, and the window is the same whoever reads it. The contract
is docs/order.md.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.buckets import Size, assign_buckets, group_window
from data.decode import BadImage
from data.encoded import Encoding, unpack_sample
from data.errors import DataError
from data.filters import FilterRule, first_failed
from data.index import Index, load_rows
from data.keyed_random import keyed_permutation
from data.shard_reader import RawSample, read_rows
from data.streams import (
    Block,
    Order,
    Position,
    block_samples,
    pack_visits,
    shard_starts,
    stream_blocks,
    window_shares,
)

log = logging.getLogger(__name__)
_MANY_REFUSED = 10_000  # samples in a row that filters may refuse before it is worth a word


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set of the mix."""

    index: Index
    order: Order
    weight: float
    encoding: Encoding | None  # of latents and text features; None = pictures and captions


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How windows are cut."""

    seed: int
    micro_batch_size: int  # B
    micro_batches: int  # of a window
    buckets: tuple[Size, ...]  # picture shapes that a picture may be brought to
    filters: tuple[FilterRule, ...]


class Item(NamedTuple):
    """One visit to one sample."""

    visit: int  # packed, see data.streams
    data_set: DataSet
    shard: int  # number in the index
    sample: RawSample
    size: Size  # of the picture as displayed, (0, 0) if unreadable; of an encoded sample, what was encoded


_Row = tuple[int, RawSample, Size]


class MicroBatch(NamedTuple):
    """B visits of one shape and one kind."""

    shape: Size  # px
    items: list[Item]
    positions: tuple[Position, ...]  # where the stream's window begins once this micro-batch is behind
    filtered: np.ndarray  # (F,) packed visits refused by a filter since the last micro-batch that came out
    filtered_by: dict[str, int]  # rule: count


class StreamReader:
    """Yields, endlessly, the micro-batches of one stream from its number `first` on.

    Args:
        sets: the mix.
        stream: which stream.
        first: its micro-batches that are behind.
        positions: where its present window begins in each set.
        config: how windows are cut.
        pool: reads blocks ahead.
    """

    def __init__(
        self,
        sets: tuple[DataSet, ...],
        stream: int,
        first: int,
        positions: tuple[Position, ...],
        config: WindowConfig,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._sets, self._stream, self._config = sets, stream, config
        self._window, self._skip = divmod(first, config.micro_batches)
        self._sources = [
            _Source(data_set, stream, position, config.filters, pool)
            for data_set, position in zip(sets, positions, strict=True)
        ]

    def __iter__(self) -> Iterator[MicroBatch]:
        while True:
            begin = tuple(source.position for source in self._sources)
            batches = self._next_window()
            end = tuple(source.position for source in self._sources)
            refused = [source.take_filtered() for source in self._sources]
            filtered = np.concatenate([visits for visits, _ in refused])
            counts = sum((count for _, count in refused), Counter[str]())
            batches.reverse()
            while batches:
                shape, items = batches.pop()
                if self._skip:
                    self._skip -= 1
                else:
                    yield MicroBatch(shape, items, begin if batches else end, filtered, dict(counts))
                filtered, counts = filtered[:0], Counter[str]()  # a resume inside the window has counted them
            self._window += 1

    def _next_window(self) -> list[tuple[Size, list[Item]]]:
        config = self._config
        weights = [data_set.weight for data_set in self._sets]
        num_streams = self._sets[0].order.num_streams
        shares = window_shares(weights, config.micro_batches, self._window, self._stream, num_streams)
        taken = [
            source.take(share * config.micro_batch_size) for source, share in zip(self._sources, shares, strict=True)
        ]
        batches = []
        for encoded in (False, True):
            kind = [
                items
                for data_set, items in zip(self._sets, taken, strict=True)
                if (data_set.encoding is not None) == encoded
            ]
            batches += self._group(kind, encoded)
        if len({shape for shape, _ in batches}) > 1 or len(self._sets) > 1:
            order = keyed_permutation(len(batches), config.seed, "window", self._stream, self._window)
            batches = [batches[place] for place in order]
        return batches

    def _group(self, taken: list[list[Item]], encoded: bool) -> list[tuple[Size, list[Item]]]:
        items = [item for part in taken for item in part]
        if not items:
            return []
        if len(taken) > 1:  # sets of one kind share micro-batches
            mix = keyed_permutation(len(items), self._config.seed, "mix", self._stream, self._window, int(encoded))
            items = [items[place] for place in mix]
        sizes = [item.size for item in items]
        if not encoded:
            widths, heights = np.array(sizes).T
            sizes = [self._config.buckets[b] for b in assign_buckets(widths, heights, self._config.buckets)]
        groups = group_window(sizes, self._config.micro_batch_size, fixed=encoded)
        return [(shape, [items[place] for place in places]) for shape, places in groups]


class _Source:
    """The samples of one set that a stream visits and the filters keep, one block read ahead."""

    def __init__(
        self,
        data_set: DataSet,
        stream: int,
        position: Position,
        filters: tuple[FilterRule, ...],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.position = position  # behind the last sample taken
        self._set, self._stream, self._filters, self._pool = data_set, stream, filters, pool
        self._starts = shard_starts(data_set.order.shard_samples)
        self._blocks = stream_blocks(data_set.order, stream, position)
        self._ahead: tuple[Block, list[Future[list[_Row]]]] | None = None
        self._block: Block | None = None
        self._items: list[Item] = []  # of the present block, the next one last
        self._filtered: list[int] = []
        self._counts: Counter[str] = Counter()
        self._refused = 0  # in a row

    def take(self, count: int) -> list[Item]:
        """Takes the next `count` samples that the filters keep."""
        kept: list[Item] = []
        while len(kept) < count:
            if not self._items:
                self._next_block()
            if self._filters:
                item = self._items.pop()
                if self._keeps(item):
                    kept.append(item)
            else:
                rest = max(0, len(self._items) - (count - len(kept)))
                kept += reversed(self._items[rest:])
                del self._items[rest:]
            assert self._block is not None
            self.position = (self._block.epoch, self._block.first + len(self._block.places) - len(self._items))
        return kept

    def _keeps(self, item: Item) -> bool:
        rule = _refusal(self._filters, item)
        if rule is None:
            self._refused = 0
            return True
        self._filtered.append(item.visit)
        self._counts[rule] += 1
        self._refused += 1
        url = self._set.index.url
        hand = int(self._starts[-1]) // self._set.order.num_streams
        if self._refused == _MANY_REFUSED < 2 * hand:  # else the error comes at once
            log.warning("%s: data.filters refused %d samples in a row (%r)", url, self._refused, rule)
        if self._refused > max(_MANY_REFUSED, 2 * hand):
            raise DataError(
                f"{url}: data.filters refused {self._refused} samples in a row, more than a stream reads in an epoch "
                f"(mostly {self._counts.most_common(1)[0][0]!r}); loosen them"
            )
        return False

    def take_filtered(self) -> tuple[np.ndarray, Counter[str]]:
        """Returns the visits refused since the last call, (F,) int64, and how many each rule refused."""
        found = np.array(self._filtered, dtype=np.int64), self._counts
        self._filtered, self._counts = [], Counter()
        return found

    def _next_block(self) -> None:
        block, reading = self._ahead or self._read_ahead()
        raw = [row for part in reading for row in part.result()]
        visits = pack_visits(self._set.order.set_number, block.epoch, block_samples(block, self._starts)).tolist()
        self._items = [
            Item(visit, self._set, *raw[place]) for visit, place in zip(visits, block.places.tolist(), strict=True)
        ]
        self._items.reverse()
        self._block = block
        self._ahead = self._read_ahead()

    def _read_ahead(self) -> tuple[Block, list[Future[list[_Row]]]]:
        """Starts to read the next block, all its shards at once."""
        block = next(self._blocks)
        return block, [self._pool.submit(_read_span, self._set.index, *span) for span in block.spans]


def _read_span(index: Index, shard: int, first: int, last: int) -> list[_Row]:
    """Rows of a shard: its number, the sample, and its size by the sidecar."""
    samples, rows = read_rows(index, shard, first, last), load_rows(index, shard)
    sizes = zip(rows.widths[first:last], rows.heights[first:last], strict=True)
    return [(shard, sample, size) for sample, size in zip(samples, sizes, strict=True)]


def _refusal(filters: tuple[FilterRule, ...], item: Item) -> str | None:
    """The rule that refuses a sample, or None. What is damaged is kept: it is masked and reported, not passed over."""
    meta, size, encoding = item.sample.meta, item.size, item.data_set.encoding
    if encoding is not None:
        try:
            sample = unpack_sample(item.sample.image, encoding)
        except BadImage:
            return None
        meta, size = sample.meta, sample.size  # of the original, so that a rule means the same on both kinds
    elif item.sample.problem or size == (0, 0):
        return None
    return first_failed(filters, meta, *size)
