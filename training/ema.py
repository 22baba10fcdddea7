"""Exponential moving averages of the weights: fp32, sharded like the master partitions, several decays at once."""

from dataclasses import dataclass

import torch

from training.engine import Fragment


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Which averages to keep."""

    decays: tuple[float, ...] = (0.9999,)  # the first one is sampled from, evaluated and exported
    warmup: bool = True  # decay min(decay, (1 + n) / (10 + n)) at update n, so that early weights are forgotten

    def __post_init__(self) -> None:
        if not self.decays or any(not 0 < decay < 1 for decay in self.decays):
            raise ValueError(f"decays {self.decays} must be numbers in (0, 1), at least one")


def ema_decay(config: EMAConfig, decay: float, update: int) -> float:
    """Decay used at update number `update` (from 0)."""
    return min(decay, (1 + update) / (10 + update)) if config.warmup else decay


class EMA:
    """Averages of the fragments this rank owns; no rank holds a full copy under ZeRO 1-3."""

    def __init__(self, config: EMAConfig, weights: dict[str, Fragment]) -> None:
        self.config = config
        self._weights = weights
        self._averages = {
            decay: {name: fragment.data.detach().clone() for name, fragment in weights.items()}
            for decay in config.decays
        }

    @torch.no_grad()
    def update(self, update: int) -> None:
        """averages ← decay·averages + (1 − decay)·weights, in one foreach kernel per decay."""
        live = [fragment.data for fragment in self._weights.values() if fragment.data.numel()]
        for decay, averages in self._averages.items():
            mine = [average for average in averages.values() if average.numel()]
            torch._foreach_lerp_(mine, live, 1.0 - ema_decay(self.config, decay, update))

    def fragments(self, decay: float | None = None) -> dict[str, Fragment]:
        """The average of one decay (the first by default) by parameter name."""
        averages = self._averages[self.config.decays[0] if decay is None else decay]
        return {name: self._weights[name].like(average) for name, average in averages.items()}
