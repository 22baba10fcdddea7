"""The order of the data: pure functions of integers, the same for any number of ranks and workers. See docs/order.md.

S logical streams share the shards of every data set. In each epoch a keyed permutation of a set's shards is dealt to
the streams like cards. A stream plays its hand K shards at a time, reads a chunk of each of them, permutes the samples
of these chunks (a block), and when the hand is played goes on with the next epoch by itself. The stream's micro-batches
are cut from windows of this sequence (data.loader). Micro-batch g of the run is the next micro-batch of stream g mod S.
Rank r of R takes those with g mod R = r, and its W workers take turns at them: as R·W divides S, each stream is read by
one worker of one rank alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.keyed_random import keyed_permutation

ALGORITHM_VERSION = 2
# A visit as one int64: the set's number, the epoch, and the sample's number in its set (shards in index order).
_ROW_BITS, _EPOCH_BITS, _SET_BITS = 37, 20, 6
_WEIGHT_SCALE = 1 << 32

Position = tuple[int, int]  # epoch, and how many samples of the stream's hand in that epoch are behind
Span = tuple[int, int, int]  # shard, first row, row after the last


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that the order of one data set depends on."""

    seed: int
    shard_samples: tuple[int, ...]  # samples of each shard, in the order of the index
    num_streams: int  # S
    shuffle_block_shards: int  # K, shards that are mixed with each other
    shuffle_chunk_samples: int  # samples of each of them that are mixed at a time
    set_number: int = 0  # place of the set in the mix

    def __post_init__(self) -> None:
        for name in ("num_streams", "shuffle_block_shards", "shuffle_chunk_samples"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.num_streams > sum(self.shard_samples):
            raise DataError(
                f"num_streams={self.num_streams} but the data set has {sum(self.shard_samples)} samples; "
                "lower num_streams"
            )

    @property
    def parts_per_shard(self) -> int:
        """1, or as many as it takes to give every stream a part where there are more streams than shards."""
        return -(-self.num_streams // len(self.shard_samples))

    def purpose(self, name: str) -> str:
        """A random key of this set's own."""
        return name if self.set_number == 0 else f"{name} of set {self.set_number}"


class Block(NamedTuple):
    """Samples that are read and shuffled together, in the order of their visits."""

    epoch: int
    first: int  # number of its first visit in the stream's hand of that epoch
    spans: tuple[Span, ...]  # what to read
    places: np.ndarray  # (n,) of each visit's sample in the spans, one behind the other


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where the run's data stands: the micro-batches *consumed*, and where the present window of each stream began.

    The positions follow from the count alone unless samples are filtered out; they are kept for that case, and because
    they spare a resume the walk through all earlier epochs.
    """

    micro_batches: int = 0  # consumed over all ranks
    positions: Mapping[int, tuple[Position, ...]] = field(default_factory=dict)  # by stream, one per set

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the positions as one text of about 15 bytes per stream, "STREAM:EPOCH,OFFSET …"."""
        words = (f"{stream}:{'|'.join(f'{e},{o}' for e, o in sets)}" for stream, sets in sorted(self.positions.items()))
        return {"micro_batches": self.micro_batches, "positions": " ".join(words)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Cursor":
        """What `to_dict` gave."""
        positions: dict[int, tuple[Position, ...]] = {}
        for word in values["positions"].split():
            stream, _, sets = word.partition(":")
            pairs = (pair.partition(",") for pair in sets.split("|"))
            positions[int(stream)] = tuple((int(epoch), int(offset)) for epoch, _, offset in pairs)
        return cls(micro_batches=int(values["micro_batches"]), positions=positions)


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


def micro_batches_behind(consumed: int, stream: int, num_streams: int) -> int:
    """Returns how many of the run's first `consumed` micro-batches came from a stream."""
    return max(0, -(-(consumed - stream) // num_streams))


def stream_blocks(order: Order, stream: int, start: Position = (0, 0)) -> Iterator[Block]:
    """Yields, endlessly, the blocks of one stream from a position on; the first one without what is behind."""
    epoch, skip = start
    while True:
        first = 0
        for number, spans in enumerate(_block_spans(order, stream, epoch)):
            size = sum(last - begin for _, begin, last in spans)
            if skip < first + size:
                behind = max(0, skip - first)
                places = keyed_permutation(size, order.seed, order.purpose("block"), epoch, stream, number)
                yield Block(epoch, first + behind, spans, places[behind:])
            first += size
        epoch, skip = epoch + 1, 0


def stream_hand(order: Order, stream: int, epoch: int) -> list[Span]:
    """Returns what a stream reads in an epoch: whole shards, or parts where there are more streams than shards."""
    parts = order.parts_per_shard
    hand = _permutation(len(order.shard_samples) * parts, order.seed, order.purpose("shards"), epoch)
    spans = []
    # Each epoch deals on where the last one stopped: otherwise some streams had a card more in every epoch.
    first = (stream - epoch * len(hand)) % order.num_streams
    for shard, part in (divmod(card, parts) for card in hand[first :: order.num_streams].tolist()):
        samples = order.shard_samples[shard]
        spans.append((shard, part * samples // parts, (part + 1) * samples // parts))
    return spans


def _block_spans(order: Order, stream: int, epoch: int) -> Iterator[tuple[Span, ...]]:
    """K cards of the hand at a time, cut into equally many chunks: block j holds chunk j of each."""
    hand = stream_hand(order, stream, epoch)
    for start in range(0, len(hand), order.shuffle_block_shards):
        cards = hand[start : start + order.shuffle_block_shards]
        chunks = -(-max(last - first for _, first, last in cards) // order.shuffle_chunk_samples)
        for j in range(chunks):
            spans = []
            for shard, first, last in cards:
                size = last - first
                begin, end = first + j * size // chunks, first + (j + 1) * size // chunks
                if begin < end:
                    spans.append((shard, begin, end))
            if spans:
                yield tuple(spans)


@lru_cache(maxsize=16)
def _permutation(length: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    return keyed_permutation(length, seed, purpose, epoch)


# --- mixing -------------------------------------------------------------------------------------------------------


def window_shares(
    weights: Sequence[float], micro_batches: int, window: int, stream: int, num_streams: int
) -> list[int]:
    """Returns how many of the micro-batches of a stream's window come from each set.

    Up to the end of any window, each set has given its weight's share of all micro-batches of the stream, to within
    one; the heaviest takes what is left. Streams are staggered, so that a light set's turns do not fall together.

    Raises:
        DataError: the window is too short for so many sets.
    """
    heaviest = max(range(len(weights)), key=lambda d: weights[d])
    if micro_batches < len(weights) * (len(weights) - 1):
        raise DataError(
            f"window_micro_batches={micro_batches} is too short to mix {len(weights)} data sets; "
            f"set it to at least {len(weights) * (len(weights) - 1)}"
        )
    shares = []
    for weight in weights:
        part = round(weight / sum(weights) * _WEIGHT_SCALE)
        behind, ahead = (
            (w * micro_batches * part * num_streams + stream * _WEIGHT_SCALE) // (_WEIGHT_SCALE * num_streams)
            for w in (window, window + 1)
        )
        shares.append(ahead - behind)
    shares[heaviest] = 0
    shares[heaviest] = micro_batches - sum(shares)
    return shares


# --- visits -------------------------------------------------------------------------------------------------------


def shard_starts(shard_samples: Sequence[int]) -> np.ndarray:
    """Returns the number in the set of each shard's first sample, and at last the number of samples, (shards + 1,)."""
    return np.concatenate(([0], np.cumsum(np.asarray(shard_samples, dtype=np.int64))))


def block_samples(block: Block, starts: np.ndarray) -> np.ndarray:
    """Returns the number in the set of the sample of each visit, (n,) int64; `starts` is from `shard_starts`."""
    return np.concatenate([np.arange(starts[s] + begin, starts[s] + last) for s, begin, last in block.spans])[
        block.places
    ]


def pack_visits(set_number: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """Packs visits into one int64 each: the set, the epoch, and the samples' numbers in the set.

    Raises:
        DataError: more epochs or sets than fit.
    """
    if epoch >> _EPOCH_BITS or set_number >> _SET_BITS:
        raise DataError(f"epoch {epoch} of data set {set_number}: more than the order can count; use a larger data set")
    head = (set_number << (_EPOCH_BITS + _ROW_BITS)) | (epoch << _ROW_BITS)
    return np.asarray(samples, dtype=np.int64) | np.int64(head)


def unpack_visits(visits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Undoes `pack_visits`: (set numbers, epochs, samples' numbers in their set)."""
    visits = np.asarray(visits, dtype=np.int64)
    samples = visits & ((1 << _ROW_BITS) - 1)
    return visits >> (_EPOCH_BITS + _ROW_BITS), (visits >> _ROW_BITS) & ((1 << _EPOCH_BITS) - 1), samples
