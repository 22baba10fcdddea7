"""The training loader: micro-batches in the order of data.streams, decoded, with bad samples masked."""

import logging
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.captions import choose_caption
from data.decode import BadImage, decode_image
from data.errors import DataError
from data.object_store import join
from data.shards import Index, RawSample, load_index, read_shard
from data.streams import (
    ALGORITHM_VERSION,
    Order,
    SampleRef,
    block_shards,
    check_workers,
    micro_batches_of,
    stream_micro_batches,
)
from data.transforms import Crop, to_square

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What a run reads and how."""

    shards: str  # address of the data set
    image_size: int  # px, side of the square training image
    num_workers: int = 0  # reader processes per rank; 0 = the rank's own process. Does not change the order
    num_streams: int = 8  # logical streams; ranks x workers must divide it. Changes the order
    shuffle_block_shards: int = 4  # shards shuffled together, and held in memory per stream. Changes the order
    crop: Literal["centre", "random"] = "centre"  # which square of a picture that is not one
    max_bad_fraction: float = 0.01  # share of unusable samples above which training stops, [0, 1]

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("num_workers", 0), ("num_streams", 1), ("shuffle_block_shards", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: is a share; give a number from 0 to 1")


@dataclass(kw_only=True)
class Batch:
    """One micro-batch. A bad sample keeps its place: weight 0, a grey image, an empty caption, a line in `bad`."""

    images: torch.Tensor  # (B, 3, H, W) float32 in [-1, 1]
    captions: list[str]
    keys: list[str]
    sample_numbers: torch.Tensor  # (B,) int64: run-wide number of each sample, the key of all its randomness
    weights: torch.Tensor  # (B,) float32: 1, or 0 for a masked sample
    bad: list[dict[str, Any]]  # {"key", "shard", "sample_number", "reason"} of each masked sample
    metas: list[dict[str, Any]]  # the sample's JSON, or {}


class Loader:
    """An endless iterable of one rank's micro-batches. Iterating again starts at the same place."""

    def __init__(self, dataset: "_MicroBatches", stamp: dict[str, Any]) -> None:
        self._dataset = dataset
        self.stamp = stamp  # what the order depends on, for a checkpoint; see check_stamp
        self.index = dataset.index

    def __iter__(self) -> Iterator[Batch]:
        num_workers = self._dataset.config.num_workers
        # The default context forks: cheap, and workers run no kernels. They put whole micro-batches into shared memory.
        items = DataLoader(self._dataset, batch_size=None, num_workers=num_workers, worker_init_fn=_ignore_signals)
        for item in items:
            if isinstance(item, str):  # an exception of a worker would arrive wrapped in its traceback
                raise DataError(item)
            yield item


def build_loader(
    config: LoaderConfig, *, seed: int, micro_batch_size: int, rank: int, world_size: int, first_micro_batch: int
) -> Loader:
    """Opens the data set and returns this rank's micro-batches, from the run's micro-batch `first_micro_batch` on.

    Micro-batch g goes to rank g mod world_size and holds the sample numbers g * micro_batch_size + j. A resume passes
    the run-wide number of micro-batches consumed, and may do so with another number of ranks or workers.

    Raises:
        DataError: no index, ranks x workers do not divide the streams, too few shards, or a first micro-batch that the
            ranks do not divide. While iterating: a shard that is missing or not as indexed.
    """
    index = load_index(config.shards)
    order = Order(
        seed=seed,
        shard_samples=tuple(shard.samples for shard in index.shards),
        num_streams=config.num_streams,
        shuffle_block_shards=config.shuffle_block_shards,
        micro_batch_size=micro_batch_size,
    )
    check_workers(config.num_streams, world_size, config.num_workers)
    next(micro_batches_of(first_micro_batch, rank, world_size))  # refuses a bad start here, not in a worker
    dataset = _MicroBatches(config, index, order, rank, world_size, first_micro_batch)
    return Loader(dataset, order_stamp(order, index))


def order_stamp(order: Order, index: Index) -> dict[str, Any]:
    """Returns all that decides which sample has which number, to be kept with the count of micro-batches consumed."""
    fields = {name: value for name, value in asdict(order).items() if name != "shard_samples"}
    return {"algorithm_version": ALGORITHM_VERSION, "dataset_fingerprint": index.fingerprint, **fields}


def check_stamp(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses to go on with another order than a checkpoint was made with.

    Raises:
        DataError: names the first difference.
    """
    for name, value in current.items():
        if saved.get(name) != value:
            raise DataError(
                f"{name} is {value!r}, the checkpoint was made with {saved.get(name)!r}: the data would come in "
                f"another order; restore the old value or start a new run"
            )


def iterate_once(
    shards: str, image_size: int, limit: int | None = None
) -> Iterator[tuple[str, torch.Tensor, str, dict]]:
    """Yields every sample once, in file order: (key, image (3, H, W) float32 in [-1, 1], caption, JSON).

    Bad samples are skipped, each with a warning that names it; the first caption is taken and the middle square.

    Args:
        shards: address of the data set.
        image_size: side of the image in pixels.
        limit: yield at most this many.

    Raises:
        DataError: no index, or a shard that is missing or not as indexed.
    """
    index = load_index(shards)
    left = index.num_samples if limit is None else limit
    for number, shard in enumerate(index.shards):
        if left <= 0:
            return
        for sample in read_shard(index, number):
            try:
                image, caption = _prepare(sample, image_size)
            except BadImage as error:
                log.warning("%s: sample %r skipped: %s", join(index.url, shard.name), sample.key, error)
                continue
            yield sample.key, image, caption, sample.meta
            left -= 1
            if left <= 0:
                return


def _prepare(
    sample: RawSample, image_size: int, crop: Crop = "centre", seed: int = 0, sample_number: int | None = None
) -> tuple[torch.Tensor, str]:
    if sample.problem:
        raise BadImage(sample.problem)
    caption = choose_caption(sample.text, sample.meta, seed, sample_number)
    if not caption:
        raise BadImage("empty caption")
    picture = decode_image(sample.image, min_side=image_size)
    return to_square(picture, image_size, crop, seed, sample_number or 0), caption


def _ignore_signals(_worker: int) -> None:
    """Leaves it to the trainer to answer a preemption: workers go on until it has saved, and end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _MicroBatches(IterableDataset["Batch | str"]):
    """What runs in a worker."""

    def __init__(
        self, config: LoaderConfig, index: Index, order: Order, rank: int, world_size: int, first_micro_batch: int
    ) -> None:
        self.config, self.index, self.order = config, index, order
        self.rank, self.world_size, self.first = rank, world_size, first_micro_batch

    def __iter__(self) -> Iterator[Batch | str]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        streams: dict[int, _Stream] = {}
        numbers = micro_batches_of(self.first, self.rank, self.world_size, worker, num_workers)
        try:
            for number in numbers:
                turn, name = divmod(number, self.order.num_streams)
                if name not in streams:
                    streams[name] = _Stream(self.index, self.order, name, turn)
                yield self._batch(number, next(streams[name]))
        except DataError as error:
            yield str(error)

    def _batch(self, number: int, visits: list[tuple[SampleRef, RawSample]]) -> Batch:
        size, seed, side = self.order.micro_batch_size, self.order.seed, self.config.image_size
        batch = Batch(
            images=torch.zeros(size, 3, side, side),
            captions=[""] * size,
            keys=[sample.key for _, sample in visits],
            sample_numbers=torch.arange(number * size, (number + 1) * size),
            weights=torch.ones(size),
            bad=[],
            metas=[sample.meta for _, sample in visits],
        )
        for place, (ref, sample) in enumerate(visits):
            sample_number = number * size + place
            try:
                prepared = _prepare(sample, side, self.config.crop, seed, sample_number)
                batch.images[place], batch.captions[place] = prepared
            except BadImage as error:
                batch.weights[place] = 0.0
                shard = self.index.shards[ref.shard].name
                record = {"key": sample.key, "shard": shard, "sample_number": sample_number, "reason": str(error)}
                batch.bad.append(record)
        return batch


class _Stream:
    """Reads one stream: holds the samples of its present block, as stored, and nothing else."""

    def __init__(self, index: Index, order: Order, stream: int, first: int) -> None:
        self._index, self._order, self._stream = index, order, stream
        self._batches = stream_micro_batches(order, stream, first)
        self._block: tuple[int, int] | None = None
        self._samples: dict[int, list[RawSample]] = {}

    def __next__(self) -> list[tuple[SampleRef, RawSample]]:
        _, refs = next(self._batches)
        return [(ref, self._read(ref)) for ref in refs]

    def _read(self, ref: SampleRef) -> RawSample:
        if self._block != (ref.epoch, ref.block):
            self._samples.clear()
            for shard in block_shards(self._order, self._stream, ref.epoch, ref.block):
                self._samples[shard] = list(read_shard(self._index, shard))
            self._block = (ref.epoch, ref.block)
        return self._samples[ref.shard][ref.row]
