"""Every path with every prediction: conversions, weights, and a Gaussian whose best prediction is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.diffusion import (
    DiffusionConfig,
    a,
    b,
    interpolate,
    latest_time,
    loss_weight,
    network_input,
    path_of,
    target,
    to_noise,
    to_score,
    to_velocity,
    to_x0,
    velocity_error,
)
from models.sampler import sample_flow
from models.time_density import density

PATHS = ("rectified_flow", "vp_cosine", "ddpm", "ve")
PREDICTIONS = ("velocity", "x", "epsilon", "v")
PAIRS = [DiffusionConfig(path=path, prediction=wanted) for path, wanted in itertools.product(PATHS, PREDICTIONS)]
WEIGHTINGS = ("none", "min_snr", "snr", "cosine")
MEAN, STD = 0.8, 0.4  # of the Gaussian


def name(config):
    return f"{config.path}-{config.prediction}"


def pair(batch):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, batch, 2, 3, 5, generator=g, dtype=torch.float64).unbind()


def best_prediction(config, x_t, t):
    """E[target | x_t] for latents ~ N(MEAN, STD**2), float64."""
    x_t, t = x_t.double(), t.double()
    at, bt = (f(config, t).reshape(-1, 1, 1, 1) for f in (a, b))
    surprise = (x_t - at * MEAN) / (at**2 * STD**2 + bt**2)
    return target(config, MEAN + at * STD**2 * surprise, bt * surprise, t)


@st.composite
def diffusions(draw):
    settings = {"path": draw(st.sampled_from(PATHS)), "prediction": draw(st.sampled_from(PREDICTIONS))}
    if settings["path"] == "ddpm":
        settings["beta_schedule"] = draw(st.sampled_from(["linear", "scaled_linear"]))
        settings["beta_start"] = draw(st.floats(1e-5, 1e-3))
        settings["beta_end"] = draw(st.floats(0.002, 0.03))
    if settings["path"] == "ve":
        settings["sigma_min"] = draw(st.floats(1e-3, 0.1))
        settings["sigma_max"] = draw(st.floats(1.0, 200.0))
    return DiffusionConfig(**settings)


@given(diffusions(), st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4))
@settings(deadline=None)
def test_conversions_invert_the_target(config, times):
    t = torch.tensor(times, dtype=torch.float64)
    latents, noise = pair(len(times))
    x_t, predicted = interpolate(config, latents, noise, t), target(config, latents, noise, t)
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(to_x0(config, predicted, x_t, t), latents, **close)
    torch.testing.assert_close(to_noise(config, predicted, x_t, t), noise, **close)
    path, column = path_of(config), t.reshape(-1, 1, 1, 1)
    velocity = path.da(column) * latents + path.db(column) * noise
    torch.testing.assert_close(to_velocity(config, predicted, x_t, t), velocity, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(to_score(config, predicted, x_t, t), -noise / b(config, column), **close)


@given(diffusions(), st.floats(0.02, 0.98))
@settings(deadline=None)
def test_derivatives(config, at):
    path, t, h = path_of(config), torch.tensor([at], dtype=torch.float64), 1e-4
    for function, derivative in ((path.a, path.da), (path.b, path.db)):
        slope = (function(t + h) - function(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), slope, rtol=1e-4, atol=1e-6)


def test_what_the_predictions_are():
    latents, noise = pair(1)
    t = torch.tensor([0.3], dtype=torch.float64)
    cosine, sine = math.cos(0.15 * math.pi), math.sin(0.15 * math.pi)
    expected = {
        "velocity": noise - latents,
        "x": latents,
        "epsilon": noise,
        "v": cosine * noise - sine * latents,
    }
    for prediction, value in expected.items():
        torch.testing.assert_close(
            target(DiffusionConfig(path="vp_cosine", prediction=prediction), latents, noise, t), value
        )
    v = target(DiffusionConfig(prediction="v"), latents, noise, t)
    torch.testing.assert_close(v, 0.7 * noise - 0.3 * latents)


def test_exploding_noise_has_size_one_for_the_network():
    config = DiffusionConfig(path="ve", prediction="v", sigma_min=0.01, sigma_max=100.0)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(b(config, t), torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64))
    latents, noise = torch.randn(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = network_input(config, interpolate(config, latents, noise, t), t)
    wanted = target(config, latents, noise, t)
    for values in (seen, wanted):
        assert values.flatten(1).std(1).tolist() == pytest.approx([1.0, 1.0, 1.0], abs=0.03)
    # In the network's eyes: x_t = alpha x + beta z with alpha^2 + beta^2 = 1, and v = alpha z - beta x.
    angle = torch.atan(b(config, t)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(seen, angle.cos() * latents + angle.sin() * noise)
    torch.testing.assert_close(wanted, angle.cos() * noise - angle.sin() * latents)


@pytest.mark.parametrize("path", PATHS[:3])
def test_other_paths_reach_the_network_as_they_are(path):
    x_t, t = torch.randn(2, 1, 2, 2), torch.rand(2)
    assert network_input(DiffusionConfig(path=path), x_t, t) is x_t


@pytest.mark.parametrize("path", PATHS)
def test_the_ends_of_a_path(path):
    config = DiffusionConfig(path=path)
    ends = torch.tensor([0.0, 1.0])
    at, bt = a(config, ends), b(config, ends)
    assert at.dtype == bt.dtype == torch.float32
    start = {"ve": 0.002}.get(path, 0.0)
    last = {"ddpm": 4.0358e-5**0.5, "ve": 1.0}.get(path, 0.0)  # the product of Ho et al.'s 1 - beta
    assert at.tolist() == pytest.approx([1.0, last], abs=1e-6)
    assert bt.tolist() == pytest.approx([start, {"ve": 80.0}.get(path, math.sqrt(1 - last**2))], abs=1e-5)


@pytest.mark.parametrize("betas", [(1e-4, 0.02), (0.00085, 0.012)])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_the_grid_of_ddpm(schedule, betas):
    config = DiffusionConfig(path="ddpm", beta_schedule=schedule, beta_start=betas[0], beta_end=betas[1])
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    if schedule == "linear":
        discrete = np.linspace(*betas, 1000)
    else:
        discrete = np.linspace(betas[0] ** 0.5, betas[1] ** 0.5, 1000) ** 2
    bars = torch.from_numpy(np.cumprod(1 - discrete))
    torch.testing.assert_close(a(config, t) ** 2, bars, rtol=1e-9, atol=0)
    torch.testing.assert_close(b(config, t) ** 2, 1 - bars, rtol=1e-6, atol=0)
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule=schedule, beta_start=betas[0], beta_end=betas[1])
    torch.testing.assert_close((a(config, t) ** 2).float(), scheduler.alphas_cumprod, rtol=2e-5, atol=0)


@pytest.mark.parametrize("config", PAIRS, ids=name)
def test_both_ends_are_finite_where_they_are_asked_for(config):
    latents, noise = (x.float() for x in pair(2))
    t = torch.tensor([1e-4, latest_time(config)])
    x_t, predicted = interpolate(config, latents, noise, t), target(config, latents, noise, t)
    for convert in (to_x0, to_noise, to_velocity, to_score):
        assert torch.isfinite(convert(config, predicted, x_t, t)).all()
    ends = torch.tensor([0.0, 1.0])
    assert torch.isfinite(target(config, latents, noise, ends)).all()
    for weighting in WEIGHTINGS:
        weights = loss_weight(
            DiffusionConfig(path=config.path, prediction=config.prediction, weighting=weighting), ends
        )
        assert weights.dtype == torch.float32 and torch.isfinite(weights).all() and (weights > 0).all()


def test_min_snr_by_hand():
    nine = 2 / math.pi * math.asin(math.sqrt(0.1))  # on the cosine path a^2 = 0.9, b^2 = 0.1: snr = 9
    one = 0.5  # snr = 1
    expected = {  # of the error of x: min(snr, 5) = 5 and 1
        "x": (5.0, 1.0),
        "epsilon": (5 / 9, 1.0),  # over snr
        "v": (5 / 10, 1 / 2),  # over snr + 1
        "velocity": (5 * 0.1 / (math.sqrt(0.9) + math.sqrt(0.1)) ** 2, 0.25),
    }
    for prediction, weights in expected.items():
        config = DiffusionConfig(path="vp_cosine", prediction=prediction, weighting="min_snr")
        assert loss_weight(config, torch.tensor([nine, one])).tolist() == pytest.approx(weights)
    flow = DiffusionConfig(weighting="min_snr", min_snr_gamma=4.0)
    # t = 1/4: snr = 9, so 4 t^2; t = 1/2: snr = 1, so 1 t^2.
    assert loss_weight(flow, torch.tensor([0.25, 0.5])).tolist() == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weighting", ["min_snr", "snr", "cosine"])
def test_a_weight_means_the_same_for_every_prediction(path, weighting):
    t = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)
    latents, noise = pair(4)
    guess = latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses, yardsticks = [], []
    for prediction in PREDICTIONS:
        config = DiffusionConfig(path=path, prediction=prediction, weighting=weighting)
        x_t = interpolate(config, latents, noise, t)
        guessed_noise = (x_t - a(config, t).reshape(-1, 1, 1, 1) * guess) / b(config, t).reshape(-1, 1, 1, 1)
        wanted = target(config, latents, noise, t)
        error = (target(config, guess, guessed_noise, t) - wanted).square().flatten(1).mean(1)
        losses.append(loss_weight(config, t) * error)
        yardsticks.append(velocity_error(config, t) * error)
    for loss, yardstick in zip(losses[1:], yardsticks[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(yardstick, yardsticks[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(yardsticks[0], ((guessed_noise - guess) - (noise - latents)).square().flatten(1).mean(1))


def test_the_declared_weights_of_epsilon():
    t = torch.linspace(0.01, 0.99, 50)
    for path in PATHS:
        snr = DiffusionConfig(path=path, prediction="epsilon", weighting="snr")
        torch.testing.assert_close(loss_weight(snr, t), torch.ones(50))
    cosine = DiffusionConfig(path="vp_cosine", prediction="epsilon", weighting="cosine")
    torch.testing.assert_close(loss_weight(cosine, t), torch.ones(50))
    # On straight lines the weight does what cosmap does as a density.
    flow = DiffusionConfig(prediction="epsilon", weighting="cosine")
    torch.testing.assert_close(loss_weight(flow, t).double(), density(DiffusionConfig(time_density="cosmap"), t))
    assert torch.equal(loss_weight(DiffusionConfig(), t), torch.ones(50))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("config", PAIRS, ids=name)
def test_the_best_prediction_is_where_the_loss_is_flat(config, weighting):
    config = DiffusionConfig(path=config.path, prediction=config.prediction, weighting=weighting)
    nodes, masses = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(4))
    xi, zeta = torch.meshgrid(nodes, nodes, indexing="ij")
    mass = torch.outer(masses, masses).reshape(-1) / (2 * math.pi)  # exact for polynomials up to degree 7
    latents, noise = (MEAN + STD * xi).reshape(-1, 1, 1, 1), zeta.reshape(-1, 1, 1, 1)
    losses = []
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for time in (0.05, 0.4, 0.9):
        t = torch.full((16,), time, dtype=torch.float64)
        x_t = interpolate(config, latents, noise, t)
        seen = network_input(config, x_t, t)
        wrong = theta[0] + theta[1] * seen + theta[2] * seen**2
        error = (best_prediction(config, x_t, t) + wrong - target(config, latents, noise, t)).square().flatten()
        losses.append((mass * loss_weight(config, t) * error).sum())
    for loss in losses:
        (slope,) = torch.autograd.grad(loss, theta, create_graph=True)
        assert slope.abs().max() < 1e-10
        curvature = torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in slope])
        assert torch.linalg.eigvalsh(curvature).min() > 0


@pytest.mark.parametrize("config", PAIRS, ids=name)
def test_sampling_reproduces_the_gaussian(config):
    def denoise(x, t):
        assert t.max() <= latest_time(config)
        return to_velocity(config, best_prediction(config, x, t), x.double(), t)

    noise = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    low, mean, high = sample_flow(denoise, noise, 120, method="heun", diffusion=config).flatten().tolist()
    # The start leaves out a(t) MEAN of x_t, which is little but not nothing.
    start = torch.tensor([latest_time(config)], dtype=torch.float64)
    at, bt = a(config, start).item(), b(config, start).item()
    left_out = STD * at * MEAN / math.sqrt(at**2 * STD**2 + bt**2)
    assert left_out < 0.006
    assert mean == pytest.approx(MEAN - left_out, abs=3e-4)
    assert (high - low) / 2 == pytest.approx(STD, abs=6e-4)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", PATHS[1:])
def test_order_of_accuracy_on_curved_paths(path, method, order):
    config = DiffusionConfig(path=path)
    noise = torch.linspace(-1.5, 1.5, 4).reshape(4, 1, 1, 1)

    def denoise(x, t):
        return to_velocity(config, best_prediction(config, x, t), x.double(), t)

    def spread(time):
        at, bt = (f(config, torch.tensor([time], dtype=torch.float64)).item() for f in (a, b))
        return at, bt, math.sqrt(at**2 * STD**2 + bt**2)

    (a0, _, std0), (a1, b1, std1) = spread(0.0), spread(1.0)
    exact = a0 * MEAN + std0 / std1 * (b1 * noise - a1 * MEAN)  # a Gaussian's flow keeps every quantile
    coarse, fine = (
        (sample_flow(denoise, noise, steps, method=method, diffusion=config) - exact).abs().max().item()
        for steps in (97, 193)
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def test_a_few_steps_along_an_exploding_path():
    """28 Euler steps on the curve as if it were straight would leave a standard deviation of 0.09."""
    config = DiffusionConfig(path="ve", prediction="epsilon")
    noise = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)

    def denoise(x, t):
        return to_velocity(config, best_prediction(config, x, t), x.double(), t)

    low, high = sample_flow(denoise, noise, 28, diffusion=config).flatten().tolist()
    assert (high - low) / 2 == pytest.approx(STD, rel=0.12)
