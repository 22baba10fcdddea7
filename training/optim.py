"""AdamW and its parameter groups."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """What is different for the parameters of some names."""

    match: str  # shell pattern for the whole name: "*.bias", "text_in.*", "blocks.[0-3].*"
    weight_decay: float | None = None  # for all of them, vectors too; None = as for the rest
    learning_rate_scale: float = 1.0  # times the schedule's rate; 0 = the start values are kept

    def __post_init__(self) -> None:
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"weight_decay {self.weight_decay} must be >= 0")
        if self.learning_rate_scale < 0:
            raise ValueError(f"learning_rate_scale {self.learning_rate_scale} must be >= 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101)."""

    learning_rate: float  # peak, after warm-up
    weight_decay: float = 0.0  # decoupled; matrices and convolution kernels only
    decay_biases_and_norms: bool = False  # decay vectors too
    groups: tuple[ParameterGroup, ...] = ()  # exceptions by name; the first that matches wins
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    fused: bool | None = None  # one kernel per step; None = on GPUs alone (on CPUs it rounds differently)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate {self.learning_rate} must be positive")
        if self.weight_decay < 0 or self.eps <= 0:
            raise ValueError(f"weight_decay {self.weight_decay} must be >= 0 and eps {self.eps} > 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must be in [0, 1)")


def parameter_groups(model: nn.Module, config: OptimConfig, where: str = "optim") -> list[dict[str, Any]]:
    """AdamW's groups: what no name matches – matrices, then vectors (biases, norm weights) – then each exception's.

    Args:
        model: its trainable parameters are grouped.
        config: the rules.
        where: the config's place in the recipe, for messages.

    Raises:
        TrainingError: an exception applies to no parameter.
    """
    rules = range(-1, len(config.groups))  # -1: no exception
    members: dict[tuple[int, bool], list[nn.Parameter]] = {(rule, is_vector): [] for rule in rules
                                                           for is_vector in (False, True)}  # fmt: skip
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rule = next((n for n, group in enumerate(config.groups) if fnmatchcase(name, group.match)), -1)
            members[rule, parameter.ndim < 2].append(parameter)
    _refuse_idle(config, names, {rule for (rule, _), found in members.items() if found}, where)
    groups = []
    for (rule, is_vector), parameters in members.items():
        decay = 0.0 if is_vector and not config.decay_biases_and_norms else config.weight_decay
        scale = 1.0
        if rule >= 0:
            own, scale = config.groups[rule].weight_decay, config.groups[rule].learning_rate_scale
            decay = decay if own is None else own
        rate = config.learning_rate * scale
        if parameters:
            groups.append({"params": parameters, "weight_decay": decay, "lr": rate, "learning_rate_scale": scale})
    return groups


def _refuse_idle(config: OptimConfig, names: list[str], used: set[int], where: str) -> None:
    for number, group in enumerate(config.groups):
        if number not in used:
            earlier = any(fnmatchcase(name, group.match) for name in names)
            why = "only what earlier groups match; put it before them" if earlier else f"no parameter, like {names[0]}"
            raise TrainingError(f"{where}.groups.{number}: {group.match!r} matches {why}; or leave it out")


def build_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups of `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=torch.cuda.is_available() if config.fused is None else config.fused,
    )


def fresh_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of a tensor before its first step; the fused kernel wants the counter on the tensor's device."""
    device = tensor.device if optimizer.defaults["fused"] else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(tensor),
        "exp_avg_sq": torch.zeros_like(tensor),
    }


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Sets the schedule's rate, times each group's own scale."""
    for group in groups:
        group["lr"] = learning_rate * group["learning_rate_scale"]
