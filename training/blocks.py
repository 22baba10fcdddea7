"""What is done to a model's blocks before it is sharded: activations recomputed in the backward pass, compilation.

A block is called through its own `forward`, so what is wrapped here runs inside the hooks that ZeRO-3 hangs around a
block: its weights are there for the recomputation as they are for the first pass.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

ActivationCheckpointing = Literal["none", "selective", "full"]
COMPILER = "inductor"

_PRODUCTS = (  # what costs arithmetic, and so is kept by "selective": matrix products, convolutions, attention
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_KEPT = {getattr(torch.ops.aten, name).default for name in _PRODUCTS}


def wrap_blocks(blocks: Iterable[nn.Module], checkpointing: ActivationCheckpointing, compile: bool) -> None:
    """Changes how blocks run, not what they compute, and neither their parameters nor the names of these.

    Args:
        blocks: called with tensors or None, return tensors, draw no random numbers.
        checkpointing: what a block keeps for its backward pass: "none" = everything that is recomputed; "selective" =
            its input and the outputs of matrix products, convolutions and attention; "full" = its input alone
            (arXiv:1604.06174, and arXiv:2205.05198 for the choice between the operations).
        compile: one graph for all blocks of a class and form, made at the first batch of a shape; a second
            shape makes one for all shapes.
    """
    for block in blocks:
        forward: Callable[..., Any] = block.forward
        if checkpointing != "none":
            contexts = {"context_fn": _selective_contexts} if checkpointing == "selective" else {}
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **contexts)
        if compile:
            forward = torch.compile(forward, backend=COMPILER)
        block.forward = forward


def _policy(_context: Any, operation: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)
