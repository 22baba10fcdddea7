"""What one rank of benchmarks/trainer.py does: `trainer_ranks.py ROW ROUNDS FILE`; rank 0 writes FILE."""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common import compare
from launch.runtime import ranks
from models.dit import DiT, DiTConfig
from training.blocks import ActivationCheckpointing, wrap_blocks
from training.checkpoint import CheckpointConfig, Checkpointer, Groups
from training.ema import EMA, EMAConfig
from training.engine import Engine, EngineConfig
from training.optim import OptimConfig, build_adamw

OPTIM = OptimConfig(learning_rate=1e-4, weight_decay=0.01, fused=True)
CLIP = 0.5
TEXT_DIM, POOLED_DIM = 64, 32
POLL_EVERY = 3  # steps


def make_dit(depth: int, width: int) -> DiT:
    """A DiT of plausible weights, the same on every rank."""
    dit = DiT(
        DiTConfig(
            latent_channels=4,
            depth=depth,
            width=width,
            num_heads=width // 64,
            max_grid=16,
            text_dim=TEXT_DIM,
            pooled_dim=POOLED_DIM,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator))
    return dit


def make_batch(size: int, side: int, text_tokens: int, seed: int) -> tuple[Tensor, ...]:
    """Latents, times, text and pooled text."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 4, side, side, generator=generator),
        torch.rand(size, generator=generator),
        torch.randn(size, text_tokens, TEXT_DIM, generator=generator),
        torch.randn(size, POOLED_DIM, generator=generator),
    )


def loss_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A loss of about the size of a flow-matching loss."""
    return (model(*batch) - batch[0]).square().mean()


def forget_accelerate() -> None:
    """accelerate keeps process-wide state; the next engine wants its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()


def engine_of(stage: int, batch_size: int) -> Engine:
    """An engine of both ranks, one micro-batch per step."""
    config = EngineConfig(zero_stage=stage, precision="float32", micro_batch_size=batch_size,
                          global_batch_size=2 * batch_size, max_grad_norm=CLIP)  # fmt: skip
    return Engine(config, ranks().world_size)


def zero1(rounds: int) -> dict[str, Any]:
    """A row: samples per second of the engine at stage 1 and of DistributedDataParallel, which get the same weights."""
    depth, width, size, side, text_tokens = 6, 384, 8, 32, 77
    engine = engine_of(1, size)
    dit = make_dit(depth, width)
    engine.shard(dit, OPTIM, dit.blocks)
    batch = make_batch(size, side, text_tokens, seed=1 + ranks().rank)

    replica = make_dit(depth, width)
    optimizer = build_adamw(replica, OPTIM)
    parallel = nn.parallel.DistributedDataParallel(replica, gradient_as_bucket_view=True)

    def ours() -> int:
        with engine.accumulate(), engine.autocast():
            engine.backward(loss_of(engine.model, batch))
        return 2 * size

    def peer() -> int:
        optimizer.zero_grad(set_to_none=True)
        loss_of(parallel, batch).backward()
        nn.utils.clip_grad_norm_(replica.parameters(), CLIP)
        optimizer.step()
        return 2 * size

    ours(), peer()
    masters = engine.all_gather(engine.weight_fragments())
    for name, parameter in replica.named_parameters():
        torch.testing.assert_close(masters[name], parameter.detach(), rtol=0, atol=1e-5)
    row = compare("zero1", ours, peer, unit="samples/s", packages=("torch", "deepspeed", "accelerate"), rounds=rounds,
                  clock=time.perf_counter)  # fmt: skip
    return asdict(row)


def stall(rounds: int) -> dict[str, Any]:
    """Seconds per save: for which a background save stopped the loop, and of a save that is waited for."""
    engine = engine_of(1, 1)
    dit = make_dit(6, 512)
    engine.shard(dit, OPTIM, dit.blocks)
    batch = make_batch(1, 16, 8, seed=1 + ranks().rank)
    ema = EMA(EMAConfig(decays=(0.999,)), engine.weight_fragments())

    def step() -> None:
        with engine.accumulate():
            engine.backward(loss_of(engine.model, batch))

    def groups() -> Groups:
        return {"model": engine.weight_fragments(), **ema.groups(), **engine.moment_fragments()}

    def live() -> dict[str, dict[str, Tensor]]:
        return {group: engine.all_gather(fragments) for group, fragments in groups().items()}

    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory(prefix="darkroom-stall-") as mine:
        keeper = Checkpointer(Path(engine.from_rank0(mine)), CheckpointConfig(keep_last=2), engine)
        assert keeper.newest() is None
        step()
        keeper.reserve(groups())
        for number in range(2 * rounds + 2):  # two of them only warm up
            step()
            wanted = live() if number < 2 else {}
            before, start = keeper.stall_s, time.perf_counter()
            keeper.save(number, groups(), {})
            if number % 2:
                keeper.finish()
                spent = time.perf_counter() - start
            else:
                while keeper.last_good != number:
                    for _ in range(POLL_EVERY):  # training goes on
                        step()
                    keeper.poll()
                spent = keeper.stall_s - before
            if number < 2:
                saved = keeper.newest()
                assert saved is not None and saved.step == number
                assert all(
                    torch.equal(saved.tensor(group, name), tensor)
                    for group, tensors in wanted.items()
                    for name, tensor in tensors.items()
                )
            else:
                seconds["peer" if number % 2 else "ours"].append(spent)
        dist.barrier()
    return seconds


def recomputing(mode: ActivationCheckpointing) -> tuple[Callable[[], int], DiT]:
    """One forward and backward of a DiT of 31 M parameters, and the DiT."""
    dit = make_dit(6, 384)
    wrap_blocks(dit.blocks, mode, compile=False)
    batch = make_batch(8, 32, 77, seed=1)

    def turn() -> int:
        dit.zero_grad()
        loss_of(dit, batch).backward()
        return len(batch[0])

    return turn, dit


def recompute(name: str, rounds: int) -> dict[str, Any]:
    """A row: samples per second with recomputed activations and without."""
    (ours, one), (peer, other) = recomputing("full" if name == "full" else "selective"), recomputing("none")
    ours(), peer()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)
    return asdict(compare(name, ours, peer, unit="samples/s", packages=("torch",), rounds=rounds))


def recompute_memory(name: str, rounds: int) -> dict[str, Any]:
    """Peaks of steps above what was there before, with recomputed activations and without."""
    turns = {"ours": recomputing("full" if name.startswith("full") else "selective")[0], "peer": recomputing("none")[0]}
    for turn in turns.values():
        turn()
    peaks: dict[str, list[int]] = {side: [] for side in turns}
    for _ in range(rounds):
        for side, turn in turns.items():
            peaks[side].append(peak_growth(turn))
    return peaks


def memory(stage: int, rounds: int) -> dict[str, Any]:
    """Peak growth of this process from before the model to the end of a step, by step, and what it holds."""
    engine = engine_of(stage, 1)  # a first one of a tiny model brings in all code and the buffers of the collectives
    tiny = make_dit(1, 64)
    engine.shard(tiny, OPTIM, tiny.blocks)
    batch = make_batch(1, 2, 1, seed=1 + ranks().rank)
    with engine.accumulate():
        engine.backward(loss_of(engine.model, batch))
    forget_accelerate()
    del engine, tiny

    engine = engine_of(stage, 1)
    gc.collect()
    before = status_bytes("VmRSS")
    dit = make_dit(6, 512)
    parameters = sum(parameter.numel() for parameter in dit.parameters())
    engine.shard(dit, OPTIM, dit.blocks)
    ema = EMA(EMAConfig(decays=(0.999,)), engine.weight_fragments())

    def step() -> None:
        with engine.accumulate():
            engine.backward(loss_of(engine.model, batch))
        ema.update(0)

    peaks = [peak_growth(step, before) for _ in range(rounds)]
    return {"parameters": parameters, "peaks": peaks}


def peak_growth(work: Callable[[], object], before: int | None = None) -> int:
    """The highest resident size during `work`, in bytes above `before` (None: that at its start)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = status_bytes("VmRSS") if before is None else before
    work()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """A size of this process from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def main() -> None:
    """Measures one row."""
    name, rounds, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if name == "zero1":
        result = zero1(rounds)
    elif name == "stall":
        result = stall(rounds)
    elif name.startswith("memory-"):
        result = memory(int(name[-1]), rounds)
    else:
        result = (recompute_memory if name.endswith("-memory") else recompute)(name, rounds)
    if ranks().rank == 0:
        path.write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # DeepSpeed's objects fall in no good order


if __name__ == "__main__":
    main()
