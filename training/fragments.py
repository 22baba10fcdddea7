"""This rank's parts of tensors that are spread over ranks: where they lie, and how the whole is made of them."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """This rank's contiguous part of one flattened parameter (or of a tensor sharded like it).

    `data` is a live fp32 view of length n; it holds elements [start, start + n) of the flattened tensor of `shape`. A
    rank that owns nothing of a parameter has n = 0. `replicated` means that every rank holds the whole tensor.
    """

    data: Tensor
    start: int
    shape: tuple[int, ...]
    replicated: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return int(torch.Size(self.shape).numel())

    def like(self, data: Tensor) -> "Fragment":
        """The same place in another tensor of the same shape (an EMA, an optimiser moment)."""
        return Fragment(data=data, start=self.start, shape=self.shape, replicated=self.replicated)


def gather(fragment: Fragment) -> Tensor:
    """The whole tensor on every rank, float32, by one all-reduce of a buffer that is zero outside the own fragment.

    It comes on the device of the collectives, unless every rank has it anyway. Collective: every rank calls it for the
    same tensor in the same order. Adding zeros is exact.
    """
    if fragment.replicated:
        return fragment.data.detach().reshape(fragment.shape)
    device = fragment.data.device
    if dist.is_initialized() and dist.get_backend() == "nccl":
        # It reduces on GPUs alone, while what an offloaded optimiser keeps is on the host.
        device = torch.device("cuda", torch.cuda.current_device())
    full = torch.zeros(fragment.numel, dtype=torch.float32, device=device)
    full[fragment.start : fragment.start + fragment.data.numel()] = fragment.data
    if dist.get_world_size() > 1:
        dist.all_reduce(full)
    return full.reshape(fragment.shape)


@torch.no_grad()
def gather_into(module: nn.Module | None, fragments: dict[str, Fragment]) -> None:
    """Copies whole tensors into a module's parameters by name, one after the other: no second copy of all is made.

    Args:
        module: has a parameter for each name; None = this rank only gives its parts.
        fragments: by name. Collective: every rank has the same names in the same order.
    """
    parameters = {} if module is None else dict(module.named_parameters())
    for name, fragment in fragments.items():
        whole = gather(fragment)
        if module is not None:
            parameters.pop(name).copy_(whole)
    if parameters:
        raise KeyError(f"no fragments of {', '.join(parameters)}")


def scatter(full: Tensor, fragment: Fragment) -> None:
    """Copies this rank's part of a whole tensor into its fragment."""
    part = full.reshape(-1)[fragment.start : fragment.start + fragment.data.numel()]
    fragment.data.view(-1).copy_(part)
