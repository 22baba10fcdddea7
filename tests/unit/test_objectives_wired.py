"""The diffusion family at work: in a training step, the validation loss, in drawing, in recipes and the export."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data.loader import Batch
from eval.held_out import HeldOut
from eval.validation import validation_loss
from launch.config_io import load_recipe
from launch.errors import ConfigError
from models import prng
from models.diffusion import DiffusionConfig, a, b, interpolate, loss_weight, network_input, path_of, target
from models.errors import ModelError
from models.export import export_diffusers
from models.pipeline import TextToImage
from models.time_density import sample_t, shift_time
from tests.helpers.evaluations import tiny_pipeline
from training.config import DiTRecipe
from training.diffusion_step import diffusion_step

PAIRS = [
    DiffusionConfig(path=path, prediction=prediction)
    for path, prediction in itertools.product(
        ("rectified_flow", "vp_cosine", "ddpm", "ve"), ("velocity", "x", "epsilon", "v")
    )
]
MEAN, STD = 0.3, 0.5  # of the latents that the oracle knows
SEED = 5


@pytest.fixture(scope="module")
def pipeline() -> TextToImage:
    return tiny_pipeline()


def with_diffusion(pipeline: TextToImage, diffusion: DiffusionConfig, dit: nn.Module | None = None) -> TextToImage:
    return TextToImage(pipeline.autoencoder, dit or pipeline.dit, pipeline.conditioner, diffusion, 32)


def frozen_of(pipeline: TextToImage) -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"), autoencoder=pipeline.autoencoder, conditioner=pipeline.conditioner
    )


def batch_of(numbers: list[int], width: int = 32, height: int = 32) -> Batch:
    size = len(numbers)
    pixels = torch.randint(0, 256, (size, 3, height, width), generator=torch.Generator().manual_seed(numbers[0]))
    return Batch(
        pixels=pixels.to(torch.uint8),
        captions=["a red seven"] * size,
        keys=[str(number) for number in numbers],
        sample_numbers=torch.tensor(numbers),
        weights=torch.tensor([1.0] * (size - 1) + [0.0]),
        sizes=torch.zeros(size, 2),
        crops=torch.zeros(size, 4),
        bad=[],
        metas=[{}] * size,
        visits=torch.zeros(size, dtype=torch.int64),
        filtered=torch.zeros(0, dtype=torch.int64),
        stream=0,
        positions=(),
    )


def step(pipeline: TextToImage, batch: Batch, diffusion: DiffusionConfig, dit=None, **changes: int):
    """The loss, and what the network was asked: (input, t)."""
    asked = []

    def network(*arguments):
        asked.append(arguments[:2])
        return (dit or pipeline.dit)(*arguments)

    settings = {"seed": SEED, "sample_latents": False, "global_batch_size": 8, "patch_size": 2, **changes}
    loss, _ = diffusion_step(network, batch, frozen_of(pipeline), diffusion, **settings)
    return loss, *asked[0]


def latents_and_noise(pipeline: TextToImage, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    latents = pipeline.autoencoder.encode_latents(batch.images())
    return latents, prng.normal(SEED, prng.NOISE, batch.sample_numbers, tuple(latents.shape[1:]))


def test_the_default_step_is_plain_flow_matching_to_the_bit(pipeline: TextToImage) -> None:
    batch = batch_of([40, 41, 42, 43])
    loss, seen, t = step(pipeline, batch, DiffusionConfig())
    latents, noise = latents_and_noise(pipeline, batch)
    uniforms = prng.uniform(SEED, prng.TIME, batch.sample_numbers).double()
    expected_t = torch.sigmoid(torch.special.ndtri(uniforms)).float()
    assert torch.equal(t, expected_t)
    column = t.reshape(-1, 1, 1, 1)
    x_t = (1 - column) * latents + column * noise
    assert torch.equal(seen, x_t)
    text = pipeline.conditioner.encode(batch.captions)
    predicted = pipeline.dit(x_t, t, text.text_embeds, text.pooled, text.text_mask)
    error = (predicted - (noise - latents)).square().flatten(1).mean(1)
    assert torch.equal(loss, (error * batch.weights).mean())


@pytest.mark.parametrize("weighting", ["none", "min_snr", "snr", "cosine"])
@pytest.mark.parametrize("diffusion", PAIRS, ids=lambda c: f"{c.path}-{c.prediction}")
def test_the_step_of_every_pair(pipeline: TextToImage, diffusion: DiffusionConfig, weighting: str) -> None:
    diffusion = replace(diffusion, weighting=weighting, time_density="mode")
    batch = batch_of([0, 1, 2, 3])
    loss, seen, t = step(pipeline, batch, diffusion, lambda x, *_: torch.zeros_like(x))
    latents, noise = latents_and_noise(pipeline, batch)
    assert torch.equal(seen, network_input(diffusion, interpolate(diffusion, latents, noise, t), t))
    error = target(diffusion, latents, noise, t).square().flatten(1).mean(1)
    assert loss.item() == pytest.approx((loss_weight(diffusion, t) * error * batch.weights).mean().item())
    assert loss > 0 and torch.isfinite(loss)


def test_strata_cover_a_step_however_it_is_divided(pipeline: TextToImage) -> None:
    diffusion = DiffusionConfig(time_density="uniform", stratified=True)
    for micro_batches in ([[16, 17, 18, 19], [20, 21, 22, 23]], [[22, 23], [16, 17], [20, 21], [18, 19]]):
        times = {}
        for numbers in micro_batches:
            _, _, t = step(pipeline, batch_of(numbers), diffusion)
            times |= dict(zip(numbers, t.tolist(), strict=True))
        assert sorted(int(8 * t) for t in times.values()) == list(range(8))
        assert [int(8 * times[number]) for number in range(16, 24)] == [1, 4, 5, 6, 7, 0, 2, 3]


def test_each_micro_batch_is_shifted_by_its_own_tokens(pipeline: TextToImage) -> None:
    diffusion = DiffusionConfig(base_tokens=16)
    uniforms = prng.uniform(SEED, prng.TIME, torch.arange(2))
    plain = sample_t(DiffusionConfig(), uniforms)
    # Pictures of 32x32 px are 8x8 latents, 4x4 tokens.
    for (width, height), shift in (((32, 32), 1.0), ((64, 64), 2.0), ((16, 64), 1.0), ((64, 32), 2**0.5)):
        _, _, t = step(pipeline, batch_of([0, 1], width, height), diffusion)
        torch.testing.assert_close(t, shift_time(plain, shift))
    assert with_diffusion(pipeline, diffusion).shift(16, 16) == 2.0
    assert with_diffusion(pipeline, DiffusionConfig(shift=1.3)).shift(16, 16) == 1.3


class Oracle(nn.Module):
    """Knows that latents are N(MEAN, STD**2), and predicts as the diffusion asks."""

    def __init__(self, pipeline: TextToImage, diffusion: DiffusionConfig) -> None:
        super().__init__()
        self.config, self.diffusion = pipeline.dit.config, diffusion
        self.asked: list[float] = []

    def forward(self, seen, t, *_):
        self.asked.append(t[0].item())
        t = t.double()
        at, bt, scale = (f(t).reshape(-1, 1, 1, 1) for f in path_of(self.diffusion)[:2] + path_of(self.diffusion)[4:])
        surprise = (seen.double() / scale - at * MEAN) / (at**2 * STD**2 + bt**2)
        return target(self.diffusion, MEAN + at * STD**2 * surprise, bt * surprise, t).float()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("diffusion", PAIRS, ids=lambda c: f"{c.path}-{c.prediction}")
def test_every_pair_draws(pipeline: TextToImage, diffusion: DiffusionConfig, guidance_scale: float) -> None:
    oracle = Oracle(pipeline, diffusion)
    drawing = with_diffusion(pipeline, diffusion, oracle)
    images = drawing.generate(["a", "b"], [1, 2], num_steps=50, guidance_scale=guidance_scale)
    latents = MEAN + STD * drawing.noise([1, 2], 32, 32)  # the flow of a Gaussian moves every point straight there
    expected = (pipeline.autoencoder.decode(latents) * 0.5 + 0.5).clamp(0, 1)
    assert len(oracle.asked) == 50 and min(oracle.asked) > 0.0
    assert (images - expected).abs().max() < 0.05 < expected.std()


@pytest.mark.parametrize("path", ["rectified_flow", "ve"])
def test_the_validation_loss_is_one_yardstick_for_all_predictions(pipeline: TextToImage, path: str) -> None:
    pictures = torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    held_out = HeldOut(url="", keys=["k"] * 5, prompts=["a"] * 5, metas=[{}] * 5, pictures=pictures)
    losses = []
    for prediction in ("velocity", "x", "epsilon", "v"):
        diffusion = DiffusionConfig(path=path, prediction=prediction)
        told = with_diffusion(pipeline, diffusion, Oracle(pipeline, diffusion))
        losses.append(validation_loss(told, held_out, batch_size=2))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("diffusion", [DiffusionConfig(path="vp_cosine"), DiffusionConfig(prediction="v")])
def test_the_export_refuses_what_the_stock_pipeline_does_not_know(pipeline, diffusion, tmp_path) -> None:
    message = f"path: {diffusion.path} and prediction: {diffusion.prediction}, but StableDiffusion3Pipeline knows"
    with pytest.raises(ModelError, match=message):
        export_diffusers(with_diffusion(pipeline, diffusion), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_saved_and_loaded(pipeline: TextToImage, tmp_path) -> None:
    diffusion = DiffusionConfig(path="ve", prediction="epsilon", sigma_max=30.0, base_tokens=16, weighting="snr")
    with_diffusion(pipeline, diffusion).save(tmp_path / "model")
    assert TextToImage.load(tmp_path / "model").diffusion == diffusion


def test_recipes_choose_from_the_family() -> None:
    overrides = [
        "diffusion={path: ddpm, beta_schedule: scaled_linear, beta_start: 0.00085, beta_end: 0.012, prediction: v}",
        "diffusion={time_density: mode, mode_scale: 0.8, base_tokens: 64, stratified: true, weighting: min_snr}",
    ]
    _, recipe = load_recipe("digits-dit", overrides, {"dit": DiTRecipe})
    assert recipe.diffusion == DiffusionConfig(
        path="ddpm", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction="v",
        time_density="mode", mode_scale=0.8, base_tokens=64, stratified=True, weighting="min_snr",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"diffusion: sigma_max = 3\.0 has no meaning with path = 'rectified_flow'"):
        load_recipe("digits-dit", ["diffusion.sigma_max=3.0"], {"dit": DiTRecipe})


def test_configurations_of_one_path_stay_apart() -> None:
    t = torch.tensor([1.0])
    assert b(DiffusionConfig(path="ve", sigma_max=7.0), t).item() == pytest.approx(7.0)
    assert b(DiffusionConfig(path="ve"), t).item() == pytest.approx(80.0)
    assert a(DiffusionConfig(path="ddpm", beta_end=0.03), t) < a(DiffusionConfig(path="ddpm"), t)
