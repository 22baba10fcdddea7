"""Checkpoints by parameter name: any ZeRO stage and any number of ranks loads what any other wrote.

Layout under `checkpoints/`: `step-00001000/<attempt>/<group>-<rank>.safetensors` and, written last with put-if-absent,
`step-00001000/manifest.json`, which *is* the commit. A group is one kind of tensor ("model", "ema-0.9999", "exp_avg").
Keys carry the attempt, so that a zombie of an earlier start can never overwrite what a later one wrote.
"""

import logging
import os
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.errors import DataError
from data.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    list_commits,
    newest_verified,
    step_folder,
    write_manifest,
)
from data.object_store import fetch_tree, join, open_store
from models.artifact import sha256_of
from training.engine import Engine, Fragment, gather, scatter
from training.errors import TrainingError

Groups = dict[str, dict[str, Fragment]]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how much to keep."""

    url: str | None = None  # folder of the commits, local or s3://; None = checkpoints/ in the run directory
    every_steps: int = 1000  # optimiser steps between checkpoints; the last step is always saved
    keep_last: int = 3  # commits kept; older ones are deleted after a newer commit

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.keep_last < 2:
            raise ValueError(
                f"every_steps {self.every_steps} must be >= 1 and keep_last {self.keep_last} >= 2 "
                "(one good commit must survive while the next is written)"
            )


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A verified checkpoint, read lazily by tensor name."""

    step: int
    state: dict[str, Any]
    index: dict[str, dict[str, str]]
    folder: Path
    complaints: list[str] = field(default_factory=list)

    def tensor(self, group: str, name: str) -> Tensor:
        """One whole tensor, float32 on the CPU."""
        try:
            key = self.index[group][name]
        except KeyError:
            raise TrainingError(
                f"checkpoint {self.folder} has no tensor {name!r} in group {group!r}; it was written for another "
                "model: use the recipe it was trained with, or another --run"
            ) from None
        with safe_open(str(self.folder / key), framework="pt") as file:
            return file.get_tensor(name)

    def group(self, group: str) -> dict[str, Tensor]:
        return {name: self.tensor(group, name) for name in self.index.get(group, {})}

    def restore(self, groups: Groups) -> None:
        """Copies this rank's part of every tensor into the live fragments; a shape that differs is refused."""
        for group, fragments in groups.items():
            for name, fragment in fragments.items():
                full = self.tensor(group, name)
                if tuple(full.shape) != fragment.shape:
                    raise TrainingError(
                        f"checkpoint {self.folder}: {group}/{name} has shape {tuple(full.shape)}, the model wants "
                        f"{fragment.shape}; use the recipe it was trained with, or another --run"
                    )
                scatter(full, fragment)


class Checkpointer:
    """Saves and finds the commits of one run.

    Args:
        directory: the run's.
        config: where to, and retention.
        engine: gives rank, world size and the exchange between ranks.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, engine: Engine) -> None:
        self.url = config.url or str(directory / "checkpoints")
        self.config = config
        self.engine = engine
        self.store = open_store(self.url)
        self.attempt = engine.from_rank0(f"{os.environ.get('SLURM_JOB_ID', 'local')}-{uuid.uuid4().hex[:8]}")

    def save(self, step: int, groups: Groups, state: dict[str, Any]) -> None:
        """Writes, verifies on all ranks, commits, then prunes. Collective; an error on one rank is an error on all."""
        folder = step_folder(step)
        mine, index = self._gather(groups)
        files, error = {}, None
        try:
            files = self._write(folder, mine)
        except (OSError, DataError) as caught:
            error = f"rank {self.engine.rank}: {caught}"
        reports = self.engine.exchange((files, error))
        errors = [message for _, message in reports if message]
        if errors:
            raise TrainingError(f"checkpoint {join(self.url, folder)} was not committed: {'; '.join(errors)}")
        error = None
        if self.engine.rank == 0:
            entries = {key: entry for files, _ in reports for key, entry in files.items()}
            manifest = Manifest(step=step, attempt=self.attempt, files=entries, meta={"state": state, "index": index})
            error = self._commit(folder, manifest)
        error = self.engine.from_rank0(error)
        if error:
            raise TrainingError(error)
        self._prune()

    def _commit(self, folder: str, manifest: Manifest) -> str | None:
        """Writes the manifest; returns why there is no commit of this attempt, or None."""
        try:
            committed = write_manifest(self.store, folder, manifest)
        except DataError as caught:
            return f"checkpoint {join(self.url, folder)} was not committed: {caught}"
        if committed:
            return None
        return (
            f"{join(self.url, folder)} was committed by another attempt of this run; two processes train the same run: "
            "stop one of them"
        )

    def newest(self, not_after: int | None = None) -> Snapshot | None:
        """The newest commit that verifies, or None for a run that never saved. Collective; rank 0 does the hashing.

        Args:
            not_after: with a step, None if there is no commit up to it; newer ones stay as they are.

        Raises:
            TrainingError: there are files but no valid commit.
        """
        found, error = None, None
        if self.engine.rank == 0:
            try:
                found = newest_verified(self.store, not_after)
                if not_after is None:
                    self._retire_newer(found[0] if found else None)
            except DataError as caught:
                error = str(caught)
        found, error = self.engine.from_rank0((found, error))
        if error:
            raise TrainingError(error)
        if found is None:
            return None
        step, manifest, complaints = found
        state, index = manifest.meta.get("state"), manifest.meta.get("index")
        place = join(self.url, step_folder(step))
        if not isinstance(state, dict) or not isinstance(index, dict):
            raise TrainingError(
                f"{join(place, MANIFEST)} holds no training state; restore it, or move {place} away to resume before it"
            )
        return Snapshot(step=step, state=state, index=index, folder=fetch_tree(place), complaints=complaints)

    def _retire_newer(self, step: int | None) -> None:
        """Takes damaged commits after `step` out of the way of those that will be made again; their files stay."""
        for damaged in list_commits(self.store):
            if step is not None and damaged > step:
                key = f"{step_folder(damaged)}/{MANIFEST}"
                with self.store.open_range(key) as file:
                    self.store.put_bytes(file.read(), f"{step_folder(damaged)}/damaged-{self.attempt}.json")
                self.store.delete(key)

    # -- writing ----------------------------------------------------------------------------------------------------
    def _gather(self, groups: Groups) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, str]]]:
        """Assembles every tensor; its owner (the rank with the least so far) keeps it on the host."""
        load = [0] * self.engine.world_size
        mine: dict[str, dict[str, Tensor]] = {}
        index: dict[str, dict[str, str]] = {}
        for group, fragments in groups.items():
            for name, fragment in fragments.items():
                owner = load.index(min(load))
                load[owner] += fragment.numel
                index.setdefault(group, {})[name] = f"{self.attempt}/{group}-{owner:05d}.safetensors"
                full = gather(fragment)
                if owner == self.engine.rank:
                    mine.setdefault(group, {})[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        return mine, index

    def _write(self, folder: str, mine: dict[str, dict[str, Tensor]]) -> dict[str, FileEntry]:
        files = {}
        with tempfile.TemporaryDirectory(prefix="darkroom-checkpoint-") as staging:
            for group, tensors in mine.items():
                key = f"{self.attempt}/{group}-{self.engine.rank:05d}.safetensors"
                path = Path(staging) / f"{group}.safetensors"
                save_file(tensors, str(path))
                files[key] = FileEntry(size_bytes=path.stat().st_size, sha256=sha256_of(path))
                self.store.put_file(path, f"{folder}/{key}")
                path.unlink()
        return files

    def _prune(self) -> None:
        """Deletes commits beyond `keep_last`, manifest first, so that none is ever half there.

        What cannot be deleted stays, with a warning: the new commit is good, and the next save tries again.
        """
        if self.engine.rank != 0:
            return
        try:
            for step in list_commits(self.store)[: -self.config.keep_last]:
                folder = step_folder(step)
                self.store.delete(f"{folder}/{MANIFEST}")
                for key, _ in self.store.list(f"{folder}/"):
                    self.store.delete(key)
        except DataError as error:
            log.warning("old checkpoints stay: %s", error)
