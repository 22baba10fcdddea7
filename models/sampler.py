"""From noise to latents: solvers of the probability-flow ODE, and classifier-free guidance.

A solver integrates dx/dt = v(x, t) from t = 1 (noise) to t = 0 (data). It takes a denoiser, a function (x, t) -> v,
and never asks which network or prediction stands behind it.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from models.diffusion import DiffusionConfig, latest_time, path_of
from models.errors import ModelError
from models.time_density import shift_time

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x (B, C, h, w), t (B,) float32) -> velocity, like x
_FIRST_TIME_INVERSE = 1000  # the serving side's num_train_timesteps: its last step starts from the shifted 1 / 1000


class Condition(Protocol):
    """What the network is told of the texts."""

    @property
    def text_embeds(self) -> Tensor:
        """(B, L, D) text tokens."""

    @property
    def text_mask(self) -> Tensor | None:
        """(B, L) bool, True = keep; None keeps all."""

    @property
    def pooled(self) -> Tensor:
        """(B, P) pooled text vector."""


def schedule(num_steps: int, shift: float = 1.0) -> Tensor:
    """The times a solver visits, equal to those of diffusers' FlowMatchEulerDiscreteScheduler.

    num_steps times evenly from 1 to s(1/1000), each mapped by s(t) = shift t / (1 + (shift - 1) t), then 0. So the
    smallest time is shifted twice, which is how the serving side does it, and the last step is a short one.

    Args:
        num_steps: How many steps, at least 1.
        shift: Above 0; above 1 spends more of the steps near the noise.

    Returns:
        (num_steps + 1,) float32 on the CPU, strictly decreasing from 1 to 0.

    Raises:
        ModelError: num_steps or shift is out of range.
    """
    if num_steps < 1:
        raise ModelError(f"num_steps = {num_steps} must be at least 1")
    if not 0.0 < shift < float("inf"):
        raise ModelError(f"shift = {shift} must be a finite number above 0")
    last = shift_time(torch.tensor(1.0 / _FIRST_TIME_INVERSE, dtype=torch.float32), shift).item()
    times = torch.from_numpy(np.linspace(1.0, last, num_steps))  # float64, as the serving side does it
    return torch.cat((shift_time(times, shift).float(), torch.zeros(1)))


@torch.no_grad()
def sample_flow(
    denoise: Denoiser,
    noise: Tensor,
    num_steps: int,
    shift: float = 1.0,
    method: Literal["euler", "heun"] = "euler",
    diffusion: DiffusionConfig | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE from noise to latents.

    Steps follow the path: over a step the latents and the noise that the velocity means stay as they are, and a and b
    move as the path moves them. Where a and b are straight this is the plain Euler or Heun step; elsewhere it is the
    same order, without the error of taking a curve for a line (for Euler: DDIM, arXiv:2010.02502, Eq. 12).

    Args:
        denoise: The velocity at (x, t).
        noise: (B, C, h, w), standard normal.
        num_steps: Steps of the solver. Euler asks the denoiser once per step, Heun twice, but once in the last.
        shift: Of the schedule, see `schedule`.
        method: "euler" (first order, the serving side's) or "heun" (second order; Karras et al. 2022,
            arXiv:2206.00364, Alg. 1).
        diffusion: The path, its noise at the start and its latest time; None = rectified flow.

    Returns:
        Latents like noise, in float32. No gradients are kept.

    Raises:
        ModelError: num_steps, shift or method is not possible.
    """
    if method not in ("euler", "heun"):
        raise ModelError(f"sampling method {method!r} is not known: choose euler or heun")
    diffusion = diffusion or DiffusionConfig()
    times = schedule(num_steps, shift) * latest_time(diffusion)
    x = noise.float() * path_of(diffusion).b(times[0]).item()
    everyone = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    for i in range(num_steps):
        t, t_next = times[i].item(), times[i + 1].item()  # on the CPU: no host sync
        dt = (times[i + 1] - times[i]).item()
        v = along(diffusion, x, denoise(x, t * everyone).float(), t, t, t_next)
        # The last step stays an Euler step: t = 0 itself is never asked for, where some predictions divide by b(0).
        if method == "heun" and i < num_steps - 1:
            there = x + dt * v
            v = (v + along(diffusion, there, denoise(there, t_next * everyone).float(), t_next, t, t_next)) / 2
        x = x + dt * v
    return x


def along(diffusion: DiffusionConfig, x: Tensor, v: Tensor, at: float, start: float, end: float) -> Tensor:
    """The mean velocity from `start` to `end` if what x and v mean at the time `at` stays as it is.

    From x = a p + b q and v = a' p + b' q follow the latents p and the noise q; the mean velocity is then
    (delta a p + delta b q) / (end - start). Where a and b are straight it is v itself.
    """
    if diffusion.path == "rectified_flow":
        return v
    path, times = path_of(diffusion), torch.tensor([at, start, end], dtype=torch.float64)
    (a, a_start, a_end), (b, b_start, b_end) = path.a(times).tolist(), path.b(times).tolist()
    da, db = path.da(times)[0].item(), path.db(times)[0].item()
    delta_a, delta_b = a_end - a_start, b_end - b_start
    scale = (a * db - b * da) * (end - start)
    return (delta_a * db - delta_b * da) / scale * x + (delta_b * a - delta_a * b) / scale * v


def guided(
    dit: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor],
    condition: Condition,
    null: Condition,
    guidance_scale: float,
) -> Denoiser:
    """The network with classifier-free guidance: v = v_null + w (v_condition - v_null) (arXiv:2207.12598).

    With w = 1 the null condition is not evaluated; otherwise both run as one batch of twice the size. Guidance is the
    same for whatever the network predicts, since at a given x_t all predictions are linear in one another.

    Args:
        dit: The network: (x_t, t, text_embeds, pooled, text_mask) -> prediction.
        condition: Of the B pictures.
        null: The empty condition, of B pictures or of one that stands for all; it may have another number of tokens.
        guidance_scale: w; 1 is no guidance.

    Returns:
        The prediction at (x_t, t), for batches of B; for the default diffusion a denoiser.
    """
    if guidance_scale == 1.0:
        return lambda x, t: dit(x, t, condition.text_embeds, condition.pooled, condition.text_mask)

    def both(empty: Tensor, told: Tensor) -> Tensor:
        return torch.cat((empty.expand(told.shape[0], *empty.shape[1:]), told))

    lengths = {null.text_embeds.shape[1], condition.text_embeds.shape[1]}  # masked text is cut per batch
    length = max(lengths)
    embeds = both(_padded(null.text_embeds, length), _padded(condition.text_embeds, length))  # (2B, L, D)
    pooled = both(null.pooled, condition.pooled)  # (2B, P)
    mask = None
    if len(lengths) > 1 or condition.text_mask is not None or null.text_mask is not None:
        mask = both(_padded(_mask_of(null), length), _padded(_mask_of(condition), length))  # (2B, L)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        v_null, v = dit(torch.cat((x, x)), torch.cat((t, t)), embeds, pooled, mask).chunk(2)
        return v_null + guidance_scale * (v - v_null)

    return denoise


def _mask_of(condition: Condition) -> Tensor:
    """The condition's mask, all True where it has none."""
    if condition.text_mask is not None:
        return condition.text_mask
    return torch.ones(condition.text_embeds.shape[:2], dtype=torch.bool, device=condition.text_embeds.device)


def _padded(text: Tensor, length: int) -> Tensor:
    """(B, L, ...) with zeros behind up to `length` tokens; for a mask they are hidden ones."""
    behind = text.new_zeros(text.shape[0], length - text.shape[1], *text.shape[2:])
    return torch.cat((text, behind), dim=1) if behind.shape[1] else text
