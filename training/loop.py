"""What both stages share around their steps: the run directory, resume, logging, checkpoints, the stop signal.

The order of a resume: (1) the recipe is compared with the run's own, (2) the newest commit is verified, (3) fp32
masters, moments and averages are copied by name into this rank's fragments, (4) the weights that compute are made from
the masters, (5) the loader starts at the count of micro-batches consumed, (6) the loop goes on at the saved step.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from data.errors import DataError
from data.index import Index
from data.ledger import Ledger
from data.loader import Batch, build_loader, check_stamp
from data.streams import Cursor, Position
from launch.runtime import PreemptionFlag
from training.bad_steps import BadSteps
from training.checkpoint import CheckpointConfig, Checkpointer, Groups, Snapshot, bring_up_to_date
from training.config import AutoencoderRecipe, DiTRecipe
from training.engine import Engine
from training.errors import Preempted, TrainingError
from training.metrics import Meter, Metrics, Parts, Reading, read_metrics
from training.throughput import Pace
from training.watchdog import Watchdog


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


def open_checkpoints(
    directory: Path, config: CheckpointConfig, engine: Engine, local_rank: int
) -> tuple[Checkpointer, Snapshot | None]:
    """The run's checkpoints and the newest good one. Collective.

    Afterwards the run directory is brought up to date once more: an earlier start may have lived on until this one took
    over, and where rank 0 has just made the run, a machine with a disk of its own gets its run.yaml.
    """
    checkpointer = Checkpointer(directory, config, engine)
    snapshot = checkpointer.newest()
    bring_up_to_date(directory, config, engine, local_rank)
    return checkpointer, snapshot


@dataclass
class Counters:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0  # optimiser steps taken
    images_seen: int = 0  # pictures consumed over all ranks
    micro_batches: int = 0  # consumed over all ranks: the data cursor
    bad_samples: int = 0  # masked over all ranks
    filtered: dict[str, int] = field(default_factory=dict)  # refused over all ranks, by the rule of data.filters
    elapsed_s: float = 0.0  # training time over all attempts
    fallbacks: int = 0  # damaged commits that resumes passed over


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
        self.metrics = Metrics(directory, engine.rank, recipe.total_steps, quiet)
        self.preemption = PreemptionFlag()
        self.bad_steps = BadSteps(directory, recipe.step_policy, engine)
        self.watchdog = Watchdog(directory, engine.rank, engine.world_size, recipe.engine.hang_timeout_s)
        engine.mark = self.watchdog.mark
        self._bad = 0  # on this rank, since the last row
        self._bad_shards: Counter[str] = Counter()  # bad samples of this attempt on this rank, by shard
        self._filtered: Counter[str] = Counter()  # on this rank, since the last row
        self._stamp: dict[str, Any] | None = None  # what the order of the data depends on
        self._positions: dict[int, tuple[Position, ...]] = {}  # of the streams, see Cursor
        self._ledger = Ledger(directory / "ledger", engine.rank, checkpointer.attempt)

    # -- resume -----------------------------------------------------------------------------------------------------
    def resume(
        self,
        snapshot: Snapshot | None,
        groups: Callable[[], Groups],
        adopt: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Restores fragments and counters from a commit, if there is one.

        Args:
            snapshot: of the commit.
            groups: gives the fragments.
            adopt: is given the commit's state, for what is not among the fragments; now and after a roll-back.
        """

        def restore(snapshot: Snapshot) -> None:
            snapshot.restore(groups())
            self.engine.refresh_weights()
            self.engine.set_adam_step(snapshot.state["adam_step"])
            if adopt is not None:
                adopt(snapshot.state)

        self._restore = restore
        self.checkpointer.reserve(groups())
        if snapshot is None:
            return
        for complaint in snapshot.complaints:
            self.metrics.say(f"warning: {complaint}; falling back to step {snapshot.step}")
        restore(snapshot)
        if state := snapshot.state.get("step_policy"):  # not of a run from before there was one
            self.bad_steps.policy.load(state)
        self.counters = Counters(**snapshot.state["counters"])
        self.counters.fallbacks += snapshot.passed_over
        self._stamp = snapshot.state["data"]["stamp"]
        self._positions = dict(Cursor.from_dict(snapshot.state["data"]["cursor"]).positions)

    def _set_artifact_aside(self) -> None:
        """A finished run that is trained further keeps its artifact under the step at which it was made."""
        artifact = self.directory / "artifact"
        if self.engine.rank == 0 and artifact.exists() and self.counters.step < self.recipe.total_steps:
            rows = read_metrics(self.metrics.path) if self.metrics.path.exists() else []
            made = max([row["step"] for row in rows], default=self.counters.step)  # the commit may be an older one
            names = (f"artifact-step-{made:08d}{again}" for again in chain([""], (f"-{n}" for n in count(2))))
            kept = next(path for path in map(artifact.with_name, names) if not path.exists())
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
        """Numbers of the steps still to take; the body may log, draw and save after its optimiser step.

        Raises:
            TrainingError: the run does not get out of bad steps.
        """
        self.pace.restart()
        with self.preemption:
            while self.counters.step < self.recipe.total_steps:
                if self.bad_steps.policy.gives_up:  # here, so that a resume from a commit amid bad steps does it too
                    self._roll_back()
                yield self.counters.step
                self.counters.step += 1

    def _roll_back(self) -> None:
        """Back to the weights of before the bad steps, without going back in the data. Collective."""
        with self.not_training_time("roll-back"):
            if self.pace.steps:  # since the last row; a cause that the checks know is named before anything is undone
                self._complain(self.counters.step, self._read_parts())
            told = self.bad_steps.roll_back(self.counters.step, self.checkpointer, self._restore)
        self.metrics.say(f"warning: {told}")

    def micro_batches(self, loader: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of one optimiser step; waiting for them is measured, bad samples are recorded.

        Behind the last one the step is judged. A bad one counts like any other; the row's means leave it out.
        """
        batches = []
        self.meter.mark()
        self.pace.steps += 1
        for _ in range(self.engine.accumulation_steps):
            self.watchdog.mark("data", self.counters.step + 1)
            before = time.perf_counter()
            batch = next(loader)
            batches.append(batch)
            self.pace.wait_s += time.perf_counter() - before
            if batch.bad:
                self._quarantine(batch)
            self._filtered.update(batch.filtered_by)
            self.watchdog.mark("forward")
            yield batch
            self._positions[batch.stream] = batch.positions
            self._ledger.add(batch)
            images = len(batch.captions) * self.engine.world_size
            self.counters.micro_batches += self.engine.world_size
            self.counters.images_seen += images
            self.pace.images += images
        if self.bad_steps.close_step(self.counters.step + 1, batches):
            self.meter.rewind()

    def due(self, every_steps: int) -> bool:
        """Is something that happens every so many steps, and at the last one, due after this step?"""
        step = self.counters.step + 1
        return step % every_steps == 0 or step == self.recipe.total_steps

    @contextmanager
    def not_training_time(self, phase: str = "pictures") -> Iterator[None]:
        """Leaves pictures and saves out of images/s. The watchdog is told the phase."""
        self.watchdog.mark(phase)
        before = time.perf_counter()
        yield
        self.pace.started_s += time.perf_counter() - before

    def log(self, **extra: float) -> None:
        """Writes a row if one is due after this step. Collective when due."""
        if not self.due(self.recipe.log_every_steps):
            return
        self.watchdog.mark("row")
        step, total_steps = self.counters.step + 1, self.recipe.total_steps
        reading = self._read_parts()
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
            **self.bad_steps.row(),
            "bad_samples": self.counters.bad_samples,
            **({"filtered": self.counters.filtered} if self.counters.filtered else {}),
            "eta_s": self.counters.elapsed_s / step * (total_steps - step),
            **self._of_saves(),
            **reading.complaint_fields(),
        }
        self.metrics.write(row)
        self.metrics.show(step, total_steps, row)
        self._bad = 0
        self._complain(step, reading)
        self._refuse_bad_data()

    def save_if_due(self, groups: Callable[[], Groups]) -> None:
        """Saves the state after this step when that is due or a signal asked for it, beside the training. Collective.

        Returns when the save is committed only at the last step and at a signal. At every logged row the ranks tell
        each other how a save under way is.

        Raises:
            TrainingError: too many saves failed in a row, or the one that must not fail.
            Preempted: a signal asked to stop, and the commit is there.
        """
        step = self.counters.step + 1
        row = self.due(self.recipe.log_every_steps)
        stop = row and self._sum_over_ranks(bool(self.preemption)) > 0
        with self.not_training_time("save"):
            if row:
                self.checkpointer.poll()
            if stop or (self.due(self.recipe.checkpoint.every_steps) and not self._amid_bad_steps()):
                self.checkpointer.save(step, groups(), self._state(step), self._write_ledger)
            if stop or step == self.recipe.total_steps:
                self.checkpointer.finish()
        if stop and step < self.recipe.total_steps:
            raise Preempted(f"preempted: {self.directory} is saved at step {step}; the same command resumes")

    def _amid_bad_steps(self) -> bool:
        """A commit now would hold the weights of before them, and push an older one out."""
        return self.bad_steps.policy.bad_in_a_row > 0 and self.counters.step + 1 < self.recipe.total_steps

    def close(self) -> None:
        self.watchdog.stop()
        self.metrics.close()
        self.engine.close()

    def _state(self, step: int) -> dict[str, Any]:
        """What a commit says beside the tensors. Collective."""
        return {
            "counters": {**vars(self.counters), "step": step, "filtered": dict(self.counters.filtered)},
            "adam_step": self.engine.adam_step(),
            "step_policy": self.bad_steps.policy.state(),
            "data": {"stamp": self._stamp, "cursor": self._cursor().to_dict()},
            **self.describe(),
        }

    def _write_ledger(self) -> None:
        """Before every try of a save, so that what its commit counts is on record."""
        self._ledger.write(self.counters.micro_batches)

    def _of_saves(self) -> dict[str, float]:
        """What a row says of the saves since the last one."""
        stall_s, self.checkpointer.stall_s = self.checkpointer.stall_s, 0.0
        failed, fallbacks = self.checkpointer.failed_saves, self.counters.fallbacks
        return {"save_stall_s": stall_s, "failed_saves": failed, **({"fallbacks": fallbacks} if fallbacks else {})}

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

    def _read_parts(self) -> Reading:
        """What the parts of the row say. Collective."""
        reading = self.parts.read()
        self.counters.elapsed_s += self.pace.seconds
        return reading

    def _complain(self, step: int, reading: Reading) -> None:
        """Says what the run-time checks found, and stops a run that is worth nothing; the same on every rank."""
        for line in self.parts.to_say(reading):
            self.metrics.say(f"warning: step {step}: {line}")
        for complaint in reading.complaints:
            if complaint.fatal:
                raise TrainingError(f"{complaint.message} (step {step} of {self.directory})")

    def _refuse_bad_data(self) -> None:
        """Stops a run with too many bad samples."""
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
