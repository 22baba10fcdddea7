"""Paths, targets, conversions and the density of training times."""

import pytest
import torch
from scipy import integrate, stats

from models import prng
from models.diffusion import (
    DiffusionConfig,
    a,
    b,
    density,
    interpolate,
    sample_t,
    shift_time,
    target,
    to_noise,
    to_score,
    to_velocity,
    to_x0,
)

DENSITIES = [
    DiffusionConfig(time_density="uniform"),
    DiffusionConfig(time_density="uniform", shift=3.0),
    DiffusionConfig(),
    DiffusionConfig(logit_mean=-0.5, logit_std=0.7),
    DiffusionConfig(logit_mean=0.3, logit_std=1.4, shift=3.0),
    DiffusionConfig(shift=0.4),
]


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


@pytest.mark.parametrize("config", DENSITIES)
def test_the_density_integrates_to_one_and_is_what_is_drawn(config):
    def pdf(t):
        return density(config, torch.tensor(t)).item()

    total, _ = integrate.quad(pdf, 0, 1, limit=200)
    assert total == pytest.approx(1.0, abs=1e-6)
    t = sample_t(config, prng.uniform(11, prng.TIME, torch.arange(4000)))
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    edges = torch.linspace(0, 1, 9)
    masses = torch.tensor([integrate.quad(pdf, *edges[i : i + 2].tolist())[0] for i in range(8)], dtype=torch.float64)
    found = torch.histc(t, 8, 0, 1).double()
    assert stats.chisquare(found.numpy(), (4000 * masses / masses.sum()).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("config", DENSITIES)
def test_times_invert_the_distribution_function(config):
    for u in (0.05, 0.5, 0.9):
        t = sample_t(config, torch.tensor([u])).item()
        below, _ = integrate.quad(lambda s: density(config, torch.tensor(s)).item(), 0, t, limit=200)
        assert below == pytest.approx(u, abs=1e-5)


def test_the_density_of_the_paper():
    t = torch.linspace(0.01, 0.99, 21)
    expected = stats.norm.pdf(torch.logit(t.double()), 0.5, 1.2) / (t * (1 - t)).double()
    torch.testing.assert_close(density(DiffusionConfig(logit_mean=0.5, logit_std=1.2), t), expected, rtol=1e-5, atol=0)
    ends = density(DiffusionConfig(), torch.tensor([-0.1, 0.0, 1.0, 1.1]))
    assert torch.equal(ends, torch.zeros(4, dtype=torch.float64))


def test_extreme_uniforms_give_finite_times():
    uniforms = torch.tensor([2.0**-24, 1 - 2.0**-24])
    for config in (*DENSITIES, DiffusionConfig(logit_std=20.0)):
        t = sample_t(config, uniforms)
        assert torch.isfinite(t).all() and 0 <= t[0] < t[1] <= 1


def test_shift_moves_towards_noise():
    t = torch.linspace(0, 1, 11)
    assert torch.equal(shift_time(t, 1.0), t)
    shifted = shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(shift_time(shifted, 1 / 3), t)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "straight"}, "path = 'straight' is not known: choose one of rectified_flow"),
        ({"prediction": "epsilon"}, "prediction = 'epsilon'"),
        ({"time_density": "normal"}, "choose one of uniform, logit_normal"),
        ({"logit_std": 0.0}, "logit_std = 0.0 must be"),
        ({"shift": -1.0}, "shift = -1.0 must be"),
        ({"shift": float("nan")}, "shift = nan must be"),
        ({"logit_mean": float("inf")}, "logit_mean = inf must be"),
        ({"time_density": "uniform", "logit_mean": 0.5}, "no meaning with time_density = 'uniform'"),
    ],
)
def test_impossible_choices(changes, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**changes)
