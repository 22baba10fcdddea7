"""Averages against their formulas, and averages found afterwards against those that were kept."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data.manifest import step_folder
from tests.helpers.commits import write_commit
from training.ema import EMA, EMAConfig, ema_decay, gamma_of, power_name, sigma_rel_of
from training.engine import Fragment
from training.errors import TrainingError
from training.fragments import scatter
from training.post_hoc_ema import Profile, dot, fit, write_post_hoc_ema

STEPS, EVERY = 512, 16
STORED = (0.05, 0.10)


def fragments(*sizes: int) -> dict[str, Fragment]:
    return {f"w{n}": Fragment(data=torch.zeros(size), start=0, shape=(size,)) for n, size in enumerate(sizes)}


def profile(sigma_rel: float, steps: int) -> np.ndarray:
    """The weight of each step, in float64: (τ^(γ+1) − (τ−1)^(γ+1)) / t^(γ+1)."""
    return np.diff((np.arange(steps + 1) / steps) ** (gamma_of(sigma_rel) + 1))


# --- constant decays and power functions --------------------------------------------------------------------------


def test_constant_decay_warms_up_to_the_declared_one() -> None:
    config = EMAConfig(decays=(0.99,))
    assert ema_decay(config, 0.99, 0) == pytest.approx(0.1)
    assert ema_decay(config, 0.99, 10**6) == 0.99
    assert ema_decay(replace(config, warmup=False), 0.99, 0) == 0.99


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (12**-0.5, 0.0)])
def test_gamma_is_that_of_the_paper(sigma_rel: float, gamma: float) -> None:
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-3)
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-6)


def test_sigma_rel_is_the_standard_deviation_of_the_profile() -> None:
    weights, places = profile(0.15, 100_000), (np.arange(100_000) + 0.5) / 100_000
    mean = weights @ places
    assert np.sqrt(weights @ (places - mean) ** 2) == pytest.approx(0.15, rel=1e-5)


def test_a_ramp_is_averaged_to_its_integral() -> None:
    """∫ τ (γ + 1) τ^γ dτ / t^(γ+1) = t (γ + 1) / (γ + 2), and the start value is forgotten."""
    weights = {"w0": Fragment(data=torch.full((1,), 1e6, dtype=torch.float64), start=0, shape=(1,))}
    ema = EMA(EMAConfig(decays=(), sigma_rels=(0.2,)), weights)
    for step in range(4000):
        weights["w0"].data.fill_((step + 0.5) / 4000)
        ema.update(step)
    gamma = gamma_of(0.2)
    assert ema.fragments()["w0"].data.item() == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-7)


def test_updates_are_the_formula_in_float64() -> None:
    config = EMAConfig(decays=(0.9, 0.99), sigma_rels=(0.05, 0.25))
    weights = fragments(7, 0, 5)  # a rank may own nothing of a tensor
    ema = EMA(config, weights)
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((300, 12)) * 0.05, 0).astype(np.float32)
    slow = {decay: np.zeros(12) for decay in config.decays}
    for step, row in enumerate(walk):
        scatter(torch.from_numpy(row[:7]), weights["w0"])
        scatter(torch.from_numpy(row[7:]), replace(weights["w2"], start=0))
        ema.update(step)
        for decay, average in slow.items():
            now = min(decay, (1 + step) / (10 + step))
            average += (1 - now) * (row - average)
    expected = {f"ema-{decay}": average for decay, average in slow.items()}
    expected |= {power_name(sigma): profile(sigma, 300) @ walk.astype(np.float64) for sigma in config.sigma_rels}
    assert ema.groups().keys() == expected.keys()
    for group, parts in ema.groups().items():
        found = torch.cat([parts["w0"].data, parts["w2"].data]).double().numpy()
        assert np.abs(found - expected[group]).max() < 1e-6, group


def test_a_rank_that_owns_nothing_has_nothing_to_do() -> None:
    ema = EMA(EMAConfig(sigma_rels=(0.1,)), fragments(0))
    ema.update(0)
    assert ema.fragments()["w0"].data.numel() == 0


def test_resuming_in_between_changes_no_bit() -> None:
    config = EMAConfig(decays=(0.9,), sigma_rels=(0.05, 0.1))
    walk = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))

    def run(ema: EMA, weights: dict[str, Fragment], steps: range) -> EMA:
        for step in steps:
            weights["w0"].data.copy_(walk[step])
            ema.update(step)
        return ema

    weights = fragments(6)
    whole = run(EMA(config, weights), weights, range(20))
    weights = fragments(6)
    first = run(EMA(config, weights), weights, range(9))
    saved = {group: parts["w0"].data.clone() for group, parts in first.groups().items()}
    weights["w0"].data.fill_(7.0)
    resumed = EMA(config, weights)
    for group, parts in resumed.groups().items():
        scatter(saved[group], parts["w0"])
    run(resumed, weights, range(9, 20))
    for group, parts in whole.groups().items():
        assert parts["w0"].data.equal(resumed.fragments(group)["w0"].data)


def test_names_and_what_comes_first() -> None:
    assert EMAConfig(sigma_rels=(0.1, 0.075)).names == ("ema-0.9999", "ema-power-0.10", "ema-power-0.075")
    assert EMAConfig(decays=(), sigma_rels=(0.05,)).names == ("ema-power-0.05",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decays": (1.0,)}, r"decays \(1.0,\)"),
        ({"decays": ()}, "both empty"),
        ({"sigma_rels": (0.3,)}, "sigma_rels 0.3 must be from 0.001 to 0.288"),
        ({"sigma_rels": (0.1, 0.10)}, "must each differ"),
    ],
)
def test_impossible_averages_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMAConfig(**settings)


# --- found afterwards ---------------------------------------------------------------------------------------------


def test_products_are_those_of_the_profiles() -> None:
    places = (np.arange(200_000) + 0.5) / 200_000 * 8

    def values(one: Profile) -> np.ndarray:
        inside = places <= one.step
        return np.where(inside, (one.gamma + 1) * places**one.gamma / one.step ** (one.gamma + 1), 0.0)

    profiles = [Profile(gamma=gamma, step=step) for gamma, step in ((17.0, 8), (6.9, 8), (6.9, 5), (0.5, 3))]
    for a, b in itertools.combinations_with_replacement(profiles, 2):
        assert dot(a, b) == pytest.approx((values(a) * values(b)).sum() * 8 / 200_000, rel=1e-3)


def test_weights_sum_to_one_however_rough_the_fit() -> None:
    stored = [Profile(gamma=gamma_of(0.05), step=step) for step in (900, 1000)]
    found = fit(Profile(gamma=gamma_of(0.25), step=1000), stored)
    assert found.weights.sum() == pytest.approx(1.0, abs=1e-9) and found.residual > 0.3


@pytest.fixture(scope="module")
def walk() -> np.ndarray:
    """A random walk of 48 weights around 3, float32."""
    steps = np.random.default_rng(1).standard_normal((STEPS, 48))
    return (3 + 0.02 * np.cumsum(steps, 0)).astype(np.float32)


def committed(url: Path, walk: np.ndarray, steps: range, sigma_rels: tuple[float, ...]) -> Iterator[int]:
    """Commits as training writes them, of the averages of `walk` and of nothing else."""
    weights = fragments(30, 18)
    ema = EMA(EMAConfig(decays=(0.9,), sigma_rels=sigma_rels), weights)
    for step, row in enumerate(walk):
        weights["w0"].data.copy_(torch.from_numpy(row[:30]))
        weights["w1"].data.copy_(torch.from_numpy(row[30:]))
        ema.update(step)
        if step + 1 not in steps:
            continue
        tensors = {group: {n: f.data for n, f in average.items()} for group, average in ema.groups().items()}
        write_commit(url, step + 1, tensors)
        yield step + 1


@pytest.fixture(scope="module")
def run(walk: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("run") / "checkpoints"
    assert len(list(committed(url, walk, range(EVERY, STEPS + 1, EVERY), STORED))) == STEPS // EVERY
    return url


def error(out: Path, walk: np.ndarray, sigma_rel: float, steps: int) -> float:
    """RMS error of the written average over the RMS distance of the true one from the last weights."""
    tensors = load_file(out)
    found = np.concatenate([tensors["w0"].numpy(), tensors["w1"].numpy()])
    true = profile(sigma_rel, steps) @ walk[:steps].astype(np.float64)
    return float(np.linalg.norm(found - true) / np.linalg.norm(true - walk[steps - 1]))


@pytest.mark.parametrize("sigma_rel", STORED)
def test_a_stored_average_is_found_as_it_was_stored(run: Path, walk: np.ndarray, tmp_path: Path, sigma_rel: float):
    facts = write_post_hoc_ema(str(run), sigma_rel, tmp_path / "found.safetensors")
    assert facts["step"] == STEPS and facts["residual"] < 1e-6
    weights = {(used["step"], used["group"]): used["weight"] for used in facts["used"]}
    assert weights.pop((STEPS, power_name(sigma_rel))) == pytest.approx(1.0, abs=1e-5)
    assert max(map(abs, weights.values())) < 1e-5
    assert error(tmp_path / "found.safetensors", walk, sigma_rel, STEPS) < 1e-5


@pytest.mark.parametrize(("sigma_rel", "most"), [(0.075, 2e-4), (0.15, 2e-4), (0.20, 2e-3), (0.03, 1e-2)])
def test_an_average_that_was_not_stored_is_found(run: Path, walk: np.ndarray, tmp_path: Path, sigma_rel, most):
    out = tmp_path / "found.safetensors"
    facts = write_post_hoc_ema(str(run), sigma_rel, out)
    assert error(out, walk, sigma_rel, STEPS) < most
    assert 0 < facts["residual"] < 0.2
    with safe_open(out, framework="pt") as file:
        assert {key: json.loads(value) for key, value in file.metadata().items()} == facts


def test_an_earlier_end_is_found_from_what_was_there_by_then(run: Path, walk: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "found.safetensors"
    facts = write_post_hoc_ema(str(run), 0.15, out, step=256)
    assert max(used["step"] for used in facts["used"]) == facts["step"] == 256
    assert error(out, walk, 0.15, 256) < 2e-3


def test_two_commits_of_one_average_will_do_and_one_will_not(walk: np.ndarray, tmp_path: Path) -> None:
    url, commits = tmp_path / "checkpoints", committed(tmp_path / "checkpoints", walk, range(448, 513, 64), (0.1,))
    assert next(commits) == 448
    with pytest.raises(TrainingError, match="holds 1 power-function averages up to step 448, at least two are needed"):
        write_post_hoc_ema(str(url), 0.12, tmp_path / "a.safetensors")
    write_post_hoc_ema(str(url), 0.1, tmp_path / "a.safetensors")  # the very one
    assert next(commits) == 512
    facts = write_post_hoc_ema(str(url), 0.12, tmp_path / "b.safetensors")
    assert len(facts["used"]) == 2 and facts["residual"] < 0.5


def test_refusals_are_one_line(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("kept")
    for arguments, message in (
        ((str(run), 0.1, there), "nothing is overwritten"),
        ((str(run), 0.4, tmp_path / "x"), "--sigma-rel 0.4 must be from 0.001 to 0.288"),
        ((str(run), 0.1, tmp_path / "x", 20), "has no commit of step 20; there are: 16, 32, "),
        ((str(tmp_path / "none"), 0.1, tmp_path / "x"), "there are: none"),
    ):
        with pytest.raises(TrainingError) as caught:
            write_post_hoc_ema(*arguments)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert there.read_text() == "kept" and not (tmp_path / "x").exists()


def test_a_damaged_commit_is_refused_by_name(walk: np.ndarray, tmp_path: Path) -> None:
    url = tmp_path / "checkpoints"
    assert list(committed(url, walk, range(448, 513, 64), STORED)) == [448, 512]
    victim = url / step_folder(448) / "a0" / "ema-power-0.05-00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(TrainingError, match=r"ema-power-0.05-00001.safetensors: SHA-256"):
        write_post_hoc_ema(str(url), 0.12, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
