"""Ends a run in which a rank makes no progress, and says which rank that is. See docs/faults.md.

A thread on every rank looks at what the loop last marked and publishes it in the key-value store through which the
ranks met. No collective: those are what hangs. The first rank whose time is up reads what all others published, so that
its message names the rank that is behind and not those that wait for it; every rank then writes its stacks and ends.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, Self, TypeVar

import torch.distributed as dist

from launch.runtime import report_error

# Phases of a step may take the time-out; what happens once, or waits for a store, may take longer.
BRIEF = ("data", "forward", "backward", "update", "row")
PATIENCE = 4.0  # times the time-out for the other phases, and for the whole first step, in which kernels are built
LOOKS = 20  # looks per time-out
LONGEST_LOOK_S = 10.0
LEAST_ANSWER_S = 5.0  # that the store and the other ranks are given for an answer
_KEY = "darkroom/watchdog"
T = TypeVar("T")


class Place(NamedTuple):
    """How far a rank has come."""

    marks: int  # since the watch began; all ranks make the same ones
    step: int  # from 1, as rows count
    phase: str


def hang_message(places: dict[int, Place], silent: set[int], timeout_s: float) -> str:
    """Names the ranks that are behind.

    Args:
        places: of the ranks that are known of, among them the one that asks.
        silent: ranks that do not publish, or no longer.
        timeout_s: the time-out.
    """
    if silent:
        lost = sorted(silent)
        told = f"{_ranks(lost, 'does', 'do')} not answer (stopped, or the machine is lost)"
    else:
        least = min(place.marks for place in places.values())
        lost = sorted(rank for rank, place in places.items() if place.marks == least)
        told = _ranks(lost, "hangs", "hang")
    if last := [places[rank] for rank in lost if rank in places]:
        told += f" in {last[0].phase!r} of step {last[0].step}"
    waiting = sorted(places.keys() - set(lost))
    if waiting:
        place = places[waiting[0]]
        told += f"; {_ranks(waiting, 'waits', 'wait')} in {place.phase!r} of step {place.step}"
    return f"no progress for {timeout_s:g} s: {told}"


def _ranks(numbers: list[int], one: str, many: str) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]} {one}"
    return (
        f"ranks {', '.join(map(str, numbers[:8]))}" + f" and {len(numbers) - 8} more" * (len(numbers) > 8) + f" {many}"
    )


class Watchdog:
    """Watches this rank from entering the context to leaving it, or `stop`.

    Args:
        directory: of the run; stacks-RANK.txt is written there.
        rank: this rank.
        world_size: number of ranks.
        timeout_s: seconds without a mark after which the run is ended; 0 = no watch.
        end: ends the process.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        timeout_s: float,
        end: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self._directory, self._rank, self._world_size = directory, rank, world_size
        self._timeout_s, self._end = timeout_s, end
        self._look_s = min(timeout_s / LOOKS, LONGEST_LOOK_S)
        self._patience_s = max(5 * self._look_s, LEAST_ANSWER_S)  # with the store and the other ranks
        self._place, self._since_s = Place(0, 0, "start"), time.monotonic()
        self._first_step: int | None = None
        self._beats = 0
        self._store: dist.Store | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def mark(self, phase: str, step: int | None = None) -> None:
        """The loop goes on to a phase, of the same step if none is given. Every rank makes the same marks."""
        marks, before, _ = self._place
        self._place = Place(marks + 1, before if step is None else step, phase)
        if self._first_step is None and step is not None:
            self._first_step = step
        self._since_s = time.monotonic()

    def __enter__(self) -> Self:
        if self._timeout_s > 0:
            self._since_s = time.monotonic()
            self._store = _connect(self._world_size)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the watch; may be called again."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    # -- the thread -------------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        while not self._stopped.wait(self._look_s):
            # Should the interpreter itself be blocked, so that this thread cannot run, a thread of C ends the process.
            with contextlib.suppress(ValueError, OSError, AttributeError):  # no real stderr
                faulthandler.dump_traceback_later(2 * PATIENCE * self._timeout_s, exit=True, file=sys.stderr)
            told = self._exchange()
            if told is None and time.monotonic() - self._since_s > self._allowed_s():
                told = self._find_out()
            if told is not None and not self._stopped.is_set():
                self._give_up(told)
                return

    def _allowed_s(self) -> float:
        brief = self._place.phase in BRIEF and self._place.step != self._first_step
        return self._timeout_s if brief else PATIENCE * self._timeout_s

    def _ask(self, question: Callable[[dist.Store], T]) -> T | None:
        """The store's answer, or None if there is none for long."""
        if (store := self._store) is None:
            return None
        answer = _within(self._patience_s, lambda: question(store))
        if answer is None:
            self._store = None  # a call that is stuck blocks all that come after it
        return answer

    def _exchange(self) -> str | None:
        """Publishes where this rank is; returns what another has found out, if it has."""
        self._beats += 1
        mine = json.dumps([self._beats, *self._place])

        def question(store: dist.Store) -> str:
            store.set(f"{_KEY}/{self._rank}", mine)
            return store.get(f"{_KEY}/hang").decode() if store.check([f"{_KEY}/hang"]) else ""

        return self._ask(question) or None

    def _read(self) -> dict[int, list[Any]]:
        """(beats, marks, step, phase) of every rank that has published."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]

        def question(store: dist.Store) -> dict[int, list[Any]]:
            there = [rank for rank in others if store.check([f"{_KEY}/{rank}"])]
            return {rank: json.loads(store.get(f"{_KEY}/{rank}")) for rank in there}

        return self._ask(question) or {}

    def _silent(self, before: dict[int, list[Any]], after: dict[int, list[Any]]) -> set[int]:
        """Other ranks that have published nothing, or nothing since `before`."""
        others = set(range(self._world_size)) - {self._rank}
        return {rank for rank in others if rank not in after or after[rank][0] == before.get(rank, [None])[0]}

    def _find_out(self) -> str | None:
        """Who is behind, in the words of the first rank that asked; None if this rank has gone on meanwhile."""
        mine = self._place
        if self._store is None:  # once more: it may have been slow
            self._store = _within(self._patience_s, lambda: _connect(self._world_size))
        before = after = self._read()
        deadline = time.monotonic() + self._patience_s
        while self._silent(before, after) and time.monotonic() < deadline:
            if self._stopped.wait(self._look_s):
                return None
            if told := self._exchange():  # publishes: the others may be asking, too
                return told
            after = self._read()  # every watchdog that lives will have published again
        if self._place.marks != mine.marks:
            return None
        if self._store is None and self._world_size > 1:  # it lives in rank 0
            return hang_message({self._rank: mine}, {0}, self._allowed_s())
        places = {rank: Place(*place) for rank, (_, *place) in after.items()} | {self._rank: mine}
        told = hang_message(places, self._silent(before, after), self._allowed_s())
        return self._ask(lambda store: store.compare_set(f"{_KEY}/hang", "", told).decode()) or told

    def _give_up(self, told: str) -> None:
        path = self._directory / f"stacks-{self._rank}.txt"
        line = f"rank {self._rank}, pid {os.getpid()}, in {self._place.phase!r} of step {self._place.step}: {told}"
        try:
            with path.open("a+", encoding="utf-8") as file:
                start = file.tell()
                _dump(file, line)
                file.seek(start)
                print(file.read(), file=sys.stderr, flush=True)  # at once: those of two ranks do not mix
        except OSError:  # a full disk
            _dump(sys.stderr, line)
        self._ask(lambda store: store.add(f"{_KEY}/written", 1))
        deadline = time.monotonic() + self._patience_s  # all ranks' stacks are written before the launcher ends any
        while (self._ask(lambda store: store.add(f"{_KEY}/written", 0)) or self._world_size) < self._world_size:
            if time.monotonic() > deadline:
                break
            time.sleep(self._look_s / 10)
        report_error(RuntimeError(f"{told}; stacks of all threads: {self._directory}/stacks-*.txt"))
        if self._rank == 0 and self._world_size > 1:
            time.sleep(self._look_s)  # the store lives here: the others leave first
        self._end(1)


def _within(seconds: float, question: Callable[[], T]) -> T | None:
    """The answer, or None if it takes longer or fails: a call to the store of a stopped process never returns."""
    answers: list[T] = []

    def wait() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(question())

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _dump(file: IO[str], line: str) -> None:
    file.write(f"{line}\n")
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    file.write("\n")
    file.flush()


def _connect(world_size: int) -> dist.Store | None:
    """A connection of this thread's own: one that a collective waits on is locked."""
    if world_size == 1:
        return None
    try:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
        )
    except (RuntimeError, KeyError, ValueError):  # ranks that met in another way; each then speaks for itself
        return None
