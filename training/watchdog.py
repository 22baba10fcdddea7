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
from typing import IO, Any, NamedTuple, NoReturn, Self

import torch.distributed as dist

from launch.runtime import report_error

# Phases of a step may take the time-out; what happens once, or waits for a store, may take longer.
BRIEF = ("data", "forward", "backward", "update", "row")
PATIENCE = 4.0  # times the time-out for the other phases, and for the whole first step, in which kernels are built
LOOKS = 20  # looks per time-out
LONGEST_LOOK_S = 10.0
_KEY = "darkroom/watchdog"


class Place(NamedTuple):
    """How far a rank has come."""

    marks: int  # since the watch began; all ranks make the same ones
    step: int  # from 1, as rows count
    phase: str


def hang_message(places: list[Place | None], silent: list[int], timeout_s: float) -> str:
    """Names the ranks that are behind.

    Args:
        places: by rank; None where nothing is known.
        silent: ranks that have ceased to publish.
        timeout_s: the time-out.
    """
    known = {rank: place for rank, place in enumerate(places) if place is not None}
    lost = sorted({*silent, *(set(range(len(places))) - set(known))})
    if lost:
        told = f"{_ranks(lost, 'does', 'do')} not answer (stopped, or the machine is lost)"
    else:
        least = min(place.marks for place in known.values())
        lost = [rank for rank, place in known.items() if place.marks == least]
        told = _ranks(lost, "hangs", "hang")
    if last := [known[rank] for rank in lost if rank in known]:
        told += f" in {last[0].phase!r} of step {last[0].step}"
    waiting = [rank for rank in known if rank not in lost]
    if waiting:
        place = known[waiting[0]]
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
            self._publish()
            told = self._told_by_another()
            if told is None and time.monotonic() - self._since_s > self._allowed_s():
                told = self._find_out()
            if told is not None and not self._stopped.is_set():
                self._give_up(told)
                return

    def _allowed_s(self) -> float:
        brief = self._place.phase in BRIEF and self._place.step != self._first_step
        return self._timeout_s if brief else PATIENCE * self._timeout_s

    def _publish(self) -> None:
        self._beats += 1
        with contextlib.suppress(RuntimeError):  # a store that is gone is found when it is needed
            if self._store is not None:
                self._store.set(f"{_KEY}/{self._rank}", json.dumps([self._beats, *self._place]))

    def _read(self) -> dict[int, list[Any]]:
        """(beats, marks, step, phase) of every rank that has published."""
        found = {self._rank: [self._beats, *self._place]}
        with contextlib.suppress(RuntimeError):
            for rank in range(self._world_size):
                if self._store is not None and rank != self._rank and self._store.check([f"{_KEY}/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"{_KEY}/{rank}"))
        return found

    def _find_out(self) -> str | None:
        """Who is behind, in the words of the first rank that asked; None if this rank has gone on meanwhile."""
        marks, before = self._place.marks, self._read()
        self._stopped.wait(3 * self._look_s)  # in which every watchdog that lives publishes again
        after = self._read()
        if self._place.marks != marks:
            return None
        silent = [
            rank for rank, (beats, *_) in after.items() if rank != self._rank and before.get(rank, [None])[0] == beats
        ]
        places = [Place(*after[rank][1:]) if rank in after else None for rank in range(self._world_size)]
        told = hang_message(places, silent, self._allowed_s())
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                return self._store.compare_set(f"{_KEY}/hang", "", told).decode() or told
        return told

    def _told_by_another(self) -> str | None:
        with contextlib.suppress(RuntimeError):
            if self._store is not None and self._store.check([f"{_KEY}/hang"]):
                return self._store.get(f"{_KEY}/hang").decode()
        return None

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
        with contextlib.suppress(RuntimeError):  # all ranks' stacks are written before the launcher ends any of them
            if self._store is not None:
                self._store.add(f"{_KEY}/written", 1)
                deadline = time.monotonic() + 5 * self._look_s
                while self._store.add(f"{_KEY}/written", 0) < self._world_size and time.monotonic() < deadline:
                    time.sleep(self._look_s / 10)
        report_error(RuntimeError(f"{told}; stacks of all threads: {self._directory}/stacks-*.txt"))
        self._end(1)


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
