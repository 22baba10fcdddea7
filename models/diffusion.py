"""Diffusion objectives: what the network sees, what it regresses, and how much each time counts (docs/diffusion.md).

t = 0 is data, t = 1 is noise. A path mixes latents x and noise z as x_t = a(t) x + b(t) z; a network regresses
c(t) x + d(t) z. Every conversion below is the solution of these two linear equations, so a new path or a new
prediction is one line in a table. Where in time a network is trained stands in models/time_density.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor

from models.paths import RECTIFIED_FLOW, VP_COSINE, Path, ddpm, variance_exploding

_LATEST_EPSILON = 0.99  # see `latest_time`
_WEIGHTED = (1e-3, 1.0 - 1e-3)  # times outside weigh like the nearest one inside: at an end a weight may be infinite
_MODE_SCALES = (-1.0, 2.0 / (math.pi - 2.0))  # between which Eq. 20 of arXiv:2403.03206 is monotonic

# (c, d) of what the network regresses at t.
_PREDICTIONS: dict[str, Callable[[Path, Tensor], tuple[Tensor, Tensor]]] = {
    # Velocity of the linear path, whatever the path: z - x.
    "velocity": lambda path, t: (-torch.ones_like(t), torch.ones_like(t)),
    "x": lambda path, t: (torch.ones_like(t), torch.zeros_like(t)),
    "epsilon": lambda path, t: (torch.zeros_like(t), torch.ones_like(t)),
    # Salimans & Ho 2022 (arXiv:2202.00512, sec. 4): a z - b x, of the path as the network sees it.
    "v": lambda path, t: (-path.scale(t) * path.b(t), path.scale(t) * path.a(t)),
}
# Fields that only one choice reads.
_BELONGS_TO = {
    "beta_schedule": ("path", "ddpm"),
    "beta_start": ("path", "ddpm"),
    "beta_end": ("path", "ddpm"),
    "sigma_min": ("path", "ve"),
    "sigma_max": ("path", "ve"),
    "logit_mean": ("time_density", "logit_normal"),
    "logit_std": ("time_density", "logit_normal"),
    "mode_scale": ("time_density", "mode"),
    "min_snr_gamma": ("weighting", "min_snr"),
}


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The path, the network's target, the density of training times and the weight of the loss."""

    path: Literal["rectified_flow", "vp_cosine", "ddpm", "ve"] = "rectified_flow"  # how latents and noise mix
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"  # of ddpm; scaled_linear: sqrt(beta) is linear
    beta_start: float = 1e-4  # of ddpm: beta of the first of 1000 steps, in (0, beta_end)
    beta_end: float = 0.02  # of ddpm: beta of the last step, below 1
    sigma_min: float = 0.002  # of ve: size of the noise at t = 0, in units of the latents' size, above 0
    sigma_max: float = 80.0  # of ve: size of the noise at t = 1, above sigma_min
    prediction: Literal["velocity", "x", "epsilon", "v"] = "velocity"  # what the network regresses
    time_density: Literal["uniform", "logit_normal", "mode", "cosmap"] = "logit_normal"  # of t, before the shift
    logit_mean: float = 0.0  # mean of log(t / (1 - t)), for logit_normal; positive favours noise
    logit_std: float = 1.0  # its standard deviation, > 0
    mode_scale: float = 1.29  # of mode, in (-1, 1.75): above 0 favours the middle, below 0 the ends, 0 is uniform
    shift: float = 1.0  # alpha > 0 of t' = alpha t / (1 + (alpha - 1) t); above 1 favours noise, 1 is none
    base_tokens: int | None = None  # picture tokens that get no shift: alpha = sqrt(tokens / base_tokens); None = shift
    stratified: bool = False  # each optimiser step takes one t from each of global_batch_size equally likely parts
    weighting: Literal["none", "min_snr", "snr", "cosine"] = "none"  # of the loss, whatever the density of times
    min_snr_gamma: float = 5.0  # of min_snr: signal-to-noise ratio above which the loss of x no longer grows, > 0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            known, value = get_args(hint), getattr(self, name)
            if isinstance(value, str) and value not in known:
                raise ValueError(f"{name} = {value!r} is not known: choose one of {', '.join(known)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} = {value} must be a finite number")
        for name in ("logit_std", "shift", "min_snr_gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0")
        for low, high, limit in (("beta_start", "beta_end", 1.0), ("sigma_min", "sigma_max", math.inf)):
            if not 0.0 < getattr(self, low) < getattr(self, high) < limit:
                raise ValueError(
                    f"{low} = {getattr(self, low)} and {high} = {getattr(self, high)}: must be above 0 and below "
                    f"{limit}, and the first below the second"
                )
        if not _MODE_SCALES[0] < self.mode_scale < _MODE_SCALES[1]:
            raise ValueError(f"mode_scale = {self.mode_scale} must lie between -1 and {_MODE_SCALES[1]:.4f}")
        if self.base_tokens is not None and self.base_tokens < 1:
            raise ValueError(f"base_tokens = {self.base_tokens} must be at least 1")
        self._check_meaning()

    def _check_meaning(self) -> None:
        """Refuses a setting that the other settings leave without effect."""
        for field in fields(self):
            owner, choice = _BELONGS_TO.get(field.name, ("", ""))
            if owner and getattr(self, owner) != choice and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} = {getattr(self, field.name)!r} has no meaning with {owner} = "
                    f"{getattr(self, owner)!r}: leave it out, or choose {choice!r}"
                )
        if self.base_tokens is not None and self.shift != 1.0:
            raise ValueError(f"shift = {self.shift} and base_tokens = {self.base_tokens} exclude each other: give one")


def path_of(config: DiffusionConfig) -> Path:
    """The path's coefficients as functions of t."""
    if config.path == "ddpm":
        return ddpm(config.beta_schedule, config.beta_start, config.beta_end)
    if config.path == "ve":
        return variance_exploding(config.sigma_min, config.sigma_max)
    return RECTIFIED_FLOW if config.path == "rectified_flow" else VP_COSINE


def a(config: DiffusionConfig, t: Tensor) -> Tensor:
    """Coefficient of the latents on the path at t in [0, 1]; same shape as t."""
    return path_of(config).a(t)


def b(config: DiffusionConfig, t: Tensor) -> Tensor:
    """Coefficient of the noise on the path at t in [0, 1]; same shape as t."""
    return path_of(config).b(t)


def latest_time(config: DiffusionConfig) -> float:
    """The time at which sampling starts: 1, except where the network's answer at t = 1 says nothing.

    A network that predicts the noise tells nothing of the latents where a(t) = 0: dx/dt is 0/0 there, and errors of
    the prediction grow as 1 / a. At 0.99 the share of the latents in x_t that the start leaves out is below 2 %.
    """
    vanishes = config.prediction == "epsilon" and config.path in ("rectified_flow", "vp_cosine")
    return _LATEST_EPSILON if vanishes else 1.0


def _beside(t: Tensor, like: Tensor) -> Tensor:
    """t of shape (B,) with as many trailing axes as `like`."""
    return t.reshape(-1, *(1,) * (like.ndim - 1))


def _solve(config: DiffusionConfig, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """a and b of the path, c and d of the prediction, and the determinant a d - b c, at t."""
    path = path_of(config)
    at, bt = path.a(t), path.b(t)
    c, d = _PREDICTIONS[config.prediction](path, t)
    return at, bt, c, d, at * d - bt * c


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


def network_input(config: DiffusionConfig, x_t: Tensor, t: Tensor) -> Tensor:
    """x_t as the network sees it: scaled to a size near 1 on the path `ve`, elsewhere x_t itself.

    Args:
        config: The diffusion.
        x_t: (B, C, h, w).
        t: (B,) in [0, 1].

    Returns:
        Like x_t.
    """
    if config.path != "ve":
        return x_t
    return path_of(config).scale(_beside(t, x_t)) * x_t


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
    c, d = _PREDICTIONS[config.prediction](path_of(config), _beside(t, latents))
    return c * latents + d * noise


def to_x0(config: DiffusionConfig, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The clean latents that a prediction means: x = (d x_t - b predicted) / (a d - b c).

    Args:
        config: The diffusion.
        predicted: The network's output at (x_t, t), like x_t.
        x_t: (B, C, h, w).
        t: (B,) in [0, 1]; up to `latest_time` where that is below 1.

    Returns:
        E[latents | x_t] if the prediction is exact; like x_t.
    """
    if config.prediction == "x":
        return predicted  # also at t = 0, where the determinant is 0
    _, bt, _, d, determinant = _solve(config, _beside(t, x_t))
    return (d * x_t - bt * predicted) / determinant


def to_noise(config: DiffusionConfig, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The noise that a prediction means: z = (a predicted - c x_t) / (a d - b c).

    Args:
        config: The diffusion.
        predicted: The network's output at (x_t, t), like x_t.
        x_t: (B, C, h, w).
        t: (B,) in [0, 1]; above 0 where the prediction is x and b(0) = 0.

    Returns:
        E[noise | x_t] if the prediction is exact; like x_t.
    """
    if config.prediction == "epsilon":
        return predicted  # also at t = 1, where the determinant may be 0
    at, _, c, _, determinant = _solve(config, _beside(t, x_t))
    return (at * predicted - c * x_t) / determinant


def to_velocity(config: DiffusionConfig, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt of the probability-flow ODE, what the samplers integrate: a'(t) x + b'(t) z.

    Args:
        config: The diffusion.
        predicted: The network's output at (x_t, t), like x_t.
        x_t: (B, C, h, w).
        t: (B,) in (0, 1], at most `latest_time`.

    Returns:
        Like x_t.
    """
    if config.path == "rectified_flow" and config.prediction == "velocity":
        return predicted  # exactly, without the rounding of a detour
    path = path_of(config)
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


def loss_weight(config: DiffusionConfig, t: Tensor) -> Tensor:
    """What the squared error of the prediction at t is multiplied by.

    Weights are declared for the error of x. At a given x_t, z = (x_t - a x) / b, so the regressed c x + d z moves by
    -(a d - b c) / b times as much as x does: a weight w of the error of x is w b^2 / (a d - b c)^2 of the prediction's
    (for epsilon w / snr, for v of a variance-preserving path w / (snr + 1)). With snr = a^2 / b^2, w is

        min_snr   min(snr, gamma) (Hang et al. 2023, arXiv:2303.09556)
        snr       snr, which is the plain error of epsilon (arXiv:2202.00512, sec. 4)
        cosine    snr -lambda' sech(lambda / 2) / (2 pi), lambda = log snr: the plain error of epsilon at the
                  noise levels of the cosine path (arXiv:2303.00848; arXiv:2403.03206, sec. 3)

    Args:
        config: The diffusion.
        t: (B,) in [0, 1]; the outermost thousandths weigh like their inner edges.

    Returns:
        (B,) float32, above 0; 1 without a weighting.
    """
    if config.weighting == "none":
        return torch.ones_like(t, dtype=torch.float32)
    t = t.double().clamp(*_WEIGHTED)
    at, bt, _, _, determinant = _solve(config, t)
    weight = at.square()  # times b^2: of the error of x
    if config.weighting == "min_snr":
        weight = torch.minimum(weight, config.min_snr_gamma * bt.square())
    elif config.weighting == "cosine":
        path = path_of(config)
        # -lambda' = 2 (b'/b - a'/a) and sech(lambda / 2) = 2 a b / (a^2 + b^2)
        turn = (path.db(t) * at - path.da(t) * bt) / (at.square() + bt.square())
        weight = weight * (2.0 / math.pi) * turn
    return (weight / determinant.square()).float()


def velocity_error(config: DiffusionConfig, t: Tensor) -> Tensor:
    """By what the squared error of the prediction becomes that of noise - latents: a yardstick for all predictions.

    Args:
        config: The diffusion.
        t: (B,) in (0, 1).

    Returns:
        (B,), exactly 1 if the prediction is the velocity.
    """
    at, bt, _, _, determinant = _solve(config, t)
    return ((at + bt) / determinant).square()
