"""The mathematics of the run-time checks against scipy, and against the densities as they are drawn."""

import itertools

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from models.diffusion import DiffusionConfig
from models.time_density import density
from training.check_statistics import histogram_p, share_p, time_edges, time_quantile, time_shares

TOKENS = 96
KINDS = (
    {"time_density": "uniform"},
    {"logit_mean": 0.0},
    {"logit_mean": -0.5, "logit_std": 0.7},
    {"time_density": "mode"},
    {"time_density": "mode", "mode_scale": -0.6},
    {"time_density": "cosmap"},
)
SHIFTS = ({}, {"shift": 3.0}, {"shift": 0.4}, {"base_tokens": 24})
DENSITIES = [DiffusionConfig(**kind, **shift) for kind, shift in itertools.product(KINDS, SHIFTS)]


@pytest.mark.parametrize("config", DENSITIES)
def test_quantiles_and_shares_are_those_of_the_density(config):
    """Two ways that have no code in common: the papers' inverse here, the density by hand there."""

    def mass(low: float, high: float) -> float:
        return integrate.quad(lambda t: density(config, torch.tensor(t), TOKENS).item(), low, high, limit=200)[0]

    for share in (0.03125, 0.4, 0.97):
        assert mass(0.0, time_quantile(config, share, TOKENS)) == pytest.approx(share, abs=1e-6)
    shares = time_shares(config, 4, TOKENS)
    assert sum(shares) == pytest.approx(1.0)
    assert shares == pytest.approx([mass(i / 4, (i + 1) / 4) for i in range(4)], abs=1e-6)


def test_edges_that_float32_times_cannot_tell_apart_are_left_out():
    edges, shares = time_edges(DiffusionConfig(), 32)
    assert len(edges) == 31 and shares == pytest.approx([1 / 32] * 32)
    edges, shares = time_edges(DiffusionConfig(logit_std=20.0), 32)
    assert len(edges) + 1 == len(shares) < 32 and max(edges) < 0.9999
    assert sum(shares) == pytest.approx(1.0) and shares[-1] > 0.2  # all that ends at 1


def test_the_statistic_is_the_likelihood_ratio():
    counts, expected = [130.0, 90.0, 110.0, 70.0], [100.0] * 4
    statistic, _ = stats.power_divergence(counts, expected, lambda_="log-likelihood")
    williams = 1 + (4**2 - 1) / (6 * 400 * 3)  # of equal expectations
    assert histogram_p(counts, expected) == pytest.approx(stats.chi2.sf(statistic / williams, 3), rel=1e-9)
    assert histogram_p(expected, expected) == 1.0
    assert histogram_p([0.0, 400.0], [200.0, 200.0]) < 1e-100


def test_bins_of_few_are_merged_before_they_are_judged():
    assert histogram_p([3.0, 5.0], [4.0, 4.0]) is None
    merged = histogram_p([30.0, 1.0, 1.0, 28.0], [20.0, 10.0, 10.0, 20.0])
    assert merged == histogram_p([30.0, 2.0, 28.0], [20.0, 20.0, 20.0])
    assert histogram_p([30.0, 25.0, 5.0], [25.0, 25.0, 10.0]) == histogram_p([30.0, 30.0], [25.0, 35.0])
    # A bin of which nothing is expected, since its edge was left out, is no bin.
    assert histogram_p([30.0, 30.0, 0.0], [25.0, 35.0, 0.0]) == histogram_p([30.0, 30.0], [25.0, 35.0])


@pytest.mark.parametrize("bins, mean", [(32, 20), (8, 30), (32, 200)])
def test_false_alarms_are_as_rare_as_they_say(bins, mean):
    draws = np.random.default_rng(0).multinomial(bins * mean, [1 / bins] * bins, size=10_000)
    found = np.array([histogram_p(list(row), [float(mean)] * bins) for row in draws.astype(float)])
    for level in (0.1, 0.01, 0.001):
        assert (found < level).mean() < 1.5 * level + 3e-4


def test_the_bound_on_a_share_covers_the_binomial():
    for trials, probability in itertools.product((10, 300, 5000), (0.0, 0.02, 0.1, 0.5, 1.0)):
        for hits in {0, 1, int(trials * probability), int(trials * 0.15), trials}:
            tails = [stats.binomtest(hits, trials, probability, tail).pvalue for tail in ("less", "greater")]
            assert share_p(hits, trials, probability) >= 0.999 * min(1.0, 2 * min(tails))
    assert share_p(0, 0, 0.1) == 1.0
    assert share_p(0, 10**6, 0.0) == share_p(10**6, 10**6, 1.0) == 1.0
    assert share_p(1, 10**6, 0.0) == share_p(999_999, 10**6, 1.0) == 0.0
    assert share_p(200, 1000, 0.1) < 1e-15
    assert share_p(115, 1000, 0.1) > 0.1
