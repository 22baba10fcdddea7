"""What the store does when the network or the server misbehaves: a proxy with a plan stands before a real server.

Reads, credentials and a whole loader; test_store_faults_put.py has the puts.
"""

import io
import logging
import os
import pickle
import random
import threading
from itertools import islice
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, SSLError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import s3_client
from data.errors import DataError
from data.loader import LoaderConfig, build_loader
from data.object_store import S3Store, open_store
from data.shards import verify, write_shards
from tests.helpers.fault_proxy import Fault, FaultProxy
from tests.helpers.faulty_store import CONTENT, Clock, one_line, read, starts
from tests.helpers.s3_servers import use_endpoint

pytest_plugins = ["tests.helpers.store_fixtures"]


def test_a_range_is_one_request_and_connections_are_kept(store: S3Store, proxy: FaultProxy) -> None:
    before = proxy.connections
    for start in range(0, 200_000, 20_000):
        assert read(store, start, 20_000) == CONTENT[start : start + 20_000]
    assert read(store, 299_990, 1000) == CONTENT[-10:] and read(store, 7) == CONTENT[7:]
    assert proxy.count() == proxy.count("GET") == 12 and proxy.connections == before
    assert proxy.ranges()[:2] == ["bytes=0-19999", "bytes=20000-39999"]
    assert read(store, 300_000) == read(store, 400_000, 5) == read(store, 5, 0) == b""


@pytest.mark.parametrize("kind", ["reset", "cut", "stall"])
def test_a_broken_read_goes_on_at_the_first_byte_it_lacks(
    store: S3Store, proxy: FaultProxy, clock: Clock, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "stall":
        monkeypatch.setattr(s3_client, "READ_TIMEOUT_S", 0.5)
        monkeypatch.setenv("AWS_SDK_UA_APP_ID", "stall")  # another environment: a new client, with that timeout
    proxy.plan(Fault(kind, method="GET", after_bytes=1000), Fault(kind, method="GET", after_bytes=500, first=2))
    assert read(store, 10, 9000) == CONTENT[10:9010]
    asked = list(dict.fromkeys(proxy.ranges()))  # a machine that is busy may seem to stall once more
    assert asked == ["bytes=10-9009", "bytes=1010-9009", "bytes=1510-9009"]
    assert len(clock.waits) >= 2 and max(clock.waits) <= s3_client.FIRST_WAIT_S  # a byte resets the backoff


@settings(max_examples=12, deadline=None)
@given(breaks=st.lists(st.tuples(st.sampled_from(["reset", "cut"]), st.integers(0, 120_000)), max_size=6))
def test_random_breaks_never_change_the_bytes(shared_proxy: FaultProxy, breaks: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(s3_client, "time", Clock())
        proxy = shared_proxy
        proxy.clear()
        use_endpoint(monkeypatch, proxy.url)
        store = S3Store("breaks", "p")
        store.client.create_bucket(Bucket="breaks")
        store.put_bytes(CONTENT, "x")
        proxy.plan(*(Fault(kind, method="GET", after_bytes=n, first=i + 1) for i, (kind, n) in enumerate(breaks)))
        assert read(store) == CONTENT
        asked = starts(proxy)
        lost = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
        assert asked[0] == 0 and all(0 <= got <= n for got, (_, n) in zip(lost, breaks, strict=False))
        assert all(got > 0 for got, (_, n) in zip(lost, breaks, strict=False) if n)


@pytest.mark.parametrize("kind", ["short", "short_range", "ignore_range"])
@pytest.mark.parametrize("start", [0, 1000])
def test_an_answer_that_is_not_the_range_is_never_used(
    store: S3Store, proxy: FaultProxy, kind: str, start: int
) -> None:
    wrong = Fault(kind, method="GET", after_bytes=100, times=2)
    proxy.plan(wrong)
    assert read(store, start, 5000) == CONTENT[start : start + 5000]
    proxy.clear()
    proxy.plan(Fault("reset", method="GET", after_bytes=700), Fault(kind, method="GET", after_bytes=100, first=2))
    assert read(store, start) == CONTENT[start:]
    assert starts(proxy) == [start, start + 700, start + 700]
    proxy.clear()
    proxy.plan(Fault(kind, method="GET", after_bytes=100, times=99))
    text = one_line(lambda: read(store, start, 5000))
    assert "was asked for" in text or "no range" in text
    assert proxy.count("GET") == s3_client.WRONG_ANSWERS


def test_an_empty_answer_is_no_empty_file(store: S3Store, proxy: FaultProxy) -> None:
    proxy.plan(Fault("short", method="GET", after_bytes=0))
    assert read(store) == CONTENT
    store.put_bytes(b"", "empty")
    with store.open_range("empty") as file:
        assert file.read() == b""


@pytest.mark.parametrize(("kind", "words"), [("503", "slow down"), ("500", "internal error")])
def test_a_busy_store_is_waited_for_with_growing_random_pauses(
    store: S3Store, proxy: FaultProxy, clock: Clock, kind: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.plan(Fault(kind, times=5))
    assert read(store, 0, 10) == CONTENT[:10]
    bounds = [s3_client.FIRST_WAIT_S * 2**n for n in range(5)]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(clock.waits, bounds, strict=True))
    assert len({wait / bound for wait, bound in zip(clock.waits, bounds, strict=True)}) > 1
    assert len([record for record in caplog.records if words in record.getMessage()]) == 1
    proxy.clear()
    clock.waits.clear()
    proxy.plan(Fault(kind, times=9999))
    for call in (
        lambda: read(store),
        lambda: store.put_bytes(b"x", "y"),
        lambda: store.put_if_absent(b"x", "y"),
        store.list,
        lambda: store.delete("x"),
    ):
        began = clock.now
        assert f"{words} (" in (text := one_line(call)) or "overloaded (" in text
        assert s3_client.PATIENCE_S - s3_client.LONGEST_WAIT_S <= clock.now - began <= s3_client.PATIENCE_S
    assert max(clock.waits) <= s3_client.LONGEST_WAIT_S
    assert proxy.count() < 5 * 50  # an outage is not answered with a storm


def test_an_outage_of_two_minutes_in_mid_read_is_ridden_out(
    store: S3Store, proxy: FaultProxy, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    end = clock.now + 120
    sleep = clock.sleep

    def repaired_in_time(seconds: float) -> None:
        sleep(seconds)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint if clock.now > end else "http://127.0.0.1:9")

    clock.sleep = repaired_in_time  # type: ignore[method-assign]
    proxy.plan(Fault("reset", method="GET", after_bytes=1000))
    assert read(store) == CONTENT
    assert clock.now > end and starts(proxy) == [0, 1000]


def test_a_stalled_store_is_an_error_in_the_end(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "READ_TIMEOUT_S", 0.1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy.plan(Fault("stall", after_bytes=-1, times=99))
    for call in (lambda: read(store), lambda: store.put_bytes(b"x", "y"), store.list):
        assert "no whole answer (ReadTimeoutError) (2 attempts" in one_line(call)
    assert proxy.count() == 6


def credentials_file(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Credentials come from this file alone."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))


def write_credentials(path: Path, key_id: str) -> None:
    path.write_text(f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = canary\n")


def test_credentials_that_come_late_are_found(
    store: S3Store, proxy: FaultProxy, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "WRONG_ANSWERS", 2)
    credentials_file(monkeypatch, tmp_path / "credentials")
    assert "NoCredentialsError" in one_line(store.list)
    assert len(clock.waits) == s3_client.WRONG_ANSWERS - 1 and not proxy.count()
    sleep = clock.sleep

    def given_out(seconds: float) -> None:
        sleep(seconds)
        write_credentials(tmp_path / "credentials", "LATE")

    clock.sleep = given_out  # type: ignore[method-assign]
    assert store.list() == [("x", len(CONTENT))]


def test_refused_credentials_are_read_anew_once(
    store: S3Store, proxy: FaultProxy, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials_file(monkeypatch, tmp_path / "credentials")
    write_credentials(tmp_path / "credentials", "FIRST")
    assert read(store, 0, 10) == CONTENT[:10]
    first = store.client
    write_credentials(tmp_path / "credentials", "SECOND")
    proxy.clear()
    proxy.plan(Fault("cut", method="GET", after_bytes=900), Fault("403", signed_by="FIRST", first=2, times=99))
    assert read(store) == CONTENT  # 900 bytes, refused, 403 with FIRST, the rest with SECOND
    assert starts(proxy) == [0, 900, 900]
    assert ["SECOND" in seen.headers["authorization"] for seen in proxy.seen] == [False, False, True]
    assert store.client is not first
    proxy.clear()
    proxy.plan(Fault("403", times=99))
    for call in (lambda: read(store), store.list):
        asked = proxy.count()
        assert "access denied" in one_line(call)
        assert proxy.count() == asked + 2
    assert not [wait for wait in clock.waits if wait > s3_client.FIRST_WAIT_S]


@pytest.mark.parametrize("kind", ["", "ignore_match"])
def test_an_object_that_changes_under_a_reader_is_an_error(store: S3Store, proxy: FaultProxy, kind: str) -> None:
    proxy.plan(Fault("reset", method="GET", after_bytes=1000))
    if kind:
        proxy.plan(Fault(kind, method="GET", first=2))
    with store.open_range("x") as file:
        assert file.read(10) == CONTENT[:10]
        store.put_bytes(CONTENT[::-1], "x")
        assert "the object changed while it was read" in one_line(file.read)


def test_threads_and_forks_share_a_store(store: S3Store, proxy: FaultProxy) -> None:
    def check() -> bool:
        return all(read(store, start, 1000) == CONTENT[start : start + 1000] for start in range(0, 20_000, 1000))

    before = proxy.connections
    proxy.plan(Fault("reset", method="GET", after_bytes=500, times=20))
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(check())) for _ in range(8)]
    for thread in threads:
        thread.start()
    child = os.fork()
    if not child:
        os._exit(0 if check() and store.client is not None else 1)
    for thread in threads:
        thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert results == [True] * 8 and check()
    assert proxy.connections - before <= 20 + 8 + 1  # after a reset, one per thread, the child's


def test_a_certificate_nobody_vouches_for_is_settled_at_once(store: S3Store, clock: Clock) -> None:
    def refused(_client: object) -> None:
        raise SSLError(endpoint_url="canary", error="[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")

    assert "AWS_CA_BUNDLE" in one_line(lambda: s3_client.persist(store.url, refused))
    assert not clock.waits


def test_a_clock_that_is_wrong_is_named_at_once(store: S3Store, clock: Clock) -> None:
    def refused(_client: object) -> None:
        answer = {"Error": {"Code": "RequestTimeTooSkewed"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(answer, "GetObject")  # type: ignore[arg-type]

    assert "the clocks of this machine and the store differ" in one_line(lambda: s3_client.persist(store.url, refused))
    assert sum(clock.waits) <= s3_client.FIRST_WAIT_S


def test_credentials_appear_nowhere(
    store: S3Store, proxy: FaultProxy, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary-token")
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        proxy.plan(Fault("503", times=4), Fault("reset", method="GET", after_bytes=1000))
        assert read(store) == CONTENT
        store.put_file(large, "large")
        proxy.plan(Fault("403", times=9999))
        texts = [one_line(call) for call in (lambda: read(store), lambda: store.put_file(large, "z"))]
        with pytest.raises(DataError) as caught:
            open_store("s3://canary-id:canary-secret@bucket/x")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert "asks to slow down" in text.getvalue()
    written = [text.getvalue(), *texts, str(caught.value), repr(vars(store))]
    assert not [line for line in written if "canary" in line]
    assert any("canary-token" in seen.headers.get("x-amz-security-token", "") for seen in proxy.seen)
    proxy.clear()
    assert b"canary" not in pickle.dumps(store) and pickle.loads(pickle.dumps(store)).list("none") == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_behind_faults_gives_the_batches_of_an_undisturbed_one(
    store: S3Store, proxy: FaultProxy, workers: int
) -> None:
    noise = random.Random(2)
    url = f"s3://{store.bucket}/set"
    samples = []
    for number in range(24):
        out = io.BytesIO()
        Image.frombytes("RGB", (16, 16), noise.randbytes(768)).save(out, "PNG")
        samples.append({"__key__": f"{number:02d}", "png": out.getvalue(), "txt": f"caption {number}"})
    write_shards(samples, url, "s", 4)
    assert verify(url) == []
    config = LoaderConfig(shards=url, image_size=16, num_workers=workers, num_streams=2, shuffle_chunk_samples=3)

    def batches() -> list[tuple[bytes, list[str], list[int]]]:
        loader = build_loader(config, seed=3, micro_batch_size=4, rank=0, world_size=1)
        return [
            (batch.pixels.numpy().tobytes(), batch.captions, batch.sample_numbers.tolist())
            for batch in islice(loader, 7)  # into the second epoch
        ]

    undisturbed = batches()
    assert sorted(caption for _, captions, _ in undisturbed[:6] for caption in captions) == sorted(
        f"caption {number}" for number in range(24)
    )
    kinds = ("reset", "short_range", "503", "cut", "ignore_range", "500", "short", "lost_answer")
    kinds += 3 * ("reset", "503", "cut", "500", "lost_answer")
    proxy.clear()
    proxy.plan(
        *(Fault(kind, path=".tar", method="GET", after_bytes=700, first=n) for n, kind in enumerate(kinds, start=1))
    )
    assert batches() == undisturbed
    assert {seen.fault for seen in proxy.seen} == {*kinds, ""}
    if workers:
        return

    proxy.clear()
    proxy.plan(Fault("short_range", path=".tar", method="GET", after_bytes=700, first=4, times=9999))
    loader = iter(build_loader(config, seed=3, micro_batch_size=4, rank=0, world_size=1))
    came = []
    with pytest.raises(DataError, match=rf"{url}/s-00000\d.tar: the store gave 700 bytes"):
        came += [batch.captions for batch in loader]
    assert came == [captions for _, captions, _ in undisturbed[: len(came)]]
    proxy.clear()
    open_store(url).delete("s-000001.tar")
    with pytest.raises(DataError, match=f"{url}/s-000001.tar: no such "):
        batches()
