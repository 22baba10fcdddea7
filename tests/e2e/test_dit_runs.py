"""Diffusion runs on real ranks: equal curves on any number of them, and exact resumes after SIGKILL."""

import json
import shutil
import subprocess

import pytest
from safetensors.torch import load_file

from tests.helpers import command
from tests.helpers.warm_ranks import darkroom
from training.metrics import read_metrics

EXACT = ("loss", "latent_std", "dropped_clip_a", "dropped_clip_b", "dropped_t5", "grad_norm", "lr", "images_seen")


def curve(run, keys=EXACT):
    return [{key: row[key] for key in keys} for row in read_metrics(run / "metrics.jsonl")]


def committed(run, step):
    """Every tensor of a commit: weights, averages and moments."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {(key.partition("/")[2], name): tensor for key in files for name, tensor in load_file(folder / key).items()}


@pytest.fixture(scope="module")
def whole(world):
    """Eight steps on two ranks under ZeRO-2, undisturbed; the command as a user starts it."""
    run = world.folder / "whole"
    result = command.darkroom("train", "dit", world.dit, "--run", run, "--nproc", 2)
    assert result.code == 0, result.err
    return run


def test_the_run_directory_is_as_documented(whole):
    assert {"run.yaml", "metrics.jsonl", "tb", "samples", "frozen", "checkpoints", "artifact"} <= {
        path.name for path in whole.iterdir()
    }
    assert [row["step"] for row in read_metrics(whole / "metrics.jsonl")] == list(range(1, 9))
    names = [path.name for path in sorted((whole / "checkpoints").iterdir())]
    assert names == ["attempts", "step-00000004", "step-00000008"]
    assert (whole / "samples" / "step-00000008.png").exists()
    manifest = json.loads((whole / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    assert set(manifest["meta"]["groups"]) == {
        *("model", "ema-0.9", "ema-0.5", "ema-power-0.10", "exp_avg", "exp_avg_sq")
    }
    assert manifest["meta"]["state"]["counters"]["micro_batches"] == 8 * 8 // 2


def test_ranks_forked_from_a_warm_process_write_the_same_bytes(world, whole):
    """What the tests that start their runs so (tests/helpers/warm_ranks.py) rest on."""
    run = world.folder / "warm"
    result = darkroom("train", "dit", world.dit, "--run", run, "--nproc", 2)
    assert result.code == 0, result.err
    assert curve(run) == curve(whole)
    for step in (4, 8):
        mine, theirs = (committed(folder, step) for folder in (run, whole))
        assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in theirs)
    for file in ("artifact/model.safetensors", "samples/step-00000008.png"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    "die, resumes_at",
    # Between checkpoints (test_elastic_resume does so in every test run); with the last one half written.
    [pytest.param("log:6:1", 4, marks=pytest.mark.all), ("upload:8:0", 4)],
)
def test_sigkill_and_resume_repeats_the_curve_bit_for_bit(world, whole, die, resumes_at):
    run = world.folder / die.replace(":", "-")
    arguments = ("train", "dit", world.dit, "--run", run, "--nproc", 2)
    killed = darkroom(*arguments, die=die)
    assert killed.code == 137
    assert len(killed.error_lines) == 1 and "SIGKILL" in killed.error_lines[0]
    assert not (run / "checkpoints" / "step-00000008" / "manifest.json").exists()
    resumed = darkroom(*arguments)
    assert resumed.code == 0, resumed.err
    assert f"resuming {run} at step {resumes_at}" in resumed.err
    assert curve(run) == curve(whole)
    mine, theirs = (load_file(folder / "artifact" / "model.safetensors") for folder in (run, whole))
    assert all(mine[name].equal(theirs[name]) for name in theirs)
    mine, theirs = (committed(folder, 8) for folder in (run, whole))
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in theirs)


def test_a_signal_saves_and_asks_for_a_requeue(world, whole):
    """The parent passes it on; the ranks agree at a row, commit, and all end with the exit code of a preempted run."""
    run = world.folder / "preempted"
    arguments = ("train", "dit", world.dit, "--run", run, "--nproc", 2, "total_steps=200")
    stopped = command.darkroom(*arguments, die="signal:3:1")
    assert stopped.code == 75, stopped.err
    rows = curve(run)
    step = len(rows)
    assert 3 <= step < 200 and rows[:8] == curve(whole)[:step]
    assert stopped.err.endswith(f"preempted: {run} is saved at step {step}; the same command resumes\n")
    resumed = darkroom(*arguments[:-1], f"total_steps={step + 1}")
    assert resumed.code == 0 and f"resuming {run} at step {step}" in resumed.err, resumed.err
    assert curve(run)[:step] == rows and len(curve(run)) == step + 1


def test_damaged_checkpoint_falls_back_and_says_so(world, whole):
    run = world.folder / "damaged"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "artifact")
    victim = next((run / "checkpoints" / "step-00000008").glob("*/exp_avg-00001.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    result = darkroom("train", "dit", world.dit, "--run", run, "--nproc", 2)
    assert result.code == 0, result.err
    assert "exp_avg-00001.safetensors" in result.err and "falling back to step 4" in result.err
    assert curve(run) == curve(whole)
    assert [row.get("fallbacks") for row in read_metrics(run / "metrics.jsonl")] == [None] * 4 + [1] * 4


def test_nothing_left_to_resume_is_refused(world, whole):
    run = world.folder / "ruined"
    shutil.copytree(whole, run)
    for step in (4, 8):
        next((run / "checkpoints" / f"step-{step:08d}").glob("*/model-00000.safetensors")).unlink()
    result = darkroom("train", "dit", world.dit, "--run", run)
    assert result.code == 2
    assert len(result.error_lines) == 1 and "model-00000.safetensors: missing" in result.error_lines[0]


def test_another_recipe_is_refused_by_the_field_that_differs(world, whole):
    result = darkroom("train", "dit", world.dit, "--run", whole, "optim.learning_rate=0.5")
    assert result.code == 2
    assert result.error_lines == [
        f"error: {whole} was started with optim.learning_rate = 0.001, the recipe now says 0.5; "
        "restore the value, or give another --run"
    ]


@pytest.mark.all
def test_other_data_is_refused_and_leaves_the_run_as_it_is(world, whole):
    shards = world.data / "test"
    result = darkroom("train", "dit", world.dit, "--run", whole, "total_steps=12", f"data.shards={shards}")
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert result.err.startswith(f"error: {whole} cannot be resumed: data_sets is [["), result.err
    assert (whole / "artifact" / "model.safetensors").exists()


def test_another_autoencoder_is_refused(world, whole, tmp_path):
    from tests.helpers import tiny

    other = tiny.autoencoder_artifact(tmp_path / "other", seed=1)
    kept = whole / "frozen" / "autoencoder"
    aside = tmp_path / "aside"
    shutil.move(kept, aside)
    try:
        shutil.copytree(other, kept)
        result = darkroom("train", "dit", world.dit, "--run", whole)
    finally:
        shutil.rmtree(kept)
        shutil.move(aside, kept)
    assert result.code == 2
    assert len(result.error_lines) == 1 and "was trained with autoencoder" in result.error_lines[0]


def test_finished_run_says_so_and_trains_nothing(world, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    result = darkroom("train", "dit", world.dit, "--run", whole)
    assert result.code == 0
    assert "is finished" in result.err + result.out
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.all
def test_a_run_starts_from_anothers_averaged_weights(world, whole):
    run = world.folder / "initialised"
    command = (
        "train",
        "dit",
        world.dit,
        "--run",
        run,
        "total_steps=2",
        f"init_from={whole}",
        "checkpoint.every_steps=1",
    )
    result = darkroom(*command)
    assert result.code == 0, result.err
    record = json.loads((run / "init_from.json").read_text())
    assert record["source"] == str(whole / "artifact") and record["weights"] == "artifact"
    assert record["loaded"] and not (record["missing"] or record["shape_differs"] or record["unexpected"])
    first, fresh, last = curve(run)[0]["loss"], curve(whole)[0]["loss"], curve(whole)[-1]["loss"]
    assert abs(first - last) < abs(first - fresh)
    again = darkroom(*command, "init_from=/gone", "total_steps=3")  # a resume ignores it
    assert again.code == 0 and f"resuming {run} at step 2" in again.err, again.err


@pytest.mark.all
def test_saves_that_fail_stop_the_run_after_as_many_as_allowed(world, tmp_path):
    """Its checkpoints go to a disk of 256 KiB: never a commit, and a line that says what is wrong."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        command = ("train", "dit", world.dit, "--run", tmp_path / "run", "--nproc", 2, f"checkpoint.url={small}")
        failed = darkroom(*command, "checkpoint.max_failed_saves=3")
        assert failed.code == 2 and len(failed.error_lines) == 1, failed.err
        assert "No space left on device" in failed.err and "none was committed yet" in failed.error_lines[0]
        assert not list(small.glob("step-*/manifest.json"))
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert rows[-1]["step"] >= 6 and rows[-1]["failed_saves"] >= 1, "one failure or two do not stop it"
    finally:
        subprocess.run(["umount", str(small)], check=True)
