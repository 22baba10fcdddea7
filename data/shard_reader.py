"""Reads samples out of shards that are indexed: a range of rows with one request, or a whole shard from front to back.

Whatever is read is compared with the sidecar first, header by header, so a tar that changed is an error that names it
and never fewer or other samples. What headers cannot show, a flipped byte of content, `darkroom data verify` finds.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from data.errors import DataError
from data.index import Index, ShardInfo, load_rows
from data.object_store import join, open_store
from data.tar_members import (
    ENCODED_EXTENSION,
    IMAGE_EXTENSIONS,
    TEXT_EXTENSIONS,
    BadTar,
    next_member,
    padded,
    read_exactly,
    split_name,
)
from data.tar_scan import Rows

_CHECKED_SHARDS = 1 << 14  # whose size a process remembers to have compared
_SPAN_BYTES = 16 << 20  # that read_shard asks for at a time
_PICTURE_EXTENSIONS = (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """One sample as stored; nothing is decoded but its texts."""

    key: str
    image: bytes | memoryview  # the picture's file; of an encoded sample the safetensors, a view into what was read
    extension: str  # of the image, lower case
    text: str | None  # the .txt
    meta: dict[str, Any]  # the .json, or {}
    problem: str | None  # why it cannot be used, or None


class _Place(NamedTuple):
    """Where the content of a member lies in the bytes that were read."""

    extension: str
    start: int
    size: int


def read_rows(index: Index, shard_no: int, first: int, last: int) -> list[RawSample]:
    """Reads the samples [first, last) of a shard with one request and checks them against the sidecar.

    Encoded samples are views into the bytes read, which live as long as one of them; pictures are copies.

    Raises:
        DataError: the shard is missing, of another size, ends early, or does not hold these samples in these places.
        ValueError: the shard has no such rows.
    """
    shard = index.shards[shard_no]
    if not 0 <= first <= last <= shard.samples:
        raise ValueError(f"rows {first} to {last}: {shard.name} has {shard.samples}")
    _check_size_once(index.url, shard, index.remedy)
    if first == last:
        return []
    rows = load_rows(index, shard_no)
    data, places = _read_span(index, shard, rows, first, last)
    view = memoryview(data)
    samples = []
    for row, members in enumerate(places, start=first):
        contents: dict[str, bytes | memoryview] = {}
        for extension, start, size in members:
            content = view[start : start + size]
            contents[extension] = content if extension == ENCODED_EXTENSION else bytes(content)
        samples.append(_raw_sample(rows.keys[row], contents))
    return samples


def read_shard(index: Index, shard_no: int) -> Iterator[RawSample]:
    """Reads a shard from front to back with webdataset, which sees no byte before it was compared with the sidecar.

    Raises:
        DataError: the shard is missing, of another size, ends early, or does not hold the samples that were indexed.
    """
    shard = index.shards[shard_no]
    _check_size(index.url, shard, index.remedy)
    rows = load_rows(index, shard_no)
    for first, last in _spans(rows):
        data, _ = _read_span(index, shard, rows, first, last)
        row = first - 1
        for row, members in enumerate(_grouped(data, index, shard), start=first):
            if row >= last or members["__key__"] != rows.keys[row]:
                raise _error(index, shard, f"sample {row} is {members['__key__']!r} to webdataset")
            yield _raw_sample(rows.keys[row], members)
        if row != last - 1:
            raise _error(index, shard, f"webdataset finds no sample {row + 1}")


def _read_span(index: Index, shard: ShardInfo, rows: Rows, first: int, last: int) -> tuple[bytes, list[list[_Place]]]:
    """Reads the rows [first, last): their bytes, and per row where its members lie in them."""
    base = rows.offsets[first]
    length = rows.offsets[last - 1] + rows.lengths[last - 1] - base
    allowed = _PICTURE_EXTENSIONS if index.encoding is None else (ENCODED_EXTENSION,)
    try:
        with open_store(index.url).open_range(shard.name, base, length) as file:
            data = read_exactly(file, length)
        stream = io.BytesIO(data)
        return data, [_row_members(stream, rows, row, base, allowed) for row in range(first, last)]
    except BadTar as error:
        raise _error(index, shard, str(error)) from error


def _row_members(stream: io.BytesIO, rows: Rows, row: int, base: int, allowed: tuple[str, ...]) -> list[_Place]:
    """Walks over the headers of one row; they must give its key, its extensions and exactly its bytes."""
    key, position = rows.keys[row], rows.offsets[row] - base
    end = position + rows.lengths[row]
    places: list[_Place] = []
    while position < end:
        stream.seek(position)
        member = next_member(stream)
        position = stream.tell()
        if member is None:
            raise BadTar(f"ends inside sample {row}, {key!r}")
        if member.is_folder:
            continue
        found, extension = split_name(member.name)
        if found != key:
            raise BadTar(f"sample {row} is {found!r}, the index says {key!r}")
        if extension not in allowed or any(place.extension == extension for place in places):
            raise BadTar(f"{member.name!r} is none of {', '.join(allowed)}, or there twice")
        places.append(_Place(extension, position, member.size))
        position += padded(member.size)
    if position != end or not places:
        raise BadTar(f"sample {row}, {key!r}, has another length than the index says")
    return places


def _spans(rows: Rows) -> Iterator[tuple[int, int]]:
    """Cuts a shard into runs of rows of about _SPAN_BYTES."""
    first = 0
    for row in range(len(rows.keys)):
        if rows.offsets[row] + rows.lengths[row] - rows.offsets[first] >= _SPAN_BYTES or row == len(rows.keys) - 1:
            yield first, row + 1
            first = row + 1


def _grouped(data: bytes, index: Index, shard: ShardInfo) -> Iterator[dict[str, Any]]:
    """Parses rows with webdataset into dicts of "__key__" and bytes by extension. No decoder of webdataset runs."""
    os.environ["WDS_SECURE"] = "1"  # read at its import: no pickles and no commands, should we ever get that far
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        yield from group_by_keys(tar_file_expander([{"url": shard.name, "stream": io.BytesIO(data)}]), keys=split_name)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _error(index, shard, f"damaged ({type(error).__name__})") from error


def _raw_sample(key: str, members: Mapping[str, Any]) -> RawSample:
    extension = next((name for name in (ENCODED_EXTENSION, *IMAGE_EXTENSIONS) if name in members), "")
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
    except (ValueError, RecursionError):
        meta, problem = {}, "the .json is not a JSON object"
    return RawSample(
        key=key, image=members.get(extension, b""), extension=extension, text=text, meta=meta, problem=problem
    )


def _check_size(url: str, shard: ShardInfo, remedy: str) -> None:
    store = open_store(url)
    if not store.exists(shard.name):
        raise DataError(f"{join(url, shard.name)}: no such file, though the index names it; {remedy}")
    size = store.size(shard.name)
    if size != shard.bytes:
        raise DataError(f"{join(url, shard.name)}: has {size} bytes, the index says {shard.bytes}; {remedy}")


_check_size_once = lru_cache(maxsize=_CHECKED_SHARDS)(_check_size)


def _error(index: Index, shard: ShardInfo, reason: str) -> DataError:
    return DataError(f"{join(index.url, shard.name)}: {reason}; {index.remedy}")
