"""The store against OpenStack Swift, a server that checks signatures and checksums, partly behind the fault proxy."""

import base64
import os
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data import s3_client, s3_store
from data.errors import DataError
from data.object_store import S3Store
from tests.helpers.fault_proxy import Fault, FaultProxy
from tests.helpers.s3_servers import SWIFT_KEY_ID, SWIFT_PAGE_KEYS, SWIFT_SECRET, swift_server, use_endpoint

pytestmark = pytest.mark.all

CONTENT = random.Random(0).randbytes(200_000)


@pytest.fixture(scope="module")
def swift() -> Iterator[str]:
    with swift_server() as url:
        yield url


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(s3_client, "LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(s3_store, "PART_BYTES", 64 << 10)


@pytest.fixture
def proxy(swift: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(swift) as started:
        use_endpoint(monkeypatch, started.url, SWIFT_KEY_ID, SWIFT_SECRET)
        yield started


@pytest.fixture
def store(proxy: FaultProxy, request: pytest.FixtureRequest) -> S3Store:
    store = S3Store(f"b{abs(hash(request.node.name))}", "some/prefix")
    store.client.create_bucket(Bucket=store.bucket)
    return store


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and SWIFT_SECRET not in text and SWIFT_KEY_ID not in text
    return text


def test_ranges_and_broken_connections(store: S3Store, proxy: FaultProxy) -> None:
    store.put_bytes(CONTENT, "x")
    for start, length in ((0, None), (100, 50), (199_990, 100), (200_000, None), (300_000, 5)):
        with store.open_range("x", start, length) as file:
            assert file.read() == CONTENT[start : None if length is None else start + length]
    proxy.clear()
    proxy.plan(*(Fault("reset", method="GET", after_bytes=n, first=i) for i, n in enumerate((2000, 0, 300), start=1)))
    with store.open_range("x", 10) as file:
        assert file.read() == CONTENT[10:]
    assert proxy.ranges() == ["bytes=10-", *(f"bytes={start}-199999" for start in (2010, 2010, 2310))]
    store.put_bytes(b"", "empty")
    with store.open_range("empty") as file:
        assert file.read() == b""
    store.delete("x")
    store.delete("x")
    assert not store.exists("x") and "no such object" in one_line(lambda: store.open_range("x"))


def test_put_if_absent(store: S3Store, proxy: FaultProxy) -> None:
    proxy.plan(Fault("lost_answer", method="PUT"))
    assert store.put_if_absent(b"mine", "commit")
    assert store.put_if_absent(b"mine", "commit") and not store.put_if_absent(b"other", "commit")
    with store.open_range("commit") as file:
        assert file.read() == b"mine"


def test_wrong_bytes_are_refused_by_the_server(store: S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
    wrong = base64.b64encode(struct.pack(">I", zlib.crc32(b"other"))).decode()
    put = {"Bucket": store.bucket, "Key": "y", "Body": b"bytes", "ChecksumCRC32": wrong}
    with pytest.raises(store.client.exceptions.ClientError, match="BadDigest"):
        store.client.put_object(**put)
    assert "received other bytes" in one_line(lambda: s3_client.persist("y", lambda client: client.put_object(**put)))
    (tmp_path / "large").write_bytes(CONTENT)
    proxy.plan(Fault("flip", method="PUT", path="partNumber=2", after_bytes=5), Fault("flip", path="small"))
    store.put_file(tmp_path / "large", "large")
    store.put_bytes(CONTENT[:100], "small")
    for key, content in (("large", CONTENT), ("small", CONTENT[:100])):
        with store.open_range(key) as file:
            assert file.read() == content
    proxy.plan(Fault("flip", method="PUT", times=999))
    for call in (lambda: store.put_file(tmp_path / "large", "z"), lambda: store.put_bytes(b"z", "z")):
        assert "received other bytes" in one_line(call)
    assert not store.exists("z")


def test_large_puts_in_parts(store: S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(CONTENT)
    proxy.plan(Fault("503", path="partNumber=3"), Fault("lost_answer", method="POST", path="uploadId="))
    store.put_file(tmp_path / "large", "large")
    assert store.list() == [("large", len(CONTENT))]
    with store.open_range("large", 60_000, 10_000) as file:  # across two parts
        assert file.read() == CONTENT[60_000:70_000]
    parts = [seen for seen in proxy.seen if "partNumber" in seen.path]
    assert len(parts) == 5 and all("x-amz-checksum-crc32" in seen.headers for seen in parts)
    proxy.plan(Fault("403", path="partNumber=2", times=99))
    assert "access denied" in one_line(lambda: store.put_file(tmp_path / "large", "half"))
    assert not store.exists("half")
    assert not store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads")


def test_listings_of_several_pages(store: S3Store, proxy: FaultProxy) -> None:
    keys = [f"folder/{number:03d} +%ü" for number in range(2 * SWIFT_PAGE_KEYS + 5)]
    for key in keys:
        store.put_bytes(b"12", key)
    proxy.clear()
    proxy.plan(Fault("503", path="continuation-token", times=2))
    assert store.list("folder/") == [(key, 2) for key in keys]
    assert proxy.count("GET") == 3 + 2


def test_wrong_credentials_are_one_line(store: S3Store, swift: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, swift, SWIFT_KEY_ID, "canary-wrong-secret")
    for call in (store.list, lambda: store.put_bytes(b"x", "x"), lambda: store.open_range("x")):
        text = one_line(call)
        assert text.startswith(store.url) and "signature" in text and "canary" not in text
    use_endpoint(monkeypatch, swift, "lab:nobody", SWIFT_SECRET)
    assert "check the" in (text := one_line(store.list)) and "nobody" not in text


def test_rotated_credentials_are_found(
    store: S3Store, swift: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(secret: str) -> None:
        text = f"[default]\naws_access_key_id = {SWIFT_KEY_ID}\naws_secret_access_key = {secret}\n"
        (tmp_path / "credentials").write_text(text)

    forget = s3_client._forget

    def rotated_meanwhile(client: object) -> None:
        write(SWIFT_SECRET)
        forget(client)

    write("the-old-secret")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(s3_client, "_forget", rotated_meanwhile)
    store.put_bytes(b"x", "x")
    assert store.list() == [("x", 1)]


def test_memory_stays_bounded(swift: str, store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, swift, SWIFT_KEY_ID, SWIFT_SECRET)
    monkeypatch.setattr(s3_store, "PART_BYTES", 1 << 20)
    (tmp_path / "large").write_bytes(os.urandom(32 << 20))
    assert store.list() == []  # what is imported and made once is not counted
    tracemalloc.start()
    try:
        store.put_file(tmp_path / "large", "large")
        put_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with store.open_range("large") as file:
            total = sum(len(piece) for piece in iter(lambda: file.read(64 << 10), b""))
        read_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 32 << 20
    assert put_bytes < 2 * s3_store.PUT_THREADS * s3_store.PART_BYTES and read_bytes < 6 << 20
