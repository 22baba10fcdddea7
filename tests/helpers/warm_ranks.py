"""The darkroom command and its ranks as forks of one process that has imported everything, once per test session.

A command starts in milliseconds instead of the ten seconds that torch, DeepSpeed and transformers take to import. The
command, its `spawn` and its ranks run as they always do; only `subprocess.Popen` under `spawn` is replaced, by a fork
that runs the same command line. What a fork could do differently is kept away: it is made while this process has one
thread and no process group, and the child gets its own environment, session, signal handlers and standard streams.
(What remains shared is the seed of str hashes.) Ranks are CPU processes here, on any machine.

    darkroom(...)      as tests.helpers.command.darkroom, which starts a cold one
    start(...)         the same, without waiting for its end
    run_ranks(...)     another script of this repository on several ranks
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

from tests.helpers.command import DYING, ROOT, Result

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# What runs import, sooner or later; a fork imports the rest when it needs it.
MODULES = (
    *("setuptools", "deepspeed", "deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer"),
    "deepspeed.runtime.zero.muon.muon_optimizer",  # torch's compiler, 5 s, which nothing here uses
    *("accelerate.tracking", "torch.utils.tensorboard", "open_clip", "boto3"),
    *("transformers.models.t5.modeling_t5", "transformers.models.t5.tokenization_t5"),
    *("launch.cli", "training.train_dit", "training.train_autoencoder", "training.encode", "training.dry_run"),
)


# --- in the tests -------------------------------------------------------------------------------------------------


class Command:
    """A command that was started."""

    def __init__(self, pid: int, reply: socket.socket, out: IO[bytes], err: IO[bytes]) -> None:
        self.pid = pid
        self._reply, self._out, self._err = reply, out, err

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def output(self) -> tuple[str, str]:
        """What it has written so far to stdout and stderr."""
        texts = []
        for file in (self._out, self._err):
            size = os.fstat(file.fileno()).st_size
            texts.append(os.pread(file.fileno(), size, 0).decode())  # without moving the offset, which it shares
        return texts[0], texts[1]

    def wait(self, timeout_s: float = 300) -> Result:
        """Waits for its end; kills it, with its ranks, when that does not come.

        Raises:
            TimeoutError: with what it wrote.
        """
        self._reply.settimeout(timeout_s)
        try:
            code = int(_receive(self._reply))
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                self.send_signal(signal.SIGKILL)  # its ranks die with it
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"no end after {timeout_s} s: {self.output()}") from None
            raise
        result = Result(code, *self.output())
        for end in (self._reply, self._out, self._err):
            end.close()
        return result


class _Server:
    """The warm process, as the tests see it. It ends when this end of its socket is closed."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  as long-lived as this object
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.warm_ranks", str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **NO_GPU},
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
        atexit.register(self.close)

    def close(self) -> None:
        self.control.close()
        self._process.wait()

    def start(self, argv: Sequence[str], env: Mapping[str, str]) -> Command:
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  closed by Command.wait
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"argv": argv, "env": dict(env), "cwd": os.getcwd()}
        with theirs:
            fds = [theirs.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(self.control, [json.dumps(request).encode()], fds)
        mine.settimeout(300)  # the first command waits for the imports
        try:
            return Command(int(_receive(mine)), mine, out, err)
        except EOFError:
            self._log.seek(0)
            raise RuntimeError(f"the warm process refused or is gone:\n{self._log.read().decode()[-3000:]}") from None


_server: _Server | None = None
_lock = threading.Lock()


def start(*arguments: object, die: str = "", env: Mapping[str, str] | None = None, script: Path = DYING) -> Command:
    """Starts `darkroom ARGUMENTS`, or another Python script, as a process of its own."""
    global _server
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **NO_GPU, **(env or {})}
    environment["DARKROOM_TEST_DIE"] = die
    with _lock:
        if _server is None:
            _server = _Server()
        return _server.start([sys.executable, str(script), *map(str, arguments)], environment)


def darkroom(*arguments: object, die: str = "", env: Mapping[str, str] | None = None) -> Result:
    """`darkroom ARGUMENTS`; `die` makes a rank kill itself (see dying_darkroom.py)."""
    return start(*arguments, die=die, env=env).wait()


def start_ranks(nproc: int, script: Path, *arguments: object) -> Command:
    """Starts a command that runs `script ARGUMENTS` on ranks, by `spawn`."""
    return start("spawn", nproc, script, *arguments, script=Path(__file__))


def run_ranks(nproc: int, script: Path, *arguments: object) -> Result:
    """The same, to its end."""
    return start_ranks(nproc, script, *arguments).wait()


# --- in the warm process and its forks ----------------------------------------------------------------------------


class Forked:
    """What `launch.runtime` uses of subprocess.Popen. `argv` is [interpreter, script, arguments…]."""

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        start_new_session: bool,
        preexec_fn: Callable[[], None] | None,
    ) -> None:
        refuse_unless_alone()
        self.returncode: int | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the handlers are the parent's yet
        self.pid = os.fork()
        if self.pid == 0:
            _run(argv, env, start_new_session, preexec_fn, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        code = self._reap(0)
        assert code is not None
        return code

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def refuse_unless_alone() -> None:
    """Raises unless this process may fork: other threads and connections do not survive it, their locks do."""
    import torch

    threads = len(os.listdir("/proc/self/task"))
    if threads != 1 or threading.active_count() != 1:
        raise RuntimeError(f"{threads} threads before a fork: {threading.enumerate()}; one may be")
    if torch.distributed.is_initialized() or torch.cuda.is_initialized():
        raise RuntimeError("a process group or a GPU is in use before a fork")


def _run(
    argv: Sequence[str],
    env: Mapping[str, str],
    start_new_session: bool,
    preexec_fn: Callable[[], None] | None,
    mask: Any,
) -> NoReturn:
    """The child: becomes what the interpreter would be after exec of `argv`, runs it and ends."""
    code = 1
    try:
        if start_new_session:
            os.setsid()
        if preexec_fn:
            preexec_fn()
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.clear()
        os.environ.update(env)
        sys.argv, sys.orig_argv[:] = list(argv[1:]), list(argv)
        runpy.run_path(argv[1], run_name="__main__")
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # never up the stack: the frames there are the parent's


def _serve(control: socket.socket) -> None:
    import deepspeed.ops
    from PIL import Image

    from launch import runtime

    for name in MODULES:
        importlib.import_module(name)
    Image.init()
    deepspeed.ops.__compatible_ops__  # noqa: B018  it looks by compiling
    runtime.subprocess = SimpleNamespace(Popen=Forked)  # type: ignore[attr-defined, assignment]
    gc.collect()
    gc.freeze()  # a child's collection need not touch, and so copy, what all share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    while True:
        request, fds, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not request:
            return
        refuse_unless_alone()
        die_with_parent = runtime._die_with_parent(os.getpid())
        if os.fork() == 0:
            try:
                die_with_parent()  # type: ignore[misc]
                control.close()
                _supervise(json.loads(request), *fds)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        for fd in fds:
            os.close(fd)


def _supervise(request: dict[str, Any], reply_fd: int, out: int, err: int) -> None:
    """Starts the command and tells the test its process and, at its end, the exit code."""
    from launch.runtime import _die_with_parent

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with_parent = _die_with_parent(os.getpid())

    def before_it_runs() -> None:
        die_with_parent()  # type: ignore[misc]
        os.close(reply_fd)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        os.chdir(request["cwd"])

    with socket.socket(fileno=reply_fd) as reply:
        command = Forked(request["argv"], request["env"], True, before_it_runs)
        reply.send(str(command.pid).encode())
        reply.send(str(command.wait()).encode())


def _receive(end: socket.socket) -> bytes:
    data = end.recv(64)
    if not data:
        raise EOFError("the other end is gone")
    return data


if __name__ == "__main__":
    if sys.argv[1] == "spawn":
        from launch.runtime import spawn

        sys.exit(spawn(int(sys.argv[2]), [sys.executable, *sys.argv[3:]]))
    with socket.socket(fileno=int(sys.argv[1])) as end:
        _serve(end)
