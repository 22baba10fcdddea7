"""The only door to accelerate and deepspeed: one model, one optimiser, any ZeRO stage.

Everything above this module sees plain tensors. What DeepSpeed partitions is shown as `Fragment`s: the contiguous slice
of a parameter whose fp32 master copy lives on this rank. The EMA and the checkpoints are built on fragments alone, so
neither knows a ZeRO stage.
"""

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.blocks import ActivationCheckpointing, wrap_blocks
from training.errors import TrainingError
from training.fragments import Fragment as Fragment  # for those who use the engine
from training.optim import OptimConfig, build_adamw, fresh_state, set_learning_rate
from training.update_gate import ask_before_updates, guarded, not_finite
from training.watchdog import PATIENCE

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the model is spread over ranks and in which precision it computes."""

    zero_stage: Literal[0, 1, 2, 3] = 2  # what DeepSpeed shards: 1 optimiser states, 2 + gradients, 3 + parameters
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU, float32 on CPU and at stage 0
    micro_batch_size: int  # samples per rank per forward
    global_batch_size: int  # samples per optimiser step over all ranks
    max_grad_norm: float = 1.0  # global L2 norm at which gradients are clipped; 0 = no clipping
    offload_optimizer: bool = False  # AdamW, its moments and the fp32 masters on the host; zero_stage 1, 2 or 3
    activation_checkpointing: ActivationCheckpointing = "none"  # what a block computes again in its backward pass
    compile: bool = False  # torch.compile for every block; minutes at the start
    hang_timeout_s: float = 1800.0  # seconds without progress after which a run is ended; 0 = never

    def __post_init__(self) -> None:
        if min(self.micro_batch_size, self.global_batch_size) < 1 or self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}; make it one"
            )
        if self.max_grad_norm < 0:
            raise ValueError(f"max_grad_norm {self.max_grad_norm} must not be negative; 0 is no clipping")
        if self.hang_timeout_s < 1 and self.hang_timeout_s != 0:  # the watch itself takes part of a second
            raise ValueError(f"hang_timeout_s {self.hang_timeout_s} must be at least 1, or 0 for no watch")
        if self.zero_stage == 0 and self.precision == "bfloat16":
            raise ValueError("zero_stage 0 keeps no fp32 master weights for bfloat16; use zero_stage 1, 2 or 3")
        if self.zero_stage == 0 and self.offload_optimizer:
            raise ValueError("zero_stage 0 has no optimizer of its own to offload; use zero_stage 1, 2 or 3")

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank per optimiser step; refuses a world size that does not divide the global batch."""
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size % per_pass:
            micro_batches = self.global_batch_size // self.micro_batch_size
            valid = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
            raise TrainingError(
                f"engine.global_batch_size {self.global_batch_size} does not divide over {world_size} ranks of "
                f"micro_batch_size {self.micro_batch_size}; valid numbers of ranks: {', '.join(map(str, valid))}"
            )
        return self.global_batch_size // per_pass


class Engine:
    """accelerate drives DeepSpeed: forward, backward with accumulation, clipping, AdamW.

    Making one connects the ranks; `shard` then takes the model. (Whatever touches accelerate before the ranks are
    connected, such as loading a text encoder, would leave every process believing that it is alone.)

    Args:
        config: stage, precision, batch sizes.
        world_size: number of ranks.

    Raises:
        TrainingError: the batch does not divide over the ranks.
    """

    def __init__(self, config: EngineConfig, world_size: int) -> None:
        self.config = config
        self.accumulation_steps = config.accumulation_steps(world_size)
        self._accelerator = _accelerator(config, self.accumulation_steps)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        if self.world_size != world_size:
            raise RuntimeError(f"accelerate sees {self.world_size} ranks, the environment says {world_size}")
        self.precision = torch.bfloat16 if _use_bfloat16(config, self.device.type) else torch.float32
        self.judge: Callable[[float], bool] = not_finite  # is the update with this gradient norm to be left out?
        self.mark: Callable[[str], None] = lambda phase: None  # is told what the engine is about to do
        self._norm: float | None = None  # of the last step
        self._losses: deque[Tensor] = deque(maxlen=self.accumulation_steps)  # of the last micro-batches

    def shard(self, model: nn.Module, optim: OptimConfig, blocks: Iterable[nn.Module] = ()) -> None:
        """Hands the model (fp32 parameters, the same values on every rank) and its AdamW to DeepSpeed.

        Args:
            model: stays the caller's name for it; what trains is `self.model`.
            optim: rules for AdamW.
            blocks: the model's repeated parts, the units of recomputation, compilation and ZeRO-3's gathering.
        """
        from deepspeed.utils import set_z3_leaf_module

        names = {id(parameter): name for name, parameter in model.named_parameters()}
        blocks = list(blocks)
        wrap_blocks(blocks, self.config.activation_checkpointing, self.config.compile)
        for block in blocks:
            set_z3_leaf_module(block, True)  # ZeRO-3 gathers a block as a whole and looks for nothing inside
        optimizer = build_adamw(model, optim)
        self.model, self._optimizer = self._accelerator.prepare(model.to(self.device), optimizer)
        _hide_from_transformers(self._accelerator)
        self.module: nn.Module = self.model.module
        self.parameters = {names[id(p)]: p for p in self.module.parameters() if p.requires_grad}
        ask_before_updates(self.model, self.config.zero_stage, self._left_out, self._clip_stage0)

    # -- one step ---------------------------------------------------------------------------------------------------
    def autocast(self) -> AbstractContextManager:
        """Matrix products in the engine's precision; norms and losses stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def accumulate(self) -> AbstractContextManager:
        """Wraps one micro-batch; the last of `accumulation_steps` synchronises the gradients and steps."""
        return self._accelerator.accumulate(self.model)

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Accumulates d(loss / accumulation_steps); on the last micro-batch also clips and steps.

        Args:
            loss: scalar.
            value: the loss's value, if `loss` has only its gradient. If it is not finite on any rank, no rank updates.
        """
        self.mark("backward")
        value = loss if value is None else value
        self._losses.append(value.detach())
        self._accelerator.backward(guarded(loss, value))

    def set_learning_rate(self, learning_rate: float) -> None:
        """The schedule's rate for the next step; each parameter group keeps its own scale."""
        set_learning_rate(self._optimizer.param_groups, learning_rate)

    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step before clipping; None if it was not finite or there was no step."""
        return self._norm if self._norm is not None and math.isfinite(self._norm) else None

    def last_losses(self) -> list[float]:
        """Losses of this rank's micro-batches of the last step. A host sync."""
        return torch.stack(list(self._losses)).tolist() if self._losses else []

    def _left_out(self, norm: Tensor) -> bool:
        self._norm = float(norm)
        self.mark("update")
        return self.judge(self._norm)

    @torch.no_grad()
    def _clip_stage0(self) -> Tensor:
        """Clips gradients that are the same on every rank and returns their norm, which DeepSpeed would not tell."""
        parameters = self.parameters.values()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        return norm

    # -- what the EMA and the checkpoints read ----------------------------------------------------------------------
    def weight_fragments(self) -> dict[str, Fragment]:
        """fp32 master weights by parameter name (live views)."""
        return dict(self._fragments(None))

    def moment_fragments(self) -> dict[str, dict[str, Fragment]]:
        """Both Adam moments by parameter name (live views); zero-initialised if no step was taken yet."""
        self._initialise_optimizer_state()
        return {key: dict(self._fragments(key)) for key in ("exp_avg", "exp_avg_sq")}

    def adam_step(self) -> int:
        """Updates applied so far (AdamW's own counter, which bias correction uses)."""
        steps = [int(state["step"]) for state in self._base_optimizer().state.values() if "step" in state]
        return max(steps, default=0)

    def set_adam_step(self, step: int) -> None:
        self._initialise_optimizer_state()
        for state in self._base_optimizer().state.values():
            state["step"].fill_(float(step))

    def refresh_weights(self) -> None:
        """Brings the weights that compute in line with the fp32 masters after these were written. Collective."""
        zero = self.model.optimizer
        if self.config.zero_stage in (1, 2):
            zero.update_lp_params()
        elif self.config.zero_stage == 3:
            zero._partition_all_parameters()  # or small ones that are gathered already would stay as they are
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:  # small ones that every rank keeps whole
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, in place (collective)."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def all_ranks(self, values: Tensor) -> Tensor:
        """Every rank's values (n,), one rank below the other, (world size, n), on every rank (collective)."""
        table = values.repeat(self.world_size, 1)
        if self.world_size > 1:
            dist.all_gather(list(table.unbind()), values)
        return table

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    def from_rank0(self, value: Any) -> Any:
        """Rank 0's value on every rank (collective)."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank (collective)."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Leaves the process group; call once, on every rank, when nothing is in flight."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    # -- DeepSpeed's partitions -------------------------------------------------------------------------------------
    def _base_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.model.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _flat_partitions(self) -> list[Tensor]:
        """The tensors AdamW really steps: flat fp32 partitions under ZeRO, the parameters themselves at stage 0."""
        zero = self.model.optimizer
        if self.config.zero_stage == 3:
            return list(zero.fp32_partitioned_groups_flat)
        if self.config.zero_stage > 0:
            return list(zero.single_partition_of_fp32_groups)
        return list(self.parameters.values())

    def _initialise_optimizer_state(self) -> None:
        """AdamW makes its state at the first step; a checkpoint is loaded before that."""
        state = self._base_optimizer().state
        for partition in self._flat_partitions():
            if not state[partition]:
                state[partition].update(fresh_state(self._base_optimizer(), partition))

    def _fragments(self, moment: str | None) -> Iterator[tuple[str, Fragment]]:
        state = self._base_optimizer().state
        zero = self.model.optimizer

        def of(partition: Tensor) -> Tensor:
            return partition.data if moment is None else state[partition][moment]

        for name, parameter in self.parameters.items():
            if self.config.zero_stage == 0:
                yield name, Fragment(data=of(parameter), start=0, shape=tuple(parameter.shape), replicated=True)
            elif self.config.zero_stage == 3:
                group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                start = min(dist.get_rank() * parameter.ds_tensor.ds_numel, parameter.ds_numel)
                length = min(length, parameter.ds_numel - start)  # the last partition is padded
                data = of(zero.fp32_partitioned_groups_flat[group]).narrow(0, offset, length)
                yield name, Fragment(data=data, start=start, shape=tuple(parameter.ds_shape))
            else:
                yield name, self._zero12_fragment(parameter, of)

    def _zero12_fragment(self, parameter: nn.Parameter, of: Callable[[Tensor], Tensor]) -> Fragment:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # another rank's partition holds all of it
            empty = self.model.optimizer.single_partition_of_fp32_groups[0].detach().new_empty(0)
            return Fragment(data=empty, start=0, shape=tuple(parameter.shape))
        place = mapping.hp_fragment_address
        flat = of(self.model.optimizer.single_partition_of_fp32_groups[mapping.param_group_index])
        data = flat.narrow(0, place.start, place.numel)
        return Fragment(data=data, start=mapping.lp_fragment_address.start, shape=tuple(parameter.shape))


def group_timeout(hang_timeout_s: float) -> timedelta:
    """For which a collective may wait: nobody gives up before the watchdog, which can say who is to blame."""
    return timedelta(seconds=max(1800.0, (PATIENCE + 1) * hang_timeout_s))


def _use_bfloat16(config: EngineConfig, device_type: str) -> bool:
    return config.precision == "bfloat16" or (
        config.precision == "auto" and device_type == "cuda" and config.zero_stage > 0
    )


def _no_overflow(record: logging.LogRecord) -> bool:
    return "OVERFLOW!" not in record.getMessage()


def _deepspeed_config(config: EngineConfig, accumulation_steps: int) -> dict[str, Any]:
    """Nothing is left to a default that changes numbers."""
    bucket = 2**28 if torch.cuda.is_available() else 2**22  # elements; the buffers are allocated up front
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.max_grad_norm if config.zero_stage else 0.0,  # absent means 1.0; stage 0: ours
        "bf16": {
            "enabled": _use_bfloat16(config, "cuda" if torch.cuda.is_available() else "cpu"),
            "check_grad_overflow": False,  # another pass over all gradients for what their norm says
        },
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_max_live_parameters": 4 * bucket,  # gathered at once
            "stage3_max_reuse_distance": 4 * bucket,
            "stage3_prefetch_bucket_size": bucket // 4,
            # ZeRO-3's own linear layer keeps no gathered weight for the backward pass, which recomputation need not
            # fear; it adds the bias in place, and so to what "selective" kept of the product: silently wrong.
            "memory_efficient_linear": config.activation_checkpointing == "none",
            **(offload if config.offload_optimizer else {}),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the host too; DeepSpeed's would be compiled
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def _accelerator(config: EngineConfig, accumulation_steps: int) -> "Accelerator":
    """The Accelerator, with the ranks connected."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)  # otherwise DeepSpeed looks for MPI
    os.environ.setdefault("MASTER_PORT", "29500")
    import deepspeed
    import deepspeed.ops
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, GradientAccumulationPlugin, InitProcessGroupKwargs

    # The shared-memory collective is compiled at start-up (80 s, needs ninja and g++, and a killed compile leaves a
    # lock that hangs the next run), yet only tensor-parallel inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # It says of every update that is left out that the gradients are not finite, which a spike's are; the run says why.
    deepspeed.utils.logger.addFilter(_no_overflow)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=_deepspeed_config(config, accumulation_steps)),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation_steps),
            # Left to itself, accelerate takes ranks without a GPU for processes of their own.
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=group_timeout(config.hang_timeout_s))],
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise TrainingError(
            f"MASTER_PORT {os.environ['MASTER_PORT']} is taken by another process on this machine; give the run another"
        ) from None
    _hide_from_transformers(accelerator)
    return accelerator


def _hide_from_transformers(accelerator: "Accelerator") -> None:
    """Drops what accelerate keeps for transformers to see: at stage 3 it would partition every model that it loads.

    The frozen text encoders are whole on each rank and no part of the engine.
    """
    accelerator.state.deepspeed_plugin.dschf = None
