"""The order of the data at the size of a large cluster: 4,096 ranks x 8 workers over 100,000 shards, without processes.

Everything the order does is a pure function of integers, so what a rank of such a run would do at its start can be done
here: read the index, deal the shards, find its streams' first blocks, cut their first windows into buckets. Pictures
and sidecars are made up. Rows: CPU time of that per rank (ms), and the bytes of the cursor in a checkpoint. Asserted
before: every shard is dealt once per epoch, streams keep pace over epochs, ranks and workers differ by at most one
micro-batch, and a rank that starts in the middle begins exactly where the micro-batches before it end.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.common import Row, machine, main
from data import streams
from data.buckets import BucketConfig, assign_buckets, group_window, make_buckets
from data.index import Index, ShardInfo, load_index, write_index
from data.object_store import open_store
from data.streams import (
    Cursor,
    Order,
    block_samples,
    micro_batches_of,
    shard_starts,
    stream_blocks,
    stream_hand,
)

RANKS, WORKERS, SHARDS = 4096, 8, 100_000
STREAMS = RANKS * WORKERS
MICRO_BATCH, WINDOW = 32, 64
BUCKETS = make_buckets(256, BucketConfig(resolutions=(256, 512), multiple=32))


def made_up_index(url: str, rng: np.random.Generator) -> None:
    """Writes an index of shards that are not there."""
    counts = rng.integers(800, 1200, SHARDS).tolist()
    shards = [
        ShardInfo(name=f"made-up-{number:06d}.tar", samples=count, bytes=count * 150_000, sha256=f"{number:064x}")
        for number, count in enumerate(counts)
    ]
    write_index(open_store(url), shards)


def order_of(index: Index) -> Order:
    """The order of the run."""
    return Order(
        seed=0,
        shard_samples=tuple(shard.samples for shard in index.shards),
        num_streams=STREAMS,
        shuffle_block_shards=4,
        shuffle_chunk_samples=512,
    )


def start_rank(url: str, rank: int, sizes: np.ndarray) -> float:
    """Does what a rank does before its first bytes of pictures; returns seconds of CPU time."""
    streams._permutation.cache_clear()  # a rank is a process of its own
    begin = time.process_time()
    order = order_of(load_index(url))
    starts = shard_starts(order.shard_samples)
    for worker in range(WORKERS):
        stream = next(micro_batches_of(0, rank, RANKS, worker, WORKERS)) % STREAMS
        samples = np.concatenate([block_samples(block, starts) for block in islice(stream_blocks(order, stream), 3)])
        widths, heights = sizes[samples[: WINDOW * MICRO_BATCH] % len(sizes)].T
        own = [BUCKETS[number] for number in assign_buckets(widths, heights, BUCKETS)]
        groups = group_window(own, MICRO_BATCH, fixed=False)
        assert len(groups) == WINDOW
    return time.process_time() - begin


def check_balance() -> None:
    """Ranks and workers never differ by more than one micro-batch, whenever one looks."""
    for consumed in (RANKS * 7, RANKS * 1000, RANKS * 12_345):
        numbers = np.arange(consumed - 3 * STREAMS if consumed > 3 * STREAMS else 0, consumed)
        per_rank = np.bincount(numbers % RANKS, minlength=RANKS)
        per_worker = np.bincount(numbers % STREAMS, minlength=STREAMS)
        assert np.ptp(per_rank) == 0 and np.ptp(per_worker) <= 1
    for rank, worker in ((0, 0), (17, 3), (RANKS - 1, WORKERS - 1)):
        mine = list(islice(micro_batches_of(RANKS * 5, rank, RANKS, worker, WORKERS), 4))
        assert {number % RANKS for number in mine} == {rank} and len({number % STREAMS for number in mine}) == 1


def check_epochs(order: Order, epochs: int = 4) -> tuple[int, int]:
    """In each epoch every shard is dealt once, and in all of them together no stream gets more than one card more.

    Returns:
        The fewest and the most samples of a stream over these epochs.
    """
    cards, samples = np.zeros(STREAMS, np.int64), np.zeros(STREAMS, np.int64)
    for epoch in range(epochs):
        dealt = np.zeros(SHARDS, np.int64)
        for stream in range(STREAMS):
            hand = stream_hand(order, stream, epoch)
            dealt[[shard for shard, _, _ in hand]] += 1
            cards[stream] += len(hand)
            samples[stream] += sum(last - first for _, first, last in hand)
        assert (dealt == 1).all()
    assert np.ptp(cards) <= 1
    return int(samples.min()), int(samples.max())


def check_resume(order: Order) -> None:
    """Entering a stream in the middle of an epoch goes on exactly there."""
    starts = shard_starts(order.shard_samples)
    for stream in (0, 12_345, STREAMS - 1):
        whole = np.concatenate([block_samples(block, starts) for block in islice(stream_blocks(order, stream), 12)])
        entered = next(iter(stream_blocks(order, stream, (0, 700))))
        assert (block_samples(entered, starts) == whole[700 : 700 + len(entered.places)]).all()


def simulate(arguments: argparse.Namespace) -> list[Row]:
    """Checks the order and measures the start of a rank and the cursor."""
    rng = np.random.Generator(np.random.PCG64(0))
    sizes = rng.integers(200, 2000, (10_000, 2))
    with tempfile.TemporaryDirectory(prefix="darkroom-order-") as folder:
        url = str(Path(folder))
        made_up_index(url, rng)
        order = order_of(load_index(url))
        check_balance()
        fewest, most = check_epochs(order)
        check_resume(order)
        times = [start_rank(url, int(rank), sizes) for rank in rng.integers(0, RANKS, arguments.rounds)]
    positions = {stream: ((11, int(offset)),) for stream, offset in enumerate(rng.integers(0, 4000, STREAMS))}
    cursor = json.dumps(Cursor(micro_batches=STREAMS * 12_345, positions=positions).to_dict())
    print(f"{SHARDS:,} shards, {STREAMS:,} streams: {fewest:,} to {most:,} samples per stream in four epochs\n")
    start = Row(
        name="start",
        ours=1000 * statistics.median(times),
        peer=None,
        unit="ms of CPU time per rank",
        ratio_median=None,
        ratio_min=None,
        ratio_max=None,
        rounds=arguments.rounds,
        outputs_equal=True,
        machine=machine(),
        versions={"numpy": np.__version__},
    )
    fields = {**vars(start), "name": "cursor", "ours": len(cursor), "unit": "bytes", "rounds": 1}
    return [row for row in (start, Row(**fields)) if row.name in arguments.rows]


if __name__ == "__main__":
    main(__doc__ or "", simulate, ("start", "cursor"))
