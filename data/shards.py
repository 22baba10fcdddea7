"""Data sets on disk: WebDataset shards and their index. This is the door to data.index and data.shard_reader.

A data set is a folder or prefix with `name-000000.tar` …, one sidecar `name-000000.idx.json` per shard (where each
sample lies and how large its picture is) and `index.json` (the list of shards), written last. Formats: docs/shards.md.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data.captions import choose_caption
from data.decode import BadImage
from data.errors import DataError
from data.index import (
    INDEX,
    Index,
    ShardInfo,
    load_index,
    load_rows,
    read_sidecar,
    shard_done,
    sidecar_name,
    write_index,
    write_sidecar,
)
from data.object_store import Store, join, open_store
from data.shard_reader import RawSample, read_rows, read_shard
from data.tar_scan import Rows, Scan, scan_tar

__all__ = [
    "INDEX",
    "Index",
    "RawSample",
    "Rows",
    "ShardInfo",
    "build_index",
    "describe",
    "load_index",
    "load_rows",
    "read_rows",
    "read_shard",
    "shard_done",
    "verify",
    "write_index",
    "write_shard",
    "write_shards",
]


def write_shards(
    samples: Iterable[dict[str, Any]],
    url: str,
    name: str,
    samples_per_shard: int,
    encoding: dict[str, Any] | None = None,
) -> Index:
    """Writes samples as shards with their index and returns it. The same samples give the same bytes.

    Args:
        samples: dicts for webdataset's TarWriter: "__key__" (no dot in its last part) and bytes, str or dict (as JSON)
            by extension. Encoded samples: the key and "safetensors".
        url: the data set to make; must hold no shards and no index.
        name: shards are called `name`-000000.tar and so on.
        samples_per_shard: the last shard may hold fewer.
        encoding: what encoded samples were made with; None for pictures.

    Raises:
        DataError: there is a data set already, no sample came, or a sample is one that indexing refuses.
    """
    store = open_store(url)
    _refuse_existing(store)
    shards: list[ShardInfo] = []
    iterator = iter(samples)
    for sample in iterator:
        group = chain([sample], islice(iterator, samples_per_shard - 1))
        shards.append(write_shard(group, store, f"{name}-{len(shards):06d}.tar", encoded=encoding is not None))
    return write_index(store, shards, encoding)


def write_shard(
    samples: Iterable[dict[str, Any]], store: Store, shard_name: str, encoded: bool | None = None
) -> ShardInfo:
    """Writes one shard, the tar first, then its sidecar, replacing what was there.

    A sidecar of an earlier try is removed before, so while one is there, it describes a whole tar (see shard_done).

    Args:
        samples: as for write_shards; at least one.
        store: the data set's.
        shard_name: ends with .tar.
        encoded: whether the samples must be encoded or must not be; None = either.

    Returns:
        Its line of the index, for write_index.

    Raises:
        DataError: no sample came, or a sample is one that indexing refuses.
    """
    place = join(store.url, shard_name)
    with tempfile.TemporaryDirectory(prefix="darkroom-shards-") as folder:
        path = Path(folder) / "shard.tar"
        _write_tar(samples, path)
        with path.open("rb") as stream:
            scan = scan_tar(stream, place)
        _check_kind(scan, place, encoded)
        store.delete(sidecar_name(shard_name))
        store.put_file(path, shard_name)
    return write_sidecar(store, shard_name, scan)


def build_index(url: str, required: Iterable[str] = ("image", "text")) -> Index:
    """Indexes a folder of tars that somebody else wrote, as img2dataset does; reads every shard once.

    Raises:
        DataError: there is an index already, no tar, or a shard that training could trip over (see tar_scan).
    """
    store = open_store(url)
    if store.exists(INDEX):
        raise DataError(f"{join(store.url, INDEX)}: exists already; check it with `darkroom data verify`, or delete it")
    names = _tars(store)
    if not names:
        raise DataError(f"{store.url}: no .tar files there; check the address")
    shards = []
    for shard_name in names:
        place = join(store.url, shard_name)
        with store.open_range(shard_name) as stream:
            scan = scan_tar(stream, place, required)
        _check_kind(scan, place, encoded=False)
        shards.append(write_sidecar(store, shard_name, scan))
    return write_index(store, shards)


def verify(url: str) -> list[str]:
    """Reads every shard of a data set and compares it with its index, to the last byte.

    Returns:
        One line per problem; empty if all is well.

    Raises:
        DataError: the index itself cannot be read.
    """
    index = load_index(url)
    store = open_store(url)
    listed = {shard.name for shard in index.shards}
    problems = [f"{join(store.url, name)}: not in the index" for name in _tars(store) if name not in listed]
    for shard in index.shards:
        place = join(store.url, shard.name)
        try:
            rows = read_sidecar(index.url, shard, index.remedy)
            with store.open_range(shard.name) as stream:
                scan = scan_tar(stream, place, required=())
            _check_kind(scan, place, encoded=index.encoding is not None)
        except DataError as error:
            problems.append(str(error))
            continue
        if scan.size_bytes != shard.bytes:
            problems.append(f"{place}: has {scan.size_bytes} bytes, the index says {shard.bytes}")
        elif scan.sha256 != shard.sha256:
            problems.append(f"{place}: SHA-256 is {scan.sha256[:12]}…, the index says {shard.sha256[:12]}…")
        elif scan.rows != rows:
            problems.append(f"{join(store.url, sidecar_name(shard.name))}: does not describe {shard.name}")
    return problems


def describe(url: str, num_captions: int = 5) -> dict[str, Any]:
    """Summarises a data set for a reader: counts, the commonest picture sizes, a few captions of the first shard."""
    index = load_index(url)
    sizes: Counter[str] = Counter()
    for shard in index.shards:
        rows = read_sidecar(index.url, shard, index.remedy)
        sizes.update(f"{width}x{height}" for width, height in zip(rows.widths, rows.heights, strict=True))
    return {
        "url": index.url,
        "fingerprint": index.fingerprint,
        "samples": index.num_samples,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "unreadable_images": sizes.pop("0x0", 0),
        "sizes": dict(sizes.most_common(10)),
        "captions": _captions(index, num_captions),
        **({} if index.encoding is None else {"encoding": index.encoding}),
    }


def _captions(index: Index, count: int) -> list[str]:
    samples = read_rows(index, 0, 0, min(count, index.shards[0].samples))
    if index.encoding is None:
        return [choose_caption(sample.text, sample.meta) for sample in samples]
    from data.encoded import Encoding, unpack_sample  # imports torch, which no other data set needs

    encoding = Encoding.from_dict(index.encoding, index.url)
    captions = []
    for sample in samples:
        try:
            captions.append(unpack_sample(sample.image, encoding).captions[0][0])
        except BadImage as error:
            captions.append(f"({error})")
    return captions


def _write_tar(samples: Iterable[dict[str, Any]], path: Path) -> None:
    os.environ["WDS_SECURE"] = "1"  # see data.shard_reader
    from webdataset.writer import TarWriter

    # mtime as an integer: a float would put an extended header before every member.
    with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0) as writer:
        for sample in samples:
            writer.write(sample)


def _check_kind(scan: Scan, place: str, encoded: bool | None) -> None:
    if encoded is not None and scan.encoded != encoded:
        if scan.encoded:
            raise DataError(f"{place}: holds encoded samples, whose index `darkroom encode` writes; run it again")
        raise DataError(
            f"{place}: holds pictures in a set of encoded samples; remove it and run `darkroom encode` again"
        )


def _tars(store: Store) -> list[str]:
    return [key for key, _ in store.list() if key.endswith(".tar")]


def _refuse_existing(store: Store) -> None:
    found = next((key for key, _ in store.list() if key.endswith((".tar", INDEX))), None)
    if found:
        kind = "a data set" if store.exists(INDEX) else f"shards without {INDEX} ({found})"
        raise DataError(f"{store.url}: already holds {kind}; choose another place or remove it")
