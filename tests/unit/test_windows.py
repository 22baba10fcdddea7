"""Whole runs on samples in memory, drawn at random: any shards, streams, mixes, kinds, ranks, workers and kills."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import windows
from data.buckets import BucketConfig, make_buckets
from data.errors import DataError
from data.filters import FilterRule
from data.index import Index, ShardInfo
from data.shard_reader import RawSample
from data.streams import Order, Position, micro_batches_behind, micro_batches_of, unpack_visits
from data.windows import DataSet, MicroBatch, StreamReader, WindowConfig

BUCKETS = make_buckets(64, BucketConfig(resolutions=(64, 128), multiple=32))
RULE = FilterRule(field="keep", equals=True)


def sample_facts(url: str, shard: int, row: int) -> tuple[tuple[int, int], bool, bool]:
    """(size, kept by the rule, unreadable), a function of the sample's place."""
    random = np.random.Generator(np.random.PCG64([len(url), shard, row]))
    width, height = random.integers(30, 200, 2).tolist()
    kept = bool(random.random() < 0.7) or shard == row == 0  # every set has one at least
    return (width // 32 * 32 + 32, height // 32 * 32 + 32), kept, bool(random.random() < 0.1)


def rows_of(index: Index, shard: int) -> Any:
    sizes = [sample_facts(index.url, shard, row) for row in range(index.shards[shard].samples)]
    shown = [(0, 0) if bad and index.encoding is None else size for size, _, bad in sizes]
    return SimpleNamespace(widths=[width for width, _ in shown], heights=[height for _, height in shown])


def read(index: Index, shard: int, first: int, last: int) -> list[RawSample]:
    samples = []
    for row in range(first, last):
        _, keep, bad = sample_facts(index.url, shard, row)
        key = f"{shard}-{row}"
        image = b"" if index.encoding is None else f"{shard} {row}".encode()
        extension = "png" if index.encoding is None else "safetensors"
        meta = {"keep": keep} if not bad else {}
        samples.append(RawSample(key=key, image=image, extension=extension, text="x", meta=meta, problem=None))
    return samples


def unpack(url: str) -> Any:
    def unpacked(image: bytes, _encoding: Any) -> Any:
        shard, row = map(int, image.split())
        size, keep, bad = sample_facts(url, shard, row)
        if bad:
            raise windows.BadImage("damaged")
        return SimpleNamespace(meta={"keep": keep}, size=size)

    return unpacked


@st.composite
def mixes(draw: st.DrawFn) -> tuple[tuple[DataSet, ...], WindowConfig]:
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=3))
    counts = [draw(st.lists(st.integers(1, 9), min_size=1, max_size=7)) for _ in kinds]
    num_streams = draw(st.sampled_from([n for n in (1, 2, 4, 6, 12) if n <= min(map(sum, counts))]))
    seed = draw(st.integers(0, 2**32))
    sets = []
    for number, (encoded, samples) in enumerate(zip(kinds, counts, strict=True)):
        shards = tuple(ShardInfo(name=f"{n}.tar", samples=c, bytes=1, sha256="") for n, c in enumerate(samples))
        url = "u" * (number + 1)
        encoding: Any = {"made": "up"} if encoded else None
        order = Order(
            seed=seed,
            shard_samples=tuple(samples),
            num_streams=num_streams,
            shuffle_block_shards=draw(st.integers(1, 3)),
            shuffle_chunk_samples=draw(st.integers(1, 6)),
            set_number=number,
        )
        index = Index(url=url, fingerprint=url, shards=shards, encoding=encoding)
        sets.append(DataSet(index=index, order=order, weight=draw(st.sampled_from([0.5, 1, 3])), encoding=encoding))
    window = WindowConfig(
        seed=seed,
        micro_batch_size=draw(st.integers(1, 4)),
        micro_batches=draw(st.integers(6, 9)),
        buckets=draw(st.sampled_from([BUCKETS, ((64, 64),)])),
        filters=draw(st.sampled_from([(), (RULE,)])),
    )
    return tuple(sets), window


class Run:
    """A run's readers: each stream by the worker whose it is, opened when its turn comes."""

    def __init__(self, sets: tuple[DataSet, ...], window: WindowConfig, pool: ThreadPoolExecutor) -> None:
        self.sets, self.window, self.pool = sets, window, pool
        self.num_streams = sets[0].order.num_streams
        self.consumed: list[MicroBatch] = []
        self.positions: dict[int, tuple[Position, ...]] = {}

    def attempt(self, world_size: int, num_workers: int, steps: int, lost: int) -> None:
        """Consumes `steps` micro-batches per rank, and some more that die with the attempt."""
        first = len(self.consumed)
        found: dict[int, MicroBatch] = {}
        for rank in range(world_size):
            for worker in range(num_workers):
                streams: dict[int, Any] = {}
                mine = micro_batches_of(first, rank, world_size, worker, num_workers)
                for number in islice(mine, -(-(steps + lost) // num_workers)):
                    stream = number % self.num_streams
                    others = {n % self.num_streams for n in found if n % world_size != rank}
                    assert stream not in others  # each stream is read by one rank
                    if stream not in streams:
                        behind = micro_batches_behind(first, stream, self.num_streams)
                        start = self.positions.get(stream, ((0, 0),) * len(self.sets))
                        streams[stream] = iter(StreamReader(self.sets, stream, behind, start, self.window, self.pool))
                    found[number] = next(streams[stream])
        for number in range(first, first + steps * world_size):
            self.consumed.append(found[number])
            self.positions[number % self.num_streams] = found[number].positions


@settings(max_examples=60, deadline=None)
@given(mixes(), st.data())
def test_any_run_is_the_run_of_one_process(mix: tuple[tuple[DataSet, ...], WindowConfig], data: st.DataObject) -> None:
    sets, window = mix
    num_streams = sets[0].order.num_streams
    unpackers = {data_set.index.url: unpack(data_set.index.url) for data_set in sets}

    def unpack_any(image: bytes, encoding: Any) -> Any:
        raise AssertionError

    def refusal(filters: Any, item: windows.Item) -> Any:
        with mock.patch.object(windows, "unpack_sample", unpackers[item.data_set.index.url]):
            return real_refusal(filters, item)

    real_refusal = windows._refusal
    with (
        mock.patch.object(windows, "load_rows", rows_of),
        mock.patch.object(windows, "read_rows", read),
        mock.patch.object(windows, "unpack_sample", unpack_any),
        mock.patch.object(windows, "_refusal", refusal),
        ThreadPoolExecutor(2) as pool,
    ):
        run = Run(sets, window, pool)
        for _ in range(data.draw(st.integers(1, 4))):
            ways = [(r, w) for r in (1, 2, 3, 4, 6) for w in (1, 2, 3) if num_streams % (r * w) == 0]
            ways = [(r, w) for r, w in ways if len(run.consumed) % r == 0]
            world_size, num_workers = data.draw(st.sampled_from(ways))
            run.attempt(world_size, num_workers, data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3)))
        alone = Run(sets, window, pool)
        alone.attempt(1, 1, len(run.consumed), 0)
    for mine, reference in zip(run.consumed, alone.consumed, strict=True):
        assert [item.visit for item in mine.items] == [item.visit for item in reference.items]
        assert (mine.shape, mine.positions) == (reference.shape, reference.positions)
        assert mine.filtered.tolist() == reference.filtered.tolist() and mine.filtered_by == reference.filtered_by
        check(mine, window)
    seen = Counter(item.visit for batch in run.consumed for item in batch.items)
    seen.update(visit for batch in run.consumed for visit in batch.filtered.tolist())
    assert set(seen.values()) == {1}


def check(batch: MicroBatch, window: WindowConfig) -> None:
    """One shape, one kind, B samples; what is damaged is among them; what was filtered out is not."""
    assert len(batch.items) == window.micro_batch_size
    (encoded,) = {item.data_set.encoding is not None for item in batch.items}
    if encoded:
        assert all(batch.shape[0] <= item.size[0] and batch.shape[1] <= item.size[1] for item in batch.items)
    else:
        assert batch.shape in window.buckets
    for item in batch.items:
        _, epochs, samples = unpack_visits(np.array([item.visit]))
        counts = [shard.samples for shard in item.data_set.index.shards]
        row = int(samples[0]) - sum(counts[: item.shard])
        assert item.sample.key == f"{item.shard}-{row}" and epochs[0] >= 0
        _, keep, bad = sample_facts(item.data_set.index.url, item.shard, row)
        assert keep or bad or not window.filters


def test_a_rule_that_nothing_meets_ends_soon(caplog: pytest.LogCaptureFixture) -> None:
    """After two epochs of what the stream reads, not of the whole set, and with a word before that."""
    shards = tuple(ShardInfo(name=f"{n}.tar", samples=10_000, bytes=1, sha256="") for n in range(16))
    order = Order(
        seed=0,
        shard_samples=(10_000,) * 16,
        num_streams=8,
        shuffle_block_shards=1,
        shuffle_chunk_samples=10_000,
    )
    index = Index(url="set", fingerprint="", shards=shards, encoding=None)
    config = WindowConfig(
        seed=0, micro_batch_size=1, micro_batches=1, buckets=((8, 8),), filters=(FilterRule(field="a", min=1),)
    )
    sample = RawSample(key="k", image=b"", extension="png", text="x", meta={}, problem=None)
    rows = SimpleNamespace(widths=[9] * 10_000, heights=[9] * 10_000)
    data_set = DataSet(index=index, order=order, weight=1.0, encoding=None)
    with (
        mock.patch.object(windows, "load_rows", lambda *_: rows),
        mock.patch.object(windows, "read_rows", lambda _i, _s, first, last: [sample] * (last - first)),
        ThreadPoolExecutor(1) as pool,
        pytest.raises(DataError, match="refused 40001 samples in a row, .*'a >= 1'.*loosen"),
    ):
        next(iter(StreamReader((data_set,), 0, 0, ((0, 0),), config, pool)))
    assert "refused 10000 samples in a row ('a >= 1')" in caplog.text
