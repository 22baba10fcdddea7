"""Is there a pickle in a file? Every file is also told apart as one of the formats that Darkroom writes."""

import gzip
import io
import json
import pickletools
import re
import tarfile
import zipfile
from pathlib import Path

from PIL import Image


class Unknown(Exception):
    """A content that is none of the formats below."""


def is_pickle(content: bytes) -> bool:
    """Can pickletools take it apart from byte 0 to an end, with a stack that fits?"""
    try:
        pickletools.dis(content, out=io.StringIO())
    except Exception:
        return False
    return True


def kinds(name: str, content: bytes) -> set[str]:
    """The formats of a file and of what is packed in it.

    Raises:
        Unknown: it, or a member of it, is a pickle or of no known format; with its name.
    """
    if is_pickle(content):
        raise Unknown(f"{name}: a pickle")
    if content[:2] == b"\x1f\x8b":
        return {"gzip"} | kinds(f"{name}|gzip", gzip.decompress(content))
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            return {"zip"}.union(*(kinds(f"{name}|{member}", packed.read(member)) for member in packed.namelist()))
    if content[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(content)) as packed:
            members = [(member.name, packed.extractfile(member)) for member in packed if member.isfile()]
            return {"tar"}.union(*(kinds(f"{name}|{member}", file.read()) for member, file in members if file))
    for kind, reads in (("safetensors", safetensors), ("picture", picture), ("events", events), ("text", text)):
        if reads(content):
            return {kind}
    raise Unknown(f"{name}: {content[:40]!r}")


def safetensors(content: bytes) -> bool:
    """A header that says of every byte behind it to which tensor of numbers it belongs."""
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= len(content) - 8 or content[8:9] != b"{":
        return False
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    ends = [0]
    for field in sorted(header.values(), key=lambda field: field["data_offsets"]):
        if not re.fullmatch(r"BOOL|BF16|F8_\w+|[FIU]\d+", field["dtype"]) or field["data_offsets"][0] != ends[-1]:
            return False
        ends.append(field["data_offsets"][1])
    return ends[-1] == len(content) - 8 - length


def picture(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True


def events(content: bytes) -> bool:
    """TensorBoard's records, length, checksum, protobuf, checksum, to the last byte."""
    place = 0
    while place + 12 <= len(content):
        place += 16 + int.from_bytes(content[place : place + 8], "little")
    return place == len(content) > 0


def text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False


def kinds_below(folder: Path) -> dict[str, set[str]]:
    """The formats of every file in a folder, by its place there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): kinds(str(path), path.read_bytes()) for path in files}
