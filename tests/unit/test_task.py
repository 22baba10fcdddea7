"""What srun starts: the rank's environment, what it leaves word of, and its end when it has been replaced."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.attempts import Attempt, Record, rank_ends

ROOT = Path(__file__).parents[2]
STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "n7",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    return Record(tmp_path / "dit").start(Attempt(id="12-0", nodes=("n7",), started_s=1.0))


def task(attempt: Path, body: str) -> "subprocess.Popen[str]":
    """A task whose rank runs `body`; its output stays open as long as the rank lives."""
    program = (
        "import sys\nfrom launch import task\ntask.OWNER_POLL_S = 0.05\n"
        f"sys.exit(task.run_task([sys.executable, '-c', {body!r}], ['train', 'dit']))"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env |= STEP | {"DARKROOM_ATTEMPT": str(attempt)}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (75, 0), (2, 2), (1, 1)])
def test_how_a_rank_ended(attempt: Path, code: int, expected: int) -> None:
    """Saved is no failure for srun, or it would end those that are still saving; the record keeps the code."""
    body = f"import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:]])); sys.exit({code})"
    done = task(attempt, body)
    out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (expected, "")
    env, words = json.loads(out)
    assert words == ["train", "dit"]
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"]) == ("1", "2", "localhost")
    assert env["DARKROOM_ERROR_DIR"] == str(attempt)
    (end,) = rank_ends(attempt)
    assert (end.rank, end.node, end.code, end.signals) == (1, "n7", code, ())


def test_a_signal_is_on_record_with_what_it_did(attempt: Path) -> None:
    process = task(attempt, "import signal; print('ready', flush=True); signal.pause()")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    (end,) = rank_ends(attempt)
    assert (process.returncode, end.code, end.signals) == (0, 75, ("SIGUSR1",))  # too early to have a save to make


def test_a_replaced_task_ends_with_its_rank(attempt: Path) -> None:
    """Deaf to everything, as a rank in a collective without partners is."""
    body = (
        "import signal\n"
        "for number in (15, 10, 2): signal.signal(number, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "signal.pause()"
    )
    process = task(attempt, body)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    Record(attempt.parent).take("12-1")
    out, err = process.communicate(timeout=60)  # returns when the rank is gone too
    assert process.returncode == -signal.SIGKILL
    assert err == "attempt 12-0 was replaced by 12-1; it ends here\n"
    assert rank_ends(attempt) == []
