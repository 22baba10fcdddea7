"""The index of a data set: which shards it has, and a sidecar per shard that says where its samples lie.

Formats: docs/shards.md.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np

from data.errors import DataError
from data.object_store import Store, join, open_store
from data.tar_members import is_safe
from data.tar_scan import Rows, Scan

FORMAT_VERSION = 1
INDEX = "index.json"
STAMP = "encoding.json"  # of a set that `darkroom encode` makes: written first, where the index is written last
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_CACHED_SIDECARS = 64  # of a process; about 1 MiB for each 10,000 samples


@dataclass(frozen=True, kw_only=True, slots=True)
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
    fingerprint: str  # SHA-256 over shards and encoding; independent of the address
    shards: tuple[ShardInfo, ...]
    encoding: dict[str, Any] | None = None  # what encoded samples were made with; None = pictures

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def remedy(self) -> str:
        """What to do when a shard is not what the index says."""
        if self.encoding is not None:
            return f"restore it, or delete {INDEX} and this shard and run `darkroom encode` again"
        return f"restore it, or delete {INDEX} and run `darkroom data index {self.url}`"


def load_index(url: str) -> Index:
    """Reads index.json.

    Raises:
        DataError: there is none, it is damaged, or of another format.
    """
    store = open_store(url)
    place = join(store.url, INDEX)
    if not store.exists(INDEX):
        if store.exists(STAMP):
            raise DataError(f"{place}: missing, as not every shard is encoded; run the same `darkroom encode` again")
        raise DataError(f"{place}: no such file; make it with `darkroom data index {url}`")
    remedy = f"delete it and run `darkroom data index {url}`, or `darkroom encode` again if its samples are encoded"
    fields = _read_json(store, INDEX, remedy)
    try:
        shards = tuple(ShardInfo(**shard) for shard in fields["shards"])
        fingerprint = fields["fingerprint"]
        encoding = fields.get("encoding")
        fits = fingerprint == _fingerprint(shards, encoding) and _is_sound(shards)
    except _DAMAGED as error:
        raise DataError(f"{place}: damaged; {remedy}") from error
    if not fits or not isinstance(encoding, dict | None):
        raise DataError(f"{place}: was edited; {remedy}")
    return Index(url=store.url, fingerprint=fingerprint, shards=shards, encoding=encoding)


def write_index(store: Store, shards: Iterable[ShardInfo], encoding: dict[str, Any] | None = None) -> Index:
    """Writes index.json, which makes the shards a data set, and returns it.

    Args:
        store: the data set's.
        shards: all of them, in any order.
        encoding: what encoded samples were made with; None for pictures.

    Raises:
        DataError: there are no shards, or there is another index already.
    """
    encoding = json.loads(json.dumps(encoding))  # as load_index will return it
    ordered = tuple(sorted(shards, key=lambda shard: shard.name))
    if not ordered:
        raise DataError(f"{store.url}: there are no samples to write; check the input")
    index = Index(url=store.url, fingerprint=_fingerprint(ordered, encoding), shards=ordered, encoding=encoding)
    fields = {
        "format_version": FORMAT_VERSION,
        "fingerprint": index.fingerprint,
        "samples": index.num_samples,
        **({} if encoding is None else {"encoding": encoding}),
        "shards": [asdict(shard) for shard in ordered],
    }
    if not store.put_if_absent(json.dumps(fields, indent=1).encode(), INDEX):
        raise DataError(f"{join(store.url, INDEX)}: another process wrote it; check it with `darkroom data verify`")
    return index


def load_rows(index: Index, shard_no: int) -> Rows:
    """Returns key, offset, length, width and height of each sample of a shard; kept for a while, so not to be changed.

    Raises:
        DataError: the sidecar is missing or does not fit the index.
    """
    return _cached_rows(index.url, index.shards[shard_no], index.remedy)


def read_sidecar(url: str, shard: ShardInfo, remedy: str) -> Rows:
    """Reads what `load_rows` returns, now."""
    store = open_store(url)
    fields = _read_json(store, sidecar_name(shard.name), remedy)
    try:
        rows = Rows.from_dict(fields["rows"])
        fits = fields["sha256"] == shard.sha256 and _fits(rows, shard)
    except _DAMAGED:
        fits = False
    if not fits:
        raise DataError(f"{join(url, sidecar_name(shard.name))}: does not fit {INDEX}; {remedy}")
    return rows


def write_sidecar(store: Store, shard_name: str, scan: Scan) -> ShardInfo:
    """Writes the sidecar of a shard that lies in the store already."""
    fields = {
        "format_version": FORMAT_VERSION,
        "sha256": scan.sha256,
        "bytes": scan.size_bytes,
        "rows": scan.rows.to_dict(),
    }
    store.put_bytes(json.dumps(fields, separators=(",", ":")).encode(), sidecar_name(shard_name))
    return ShardInfo(name=shard_name, samples=len(scan.rows.keys), bytes=scan.size_bytes, sha256=scan.sha256)


def shard_done(store: Store, shard_name: str) -> ShardInfo | None:
    """Returns the index's line for a shard that is finished: tar and sidecar are there and fit. None: write it anew.

    For writers that go on where they were stopped. The tar's size is compared, not its content.
    """
    if not store.exists(shard_name) or not store.exists(sidecar_name(shard_name)):
        return None
    with store.open_range(sidecar_name(shard_name)) as file:
        data = file.read()
    try:
        fields = json.loads(data)
        rows = Rows.from_dict(fields["rows"])
        shard = ShardInfo(name=shard_name, samples=len(rows.keys), bytes=fields["bytes"], sha256=fields["sha256"])
        fits = fields["format_version"] == FORMAT_VERSION and _is_sound((shard,)) and _fits(rows, shard)
    except _DAMAGED:
        return None
    return shard if fits and store.size(shard_name) == shard.bytes else None


def sidecar_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".idx.json"


@lru_cache(maxsize=_CACHED_SIDECARS)
def _cached_rows(url: str, shard: ShardInfo, remedy: str) -> Rows:
    return read_sidecar(url, shard, remedy)


def _fits(rows: Rows, shard: ShardInfo) -> bool:
    """Whether rows describe a shard of this size: as many as it has, in order, inside it, with keys that are safe."""
    if any(len(column) != shard.samples for column in vars(rows).values()):
        return False
    offsets, lengths, *sizes = (np.frombuffer(c, np.int64) for c in list(vars(rows).values())[1:])
    room = np.append(offsets[1:], shard.bytes) - offsets  # to the next sample, or the end
    inside = offsets[0] >= 0 and (lengths > 0).all() and (lengths <= room).all()
    return bool(inside and min(map(np.min, sizes)) >= 0) and is_safe("/".join(rows.keys) + ".txt")


def _is_sound(shards: tuple[ShardInfo, ...]) -> bool:
    return bool(shards) and all(
        type(shard.name) is str
        and type(shard.sha256) is str
        and type(shard.samples) is type(shard.bytes) is int
        and 0 < shard.samples < shard.bytes
        for shard in shards
    )


def _read_json(store: Store, key: str, remedy: str) -> dict[str, Any]:
    with store.open_range(key) as file:
        data = file.read()
    try:
        fields = json.loads(data)
        version = fields["format_version"]
    except _DAMAGED as error:
        raise DataError(f"{join(store.url, key)}: damaged; {remedy}") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{join(store.url, key)}: format {version}, known is {FORMAT_VERSION}; update darkroom")
    return dict(fields)


def _fingerprint(shards: Iterable[ShardInfo], encoding: dict[str, Any] | None) -> str:
    facts: list[Any] = list(map(attrgetter("name", "samples", "bytes", "sha256"), shards))
    if encoding is not None:
        facts.append(encoding)
    return hashlib.sha256(json.dumps(facts, separators=(",", ":"), sort_keys=True).encode()).hexdigest()
