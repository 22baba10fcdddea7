"""Samplers: the serving side's schedule and steps, order of accuracy, guidance."""

import math
from types import SimpleNamespace

import pytest
import torch

from models.errors import ModelError
from models.sampler import guided, sample_flow, schedule

MEAN, STD = 0.8, 0.4


def gaussian_velocity(x, t):
    """E[noise - latents | x_t] for latents ~ N(MEAN, STD**2); the flow carries z to MEAN + STD z."""
    t = t.double().reshape(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x.double() - (1 - t) * MEAN) - MEAN


def noise(batch=3):
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def stock(num_steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 20, 28, 333])
def test_the_schedule_is_the_stock_one(num_steps, shift):
    scheduler, times = stock(num_steps, shift), schedule(num_steps, shift)
    torch.testing.assert_close(times, scheduler.sigmas, atol=1e-7, rtol=0)
    torch.testing.assert_close(1000 * times[:-1], scheduler.timesteps, atol=1e-4, rtol=0)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_the_stock_sampler(shift):
    scheduler, x = stock(9, shift), noise()
    for timestep in scheduler.timesteps:
        v = gaussian_velocity(x, timestep.expand(3) / 1000).float()
        x = scheduler.step(v, timestep, x).prev_sample
    torch.testing.assert_close(sample_flow(gaussian_velocity, noise(), 9, shift), x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("method", "order", "bound"), [("euler", 1, 0.1), ("heun", 2, 0.005)])
def test_order_of_accuracy_on_a_gaussian(method, order, bound):
    z = noise()
    exact = MEAN + STD * z
    coarse, fine = (
        (sample_flow(gaussian_velocity, z, num_steps, method=method) - exact).abs().max().item()
        for num_steps in (17, 33)  # one of them is the short last step
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert fine < bound


def test_a_straight_flow_is_exact_in_any_number_of_steps():
    latents, z = torch.full((3, 2, 4, 4), 0.3), noise()
    for method, num_steps in (("euler", 1), ("euler", 7), ("heun", 1), ("heun", 5)):
        out = sample_flow(lambda x, t: z - latents, z, num_steps, 2.0, method)
        torch.testing.assert_close(out, latents)


@pytest.mark.parametrize(("method", "calls"), [("euler", 6), ("heun", 11)])
def test_what_the_denoiser_is_asked(method, calls):
    asked = []

    def denoise(x, t):
        assert x.dtype == t.dtype == torch.float32 and t.shape == (3,)
        asked.append(t[0].item())
        return torch.zeros_like(x)

    z = noise()
    before = z.clone()
    assert torch.equal(sample_flow(denoise, z, 6, method=method), z)
    assert torch.equal(z, before)
    assert len(asked) == calls and asked[0] == 1.0 and min(asked) > 0.0


def test_no_gradients_are_kept():
    weight = torch.ones(1, requires_grad=True)
    assert not sample_flow(lambda x, t: weight * x, noise(), 2).requires_grad


def condition(seed, batch=3, mask=True):
    g = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        text_embeds=torch.randn(batch, 5, 6, generator=g),
        pooled=torch.randn(batch, 4, generator=g),
        text_mask=torch.rand(batch, 5, generator=g) > 0.3 if mask else None,
    )


def toy_dit(x_t, t, text_embeds, pooled, text_mask):
    """Anything that depends on all of its inputs, each sample on its own."""
    keep = torch.ones(text_embeds.shape[:2]) if text_mask is None else text_mask.float()
    told = (text_embeds * keep[..., None]).sum((1, 2)) + pooled.sum(1) * t
    return x_t * told[:, None, None, None]


@pytest.mark.parametrize("null_batch", [1, 3])
@pytest.mark.parametrize("masks", [(True, True), (False, False), (True, False), (False, True)])
def test_guidance_blends_both_predictions(null_batch, masks):
    told, null = condition(1, mask=masks[0]), condition(2, batch=null_batch, mask=masks[1])
    x, t = noise(), torch.tensor([0.2, 0.5, 0.9])
    sizes = []

    def dit(x_t, *rest):
        sizes.append(x_t.shape[0])
        return toy_dit(x_t, *rest)

    v = guided(dit, told, null, 3.0)(x, t)
    everyone = torch.arange(3) % null_batch
    null_mask = None if null.text_mask is None else null.text_mask[everyone]
    v_null = toy_dit(x, t, null.text_embeds[everyone], null.pooled[everyone], null_mask)
    v_told = toy_dit(x, t, told.text_embeds, told.pooled, told.text_mask)
    torch.testing.assert_close(v, v_null + 3.0 * (v_told - v_null))
    assert sizes == [6]  # one forward of both


def test_a_scale_of_one_is_no_guidance():
    told, x, t = condition(1), noise(), torch.rand(3)
    v = guided(toy_dit, told, condition(2), 1.0)(x, t)
    assert torch.equal(v, toy_dit(x, t, told.text_embeds, told.pooled, told.text_mask))


def test_a_scale_of_zero_forgets_the_text():
    null, x, t = condition(2), noise(), torch.rand(3)
    v = guided(toy_dit, condition(1), null, 0.0)(x, t)
    torch.testing.assert_close(v, toy_dit(x, t, null.text_embeds, null.pooled, null.text_mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps = 0"),
        ({"num_steps": 4, "shift": 0.0}, "shift = 0.0"),
        ({"num_steps": 4, "method": "rk9"}, "'rk9' is not known"),
    ],
)
def test_impossible_requests_are_a_users_mistake(arguments, message):
    with pytest.raises(ModelError, match=message):
        sample_flow(gaussian_velocity, noise(), **arguments)
