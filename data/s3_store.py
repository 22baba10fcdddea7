"""The store in a bucket: ranged reads that survive broken connections, whole puts. Promises: docs/store.md."""

import io
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import DataError
from data.local_store import COPY_BYTES, Buffer, checked_key
from data.s3_client import WrongAnswer, call, current_client, part_checksum, persist

PART_BYTES = 16 << 20  # of a multipart put; also its threshold
MAX_PARTS = 10_000  # S3's limit; a file of more parts than that gets larger ones
PUT_THREADS = 4  # parts of one put on their way, each held in memory
ABORT_PATIENCE_S = 5.0  # for the tidying up after a failed put
CLOCK_SKEW_S = 900.0  # between this machine and the store; more, and the store refuses signatures

Read = Callable[[int, int], bytes]  # from a byte on, so many of them


class S3Store:
    """A prefix of an S3 bucket. Holds no connection and no credentials: may be pickled, forked and used by threads."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    @property
    def client(self) -> Any:
        """The boto3 client of this process."""
        return current_client()

    def open_range(self, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        reader = _Reader(self, key, start, length)
        return io.BufferedReader(reader, buffer_size=min(max(reader.remaining, 1), COPY_BYTES))

    def size(self, key: str) -> int:
        return int(self._do("head_object", key)["ContentLength"])

    def put_file(self, path: Path, key: str) -> None:
        with Path(path).open("rb") as file:

            def read(start: int, length: int) -> bytes:
                data = os.pread(file.fileno(), length, start)
                if len(data) != length:
                    raise DataError(f"{path}: changed its size while it was put; leave it alone and try again")
                return data

            self._put(read, Path(path).stat().st_size, key)

    def put_bytes(self, data: bytes, key: str) -> None:
        self._do("put_object", key, Body=data)

    def put_parts(self, parts: Sequence[Buffer], key: str) -> None:
        ends = list(accumulate(len(part) for part in parts))

        def read(start: int, length: int) -> bytes:
            pieces = []
            for part, end in zip(parts, ends, strict=True):
                begin = end - len(part)
                pieces.append(part[max(0, start - begin) : max(0, start + length - begin)])
            return b"".join(pieces)

        self._put(read, ends[-1] if ends else 0, key)

    def put_if_absent(self, data: bytes, key: str) -> bool:
        if self._do("put_object", key, passing=(412,), Body=data, IfNoneMatch="*") is not None:
            return True
        # Ours all the same if the answer to the first request was lost and it was sent again.
        with self.open_range(key) as file:
            return file.read() == data

    def listing(self, prefix: str = "") -> list[tuple[str, int, str]]:
        """Returns (key, size in bytes, ETag) of every object whose key starts with `prefix`, sorted by key."""
        found: list[tuple[str, int, str]] = []
        token = ""
        while True:
            page = self._list_page(prefix, token)
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # a browser's "folder"
                    found.append((entry["Key"].removeprefix(self.prefix), int(entry["Size"]), entry["ETag"]))
            if not page.get("IsTruncated"):
                return sorted(found)
            if page.get("NextContinuationToken") in (None, "", token):
                raise DataError(f"{self.url}: the store lists no more than one page of keys; use another store")
            token = page["NextContinuationToken"]

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        return [(key, size) for key, size, _ in self.listing(prefix)]

    def exists(self, key: str) -> bool:
        return self._do("head_object", key, passing=(404,)) is not None

    def delete(self, key: str) -> None:
        self._do("delete_object", key)

    def sweep(self, began_before_s: float) -> int:
        # The store's clock says when an upload began; one that differs more from ours would refuse our requests.
        began_before = datetime.fromtimestamp(began_before_s - CLOCK_SKEW_S, UTC)
        swept = 0
        marks: dict[str, Any] = {}
        while True:
            page = self._list_uploads(marks)
            for upload in page.get("Uploads", []):
                if upload["Initiated"] < began_before:
                    key = upload["Key"].removeprefix(self.prefix)
                    self._do("abort_multipart_upload", key, (404,), ABORT_PATIENCE_S, UploadId=upload["UploadId"])
                    swept += 1
            further = {"KeyMarker": page.get("NextKeyMarker"), "UploadIdMarker": page.get("NextUploadIdMarker")}
            if not page.get("IsTruncated") or further == marks:
                return swept
            marks = further

    def address(self, key: str) -> str:
        """Returns the full address of `key`."""
        return f"{self.url}/{key}"

    def _list_page(self, prefix: str, token: str) -> Any:
        parameters = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        further = {"ContinuationToken": token} if token else {}
        return persist(self.url, lambda client: client.list_objects_v2(**parameters, **further))

    def _list_uploads(self, marks: dict[str, Any]) -> Any:
        place = {"Bucket": self.bucket, "Prefix": self.prefix, **marks}
        return persist(self.url, lambda client: client.list_multipart_uploads(**place), ABORT_PATIENCE_S)

    def _do(
        self,
        operation: str,
        key: str,
        passing: tuple[int, ...] = (),
        patience_s: float | None = None,
        **parameters: Any,
    ) -> Any:
        parameters |= {"Bucket": self.bucket, "Key": self.prefix + checked_key(key)}
        return persist(self.address(key), lambda client: call(client, operation, passing, **parameters), patience_s)

    def _put(self, read: Read, size: int, key: str) -> None:
        if size <= PART_BYTES:
            self._do("put_object", key, Body=read(0, size))
        elif not self._put_in_parts(read, size, key) and not self._put_in_parts(read, size, key):
            raise DataError(f"{self.address(key)}: the store forgot the parts that were put, twice; check its log")
        stored = self.size(key)
        if stored != size:
            raise DataError(f"{self.address(key)}: {stored} bytes arrived, {size} were sent; try again")

    def _put_in_parts(self, read: Read, size: int, key: str) -> bool:
        """Stores much in parts. False if in the end the store knows nothing of the upload.

        That is what it may say to a completion sent again because the answer to the first was lost.
        """
        checksum = persist(self.address(key), part_checksum)
        upload_id = self._do("create_multipart_upload", key, **checksum)["UploadId"]
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))

        def put_part(number: int) -> dict[str, Any]:
            start = (number - 1) * part_bytes
            data = read(start, min(part_bytes, size - start))
            answer = self._do("upload_part", key, UploadId=upload_id, PartNumber=number, Body=data, **checksum)
            fields = {name: answer[name] for name in ("ETag", "ChecksumCRC32") if name in answer}
            return {"PartNumber": number, **fields}

        try:
            with ThreadPoolExecutor(PUT_THREADS) as pool:
                parts = list(pool.map(put_part, range(1, -(-size // part_bytes) + 1)))
            whole: dict[str, Any] = {"UploadId": upload_id, "MultipartUpload": {"Parts": parts}}
            return self._do("complete_multipart_upload", key, passing=(404,), **whole) is not None
        except BaseException:
            with suppress(DataError):  # parts that stay are invisible, but cost money
                self._do("abort_multipart_upload", key, (404,), ABORT_PATIENCE_S, UploadId=upload_id)
            raise


class _Reader(io.RawIOBase):
    """Reads a range of one version of an object; after a broken connection it goes on at the first byte it lacks."""

    def __init__(self, store: S3Store, key: str, start: int, length: int | None) -> None:
        self._raw: Any = None  # the answer's body, while one is open
        self._place = store.address(key)
        self._object: dict[str, Any] = {"Bucket": store.bucket, "Key": store.prefix + checked_key(key)}
        self._position = start
        self._end = None if length is None else start + length  # exclusive; settled by the first answer
        self._etag = ""
        if length == 0:
            store.size(key)  # a missing object is an error all the same
        else:
            persist(self._place, self._request)

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        assert self._end is not None
        return self._end - self._position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.remaining)
        if not wanted:
            return 0
        data = persist(self._place, lambda client: self._read_some(client, wanted))  # any byte renews the patience
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        whole = memoryview(bytearray(self.remaining))
        filled = 0
        while filled < len(whole):
            filled += self.readinto(whole[filled:])
        return bytes(whole)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read_some(self, client: Any, wanted: int) -> bytes:
        try:
            if self._raw is None:
                self._request(client)
            data: bytes = self._raw.read1(wanted)  # what has come by now: no byte that came is lost with a connection
            if not data:
                raise ConnectionError("closed early")
            return data
        except BaseException:
            self._drop()
            raise

    def _request(self, client: Any) -> None:
        """Asks for what is left and checks that the answer is exactly that. The first answer pins the version."""
        last = "" if self._end is None else self._end - 1
        pin: dict[str, Any] = {"IfMatch": self._etag} if self._etag else {}
        passing = (412,) if pin else (416,)
        answer = call(client, "get_object", passing, **self._object, **pin, Range=f"bytes={self._position}-{last}")
        if answer is None and pin:
            raise self._changed()
        length = answer["ContentLength"] if answer else 0
        if not length and not pin:
            self._check_nothing_is_there(client)
            return
        self._raw = answer["Body"].__enter__()  # urllib3's response: StreamingBody itself lacks read1
        try:
            self._check(answer, length)
        except BaseException:
            self._drop()
            raise

    def _check(self, answer: Any, length: int) -> None:
        status, given = answer["ResponseMetadata"]["HTTPStatusCode"], str(answer.get("ContentRange", ""))
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", given)
        if status != 206 or not found:
            raise WrongAnswer(f"answered status {status} and no range to a ranged read")
        first, last, size = map(int, found.groups())
        end = size if self._end is None else min(self._end, size)
        if (first, last + 1, length) != (self._position, end, end - self._position):
            raise WrongAnswer(f"gave {length} bytes as {given!r} where {self._position}-{end - 1} was asked for")
        etag = answer.get("ETag") or ""
        if self._etag not in ("", etag):  # a store that does not know If-Match
            raise self._changed()
        self._end, self._etag = end, etag

    def _check_nothing_is_there(self, client: Any) -> None:
        """An empty object, or one that ends before the range starts, has no range to give."""
        size = int(call(client, "head_object", **self._object)["ContentLength"])
        if size > self._position:
            raise WrongAnswer(f"gave nothing of {size} bytes from byte {self._position} on")
        self._end = self._position

    def _changed(self) -> DataError:
        what = "the object changed while it was read"
        return DataError(f"{self._place}: {what}; data sets and artifacts must not change under a run")

    def _drop(self) -> None:
        if self._raw is not None:
            self._raw.close()
            self._raw = None
