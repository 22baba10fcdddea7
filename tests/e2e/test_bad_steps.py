"""A run whose pictures are NaN for some steps: it goes back to its checkpoint, goes on with later data, and says so."""

import json

from data.ledger_check import check_ledger
from tests.helpers import tiny
from tests.helpers.command import write_recipe
from tests.helpers.warm_ranks import darkroom
from training.checkpoint import CheckpointConfig
from training.metrics import read_metrics
from training.step_policy import StepPolicyConfig


def test_bad_pictures_are_passed_over_and_a_kill_changes_nothing(world):
    """One NaN picture in each of steps 3 (alone: left out), 6 and 7 (too many in a row): back to step 4, then on.

    The rank that dies behind the roll-back, before another commit, makes the resume meet all of that again.
    """
    recipe = tiny.autoencoder_recipe(
        world.data,
        total_steps=8,
        checkpoint=CheckpointConfig(every_steps=4),
        step_policy=StepPolicyConfig(max_bad_steps=2, max_roll_backs=1),
    )
    path = write_recipe(world.folder / "bad-steps.yaml", "autoencoder", recipe)
    run = world.folder / "bad-steps"
    command = ("train", "autoencoder", path, "--run", run, "--nproc", 2)
    nan = {"DARKROOM_TEST_NAN": "17,41,51"}  # 8 pictures per step, 2 per micro-batch: ranks 0, 0 and 1
    killed = darkroom(*command, die="log:8:1", env=nan)
    assert killed.code == 137 and "Traceback" not in killed.err, killed.err
    first = read_metrics(run / "metrics.jsonl")
    done = darkroom(*command, env=nan)
    assert done.code == 0, done.err

    rows = read_metrics(run / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 2, 3, 3]
    assert [row["bad_steps_in_a_row"] for row in rows] == [0, 0, 1, 0, 0, 1, 2, 0]
    assert [row["roll_backs"] for row in rows] == [0] * 7 + [1]
    assert [row["step"] for row in rows if "loss" not in row] == [3, 6, 7]
    assert [row["grad_norm"] is None for row in rows] == ["loss" not in row for row in rows]
    for mine, theirs in zip(rows, first, strict=True):
        for key in ("loss", "disc_loss", "psnr_db", "grad_norm", "skipped_steps", "roll_backs"):
            assert mine.get(key) == theirs.get(key)
    assert "steps 6 to 7 were bad (non-finite): went back to the weights of step 4" in " ".join(done.err.split())

    lines = {rank: [json.loads(text) for text in (run / f"bad_steps-{rank}.jsonl").open()] for rank in (0, 1)}
    assert [line["step"] for line in lines[0]] == [3, 6, 7, 6, 7]  # of both attempts
    losses = [part["loss"] for line in lines[1][:3] for part in line["micro_batches"]]
    assert [loss == "nan" for loss in losses] == [False, False, False, False, True, False]
    assert lines[1][2]["micro_batches"][0]["sample_numbers"] == [50, 51]

    state = json.loads((run / "checkpoints" / "step-00000008" / "manifest.json").read_text())["meta"]["state"]
    assert state["adam_step"] == 4  # steps 1, 2 and 4, then 8
    assert state["discriminator_adam_step"] == 2  # from step 3 on, so 4 and 8
    assert state["step_policy"]["passed_over"] == [[4, 7]]
    verdict = check_ledger(run / "ledger", checkpoints=str(run / "checkpoints"))
    assert verdict.clean and verdict.skipped_steps == 3
    assert verdict.passed_over == [{"steps": [4, 7], "micro_batches": [16, 28], "samples": 24}]
