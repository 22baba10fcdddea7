"""What both stages share around their steps: the run directory, resume, logging, checkpoints, the stop signal.

The order of a resume: (1) the recipe is compared with the run's own, (2) the newest commit is verified, (3) fp32
masters, moments and averages are copied by name into this rank's fragments, (4) the weights that compute are made from
the masters, (5) the loader starts at the count of micro-batches consumed, (6) the loop goes on at the saved step.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.errors import DataError
from data.index import Index
from data.ledger import Ledger
from data.loader import Batch, build_loader, check_stamp
from data.streams import Cursor, Position
from launch.runtime import PreemptionFlag
from training.checkpoint import Checkpointer, Groups, Snapshot
from training.config import AutoencoderRecipe, DiTRecipe
from training.engine import Engine
from training.errors import Preempted, TrainingError
from training.metrics import Meter, Metrics, Parts, Reading
from training.throughput import Pace


def check_data(recipe: AutoencoderRecipe | DiTRecipe, engine: Engine) -> tuple[Index, ...]:
    """Refuses data that this recipe cannot be trained on, before there is a run directory that would hold it to that.

    Returns:
        The indexes of the data sets.

    Raises:
        DataError: no index, or its shards do not go together with streams, ranks and workers.
    """
    loader = build_loader(
        recipe.data,
        seed=recipe.seed,
        micro_batch_size=recipe.engine.micro_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
    )
    return loader.indexes


@dataclass
class Counters:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0  # optimiser steps taken
    images_seen: int = 0  # pictures consumed over all ranks
    micro_batches: int = 0  # consumed over all ranks: the data cursor
    bad_samples: int = 0  # masked over all ranks
    filtered: dict[str, int] = field(default_factory=dict)  # refused over all ranks, by the rule of data.filters
    elapsed_s: float = 0.0  # training time over all attempts


class Run:
    """One attempt at a run: counts, logs, saves, and notices the signal to stop.

    Args:
        directory: local run directory.
        recipe: of either stage; the fields that both have are read.
        engine: gives ranks and collectives.
        checkpointer: where commits go.
        describe: gives plain values that every commit carries along for its readers.
        indexes: of the data sets, as `check_data` read them.
        quiet: no progress line.
    """

    def __init__(
        self,
        directory: Path,
        recipe: AutoencoderRecipe | DiTRecipe,
        engine: Engine,
        checkpointer: Checkpointer,
        describe: Callable[[], dict[str, Any]],
        indexes: tuple[Index, ...],
        quiet: bool,
    ) -> None:
        self.directory = directory
        self.recipe = recipe
        self.engine = engine
        self.checkpointer = checkpointer
        self.describe = describe
        self.indexes = indexes
        self.counters = Counters()
        self.meter = Meter()
        self.pace = Pace(engine.device)
        self.parts = Parts(engine.all_ranks, engine.device)  # of a row; the stages add their checks
        self.parts.add(self.meter, self.pace)
        self.save_stall_s = 0.0  # since the last row: time the loop stood still for saves
        self.metrics = Metrics(directory, engine.rank, recipe.total_steps, quiet)
        self.preemption = PreemptionFlag()
        self._bad = 0  # on this rank, since the last row
        self._bad_shards: Counter[str] = Counter()  # bad samples of this attempt on this rank, by shard
        self._filtered: Counter[str] = Counter()  # on this rank, since the last row
        self._stamp: dict[str, Any] | None = None  # what the order of the data depends on
        self._positions: dict[int, tuple[Position, ...]] = {}  # of the streams, see Cursor
        self._ledger = Ledger(directory / "ledger", engine.rank, checkpointer.attempt)

    # -- resume -----------------------------------------------------------------------------------------------------
    def resume(self, snapshot: Snapshot | None, groups: Callable[[], Groups]) -> None:
        """Restores fragments and counters from a commit, if there is one."""
        if snapshot is None:
            return
        for complaint in snapshot.complaints:
            self.metrics.say(f"warning: {complaint}; falling back to step {snapshot.step}")
        snapshot.restore(groups())
        self.engine.refresh_weights()
        self.engine.set_adam_step(snapshot.state["adam_step"])
        self.counters = Counters(**snapshot.state["counters"])
        self._stamp = snapshot.state["data"]["stamp"]
        self._positions = dict(Cursor.from_dict(snapshot.state["data"]["cursor"]).positions)

    def _set_artifact_aside(self) -> None:
        """A finished run that is trained further keeps its artifact under the step at which it was made."""
        artifact = self.directory / "artifact"
        if self.engine.rank == 0 and artifact.exists() and self.counters.step < self.recipe.total_steps:
            kept = artifact.with_name(f"artifact-step-{self.counters.step:08d}")
            artifact.rename(kept)
            self.metrics.say(f"{artifact} was finished before; it is kept as {kept}")

    def open_loader(self) -> Iterator[Batch]:
        """This rank's micro-batches, from the first that was not consumed; other data than before is refused."""
        loader = build_loader(
            self.recipe.data,
            seed=self.recipe.seed,
            micro_batch_size=self.recipe.engine.micro_batch_size,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            cursor=Cursor(micro_batches=self.counters.micro_batches, positions=self._positions),
            indexes=self.indexes,
        )
        if self._stamp is not None:
            try:
                check_stamp(self._stamp, loader.stamp)
            except DataError as error:
                raise TrainingError(f"{self.directory} cannot be resumed: {error}") from None
            self.metrics.say(f"resuming {self.directory} at step {self.counters.step}")
            self._set_artifact_aside()  # only now: a refused resume leaves the run as it is
        self._stamp = loader.stamp
        self._ledger.open(loader, self.recipe.data, self.counters.micro_batches, self.engine.world_size)
        return iter(loader)

    # -- the loop ---------------------------------------------------------------------------------------------------
    def steps(self) -> Iterator[int]:
        """Numbers of the steps still to take; the body may log, draw and save after its optimiser step."""
        self.pace.restart()
        with self.preemption:
            while self.counters.step < self.recipe.total_steps:
                yield self.counters.step
                self.counters.step += 1

    def micro_batches(self, loader: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of one optimiser step; waiting for them is measured, bad samples are recorded."""
        self.pace.steps += 1
        for _ in range(self.engine.accumulation_steps):
            before = time.perf_counter()
            batch = next(loader)
            self.pace.wait_s += time.perf_counter() - before
            if batch.bad:
                self._quarantine(batch)
            self._filtered.update(batch.filtered_by)
            yield batch
            self._positions[batch.stream] = batch.positions
            self._ledger.add(batch)
            images = len(batch.captions) * self.engine.world_size
            self.counters.micro_batches += self.engine.world_size
            self.counters.images_seen += images
            self.pace.images += images

    def due(self, every_steps: int) -> bool:
        """Is something that happens every so many steps, and at the last one, due after this step?"""
        step = self.counters.step + 1
        return step % every_steps == 0 or step == self.recipe.total_steps

    @contextmanager
    def not_training_time(self) -> Iterator[None]:
        """Leaves pictures and saves out of images/s."""
        before = time.perf_counter()
        yield
        self.pace.started_s += time.perf_counter() - before

    def log(self, **extra: float) -> None:
        """Writes a row if one is due after this step. Collective when due."""
        if not self.due(self.recipe.log_every_steps):
            return
        step, total_steps = self.counters.step + 1, self.recipe.total_steps
        reading = self.parts.read()
        self.counters.elapsed_s += self.pace.seconds
        self.counters.bad_samples += round(self._sum_over_ranks(self._bad))
        if self.recipe.data.filters:
            self._count_filtered()
        row = {
            "step": step,
            "images_seen": self.counters.images_seen,
            "time_s": round(self.counters.elapsed_s, 3),
            **reading.fields,
            **extra,
            "grad_norm": self.engine.grad_norm(),
            "skipped_steps": self.engine.skipped_steps,
            "bad_samples": self.counters.bad_samples,
            **({"filtered": self.counters.filtered} if self.counters.filtered else {}),
            "save_stall_s": round(self.save_stall_s, 3),
            "eta_s": self.counters.elapsed_s / step * (total_steps - step),
            **reading.complaint_fields(),
        }
        self.metrics.write(row)
        self.metrics.show(step, total_steps, row)
        self._bad, self.save_stall_s = 0, 0.0
        self._complain(step, reading)
        self._refuse_worthless(step, row["loss"])

    def save_if_due(self, groups: Callable[[], Groups]) -> None:
        """Commits a checkpoint of the state after this step when one is due or a signal asked for it. Collective.

        Raises:
            Preempted: a signal asked to stop, and the commit is there.
        """
        step = self.counters.step + 1
        stop = self.due(self.recipe.log_every_steps) and self._sum_over_ranks(bool(self.preemption)) > 0
        if not (stop or self.due(self.recipe.checkpoint.every_steps)):
            return
        state = {
            "counters": {**vars(self.counters), "step": step},
            "adam_step": self.engine.adam_step(),
            "data": {"stamp": self._stamp, "cursor": self._cursor().to_dict()},
            **self.describe(),
        }
        with self.not_training_time():
            self._write_ledger()  # before the commit: what it counts is on record
            self.checkpointer.save(step, groups(), state)
        if stop and step < self.recipe.total_steps:
            raise Preempted(f"preempted: {self.directory} is saved at step {step}; the same command resumes")

    def close(self) -> None:
        self.metrics.close()
        self.engine.close()

    def _write_ledger(self) -> None:
        """An error on one rank is an error on all. Collective."""
        error = None
        try:
            self._ledger.write(self.counters.micro_batches)
        except DataError as caught:
            error = str(caught)
        for found in self.engine.exchange(error):
            if found:
                raise TrainingError(found)

    def _cursor(self) -> Cursor:
        """Where the data stands on all ranks: a stream is read by the rank that its number gives. Collective."""
        rank, world_size = self.engine.rank, self.engine.world_size
        mine = {stream: found for stream, found in self._positions.items() if stream % world_size == rank}
        positions = {stream: found for part in self.engine.exchange(mine) for stream, found in part.items()}
        return Cursor(micro_batches=self.counters.micro_batches, positions=positions)

    # -- what goes wrong --------------------------------------------------------------------------------------------
    def _quarantine(self, batch: Batch) -> None:
        with (self.directory / f"bad_samples-{self.engine.rank}.jsonl").open("a", encoding="utf-8") as file:
            for record in batch.bad:
                file.write(json.dumps({"step": self.counters.step, **record}) + "\n")
        self._bad += len(batch.bad)
        self._bad_shards.update(record["shard"] for record in batch.bad)

    def _count_filtered(self) -> None:
        """Adds what all ranks' filters refused since the last row. Collective."""
        found = sum(
            (Counter(part) for part in self.engine.exchange(dict(self._filtered))), Counter(self.counters.filtered)
        )
        self.counters.filtered = dict(sorted(found.items()))
        self._filtered.clear()

    def _complain(self, step: int, reading: Reading) -> None:
        """Says what the run-time checks found, and stops a run that is worth nothing; the same on every rank."""
        for line in self.parts.to_say(reading):
            self.metrics.say(f"warning: step {step}: {line}")
        for complaint in reading.complaints:
            if complaint.fatal:
                raise TrainingError(f"{complaint.message} (step {step} of {self.directory})")

    def _refuse_worthless(self, step: int, loss: float) -> None:
        """Stops a run that learns nothing any more: a loss that is not finite, or too many bad samples."""
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss is {loss} at step {step} of {self.directory}; lower optim.learning_rate or "
                "engine.max_grad_norm, then start another --run"
            )
        allowed = self.recipe.data.max_bad_fraction * max(self.counters.images_seen, 1000)
        if self.counters.bad_samples > allowed:
            worst = "".join(f", most of them in {shard}" for shard, _ in self._bad_shards.most_common(1))
            raise TrainingError(
                f"{self.counters.bad_samples} of {self.counters.images_seen} samples could not be used{worst}: more "
                f"than data.max_bad_fraction {self.recipe.data.max_bad_fraction}; {self.directory}/bad_samples-*.jsonl "
                "names them and why: mend the data, or raise the fraction"
            )

    def _sum_over_ranks(self, value: float) -> float:
        total = self.engine.mean(torch.tensor(float(value), dtype=torch.float64, device=self.engine.device))
        return float(total) * self.engine.world_size
