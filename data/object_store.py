"""One small protocol over local folders and S3 buckets.

A store is opened on a URL (`/a/b`, `file:///a/b`, `s3://bucket/prefix`); its keys are relative to that URL and use "/".
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from data.errors import DataError
from data.local_store import COPY_BYTES, TEMP_PREFIX, Buffer, LocalStore, checked_key
from data.s3_store import S3Store

__all__ = ["LocalStore", "S3Store", "Store", "fetch_tree", "is_local", "join", "open_store", "put_tree"]


class Store(Protocol):
    """Where files live. Methods raise DataError with the full address when the store refuses or a key is absent."""

    url: str

    def open_range(self, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        """Opens `length` bytes of the file from byte `start` (to its end if None) for reading."""
        ...

    def size(self, key: str) -> int:
        """Returns the size of the file in bytes."""
        ...

    def put_file(self, path: Path, key: str) -> None:
        """Stores the local file `path` under `key`: whole or not at all, replacing what was there."""
        ...

    def put_bytes(self, data: bytes, key: str) -> None:
        """Stores `data` under `key`: whole or not at all, replacing what was there."""
        ...

    def put_parts(self, parts: Sequence[Buffer], key: str) -> None:
        """Stores the bytes of `parts`, one behind the other, like `put_bytes`; large ones are not copied as a whole."""
        ...

    def put_if_absent(self, data: bytes, key: str) -> bool:
        """Stores `data` unless the key exists. True if the key now holds exactly `data` (also if it did before)."""
        ...

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """Returns (key, size in bytes) of every file whose key starts with the string `prefix`, sorted by key."""
        ...

    def exists(self, key: str) -> bool:
        """Says whether the file exists."""
        ...

    def delete(self, key: str) -> None:
        """Deletes the file; an absent one is fine."""
        ...

    def sweep(self, began_before_s: float) -> int:
        """Removes what unfinished puts left behind that began before this time (s since the epoch); how many."""
        ...


def open_store(url: str | os.PathLike[str]) -> LocalStore | S3Store:
    """Opens the store at `url`: a local path, `file:///path` or `s3://bucket/prefix`. Nothing is created or contacted.

    Raises:
        DataError: the URL has another scheme, or lacks a bucket.
    """
    text = os.fspath(url)
    if not text:
        raise DataError("the URL is empty; give a local path or s3://bucket/prefix")
    if text.startswith("s3:") and not text.startswith("s3://"):  # a bucket was meant, and a local folder would do
        raise DataError(f"{text}: an s3 address must read s3://bucket/prefix; ./{text} is a local folder")
    if is_local(text):
        return LocalStore(_local_path(text))
    parts = urlsplit(text)
    if parts.scheme != "s3":
        raise DataError(f"{text}: cannot open {parts.scheme}:// addresses; give a local path or s3://bucket/prefix")
    if not parts.netloc or "@" in parts.netloc:
        raise DataError("an s3 address must read s3://bucket/prefix; credentials belong in the AWS environment")
    return S3Store(parts.netloc, text.removeprefix(f"s3://{parts.netloc}").strip("/"))


def is_local(url: str | os.PathLike[str]) -> bool:
    """Says whether `url` names a place in the local file system (a path or file://)."""
    text = os.fspath(url)
    return "://" not in text or text.startswith("file://")


def join(url: str | os.PathLike[str], *parts: str) -> str:
    """Appends path parts to a local path or URL."""
    return "/".join([os.fspath(url).rstrip("/"), *(part.strip("/") for part in parts)])


def fetch_tree(url: str | os.PathLike[str], cache_dir: Path | None = None) -> Path:
    """Returns a local folder (or file) with the content of `url`: itself if local, else a copy downloaded once.

    The copy lies under `cache_dir` (default: $XDG_CACHE_HOME/darkroom or ~/.cache/darkroom) in a folder named by the
    hash of the address and of its listing (keys, sizes, ETags), so a changed tree is downloaded anew.

    Raises:
        DataError: nothing is there, or a downloaded file has another size than listed.
    """
    if is_local(url):
        path = _local_path(os.fspath(url))
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; check the path")
        return path
    store = open_store(url)
    assert isinstance(store, S3Store)
    listing, single = store.listing(), ""
    if not listing and "/" in store.url.removeprefix("s3://"):  # no folder, but perhaps one file
        parent, single = store.url.rsplit("/", 1)
        store = S3Store(store.bucket, parent.removeprefix(f"s3://{store.bucket}").strip("/"))
        listing = [entry for entry in store.listing(single) if entry[0] == single]
    if not listing:
        raise DataError(f"{os.fspath(url)}: nothing there; check the address and AWS_ENDPOINT_URL")
    root = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darkroom"
    target = root / hashlib.sha256(repr((store.url, listing)).encode()).hexdigest()[:32]
    if target.exists():
        return target / single
    partial = target.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}")
    try:
        for key, size, _ in listing:
            path = partial / checked_key(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with store.open_range(key) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out, COPY_BYTES)
            if path.stat().st_size != size:
                raise DataError(
                    f"{join(store.url, key)}: {path.stat().st_size} bytes came, {size} were listed; try again"
                )
        try:
            partial.rename(target)
        except OSError:  # another process was faster: its copy is as good
            if not target.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target / single


def put_tree(path: Path, url: str | os.PathLike[str]) -> int:
    """Copies every file under the folder `path` to `url` and returns their number. Refuses a target with files."""
    store = open_store(url)
    if store.list():
        raise DataError(f"{store.url}: already holds files; give an empty place")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        store.put_file(file, file.relative_to(path).as_posix())
    return len(files)


def _local_path(url: str) -> Path:
    if url.startswith("pipe:"):
        raise DataError(f"{url.split()[0]}: commands are not data; give a local path or s3://bucket/prefix")
    return Path(unquote(urlsplit(url).path)) if url.startswith("file://") else Path(url).expanduser()
