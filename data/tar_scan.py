"""Reads one tar from front to back and says where its samples lie, refusing everything that training could trip over.

Streaming tar readers take a tar that was cut between two members, or members of one sample that are not neighbours, for
good input and lose samples without a word. So every shard goes through this scan once, before it is trusted.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

from data.decode import BadImage, image_size
from data.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "json")
MAX_MEMBER_BYTES = 256 << 20
_BLOCK = 512
_END_BYTES = 2 * _BLOCK  # an archive ends with two blocks of zeros
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(kw_only=True)
class Rows:
    """The samples of one shard in file order, column by column."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # bytes from the start of the tar to the sample's first header
    lengths: list[int] = field(default_factory=list)  # bytes, headers and padding included
    widths: list[int] = field(default_factory=list)  # pixels as displayed; 0 if the image cannot be read
    heights: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a scan found."""

    rows: Rows
    size_bytes: int
    sha256: str


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name at the first dot of its last part, as WebDataset does: ("a/b", "seg.png")."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def scan_tar(stream: BinaryIO, place: str, required: Iterable[str] = ("image", "text")) -> Scan:
    """Scans a tar that is read from `stream` once; memory stays bounded by the largest member.

    Args:
        stream: the tar, from its first byte.
        place: its address, for messages.
        required: what each sample must have: "image" (jpg, jpeg, png, webp) and/or "text" (txt or json).

    Raises:
        DataError: compressed or no tar, cut short, trailing data, empty; a member that is a link, a device, sparse, too
            large, of an extension not on the list or with a name that is unsafe; a sample whose members are not
            neighbours, double or missing. The message names the shard and the member.
    """
    reader = _Reader(stream)
    builder = _Builder(place, tuple(required))
    try:
        with tarfile.open(fileobj=reader, mode="r|") as tar:  # type: ignore[call-overload]
            for member in tar:
                builder.add(tar, member)
                tar.members = []  # tarfile would keep every header
        reader.drain()
    except (tarfile.TarError, EOFError) as error:
        reader.drain()
        raise DataError(f"{place}: {_diagnose(reader, builder, error)}; write the shard again") from error
    builder.finish_sample()
    if reader.size < builder.end + _END_BYTES:
        raise DataError(f"{place}: the end-of-archive mark is missing, so the tar was cut short; write the shard again")
    if reader.last_nonzero > builder.end:
        raise DataError(f"{place}: data after the end of the archive; write the shard again as one tar")
    if not builder.rows.keys:
        raise DataError(f"{place}: holds no sample; remove the shard")
    return Scan(rows=builder.rows, size_bytes=reader.size, sha256=reader.digest.hexdigest())


def _diagnose(reader: "_Reader", builder: "_Builder", error: Exception) -> str:
    for magic, name in _COMPRESSED.items():
        if reader.head.startswith(magic):
            return f"compressed with {name}; shards must be plain tars"
    if not reader.size:
        return "empty file"
    if not builder.end:
        return f"no tar (it begins with {reader.head[:12]!r})"
    return f"cut short or damaged after byte {builder.end} of {reader.size} ({error})"


class _Builder:
    """Collects members into samples."""

    def __init__(self, place: str, required: tuple[str, ...]) -> None:
        self.place = place
        self.required = required
        self.rows = Rows()
        self.end = 0  # byte after the last member and its padding
        self._seen: set[str] = set()
        self._key: str | None = None
        self._start = 0
        self._extensions: set[str] = set()
        self._size = (0, 0)

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = member.name
        if member.isdir():
            self.end = member.offset_data
            return
        if not member.isreg() or member.issparse():
            raise self._refusal(name, "is a link, a device or sparse; shards hold plain files only")
        if not 0 <= member.size <= MAX_MEMBER_BYTES:
            raise self._refusal(name, f"claims {member.size} bytes; the limit is {MAX_MEMBER_BYTES}")
        if not _is_safe(name):
            raise self._refusal(name, "is an unsafe name; use relative names of printable UTF-8 without '..'")
        key, extension = split_name(name)
        if extension not in IMAGE_EXTENSIONS + TEXT_EXTENSIONS:
            allowed = ", ".join(IMAGE_EXTENSIONS + TEXT_EXTENSIONS)
            raise self._refusal(name, f"has the extension {extension!r}; allowed are {allowed}, and no dot in the key")
        if key != self._key:
            self.finish_sample()
            if key in self._seen:
                raise self._refusal(name, f"is apart from the other members of sample {key!r}; sort the tar by name")
            self._seen.add(key)
            self._key, self._start = key, member.offset
        if extension in self._extensions:
            raise self._refusal(name, "is there twice; remove one")
        self._extensions.add(extension)
        self.end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if extension in IMAGE_EXTENSIONS:
            self._measure(tar, member, name)

    def finish_sample(self) -> None:
        if self._key is None:
            return
        images = self._extensions.intersection(IMAGE_EXTENSIONS)
        if "image" in self.required and not images:
            raise self._refusal(self._key, f"has no image ({', '.join(IMAGE_EXTENSIONS)}); add it or drop the sample")
        if len(images) > 1:
            raise self._refusal(self._key, f"has several images ({', '.join(sorted(images))}); keep one")
        if "text" in self.required and not self._extensions.intersection(TEXT_EXTENSIONS):
            raise self._refusal(self._key, "has no caption (txt or json); add it or drop the sample")
        self.rows.keys.append(self._key)
        self.rows.offsets.append(self._start)
        self.rows.lengths.append(self.end - self._start)
        self.rows.widths.append(self._size[0])
        self.rows.heights.append(self._size[1])
        self._key, self._extensions, self._size = None, set(), (0, 0)

    def _measure(self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        file = tar.extractfile(member)
        if file is None:
            raise self._refusal(name, "cannot be read; write the shard again")
        try:
            self._size = image_size(file.read())
        except BadImage:
            self._size = (0, 0)  # one bad picture is masked in training, it does not spoil its shard

    def _refusal(self, name: str, reason: str) -> DataError:
        return DataError(f"{self.place}: {name!r} {reason}")


def _is_safe(name: str) -> bool:
    parts = name.split("/")
    return (
        name.isprintable()  # surrogates, i.e. bytes that are not UTF-8, are not printable
        and "\\" not in name
        and not name.startswith("/")
        and ".." not in parts
        and not _META.match(name)  # WebDataset skips these without a word
        and not split_name(name)[0].endswith("/")
        and split_name(name)[0] != ""
    )


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
        while self.read(1 << 20):
            pass
