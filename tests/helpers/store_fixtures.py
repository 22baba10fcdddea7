"""Fixtures of the tests of store faults, a pytest plugin: a bucket behind a fault proxy, time that costs nothing."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from data import s3_client, s3_store
from data.object_store import S3Store
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.faulty_store import CONTENT, Clock
from tests.helpers.s3_servers import moto_server, use_endpoint


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture(scope="module")
def shared_proxy(server: str) -> Iterator[FaultProxy]:
    with FaultProxy(server, verify_checksums=True) as started:
        yield started


@pytest.fixture
def proxy(shared_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """With one address for all tests, so that they share a client: to make one takes longer than most of them."""
    shared_proxy.clear()
    use_endpoint(monkeypatch, shared_proxy.url)
    return shared_proxy


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(s3_client, "time", clock)
    return clock


@pytest.fixture
def store(proxy: FaultProxy, clock: Clock, request: pytest.FixtureRequest) -> S3Store:
    """A fresh bucket behind the proxy with CONTENT under "x"."""
    store = S3Store(f"b{abs(hash(request.node.name))}", "p")
    store.client.create_bucket(Bucket=store.bucket)
    store.put_bytes(CONTENT, "x")
    proxy.clear()
    return store


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of three parts."""
    monkeypatch.setattr(s3_store, "PART_BYTES", 5 << 20)  # the least that S3 takes
    path = tmp_path / "large"
    path.write_bytes(random.Random(1).randbytes((10 << 20) + 1000))
    return path
