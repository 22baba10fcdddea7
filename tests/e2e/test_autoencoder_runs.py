"""Autoencoder runs on real ranks, with the discriminator in play."""

import json

import pytest

from tests.helpers import command
from tests.helpers.warm_ranks import darkroom
from training.metrics import read_metrics

KEYS = ("loss", "rec_loss", "kl", "psnr_db", "adv_g", "disc_loss", "adaptive_weight")


def curve(run):
    return [{key: row[key] for key in KEYS if key in row} for row in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(world):
    run = world.folder / "autoencoder-whole"
    result = command.darkroom("train", "autoencoder", world.autoencoder_recipe, "--run", run, "--nproc", 2)
    assert result.code == 0, result.err
    assert "trains without the perceptual loss" in result.out + result.err
    return run


def test_discriminator_starts_when_the_recipe_says(whole):
    rows = curve(whole)
    assert ["adv_g" in row for row in rows] == [False, False, True, True, True, True]


def test_one_process_gives_the_same_curve(world, whole):
    """ZeRO-2 generator and DDP discriminator on two ranks against one process that accumulates."""
    run = world.folder / "autoencoder-single"
    result = darkroom("train", "autoencoder", world.autoencoder_recipe, "--run", run, "engine.zero_stage=0")
    assert result.code == 0, result.err
    for mine, theirs in zip(curve(run), curve(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    assert mine["latent_std"] == pytest.approx(theirs["latent_std"], rel=1e-4)


def test_sigkill_and_resume_repeats_the_curve_bit_for_bit(world, whole):
    run = world.folder / "autoencoder-killed"
    arguments = ("train", "autoencoder", world.autoencoder_recipe, "--run", run, "--nproc", 2)
    assert darkroom(*arguments, die="log:5:1").code == 137
    result = darkroom(*arguments)
    assert result.code == 0, result.err
    assert curve(run) == curve(whole)
    assert (run / "artifact" / "model.safetensors").read_bytes() == (
        whole / "artifact" / "model.safetensors"
    ).read_bytes()


@pytest.mark.all
def test_a_run_starts_from_the_averages_of_anothers_checkpoint(world, whole):
    run, source = world.folder / "autoencoder-initialised", whole / "checkpoints" / "step-00000004"
    command = ("train", "autoencoder", world.autoencoder_recipe, "--run", run, "--nproc", 2, f"init_from={source}")
    result = darkroom(*command, "total_steps=1", "checkpoint.every_steps=1")
    assert result.code == 0, result.err
    record = json.loads((run / "init_from.json").read_text())
    assert record["weights"] == "ema-0.9 at step 4" and record["source"] == str(source)
    assert record["loaded"] and not (record["missing"] or record["shape_differs"] or record["unexpected"])
    assert curve(run)[0]["rec_loss"] < curve(whole)[0]["rec_loss"]
