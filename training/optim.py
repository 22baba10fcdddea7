"""AdamW and its parameter groups."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101)."""

    learning_rate: float  # peak, after warm-up
    weight_decay: float = 0.0  # decoupled; matrices and convolution kernels only
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate {self.learning_rate} must be positive")
        if self.weight_decay < 0 or self.eps <= 0:
            raise ValueError(f"weight_decay {self.weight_decay} must be >= 0 and eps {self.eps} > 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must be in [0, 1)")


def build_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Two groups: tensors of two and more axes decay, vectors (biases, norm weights) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=torch.cuda.is_available(),
    )
