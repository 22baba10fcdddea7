"""What the tests of store faults share, besides the fixtures in store_fixtures.py."""

import random
from collections.abc import Callable

import pytest

from data.errors import DataError
from data.object_store import S3Store
from tests.helpers.fault_proxy import FaultProxy

CONTENT = random.Random(0).randbytes(300_000)


class Clock:
    """Stands in for the time module: waiting costs nothing and is written down."""

    def __init__(self) -> None:
        self.now = 1.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)


def read(store: S3Store, start: int = 0, length: int | None = None) -> bytes:
    with store.open_range("x", start, length) as file:
        return file.read()


def starts(proxy: FaultProxy) -> list[int]:
    """Where the ranged reads of "x" began."""
    return [int(text.removeprefix("bytes=").partition("-")[0]) for text in proxy.ranges("/p/x")]


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.startswith("s3://") and "; " in text and "canary" not in text
    return text
