"""Learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up to the peak, then one of

    - constant: the peak;
    - cosine: down to `final_fraction` of the peak over all that is left;
    - wsd (warm-up, stable, decay): the peak, and down to `final_fraction` over the last `decay_fraction` of the steps
      (arXiv:2404.06395; the shapes are compared in arXiv:2405.18392).
    """

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0  # optimiser steps
    warmup_images: int = 0  # the same in pictures, global batch times steps; give one of the two
    final_fraction: float = 0.0  # of the peak, at the last step (cosine and wsd)
    decay_fraction: float = 0.1  # share of total_steps at their end, (0, 1] (wsd only)
    decay_shape: Literal["linear", "1-sqrt"] = "1-sqrt"  # of the way down (wsd only)

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.final_fraction <= 1:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be >= 0 and final_fraction in [0, 1]")
        if self.warmup_images < 0 or (self.warmup_images and self.warmup_steps):
            raise ValueError(
                f"warmup_images {self.warmup_images} must be >= 0, and 0 where warmup_steps ({self.warmup_steps}) "
                "is given"
            )
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction {self.decay_fraction} is a share of total_steps; give one in (0, 1]")

    def warmup_end(self, global_batch_size: int) -> int:
        """The first step at the peak."""
        return self.warmup_steps or -(-self.warmup_images // global_batch_size)

    def decay_start(self, total_steps: int) -> int:
        """The last step at the peak of a wsd schedule, if warm-up is over by then."""
        return total_steps - max(1, round(self.decay_fraction * total_steps))

    def check(self, total_steps: int, global_batch_size: int) -> None:
        """Raises ValueError if a wsd schedule should decay before its warm-up is over."""
        end, start = self.warmup_end(global_batch_size), self.decay_start(total_steps)
        if self.kind == "wsd" and end > start:
            raise ValueError(
                f"schedule: warm-up takes {end} steps, the decay starts at step {start} of {total_steps}; shorten "
                "warm-up or schedule.decay_fraction"
            )


def learning_rate(config: ScheduleConfig, peak: float, step: int, total_steps: int, global_batch_size: int) -> float:
    """The rate of update number `step` (counted from 0) of `total_steps`, each of `global_batch_size` pictures."""
    warmup_end = config.warmup_end(global_batch_size)
    if step < warmup_end:
        if config.warmup_images:
            return peak * min(1.0, (step + 1) * global_batch_size / config.warmup_images)
        return peak * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return peak
    start = warmup_end if config.kind == "cosine" else config.decay_start(total_steps)
    progress = max(0, step - start) / max(1, total_steps - start)
    return peak * (config.final_fraction + (1 - config.final_fraction) * _left(config, min(1.0, progress)))


def _left(config: ScheduleConfig, progress: float) -> float:
    """How much of the way down is left, from 1 to 0, after a share of it."""
    if config.kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (progress if config.decay_shape == "linear" else math.sqrt(progress))
