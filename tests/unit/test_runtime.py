"""Ranks as real processes: environment, signals, failures, no orphans."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.runtime import PreemptionFlag, Ranks, core_count, gpu_count, ranks, report_error, spawn

ROOT = Path(__file__).parents[2]
PROLOGUE = """import os, sys, signal, time
RANK = int(os.environ["RANK"])
def say(text): os.write(1, (text + "\\n").encode())  # one write: lines of two ranks never mix
"""


def rank_program(body: str) -> list[str]:
    """A command that runs `body` with the names of PROLOGUE at hand."""
    return [sys.executable, "-c", f"{PROLOGUE}{body}"]


def start_parent(body: str, folder: Path) -> "subprocess.Popen[str]":
    """A parent process that spawns two ranks running `body`; its pipe stays open as long as any of them lives."""
    program = f"import sys\nfrom launch.runtime import spawn\nsys.exit(spawn(2, {rank_program(body)!r}))"
    env = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def lines_until_ready(parent: "subprocess.Popen[str]", count: int) -> list[str]:
    assert parent.stdout is not None
    return [parent.stdout.readline().strip() for _ in range(count)]


def test_ranks_see_the_usual_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    body = f"import json; json.dump(dict(os.environ), open(os.path.join({str(tmp_path)!r}, str(RANK)), 'w'))"
    assert spawn(2, rank_program(body)) == 0
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    for rank, seen in enumerate((first, second)):
        assert (seen["RANK"], seen["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert seen["MASTER_ADDR"] == "127.0.0.1"
        assert seen["OMP_NUM_THREADS"] == str(max(1, core_count() // 2))
        assert ("DS_ACCELERATOR" in seen) == (gpu_count() == 0)
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert not Path(first["DARKROOM_ERROR_DIR"]).exists(), "the error folder is temporary"


def test_what_the_user_set_stays(tmp_path: Path) -> None:
    body = f"open(os.path.join({str(tmp_path)!r}, str(RANK)), 'w').write(os.environ['OMP_NUM_THREADS'])"
    assert spawn(2, rank_program(body), {**os.environ, "OMP_NUM_THREADS": "3"}) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["3", "3"]


def test_the_same_mistake_of_all_ranks_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    body = (
        "from launch.runtime import report_error\n"
        "from launch.errors import ConfigError\n"
        "error = ConfigError('steps is\\n  wrong')\n"
        "report_error(error); sys.exit(error.exit_code)"
    )
    assert spawn(2, rank_program(body), {**os.environ, "PYTHONPATH": str(ROOT)}) == 2
    assert capfd.readouterr().err == "error: steps is wrong\n"


def test_a_connection_lost_to_a_rank_that_reported_shows_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    body = (
        "from launch import cli\n"
        "from launch.errors import ConfigError\n"
        "from launch.runtime import other_rank_reported\n"
        "def app():\n"
        "    if RANK == 1:\n"
        "        raise ConfigError('the shard is missing')\n"
        "    while not other_rank_reported():\n"
        "        time.sleep(0.01)\n"
        "    raise RuntimeError('connection reset by peer')\n"
        "cli.app = app\n"
        "cli.main()"
    )
    assert spawn(2, rank_program(body), {**os.environ, "PYTHONPATH": str(ROOT)}) == 2
    assert capfd.readouterr().err == "error: the shard is missing\n"


def test_a_bug_on_one_rank_is_said_first_and_alone(capfd: pytest.CaptureFixture[str]) -> None:
    body = (
        "from launch import cli\n"
        "from launch.runtime import other_rank_reported\n"
        "def app():\n"
        "    if RANK == 1:\n"
        "        raise KeyError('a bug')\n"
        "    while not other_rank_reported():\n"
        "        time.sleep(0.01)\n"
        "    raise RuntimeError('Connection closed by peer')\n"
        "cli.app = app\n"
        "cli.main()"
    )
    assert spawn(2, rank_program(body), {**os.environ, "PYTHONPATH": str(ROOT)}) == 1
    said = capfd.readouterr().err
    assert said.startswith("Traceback") and "KeyError: 'a bug'" in said
    assert said.endswith("error: rank 1: KeyError: 'a bug'\n")
    assert "Connection" not in said


def test_a_connection_lost_to_a_killed_rank_shows_no_traceback(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The peers of a killed rank learn of it before the parent does."""
    body = (
        "from pathlib import Path\n"
        "from launch import cli\n"
        f"gone = Path({str(tmp_path / 'gone')!r})\n"
        "def app():\n"
        "    if RANK == 1:\n"
        "        gone.touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    while not gone.exists():\n"
        "        time.sleep(0.01)\n"
        "    raise RuntimeError('Connection closed by peer')\n"
        "cli.app = app\n"
        "cli.main()"
    )
    assert spawn(2, rank_program(body), {**os.environ, "PYTHONPATH": str(ROOT)}) == 137
    assert capfd.readouterr().err == "error: rank 1 was killed by SIGKILL (out of memory?); the run was stopped\n"


def test_a_failing_rank_ends_the_others_and_its_code_is_returned(capfd: pytest.CaptureFixture[str]) -> None:
    body = "sys.exit(7) if RANK == 1 else signal.pause()"
    assert spawn(2, rank_program(body)) == 7
    assert capfd.readouterr().err == ""


def test_a_killed_rank_is_named_and_a_stubborn_one_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    body = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.kill(os.getpid(), signal.SIGKILL) if RANK == 1 else time.sleep(300)"
    )
    assert spawn(2, rank_program(body), grace_s=0.2) == 137
    assert capfd.readouterr().err == "error: rank 1 was killed by SIGKILL (out of memory?); the run was stopped\n"


def test_the_root_cause_wins_over_what_follows_from_it() -> None:
    # Rank 0 loses its connection (exit 1) because rank 1 refused its input (exit 2); both are over at the first look.
    from launch.runtime import _Group

    class Ended:
        def __init__(self, code: int) -> None:
            self.code = code

        def poll(self) -> int:
            return self.code

    for codes, expected in (((1, 2), 2), ((2, 1), 2), ((1, -9), 137), ((75, 75), 75), ((0, 1), 1)):
        group = _Group(grace_s=0.0)
        group._children = [Ended(code) for code in codes]  # type: ignore[misc]
        assert group.wait() == expected, codes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank(number: signal.Signals, tmp_path: Path) -> None:
    body = (
        "from launch.runtime import PreemptionFlag\n"
        "with PreemptionFlag() as flag:\n"
        "    say('ready')\n"
        "    while not flag: time.sleep(0.01)\n"
        "    say(f'{RANK} {flag.signal_name}')\n"
        "sys.exit(75)"
    )
    parent = start_parent(body, tmp_path)
    assert lines_until_ready(parent, 2) == ["ready", "ready"]
    parent.send_signal(number)
    out, err = parent.communicate(timeout=60)
    assert sorted(out.split("\n")) == ["", f"0 {number.name}", f"1 {number.name}"]
    assert parent.returncode == 75
    assert err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("handles", [True, False])  # False: the signal came before the rank could say what to do
def test_a_signal_outside_of_the_steps_is_a_preemption(number: signal.Signals, handles: bool, tmp_path: Path) -> None:
    install = "from launch.runtime import leave_when_preempted\nleave_when_preempted()\n" * handles
    parent = start_parent(f"{install}say('ready')\nwhile True: signal.pause()", tmp_path)
    assert lines_until_ready(parent, 2) == ["ready", "ready"]
    parent.send_signal(number)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 75
    assert err == (
        f"preempted by {number.name} outside of the training steps: what is saved stays; the same command goes on\n"
    )


def test_a_rank_that_is_ended_for_another_s_sake_is_no_preemption(capfd: pytest.CaptureFixture[str]) -> None:
    body = (
        "from launch.runtime import leave_when_preempted, report_error\n"
        "import pathlib\n"
        "leave_when_preempted()\n"
        "there = pathlib.Path(os.environ['DARKROOM_ERROR_DIR'])\n"
        "if RANK == 0:\n"
        "    (there / 'ready').touch(); signal.pause()\n"
        "while not (there / 'ready').exists(): time.sleep(0.01)\n"
        "report_error(ValueError('the cause')); os._exit(1)"
    )
    assert spawn(2, rank_program(body), {**os.environ, "PYTHONPATH": str(ROOT)}) == 1
    assert capfd.readouterr().err == "error: the cause\n"


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGINT, lambda *_: say('once'))\nsay('ready')\nwhile True: signal.pause()"
    parent = start_parent(body, tmp_path)
    assert lines_until_ready(parent, 2) == ["ready", "ready"]
    parent.send_signal(signal.SIGINT)
    assert lines_until_ready(parent, 2) == ["once", "once"]
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 137
    assert err == "interrupted: what is saved stays; the same command goes on from there\n"  # no word of memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PDEATHSIG is Linux's")
def test_a_killed_parent_leaves_no_orphans(tmp_path: Path) -> None:
    parent = start_parent("say('ready')\nwhile True: signal.pause()", tmp_path)
    assert lines_until_ready(parent, 2) == ["ready", "ready"]
    parent.kill()
    out, _ = parent.communicate(timeout=60)  # returns only when the last holder of the pipe is gone
    assert out == ""


def test_a_rank_started_by_something_else_knows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks() == Ranks(rank=0, local_rank=0, world_size=1)
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert ranks() == Ranks(rank=5, local_rank=1, world_size=8)
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ConfigError, match="RANK is 5 in a world of 5"):
        ranks()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'many'"):
        ranks()


def test_preemption_flag_gives_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    with PreemptionFlag() as flag:
        assert not flag
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert flag and flag.signal_name == "SIGUSR1"
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before


def test_a_preempted_run_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    class Saved(Exception):
        exit_code = 75

    report_error(Saved("saved at step 3"))
    report_error(ConfigError("wrong"))
    assert capsys.readouterr().err == "saved at step 3\nerror: wrong\n"


def test_nproc_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="--nproc 0 must be at least 1"):
        spawn(0, [])


@pytest.mark.parametrize(("visible", "expected"), [("", 0), ("-1", 0)])
def test_hidden_gpus_do_not_count(monkeypatch: pytest.MonkeyPatch, visible: str, expected: int) -> None:
    monkeypatch.setattr("launch.runtime.glob.glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_count() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_count() == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_count() == 2
