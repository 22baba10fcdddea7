"""One small protocol over local folders and S3 buckets. The only module that knows boto3.

A store is opened on a URL (`/a/b`, `file:///a/b`, `s3://bucket/prefix`); its keys are relative to that URL and use "/".
Endpoint, region, credentials and checksum behaviour come from the standard AWS environment and files alone.
"""

import hashlib
import io
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from data.errors import DataError
from data.local_store import COPY_BYTES, TEMP_PREFIX, LocalStore, checked_key

_PART_BYTES = 16 << 20
_ATTEMPTS = 5


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


def open_store(url: str | os.PathLike[str]) -> "LocalStore | S3Store":
    """Opens the store at `url`: a local path, `file:///path` or `s3://bucket/prefix`. Nothing is created or contacted.

    Raises:
        DataError: the URL has another scheme, or lacks a bucket.
    """
    text = os.fspath(url)
    if not text:
        raise DataError("the URL is empty; give a local path or s3://bucket/prefix")
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


class S3Store:
    """A prefix of an S3 bucket; may be pickled and forked."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    @property
    def client(self) -> Any:
        """The boto3 client of this process."""
        with self._errors(""):
            return _client(os.getpid(), hash(tuple(item for item in os.environ.items() if item[0].startswith("AWS_"))))

    def open_range(self, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        head = self._head(key)
        end = int(head["ContentLength"]) if length is None else min(int(head["ContentLength"]), start + length)
        return io.BufferedReader(_S3Reader(self, key, head["ETag"], min(start, end), end), buffer_size=COPY_BYTES)

    def size(self, key: str) -> int:
        return int(self._head(key)["ContentLength"])

    def put_file(self, path: Path, key: str) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES)
        with self._errors(key):
            self.client.upload_file(str(path), self.bucket, self._full(key), Config=config)
        stored, sent = self.size(key), Path(path).stat().st_size
        if stored != sent:
            raise DataError(f"{self._address(key)}: {stored} bytes arrived, {sent} were sent; try again")

    def put_bytes(self, data: bytes, key: str) -> None:
        with self._errors(key):
            self.client.put_object(Bucket=self.bucket, Key=self._full(key), Body=data)

    def put_if_absent(self, data: bytes, key: str) -> bool:
        from botocore.exceptions import ClientError

        for attempt in range(_ATTEMPTS):
            try:
                with self._errors(key, passing=("409", "412")):
                    self.client.put_object(Bucket=self.bucket, Key=self._full(key), Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 412:
                    # Ours all the same if an answer was lost and the client sent the request again.
                    with self.open_range(key) as file:
                        return file.read() == data
                time.sleep(0.1 * 2**attempt)  # 409: another writer is at it right now
        raise DataError(f"{self._address(key)}: other writers keep it busy; end them and try again")

    def listing(self, prefix: str = "") -> list[tuple[str, int, str]]:
        """Returns (key, size in bytes, ETag) of every object whose key starts with `prefix`, sorted by key."""
        found = []
        with self._errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    if not entry["Key"].endswith("/"):  # a browser's "folder"
                        found.append((entry["Key"].removeprefix(self.prefix), int(entry["Size"]), entry["ETag"]))
        return sorted(found)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        return [(key, size) for key, size, _ in self.listing(prefix)]

    def exists(self, key: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            with self._errors(key, passing=("404",)):
                self.client.head_object(Bucket=self.bucket, Key=self._full(key))
            return True
        except ClientError:
            return False

    def delete(self, key: str) -> None:
        with self._errors(key):
            self.client.delete_object(Bucket=self.bucket, Key=self._full(key))

    def _head(self, key: str) -> dict[str, Any]:
        with self._errors(key):
            return dict(self.client.head_object(Bucket=self.bucket, Key=self._full(key)))

    def _full(self, key: str) -> str:
        return self.prefix + checked_key(key)

    def _address(self, key: str) -> str:
        return join(self.url, key) if key else self.url

    @contextmanager
    def _errors(self, key: str, passing: tuple[str, ...] = ()) -> Iterator[None]:
        """Turns boto3's exceptions into DataError; those whose HTTP status is in `passing` go through as they are."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            if str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")) in passing:
                raise
            raise DataError(f"{self._address(key)}: {_explain(error)}") from None
        except (BotoCoreError, Boto3Error) as error:
            # Texts of botocore may quote addresses and headers: the class name says enough.
            reason = type(error.__context__ if isinstance(error, Boto3Error) and error.__context__ else error).__name__
            remedy = "check the AWS environment (AWS_ENDPOINT_URL, AWS_REGION, credentials) and the network"
            raise DataError(f"{self._address(key)}: the store cannot be used ({reason}); {remedy}") from None


_REMEDIES = {
    "NoSuchBucket": "no such bucket; check its name and AWS_ENDPOINT_URL",
    "NoSuchKey": "no such object; check the address",
    "404": "no such object or bucket; check the address and AWS_ENDPOINT_URL",
    "403": "access denied; check the credentials and their rights on this bucket",
    "AccessDenied": "access denied; check the credentials and their rights on this bucket",
    "InvalidAccessKeyId": "the access key is unknown to the store; check the credentials",
    "SignatureDoesNotMatch": "the store refuses the signature; check the secret key and the region",
    "412": "the object changed while it was read; data sets and artifacts must not change under a run",
    "PreconditionFailed": "the object changed while it was read; data sets and artifacts must not change under a run",
    "NotImplemented": "the store lacks this operation; use one with conditional writes (If-None-Match)",
    "BadDigest": "the store received other bytes than were sent; check the network and try again",
    "SlowDown": "the store asks to slow down, also after retries; lower the load or raise AWS_MAX_ATTEMPTS",
}


@lru_cache(maxsize=4)
def _client(_pid: int, _environment: int) -> Any:
    """Makes a client: one per process, as connections do not survive a fork, and per AWS environment."""
    import boto3
    from botocore.config import Config

    retries: dict[str, Any] = {}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries = {"retries": {"mode": "standard", "total_max_attempts": 6}}
    session = boto3.session.Session()
    try:
        return session.client("s3", config=Config(connect_timeout=5, read_timeout=20, **retries))
    except ValueError:  # its text may quote what stands in the endpoint
        raise DataError("AWS_ENDPOINT_URL is no address; write https://HOST[:PORT]") from None


def _explain(error: Any) -> str:
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    return _REMEDIES.get(code, f"the store answered {code!r}; check the address, the rights and the store's log")


class _S3Reader(io.RawIOBase):
    """Reads bytes [start, end) of one object version; after a broken connection it goes on where it stopped."""

    def __init__(self, store: S3Store, key: str, etag: str, start: int, end: int) -> None:
        self._store, self._key, self._etag = store, key, etag
        self._position, self._end = start, end
        self._body: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        wanted = min(len(buffer), self._end - self._position)
        for attempt in range(_ATTEMPTS if wanted else 0):
            try:
                data = self._open().read(wanted)
                if data:
                    buffer[: len(data)] = data
                    self._position += len(data)
                    return len(data)
                reason = "ended early"
            except (BotoCoreError, HTTPError, OSError) as error:
                reason = type(error).__name__
            self._drop()
            time.sleep(0.1 * 2**attempt)
        if not wanted:
            return 0
        place = f"{join(self._store.url, self._key)}: reading failed at byte {self._position} of {self._end} ({reason})"
        raise DataError(f"{place} after {_ATTEMPTS} attempts; check the network and the store")

    def close(self) -> None:
        self._drop()
        super().close()

    def _open(self) -> Any:
        if self._body is None:
            with self._store._errors(self._key):
                answer = self._store.client.get_object(
                    Bucket=self._store.bucket,
                    Key=self._store._full(self._key),
                    Range=f"bytes={self._position}-{self._end - 1}",
                    IfMatch=self._etag,
                )
            self._body = answer["Body"]
        return self._body

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
