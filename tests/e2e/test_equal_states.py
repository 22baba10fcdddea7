"""Runs that differ only in how they are spread over ranks: every group of the last commit agrees, not just the loss."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.command import write_recipe
from tests.helpers.ledger_runs import recorded
from tests.helpers.runs import curve, distance, tensors
from tests.helpers.warm_ranks import darkroom, run_ranks
from training.optim import OptimConfig
from training.schedule import ScheduleConfig

STEPS = 6
RESHARD = Path(__file__).resolve().parents[1] / "helpers" / "reshard_worker.py"


@pytest.fixture(scope="module")
def recipe(world, tmp_path_factory):
    """A global batch of 24 in twelve micro-batches, which 1, 2, 3 and 4 ranks divide."""
    changed = tiny.dit_recipe(
        world.data,
        world.autoencoder,
        total_steps=STEPS,
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.01, eps=1e-5),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=2),
    )
    changed = replace(
        changed,
        data=replace(changed.data, num_streams=24),
        engine=replace(changed.engine, global_batch_size=24),
        checkpoint=replace(changed.checkpoint, every_steps=2),
    )
    return write_recipe(tmp_path_factory.mktemp("equal") / "dit.yaml", "dit", changed)


def train(recipe, run, ranks, stage, die=""):
    return darkroom("train", "dit", recipe, "--run", run, "--nproc", ranks, f"engine.zero_stage={stage}", die=die)


def visits(run):
    verdict = json.loads(darkroom("data", "ledger", run, "--json").out)
    return recorded(run / "ledger", verdict["attempts"], micro_batch_size=2)


@pytest.fixture(scope="module")
def whole(recipe):
    """Two ranks under ZeRO-2 all the way."""
    run = recipe.with_name("whole")
    result = train(recipe, run, 2, 2)
    assert result.code == 0, result.err
    return run


def agree(run, whole):
    """The samples are the same, and their noise, t and dropout; a float32 sum over a step's 24 samples is taken in
    another order: other by a few times 6e-8 of the largest term. AdamW (eps 1e-5 here, so that it does not make
    steps out of gradients that are rounding) hands that on to the weights, six times. Measured: up to 7e-7 of a
    tensor's largest element.
    """
    assert visits(run) == visits(whole)
    for mine, theirs in zip(curve(run), curve(whole), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        exact = ("step", "images_seen", "lr", "bad_samples", "skipped_steps")
        assert {key: mine[key] for key in exact} == {key: theirs[key] for key in exact}
        means = ("latent_std", "dropped_clip_a", "dropped_clip_b", "dropped_t5", "grad_norm")
        assert {key: mine[key] for key in means} == pytest.approx({key: theirs[key] for key in means}, rel=2e-6)
    far = distance(tensors(run, STEPS), tensors(whole, STEPS))
    assert set(far) == {"model", "ema-0.9", "ema-0.5", "ema-power-0.10", "exp_avg", "exp_avg_sq"}
    assert max(far.values()) < 5e-6
    states = [
        json.loads((folder / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())["meta"]["state"]
        for folder in (run, whole)
    ]
    norms = [state["step_policy"].pop("norms") for state in states]
    assert norms[0] == pytest.approx(norms[1], rel=2e-6) and len(norms[0]) == STEPS
    for state in states:
        del state["counters"]["elapsed_s"]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    "ranks, stage",
    [
        (1, 0),
        (2, 1),
        (4, 3),
        *(pytest.param(*case, marks=pytest.mark.all) for case in ((1, 3), (2, 0), (2, 3), (3, 2))),
    ],
)
def test_spread_otherwise_from_the_start(recipe, whole, ranks, stage):
    run = recipe.with_name(f"ranks-{ranks}-stage-{stage}")
    result = train(recipe, run, ranks, stage)
    assert result.code == 0, result.err
    agree(run, whole)


def test_spread_otherwise_in_the_middle(recipe, whole):
    """2 ranks, 1, then 3; ZeRO-2, 3, then 1; killed in between."""
    run = recipe.with_name("changed")
    assert train(recipe, run, 2, 2, die="log:3:1").code == 137
    second = train(recipe, run, 1, 3, die="log:5:0")
    assert second.code == -9 and f"resuming {run} at step 2" in second.err, second.err
    third = train(recipe, run, 3, 1)
    assert third.code == 0 and f"resuming {run} at step 4" in third.err, third.err
    agree(run, whole)


def test_reading_into_another_spread_changes_no_bit(recipe, whole, tmp_path):
    """Every group, through every stage and 1 to 4 ranks, saved again at once."""
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoints", run / "checkpoints")
    expected = tensors(run, STEPS)
    for number, (ranks, stage) in enumerate(((3, 3), (1, 1), (4, 2), (2, 0), (1, 3)), 1):
        result = run_ranks(ranks, RESHARD, run / "checkpoints", stage)
        assert result.code == 0, result.err
        found = tensors(run, STEPS + number)
        assert {group: set(part) for group, part in found.items()} == {g: set(part) for g, part in expected.items()}
        assert all(
            found[group][name].equal(tensor) for group, part in expected.items() for name, tensor in part.items()
        )
