"""The order: every sample once per epoch, whatever the ranks, the workers and the place of a resume."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.streams import (
    Order,
    SampleRef,
    block_shards,
    check_workers,
    micro_batches_of,
    stream_micro_batches,
    stream_samples,
    stream_shards,
)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    num_streams = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 9), min_size=num_streams, max_size=num_streams + 12))
    return Order(
        seed=draw(st.integers(0, 2**40)),
        shard_samples=tuple(sizes),
        num_streams=num_streams,
        shuffle_block_shards=draw(st.integers(1, 4)),
        micro_batch_size=draw(st.integers(1, 7)),
    )


@settings(max_examples=40, deadline=None)
@given(orders())
def test_each_epoch_holds_every_sample_once(order: Order) -> None:
    seen: Counter[tuple[int, int, int]] = Counter()
    for stream in range(order.num_streams):
        for ref in stream_samples(order, stream, 0):
            if ref.epoch == 2:
                break
            seen[ref.epoch, ref.shard, ref.row] += 1
            assert ref.shard in block_shards(order, stream, ref.epoch, ref.block)
    everything = [(s, r) for s, size in enumerate(order.shard_samples) for r in range(size)]
    assert seen == Counter((epoch, *sample) for epoch in (0, 1) for sample in everything)


@settings(max_examples=40, deadline=None)
@given(orders(), st.integers(0, 60))
def test_a_stream_can_be_entered_anywhere(order: Order, first: int) -> None:
    stream = order.num_streams - 1
    whole = list(islice(stream_micro_batches(order, stream, 0), first + 4))
    assert list(islice(stream_micro_batches(order, stream, first), 4)) == whole[first:]


def run_order(order: Order, world_size: int, num_workers: int, first: int, count: int) -> dict[int, list[SampleRef]]:
    """The micro-batches by number, as ranks and workers with their own streams would read them."""
    found: dict[int, list[SampleRef]] = {}
    for rank in range(world_size):
        readers = []
        for worker in range(num_workers):
            streams: dict[int, object] = {}
            readers.append((micro_batches_of(first, rank, world_size, worker, num_workers), streams))
        for turn in range(count // world_size):  # DataLoader takes from its workers in turn
            numbers, streams = readers[turn % num_workers]
            number = next(numbers)
            assert number == first + turn * world_size + rank  # a rank's micro-batches arrive in order
            visit, stream = divmod(number, order.num_streams)
            if stream not in streams:
                streams[stream] = stream_micro_batches(order, stream, visit)
            found[number] = next(streams[stream])[1]  # type: ignore[call-overload]
    return found


def test_ranks_workers_and_resumes_change_nothing() -> None:
    order = Order(seed=3, shard_samples=tuple(range(3, 20)), num_streams=8, shuffle_block_shards=2, micro_batch_size=5)
    reference = run_order(order, 1, 1, 0, 96)
    for world_size, num_workers in ((1, 8), (2, 1), (2, 4), (4, 2), (8, 1)):
        assert run_order(order, world_size, num_workers, 0, 96) == reference
        for first in (8, 24, 56):
            part = run_order(order, world_size, num_workers, first, 40)
            assert part == {number: reference[number] for number in range(first, first + 40)}


def test_epochs_seeds_and_blocks_differ() -> None:
    sizes = (10,) * 12
    base = Order(seed=0, shard_samples=sizes, num_streams=4, shuffle_block_shards=3, micro_batch_size=4)
    other = Order(seed=1, shard_samples=sizes, num_streams=4, shuffle_block_shards=3, micro_batch_size=4)
    assert stream_shards(base, 0, 0) != stream_shards(base, 0, 1)
    assert stream_shards(base, 0, 0) != stream_shards(other, 0, 0)
    visits = list(islice(stream_samples(base, 0, 0), 30))
    assert len({ref.shard for ref in visits[:10]}) > 1  # shards of a block are mixed
    assert [ref.row for ref in visits] != sorted(ref.row for ref in visits)


def test_refusals_name_the_remedy() -> None:
    check_workers(8, 2, 4)
    check_workers(8, 2, 0)
    with pytest.raises(DataError, match="num_workers to one of 0, 1, 2, 4"):
        check_workers(8, 2, 3)
    with pytest.raises(DataError, match="num_streams to a multiple of 3"):
        check_workers(8, 3, 0)
    with pytest.raises(DataError, match="set num_streams to at most 2"):
        Order(seed=0, shard_samples=(1, 1), num_streams=3, shuffle_block_shards=1, micro_batch_size=1)
    with pytest.raises(DataError, match="cannot resume at micro-batch 3 with 2 ranks"):
        next(micro_batches_of(3, 0, 2))
