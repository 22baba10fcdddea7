"""Averages of the weights: fp32, sharded like the master partitions, several at once.

Two families. A constant decay forgets at a fixed rate. A power-function profile (Sections 3.1 and C of
arXiv:2312.02696) has a length that grows with the run: the average at step t weighs step τ by τ^γ. Its updates
telescope, so step τ has exactly the weight (τ^(γ+1) − (τ−1)^(γ+1)) / t^(γ+1), and the weights before the first step
have none. From stored power profiles any other can be found afterwards: training/post_hoc_ema.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from training.fragments import Fragment

MAX_SIGMA_REL = 12**-0.5  # that of γ = 0, the mean of all steps
MIN_SIGMA_REL = 1e-3


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Which averages to keep; the first one – decays before sigma_rels – is sampled from, evaluated and exported."""

    decays: tuple[float, ...] = (0.9999,)  # constant decays per optimiser step
    warmup: bool = True  # decay min(decay, (1 + n) / (10 + n)) at update n, so that early weights are forgotten
    sigma_rels: tuple[float, ...] = ()  # widths of power-function profiles, as shares of the steps taken so far

    def __post_init__(self) -> None:
        if any(not 0 < decay < 1 for decay in self.decays):
            raise ValueError(f"decays {self.decays} must be numbers in (0, 1)")
        for sigma_rel in self.sigma_rels:
            check_sigma_rel("sigma_rels", sigma_rel)
        if not self.names:
            raise ValueError("decays and sigma_rels are both empty; keep at least one average")
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"decays {self.decays} and sigma_rels {self.sigma_rels} must each differ; drop the repeats"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The averages' groups in a checkpoint, the one to use first: "ema-0.9999", "ema-power-0.10"."""
        return (*(f"ema-{decay}" for decay in self.decays), *map(power_name, self.sigma_rels))


def check_sigma_rel(where: str, sigma_rel: float) -> None:
    """Raises ValueError for a relative width that no profile of γ >= 0 has."""
    if not MIN_SIGMA_REL <= sigma_rel < MAX_SIGMA_REL:
        raise ValueError(f"{where} {sigma_rel} must be from {MIN_SIGMA_REL} to 0.288 (the mean of all steps)")


def power_name(sigma_rel: float) -> str:
    """The group of a power-function profile, with at least two decimals: "ema-power-0.10", "ema-power-0.075"."""
    short = f"{sigma_rel:.2f}"
    return f"ema-power-{short if float(short) == sigma_rel else sigma_rel}"


def ema_decay(config: EMAConfig, decay: float, update: int) -> float:
    """Constant decay used at update number `update` (from 0)."""
    return min(decay, (1 + update) / (10 + update)) if config.warmup else decay


def gamma_of(sigma_rel: float) -> float:
    """Exponent γ of the profile whose standard deviation is `sigma_rel` of its length.

    The largest root of σ² (γ + 2)² (γ + 3) = γ + 1 (arXiv:2312.02696, Appendix C).
    """
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6 * max(1.0, abs(root.real))))


def sigma_rel_of(gamma: float) -> float:
    """Standard deviation of the profile τ^γ on [0, 1]: √(γ + 1) / ((γ + 2) √(γ + 3))."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def power_weight(gamma: float, update: int) -> float:
    """1 − β of update number `update` (from 0), with β = (1 − 1/t)^(γ+1) at t = update + 1; 1 at the first."""
    return 1.0 if update == 0 else -math.expm1((gamma + 1) * math.log1p(-1 / (update + 1)))


class EMA:
    """Averages of the fragments this rank owns; no rank holds a full copy under ZeRO 1-3."""

    def __init__(self, config: EMAConfig, weights: dict[str, Fragment]) -> None:
        self.config = config
        self._weights = weights
        self._gammas = [gamma_of(sigma_rel) for sigma_rel in config.sigma_rels]
        self._averages = {
            group: {name: fragment.data.detach().clone() for name, fragment in weights.items()}
            for group in config.names
        }

    @torch.no_grad()
    def update(self, update: int) -> None:
        """averages ← averages + share·(weights − averages), in one foreach kernel per average.

        Args:
            update: optimiser steps taken before the one that made the weights.
        """
        live = [fragment.data for fragment in self._weights.values() if fragment.data.numel()]
        shares = [1.0 - ema_decay(self.config, decay, update) for decay in self.config.decays]
        shares += [power_weight(gamma, update) for gamma in self._gammas]
        for averages, share in zip(self._averages.values(), shares, strict=True):
            mine = [average for average in averages.values() if average.numel()]
            if mine:  # a rank may own nothing of a small model
                torch._foreach_lerp_(mine, live, share)

    def fragments(self, group: str | None = None) -> dict[str, Fragment]:
        """The average of one group (the first by default) by parameter name."""
        averages = self._averages[self.config.names[0] if group is None else group]
        return {name: self._weights[name].like(average) for name, average in averages.items()}

    def groups(self) -> dict[str, dict[str, Fragment]]:
        """All averages by group, as a checkpoint keeps them."""
        return {group: self.fragments(group) for group in self.config.names}
