"""Reads one tar from front to back and says where its samples lie, refusing everything that training could trip over.

Streaming tar readers take a tar that was cut between two members, or members of one sample that are not neighbours, for
good input and lose samples without a word. So every shard goes through this scan once, before it is trusted.
"""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from data.decode import BadImage, image_size
from data.errors import DataError
from data.tar_members import (
    BLOCK,
    ENCODED_EXTENSION,
    IMAGE_EXTENSIONS,
    TEXT_EXTENSIONS,
    BadMember,
    BadTar,
    Member,
    is_safe,
    next_member,
    padded,
    read_exactly,
    split_name,
)

_COMPRESSED = (
    (b"\x1f\x8b", b"", "gzip"),
    (b"BZh", b"1AY&SY", "bzip2"),  # the tenth byte ends its mark; a name may well begin with these three letters
    (b"\xfd7zXZ", b"", "xz"),
    (b"\x28\xb5\x2f\xfd", b"", "zstd"),
)
_END_BYTES = 2 * BLOCK  # an archive ends with two blocks of zeros
_PIECE_BYTES = 1 << 20
_MAX_SIDE = 1 << 20  # px
_EXTENSIONS = (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS, ENCODED_EXTENSION)


def _integers() -> "array[int]":
    return array("q")


@dataclass(kw_only=True)
class Rows:
    """The samples of one shard in file order, column by column; numbers lie in 8 bytes each, for readers keep them."""

    keys: list[str] = field(default_factory=list)
    offsets: "array[int]" = field(default_factory=_integers)  # bytes from the tar's start to the sample's first header
    lengths: "array[int]" = field(default_factory=_integers)  # bytes, headers and padding included
    widths: "array[int]" = field(default_factory=_integers)  # pixels as displayed; 0 if the image cannot be read
    heights: "array[int]" = field(default_factory=_integers)

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain lists for the sidecar."""
        return {name: list(column) for name, column in vars(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Rows":
        """Reads what `to_dict` gave; raises a TypeError, OverflowError or KeyError if it did not."""
        keys, *columns = (fields[name] for name in ("keys", "offsets", "lengths", "widths", "heights"))
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise TypeError("keys must be texts")
        offsets, lengths, widths, heights = (array("q", column) for column in columns)
        return cls(keys=keys, offsets=offsets, lengths=lengths, widths=widths, heights=heights)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a scan found."""

    rows: Rows
    encoded: bool  # the samples are safetensors, not pictures
    size_bytes: int
    sha256: str


def scan_tar(stream: BinaryIO, place: str, required: Iterable[str] = ("image", "text")) -> Scan:
    """Scans a tar that is read from `stream` once; memory stays bounded by the largest member.

    Args:
        stream: the tar, from its first byte.
        place: its address, for messages.
        required: what each sample must have: "image" (jpg, jpeg, png, webp) and/or "text" (txt or json). An encoded
            sample is one safetensors and nothing else, whatever is required.

    Raises:
        DataError: compressed or no tar, cut short, trailing data, empty; a member that is a link, a device, sparse, too
            large, of an extension not on the list or with a name that is unsafe; a sample whose members are not
            neighbours, double or missing; pictures beside encoded samples. The message names the shard and the member.
    """
    reader = _Reader(stream)
    builder = _Builder(reader, tuple(required))
    try:
        _read_members(reader, builder)
        reader.drain()
        if reader.size < builder.end + _END_BYTES:
            raise BadTar("the end-of-archive mark is missing, so the tar was cut short; write the shard again")
        builder.finish_sample()
        if reader.last_nonzero > builder.end:
            raise BadTar("data after the end of the archive; write the shard again as one tar")
        if not builder.rows.keys:
            raise BadTar("holds no sample; remove the shard")
    except BadTar as error:
        raise DataError(f"{place}: {error}") from error
    encoded = bool(builder.encoded)
    return Scan(rows=builder.rows, encoded=encoded, size_bytes=reader.size, sha256=reader.digest.hexdigest())


def _read_members(reader: "_Reader", builder: "_Builder") -> None:
    """Hands every member to the builder, until a mark ends them or the file does."""
    while True:
        start = reader.size
        try:
            member = next_member(reader)
            _refuse_compressed(reader.head)
            if member is None:
                return
            builder.add(member, start)
        except BadMember:
            raise
        except BadTar as error:
            _refuse_compressed(reader.head)
            if not reader.size:
                raise BadTar("empty file; write the shard again") from error
            if not builder.end:
                raise BadTar(f"no tar (it begins with {reader.head[:12]!r}); write the shard again") from error
            if reader.size == builder.end:
                return
            reader.drain()
            reason = f"cut short or damaged after byte {builder.end} of {reader.size} ({error})"
            raise BadTar(f"{reason}; write the shard again") from error


def _refuse_compressed(head: bytes) -> None:
    """Compression is refused before anything else: another reader might unpack what this one takes for a plain tar."""
    for begin, behind, name in _COMPRESSED:
        if head.startswith(begin) and head.startswith(behind, 4):
            raise BadMember(f"compressed with {name}; shards must be plain tars; write the shard again")


class _Builder:
    """Collects members into samples."""

    def __init__(self, reader: "_Reader", required: tuple[str, ...]) -> None:
        self.rows = Rows()
        self.end = 0  # byte after the last member and its padding
        self.encoded: bool | None = None  # what the samples are; None before the first
        self._reader = reader
        self._required = required
        self._seen: set[str] = set()
        self._key: str | None = None
        self._start = 0
        self._extensions: set[str] = set()
        self._size = (0, 0)

    def add(self, member: Member, start: int) -> None:
        """Takes the member whose header begins at byte `start` and reads its content."""
        name = member.name
        if member.is_folder:
            self.end = self._reader.size
            return
        if not is_safe(name):
            raise _refusal(name, "is an unsafe name; use relative names of printable UTF-8 without '..'")
        key, extension = split_name(name)
        if extension not in _EXTENSIONS:
            allowed = ", ".join(_EXTENSIONS)
            raise _refusal(name, f"has the extension {extension!r}; allowed are {allowed}, and no dot in the key")
        if key != self._key:
            self.finish_sample()
            if key in self._seen:
                raise _refusal(name, f"is apart from the other members of sample {key!r}; sort the tar by name")
            self._seen.add(key)
            self._key, self._start = key, start
        if extension in self._extensions:
            raise _refusal(name, "is there twice; remove one")
        if self.encoded not in (None, extension == ENCODED_EXTENSION):
            raise _refusal(name, "is among samples of another kind; keep pictures and encoded samples apart")
        self.encoded = extension == ENCODED_EXTENSION
        self._extensions.add(extension)
        self._read(member, extension)
        self.end = self._reader.size

    def finish_sample(self) -> None:
        """Closes the sample that the last member belongs to."""
        if self._key is None:
            return
        images = self._extensions.intersection(IMAGE_EXTENSIONS)
        if "image" in self._required and not images and not self.encoded:
            raise _refusal(self._key, f"has no image ({', '.join(IMAGE_EXTENSIONS)}); add it or drop the sample")
        if len(images) > 1:
            raise _refusal(self._key, f"has several images ({', '.join(sorted(images))}); keep one")
        if "text" in self._required and not self._extensions.intersection(TEXT_EXTENSIONS) and not self.encoded:
            raise _refusal(self._key, "has no caption (txt or json); add it or drop the sample")
        self.rows.keys.append(self._key)
        self.rows.offsets.append(self._start)
        self.rows.lengths.append(self.end - self._start)
        self.rows.widths.append(self._size[0])
        self.rows.heights.append(self._size[1])
        self._key, self._extensions, self._size = None, set(), (0, 0)

    def _read(self, member: Member, extension: str) -> None:
        left = padded(member.size)
        if extension not in TEXT_EXTENSIONS:
            self._size = _size_in_pixels(read_exactly(self._reader, member.size), extension)
            left -= member.size
        while left:
            left -= len(read_exactly(self._reader, min(left, _PIECE_BYTES)))


def _size_in_pixels(data: bytes, extension: str) -> tuple[int, int]:
    """(width, height); one bad picture is masked in training, it does not spoil its shard."""
    try:
        if extension != ENCODED_EXTENSION:
            return image_size(data)
        from data.encoded import encoded_size  # imports torch, which no other shard needs

        width, height = encoded_size(data)
        return (width, height) if 0 < min(width, height) <= max(width, height) <= _MAX_SIDE else (0, 0)
    except BadImage:
        return (0, 0)


def _refusal(name: str, reason: str) -> BadMember:
    return BadMember(f"{name!r} {reason}")


class _Reader:
    """Passes bytes through, hashing and counting them, and remembers where the last non-zero byte ended."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.head = b""
        self.size = 0
        self.last_nonzero = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if not self.size:
            self.head = data[:16]
        self.digest.update(data)
        if content := data.rstrip(b"\0"):
            self.last_nonzero = self.size + len(content)
        self.size += len(data)
        return data

    def drain(self) -> None:
        while self.read(_PIECE_BYTES):
            pass
