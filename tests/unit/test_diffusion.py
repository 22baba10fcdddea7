"""The default diffusion, and what a config refuses."""

import pytest
import torch

from models.diffusion import (
    DiffusionConfig,
    a,
    b,
    interpolate,
    target,
    to_noise,
    to_score,
    to_velocity,
    to_x0,
)


def pair(batch=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 2, 3, 5, generator=g), torch.randn(batch, 2, 3, 5, generator=g)


def test_zero_is_data_and_one_is_noise():
    config = DiffusionConfig()
    latents, noise = pair()
    assert torch.equal(interpolate(config, latents, noise, torch.zeros(4)), latents)
    assert torch.equal(interpolate(config, latents, noise, torch.ones(4)), noise)
    assert torch.equal(target(config, latents, noise, torch.rand(4)), noise - latents)
    t = torch.tensor([0.25, 0.5])
    torch.testing.assert_close(a(config, t), torch.tensor([0.75, 0.5]))
    torch.testing.assert_close(b(config, t), t)


def test_every_sample_has_its_own_time():
    config = DiffusionConfig()
    latents, noise = pair()
    t = torch.tensor([0.1, 0.9, 0.5, 0.3])
    together = interpolate(config, latents, noise, t)
    for i in range(4):
        torch.testing.assert_close(together[i], (1 - t[i]) * latents[i] + t[i] * noise[i])


def test_the_target_is_the_paths_derivative():
    config = DiffusionConfig()
    latents, noise = (x.double() for x in pair())
    t = torch.full((4,), 0.37, dtype=torch.float64)
    h = 1e-5
    slope = (interpolate(config, latents, noise, t + h) - interpolate(config, latents, noise, t - h)) / (2 * h)
    torch.testing.assert_close(target(config, latents, noise, t), slope)


@pytest.mark.parametrize("at", [0.02, 0.5, 0.98])
def test_conversions_invert_the_target(at):
    config = DiffusionConfig()
    latents, noise = pair()
    t = torch.full((4,), at)
    x_t, predicted = interpolate(config, latents, noise, t), target(config, latents, noise, t)
    torch.testing.assert_close(to_x0(config, predicted, x_t, t), latents)
    torch.testing.assert_close(to_noise(config, predicted, x_t, t), noise)
    torch.testing.assert_close(to_velocity(config, predicted, x_t, t), noise - latents)


def test_conversions_hold_at_both_ends():
    config = DiffusionConfig()
    latents, noise = pair()
    for t, x_t in ((torch.zeros(4), latents), (torch.ones(4), noise)):
        torch.testing.assert_close(to_x0(config, noise - latents, x_t, t), latents)
        torch.testing.assert_close(to_noise(config, noise - latents, x_t, t), noise)


def test_the_score_of_a_gaussian():
    config = DiffusionConfig()
    std, t = 0.6, torch.tensor([0.3])
    x_t = torch.linspace(-2, 2, 7).reshape(1, 1, 1, 7)
    variance = (1 - t) ** 2 * std**2 + t**2
    velocity = (t - (1 - t) * std**2) / variance * x_t  # E[noise - latents | x_t]
    torch.testing.assert_close(to_score(config, velocity, x_t, t), -x_t / variance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "straight"}, "path = 'straight' is not known: choose one of rectified_flow"),
        ({"prediction": "noise"}, "prediction = 'noise'"),
        ({"time_density": "normal"}, "choose one of uniform, logit_normal"),
        ({"logit_std": 0.0}, "logit_std = 0.0 must be"),
        ({"shift": -1.0}, "shift = -1.0 must be"),
        ({"shift": float("nan")}, "shift = nan must be"),
        ({"logit_mean": float("inf")}, "logit_mean = inf must be"),
        ({"time_density": "uniform", "logit_mean": 0.5}, "no meaning with time_density = 'uniform'"),
        ({"mode_scale": 0.5}, "mode_scale = 0.5 has no meaning with time_density = 'logit_normal'"),
        ({"time_density": "mode", "mode_scale": 1.76}, "mode_scale = 1.76 must lie between -1 and 1.7519"),
        ({"path": "ve", "beta_start": 0.1}, "beta_start = 0.1 and beta_end = 0.02: must be"),
        ({"path": "ve", "beta_end": 0.1}, "beta_end = 0.1 has no meaning with path = 've'"),
        ({"path": "ddpm", "beta_end": 1.0}, "beta_end = 1.0: must be above 0 and below 1.0"),
        ({"path": "ddpm", "beta_schedule": "cosine"}, "choose one of linear, scaled_linear"),
        ({"path": "ve", "sigma_min": 0.0}, "sigma_min = 0.0 and sigma_max = 80.0: must be"),
        ({"path": "ve", "sigma_max": float("inf")}, "sigma_max = inf must be"),
        ({"sigma_max": 50.0}, "sigma_max = 50.0 has no meaning with path = 'rectified_flow'"),
        ({"weighting": "sigmoid"}, "choose one of none, min_snr, snr, cosine"),
        ({"weighting": "snr", "min_snr_gamma": 3.0}, "no meaning with weighting = 'snr'"),
        ({"weighting": "min_snr", "min_snr_gamma": 0.0}, "min_snr_gamma = 0.0 must be"),
        ({"base_tokens": 0}, "base_tokens = 0 must be"),
        ({"base_tokens": 64, "shift": 2.0}, "shift = 2.0 and base_tokens = 64 exclude each other"),
    ],
)
def test_impossible_choices(changes, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**changes)
