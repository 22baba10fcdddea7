"""The paths from data (t = 0) to noise (t = 1): a(t), b(t) and their derivatives (docs/diffusion.md)."""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

TimeFunction = Callable[[Tensor], Tensor]
DDPM_STEPS = 1000  # of the discrete schedules that `ddpm` continues


class Path(NamedTuple):
    """Coefficients of a path and their derivatives, as functions of t; results have the shape and dtype of t."""

    a: TimeFunction  # of the latents
    b: TimeFunction  # of the noise
    da: TimeFunction  # da/dt
    db: TimeFunction  # db/dt
    scale: TimeFunction = torch.ones_like  # what x_t is multiplied by before the network sees it


def _in_double(function: TimeFunction) -> TimeFunction:
    """The function in float64, rounded once: 1 - alpha_bar and cos(pi/2) are differences of nearly equal numbers."""
    return lambda t: function(t.double()).to(t.dtype)


# Straight lines (Liu et al. 2022, arXiv:2209.03003; arXiv:2403.03206, Eq. 13).
RECTIFIED_FLOW = Path(
    a=lambda t: 1.0 - t, b=lambda t: t, da=lambda t: -torch.ones_like(t), db=lambda t: torch.ones_like(t)
)

# The quarter circle: Nichol & Dhariwal's cosine schedule (arXiv:2102.09672, Eq. 17) in continuous time, without their
# offset, as in arXiv:2202.00512 and arXiv:2403.03206 (sec. 3).
_QUARTER = math.pi / 2.0
VP_COSINE = Path(
    a=_in_double(lambda t: torch.cos(_QUARTER * t)),
    b=_in_double(lambda t: torch.sin(_QUARTER * t)),
    da=_in_double(lambda t: -_QUARTER * torch.sin(_QUARTER * t)),
    db=_in_double(lambda t: _QUARTER * torch.cos(_QUARTER * t)),
)


@cache
def ddpm(schedule: str, beta_start: float, beta_end: float) -> Path:
    """The variance-preserving path through a discrete beta schedule of 1000 steps (arXiv:2006.11239).

    alpha_bar(k / 1000) is the product of the first k factors 1 - beta_i, so t = 0 is clean data and t = 1 the last
    step. Between them the product goes on as the factorial does in the Gamma function: for every real k

        prod_{i<k} (e - f i) = f^k Gamma(e/f + 1) / Gamma(e/f + 1 - k)
        prod_{i<k} (e + f i) = f^k Gamma(e/f + k) / Gamma(e/f)

    which is smooth, exact at the grid and needs no table. Linear in i are 1 - beta itself, or its factors
    (1 - sqrt(beta)) (1 + sqrt(beta)).

    Args:
        schedule: "linear", or "scaled_linear" (the square root of beta is linear, as in Stable Diffusion).
        beta_start: Of the first step, in (0, beta_end).
        beta_end: Of the last step, below 1.
    """
    # (e, f) of each linear factor e + f i of 1 - beta_i.
    if schedule == "linear":
        slope = (beta_end - beta_start) / (DDPM_STEPS - 1)
        factors: tuple[tuple[float, float], ...] = ((1.0 - beta_start, -slope),)
    else:
        root = math.sqrt(beta_start)
        slope = (math.sqrt(beta_end) - root) / (DDPM_STEPS - 1)
        factors = ((1.0 - root, -slope), (1.0 + root, slope))

    def log_alpha_bar(t: Tensor) -> Tensor:
        return _log_product(factors, DDPM_STEPS * t).clamp(max=0.0)  # rounding must not make b imaginary

    def derivative(t: Tensor) -> Tensor:
        return DDPM_STEPS * _log_product_derivative(factors, DDPM_STEPS * t)

    def a(t: Tensor) -> Tensor:
        return torch.exp(0.5 * log_alpha_bar(t))

    def b(t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(log_alpha_bar(t)))

    return Path(
        a=_in_double(a),
        b=_in_double(b),
        da=_in_double(lambda t: 0.5 * derivative(t) * a(t)),
        db=_in_double(lambda t: -0.5 * derivative(t) * a(t).square() / b(t)),  # infinite at t = 0, like that of sqrt(t)
    )


def _log_product(factors: tuple[tuple[float, float], ...], k: Tensor) -> Tensor:
    """log prod_{i < k} of the linear factors e + f i, for real k."""
    total = torch.zeros_like(k)
    for e, f in factors:
        start = e / abs(f)
        if f < 0:
            total = total + k * math.log(-f) + math.lgamma(start + 1.0) - torch.lgamma(start + 1.0 - k)
        else:
            total = total + k * math.log(f) + torch.lgamma(start + k) - math.lgamma(start)
    return total


def _log_product_derivative(factors: tuple[tuple[float, float], ...], k: Tensor) -> Tensor:
    """d/dk of `_log_product`."""
    total = torch.zeros_like(k)
    for e, f in factors:
        start = e / abs(f)
        place = start + 1.0 - k if f < 0 else start + k
        total = total + math.log(abs(f)) + torch.special.digamma(place)
    return total


@cache
def variance_exploding(sigma_min: float, sigma_max: float) -> Path:
    """Noise of geometrically growing size on unchanged data: b = sigma_min (sigma_max / sigma_min)^t.

    Song et al. 2021 (arXiv:2011.13456, Appendix C). At t = 0 noise of size sigma_min is left. The network sees
    x_t / sqrt(1 + sigma^2), as in Karras et al. 2022 (arXiv:2206.00364, Table 1, c_in with sigma_data = 1): in its eyes
    the path is variance preserving.

    Args:
        sigma_min: Above 0.
        sigma_max: Above sigma_min.
    """
    growth = math.log(sigma_max / sigma_min)

    def b(t: Tensor) -> Tensor:
        return sigma_min * torch.exp(growth * t)

    return Path(
        a=torch.ones_like,
        b=_in_double(b),
        da=torch.zeros_like,
        db=_in_double(lambda t: growth * b(t)),
        scale=_in_double(lambda t: (1.0 + b(t).square()).rsqrt()),
    )
