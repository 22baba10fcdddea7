"""Small tars, good and bad, and what a blob of an encoded sample looks like from outside."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

Members = list[tuple[str, bytes]]


def png(value: int = 0, size: tuple[int, int] = (4, 3)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def samples(count: int) -> list[dict[str, Any]]:
    """Pictures with captions, as write_shards takes them."""
    return [{"__key__": f"k{n:03d}", "png": png(n), "txt": f"caption {n}", "json": {"n": n}} for n in range(count)]


def blob(number: int = 0, width: Any = 256, height: Any = 512) -> bytes:
    """A safetensors file that says what picture it was made of."""
    entry = {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
    header = json.dumps({"__metadata__": {"width": str(width), "height": str(height)}, "x": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([number, number, number])


def encoded(count: int) -> list[dict[str, Any]]:
    """Encoded samples, as write_shards takes them."""
    return [{"__key__": f"e{n:03d}", "safetensors": blob(n)} for n in range(count)]


def pair(key: str) -> Members:
    """A picture and its caption."""
    return [(f"{key}.jpg", png()), (f"{key}.txt", b"a caption")]


def tar_bytes(members: Members, *, mtime: float = 0, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these files; a name that ends with a slash is a folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime  # type: ignore[assignment]
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tar(path: Path, members: Members, **kwargs: Any) -> None:
    path.write_bytes(tar_bytes(members, **kwargs))


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    """The header of one member, as GNU tar writes it."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def with_size_field(block: bytes, field: bytes) -> bytes:
    """The same header with other bytes where the size stands, and the sum that fits."""
    assert len(field) == 12
    changed = block[:124] + field + block[136:148] + b" " * 8 + block[156:]
    return changed[:148] + b"%06o\0 " % sum(changed) + changed[156:]


def pax(records: dict[str, str], behind: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header with these records before the header `behind`."""
    text = b""
    for name, value in records.items():
        record = f" {name}={value}\n".encode()
        length = len(record) + 1
        while len(str(length)) + len(record) != length:
            length += 1
        text += str(length).encode() + record
    return header("x", len(text), kind) + text + bytes(-len(text) % 512) + behind
