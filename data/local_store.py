"""The store in a folder: every write is whole or not at all, and survives a power cut."""

import io
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data.errors import DataError

TEMP_PREFIX = ".tmp-"
COPY_BYTES = 1 << 20

Buffer = bytes | memoryview  # of bytes: format "B"


def checked_key(key: str) -> str:
    """Returns `key` if it stays inside its store."""
    if not key or key.startswith("/") or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise DataError(f"{key!r} is no valid key; keys are relative paths without '..'")
    return key


class LocalStore:
    """A folder. Writes go to a temporary file beside the target, are flushed to disk and renamed."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(os.path.abspath(root))
        self.url = str(self.root)

    def open_range(self, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        path = self._existing(key)
        with _errors(path):
            file = path.open("rb")
            file.seek(start)
            if length is None:
                return file
            with file:
                return io.BytesIO(file.read(length))

    def size(self, key: str) -> int:
        return self._existing(key).stat().st_size

    def put_file(self, path: Path, key: str) -> None:
        temp = self._temp(key)
        try:
            with _errors(self.root / key):
                with Path(path).open("rb") as source, temp.open("wb") as out:
                    shutil.copyfileobj(source, out, COPY_BYTES)
                    _flush(out)
                self._rename(temp, key)
        finally:
            temp.unlink(missing_ok=True)

    def put_bytes(self, data: bytes, key: str) -> None:
        self.put_parts([data], key)

    def put_parts(self, parts: Sequence[Buffer], key: str) -> None:
        temp = self._temp(key)
        try:
            with _errors(self.root / key):
                with temp.open("wb") as out:
                    for part in parts:
                        out.write(part)
                    _flush(out)
                self._rename(temp, key)
        finally:
            temp.unlink(missing_ok=True)

    def put_if_absent(self, data: bytes, key: str) -> bool:
        temp = self._temp(key)
        path = self.root / key
        try:
            with temp.open("wb") as out:
                out.write(data)
                _flush(out)
            os.link(temp, path)  # fails if the target exists, on every POSIX file system and NFS
            _flush_folder(path.parent)
            return True
        except FileExistsError:
            return path.read_bytes() == data
        except OSError as error:
            raise DataError(f"{path}: no exclusive write possible ({error.strerror}); use another disk") from error
        finally:
            temp.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        folder = self.root / prefix.rpartition("/")[0]
        found = []
        for parent, _, names in os.walk(folder):
            for name in names:
                key = os.path.relpath(os.path.join(parent, name), self.root).replace(os.sep, "/")
                if key.startswith(prefix) and not name.startswith(TEMP_PREFIX):
                    with suppress(FileNotFoundError):  # deleted meanwhile, as old checkpoints are
                        found.append((key, os.path.getsize(os.path.join(parent, name))))
        return sorted(found)

    def exists(self, key: str) -> bool:
        return (self.root / checked_key(key)).is_file()

    def delete(self, key: str) -> None:
        path = self.root / checked_key(key)
        with _errors(path):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # folders exist only as long as something is in them, as in a bucket
            for folder in path.relative_to(self.root).parents[:-1]:
                (self.root / folder).rmdir()

    def sweep(self, began_before_s: float) -> int:
        swept = 0
        for parent, _, names in os.walk(self.root):
            for name in names:
                path = Path(parent, name)
                with suppress(OSError):  # somebody else was faster
                    if name.startswith(TEMP_PREFIX) and path.stat().st_mtime < began_before_s:
                        path.unlink()
                        swept += 1
        return swept

    def _existing(self, key: str) -> Path:
        path = self.root / checked_key(key)
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the path")
        return path

    def _temp(self, key: str) -> Path:
        parent = (self.root / checked_key(key)).parent
        with _errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
        return parent / f"{TEMP_PREFIX}{uuid.uuid4().hex}"

    def _rename(self, temp: Path, key: str) -> None:
        temp.replace(self.root / key)
        _flush_folder((self.root / key).parent)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path, the rights and the free space") from error


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes a rename or link in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
