"""The one place where an update is let through or left out: between the norm of the reduced gradients and the step.

DeepSpeed skips a step when it sees an overflow. The gate shows it one where the run's policy wants the update left out,
so that gradients are cleared and counters kept by DeepSpeed's own path at every ZeRO stage.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def not_finite(norm: float) -> bool:
    """The least of all policies: an update whose gradient norm is not finite is left out."""
    return not math.isfinite(norm)


def guarded(loss: Tensor, value: Tensor | None = None) -> Tensor:
    """`loss` times 1, or times NaN where `value` (default: the loss) is not finite.

    Exact for a finite value, and on the device: no host sync. A loss that is not finite may have a finite gradient;
    like this it has none, and the reduction carries that to all ranks.
    """
    value = loss if value is None else value
    return loss * (value.detach() * 0 + 1)


def ask_before_updates(
    model: Any, zero_stage: int, left_out: Callable[[Tensor], bool], clip: Callable[[], Tensor]
) -> None:
    """Has a DeepSpeed engine ask before each update.

    Args:
        model: DeepSpeed's engine.
        zero_stage: its stage.
        left_out: is given the global gradient norm before clipping, the same on all ranks and inf if it is not finite;
            says whether to leave the update out.
        clip: clips the gradients of stage 0, where DeepSpeed is told not to, and returns their norm.
    """
    zero = model.optimizer
    if zero_stage == 0:
        step = zero.step

        def judged_step(closure: Any = None) -> None:
            zero.overflow = left_out(clip())
            if not zero.overflow:
                step()

        zero.step, zero.overflow = judged_step, False
    elif zero_stage == 3:
        group_norms = zero._get_norm_groups

        def judged_groups() -> list[Tensor]:
            norms = group_norms()
            stacked = torch.stack(list(norms))
            zero.overflow = left_out(torch.where((stacked < 0).any(), math.inf, torch.linalg.vector_norm(stacked)))
            return norms

        zero._get_norm_groups = judged_groups
    else:
        global_norm = zero.scaled_global_norm

        def judged_norm() -> Tensor:
            norm = global_norm()
            zero.overflow = left_out(norm)
            return norm

        zero.scaled_global_norm = judged_norm
