"""Data sets on disk: WebDataset shards and their index. The only module that knows webdataset.

A data set is a folder or prefix with `name-000000.tar` …, one sidecar `name-000000.idx.json` per shard (where each
sample lies and how large its picture is) and `index.json` (the list of shards), written last. Formats: docs/shards.md.
"""

import hashlib
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import DataError
from data.object_store import LocalStore, S3Store, join, open_store
from data.tar_scan import IMAGE_EXTENSIONS, Rows, Scan, scan_tar, split_name

FORMAT_VERSION = 1
INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One line of the index."""

    name: str  # key of the tar relative to the data set
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """A data set: its address and its shards in name order."""

    url: str
    fingerprint: str  # SHA-256 over the shards' names, samples, bytes and SHA-256; independent of the address
    shards: tuple[ShardInfo, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """One sample as stored; nothing is decoded but its texts."""

    key: str
    image: bytes
    extension: str  # of the image, lower case
    text: str | None  # the .txt
    meta: dict[str, Any]  # the .json, or {}
    problem: str | None  # why it cannot be used, or None


def write_shards(samples: Iterable[dict[str, Any]], url: str, name: str, samples_per_shard: int) -> Index:
    """Writes samples as shards with their index and returns it. The same samples give the same bytes.

    Args:
        samples: dicts for webdataset's TarWriter: "__key__" (no dot in its last part) and bytes, str or dict (as JSON)
            by extension.
        url: the data set to make; must hold no shards and no index.
        name: shards are called `name`-000000.tar and so on.
        samples_per_shard: the last shard may hold fewer.

    Raises:
        DataError: there is a data set already, no sample came, or a sample is one that indexing refuses.
    """
    from webdataset.writer import TarWriter

    store = open_store(url)
    _refuse_existing(store)
    shards: list[ShardInfo] = []
    iterator = iter(samples)
    sample = next(iterator, None)
    with tempfile.TemporaryDirectory(prefix="darkroom-shards-") as folder:
        while sample is not None:
            shard_name = f"{name}-{len(shards):06d}.tar"
            path = Path(folder) / shard_name
            with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0.0) as writer:
                for _ in range(samples_per_shard):
                    if sample is None:
                        break
                    writer.write(sample)
                    sample = next(iterator, None)
            with path.open("rb") as stream:
                scan = scan_tar(stream, join(url, shard_name))
            store.put_file(path, shard_name)
            path.unlink()
            shards.append(_write_sidecar(store, shard_name, scan))
    if not shards:
        raise DataError(f"{store.url}: there are no samples to write; check the input")
    return _write_index(store, shards)


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
        with store.open_range(shard_name) as stream:
            scan = scan_tar(stream, join(store.url, shard_name), required)
        shards.append(_write_sidecar(store, shard_name, scan))
    return _write_index(store, shards)


def load_index(url: str) -> Index:
    """Reads index.json.

    Raises:
        DataError: there is none, it is damaged, or of another format.
    """
    store = open_store(url)
    if not store.exists(INDEX):
        raise DataError(f"{join(store.url, INDEX)}: no such file; make it with `darkroom data index {url}`")
    fields = _read_json(store, INDEX)
    try:
        shards = tuple(ShardInfo(**shard) for shard in fields["shards"])
        fingerprint = fields["fingerprint"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{join(store.url, INDEX)}: damaged; delete it and run `darkroom data index {url}`") from error
    if not shards or _fingerprint(shards) != fingerprint:
        raise DataError(f"{join(store.url, INDEX)}: was edited; delete it and run `darkroom data index {url}`")
    return Index(url=store.url, fingerprint=fingerprint, shards=shards)


def load_rows(index: Index, shard_no: int) -> Rows:
    """Reads the sidecar of a shard: key, offset, length, width and height of each sample.

    Raises:
        DataError: it is missing or does not fit the index.
    """
    store, shard = open_store(index.url), index.shards[shard_no]
    fields = _read_json(store, _sidecar_name(shard.name))
    try:
        rows = Rows(**fields["rows"])
        fits = fields["sha256"] == shard.sha256 and all(len(c) == shard.samples for c in asdict(rows).values())
    except (KeyError, TypeError):
        fits = False
    if not fits:
        place = join(index.url, _sidecar_name(shard.name))
        raise DataError(f"{place}: does not fit {INDEX}; delete {INDEX} and run `darkroom data index {index.url}`")
    return rows


def read_shard(index: Index, shard_no: int) -> Iterator[RawSample]:
    """Reads a shard from front to back and checks it against the index: size, number of samples, keys.

    Raises:
        DataError: the shard is missing, short, or not the one that was indexed.
    """
    store, shard = open_store(index.url), index.shards[shard_no]
    place = join(index.url, shard.name)
    remedy = f"restore it, or delete {INDEX} and run `darkroom data index {index.url}`"
    if not store.exists(shard.name):
        raise DataError(f"{place}: no such file, though the index names it; {remedy}")
    size = store.size(shard.name)
    if size != shard.bytes:
        raise DataError(f"{place}: has {size} bytes, the index says {shard.bytes}; {remedy}")
    keys = load_rows(index, shard_no).keys
    count = 0
    with store.open_range(shard.name) as stream:
        for members in _grouped(stream, place, remedy):
            found = members["__key__"]
            if count >= len(keys) or found != keys[count]:
                expected = keys[count] if count < len(keys) else "the end"
                raise DataError(f"{place}: sample {count} is {found!r}, the index says {expected!r}; {remedy}")
            count += 1
            yield _raw_sample(members)
    if count != shard.samples:
        raise DataError(f"{place}: holds {count} samples, the index says {shard.samples}; {remedy}")


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
    for number, shard in enumerate(index.shards):
        place = join(store.url, shard.name)
        try:
            rows = load_rows(index, number)
            with store.open_range(shard.name) as stream:
                scan = scan_tar(stream, place, required=())
        except DataError as error:
            problems.append(str(error))
            continue
        if scan.size_bytes != shard.bytes:
            problems.append(f"{place}: has {scan.size_bytes} bytes, the index says {shard.bytes}")
        elif scan.sha256 != shard.sha256:
            problems.append(f"{place}: SHA-256 is {scan.sha256[:12]}…, the index says {shard.sha256[:12]}…")
        elif scan.rows != rows:
            problems.append(f"{join(store.url, _sidecar_name(shard.name))}: does not describe {shard.name}")
    return problems


def describe(url: str, num_captions: int = 5) -> dict[str, Any]:
    """Summarises a data set for a reader: counts, the commonest picture sizes, a few captions of the first shard."""
    index = load_index(url)
    sizes: Counter[str] = Counter()
    for number in range(len(index.shards)):
        rows = load_rows(index, number)
        sizes.update(f"{width}x{height}" for width, height in zip(rows.widths, rows.heights, strict=True))
    captions = []
    for sample, _ in zip(read_shard(index, 0), range(num_captions), strict=False):
        captions.append(sample.text if sample.text is not None else str(sample.meta.get("caption", "")))
    return {
        "url": index.url,
        "fingerprint": index.fingerprint,
        "samples": index.num_samples,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "unreadable_images": sizes.pop("0x0", 0),
        "sizes": dict(sizes.most_common(10)),
        "captions": captions,
    }


def _grouped(stream: BinaryIO, place: str, remedy: str) -> Iterator[dict[str, Any]]:
    """Parses a tar with webdataset into dicts of "__key__" and bytes by extension. No decoder of webdataset runs."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        yield from group_by_keys(tar_file_expander([{"url": place, "stream": stream}]), keys=split_name)
    except DataError:
        raise
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{place}: damaged ({type(error).__name__}); {remedy}") from error


def _raw_sample(members: dict[str, Any]) -> RawSample:
    extension = next((name for name in IMAGE_EXTENSIONS if name in members), "")
    text: str | None = None
    meta: Any = {}
    problem = None if extension else "no image"
    try:
        text = members["txt"].decode() if "txt" in members else None
        meta = json.loads(members["json"]) if "json" in members else {}
        if not isinstance(meta, dict):
            raise ValueError("not an object")
    except UnicodeDecodeError:
        problem = "the caption is not UTF-8"
    except ValueError:
        meta, problem = {}, "the .json is not a JSON object"
    return RawSample(
        key=members["__key__"],
        image=members.get(extension, b""),
        extension=extension,
        text=text,
        meta=meta,
        problem=problem,
    )


def _tars(store: LocalStore | S3Store) -> list[str]:
    return [key for key, _ in store.list() if key.endswith(".tar")]


def _refuse_existing(store: LocalStore | S3Store) -> None:
    found = next((key for key, _ in store.list() if key.endswith((".tar", INDEX))), None)
    if found:
        kind = "a data set" if store.exists(INDEX) else f"shards without {INDEX} ({found})"
        raise DataError(f"{store.url}: already holds {kind}; choose another place or remove it")


def _sidecar_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".idx.json"


def _write_sidecar(store: LocalStore | S3Store, shard_name: str, scan: Scan) -> ShardInfo:
    fields = {"format_version": FORMAT_VERSION, "sha256": scan.sha256, "rows": asdict(scan.rows)}
    store.put_bytes(json.dumps(fields, separators=(",", ":")).encode(), _sidecar_name(shard_name))
    return ShardInfo(name=shard_name, samples=len(scan.rows.keys), bytes=scan.size_bytes, sha256=scan.sha256)


def _write_index(store: LocalStore | S3Store, shards: list[ShardInfo]) -> Index:
    index = Index(url=store.url, fingerprint=_fingerprint(shards), shards=tuple(shards))
    fields = {
        "format_version": FORMAT_VERSION,
        "fingerprint": index.fingerprint,
        "samples": index.num_samples,
        "shards": [asdict(shard) for shard in shards],
    }
    if not store.put_if_absent(json.dumps(fields, indent=1).encode(), INDEX):
        raise DataError(f"{join(store.url, INDEX)}: another process wrote it; check it with `darkroom data verify`")
    return index


def _read_json(store: LocalStore | S3Store, key: str) -> dict[str, Any]:
    with store.open_range(key) as file:
        data = file.read()
    try:
        fields = json.loads(data)
        version = fields["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{join(store.url, key)}: damaged; delete {INDEX} and run `darkroom data index`") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{join(store.url, key)}: format {version}, known is {FORMAT_VERSION}; update darkroom")
    return dict(fields)


def _fingerprint(shards: Iterable[ShardInfo]) -> str:
    lines = [[shard.name, shard.samples, shard.bytes, shard.sha256] for shard in shards]
    return hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()
