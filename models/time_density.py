"""Where in time a network is trained: densities of t, the shift with resolution, strata (docs/diffusion.md)."""

import math

import torch
from torch import Tensor

from models import prng
from models.diffusion import DiffusionConfig

_BISECTIONS = 60  # halvings of [0, 1]: more than float64 resolves


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = shift t / (1 + (shift - 1) t), which keeps 0 and 1 (arXiv:2403.03206, Eq. 23).

    Args:
        t: Times in [0, 1].
        shift: Above 0; above 1 moves towards noise.
    """
    return shift * t / (1.0 + (shift - 1.0) * t)


def shift_of(config: DiffusionConfig, tokens: int | None) -> float:
    """The shift alpha for pictures of so many tokens: fixed, or sqrt(tokens / base_tokens) (arXiv:2403.03206, Eq. 23).

    Args:
        config: The diffusion.
        tokens: Picture tokens of the network, at least 1; None where the shift is fixed.
    """
    if config.base_tokens is None:
        return config.shift
    if tokens is None:
        raise ValueError(f"base_tokens = {config.base_tokens}: the shift depends on the picture's tokens, give them")
    return math.sqrt(tokens / config.base_tokens)


def time_uniforms(config: DiffusionConfig, seed: int, numbers: Tensor, global_batch_size: int) -> Tensor:
    """The uniform numbers from which `sample_t` makes times: a function of each sample's own number.

    Stratified, the samples of an optimiser step share out global_batch_size equal parts of (0, 1), one each, in an
    order drawn anew for every step; each number by itself is still uniform.

    Args:
        config: The diffusion.
        seed: The run's seed, in [0, 2**64).
        numbers: (B,) int64, the global sample numbers; step k holds [k, k + 1) * global_batch_size.
        global_batch_size: Samples per optimiser step over all ranks.

    Returns:
        (B,) in (0, 1): float32, stratified float64.
    """
    uniforms = prng.uniform(seed, prng.TIME, numbers)
    if not config.stratified:
        return uniforms
    steps = torch.div(numbers, global_batch_size, rounding_mode="floor")
    places = (numbers - steps * global_batch_size)[:, None]  # (B, 1)
    # Every place of the step draws a key; a sample's stratum is the rank of its own. Equal keys go by place.
    keys = prng.uniform(seed, prng.STRATUM, steps, (global_batch_size,))  # (B, G)
    own = keys.gather(1, places)
    earlier = torch.arange(global_batch_size, device=numbers.device) < places
    strata = ((keys < own) | ((keys == own) & earlier)).sum(1)
    return (strata + uniforms.double()) / global_batch_size


def sample_t(config: DiffusionConfig, uniforms: Tensor, tokens: int | None = None) -> Tensor:
    """Training times with the declared density, by the inverse of its distribution function.

    A pure function, so that a sample's time depends on its own uniform number alone.

    Args:
        config: The diffusion.
        uniforms: (B,) in (0, 1), from `time_uniforms`.
        tokens: Picture tokens of the network; read if the shift depends on them.

    Returns:
        (B,) float32 in [0, 1], increasing with the uniforms.
    """
    u = uniforms.double()
    if config.time_density == "logit_normal":  # arXiv:2403.03206, Eq. 19
        u = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
    elif config.time_density == "mode":
        u = _mode(u, config.mode_scale)
    elif config.time_density == "cosmap":  # arXiv:2403.03206, sec. 3.1: 1 - 1 / (tan(pi u / 2) + 1)
        sine, cosine = torch.sin(0.5 * math.pi * u), torch.cos(0.5 * math.pi * u)
        u = sine / (sine + cosine)
    return shift_time(u, shift_of(config, tokens)).float()


def density(config: DiffusionConfig, t: Tensor, tokens: int | None = None) -> Tensor:
    """Probability density of the training times that `sample_t` draws.

    Args:
        config: The diffusion.
        t: Times of any shape; outside [0, 1] the density is 0.
        tokens: Picture tokens of the network; read if the shift depends on them.

    Returns:
        Same shape, float64.
    """
    t = t.double()
    inside = (t >= 0.0) & (t <= 1.0)
    t = t.clamp(0.0, 1.0)
    shift = shift_of(config, tokens)
    remainder = shift - (shift - 1.0) * t  # > 0
    unshifted = t / remainder
    if config.time_density == "uniform":
        value = torch.ones_like(t)
    elif config.time_density == "logit_normal":
        logit = torch.logit(unshifted, eps=1e-300)
        gauss = torch.exp(-0.5 * ((logit - config.logit_mean) / config.logit_std) ** 2)
        slope = unshifted * (1.0 - unshifted)  # dt/dlogit
        value = gauss / (config.logit_std * math.sqrt(2.0 * math.pi) * slope)
        value = torch.where(slope > 0.0, value, 0.0)  # at both ends the Gaussian wins
    elif config.time_density == "mode":
        value = 1.0 / _mode_slope(_mode_inverse(unshifted, config.mode_scale), config.mode_scale)
    else:  # cosmap, arXiv:2403.03206, Eq. 21
        value = 2.0 / (math.pi * (1.0 - 2.0 * unshifted + 2.0 * unshifted.square()))
    return torch.where(inside, value * shift / remainder**2, 0.0)


def _mode(u: Tensor, scale: float) -> Tensor:
    """Mode sampling with heavy tails (arXiv:2403.03206, Eq. 20) of 1 - u, so that it increases."""
    return u - scale * (torch.sin(0.5 * math.pi * u).square() - u)


def _mode_slope(u: Tensor, scale: float) -> Tensor:
    """d/du of `_mode`; above 0."""
    return 1.0 + scale - scale * 0.5 * math.pi * torch.sin(math.pi * u)


def _mode_inverse(t: Tensor, scale: float) -> Tensor:
    """The u with _mode(u) = t, by bisection: there is no closed form."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        below = _mode(middle, scale) < t
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2.0
