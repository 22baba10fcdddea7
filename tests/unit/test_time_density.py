"""Densities of training times, their shift with resolution, and strata over an optimiser step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from models import prng
from models.diffusion import DiffusionConfig
from models.time_density import density, sample_t, shift_of, shift_time, time_uniforms

TOKENS = 96  # of the pictures in these tests; only base_tokens asks for it
DENSITIES = [
    DiffusionConfig(time_density="uniform"),
    DiffusionConfig(time_density="uniform", shift=3.0),
    DiffusionConfig(),
    DiffusionConfig(logit_mean=-0.5, logit_std=0.7),
    DiffusionConfig(logit_mean=0.3, logit_std=1.4, shift=3.0),
    DiffusionConfig(shift=0.4),
    DiffusionConfig(time_density="mode"),
    DiffusionConfig(time_density="mode", mode_scale=-0.6, shift=2.0),
    DiffusionConfig(time_density="mode", mode_scale=0.0),
    DiffusionConfig(time_density="cosmap"),
    DiffusionConfig(time_density="cosmap", shift=0.5),
    DiffusionConfig(time_density="cosmap", base_tokens=32),
    DiffusionConfig(base_tokens=200),
]


@pytest.mark.parametrize("config", DENSITIES)
def test_the_density_integrates_to_one_and_is_what_is_drawn(config):
    def pdf(t):
        return density(config, torch.tensor(t), TOKENS).item()

    total, _ = integrate.quad(pdf, 0, 1, limit=200)
    assert total == pytest.approx(1.0, abs=1e-6)
    t = sample_t(config, prng.uniform(11, prng.TIME, torch.arange(4000)), TOKENS)
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    edges = torch.linspace(0, 1, 9)
    masses = torch.tensor([integrate.quad(pdf, *edges[i : i + 2].tolist())[0] for i in range(8)], dtype=torch.float64)
    found = torch.histc(t, 8, 0, 1).double()
    assert stats.chisquare(found.numpy(), (4000 * masses / masses.sum()).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("config", DENSITIES)
def test_times_invert_the_distribution_function(config):
    for u in (0.05, 0.5, 0.9):
        t = sample_t(config, torch.tensor([u]), TOKENS).item()
        below, _ = integrate.quad(lambda s: density(config, torch.tensor(s), TOKENS).item(), 0, t, limit=200)
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
        t = sample_t(config, uniforms, TOKENS)
        assert torch.isfinite(t).all() and 0 <= t[0] < t[1] <= 1


def test_shift_moves_towards_noise():
    t = torch.linspace(0, 1, 11)
    assert torch.equal(shift_time(t, 1.0), t)
    shifted = shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(shift_time(shifted, 1 / 3), t)


@pytest.mark.parametrize("scale", [1.29, -0.6])
def test_mode_sampling_is_the_papers(scale):
    u = torch.linspace(0.001, 0.999, 31, dtype=torch.float64)
    papers = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)  # decreasing; ours is that of 1 - u
    config = DiffusionConfig(time_density="mode", mode_scale=scale)
    torch.testing.assert_close(sample_t(config, 1 - u), papers.float())
    middle, edge = density(config, torch.tensor([0.5, 0.001])).tolist()
    assert (middle > edge) == (scale > 0)
    assert edge == pytest.approx(1 / (1 + scale), rel=0.02)


def test_cosmap_is_the_papers():
    u = torch.linspace(0.001, 0.999, 31, dtype=torch.float64)
    config = DiffusionConfig(time_density="cosmap")
    torch.testing.assert_close(sample_t(config, u), (1 - 1 / (torch.tan(math.pi * u / 2) + 1)).float())
    torch.testing.assert_close(density(config, u), 2 / (math.pi - 2 * math.pi * u + 2 * math.pi * u**2))


def test_the_shift_follows_the_tokens():
    config = DiffusionConfig(time_density="uniform", base_tokens=64)
    assert [shift_of(config, tokens) for tokens in (16, 64, 256)] == [0.5, 1.0, 2.0]
    u = torch.linspace(0.1, 0.9, 5)
    assert torch.equal(sample_t(config, u, 256), sample_t(DiffusionConfig(time_density="uniform", shift=2.0), u))
    assert shift_of(DiffusionConfig(shift=1.7), 999) == shift_of(DiffusionConfig(shift=1.7), None) == 1.7
    with pytest.raises(ValueError, match="base_tokens = 64: the shift depends on the picture's tokens"):
        sample_t(config, u)


STRATIFIED = DiffusionConfig(time_density="uniform", stratified=True)


@given(st.integers(0, 2**63), st.integers(1, 40), st.integers(0, 2**40), st.randoms(use_true_random=False))
def test_a_step_takes_one_time_from_every_stratum(seed, global_batch_size, step, random):
    numbers = step * global_batch_size + torch.arange(global_batch_size)
    uniforms = time_uniforms(STRATIFIED, seed, numbers, global_batch_size)
    strata = (uniforms * global_batch_size).floor().long()
    assert sorted(strata.tolist()) == list(range(global_batch_size))
    assert uniforms.min() > 0 and uniforms.max() < 1
    # A sample's number decides alone: not the batch, the rank or the order in which it is drawn.
    some = random.sample(range(global_batch_size), random.randint(1, global_batch_size))
    assert torch.equal(time_uniforms(STRATIFIED, seed, numbers[some], global_batch_size), uniforms[some])


def test_strata_leave_the_density_as_it_is():
    config, size = DiffusionConfig(logit_mean=0.4, shift=1.5, stratified=True), 8
    t = sample_t(config, time_uniforms(config, 3, torch.arange(4000), size))
    edges = torch.linspace(0, 1, 9)
    masses = [
        integrate.quad(lambda s: density(config, torch.tensor(s)).item(), *edges[i : i + 2].tolist())[0]
        for i in range(8)
    ]
    found = torch.histc(t, 8, 0, 1).double().numpy()
    assert stats.chisquare(found, [4000 * mass / sum(masses) for mass in masses]).pvalue > 1e-3
    # Each place of a step by itself is uniform, and two places of a step are in no fixed order.
    uniforms = time_uniforms(config, 3, torch.arange(32000), size).reshape(-1, size)  # (steps, places)
    for place in (0, 5):
        assert stats.kstest(uniforms[:, place].numpy(), "uniform").pvalue > 1e-3
    assert 0.45 < (uniforms[:, 0] < uniforms[:, 5]).double().mean() < 0.55
    # The mean over a step is what strata are for.
    plain = time_uniforms(DiffusionConfig(), 3, torch.arange(32000), size).reshape(-1, size)
    assert uniforms.mean(1).std() < 0.2 * plain.mean(1).std()


def test_without_strata_the_uniforms_are_those_of_the_stream():
    numbers = torch.tensor([0, 7, 2**40])
    assert torch.equal(time_uniforms(DiffusionConfig(), 9, numbers, 4), prng.uniform(9, prng.TIME, numbers))
