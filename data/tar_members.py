"""The one parser of tar headers: strict, bounded, and the same when a shard is indexed as when its rows are read.

Headers are decoded by the standard library's TarInfo, one at a time and from bytes whose number is known: no member can
make a reader seek backwards, allocate what it claims to hold, or take a compressed stream for a tar.
"""

import io
import re
import tarfile
from typing import NamedTuple, Protocol

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "json")
ENCODED_EXTENSION = "safetensors"
MAX_MEMBER_BYTES = 256 << 20
MAX_TEXT_BYTES = 4 << 20  # JSON takes many times its size in memory
BLOCK = 512
_MAX_EXTENDED_BYTES = 1 << 20  # extended headers of one member: a long name, POSIX records
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MAX_EXTENDED_HEADERS = 4
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_ZEROS = bytes(BLOCK)
_TIME_STAMP = re.compile(rb"((\d+) mtime=\d+\.\d+\n)\0*")
_META = re.compile(r"__[^/]*__($|/)")


class Readable(Protocol):
    """What headers are read from."""

    def read(self, size: int, /) -> bytes:
        """Returns at most `size` bytes; none at the end."""
        ...


class BadTar(Exception):
    """Bytes that are no good tar; its text says why and is to be put behind the shard's address."""


class BadMember(BadTar):
    """A sound header of something that shards must not hold; the text begins with its name."""


class Member(NamedTuple):
    """What the header of a file or folder says."""

    name: str
    size: int  # bytes of content; 0 for a folder
    is_folder: bool


def next_member(stream: Readable) -> Member | None:
    """Reads the headers of the next member and leaves the stream at its content. None: the mark of the end.

    Raises:
        BadTar: cut short or a damaged header; BadMember: neither a plain file within the limits nor a folder.
    """
    block, info = _header(stream)
    if info is None:
        return None
    extended = b""
    headers = 0
    while info.type in _EXTENDED:
        headers += 1
        if not 0 <= info.size <= _MAX_EXTENDED_BYTES or headers > _MAX_EXTENDED_HEADERS:
            raise BadTar(f"an extended header claims {info.size} bytes; the limit is {_MAX_EXTENDED_BYTES}")
        extended += block + read_exactly(stream, padded(info.size))
        block, info = _header(stream)
        if info is None:
            raise BadTar("an extended header has no member")
    if extended and not _is_time_stamp(extended):
        info = _resolved(extended + block)
    if info.isdir():
        return Member(info.name, 0, True)
    if info.type not in _PLAIN or info.issparse():
        raise BadMember(f"{info.name!r} is a link, a device, sparse or a global header; shards hold plain files only")
    limit = MAX_TEXT_BYTES if info.name.lower().endswith(TEXT_EXTENSIONS) else MAX_MEMBER_BYTES
    if not 0 <= info.size <= limit:
        raise BadMember(f"{info.name!r} claims {info.size} bytes; the limit is {limit}")
    return Member(info.name, info.size, False)


def padded(size: int) -> int:
    """Returns the bytes that content of `size` bytes takes in a tar: a multiple of 512."""
    return -(-size // BLOCK) * BLOCK


def read_exactly(stream: Readable, size: int) -> bytes:
    """Reads `size` bytes.

    Raises:
        BadTar: the stream ends before.
    """
    data = stream.read(size)
    while len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            raise BadTar(f"ends {size - len(data)} bytes early")
        data += more
    return data


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name at the first dot of its last part, as WebDataset does: ("a/b", "seg.png")."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def is_safe(name: str) -> bool:
    """Says whether a member's name is relative, printable UTF-8, stays where it is and is one WebDataset reads."""
    key = split_name(name)[0]
    return (
        name.isprintable()  # surrogates, i.e. bytes that are not UTF-8, are not printable
        and "\\" not in name
        and not name.startswith("/")
        and ".." not in name.split("/")
        and not _META.match(name)  # WebDataset skips these without a word
        and not key.endswith("/")
        and key != ""
    )


def _header(stream: Readable) -> tuple[bytes, tarfile.TarInfo | None]:
    block = read_exactly(stream, BLOCK)
    if block == _ZEROS:
        return block, None
    try:
        return block, tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise BadTar(f"damaged header ({error})") from error


def _is_time_stamp(headers: bytes) -> bool:
    """Says whether this is one header with a time stamp's fraction alone: WebDataset writes it before every member."""
    match = _TIME_STAMP.fullmatch(headers, BLOCK)
    return match is not None and headers[156:157] == tarfile.XHDTYPE and int(match[2]) == len(match[1])


def _resolved(headers: bytes) -> tarfile.TarInfo:
    """Lets tarfile apply extended headers to the header behind them; it sees these bytes and no others."""
    try:
        with tarfile.open(fileobj=io.BytesIO(headers), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            info = tar.next()
    except Exception as error:  # tarfile raises whatever its parsers trip over
        raise BadTar(f"damaged extended header ({type(error).__name__})") from error
    if info is None:
        raise BadTar("damaged extended header (no member)")
    return info
