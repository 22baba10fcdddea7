"""Real S3 servers on the loopback: moto (semantics, fast) and OpenStack Swift with s3api (signatures, integrity).

moto accepts any credentials and any checksum; Swift checks both, and starts four processes, which takes seconds.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

SWIFT_KEY_ID, SWIFT_SECRET = "lab:tester", "canary-swift-secret"
SWIFT_PAGE_KEYS = 20  # keys per page of a listing, so that few objects fill several
_START_S = 60.0


@contextmanager
def moto_server() -> Iterator[str]:
    """Yields the address of an empty moto server."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def use_endpoint(
    monkeypatch: pytest.MonkeyPatch, url: str, key_id: str = "canary-key-id", secret: str = "canary-secret"
) -> None:
    """Points the AWS environment at a server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)


@contextmanager
def swift_server() -> Iterator[str]:
    """Yields the address of an empty Swift, reached with SWIFT_KEY_ID and SWIFT_SECRET; skips where it cannot run."""
    pytest.importorskip("swift")
    with ExitStack() as stack:
        folder = _folder_with_xattr()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        ports = _free_ports("proxy", "account", "container", "object")
        _configure(folder, ports)
        build = [sys.executable, "-c", _RINGS, str(folder), *(f"{name}={port}" for name, port in ports.items())]
        subprocess.run(build, check=True, capture_output=True, timeout=_START_S)
        for name in ("account", "container", "object", "proxy"):
            stack.enter_context(_daemon(folder, name))
        for name, port in ports.items():
            _wait_for(port, folder / f"{name}.log")
        yield f"http://127.0.0.1:{ports['proxy']}"


def _folder_with_xattr() -> Path:
    """Swift keeps metadata in extended attributes, which not every file system has."""
    for parent in dict.fromkeys((tempfile.gettempdir(), "/var/tmp", "/dev/shm", os.getcwd())):
        try:
            folder = Path(tempfile.mkdtemp(prefix="darkroom-swift-", dir=parent))
        except OSError:
            continue
        try:
            os.setxattr(folder, "user.swift", b"x" * 1024)
            return folder
        except (OSError, AttributeError):
            folder.rmdir()
    pytest.skip("Swift needs a folder with extended attributes; neither /tmp, /var/tmp nor /dev/shm has them")


_RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *ports = sys.argv[1:]
for name, _, port in (item.partition("=") for item in ports):
    builder = RingBuilder(2, 1, 0)
    builder.add_dev(dict(region=1, zone=1, ip="127.0.0.1", port=int(port), device="disk", weight=1))
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{name}.ring.gz")
"""

_PROXY = f"""
[pipeline:main]
pipeline = catch_errors gatekeeper s3api tempauth bulk slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:tempauth]
use = egg:swift#tempauth
user_{SWIFT_KEY_ID.replace(":", "_")} = {SWIFT_SECRET} .admin
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
max_bucket_listing = {SWIFT_PAGE_KEYS}
min_segment_size = 1024
"""


def _configure(folder: Path, ports: dict[str, int]) -> None:
    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = a\nswift_hash_path_prefix = b\n")
    user = pwd.getpwuid(os.getuid()).pw_name
    for name, port in ports.items():
        common = {"bind_ip": "127.0.0.1", "bind_port": port, "user": user, "workers": 0, "swift_dir": folder}
        common |= {"devices": folder / "devices", "mount_check": "false", "fallocate_reserve": 0}
        text = "[DEFAULT]\n" + "".join(f"{key} = {value}\n" for key, value in common.items())
        server = f"[pipeline:main]\npipeline = {name}-server\n[app:{name}-server]\nuse = egg:swift#{name}\n"
        (folder / f"{name}.conf").write_text(text + (_PROXY if name == "proxy" else server))


def _free_ports(*names: str) -> dict[str, int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return {name: held.getsockname()[1] for name, held in zip(names, sockets, strict=True)}


@contextmanager
def _daemon(folder: Path, name: str) -> Iterator[None]:
    command = [str(Path(sys.executable).parent / f"swift-{name}-server"), str(folder / f"{name}.conf"), "-v"]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(port: int, log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"Swift did not start: {log.read_text(errors='replace')[-2000:]}")
