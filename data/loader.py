"""The training loader: micro-batches in the order of data.streams, decoded, with bad samples masked."""

import logging
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.batch import Batch as Batch  # for those who use the loader
from data.buckets import make_buckets
from data.captions import CaptionConfig, choose_caption, choose_index
from data.decode import BadImage
from data.encoded import EncodedSample, Encoding, collate, cut_box, unpack_sample
from data.errors import DataError
from data.index import Index, load_index
from data.loader_config import LoaderConfig as LoaderConfig  # for those who use the loader
from data.loader_config import MixConfig as MixConfig
from data.object_store import join
from data.shard_reader import RawSample, read_shard
from data.streams import (
    ALGORITHM_VERSION,
    Cursor,
    Order,
    check_workers,
    micro_batches_behind,
    micro_batches_of,
    window_shares,
)
from data.transforms import Picture, load_picture, to_float
from data.windows import DataSet, Item, MicroBatch, StreamReader, WindowConfig

log = logging.getLogger(__name__)
_MAX_READERS = 8  # shards that a worker reads at once


class Loader:
    """An endless iterable of one rank's micro-batches. Iterating again starts at the same place.

    Attributes:
        stamp: What the order depends on, for a checkpoint; see check_stamp.
        indexes: Of the data sets.
    """

    def __init__(self, dataset: "_MicroBatches", stamp: dict[str, Any]) -> None:
        self._dataset = dataset
        self.stamp = stamp
        self.indexes = tuple(data_set.index for data_set in dataset.sets)

    def __iter__(self) -> Iterator[Batch]:
        num_workers = self._dataset.config.num_workers
        # Forked workers are cheap, and run no kernels. They put whole micro-batches into shared memory.
        context = multiprocessing.get_context("fork")
        closing = context.Event()
        items = DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=partial(_leave_signals, closing),
            multiprocessing_context=context if num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        try:
            for item in items:
                if isinstance(item, str):  # an exception of a worker would arrive wrapped in its traceback
                    raise DataError(item)
                yield item
        except (EOFError, ConnectionError) as error:  # of a worker that died while it handed over a batch
            # torch raises in the main thread for each child that ends: not while this error is on its way.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise RuntimeError("DataLoader worker: one died while it handed over a batch") from error
        finally:
            closing.set()


def build_loader(
    config: LoaderConfig,
    *,
    seed: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    cursor: Cursor | None = None,
    indexes: Sequence[Index] = (),
) -> Loader:
    """Opens the data sets and returns this rank's micro-batches, from the cursor on (default: from the start).

    Micro-batch g goes to rank g mod world_size and holds the sample numbers g * micro_batch_size + j. A resume passes
    the cursor of what all ranks consumed, and may do so with another number of ranks or workers. `indexes` are those of
    the data sets if they were read before, which takes a while for a hundred thousand shards.

    Raises:
        DataError: no index, ranks x workers do not divide the streams, too few samples, or a first micro-batch that
            the ranks do not divide. While iterating: a shard that is missing or not as indexed.
    """
    cursor = cursor or Cursor()
    check_workers(config.num_streams, world_size, config.num_workers)
    next(micro_batches_of(cursor.micro_batches, rank, world_size))  # refuses a bad start here, not in a worker
    indexes = indexes or [load_index(source.shards) for source in config.sources]
    sets = tuple(_open(config, number, seed, index) for number, index in enumerate(indexes))
    _check_encodings(sets)
    one_shape = len(sets) == 1 and config.buckets is None and sets[0].encoding is None
    window = WindowConfig(
        seed=seed,
        micro_batch_size=micro_batch_size,
        micro_batches=1 if one_shape else config.window_micro_batches,  # nothing has to come out even
        buckets=make_buckets(config.image_size, config.buckets),
        filters=config.filters,
    )
    window_shares([data_set.weight for data_set in sets], window.micro_batches, 0, 0, config.num_streams)
    _warn_of_memory(held_bytes(config, sets, window, world_size))
    dataset = _MicroBatches(config, sets, window, rank, world_size, cursor)
    return Loader(dataset, order_stamp(config, sets, window))


def _open(config: LoaderConfig, number: int, seed: int, index: Index) -> DataSet:
    source = config.sources[number]
    try:
        order = Order(
            seed=seed,
            shard_samples=tuple(shard.samples for shard in index.shards),
            num_streams=config.num_streams,
            shuffle_block_shards=config.shuffle_block_shards,
            shuffle_chunk_samples=config.shuffle_chunk_samples,
            set_number=number,
        )
    except DataError as error:
        raise DataError(f"{index.url}: {error}") from None
    encoding = None if index.encoding is None else Encoding.from_dict(index.encoding, source.shards)
    return DataSet(index=index, order=order, weight=source.weight, encoding=encoding)


def held_bytes(config: LoaderConfig, sets: tuple[DataSet, ...], window: WindowConfig, world_size: int) -> int:
    """Returns how much one rank's readers hold, in bytes: two blocks and a window per stream, as stored."""
    total = 0.0
    for data_set in sets:
        samples, size = data_set.index.num_samples, sum(shard.bytes for shard in data_set.index.shards)
        block = min(config.shuffle_block_shards * config.shuffle_chunk_samples, samples / config.num_streams)
        share = data_set.weight / sum(each.weight for each in sets)
        total += (2 * block + share * window.micro_batches * window.micro_batch_size) * size / samples
    return round(total * config.num_streams / world_size)


def _warn_of_memory(per_rank: int) -> None:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if per_rank * local_ranks > machine / 2:
        log.warning(
            "the readers of %d ranks will hold %.0f GiB of data, this machine has %.0f GiB; lower "
            "data.shuffle_chunk_samples or data.num_streams",
            local_ranks,
            per_rank * local_ranks / 2**30,
            machine / 2**30,
        )


def _check_encodings(sets: tuple[DataSet, ...]) -> None:
    """Encoded sets share micro-batches, so they must have been made alike."""
    encoded = [(data_set.index.url, data_set.encoding) for data_set in sets if data_set.encoding is not None]
    for url, encoding in encoded:
        for item in fields(encoding):
            one, other = getattr(encoded[0][1], item.name), getattr(encoding, item.name)
            if item.name not in ("source", "sizes", "settings") and one != other:
                raise DataError(
                    f"{url} and {encoded[0][0]} were encoded with different {item.name} ({other!r}, {one!r}); "
                    "encode them alike"
                )


def order_stamp(config: LoaderConfig, sets: tuple[DataSet, ...], window: WindowConfig) -> dict[str, Any]:
    """Returns all that decides which sample has which number, to be kept with the cursor; plain JSON values."""
    return {
        "algorithm_version": ALGORITHM_VERSION,
        "data_sets": [[data_set.index.fingerprint, data_set.weight] for data_set in sets],
        "seed": window.seed,
        "micro_batch_size": window.micro_batch_size,
        "num_streams": config.num_streams,
        "shuffle_block_shards": config.shuffle_block_shards,
        "shuffle_chunk_samples": config.shuffle_chunk_samples,
        "window_micro_batches": window.micro_batches,
        "buckets": [list(size) for size in window.buckets],
        "filters": [asdict(rule) | {"one_of": list(rule.one_of)} for rule in window.filters],
    }


def check_stamp(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses to go on with another order than a checkpoint was made with.

    Raises:
        DataError: names the first difference.
    """
    for name, value in current.items():
        if saved.get(name) != value:
            now, was = (re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", repr(v)) for v in (value, saved.get(name)))
            raise DataError(
                f"{name} is {now}, the checkpoint was made with {was}: the data would come in another order; "
                "restore the old value or start a new run"
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
    if index.encoding is not None:
        raise DataError(f"{shards}: holds encoded samples, no pictures; give the data set that they were made of")
    left = index.num_samples if limit is None else limit
    for number, shard in enumerate(index.shards):
        if left <= 0:
            return
        for sample in read_shard(index, number):
            try:
                caption = _caption(sample, CaptionConfig())
                picture = load_picture(bytes(sample.image), image_size, image_size)
            except BadImage as error:
                log.warning("%s: sample %r skipped: %s", join(index.url, shard.name), sample.key, error)
                continue
            yield sample.key, to_float(picture.pixels), caption, sample.meta
            left -= 1
            if left <= 0:
                return


def _caption(sample: RawSample, config: CaptionConfig, seed: int = 0, sample_number: int | None = None) -> str:
    if sample.problem:
        raise BadImage(sample.problem)
    caption = choose_caption(sample.text, sample.meta, seed, sample_number, config)
    if not caption:
        raise BadImage("empty caption")
    return caption


def _leave_signals(closing: Event, _worker: int) -> None:
    """Leaves it to the trainer to answer a preemption: workers go on until it has saved, and end with it."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # torch ends with SIGTERM a worker that hangs in a read when all is over.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else None)


class _MicroBatches(IterableDataset["Batch | str"]):
    """What runs in a worker."""

    def __init__(
        self,
        config: LoaderConfig,
        sets: tuple[DataSet, ...],
        window: WindowConfig,
        rank: int,
        world_size: int,
        cursor: Cursor,
    ) -> None:
        self.config, self.sets, self.window = config, sets, window
        self.rank, self.world_size, self.cursor = rank, world_size, cursor

    def __iter__(self) -> Iterator[Batch | str]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        streams: dict[int, Iterator[MicroBatch]] = {}
        pool = ThreadPoolExecutor(_MAX_READERS, thread_name_prefix="read-ahead")
        try:
            for number in micro_batches_of(self.cursor.micro_batches, self.rank, self.world_size, worker, num_workers):
                stream = number % self.config.num_streams
                if stream not in streams:
                    streams[stream] = iter(self._open_stream(stream, pool))
                batch = next(streams[stream])
                encoding = batch.items[0].data_set.encoding
                yield self._pictures(number, batch) if encoding is None else self._encoded(number, batch, encoding)
        except DataError as error:
            yield str(error)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _open_stream(self, stream: int, pool: ThreadPoolExecutor) -> StreamReader:
        behind = micro_batches_behind(self.cursor.micro_batches, stream, self.config.num_streams)
        positions = self.cursor.positions[stream] if behind else ((0, 0),) * len(self.sets)
        return StreamReader(self.sets, stream, behind, positions, self.window, pool)

    def _pictures(self, number: int, micro_batch: MicroBatch) -> Batch:
        batch = self._empty(number, micro_batch, micro_batch.shape)
        seed, (width, height) = self.window.seed, micro_batch.shape
        sizes, crops = batch.sizes.numpy(), batch.crops.numpy()
        for place, item in enumerate(micro_batch.items):
            sample_number = int(batch.sample_numbers[place])
            try:
                batch.captions[place] = _caption(item.sample, self.config.captions, seed, sample_number)
                data = bytes(item.sample.image)
                picture: Picture = load_picture(
                    data, width, height, crop=self.config.crop, seed=seed, sample_number=sample_number
                )
            except BadImage as error:
                self._mask(batch, place, item, error)
                continue
            batch.pixels[place] = picture.pixels
            sizes[place], crops[place] = picture.size, picture.box
        return batch

    def _encoded(self, number: int, micro_batch: MicroBatch, encoding: Encoding) -> Batch:
        batch = self._empty(number, micro_batch, (0, 0))
        width, height = micro_batch.shape
        sizes, crops = batch.sizes.numpy(), batch.crops.numpy()
        samples: list[EncodedSample | None] = []
        choices = []
        for place, item in enumerate(micro_batch.items):
            try:
                sample = unpack_sample(item.sample.image, encoding)
            except BadImage as error:
                self._mask(batch, place, item, error)
                samples.append(None)
                choices.append(0)
                continue
            weights = [weight for _, weight in sample.captions]
            choice = choose_index(weights, self.window.seed, int(batch.sample_numbers[place]))
            samples.append(sample)
            choices.append(choice)
            batch.captions[place], batch.metas[place] = sample.captions[choice][0], sample.meta
            sizes[place], crops[place] = sample.size, cut_box(sample, width, height)
        batch.encoded = collate(samples, width, height, choices, encoding)
        return batch

    def _mask(self, batch: Batch, place: int, item: Item, error: BadImage) -> None:
        batch.captions[place], batch.weights[place] = "", 0.0
        shard = item.data_set.index.shards[item.shard].name
        sample_number = int(batch.sample_numbers[place])
        record = {"key": item.sample.key, "shard": shard, "sample_number": sample_number, "reason": str(error)}
        batch.bad.append(record)

    def _empty(self, number: int, micro_batch: MicroBatch, shape: tuple[int, int]) -> Batch:
        size = self.window.micro_batch_size
        return Batch(
            pixels=torch.full((size, 3, shape[1], shape[0]), 128, dtype=torch.uint8),
            captions=[""] * size,
            keys=[item.sample.key for item in micro_batch.items],
            sample_numbers=torch.arange(number * size, (number + 1) * size),
            weights=torch.ones(size),
            sizes=torch.zeros(size, 2, dtype=torch.int32),
            crops=torch.zeros(size, 4, dtype=torch.int32),
            bad=[],
            metas=[item.sample.meta for item in micro_batch.items],
            visits=torch.from_numpy(np.array([item.visit for item in micro_batch.items], dtype=np.int64)),
            filtered=torch.from_numpy(micro_batch.filtered),
            filtered_by=micro_batch.filtered_by,
            stream=number % self.config.num_streams,
            positions=micro_batch.positions,
        )
