"""Compares what a run consumed with the order of its data, window by window. Used by data.ledger_check."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.errors import DataError
from data.index import Index, load_index
from data.ledger import Attempt, Record
from data.streams import (
    ALGORITHM_VERSION,
    Order,
    block_samples,
    micro_batches_behind,
    pack_visits,
    shard_starts,
    stream_blocks,
    unpack_visits,
    window_shares,
)

NO_VISITS = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of the data, from an attempt's stamp and the indexes."""

    num_streams: int
    window: int  # micro-batches
    micro_batch_size: int
    weights: list[float]
    has_filters: bool
    indexes: list[Index]
    orders: list[Order]
    starts: list[np.ndarray]

    def kept(self, stream: int, windows: range) -> np.ndarray:
        """How many samples of each set are consumed in each window, (windows, sets)."""
        if len(self.weights) == 1:
            return np.full((len(windows), 1), self.window * self.micro_batch_size)
        shares = [window_shares(self.weights, self.window, w, stream, self.num_streams) for w in windows]
        return np.array(shares).reshape(-1, len(self.weights)) * self.micro_batch_size


def make_plan(attempt: Attempt, shards: Sequence[str]) -> Plan:
    """Opens the data sets of an attempt.

    Args:
        attempt: what it recorded of itself.
        shards: addresses of the data sets if they have moved, else empty.

    Raises:
        DataError: the data sets or the version of the order are not those of the run.
    """
    stamp = attempt.stamp
    if stamp.get("algorithm_version") != ALGORITHM_VERSION:
        raise DataError(
            f"attempt {attempt.attempt}: its data came by version {stamp.get('algorithm_version')} of the order, known "
            f"is {ALGORITHM_VERSION}; check it with the darkroom that trained it"
        )
    urls = list(shards) or [data_set["url"] for data_set in attempt.data_sets]
    if len(urls) != len(stamp["data_sets"]):
        raise DataError(
            f"the run has {len(stamp['data_sets'])} data sets, not {len(urls)}; give --shards once for each"
        )
    indexes = [load_index(url) for url in urls]
    for index, (fingerprint, _) in zip(indexes, stamp["data_sets"], strict=True):
        if index.fingerprint != fingerprint:
            raise DataError(f"{index.url}: is not the data set that the run consumed; give --shards with its address")
    shared = {name: stamp[name] for name in ("seed", "num_streams", "shuffle_block_shards", "shuffle_chunk_samples")}
    orders = [
        Order(shard_samples=tuple(shard.samples for shard in index.shards), set_number=number, **shared)
        for number, index in enumerate(indexes)
    ]
    return Plan(
        num_streams=stamp["num_streams"],
        window=stamp["window_micro_batches"],
        micro_batch_size=stamp["micro_batch_size"],
        weights=[weight for _, weight in stamp["data_sets"]],
        has_filters=bool(stamp["filters"]),
        indexes=indexes,
        orders=orders,
        starts=[shard_starts(order.shard_samples) for order in orders],
    )


class _Sequence:
    """The visits of a stream to one set, in their order."""

    def __init__(self, order: Order, stream: int, starts: np.ndarray) -> None:
        self._blocks = stream_blocks(order, stream)
        self._set, self._starts = order.set_number, starts
        self._ahead = NO_VISITS

    def take(self, count: int) -> np.ndarray:
        parts, have = [self._ahead], len(self._ahead)
        while have < count:
            block = next(self._blocks)
            parts.append(pack_visits(self._set, block.epoch, block_samples(block, self._starts)))
            have += len(parts[-1])
        joined = np.concatenate(parts)
        self._ahead = joined[count:].copy()
        return joined[:count]


@dataclass(kw_only=True)
class Judge:
    """Is shown the record piece by piece and keeps what does not fit the order.

    Attributes:
        plan: The order.
        missing_numbers: Micro-batches without a record.
        double_numbers: Micro-batches with more than one.
        surplus: Visits recorded where they do not belong, or once more than they should be.
        lacking: Visits not recorded where they belong, in a window that is finished.
        consumed: Records of consumed samples by packed set and epoch.
        refused: Records of refused samples, likewise.
        unjudged: Streams that cannot be compared any more, and the micro-batch where that began.
    """

    plan: Plan
    missing_numbers: list[np.ndarray] = field(default_factory=list)
    double_numbers: list[np.ndarray] = field(default_factory=list)
    surplus: list[np.ndarray] = field(default_factory=list)
    lacking: list[np.ndarray] = field(default_factory=list)
    consumed: Counter[int] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    unjudged: dict[int, int] = field(default_factory=dict)
    _sequences: dict[int, list[_Sequence]] = field(default_factory=dict)

    @property
    def num_odd(self) -> int:
        """How many visits do not fit, so far."""
        return sum(map(len, self.surplus)) + sum(map(len, self.lacking))

    def look(self, begin: int, end: int, record: Record) -> None:
        """Compares the record of the micro-batches `begin` to `end` - 1 with the order.

        Args:
            begin: where the last piece ended; every stream begins a window here.
            end: where every stream ends a window, or where the whole record ends.
            record: micro-batches by ascending number.
        """
        counts = np.bincount(record.numbers - begin, minlength=end - begin)
        self.missing_numbers.append(begin + np.flatnonzero(counts == 0))
        self.double_numbers.append(begin + np.flatnonzero(counts > 1))
        _count_heads(self.consumed, record.visits)
        _count_heads(self.refused, record.filtered)
        if (counts > 1).any():
            record = self._without_doubles(record)
        num_streams = self.plan.num_streams
        rows = _by_stream(record.numbers, num_streams)
        filtered_rows = _by_stream(record.filtered_numbers, num_streams)
        for stream in range(num_streams):
            mine, refused = rows[stream], filtered_rows[stream]
            self._look_at_stream(
                stream,
                begin,
                end,
                Record(
                    numbers=record.numbers[mine] // num_streams,
                    visits=record.visits[mine],
                    filtered=record.filtered[refused],
                    filtered_numbers=record.filtered_numbers[refused] // num_streams,
                ),
            )

    def _without_doubles(self, record: Record) -> Record:
        _, kept = np.unique(record.numbers, return_index=True)
        filtered, kept_filtered = np.unique(record.filtered, return_index=True)
        self.surplus.append(np.delete(record.visits, kept, axis=0).ravel())
        self.surplus.append(np.delete(record.filtered, kept_filtered))
        return Record(
            numbers=record.numbers[kept],
            visits=record.visits[kept],
            filtered=filtered,
            filtered_numbers=record.filtered_numbers[kept_filtered],
        )

    def _look_at_stream(self, stream: int, begin: int, end: int, record: Record) -> None:
        """`record` has the stream's own numbers of its micro-batches."""
        plan = self.plan
        behind = micro_batches_behind(end, stream, plan.num_streams)
        windows = range(begin // (plan.num_streams * plan.window), -(-behind // plan.window))
        windows = self._judged(stream, windows, record)
        if not windows:
            return
        row_windows = record.numbers // plan.window - windows.start
        refused_windows = record.filtered_numbers // plan.window - windows.start
        met = np.concatenate([record.visits.ravel(), record.filtered])
        met_windows = np.concatenate([np.repeat(row_windows, plan.micro_batch_size), refused_windows])
        met, met_windows = met[met_windows < len(windows)], met_windows[met_windows < len(windows)]
        sets = unpack_visits(met)[0]
        refused_sets = unpack_visits(record.filtered)[0]
        lengths = plan.kept(stream, windows)  # (windows, sets)
        for number, sequence in enumerate(self._sequences_of(stream)):
            refused = refused_windows[(refused_sets == number) & (refused_windows < len(windows))]
            length = lengths[:, number] + np.bincount(refused, minlength=len(windows))
            expected = sequence.take(int(length.sum()))
            expected_windows = np.repeat(np.arange(len(windows)), length)
            mine = sets == number
            finished = behind // plan.window - windows.start
            surplus, lacking = compare(expected, expected_windows, met[mine], met_windows[mine], finished)
            self.surplus.append(surplus)
            self.lacking.append(lacking)
        self.surplus.append(met[(sets < 0) | (sets >= len(plan.orders))])

    def _judged(self, stream: int, windows: range, record: Record) -> range:
        """The windows that can be compared. A window's first micro-batch says what the filters refused in it: without
        that, nobody knows where the window ends and the next one begins."""
        plan = self.plan
        if stream in self.unjudged:
            return range(0)
        if plan.has_filters:
            heads = np.arange(windows.start, windows.stop) * plan.window
            lost = np.flatnonzero(~np.isin(heads, record.numbers))
            if len(lost):
                self.unjudged[stream] = int(heads[lost[0]]) * plan.num_streams + stream
                return windows[: lost[0]]
        return windows

    def _sequences_of(self, stream: int) -> list[_Sequence]:
        if stream not in self._sequences:
            pairs = zip(self.plan.orders, self.plan.starts, strict=True)
            self._sequences[stream] = [_Sequence(order, stream, starts) for order, starts in pairs]
        return self._sequences[stream]


def compare(
    expected: np.ndarray, expected_windows: np.ndarray, met: np.ndarray, met_windows: np.ndarray, finished: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compares the visits of a stream with those it should have made.

    Args:
        expected: (E,) int64, distinct.
        expected_windows: (E,) int64, the window of each.
        met: (M,) int64, the visits that were made.
        met_windows: (M,) int64, in which window.
        finished: windows from this one on need not be complete.

    Returns:
        The surplus: visits that were not expected in their window, or had been made there before. The lacking: visits
        of finished windows that were not made there.
    """
    if not len(expected):
        return met, expected
    order = np.argsort(expected)
    places = order[np.minimum(np.searchsorted(expected, met, sorter=order), len(expected) - 1)]
    fits = (expected[places] == met) & (expected_windows[places] == met_windows)
    counts = np.bincount(places[fits], minlength=len(expected))
    again = np.repeat(expected, np.maximum(counts - 1, 0))
    return np.concatenate([met[~fits], again]), expected[(counts == 0) & (expected_windows < finished)]


def _by_stream(numbers: np.ndarray, num_streams: int) -> list[np.ndarray]:
    """The places of the numbers of each stream."""
    streams = numbers % num_streams
    order = np.argsort(streams, kind="stable")
    return np.split(order, np.searchsorted(streams[order], np.arange(1, num_streams)))


def _count_heads(counts: Counter[int], visits: np.ndarray) -> None:
    """Counts visits by their set and epoch, packed as a visit to sample 0."""
    heads, found = np.unique(visits - unpack_visits(visits)[2], return_counts=True)
    counts.update(dict(zip(heads.tolist(), found.tolist(), strict=True)))
