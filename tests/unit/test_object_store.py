"""Stores: the same behaviour locally and on S3 (moto, on the loopback)."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.errors import DataError
from data.local_store import LocalStore
from data.manifest import (
    FileEntry,
    Manifest,
    file_sha256,
    list_commits,
    newest_verified,
    read_manifest,
    step_folder,
    verify,
    write_manifest,
)
from data.object_store import S3Store, Store, fetch_tree, is_local, join, open_store, put_tree
from tests.helpers.s3_servers import moto_server, use_endpoint


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A fresh bucket, reached by the standard AWS environment alone."""
    use_endpoint(monkeypatch, s3_server)
    name = f"b{abs(hash(request.node.name))}"
    S3Store(name).client.create_bucket(Bucket=name)
    return name


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "store")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


def test_files_come_back_and_are_listed(store: Store, tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    (tmp_path / "file").write_bytes(content)
    store.put_file(tmp_path / "file", "a/b.bin")
    store.put_bytes(b"x", "a.txt")
    assert store.list() == [("a.txt", 1), ("a/b.bin", len(content))]
    assert store.list("a/") == [("a/b.bin", len(content))]
    assert store.list("a/b") == [("a/b.bin", len(content))]  # a string prefix, not a folder
    assert store.list("nothing/") == []
    assert store.size("a/b.bin") == len(content)
    with store.open_range("a/b.bin") as file:
        assert file.read() == content
    with store.open_range("a/b.bin", 1000, 20) as file:
        assert file.read() == content[1000:1020]
    with store.open_range("a/b.bin", len(content) - 5) as file:
        assert (file.read(3), file.read(), file.read()) == (content[-5:-2], content[-2:], b"")
    assert store.exists("a.txt") and not store.exists("a") and not store.exists("b.txt")
    store.delete("a.txt")
    store.delete("a.txt")
    assert not store.exists("a.txt")


def test_put_if_absent_lets_one_writer_win(store: Store) -> None:
    won: list[int] = []

    def race(number: int) -> None:
        if store.put_if_absent(f"writer {number}".encode(), "folder/commit"):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    winner = f"writer {won[0]}".encode()
    with store.open_range("folder/commit") as file:
        assert file.read() == winner
    assert store.put_if_absent(winner, "folder/commit")  # the same bytes again are as good as ours
    assert store.list() == [("folder/commit", len(winner))]  # no debris


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a\\b"])
def test_keys_stay_inside(tmp_path: Path, key: str) -> None:
    for store in (open_store(tmp_path), open_store("s3://bucket/prefix")):
        with pytest.raises(DataError, match="no valid key"):
            store.size(key)


def test_a_missing_file_is_one_line_with_the_address(store: Store) -> None:
    for call in (store.size, store.open_range):
        with pytest.raises(DataError) as caught:
            call("no/such.file")
        assert f"{store.url}/no/such.file: no such" in str(caught.value) and "\n" not in str(caught.value)


def test_s3_errors_name_the_bucket_and_no_secret(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="s3://absent-bucket/x: no such bucket"):
        open_store("s3://absent-bucket/x").list()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(DataError, match="AWS_ENDPOINT_URL") as caught:
        open_store(f"s3://{bucket}/x").list()
    assert "canary" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "canary, no address")
    with pytest.raises(DataError, match="AWS_ENDPOINT_URL is no address") as caught:
        open_store(f"s3://{bucket}/x").list()
    assert "canary" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(DataError, match="AWS_MAX_ATTEMPTS=many: give a number"):
        open_store(f"s3://{bucket}/x").list()


def test_s3_multipart_put(bucket: str, tmp_path: Path) -> None:
    content = bytes(17 << 20)
    (tmp_path / "large").write_bytes(content)
    store = S3Store(bucket, "p")
    store.put_file(tmp_path / "large", "large")
    assert store.listing()[0][2].endswith('-2"')  # the ETag of an object of two parts
    with store.open_range("large", len(content) - 1) as file:
        assert file.read() == b"\0"


def test_trees(bucket: str, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_text("a")
    (source / "sub" / "b").write_text("b")
    assert fetch_tree(source) == source
    url = f"s3://{bucket}/tree"
    assert put_tree(source, url) == 2
    with pytest.raises(DataError, match="already holds files"):
        put_tree(source, url)
    fetched = fetch_tree(url, tmp_path / "cache")
    assert (fetched / "sub" / "b").read_text() == "b"
    assert fetch_tree(url, tmp_path / "cache") == fetched
    assert fetch_tree(f"{url}/sub/b", tmp_path / "cache").read_text() == "b"  # one file
    S3Store(bucket, "tree").put_bytes(b"c", "a")  # same size, other content
    assert (fetch_tree(url, tmp_path / "cache") / "a").read_text() == "c"
    with pytest.raises(DataError, match="nothing there"):
        fetch_tree(f"s3://{bucket}/none", tmp_path / "cache")
    with pytest.raises(DataError, match="no such file or folder"):
        fetch_tree(tmp_path / "none")


def test_a_folder_without_rights_or_space_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="check the path, the rights and the free space"):
        open_store(tmp_path / "file" / "below").put_bytes(b"x", "y")


def test_a_listing_leaves_out_what_is_deleted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.put_bytes(b"a", "a")
    store.put_bytes(b"b", "b")
    getsize = os.path.getsize

    def late(path: str) -> int:
        (tmp_path / "a").unlink(missing_ok=True)
        return getsize(path)

    monkeypatch.setattr("os.path.getsize", late)
    assert store.list() == [("b", 1)]


def test_urls(tmp_path: Path) -> None:
    assert join("s3://b/p/", "x", "y/z") == "s3://b/p/x/y/z" and join("/", "a") == "/a"
    assert is_local("a/b") and is_local("file:///a") and not is_local("s3://b")
    with pytest.raises(DataError, match="s3:/b/c: an s3 address must read s3://bucket/prefix"):
        open_store("s3:/b/c")  # would be a local folder
    opened = open_store(f"file://{tmp_path}/with%20space")
    assert isinstance(opened, LocalStore) and opened.root == tmp_path / "with space"
    for url in ("gs://b/x", "https://h/x", "s3://", "s3://id:key@b/x", "", "pipe:cat x"):
        with pytest.raises(DataError) as caught:
            open_store(url)
        assert "id:key" not in str(caught.value)


def _commit(store: Store, step: int, attempt: str = "one") -> bool:
    key = f"{attempt}/weights"
    store.put_bytes(f"weights of {step}".encode(), f"{step_folder(step)}/{key}")
    digest = file_sha256(store, f"{step_folder(step)}/{key}")
    files = {key: FileEntry(size_bytes=store.size(f"{step_folder(step)}/{key}"), sha256=digest)}
    return write_manifest(store, step_folder(step), Manifest(step=step, attempt=attempt, files=files, meta={"n": 1}))


def test_manifest_is_the_commit(store: Store) -> None:
    assert newest_verified(store) is None
    store.put_bytes(b"half", "step-00000005/one/weights")
    with pytest.raises(DataError, match="no valid checkpoint"):
        newest_verified(store)
    assert _commit(store, 10) and _commit(store, 20)
    assert not _commit(store, 20, attempt="zombie")
    assert list_commits(store) == [10, 20]
    found = newest_verified(store)
    assert found is not None
    step, manifest, complaints = found
    assert (step, manifest.attempt, manifest.meta, complaints) == (20, "one", {"n": 1}, [])
    assert read_manifest(store, 20) == manifest


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "traversal", "version", "sealed"])
def test_a_damaged_commit_is_passed_over_aloud(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path)
    _commit(store, 10)
    _commit(store, 20)
    weights, manifest = tmp_path / "step-00000020/one/weights", tmp_path / "step-00000020/manifest.json"
    if damage == "flip":
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    elif damage == "truncate":
        weights.write_bytes(b"w")
    elif damage == "delete":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "version":
        manifest.write_text(manifest.read_text().replace('"format_version":2', '"format_version":"2"'))
    else:  # "sealed": as readable as before, and something else
        wrong = '"n":1', '"n":3'
        if damage == "traversal":
            wrong = "one/weights", "../../secret"
        text = manifest.read_text()
        assert wrong[0] in text
        manifest.write_text(text.replace(*wrong))
    found = newest_verified(store)
    assert found is not None
    step, _, complaints = found
    assert step == 10 and len(complaints) == 1 and "step-00000020" in complaints[0]
    (tmp_path / "step-00000010/one/weights").unlink()
    with pytest.raises(DataError, match="no valid checkpoint"):
        newest_verified(store)
    assert verify(store, 10, read_manifest(store, 10)) == [f"{tmp_path}/step-00000010/one/weights: missing"]
