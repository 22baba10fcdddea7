"""Checkpoints by parameter name: any ZeRO stage and any number of ranks loads what any other wrote.

A save stops the loop for a copy of this rank's own fragments into host memory. A thread makes files of the copy and
puts them into the store; `poll`, which the loop calls now and then, lets the ranks tell each other how far they are.
When all have put their files, rank 0 puts the manifest, which *is* the commit. See docs/checkpoint.md.

Layout under `checkpoints/`: `step-00001000/<attempt>/<group>-<rank>.safetensors`, `step-00001000/manifest.json`, and
`attempts/` (training/attempts.py). A group is one kind of tensor ("model", "ema-0.9999", "exp_avg").
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.manifest import (
    MANIFEST,
    DamagedCommit,
    FileEntry,
    Manifest,
    list_commits,
    no_valid_commit,
    read_manifest,
    step_folder,
    verify,
    write_manifest,
)
from data.object_store import join, open_store
from launch.checks import checkpoints_of
from launch.errors import ConfigError
from training.attempts import (
    FOLDER,
    Attempt,
    generation_of,
    mark_committed,
    only_unfinished,
    refuse_superseded,
    register,
)
from training.checkpoint_writer import Groups, HostCopy, Job, Owned, Report, drop_files, layouts_of, put_files
from training.engine import Engine
from training.errors import TrainingError
from training.retention import Retention
from training.run_directory import refuse_lost
from training.run_mirror import RUN_YAML, RunMirror, claim, fetch_run
from training.snapshot import Snapshot, newest_snapshot, on_all_ranks, on_rank0

LOOK_S = 1.0  # between the exchanges of ranks that wait for a save
TIDYING_PATIENCE_S = 30.0  # for deletions, at the end; what stays then is deleted by a later start
NAMED = 3  # errors of one save that a message quotes

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how much to keep."""

    url: str | None = None  # folder of the commits, local or s3://; None = checkpoints/ in the run directory
    every_steps: int = 1000  # optimiser steps between checkpoints; the last step is always saved
    keep_last: int = 3  # commits kept; older ones are deleted after a newer commit
    keep_every: int = 0  # optimiser steps; commits of multiples of it are kept for good; 0 = none
    max_failed_saves: int = 5  # failed saves in a row after which training stops

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.keep_last < 2:
            raise ValueError(
                f"every_steps {self.every_steps} must be >= 1 and keep_last {self.keep_last} >= 2 "
                "(one good commit must survive while the next is written)"
            )
        if self.keep_every < 0 or self.max_failed_saves < 1:
            raise ValueError(
                f"keep_every {self.keep_every} must be >= 0 and max_failed_saves {self.max_failed_saves} >= 1"
            )


@dataclass(kw_only=True)
class _Save:
    """A save that is not committed yet."""

    step: int
    state: dict[str, Any]
    prepare: Callable[[], None]
    folder: str = ""  # below the step's; another one for every try
    phase: str = ""  # "write", "commit" (rank 0 puts the manifest), or "failed" until it is tried again
    tries: int = 0
    job: Job | None = None  # of this phase; None where a rank has nothing to do in it
    mine: dict[str, FileEntry] = field(default_factory=dict)  # put by this rank so far
    done: int = 0  # files put by all ranks, as of the last exchange
    files: dict[str, FileEntry] = field(default_factory=dict)  # of all ranks


def bring_up_to_date(directory: Path, config: CheckpointConfig, engine: Engine, local_rank: int) -> None:
    """Gives a run directory what its copy beside the checkpoints has and it has not; an empty one becomes the run's.

    The first rank of every machine does it. Collective.

    Raises:
        TrainingError: the store does not answer, or the disk refuses.
    """
    if (url := config.url) is not None:
        on_all_ranks(engine, lambda: None if local_rank else fetch_run(open_store(url), directory))


class Checkpointer:
    """Saves and finds the commits of one run. All public methods are collective.

    Args:
        directory: the run's.
        config: where to, and retention.
        engine: gives rank, world size and the exchange between ranks.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, engine: Engine) -> None:
        self.directory = directory
        self.url = config.url or str(directory / "checkpoints")
        self.config = config
        self.engine = engine
        self.store = open_store(self.url)
        job = f"{os.environ.get('SLURM_JOB_ID', 'local')}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        self.attempt = engine.from_rank0(f"{job}-{uuid.uuid4().hex[:8]}")
        self.last_good: int | None = None  # step of the newest commit of which this attempt knows
        self.failed_saves = 0  # in a row
        self.stall_s = 0.0  # for which saves have stopped the loop
        self._started: Attempt | None = None
        self._marked = False  # that there have been commits
        self._copy = HostCopy(engine.rank, engine.world_size)
        self._owned: list[Owned | None] = [None] * engine.world_size  # as reported; kept on rank 0, one's own elsewhere
        self._pending: _Save | None = None
        self._remains: list[str] = []  # folders of tries of which a rank could not put its files: no commit names them
        self._tidying: Job | None = None
        self._mirror: RunMirror | None = None  # where the checkpoints lie apart from the run directory

    # -- finding ----------------------------------------------------------------------------------------------------
    def newest(self, not_after: int | None = None) -> Snapshot | None:
        """The newest commit that verifies, or None for a run that never saved.

        At the start of an attempt damaged commits are taken out of the way of those that will be made again: their
        manifests are kept under another name.

        Args:
            not_after: for a roll-back: of the commits at or before this step, and None if there are none. Newer ones
                stay as they are. What is under way is waited for; a save that has failed is given up.

        Raises:
            TrainingError: something was saved here and nothing of it is whole, or the store does not answer.
        """
        self._settle()
        if self._pending is not None:
            self._warn(f"step {self._pending.step} stays unsaved")
            self._pending = None
        self._register()
        snapshot, complaints = newest_snapshot(self.store, self.engine, not_after)
        if snapshot is None:
            on_rank0(self.engine, lambda: self._refuse_loss(complaints, not_after))
            return None
        if not_after is None:
            on_rank0(self.engine, lambda: self._set_aside(snapshot.step))
        self._retention.add_good(snapshot.step)
        self.last_good = max(snapshot.step, self.last_good or 0)
        return snapshot

    def _register(self) -> None:
        if self._started is not None:
            return
        config, rank = self.config, self.engine.rank
        if config.url:
            on_rank0(self.engine, lambda: claim(self.store, self.directory))
        self._started = on_rank0(self.engine, lambda: register(self.store, self.attempt))
        self._retention = Retention(self.store, config.keep_last, config.keep_every, self._started)
        if config.url:
            self._mirror = RunMirror(self.store, self.directory, rank, self._started)

    def _refuse_loss(self, complaints: list[str], not_after: int | None) -> None:
        keys = [key for key, _ in self.store.list()]
        files = sum(not key.startswith(FOLDER) for key in keys)
        if complaints or (not_after is None and not only_unfinished(self.store, keys)):
            raise no_valid_commit(self.store, files, complaints)
        if not_after is None:
            self._refuse_other_place()
            refuse_lost(self.directory, self.url)
            assert self._started is not None
            if self._started.generation > 1 or (self.directory / "metrics.jsonl").exists():
                log.warning("%s: the run was started before and has no checkpoint; starting from step 0", self.url)

    def _refuse_other_place(self) -> None:
        """A run whose recipe now names an empty place has not lost its commits, but would begin anew."""
        path = self.directory / RUN_YAML
        with suppress(ConfigError):
            before = checkpoints_of(self.directory) if path.exists() else self.url
            if before != self.url and list_commits(open_store(before)):
                raise DataError(
                    f"{self.directory} has its checkpoints in {before}, and {self.url} holds none; restore "
                    "checkpoint.url, or copy them there"
                )

    def _set_aside(self, step: int) -> None:
        """Renames the manifests of commits after `step`; their files stay until a later commit takes their place."""
        for newer in list_commits(self.store):
            if newer > step:
                key = f"{step_folder(newer)}/{MANIFEST}"
                with self.store.open_range(key) as file:
                    self.store.put_bytes(file.read(), f"{step_folder(newer)}/set-aside-{self.attempt}.json")
                self.store.delete(key)

    def reserve(self, groups: Groups) -> None:
        """Makes the host buffers of later saves, which takes as long as a save the first time."""
        self._copy.take(groups)

    # -- saving -----------------------------------------------------------------------------------------------------
    def save(
        self, step: int, groups: Groups, state: dict[str, Any], prepare: Callable[[], None] = lambda: None
    ) -> None:
        """Copies the fragments and returns; the rest happens beside the training. Waits for a save still under way.

        Args:
            step: optimiser steps done.
            groups: what to save.
            state: plain JSON values that go with it.
            prepare: called at once and before every further try, in this thread; its DataError fails the try.

        Raises:
            TrainingError: max_failed_saves failed in a row, or a newer start of the run has taken over.
        """
        with self._stalling():
            self._register()
            self._settle()
            if self._pending is not None:
                self._warn(f"step {self._pending.step} stays unsaved: step {step} is saved in its place")
            self._copy.take(groups)
            self._pending = _Save(step=step, state=state, prepare=prepare)
            self._write()

    def poll(self) -> None:
        """Lets the ranks tell each other how the save under way is; one small exchange, none without a save.

        All have put their files: rank 0 commits. One failed: all know, and the next call tries again.

        Raises:
            TrainingError: as `save`.
        """
        if self._pending is None:
            return
        with self._stalling():
            if self._pending.phase == "failed":
                self._write()
            else:
                self._advance()

    def finish(self) -> None:
        """Returns when what was saved is committed.

        Raises:
            TrainingError: it cannot be, after max_failed_saves tries in a row.
        """
        with self._stalling():
            self._settle()
            while self._pending is not None:
                self._write()
                self._settle()
            if self._tidying is not None:
                self._tidying.wait(TIDYING_PATIENCE_S)

    def _settle(self) -> None:
        """Waits until nothing is under way: the save is committed, or has failed once more."""
        while self._pending is not None and self._pending.phase != "failed":
            if (job := self._pending.job) is not None:
                job.wait(LOOK_S)
            self._advance()

    def _write(self) -> None:
        save, rank = self._pending, self.engine.rank
        assert save is not None
        save.folder = folder = f"{self.attempt}.{save.tries}" if save.tries else self.attempt
        error: DataError | None = None
        try:
            save.prepare()
        except DataError as caught:
            error = caught
        remains, self._remains = self._remains, []
        save.mine, save.done = {}, 0

        def work() -> tuple[dict[str, FileEntry], Owned | None]:
            drop_files(self.store, remains, rank)  # a full disk has no room for them and another try
            if error is not None:
                raise error
            if self._mirror is not None:
                self._mirror.put_mine()
            owned = self._copy.owned()
            put_files(self.store, save.step, folder, rank, self._copy, save.mine)
            return save.mine, None if owned == self._owned[rank] else owned

        save.tries += 1
        save.phase = "write"
        save.job = Job(work)

    def _advance(self) -> None:
        """One exchange; the same transition on all ranks. The watchdog is told of files put: slow is no hang."""
        save = self._pending
        assert save is not None
        told = self.engine.exchange((len(save.mine), Report() if save.job is None else save.job.report))
        before, save.done = save.done, sum(done for done, _ in told)
        if save.done > before:
            self.engine.mark("save")
        if any(report is None for _, report in told):
            return
        reports = [report for _, report in told]
        errors = [f"rank {rank}: {report.error}" for rank, report in enumerate(reports) if report.error]
        if errors:
            self._failed(save, errors, any(report.fatal for report in reports))
        elif save.phase == "write":
            self._begin_commit(save, [report.result for report in reports])
        else:
            self._committed(save)

    def _begin_commit(self, save: _Save, results: list[tuple[dict[str, FileEntry], Owned | None]]) -> None:
        for rank, (files, owned) in enumerate(results):
            save.files |= files
            if owned is not None and self.engine.rank in (0, rank):
                self._owned[rank] = owned
        save.phase, save.job = "commit", None
        if self.engine.rank == 0:
            save.job = Job(lambda: self._commit(save))

    def _commit(self, save: _Save) -> None:
        """Puts the manifest, in the thread of rank 0."""
        assert self._started is not None
        refuse_superseded(self.store, self._started)
        if self._mirror is not None:
            self._mirror.put_shared()
        groups, layouts = layouts_of([owned or [] for owned in self._owned])
        meta = {"state": save.state, "groups": groups, "layouts": layouts}
        manifest = Manifest(step=save.step, attempt=save.folder, files=save.files, meta=meta)
        if not write_manifest(self.store, step_folder(save.step), manifest):
            self._judge_other(save.step, manifest)
        if not self._marked:
            mark_committed(self.store)
            self._marked = True

    def _judge_other(self, step: int, ours: Manifest) -> None:
        """Somebody has committed this step before us: an earlier start's commit counts if it is whole."""
        assert self._started is not None
        refuse_superseded(self.store, self._started)
        place = join(self.url, step_folder(step))
        try:
            other = read_manifest(self.store, step)
            problems = verify(self.store, step, other)
            if not problems and generation_of(self.store, other.attempt) <= self._started.generation:
                log.warning("%s was committed by %s of this run and is whole: it counts", place, other.attempt)
                return
        except DamagedCommit as error:
            problems = [str(error)]
        log.warning("%s: another commit stood here (%s); it is set aside", place, "; ".join(problems[:NAMED]))
        self._set_aside(step - 1)
        if not write_manifest(self.store, step_folder(step), ours):
            raise DataError(f"{place} was committed by another process; stop one of them")

    def _committed(self, save: _Save) -> None:
        self._pending = None
        self.failed_saves = 0
        self.last_good = save.step
        self._retention.add_good(save.step)
        if self.engine.rank == 0 and (self._tidying is None or self._tidying.report is not None):
            self._tidying = Job(lambda: self._retention.tidy(save.step, self._mirror))

    def _failed(self, save: _Save, errors: list[str], fatal: bool) -> None:
        more = f" and {len(errors) - NAMED} more like these" if len(errors) > NAMED else ""
        text = "; ".join(errors[:NAMED]) + more
        if fatal:
            raise TrainingError(text.partition(": ")[2])
        self.failed_saves += 1
        if save.phase == "write":
            self._remains.append(f"{step_folder(save.step)}/{save.folder}/")
        save.phase, save.job, save.files = "failed", None, {}
        place, most = join(self.url, step_folder(save.step)), self.config.max_failed_saves
        if self.failed_saves >= most:
            good = "none was committed yet" if self.last_good is None else f"the last good one is step {self.last_good}"
            raise TrainingError(
                f"checkpoint {place} was not committed ({text}): {self.failed_saves} failures in a row, {good}; "
                "mend the store, and the same command resumes"
            )
        self._warn(f"checkpoint {place} was not committed ({text}); trying again ({self.failed_saves} of {most})")

    def _warn(self, message: str) -> None:
        if self.engine.rank == 0:
            log.warning("%s", message)

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.stall_s += time.perf_counter() - before
