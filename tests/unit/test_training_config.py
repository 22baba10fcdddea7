"""Recipes of both stages: numbers that no run can be made of are refused before anything starts."""

from pathlib import Path

import pytest

from launch.config_io import dump_yaml, load_recipe, read_yaml, to_dict
from launch.errors import ConfigError
from launch.runtime import Ranks
from training.config import AutoencoderRecipe, DiTRecipe
from training.errors import TrainingError
from training.run_directory import open_run_directory, refuse_other_recipe

SCHEMAS = {"digits-autoencoder": {"autoencoder": AutoencoderRecipe}, "digits-dit": {"dit": DiTRecipe}}


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("digits-autoencoder", "seed=-1", "seed -1 must be at least 0"),
        ("digits-autoencoder", "statistics_images=0", "statistics_images 0 must be at least 1"),
        ("digits-autoencoder", "sample_every_steps=0", "sample_every_steps 0 must be at least 1"),
        ("digits-autoencoder", "engine.global_batch_size=0", "engine: global_batch_size 0"),
        ("digits-autoencoder", "engine.max_grad_norm=-1", "engine: max_grad_norm -1"),
        ("digits-autoencoder", "optim.beta2=1.0", "optim: beta1 0.9 and beta2 1.0"),
        ("digits-autoencoder", "optim.weight_decay=-0.1", "optim: weight_decay -0.1"),
        ("digits-autoencoder", "loss.kl_weight=-1", "loss: kl_weight -1"),
        ("digits-autoencoder", "data.image_size=30", "30x30 px: both sides must be multiples of 4"),
        ("digits-autoencoder", "discriminator.num_layers=8", "discriminator.num_layers 8 needs at least 768 px"),
        ("digits-dit", "model.patch_size=0", "model: patch_size 0 must be at least 1"),
        ("digits-dit", "model.num_heads=0", "model: num_heads 0 must be at least 1"),
        ("digits-dit", "samples.num_steps=0", "samples: num_steps 0 must be at least 1"),
        ("digits-dit", "samples.every_steps=0", "samples: every_steps 0 must be at least 1"),
        ("digits-dit", "text_encoders.0.seed=-1", "seed is -1"),
    ],
)
def test_impossible_numbers(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, [override], SCHEMAS[name])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_another_recipe_is_refused_by_the_field_that_differs() -> None:
    def resolved(*overrides: str) -> dict[str, object]:
        return {"kind": "dit", **to_dict(load_recipe("digits-dit", list(overrides), SCHEMAS["digits-dit"])[1])}

    run = Path("runs/x")
    refuse_other_recipe(resolved(), resolved("total_steps=7", "data.shards=elsewhere", "engine.zero_stage=3"), run)
    with pytest.raises(TrainingError, match=r"text_encoders.1.dropout = 0.1, the recipe now says 0.2"):
        refuse_other_recipe(resolved(), resolved("text_encoders.1.dropout=0.2"), run)
    with pytest.raises(TrainingError, match=r"kind = 'dit', the recipe now says 'autoencoder'"):
        refuse_other_recipe(resolved(), {"kind": "autoencoder"}, run)


def test_a_run_from_before_a_field_goes_on_with_its_default(tmp_path: Path) -> None:
    ranks = Ranks(rank=0, local_rank=0, world_size=1)
    _, recipe = load_recipe("digits-dit", [], SCHEMAS["digits-dit"])
    open_run_directory(tmp_path / "run", recipe, "dit", ranks)
    path = tmp_path / "run" / "run.yaml"
    document = read_yaml(path)
    del document["recipe"]["ema"]["sigma_rels"], document["recipe"]["optim"]["groups"]
    path.write_text(dump_yaml(document))
    open_run_directory(tmp_path / "run", recipe, "dit", ranks)
    _, other = load_recipe("digits-dit", ["ema.sigma_rels=[0.1]"], SCHEMAS["digits-dit"])
    with pytest.raises(TrainingError, match=r"started with ema.sigma_rels = \[\], the recipe now says \[0.1\]"):
        open_run_directory(tmp_path / "run", other, "dit", ranks)
    document["recipe"]["optim"]["forgotten"] = 1  # of a field that is no more
    path.write_text(dump_yaml(document))
    with pytest.raises(TrainingError, match=r"optim.forgotten = 1|ema.sigma_rels = None"):
        open_run_directory(tmp_path / "run", recipe, "dit", ranks)
