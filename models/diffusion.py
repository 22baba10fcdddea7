"""Diffusion paths, what the network predicts on them, and where in time it is trained (docs/diffusion.md).

t = 0 is data, t = 1 is noise. A path mixes latents x and noise z as x_t = a(t) x + b(t) z; a network regresses
c(t) x + d(t) z. Every conversion below is the solution of these two linear equations, so a new path or a new
prediction is one line in a table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

TimeFunction = Callable[[Tensor], Tensor]


class Path(NamedTuple):
    """Coefficients of a path and their derivatives, as functions of t."""

    a: TimeFunction  # of the latents
    b: TimeFunction  # of the noise
    da: TimeFunction  # da/dt
    db: TimeFunction  # db/dt


class Prediction(NamedTuple):
    """Coefficients of what the network regresses, as functions of t."""

    c: TimeFunction  # of the latents
    d: TimeFunction  # of the noise


_PATHS = {
    # Rectified flow: straight lines (Liu et al. 2022, arXiv:2209.03003; arXiv:2403.03206, Eq. 13).
    "rectified_flow": Path(
        a=lambda t: 1.0 - t, b=lambda t: t, da=lambda t: -torch.ones_like(t), db=lambda t: torch.ones_like(t)
    ),
}
_PREDICTIONS = {
    # Velocity of the linear path, whatever the path: z - x.
    "velocity": Prediction(c=lambda t: -torch.ones_like(t), d=lambda t: torch.ones_like(t)),
}


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The path, the network's target and the density of training times."""

    path: Literal["rectified_flow"] = "rectified_flow"  # how latents and noise mix
    prediction: Literal["velocity"] = "velocity"  # what the network regresses
    time_density: Literal["uniform", "logit_normal"] = "logit_normal"  # of t in training, before the shift
    logit_mean: float = 0.0  # mean of log(t / (1 - t)), for logit_normal; positive favours noise
    logit_std: float = 1.0  # its standard deviation, > 0
    shift: float = 1.0  # alpha > 0 of t' = alpha t / (1 + (alpha - 1) t); above 1 favours noise, 1 is none

    def __post_init__(self) -> None:
        for name, known in (
            ("path", tuple(_PATHS)),
            ("prediction", tuple(_PREDICTIONS)),
            ("time_density", ("uniform", "logit_normal")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r} is not known: choose one of {', '.join(known)}")
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"logit_mean = {self.logit_mean} must be a finite number")
        for name in ("logit_std", "shift"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value} must be a finite number above 0")
        if self.time_density == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError(
                f"logit_mean = {self.logit_mean} and logit_std = {self.logit_std} have no meaning with "
                "time_density = 'uniform': leave them out, or choose 'logit_normal'"
            )


def _beside(t: Tensor, like: Tensor) -> Tensor:
    """t of shape (B,) with as many trailing axes as `like`."""
    return t.reshape(-1, *(1,) * (like.ndim - 1))


def a(config: DiffusionConfig, t: Tensor) -> Tensor:
    """Coefficient of the latents on the path at t in [0, 1]; same shape as t."""
    return _PATHS[config.path].a(t)


def b(config: DiffusionConfig, t: Tensor) -> Tensor:
    """Coefficient of the noise on the path at t in [0, 1]; same shape as t."""
    return _PATHS[config.path].b(t)


def interpolate(config: DiffusionConfig, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = a(t) latents + b(t) noise.

    Args:
        config: The diffusion.
        latents: (B, C, h, w), normalised.
        noise: Like latents.
        t: (B,) in [0, 1].

    Returns:
        Like latents.
    """
    t = _beside(t, latents)
    return a(config, t) * latents + b(config, t) * noise


def target(config: DiffusionConfig, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network regresses at t: c(t) latents + d(t) noise, for velocity noise - latents.

    Args:
        config: The diffusion.
        latents: (B, C, h, w), normalised.
        noise: Like latents.
        t: (B,) in [0, 1].

    Returns:
        Like latents.
    """
    t = _beside(t, latents)
    prediction = _PREDICTIONS[config.prediction]
    return prediction.c(t) * latents + prediction.d(t) * noise


def to_x0(config: DiffusionConfig, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The clean latents that a prediction means: x = (d x_t - b predicted) / (a d - b c).

    Args:
        config: The diffusion.
        predicted: The network's output at (x_t, t), like x_t.
        x_t: (B, C, h, w).
        t: (B,) in [0, 1].

    Returns:
        E[latents | x_t] if the prediction is exact; like x_t.
    """
    t = _beside(t, x_t)
    path, prediction = _PATHS[config.path], _PREDICTIONS[config.prediction]
    determinant = path.a(t) * prediction.d(t) - path.b(t) * prediction.c(t)
    return (prediction.d(t) * x_t - path.b(t) * predicted) / determinant


def to_noise(config: DiffusionConfig, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The noise that a prediction means: z = (a predicted - c x_t) / (a d - b c).

    Args:
        config: The diffusion.
        predicted: The network's output at (x_t, t), like x_t.
        x_t: (B, C, h, w).
        t: (B,) in [0, 1].

    Returns:
        E[noise | x_t] if the prediction is exact; like x_t.
    """
    t = _beside(t, x_t)
    path, prediction = _PATHS[config.path], _PREDICTIONS[config.prediction]
    determinant = path.a(t) * prediction.d(t) - path.b(t) * prediction.c(t)
    return (path.a(t) * predicted - prediction.c(t) * x_t) / determinant


def to_velocity(config: DiffusionConfig, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt of the probability-flow ODE, what the samplers integrate: a'(t) x + b'(t) z.

    Args:
        config: The diffusion.
        predicted: The network's output at (x_t, t), like x_t.
        x_t: (B, C, h, w).
        t: (B,) in [0, 1].

    Returns:
        Like x_t.
    """
    if config.path == "rectified_flow" and config.prediction == "velocity":
        return predicted  # exactly, without the rounding of a detour
    path = _PATHS[config.path]
    latents, noise = to_x0(config, predicted, x_t, t), to_noise(config, predicted, x_t, t)
    t = _beside(t, x_t)
    return path.da(t) * latents + path.db(t) * noise


def to_score(config: DiffusionConfig, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The score, grad log p(x_t) = -E[noise | x_t] / b(t); t must be above 0.

    Args:
        config: The diffusion.
        predicted: The network's output at (x_t, t), like x_t.
        x_t: (B, C, h, w).
        t: (B,) in (0, 1].

    Returns:
        Like x_t.
    """
    return -to_noise(config, predicted, x_t, t) / b(config, _beside(t, x_t))


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = shift t / (1 + (shift - 1) t), which keeps 0 and 1 (arXiv:2403.03206, Eq. 23).

    Args:
        t: Times in [0, 1].
        shift: Above 0; above 1 moves towards noise.
    """
    return shift * t / (1.0 + (shift - 1.0) * t)


def sample_t(config: DiffusionConfig, uniforms: Tensor) -> Tensor:
    """Training times with the declared density, by the inverse of its distribution function.

    A pure function, so that a sample's time depends on its own uniform number alone.

    Args:
        config: The diffusion.
        uniforms: (B,) in (0, 1), e.g. from `models.prng.uniform`.

    Returns:
        (B,) float32 in [0, 1], increasing with the uniforms.
    """
    t = uniforms.double()
    if config.time_density == "logit_normal":  # arXiv:2403.03206, Eq. 19
        t = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(t))
    return shift_time(t, config.shift).float()


def density(config: DiffusionConfig, t: Tensor) -> Tensor:
    """Probability density of the training times that `sample_t` draws.

    Args:
        config: The diffusion.
        t: Times of any shape; outside [0, 1] the density is 0.

    Returns:
        Same shape, float64.
    """
    t = t.double()
    inside = (t >= 0.0) & (t <= 1.0)
    t = t.clamp(0.0, 1.0)
    remainder = config.shift - (config.shift - 1.0) * t  # > 0
    unshifted = t / remainder
    if config.time_density == "uniform":
        value = torch.ones_like(t)
    else:
        logit = torch.logit(unshifted, eps=1e-300)
        gauss = torch.exp(-0.5 * ((logit - config.logit_mean) / config.logit_std) ** 2)
        slope = unshifted * (1.0 - unshifted)  # dt/dlogit
        value = gauss / (config.logit_std * math.sqrt(2.0 * math.pi) * slope)
        value = torch.where(slope > 0.0, value, 0.0)  # at both ends the Gaussian wins
    return torch.where(inside, value * config.shift / remainder**2, 0.0)
