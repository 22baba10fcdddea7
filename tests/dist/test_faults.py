"""Two real ranks: bad steps at every ZeRO stage against plain torch, and a rank that hangs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = [*(f"{stage} float32" for stage in range(4)), *(f"{stage} bfloat16" for stage in (1, 2, 3))]
CASES += ["2 bfloat16 offload", "3 float32 offload"]
NO_NINJA = "no-such-folder"
EXTENSIONS = ("deepspeed_shm_comm", "fused_adam", "cpu_adam", "utils", "async_io")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The worker's folder and how it ended, on a machine where every compile would hang or fail; and a second job."""
    folder = tmp_path_factory.mktemp("faults")
    for name in EXTENSIONS:
        (folder / "extensions" / name).mkdir(parents=True)
        (folder / "extensions" / name / "lock").touch()  # left behind by a compile that was killed
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": NO_NINJA}
    env["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    worker = str(ROOT / "tests" / "helpers" / "fault_worker.py")
    # A second run, on a port that somebody else has: one process is enough to find that out.
    taken = socket.create_server(("127.0.0.1", 0))
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = str(taken.getsockname()[1])
    command = [sys.executable, "-m", "tests.helpers.dying_darkroom", "train", "dit", "digits-dit"]
    command += ["data.shards=none", "autoencoder=none", "--run", str(folder / "run")]
    blocked = subprocess.Popen(command, env=env | world, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    program = (
        f"import sys; from launch.runtime import spawn; sys.exit(spawn(2, {[sys.executable, worker, str(folder)]}))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=400)
    assert (folder / "results.json").exists(), done.stderr
    with taken:
        told = blocked.communicate(timeout=400)[1]
    return folder, done, (blocked.returncode, world["MASTER_PORT"], told)


@pytest.fixture(scope="module")
def results(job):
    return json.loads((job[0] / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_bad_steps_leave_no_trace(results, case):
    """A loss of inf with finite gradients on one rank, a spike on the other, then NaN until the run goes back."""
    found = results[case]
    assert found["bad"] == [2, 4, 6, 7, 8] and found["same_on_all_ranks"]
    assert found["unmoved"] == [2, 4, 6, 7, 8]  # not by a bit
    assert found["adam_step"] == 5
    assert found["row"] == {"skipped_steps": 5, "bad_steps_in_a_row": 0, "roll_backs": 1}
    assert 0 < found["grad_norm"] < 10
    tolerance = 1e-6 if "float32" in case else 5e-2
    assert found["weights"] < tolerance and found["ema"] < tolerance


@pytest.mark.parametrize("case", CASES)
def test_a_resume_decides_alike(results, case):
    """From the commit before the bad steps: the same verdicts, the same roll-back, the same weights to the bit."""
    assert results[case]["resumed_weights"] == 0.0 and results[case]["resumed_policy"]


@pytest.mark.parametrize("case", CASES)
def test_the_run_goes_back_twice_and_then_stops(results, case):
    found = results[case]
    assert found["passed_over"] == [[5, 9], [9, 14]] and found["at"] == 17
    assert "steps 7 to 9 were bad (non-finite): went back to the weights of step 5" in found["log"][0]
    assert "samples of steps 10 to 14 are passed over (roll-back 2 to this checkpoint)" in found["log"][1]
    words = found["last_words"]
    assert words[0] == words[1] and "\n" not in words[0]
    assert "steps 15 to 17 were bad (spike) after 2 roll-backs to step 5" in words[0]
    assert "key-112, key-113, key-116, key-117, key-120" in words[0]


def test_the_record_names_the_samples_of_bad_steps(results):
    """Both ranks list what they had; the loss tells whose micro-batch it was."""
    mine, theirs = results["2 float32"]["lines"]
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] == [3, 5, *range(7, 10), *range(12, 18)]
    assert [line["reason"] for line in mine] == ["non-finite", "spike", *["non-finite"] * 6, *["spike"] * 3]
    assert theirs[0]["micro_batches"][0]["keys"] == ["key-18", "key-19"]  # step 2, micro-batch 1 of 4
    assert theirs[0]["micro_batches"][0]["sample_numbers"] == [18, 19]
    assert theirs[0]["micro_batches"][0]["loss"] == "inf"
    assert all(isinstance(part["loss"], float) for line in mine[:2] for part in line["micro_batches"])
    assert mine[0]["norm"] == "inf" and mine[1]["norm"] > mine[1]["threshold"] > 0


def test_a_discriminator_is_not_poisoned(results):
    """Its own fault leaves out its update; the generator's leaves out both."""
    found = results["replica"]
    assert found["same_on_all_ranks"]
    assert found["reasons"] == ["discriminator", "non-finite", None]
    assert found["moved"] == [False, False, True]
    assert found["steps"] == [[1, 0], [1, 0], [2, 1]]


def test_a_hang_is_ended_and_the_rank_is_named(job):
    folder, done, _ = job
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: no progress for 2 s: rank 1 hangs in 'data' of step 3; rank 0 waits in 'backward' of step 3; stacks "
        f"of all threads: {folder}/stacks-*.txt"
    ]
    waiting, hanging = ((folder / f"stacks-{rank}.txt").read_text() for rank in (0, 1))
    assert "wait_for_data_that_never_comes" in hanging and "wait_for_data_that_never_comes" not in waiting
    assert "barrier" in waiting
    assert hanging in done.stderr


def test_a_taken_port_is_one_line(job):
    code, port, told = job[2]
    assert code == 2
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: MASTER_PORT {port} is taken by another process on this machine; give the run another"]
    assert "Traceback" not in told
