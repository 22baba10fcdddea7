"""Between two rows the host does not wait for the device.

The "device" is torch's meta device: what it computes is never there, so whoever asks for a value fails, and a copy or
an index that would hold up the host on a GPU is seen as it is asked for.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.autoencoder import Autoencoder
from models.conditioner import TextPadding
from models.diffusion import DiffusionConfig
from models.discriminator import Discriminator
from models.dit import DiT, DiTConfig
from models.text_encoder import Conditioner
from tests.helpers import tiny
from tests.unit.test_run_checks import batch_of
from training.autoencoder_step import discriminator_step, generator_step
from training.diffusion_step import diffusion_step, posterior_noise
from training.losses import AutoencoderLossConfig
from training.metrics import Meter
from training.run_checks import DiffusionChecks, DrawsCheck
from training.throughput import Pace
from training.update_gate import guarded

DEVICE = torch.device("meta")
COPIES = ("_to_copy", "copy_")


class Lists(TorchFunctionMode):
    """Collects indexes and contents that are lists: they go to the device by a copy that nobody else sees."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        indexing = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == DEVICE
        if indexing and any(isinstance(part, list) for part in (args[1] if isinstance(args[1], tuple) else args[1:2])):
            self.found.append("an index that is a list")
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            self.found.append("torch.tensor on the device")
        return func(*args, **kwargs)


class Waits(TorchDispatchMode):
    """Collects what would wait: copies from the host that block, and indexes that lie on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.ndim]
        if isinstance(out, torch.Tensor) and out.device == DEVICE and on_host:
            waits = not (kwargs or {}).get("non_blocking") and True not in args[2:] if name in COPIES else True
            if waits:
                self.found.append(f"{name} of {[tuple(tensor.shape) for tensor in on_host]}")
        return out


def waits_of(step: Callable[[], Any]) -> list[str]:
    step()  # what is made once is made
    with Lists() as lists, Waits() as waits:
        step()
    return lists.found + waits.found


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not know this device; everything is float32."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("text_padding", ["attended", "masked"])
def test_a_diffusion_step_waits_for_nothing(text_padding: TextPadding, stratified: bool) -> None:
    conditioner = Conditioner([replace(encoder, dropout=0.5) for encoder in tiny.ENCODERS], text_padding)
    diffusion = DiffusionConfig(stratified=stratified)
    config = DiTConfig(
        latent_channels=4, depth=1, width=16, num_heads=2, max_grid=8,
        text_dim=conditioner.text_dim, pooled_dim=conditioner.pooled_dim,
    )  # fmt: skip
    dit, autoencoder = DiT(config).to(DEVICE), Autoencoder(tiny.AUTOENCODER).to(DEVICE)
    frozen: Any = SimpleNamespace(device=DEVICE, autoencoder=autoencoder, conditioner=conditioner.to(DEVICE))
    checks, meter = DiffusionChecks(diffusion, conditioner, config, Pace(torch.device("cpu"))), Meter()
    first = 0

    def step() -> None:
        nonlocal first
        loss, scalars = diffusion_step(
            dit, batch_of(range(first, first + 8)), frozen, diffusion, seed=1, sample_latents=True,
            global_batch_size=16, patch_size=2, checks=checks,
        )  # fmt: skip
        guarded(loss).backward()
        meter.add(**scalars)
        first += 8  # new captions: the text encoders have work

    assert waits_of(step) == []


def test_an_autoencoder_step_waits_for_nothing() -> None:
    recipe = tiny.autoencoder_recipe(Path("unused"))
    with DEVICE:
        autoencoder, discriminator = Autoencoder(recipe.model), Discriminator(recipe.discriminator)
    loss, draws, meter = AutoencoderLossConfig(disc_start_step=0), DrawsCheck(), Meter()

    def step() -> None:
        batch = batch_of(range(4))
        images, weights = batch.images(DEVICE), batch.weights.to(DEVICE, non_blocking=True)
        eps = posterior_noise(autoencoder, images, batch.sample_numbers.to(DEVICE, non_blocking=True), 1)
        draws.add(batch.sample_numbers, eps)
        turn = generator_step(
            autoencoder, discriminator, None, images, eps, weights, loss, last_conv=autoencoder.last_conv, step=0
        )
        guarded(turn.objective, turn.scalars["loss"]).backward()
        fake = discriminator_step(discriminator, images, turn.decoded, weights)
        guarded(fake).backward()
        meter.add(**turn.scalars, disc_loss=fake)

    assert waits_of(step) == []
