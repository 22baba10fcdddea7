"""What engine_worker.py tries beside the stages: offload, recomputation, compilation, bfloat16, encoders nearby."""

from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.runtime import ranks
from models.dit import DiT, DiTConfig
from models.text_config import TextEncoderConfig
from models.text_encoder import build_text_encoder
from tests.helpers.runs import gathered
from training.ema import EMA, EMAConfig
from training.engine import Engine, EngineConfig, Fragment
from training.optim import OptimConfig

OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
LINEAR = F.linear
T5 = TextEncoderConfig(name="t5", kind="t5", seed=3, width=32, layers=1, heads=2, vocab_size=512, max_tokens=8,
                       dtype="bfloat16")  # fmt: skip


def forget_engines() -> None:
    """accelerate and ZeRO-3's linear layer are process-wide; the next engine of this test wants neither."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    F.linear = LINEAR


def open_engine(**options: Any) -> tuple[Engine, EMA]:
    """An engine of both ranks with a DiT of three blocks, and an average."""
    settings = {"precision": "float32", "micro_batch_size": 2, "global_batch_size": 8, "max_grad_norm": 0.05}
    engine = Engine(EngineConfig(**(settings | options)), ranks().world_size)
    dit = DiT(DiTConfig(latent_channels=4, depth=3, width=64, num_heads=2, max_grid=4, text_dim=8, pooled_dim=8))
    generator = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    engine.shard(dit, OPTIM, dit.blocks)
    return engine, EMA(EMAConfig(decays=(0.9,), warmup=False), engine.weight_fragments())


def train(engine: Engine, ema: EMA, steps: range) -> list[float]:
    """Losses of this rank's micro-batches."""
    losses = []
    for step in steps:
        for number in range(engine.accumulation_steps):
            generator = torch.Generator().manual_seed(100 * step + 2 * number + engine.rank)
            x_t, pooled = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, generator=generator)
            t, text = torch.rand(2, generator=generator), torch.randn(2, 5, 8, generator=generator)
            with engine.accumulate():
                with engine.autocast():
                    loss = engine.model(x_t, t, text, pooled).float().square().mean()
                engine.backward(loss)
            losses.append(loss.item())
        ema.update(step)
    return losses


def outcome(engine: Engine, ema: EMA, losses: list[float]) -> Tensor:
    """Losses, masters and averages in one."""
    parts = [torch.tensor(losses)]
    for fragments in (engine.weight_fragments(), ema.fragments()):
        whole = gathered(fragments)
        parts += [whole[name].flatten() for name in sorted(whole)]
    return torch.cat(parts)


def run(steps: int = 2, **options: Any) -> Tensor:
    engine, ema = open_engine(**options)
    result = outcome(engine, ema, train(engine, ema, range(steps)))
    engine.barrier()
    forget_engines()
    return result


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def ways_of_running() -> dict[str, Any]:
    """Distances to stage 0, and between what must be the same bits."""
    result: dict[str, Any] = {}
    base, one_step = run(zero_stage=0), run(1, zero_stage=0)
    for stage, offload in [(0, False), *product((1, 2, 3), (False, True))]:
        plain = run(zero_stage=stage, offload_optimizer=offload)
        modes = [
            run(zero_stage=stage, offload_optimizer=offload, activation_checkpointing=mode)
            for mode in (("full",) if offload else ("full", "selective"))
        ]
        same = [modes[-1], plain] if stage < 3 else modes[-1:]  # stage 3 has DeepSpeed's linear layer, if it may
        result[f"stage {stage}{', offload' if offload else ''}"] = {
            "plain": far(plain, base),
            "full": far(modes[0], base),
            "modes": max(far(modes[0], other) for other in same),
        }
    with mock.patch("training.blocks.COMPILER", "aot_eager"):
        for stage, mode in ((2, "none"), (3, "selective")):
            compiled = run(1, zero_stage=stage, activation_checkpointing=mode, compile=True)
            result[f"stage {stage}, {mode}, compiled"] = far(compiled, one_step)
    return result


def state_of(engine: Engine, ema: EMA) -> list[dict[str, Fragment]]:
    return [engine.weight_fragments(), *engine.moment_fragments().values(), ema.fragments()]


def computing_weights(engine: Engine) -> dict[str, Tensor]:
    """The weights that the forward pass sees, whole."""
    import deepspeed

    if engine.config.zero_stage < 3:
        return {name: parameter.detach().clone() for name, parameter in engine.parameters.items()}
    with deepspeed.zero.GatheredParameters(list(engine.parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in engine.parameters.items()}


def bfloat16_masters(stage: int, offload: bool) -> dict[str, Any]:
    """Three steps at once against one, a resume in another engine, and two more."""
    options = {"zero_stage": stage, "offload_optimizer": offload, "precision": "bfloat16"}
    engine, ema = open_engine(**options)
    losses = train(engine, ema, range(1))
    kept = [{name: f.data.clone() for name, f in group.items()} for group in state_of(engine, ema)]
    adam_step = engine.adam_step()
    losses += train(engine, ema, range(1, 3))
    at_once = outcome(engine, ema, losses)
    forget_engines()

    engine, ema = open_engine(**options)
    for group, tensors in zip(state_of(engine, ema), kept, strict=True):
        for name, fragment in group.items():
            fragment.data.copy_(tensors[name])
    before = computing_weights(engine)
    engine.refresh_weights()
    engine.set_adam_step(adam_step)
    masters, computing = gathered(engine.weight_fragments()), computing_weights(engine)
    resumed = outcome(engine, ema, losses[: engine.accumulation_steps] + train(engine, ema, range(1, 3)))
    result = {
        "master dtypes": sorted({str(f.data.dtype) for f in engine.weight_fragments().values()}),
        "computing dtypes": sorted({str(tensor.dtype) for tensor in computing.values()}),
        "changed": max(far(before[name].float(), computing[name].float()) for name in computing),
        "refreshed": all(torch.equal(computing[name], masters[name].bfloat16()) for name in masters),
        "masters are finer": max(far(masters[name], computing[name].float()) for name in masters),
        "resumed": far(resumed, at_once),
    }
    engine.barrier()
    forget_engines()
    return result


def encoders_beside_stage_3(folder: Path) -> dict[str, Any]:
    """Frozen encoders that are made while a stage-3 engine lives."""
    from transformers import T5Config, T5EncoderModel

    small = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    T5EncoderModel(small).save_pretrained(folder)  # rank 0 alone writes
    alone = build_text_encoder(T5)
    engine, ema = open_engine(zero_stage=3)
    engine.barrier()
    encoder = build_text_encoder(T5)
    loaded = T5EncoderModel.from_pretrained(folder, local_files_only=True)
    train(engine, ema, range(1))
    result = {
        "ours are whole": all(
            torch.equal(one, other) and not hasattr(one, "ds_id")
            for one, other in zip(encoder.state_dict().values(), alone.state_dict().values(), strict=True)
        ),
        "ours are": sorted({str(p.dtype) for p in encoder.parameters()}),
        "those of transformers are whole": all(p.numel() > 0 and not hasattr(p, "ds_id") for p in loaded.parameters()),
    }
    found = engine.exchange(result)
    forget_engines()
    return {name: [one[name] for one in found] for name in result}


def everything(folder: Path) -> dict[str, Any]:
    return {
        "ways": ways_of_running(),
        "bfloat16": {
            f"stage {stage}{', offload' if offload else ''}": bfloat16_masters(stage, offload)
            for stage, offload in ((1, False), (2, True), (3, False), (3, True))
        },
        "encoders": encoders_beside_stage_3(folder),
    }
