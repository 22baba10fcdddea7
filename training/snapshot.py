"""Finding the commit to go on from, and copying it into the live fragments. Collective: the ranks share the reading."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from data.commit import Commit
from data.errors import DataError
from data.manifest import DamagedCommit, Manifest, list_commits, read_manifest, verify
from data.object_store import Store
from training.checkpoint_writer import Groups
from training.engine import Engine
from training.errors import TrainingError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A verified checkpoint, read lazily and by ranges."""

    commit: Commit
    state: dict[str, Any]
    complaints: list[str] = field(default_factory=list)  # about newer commits that had to be passed over
    passed_over: int = 0  # how many these are

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.commit.manifest.step

    def tensor(self, group: str, name: str) -> Tensor:
        """One whole tensor, float32 on the CPU."""
        return torch.from_numpy(self.commit.tensor(group, name))

    def group(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, whole, float32 on the CPU."""
        return {name: torch.from_numpy(array) for name, array in self.commit.group(group).items()}

    def restore(self, groups: Groups) -> None:
        """Copies this rank's part of every tensor into the live fragments; a shape that differs is refused."""
        for group, fragments in groups.items():
            staged, wanted = {}, {}
            for name, fragment in fragments.items():
                shape = self.commit.layout(group, name).shape
                if shape != fragment.shape:
                    raise TrainingError(
                        f"checkpoint {self.commit.place}: {group}/{name} has shape {shape}, the model wants "
                        f"{fragment.shape}; use the recipe it was trained with, or another --run"
                    )
                staged[name] = torch.empty(fragment.data.numel(), dtype=torch.float32)
                wanted[name] = (fragment.start, staged[name].numpy())
            self.commit.fill(group, wanted)
            for name, fragment in fragments.items():
                fragment.data.copy_(staged[name].reshape(fragment.data.shape))


def newest_snapshot(store: Store, engine: Engine, not_after: int | None = None) -> tuple[Snapshot | None, list[str]]:
    """The newest commit (at or before step `not_after`) whose files all verify, and what is wrong with newer ones.

    Rank 0 reads the manifest, each rank hashes its share of the files, and all decide alike. Collective.

    Raises:
        TrainingError: the store does not answer, or the newest commit has another format.
    """
    complaints: list[str] = []
    passed_over = 0
    for step in reversed(on_rank0(engine, lambda: list_commits(store))):
        if not_after is not None and step > not_after:
            continue
        commit, problems = _examine(store, engine, step)
        if commit is not None and not problems:
            state = commit.manifest.meta.get("state")
            if not isinstance(state, dict):
                raise TrainingError(f"{commit.place} holds no training state; move it away to resume before it")
            return Snapshot(commit=commit, state=state, complaints=complaints, passed_over=passed_over), complaints
        complaints += problems
        passed_over += 1
    return None, complaints


def _examine(store: Store, engine: Engine, step: int) -> tuple[Commit | None, list[str]]:
    """A commit and what is wrong with it, the same on all ranks."""

    def read() -> tuple[Manifest | None, list[str]]:
        try:
            manifest = read_manifest(store, step)
            Commit(store, manifest)
            return manifest, []
        except DamagedCommit as error:
            return None, [str(error)]

    manifest, problems = on_rank0(engine, read)
    if manifest is None:
        return None, problems
    load = [0] * engine.world_size
    mine = []
    for key, entry in sorted(manifest.files.items(), key=lambda item: -item[1].size_bytes):
        reader = load.index(min(load))
        load[reader] += entry.size_bytes
        if reader == engine.rank:
            mine.append(key)
    found = on_all_ranks(engine, lambda: verify(store, step, manifest, mine) if mine else [])
    return Commit(store, manifest), [problem for part in found for problem in part]


def on_rank0(engine: Engine, work: Callable[[], T]) -> T:
    """Rank 0's result on every rank; its DataError is a TrainingError on every rank. Collective."""
    result, error = None, None
    if engine.rank == 0:
        try:
            result = work()
        except DataError as caught:
            error = str(caught)
    result, error = engine.from_rank0((result, error))
    if error:
        raise TrainingError(error)
    return result


def on_all_ranks(engine: Engine, work: Callable[[], T]) -> list[T]:
    """Every rank's result on every rank; a DataError on one is a TrainingError on all. Collective."""
    result, error = None, None
    try:
        result = work()
    except DataError as caught:
        error = str(caught)
    reports = engine.exchange((result, error))
    for _, found in reports:
        if found:
            raise TrainingError(found)
    return [result for result, _ in reports]
