"""The order of the data: pure functions of integers, the same for any number of ranks and workers. See docs/order.md.

S logical streams share the shards. In each epoch a keyed permutation of all shards is dealt to the streams like cards.
A stream cuts its hand into blocks of K shards, permutes the samples of each block, and when its hand is played goes on
with the next epoch by itself. Micro-batch g of the run is the next micro-batch of stream g mod S. Rank r of R takes
those with g mod R = r, and its W workers take turns at them: as R·W divides S, each stream is read by one worker of one
rank alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.keyed_random import keyed_permutation

ALGORITHM_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that the order depends on."""

    seed: int
    shard_samples: tuple[int, ...]  # samples of each shard, in the order of the index
    num_streams: int  # S
    shuffle_block_shards: int  # K
    micro_batch_size: int  # samples

    def __post_init__(self) -> None:
        for name in ("num_streams", "shuffle_block_shards", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.num_streams > len(self.shard_samples):
            raise DataError(
                f"num_streams={self.num_streams} but the data set has {len(self.shard_samples)} shards; "
                f"set num_streams to at most {len(self.shard_samples)} or pack the data into more shards"
            )


class SampleRef(NamedTuple):
    """One visit to one sample."""

    epoch: int
    block: int  # of this stream in this epoch
    shard: int  # number in the index
    row: int  # of the shard


def check_workers(num_streams: int, world_size: int, num_workers: int) -> None:
    """Checks that ranks x workers divide the streams (0 workers = the rank's own process, one reader).

    Raises:
        DataError: they do not; names the numbers of workers that would do.
    """
    readers = world_size * max(1, num_workers)
    if num_streams % readers == 0:
        return
    valid = [w for w in range(1, num_streams + 1) if num_streams % (world_size * w) == 0]
    if valid:
        choices = ", ".join(map(str, [0, *valid]))
        remedy = f"set num_workers to one of {choices}, or num_streams to a multiple of {readers}"
    else:
        remedy = f"set num_streams to a multiple of {world_size}"
    raise DataError(f"num_streams={num_streams} is not divided by {world_size} ranks x {num_workers} workers; {remedy}")


def micro_batches_of(first: int, rank: int, world_size: int, worker: int = 0, num_workers: int = 1) -> Iterator[int]:
    """Yields, endlessly, the micro-batch numbers g that one worker of one rank reads, from the run's `first` on.

    Workers are numbered from the one whose turn it is at `first`: taking one from each in turn, from worker 0 on,
    gives the rank's micro-batches in order.

    Raises:
        DataError: `first` is not a multiple of `world_size`.
    """
    if first % world_size:
        raise DataError(
            f"cannot resume at micro-batch {first} with {world_size} ranks; use a number of ranks that divides it"
        )
    local = first // world_size + worker
    while True:
        yield local * world_size + rank
        local += num_workers


def stream_micro_batches(order: Order, stream: int, first: int) -> Iterator[tuple[int, list[SampleRef]]]:
    """Yields, endlessly, the micro-batches of one stream from its number `first` on (the run's first * S + stream).

    Yields:
        Pairs (bucket, refs): the bucket key that all samples of the micro-batch share (0, as long as all pictures are
        brought to one size), and its micro_batch_size samples.
    """
    refs = stream_samples(order, stream, first * order.micro_batch_size)
    while True:
        yield 0, [next(refs) for _ in range(order.micro_batch_size)]


def stream_samples(order: Order, stream: int, first: int) -> Iterator[SampleRef]:
    """Yields, endlessly, the samples of one stream from its number `first` on; the start is computed, not replayed."""
    epoch, skip = 0, first
    while True:
        hand = stream_shards(order, stream, epoch)
        for block in range(-(-len(hand) // order.shuffle_block_shards)):
            shards = hand[block * order.shuffle_block_shards : (block + 1) * order.shuffle_block_shards]
            sizes = [order.shard_samples[shard] for shard in shards]
            if skip >= sum(sizes):
                skip -= sum(sizes)
                continue
            members = np.repeat(shards, sizes), np.concatenate([np.arange(size) for size in sizes])
            permutation = keyed_permutation(sum(sizes), order.seed, "block", epoch, stream, block)[skip:]
            skip = 0
            for shard, row in zip(members[0][permutation].tolist(), members[1][permutation].tolist(), strict=True):
                yield SampleRef(epoch, block, shard, row)
        epoch += 1


def block_shards(order: Order, stream: int, epoch: int, block: int) -> tuple[int, ...]:
    """Returns the shards of one block of a stream."""
    first = block * order.shuffle_block_shards
    return stream_shards(order, stream, epoch)[first : first + order.shuffle_block_shards]


def stream_shards(order: Order, stream: int, epoch: int) -> tuple[int, ...]:
    """Returns the shards that a stream reads in an epoch, in reading order."""
    return _shard_permutation(len(order.shard_samples), order.seed, epoch)[stream :: order.num_streams]


@lru_cache(maxsize=64)
def _shard_permutation(num_shards: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(keyed_permutation(num_shards, seed, "shards", epoch).tolist())
