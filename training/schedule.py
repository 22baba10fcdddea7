"""Learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then constant or cosine decay to `final_fraction` of the peak at the last step."""

    kind: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0  # optimiser steps
    final_fraction: float = 0.0  # of the peak, at the last step (cosine only)

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.final_fraction <= 1:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be >= 0 and final_fraction in [0, 1]")


def learning_rate(config: ScheduleConfig, peak: float, step: int, total_steps: int) -> float:
    """The rate of update number `step` (counted from 0) of `total_steps`."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (config.final_fraction + (1 - config.final_fraction) * cosine)
