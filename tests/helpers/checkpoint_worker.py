"""One of two ranks of tests/dist/test_checkpoints.py: saves under every ZeRO stage while training goes on, loads each
under every other.

Usage: checkpoint_worker.py FOLDER. Leaves `stage-S/` (checkpoints and, whole, what they must hold) and results.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data.errors import DataError
from data.manifest import list_commits
from launch.runtime import ranks
from tests.helpers.engine_worker import build, forget_accelerate, loss_of, micro_batch
from tests.helpers.runs import gathered
from training.checkpoint import CheckpointConfig, Checkpointer
from training.checkpoint_writer import Groups
from training.ema import EMA, EMAConfig
from training.engine import Engine, EngineConfig
from training.errors import TrainingError
from training.init_from import init_from
from training.optim import OptimConfig
from training.replica import Replica

OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
MICRO, GLOBAL = 2, 8


class Training:
    """An engine under one stage with an average and a second model beside it, as the autoencoder's discriminator is."""

    def __init__(self, stage: int) -> None:
        forget_accelerate()
        config = EngineConfig(
            zero_stage=stage,  # type: ignore[arg-type]
            precision="float32",
            micro_batch_size=MICRO,
            global_batch_size=GLOBAL,
        )
        self.engine = Engine(config, ranks().world_size)
        self.engine.shard(build(), OPTIM)
        self.ema = EMA(EMAConfig(decays=(0.9,), warmup=False), self.engine.weight_fragments())
        self.replica = Replica(build(), OPTIM, self.engine.device)

    def groups(self) -> Groups:
        beside = {f"discriminator-{group}": tensors for group, tensors in self.replica.fragments().items()}
        return {
            **{"model": self.engine.weight_fragments()},
            **self.ema.groups(),
            **self.engine.moment_fragments(),
            **beside,
        }

    def step(self, step: int) -> None:
        for accumulation in range(self.engine.accumulation_steps):
            x = micro_batch(step, accumulation * self.engine.world_size + self.engine.rank)
            with self.engine.accumulate():
                self.engine.backward(loss_of(self.engine.model, x))
            last = accumulation == self.engine.accumulation_steps - 1
            with self.replica.accumulate(first=accumulation == 0, last=last):
                loss_of(self.replica.model, x).backward()
        self.ema.update(step)

    def whole(self) -> dict[str, torch.Tensor]:
        """Every tensor of every group by `group/name`; collective."""
        return {
            f"{group}/{name}": tensor.detach().clone().contiguous()
            for group, fragments in self.groups().items()
            for name, tensor in gathered(fragments).items()
        }


def save_while_training(stage: int, folder: Path) -> None:
    training = Training(stage)
    keeper = Checkpointer(folder, CheckpointConfig(), training.engine)
    assert keeper.newest() is None
    for step in (0, 1):
        training.step(step)
    expected = training.whole()
    keeper.reserve(training.groups())
    keeper.save(2, training.groups(), {"adam_step": training.engine.adam_step()})
    for step in (2, 3):
        training.step(step)
        keeper.poll()
    keeper.finish()
    moved = training.whole()
    assert all(not torch.equal(moved[name], tensor) for name, tensor in expected.items())
    if training.engine.rank == 0:
        save_file(expected, folder / "expected.safetensors")
    training.engine.barrier()


def load_all(stage: int, root: Path) -> dict[str, list[str]]:
    """What differs after a checkpoint of each stage was loaded under this one, and after one more step."""
    training = Training(stage)
    differing = {}
    continued: list[dict[str, torch.Tensor]] = []
    for source in range(4):
        folder = root / f"stage-{source}"
        snapshot = Checkpointer(folder, CheckpointConfig(), training.engine).newest()
        assert snapshot is not None and snapshot.step == 2
        snapshot.restore(training.groups())
        training.engine.refresh_weights()
        training.engine.set_adam_step(snapshot.state["adam_step"])
        training.replica.set_adam_step(snapshot.state["adam_step"])
        expected, found = load_file(folder / "expected.safetensors"), training.whole()
        differing[f"{source} under {stage}"] = [
            name for name in expected if not torch.equal(found[name], expected[name])
        ]
        training.step(2)
        continued.append(training.whole())
    apart = [
        name
        for other in continued[1:]
        for name, tensor in continued[0].items()
        if not torch.allclose(tensor, other[name], rtol=1e-4, atol=1e-6)
    ]
    return {**differing, f"a step on under {stage}": apart}


def initialise(root: Path) -> dict[str, Any]:
    """From the average that rank 0 and 1 hold the halves of, under another stage, into the weights that compute."""
    training = Training(3)
    record = init_from(str(root / "stage-1"), "net", training.engine, root)
    expected = load_file(root / "stage-1" / "expected.safetensors")
    found = training.whole()
    wrong = [name for name in record["loaded"] if not torch.equal(found[f"model/{name}"], expected[f"ema-0.9/{name}"])]
    model, x = build(), micro_batch(0, 0)
    model.load_state_dict({name: expected[f"ema-0.9/{name}"] for name in record["loaded"]})
    losses = [float(loss_of(training.engine.model, x)), float(loss_of(model, x))]
    return {"loaded": len(record["loaded"]), "wrong": wrong, "loss": losses}


def failing(folder: Path) -> dict[str, Any]:
    """Rank 1's store refuses once, and then for good."""
    training = Training(2)
    training.step(0)
    keeper = Checkpointer(folder, CheckpointConfig(max_failed_saves=3), training.engine)
    keeper.newest()
    put = keeper.store.put_parts
    left = [1 if training.engine.rank == 1 else 0]

    def maybe(*arguments: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise DataError("the disk is full")
        put(*arguments)

    keeper.store.put_parts = maybe  # type: ignore[method-assign]
    keeper.save(1, training.groups(), {})
    failures = []
    while keeper.last_good is None:
        keeper.poll()
        failures.append(keeper.failed_saves)
    left[0] = 99 if training.engine.rank == 1 else 0
    keeper.save(2, training.groups(), {})
    told = ""
    try:
        keeper.finish()
    except TrainingError as error:
        told = str(error)
    return {
        "failures": training.engine.exchange(max(failures)),
        "told": training.engine.exchange(told),
        "commits": list_commits(keeper.store),
    }


if __name__ == "__main__":
    root = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for stage in range(4):
        save_while_training(stage, root / f"stage-{stage}")
    for stage in range(4):
        results |= load_all(stage, root)
    results["init_from"] = initialise(root)
    results["failing"] = failing(root / "failing")
    if ranks().rank == 0:
        (root / "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    os._exit(0)
