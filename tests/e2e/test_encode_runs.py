"""`darkroom encode` on real ranks, and training on what it made."""

import json
import shutil

import pytest

from data.index import load_index
from tests.helpers import tiny
from tests.helpers.command import write_recipe
from tests.helpers.warm_ranks import darkroom
from training.config import EncodeRecipe
from training.metrics import read_metrics


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def recipes(world):
    """An encode recipe and a diffusion recipe that go together; padding is masked."""
    settings = {"shards": str(world.data / "train"), "out": str(world.folder / "encoded"), "image_size": 32}
    networks = {"autoencoder": str(world.autoencoder), "text_encoders": tiny.ENCODERS, "text_padding": "masked"}
    dit = tiny.dit_recipe(world.data, world.autoencoder, text_padding="masked")
    return (
        write_recipe(world.folder / "encode.yaml", "encode", EncodeRecipe(**settings, **networks, batch_size=4)),
        write_recipe(world.folder / "masked-dit.yaml", "dit", dit),
    )


@pytest.fixture(scope="module")
def encoded(world, recipes):
    """The training pictures, encoded by one process, undisturbed."""
    result = darkroom("encode", recipes[0], "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    index = load_index(str(world.folder / "encoded"))
    assert (summary["samples"], summary["skipped"], summary["shards"]) == (208, 0, 16)
    assert summary["fingerprint"] == index.fingerprint and summary["shards_found_done"] == 0
    assert summary["bytes_per_sample"] == round(sum(shard.bytes for shard in index.shards) / 208)
    return world.folder / "encoded"


def test_sigkill_and_another_number_of_ranks_change_no_byte(world, recipes, encoded):
    out = world.folder / "disturbed"
    command = ("encode", recipes[0], f"out={out}", "--nproc", 2)
    killed = darkroom(*command, die="shard:5:1")
    assert killed.code == 137
    left = files(out)
    assert "train-000005.tar" in left and "train-000005.idx.json" not in left and "index.json" not in left
    resumed = darkroom(*command)
    assert resumed.code == 0, resumed.err
    assert files(out) == files(encoded)


def test_a_run_on_encoded_data_repeats_the_curve_of_the_run_on_pictures(world, recipes, encoded):
    """The same order, noise, t and dropout; what differs is the rounding of latents and features to bfloat16."""
    curves = []
    for name, shards in (("on-pictures", world.data / "train"), ("on-encoded", encoded)):
        result = darkroom("train", "dit", recipes[1], "--run", world.folder / name, f"data.shards={shards}")
        assert result.code == 0, result.err
        curves.append(read_metrics(world.folder / name / "metrics.jsonl"))
    for mine, theirs in zip(*curves, strict=True):
        assert mine["loss"] != theirs["loss"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["latent_std"] == pytest.approx(theirs["latent_std"], rel=1e-3)
        assert all(mine[key] == theirs[key] for key in mine if key.startswith("dropped"))
    shutil.rmtree(world.folder / "on-pictures")


@pytest.mark.all
def test_pictures_and_encoded_samples_train_together(world, recipes, encoded):
    run = world.folder / "mixed"
    mix = f"data.mix=[{{shards: {world.data / 'train'}}}, {{shards: {encoded}}}]"
    result = darkroom("train", "dit", recipes[1], "--run", run, "data.shards=null", mix, "model.attention=cross")
    assert result.code == 0, result.err
    assert len(read_metrics(run / "metrics.jsonl")) == 8
