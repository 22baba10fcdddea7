"""A second model beside the engine: replicated on every rank, with an optimiser of its own."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from training.fragments import Fragment
from training.optim import OptimConfig, build_adamw, fresh_state
from training.update_gate import not_finite


class Replica:
    """A second model beside the engine (the discriminator): DistributedDataParallel and its own AdamW.

    Two DeepSpeed engines that share one adversarial loss give silently wrong gradients; a ZeRO generator beside a DDP
    discriminator is exact.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig, device: torch.device) -> None:
        self.module = model.to(device)
        self.optimizer = build_adamw(self.module, optim)
        parallel = dist.is_initialized() and dist.get_world_size() > 1
        self.model = nn.parallel.DistributedDataParallel(self.module) if parallel else self.module
        self.judge: Callable[[float], bool] = not_finite  # is the update with this gradient norm to be left out?

    @contextmanager
    def accumulate(self, *, first: bool, last: bool) -> Iterator[None]:
        """Wraps forward and backward of one micro-batch; gradients are averaged over ranks and applied on the last.

        Whether they are applied is decided by their norm (a host sync), which is the same on all ranks.
        """
        if first:
            self.optimizer.zero_grad(set_to_none=True)
        quiet: AbstractContextManager = nullcontext()
        if not last and isinstance(self.model, nn.parallel.DistributedDataParallel):
            quiet = self.model.no_sync()
        with quiet:
            yield
        if last:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            if not self.judge(float(nn.utils.get_total_norm(gradients))):
                self.optimizer.step()

    def counters(self) -> dict[str, int]:
        """What a checkpoint's state carries beside the fragments."""
        return {"discriminator_adam_step": max((int(s["step"]) for s in self.optimizer.state.values()), default=0)}

    def fragments(self) -> dict[str, dict[str, Fragment]]:
        """Weights and moments as replicated fragments: {"weights": {name: …}, "exp_avg": …, "exp_avg_sq": …}."""
        groups: dict[str, dict[str, Fragment]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, parameter in self.module.named_parameters():
            state = self.optimizer.state[parameter]
            if not state:
                state.update(fresh_state(self.optimizer, parameter))
            shape = tuple(parameter.shape)
            for group, data in (("weights", parameter.data), *((key, state[key]) for key in ("exp_avg", "exp_avg_sq"))):
                groups[group][name] = Fragment(data=data, start=0, shape=shape, replicated=True)
        return groups

    def set_adam_step(self, step: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(float(step))
