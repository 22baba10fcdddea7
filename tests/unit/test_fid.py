"""Streaming statistics and the Fréchet distance."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.errors import EvalError
from eval.fid import frechet_distance, metric_name
from eval.statistics import FeatureStatistics


def features(seed: int, count: int, dims: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or dims, dims, generator=generator, dtype=torch.float64)
    offset = torch.randn(dims, generator=generator, dtype=torch.float64)
    return torch.randn(count, rank or dims, generator=generator, dtype=torch.float64) @ mix + offset


def statistics_of(values: torch.Tensor, name: str = "net") -> FeatureStatistics:
    statistics = FeatureStatistics(network=name)
    statistics.update(values)
    return statistics


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=6), split=st.integers(0, 50), seed=st.integers(0, 100))
def test_statistics_do_not_depend_on_the_split(cuts: list[int], split: int, seed: int) -> None:
    values = features(seed, 50, 4)
    edges = sorted({0, 50, split, *cuts})
    left, right = FeatureStatistics(network="net"), FeatureStatistics(network="net")
    for start, stop in zip(edges, edges[1:], strict=False):
        (left if stop <= split else right).update(values[start:stop])
    left.merge(right)
    assert left.count == 50
    torch.testing.assert_close(left.mean, values.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.covariance(), torch.cov(values.T), rtol=1e-11, atol=1e-11)


def test_statistics_keep_precision_far_from_zero() -> None:
    """A sum-of-squares accumulator in float32 would lose the whole covariance here."""
    values = features(3, 400, 3) + 1e6
    statistics = FeatureStatistics(network="net")
    for batch in values.split(37):
        statistics.update(batch)
    torch.testing.assert_close(statistics.covariance(), torch.cov(values.T), rtol=1e-7, atol=1e-7)


def distance_by_matrix_root(a: torch.Tensor, b: torch.Tensor) -> float:
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    difference = a.numpy().mean(0) - b.numpy().mean(0)
    return float(difference @ difference + np.trace(cov_a + cov_b) - 2 * np.trace(np.real(root)))


def test_distance_equals_the_matrix_root_formula() -> None:
    a, b = features(0, 300, 24), features(1, 250, 24)
    expected = distance_by_matrix_root(a, b)
    assert frechet_distance(statistics_of(a), statistics_of(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(statistics_of(b), statistics_of(a)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [6, 400])
def test_singular_covariances_take_the_other_way(count: int) -> None:
    """Fewer pictures than dimensions, and a feature subspace that is never used: both lack a Cholesky factor."""
    a, b = features(0, count, 12, rank=5), features(1, 400, 12)
    root_b = scipy.linalg.sqrtm(np.cov(b.numpy().T))  # S_2 is regular, so S_2^(1/2) S_1 S_2^(1/2) has a real root
    inner = np.linalg.eigvalsh(root_b @ np.cov(a.numpy().T) @ root_b)
    difference = (a.mean(0) - b.mean(0)).numpy()
    traces = np.trace(np.cov(a.numpy().T)) + np.trace(np.cov(b.numpy().T))
    expected = difference @ difference + traces - 2 * np.sqrt(np.clip(inner, 0, None)).sum()
    assert frechet_distance(statistics_of(a), statistics_of(b)) == pytest.approx(expected, rel=1e-6)


def test_distance_of_known_gaussians() -> None:
    """Same covariance: the squared distance of the means. Scaled by 2: the trace of the covariance on top."""
    a = features(5, 500, 6)
    trace = float(torch.cov(a.T).trace())
    assert frechet_distance(statistics_of(a), statistics_of(a)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(statistics_of(a), statistics_of(a + 3)) == pytest.approx(6 * 9, rel=1e-9)
    scaled = (a - a.mean(0)) * 2 + a.mean(0)
    assert frechet_distance(statistics_of(a), statistics_of(scaled)) == pytest.approx(trace, rel=1e-9)


def test_other_networks_and_bad_features_are_refused(tmp_path) -> None:
    a = statistics_of(features(0, 10, 3))
    with pytest.raises(EvalError, match="cannot be compared"):
        frechet_distance(a, statistics_of(features(0, 10, 3), name="other"))
    with pytest.raises(EvalError, match="NaN or infinity"):
        a.update(torch.tensor([[0.0, float("nan"), 1.0]]))
    with pytest.raises(EvalError, match="at least 2 pictures"):
        statistics_of(features(0, 1, 3)).covariance()
    path = tmp_path / "reference.safetensors"
    a.save(path)
    loaded = FeatureStatistics.load(path)
    assert (loaded.network, loaded.count) == ("net", 10)
    torch.testing.assert_close(loaded.scatter, a.scatter, rtol=0, atol=0)
    with pytest.raises(EvalError, match="never overwritten"):
        a.save(path)
    path.write_bytes(b"broken")
    with pytest.raises(EvalError, match="compute them again"):
        FeatureStatistics.load(path)


def test_a_distance_is_named_after_its_network() -> None:
    assert metric_name("digits-cnn") == "fd_digits_cnn"
