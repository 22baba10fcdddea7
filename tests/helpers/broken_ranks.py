"""One rank of tests/dist/test_check_ranks.py: trains with something broken on purpose, one fault after the other.

Usage: broken_ranks.py FOLDER. Writes what each run ended with to FOLDER/told-RANK.json.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import training.diffusion_step as step_module
import training.loop as loop_module
import training.train_dit as train_module
from data.loader import build_loader
from launch.runtime import ranks
from models import prng
from tests.helpers import tiny
from tests.helpers.engine_worker import forget_accelerate
from training.errors import TrainingError
from training.frozen import Frozen
from training.step_policy import StepPolicyConfig

normal, uniform, loop = prng.normal, prng.uniform, train_module.loop


def same_seed() -> None:
    """Noise from a generator that every rank seeds alike."""
    generator = torch.Generator().manual_seed(0)

    def draw(seed, stream, numbers, shape):
        if stream != prng.NOISE:
            return normal(seed, stream, numbers, shape)
        return torch.randn(len(numbers), *shape, generator=generator)

    step_module.prng.normal = draw


def same_times() -> None:
    """Times that forget whose sample it is."""

    def draw(seed, stream, numbers, shape=()):
        place = torch.arange(len(numbers))
        return uniform(seed, stream, place if stream == prng.TIME else numbers, shape)

    step_module.prng.uniform = draw


def same_data() -> None:
    """A loader that is not told its rank."""
    loop_module.build_loader = lambda config, **settings: build_loader(config, **{**settings, "rank": 0})


def change_t5_on_one(change: Callable[[nn.Module], object]) -> None:
    """The T5 of rank 1 is changed after everything was compared."""

    def changed(*arguments):
        if ranks().rank == 1:
            frozen = next(argument for argument in arguments if isinstance(argument, Frozen))
            change(frozen.conditioner.text_encoders()[2].tower)
        loop(*arguments)

    train_module.loop = changed


def half_on_one() -> None:
    change_t5_on_one(lambda tower: tower.half())


def nan_on_one() -> None:
    change_t5_on_one(lambda tower: [parameter.data.fill_(torch.nan) for parameter in tower.parameters()])


FAULTS: dict[str, Callable[[], None]] = {
    "same seed": same_seed,
    "same times": same_times,
    "same data": same_data,
    "half on one": half_on_one,
    "nan on one": nan_on_one,
    "none": lambda: None,  # the last one, which finishes
}


def mend() -> None:
    step_module.prng.normal, step_module.prng.uniform = normal, uniform
    loop_module.build_loader, train_module.loop = build_loader, loop


if __name__ == "__main__":
    root, told = Path(sys.argv[1]), {}
    recipe = tiny.dit_recipe(root / "data", root / "autoencoder", total_steps=4)
    # Gives up before the first row.
    hasty = replace(recipe, log_every_steps=4, step_policy=StepPolicyConfig(max_bad_steps=2))
    for name, fault in FAULTS.items():
        fault()
        try:
            train_module.train(hasty if name == "nan on one" else recipe, str(root / name), quiet=True)
            told[name] = ""
        except TrainingError as error:
            told[name] = str(error)
        mend()
        forget_accelerate()
    (root / f"told-{ranks().rank}.json").write_text(json.dumps(told))
    os._exit(0)
