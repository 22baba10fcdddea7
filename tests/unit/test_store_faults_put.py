"""Puts when the network or the server misbehaves: whole in the end, or an error and nothing stored."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data import s3_client
from data.object_store import S3Store
from tests.helpers.fault_proxy import Fault, FaultProxy
from tests.helpers.faulty_store import CONTENT, one_line

pytest_plugins = ["tests.helpers.store_fixtures"]

PUTS: list[Callable[[S3Store, Path], object]] = [
    lambda store, path: store.put_file(path, "y"),
    lambda store, path: store.put_bytes(path.read_bytes(), "y"),
    lambda store, path: store.put_if_absent(path.read_bytes(), "y"),
]


@pytest.mark.parametrize("put", PUTS, ids=["file", "bytes", "if_absent"])
def test_a_put_that_fails_twice_is_whole_in_the_end(
    store: S3Store, proxy: FaultProxy, tmp_path: Path, put: Callable[[S3Store, Path], object]
) -> None:
    for number, kind in enumerate(("500", "503", "lost_answer", "flip", "403")):
        content = CONTENT[number:]
        (tmp_path / "y").write_bytes(content)
        store.delete("y")
        proxy.clear()
        proxy.plan(Fault(kind, method="PUT", after_bytes=7, times=1 if kind == "403" else 2))
        assert put(store, tmp_path / "y") in (None, True)
        assert proxy.count("PUT") >= 2
        with store.open_range("y") as file:
            assert file.read() == content


@pytest.mark.parametrize("put", PUTS, ids=["file", "bytes", "if_absent"])
def test_a_put_that_always_fails_leaves_nothing(
    store: S3Store, proxy: FaultProxy, tmp_path: Path, put: Callable[[S3Store, Path], object]
) -> None:
    (tmp_path / "y").write_bytes(CONTENT)
    for kind, words in (("flip", "received other bytes"), ("403", "access denied"), ("503", "slow down")):
        proxy.clear()
        proxy.plan(Fault(kind, method="PUT", times=9999))
        assert words in one_line(lambda: put(store, tmp_path / "y"))
        assert not store.exists("y")
        if kind == "flip":
            assert proxy.count("PUT") == s3_client.WRONG_ANSWERS


def test_a_condition_that_fails_without_a_cause_is_an_error(store: S3Store, proxy: FaultProxy) -> None:
    proxy.plan(Fault("412", method="PUT"))
    assert "no such object" in one_line(lambda: store.put_if_absent(b"mine", "y"))
    assert store.put_if_absent(b"mine", "y") and not store.put_if_absent(b"other", "y")
    proxy.plan(Fault("412", method="PUT"))
    assert "412" in one_line(lambda: store.put_bytes(b"other", "y"))


def test_a_put_compares_the_stored_size(store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "y").write_bytes(CONTENT)
    monkeypatch.setattr(S3Store, "size", lambda *_: 299_999)
    assert "299999 bytes arrived, 300000 were sent" in one_line(lambda: store.put_file(tmp_path / "y", "y"))


@pytest.mark.parametrize(
    "faults",
    [
        (Fault("503", path="partNumber=2"), Fault("flip", path="partNumber=3", after_bytes=9)),
        (Fault("lost_answer", path="partNumber=1"), Fault("500", method="POST", path="uploads")),
        (Fault("lost_answer", method="POST", path="uploadId="),),  # the store has it, and says 404 when asked again
        (),
    ],
)
def test_a_large_put_is_mended_part_by_part(
    store: S3Store, proxy: FaultProxy, large: Path, faults: tuple[Fault, ...]
) -> None:
    proxy.plan(*faults)
    store.put_file(large, "large")
    with store.open_range("large") as file:
        assert file.read() == large.read_bytes()
    assert store.listing("large")[0][2].endswith('-3"')
    parts = [seen for seen in proxy.seen if "partNumber" in seen.path]
    assert len(parts) <= 3 + len(faults) + (3 if faults and faults[0].method == "POST" else 0)
    assert all("x-amz-checksum-crc32" in seen.headers for seen in parts)
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket)


@pytest.mark.parametrize(("kind", "path"), [("403", "partNumber=2"), ("flip", "partNumber=3"), ("500", "uploadId=")])
def test_a_large_put_that_fails_is_aborted(
    store: S3Store, proxy: FaultProxy, large: Path, kind: str, path: str
) -> None:
    method = "PUT" if "part" in path else "POST"
    proxy.plan(Fault(kind, method=method, path=path, times=9999), Fault("503", method="DELETE"))
    one_line(lambda: store.put_file(large, "large"))
    assert not store.exists("large")
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket)


def test_stores_without_the_newer_checksums(
    store: S3Store, proxy: FaultProxy, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    store.put_file(large, "large")
    assert store.size("large") == large.stat().st_size
    assert not [seen for seen in proxy.seen for name in seen.headers if name.startswith("x-amz-checksum")]
