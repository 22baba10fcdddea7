"""Processes of a run on this machine: starting the ranks, passing on signals, ending them all when one fails.

Every rank is the same command with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its
environment, the names that torch, accelerate, torchrun and SLURM wrappers agree on; so a run started by any of those
works alike.
"""

import contextlib
import ctypes
import glob
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from launch.errors import ConfigError

ERROR_DIR_VARIABLE = "DARKROOM_ERROR_DIR"
EXIT_PREEMPTED = 75  # stopped by a signal and saved: the scheduler may requeue
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)
_POLL_S = 0.05
_VERDICT_S = 5.0  # for which a rank that lost its connection waits to hear whether another one died
_LOST = ("onnection", "Broken pipe", "NCCL", "peer")  # words of gloo and NCCL when a rank is gone
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who this process is among the processes of the run."""

    rank: int  # 0 … world_size − 1 over all nodes
    local_rank: int  # 0 … on this node; the index of its GPU
    world_size: int  # processes of the run


def ranks() -> Ranks:
    """This process's ranks from the environment; a process started alone is rank 0 of 1.

    Raises:
        ConfigError: a variable is not a number, or the rank is outside the world.
    """
    values = {}
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not text.isdigit():
            raise ConfigError(f"environment variable {name} is {text!r}, expected a number; unset it or correct it")
        values[name] = int(text)
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise ConfigError(
            f"environment variable RANK is {values['RANK']} in a world of {values['WORLD_SIZE']}; ranks count from 0"
        )
    return Ranks(rank=values["RANK"], local_rank=values["LOCAL_RANK"], world_size=values["WORLD_SIZE"])


def is_rank_process() -> bool:
    """Whether something has already started this process as one rank of a run."""
    return "RANK" in os.environ


def gpu_count() -> int:
    """CUDA devices that this process may use, without loading torch or touching a device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    if visible is None:
        return devices
    return min(devices, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def core_count() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A TCP port that is free on 127.0.0.1 at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def report_error(error: BaseException) -> None:
    """Says in one line why the process ends: to the parent when it has asked for it, else on stderr.

    All ranks usually meet the same mistake; the parent prints each distinct line once.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    line = message if getattr(error, "exit_code", 1) == EXIT_PREEMPTED else f"error: {message}"
    folder = os.environ.get(ERROR_DIR_VARIABLE)
    if folder and is_rank_process():
        with contextlib.suppress(OSError):
            Path(folder, f"rank-{os.environ['RANK']}.txt").write_text(line, encoding="utf-8")
            return
    print(line, file=sys.stderr, flush=True)


def report_crash(error: BaseException) -> None:
    """Writes the traceback of a bug to stderr before anything follows from this rank's end, then its line."""
    traceback.print_exception(error)
    sys.stderr.flush()
    who = f"rank {os.environ['RANK']}: " if is_rank_process() else ""
    report_error(RuntimeError(f"{who}{type(error).__name__}: {error}"))


def other_rank_reported() -> bool:
    """Has another rank of this run said why it ends, or been found dead? Then a lost connection follows from that."""
    folder = os.environ.get(ERROR_DIR_VARIABLE)
    if not folder or not is_rank_process():
        return False
    return any(path.name != f"rank-{os.environ['RANK']}.txt" for path in Path(folder).glob("*.txt"))


def follows_from_another(error: BaseException) -> bool:
    """Is this error what another rank's end, or its own error, brings about here?

    A rank that was killed says nothing: its peers learn of it first, the parent a moment later.
    """
    deadline = time.monotonic() + (_VERDICT_S if any(word in str(error) for word in _LOST) else 0)
    while not other_rank_reported():
        if time.monotonic() >= deadline or ERROR_DIR_VARIABLE not in os.environ:
            return False
        time.sleep(_POLL_S)
    return True


def leave_when_preempted() -> None:
    """SIGTERM and SIGUSR1 end this process at once with its line and code 75, where no `PreemptionFlag` is at work.

    Before the first step and behind the last one there is nothing to save, and what is being written is whole or does
    not count: the same command goes on.
    """

    process = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a reader process that was forked
            os._exit(128 + number)
        if not other_rank_reported():  # else the parent ends us, because of that rank
            report_error(_Left(_left(signal.Signals(number).name)))
        os._exit(EXIT_PREEMPTED)

    for number in _PREEMPTING:
        signal.signal(number, leave)


class _Left(Exception):
    exit_code = EXIT_PREEMPTED


def _left(name: str) -> str:
    return f"preempted by {name} outside of the training steps: what is saved stays; the same command goes on"


class PreemptionFlag:
    """Turns SIGTERM and SIGUSR1 into a flag that the training loop asks between steps.

    A context manager for the main thread: the handlers of before come back at the end. Further signals change nothing,
    so a second one during the save is harmless.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> Self:
        for number in _PREEMPTING:
            self._before[number] = signal.signal(number, self._set)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name


def become_single_rank() -> None:
    """Gives this process the environment of a run's only rank, as `spawn` would."""
    os.environ.update(_environments(1, os.environ, "")[0])


def spawn(nproc: int, argv: Sequence[str], env: Mapping[str, str] | None = None, *, grace_s: float = 10.0) -> int:
    """Runs `argv` as ranks 0 … nproc − 1 of one run on this machine and waits for all of them.

    SIGTERM, SIGINT and SIGUSR1 are passed on to every rank (a second SIGINT kills). When a rank ends badly, the others
    get SIGTERM and, after `grace_s`, SIGKILL. When this process dies, whatever the cause, so do the ranks (Linux).

    Args:
        nproc: processes, at least 1.
        argv: the command; the ranks are told apart by their environment.
        env: the environment to add to; None = this process's own. Existing OMP_NUM_THREADS and DS_ACCELERATOR stay.
        grace_s: seconds between SIGTERM and SIGKILL.

    Returns:
        0 if every rank returned 0, else the exit code of the first to end badly (128 + n if signal n killed it).
    """
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc} must be at least 1")
    with tempfile.TemporaryDirectory(prefix="darkroom-") as error_dir:
        group = _Group(grace_s, Path(error_dir))
        with group.forwarding():
            try:
                for rank_env in _environments(nproc, os.environ if env is None else env, error_dir):
                    group.start(argv, rank_env)
                code = group.wait()
            finally:
                group.kill()
        said = _print_errors(error_dir)
        if code and not said and group.verdict:
            print(group.verdict, file=sys.stderr, flush=True)
    return code


def run_command(argv: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Runs one command, which ends when this process does and gets its SIGTERM, SIGINT and SIGUSR1.

    Returns its exit code (128 + n if signal n killed it).
    """
    group = _Group(grace_s=10.0)
    with group.forwarding():
        try:
            group.start(argv, os.environ if env is None else env)
            return group.wait()
        finally:
            group.kill()


def _environments(nproc: int, base: Mapping[str, str], error_dir: str) -> list[dict[str, str]]:
    common = dict(base)
    common.setdefault("OMP_NUM_THREADS", str(max(1, core_count() // nproc)))  # or the ranks fight for the cores
    if gpu_count() == 0:
        common.setdefault("DS_ACCELERATOR", "cpu")
    common |= {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    if error_dir:
        common[ERROR_DIR_VARIABLE] = error_dir
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]


def _print_errors(error_dir: str) -> bool:
    paths = sorted(Path(error_dir).glob("rank-*.txt"), key=lambda path: int(path.stem.partition("-")[2]))
    lines = [path.read_text(encoding="utf-8") for path in paths]
    for line in dict.fromkeys(lines):
        print(line, file=sys.stderr, flush=True)
    return bool(lines)


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs before its command, so that even a SIGKILLed parent leaves no orphans. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork
    parent = os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died between the fork and here
            os._exit(1)

    return arm


class _Group:
    """The ranks' processes. Each leads its own session, so that a terminal's Ctrl-C reaches them through us only."""

    def __init__(self, grace_s: float, error_dir: Path | None = None) -> None:
        self.verdict = ""  # why the run ended badly, in words
        self._error_dir = error_dir
        self._grace_s = grace_s
        self._children: list[subprocess.Popen[bytes]] = []
        self._received: list[int] = []

    @contextlib.contextmanager
    def forwarding(self):  # type: ignore[no-untyped-def]
        before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and number in self._received
        self._received.append(number)
        for child in self._children:
            _send(child, signal.SIGKILL if again else number)

    def start(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        child = subprocess.Popen(list(argv), env=dict(env), start_new_session=True, preexec_fn=_die_with_parent())
        self._children.append(child)
        for number in self._received:  # a signal that came while the ranks were being started
            _send(child, number)

    def wait(self) -> int:
        """Waits for all ranks; ends the others when one ends badly. Returns the run's exit code."""
        while True:
            codes = [child.poll() for child in self._children]
            bad = [rank for rank, code in enumerate(codes) if code]
            if bad:
                # Among ranks that ended within one poll, the one that was killed or refused its input came first: the
                # others' errors (a lost connection) follow from it.
                first = min(bad, key=lambda rank: (codes[rank] > 0, codes[rank] != 2, rank))  # type: ignore[operator]
                return self._ended_badly(first, codes[first] or 0)
            if all(code == 0 for code in codes):
                return 0
            time.sleep(_POLL_S)

    def _ended_badly(self, rank: int, code: int) -> int:
        if self._error_dir is not None:  # before the others give their lost connections for the cause
            (self._error_dir / "verdict.txt").write_text(f"rank {rank} ended with {code}", encoding="utf-8")
        self._end_others()
        if code < 0:
            code = 128 - code
            number = signal.Signals(code - 128)
            hint = " (out of memory?)" if number == signal.SIGKILL else ""
            if number in self._received and number in _PREEMPTING:  # so early that the rank could not say it
                self.verdict = _left(number.name)
                return EXIT_PREEMPTED
            self.verdict = f"error: rank {rank} was killed by {number.name}{hint}; the run was stopped"
        if signal.SIGINT in self._received:
            self.verdict = "interrupted: what is saved stays; the same command goes on from there"
        return code

    def _end_others(self) -> None:
        running = [child for child in self._children if child.poll() is None]
        for child in running:
            _send(child, signal.SIGTERM)
        deadline = time.monotonic() + self._grace_s
        while any(child.poll() is None for child in running) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """Ends what is left, with the processes that the ranks started themselves, and reaps the ranks."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _send(child: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)
