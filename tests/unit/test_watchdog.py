"""The watchdog of a single rank, and its words for many."""

import threading
from pathlib import Path

import pytest

from training.watchdog import Place, Watchdog, hang_message


def test_a_rank_without_progress_leaves_its_stacks_and_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    watchdog = Watchdog(tmp_path, rank=0, world_size=1, timeout_s=0.2, end=end)  # type: ignore[arg-type]
    with watchdog:
        watchdog.mark("data", 7)
        watchdog.mark("data", 8)
        assert ended.wait(timeout=60)
    assert codes == [1]
    stacks = (tmp_path / "stacks-0.txt").read_text()
    assert stacks.startswith("rank 0, pid ") and "in 'data' of step 8" in stacks
    assert "test_a_rank_without_progress_leaves_its_stacks_and_ends" in stacks
    said = capfd.readouterr().err
    assert stacks in said
    assert said.endswith(
        "error: no progress for 0.2 s: rank 0 hangs in 'data' of step 8; stacks of all threads: "
        f"{tmp_path}/stacks-*.txt\n"
    )


def test_no_timeout_is_no_watch(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watchdog(tmp_path, rank=0, world_size=1, timeout_s=0) as watchdog:
        watchdog.mark("data", 1)
        assert threading.active_count() == before
    watchdog.stop()


def test_what_is_slow_by_nature_may_take_longer(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, rank=0, world_size=1, timeout_s=10)
    allowed = []
    for phase, step in (("data", 5), ("backward", None), ("data", 6), ("backward", None), ("save", None)):
        watchdog.mark(phase, step)
        allowed.append(watchdog._allowed_s())
    assert allowed == [40, 40, 10, 10, 40]


def test_the_rank_that_is_behind_is_named_and_not_those_that_wait() -> None:
    data, backward = Place(11, 4, "data"), Place(12, 4, "backward")
    assert hang_message({0: backward, 1: data, 2: backward}, set(), 60) == (
        "no progress for 60 s: rank 1 hangs in 'data' of step 4; ranks 0, 2 wait in 'backward' of step 4"
    )
    assert hang_message({0: data, 1: data}, set(), 60) == "no progress for 60 s: ranks 0, 1 hang in 'data' of step 4"


def test_a_rank_that_has_gone_silent_is_named_first() -> None:
    """Its process is stopped: it may well have come as far as the others."""
    place = Place(12, 4, "backward")
    assert hang_message({0: place, 1: place}, {1}, 60) == (
        "no progress for 60 s: rank 1 does not answer (stopped, or the machine is lost) in 'backward' of step 4; "
        "rank 0 waits in 'backward' of step 4"
    )
    assert hang_message({1: place}, {0}, 60) == (
        "no progress for 60 s: rank 0 does not answer (stopped, or the machine is lost); rank 1 waits in 'backward' of "
        "step 4"
    )
