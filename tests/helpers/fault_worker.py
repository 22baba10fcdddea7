"""One rank of tests/dist/test_faults.py: bad steps at every ZeRO stage, then a rank that hangs.

Usage: fault_worker.py FOLDER. Writes results.json to FOLDER (rank 0), then ends by the watchdog.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.runtime import ranks
from tests.helpers.engine_worker import build, forget_accelerate, loss_of, micro_batch
from tests.helpers.runs import gathered
from training.bad_steps import BadSteps
from training.checkpoint import CheckpointConfig, Checkpointer, Snapshot
from training.ema import EMA, EMAConfig
from training.engine import Engine, EngineConfig
from training.errors import TrainingError
from training.optim import OptimConfig, build_adamw
from training.replica import Replica
from training.step_policy import StepPolicyConfig
from training.update_gate import guarded
from training.watchdog import Watchdog

MICRO, GLOBAL, CLIP = 2, 8, 0.05
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
EMAS = EMAConfig(decays=(0.5,), warmup=False)
POLICY = StepPolicyConfig(
    spike_factor=5.0, spike_quantile=0.5, window=8, min_norms=2, max_bad_steps=3, max_roll_backs=2
)
COMMIT = 5  # steps done at the only commit
LOOK = 11  # steps done when weights are compared
# By step from 0: (rank, what is wrong with its first micro-batch).
FAULTS = {
    2: (1, "inf loss"),  # with finite gradients
    4: (0, "spike"),
    **dict.fromkeys((6, 7, 8), (1, "nan gradient")),  # roll-back to step 5 before step 9
    **dict.fromkeys((11, 12, 13), (0, "inf loss")),  # again
    **dict.fromkeys((14, 15, 16), (1, "spike")),  # the end
}
APPLIED = (0, 1, 3, 9, 10)  # what is left of the first LOOK steps


class OneBatch:
    """What BadSteps reads of a micro-batch."""

    def __init__(self, step: int, number: int) -> None:
        first = MICRO * (step * GLOBAL // MICRO + number)
        self.sample_numbers = torch.arange(first, first + MICRO)
        self.keys = [f"key-{n}" for n in self.sample_numbers.tolist()]


def faulty(loss: torch.Tensor, fault: str) -> torch.Tensor:
    if fault == "inf loss":
        return loss + torch.inf
    return loss * (torch.nan if fault == "nan gradient" else 1e4)


class Trainer:
    """An engine, its averages and its bad steps; the loop of training.loop without files and data."""

    def __init__(self, folder: Path, stage: int, precision: str, offload: bool) -> None:
        config = EngineConfig(zero_stage=stage, precision=precision, micro_batch_size=MICRO, global_batch_size=GLOBAL,
                              max_grad_norm=CLIP, offload_optimizer=offload)  # fmt: skip
        self.engine = Engine(config, ranks().world_size)
        self.engine.shard(build(), OPTIM)
        self.ema = EMA(EMAS, self.engine.weight_fragments())
        folder.mkdir(parents=True, exist_ok=True)
        self.bad_steps = BadSteps(folder, POLICY, self.engine)
        self.keeper = Checkpointer(folder, CheckpointConfig(), self.engine)
        self.verdicts: list[bool] = []
        self.log: list[str] = []

    def groups(self) -> dict[str, Any]:
        return {"model": self.engine.weight_fragments(), **self.ema.groups(), **self.engine.moment_fragments()}

    def restore(self, snapshot: Snapshot) -> None:
        snapshot.restore(self.groups())
        self.engine.refresh_weights()
        self.engine.set_adam_step(snapshot.state["adam_step"])

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: t.clone() for name, t in gathered(self.engine.weight_fragments()).items()}

    def step(self, step: int) -> None:
        if self.bad_steps.policy.gives_up:
            self.log.append(self.bad_steps.roll_back(step, self.keeper, self.restore))
        self.engine.set_learning_rate(OPTIM.learning_rate * (1 - 0.01 * step))
        batches = []
        for accumulation in range(self.engine.accumulation_steps):
            number = accumulation * self.engine.world_size + self.engine.rank
            rank, fault = FAULTS.get(step, (-1, ""))
            with self.engine.accumulate():
                with self.engine.autocast():
                    loss = loss_of(self.engine.model, micro_batch(step, number).to(self.engine.precision)).float()
                if rank == self.engine.rank and accumulation == 0:
                    loss = faulty(loss, fault)
                self.engine.backward(loss)
            batches.append(OneBatch(step, number))
        self.verdicts.append(self.bad_steps.close_step(step + 1, batches))
        self.ema.update(step)
        if step + 1 == COMMIT:
            state = {"adam_step": self.engine.adam_step(), "step_policy": self.bad_steps.policy.state()}
            self.keeper.save(COMMIT, self.groups(), state)


def reference() -> tuple[dict, dict]:
    """Weights and average after LOOK steps of plain torch that knows of no bad step and takes only those APPLIED."""
    model = build()
    optimizer = build_adamw(model, OPTIM)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in (*range(COMMIT), *range(9, LOOK)):  # steps 5 to 8 are undone, averages included
        if step in APPLIED:
            optimizer.param_groups[0]["lr"] = OPTIM.learning_rate * (1 - 0.01 * step)
            for group in optimizer.param_groups[1:]:
                group["lr"] = optimizer.param_groups[0]["lr"]
            optimizer.zero_grad()
            loss_of(model, torch.cat([micro_batch(step, i) for i in range(GLOBAL // MICRO)])).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 0.5)
    return {n: p.detach() for n, p in model.named_parameters()}, average


def distance(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)


def run_stage(stage: int, precision: str, folder: Path, offload: bool = False) -> dict[str, Any]:
    """A whole run with all faults; then the same from its commit on."""
    first = Trainer(folder, stage, precision, offload)
    moved = []
    for step in range(LOOK):
        before = first.weights()
        first.step(step)
        if step not in (5, 9):  # around the roll-back
            moved.append((step, distance(before, first.weights()) > 0))
    weights, average = reference()
    mine = first.weights()
    result: dict[str, Any] = {
        "weights": distance(mine, weights),
        "ema": distance(gathered(first.ema.fragments()), average),
        "adam_step": first.engine.adam_step(),
        "unmoved": [step for step, has in moved if not has],
        "bad": [step for step, bad in enumerate(first.verdicts) if bad],
        "same_on_all_ranks": all(v == first.verdicts for v in first.engine.exchange(first.verdicts)),
        "row": first.bad_steps.row(),
        "grad_norm": first.engine.grad_norm(),
    }
    policy = first.bad_steps.policy.state()
    try:
        for step in range(LOOK, 18):
            first.step(step)
    except TrainingError as error:
        result["last_words"] = first.engine.exchange(str(error))
        result["at"] = step
    result["log"], result["passed_over"] = first.log, first.bad_steps.policy.passed_over
    result["lines"] = first.engine.exchange(
        [json.loads(line) for line in (folder / f"bad_steps-{first.engine.rank}.jsonl").open()]
    )
    forget_accelerate()

    again = Trainer(folder, stage, precision, offload)
    snapshot = again.keeper.newest()
    assert snapshot is not None and snapshot.step == COMMIT
    again.restore(snapshot)
    again.bad_steps.policy.load(snapshot.state["step_policy"])
    for step in range(COMMIT, LOOK):
        again.step(step)
    result["resumed_weights"] = distance(again.weights(), mine)
    result["resumed_policy"] = again.bad_steps.policy.state() == policy
    forget_accelerate()
    return result


def run_replica() -> dict[str, Any]:
    """A discriminator beside a generator: its own fault, then one of the generator's, then none."""
    trainer_policy = StepPolicyConfig(max_bad_steps=3)
    engine = Engine(EngineConfig(zero_stage=2, precision="float32", micro_batch_size=MICRO, global_batch_size=GLOBAL),
                    ranks().world_size)  # fmt: skip
    engine.shard(build(), OPTIM)
    policy = BadSteps(Path(sys.argv[1]), trainer_policy, engine).policy
    replica = Replica(build(), OPTIM, engine.device)
    replica.judge = policy.judge_discriminator
    reasons, moved, steps = [], [], []
    for generator, discriminator in (("", "inf loss"), ("nan gradient", ""), ("", "")):
        before = [p.detach().clone() for p in replica.module.parameters()]
        for micro in range(engine.accumulation_steps):
            mine = engine.rank == 1 and micro == 0
            x = micro_batch(0, micro * engine.world_size + engine.rank)
            with engine.accumulate():
                loss = loss_of(engine.model, x)
                engine.backward(faulty(loss, generator) if mine and generator else loss)
            with replica.accumulate(first=micro == 0, last=micro == engine.accumulation_steps - 1):
                loss = loss_of(replica.model, x)
                loss = faulty(loss, discriminator) if mine and discriminator else loss
                (guarded(loss) / engine.accumulation_steps).backward()
        bad = policy.close_step()
        reasons.append(bad.reason if bad else None)
        after = list(replica.module.parameters())
        moved.append(any(not a.equal(b) for a, b in zip(after, before, strict=True)))
        steps.append((engine.adam_step(), replica.counters()["discriminator_adam_step"]))
    result = {"reasons": reasons, "moved": moved, "steps": steps}
    result["same_on_all_ranks"] = all(other == result for other in engine.exchange(result))
    forget_accelerate()
    return result


def hang(folder: Path) -> None:
    """Rank 1 waits for data that never comes, rank 0 for rank 1."""
    engine = Engine(EngineConfig(zero_stage=0, micro_batch_size=MICRO, global_batch_size=GLOBAL), ranks().world_size)
    watchdog = Watchdog(folder, engine.rank, engine.world_size, timeout_s=2.0)
    engine.barrier()  # their clocks start together
    with watchdog:
        for step in (1, 2, 3):
            watchdog.mark("data", step)
            if step == 3 and engine.rank == 1:
                wait_for_data_that_never_comes()
            watchdog.mark("backward")
            engine.barrier()


def wait_for_data_that_never_comes() -> None:
    threading.Event().wait()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    cases = [(stage, "float32") for stage in range(4)] + [(stage, "bfloat16") for stage in (1, 2, 3)]
    found: dict[str, Any] = {
        f"{stage} {precision}": run_stage(stage, precision, root / f"{stage}-{precision}") for stage, precision in cases
    }
    for stage, precision in ((2, "bfloat16"), (3, "float32")):
        case = f"{stage} {precision} offload"
        found[case] = run_stage(stage, precision, root / case.replace(" ", "-"), offload=True)
    found["replica"] = run_replica()
    if ranks().rank == 0:
        (root / "results.json").write_text(json.dumps(found))
    hang(root)
