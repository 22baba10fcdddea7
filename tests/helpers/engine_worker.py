"""One rank of tests/dist/test_engine.py: for every ZeRO stage, trains a small model and compares it with plain torch.

Usage: engine_worker.py FOLDER. Writes one JSON of measured differences per stage to FOLDER (rank 0).
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.runtime import ranks
from tests.helpers import engine_options
from tests.helpers.runs import gathered
from training.checkpoint import CheckpointConfig, Checkpointer
from training.ema import EMA, EMAConfig, gamma_of, power_name
from training.engine import Engine, EngineConfig
from training.optim import OptimConfig, ParameterGroup, build_adamw, set_learning_rate

STEPS, MICRO, GLOBAL = 5, 2, 8
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
GROUPED = replace(
    OPTIM,
    groups=(
        ParameterGroup(match="2.*", weight_decay=0.3, learning_rate_scale=0.25),
        ParameterGroup(match="*.bias", learning_rate_scale=2.0),
    ),
)
EMAS = EMAConfig(decays=(0.9, 0.5), warmup=False, sigma_rels=(0.1,))
CLIP = 0.05  # below the norms met here, so clipping is really in the comparison


def build() -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 5, bias=False))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def micro_batch(step: int, number: int) -> torch.Tensor:
    return torch.randn(MICRO, 7, generator=torch.Generator().manual_seed(1000 * step + number))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def rate(step: int) -> float:
    return OPTIM.learning_rate * (1 - 0.1 * step)


def reference(optim: OptimConfig) -> tuple[dict, dict, list[float]]:
    """Weights and averages after STEPS steps of plain torch on the whole batch, and the gradients' norms."""
    model = build()
    optimizer = build_adamw(model, optim)
    averages = {d: {n: p.detach().clone() for n, p in model.named_parameters()} for d in EMAS.names}
    norms = []
    for step in range(STEPS):
        set_learning_rate(optimizer.param_groups, rate(step))
        optimizer.zero_grad()
        loss_of(model, torch.cat([micro_batch(step, i) for i in range(GLOBAL // MICRO)])).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        power = (1 - 1 / (step + 1)) ** (gamma_of(0.1) + 1)
        for group, decay in (("ema-0.9", 0.9), ("ema-0.5", 0.5), (power_name(0.1), power)):
            for name, parameter in model.named_parameters():
                averages[group][name].lerp_(parameter.detach(), 1 - decay)
    return {n: p.detach() for n, p in model.named_parameters()}, averages, norms


def run_stage(
    stage: int, folder: Path, start: int, steps: int, source: Path | None, optim: OptimConfig = OPTIM
) -> dict[str, Any]:
    """Trains steps [start, start + steps) at one stage, from a checkpoint if `source` is given; saves at the end."""
    process = ranks()
    config = EngineConfig(zero_stage=stage, precision="float32", micro_batch_size=MICRO, global_batch_size=GLOBAL,
                          max_grad_norm=CLIP)  # fmt: skip
    engine = Engine(config, process.world_size)
    model = build()
    snapshot = Checkpointer(source, CheckpointConfig(), engine).newest() if source else None
    engine.shard(model, optim)
    ema = EMA(EMAS, engine.weight_fragments())

    def groups():
        return {"model": engine.weight_fragments(), **ema.groups(), **engine.moment_fragments()}

    if snapshot:
        snapshot.restore(groups())
        engine.refresh_weights()
        engine.set_adam_step(snapshot.state["adam_step"])
    norms = []
    for step in range(start, start + steps):
        engine.set_learning_rate(rate(step))
        for accumulation in range(engine.accumulation_steps):
            with engine.accumulate():
                number = accumulation * process.world_size + process.rank
                engine.backward(loss_of(engine.model, micro_batch(step, number)))
        norms.append(engine.grad_norm())
        ema.update(step)
    sharded = sum(f.data.numel() for f in ema.fragments().values())
    keeper = Checkpointer(folder, CheckpointConfig(), engine)
    keeper.save(start + steps, groups(), {"adam_step": engine.adam_step()})
    keeper.finish()
    saved = keeper.newest()
    assert saved is not None
    weights, averages, expected = reference(optim)
    live = gathered(engine.weight_fragments())
    result = {
        "weights": max(float((saved.tensor("model", n) - w).abs().max()) for n, w in weights.items()),
        "masters_are_what_is_saved": max(float((saved.tensor("model", n) - live[n]).abs().max()) for n in weights),
        "ema": max(
            float((saved.tensor(group, n) - w).abs().max())
            for group, average in averages.items()
            for n, w in average.items()
        ),
        "ema_elements_on_this_rank": sharded,
        "adam_step": engine.adam_step(),
        "norms": [norm / wanted - 1 for norm, wanted in zip(norms, expected[start : start + steps], strict=True)],
    }
    engine.barrier()
    return result


def forget_accelerate() -> None:
    """accelerate keeps process-wide state; the next engine of this test wants its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    results = {}
    for stage in (0, 1, 2, 3):
        results[f"stage {stage}"] = run_stage(stage, root / f"whole-{stage}", 0, STEPS, None)
        forget_accelerate()
        results[f"stage {stage}, groups"] = run_stage(stage, root / f"groups-{stage}", 0, STEPS, None, GROUPED)
        forget_accelerate()
    for first, second in ((2, 3), (3, 1), (1, 0), (0, 2)):
        part = root / f"part-{first}-{second}"
        run_stage(first, part, 0, 2, None)
        forget_accelerate()
        results[f"{first} then {second}"] = run_stage(second, root / f"rest-{first}-{second}", 2, STEPS - 2, part)
        forget_accelerate()
    part = root / "part-groups"
    run_stage(3, part, 0, 2, None, GROUPED)
    forget_accelerate()
    results["3 then 2, groups"] = run_stage(2, root / "rest-groups", 2, STEPS - 2, part, GROUPED)
    forget_accelerate()
    results["options"] = engine_options.everything(root / "t5")
    if ranks().rank == 0:
        (root / "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    os._exit(0)
