"""Starting a run from another's weights: by name and shape, and with a list of what was taken and what was not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.commit import Commit
from data.errors import DataError
from data.manifest import MANIFEST, list_commits
from data.object_store import fetch_tree, is_local, join, open_store
from launch.checks import commit_places
from models.artifact import CONFIG_NAME, load_artifact
from training.engine import Engine
from training.errors import TrainingError
from training.fragments import Fragment, scatter
from training.snapshot import newest_snapshot, on_rank0

RECORD = "init_from.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The weights that were found at an address."""

    place: str  # what was opened
    weights: str  # "artifact", or the averaged weights of a checkpoint: "ema-0.999 at step 1000"
    shapes: dict[str, tuple[int, ...]]
    commit: Commit | None  # of a checkpoint, with its group
    group: str
    tensors: dict[str, Tensor]  # of an artifact

    def copy_into(self, fragments: dict[str, Fragment]) -> None:
        """Writes this rank's part of tensors that all are there with these shapes."""
        if self.commit is None:
            for name, fragment in fragments.items():
                scatter(self.tensors[name].float(), fragment)
            return
        parts = {name: torch.empty(fragment.data.numel()) for name, fragment in fragments.items()}
        self.commit.fill(self.group, {name: (fragments[name].start, part.numpy()) for name, part in parts.items()})
        for name, fragment in fragments.items():
            fragment.data.copy_(parts[name].reshape(fragment.data.shape))


def init_from(url: str, kind: str, engine: Engine, directory: Path) -> dict[str, Any]:
    """Copies the averaged weights at `url` into the engine's, before the first step. Collective.

    Args:
        url: a run directory, a checkpoints folder, a step of it, or an artifact; local or s3://.
        kind: of the artifact: "autoencoder" or "text_to_image".
        engine: with its model; what computes is brought in line.
        directory: of the new run; takes `init_from.json`.

    Returns:
        The list: source, weights, loaded, missing (names), shape_differs (name to [theirs, ours]), unexpected (names).

    Raises:
        TrainingError: there are no weights, or none of them fits.
        ModelError: an artifact is damaged.
    """
    source = _open(url, kind, engine)
    ours = engine.weight_fragments()
    fitting = {name: fragment for name, fragment in ours.items() if source.shapes.get(name) == fragment.shape}
    record = {
        "source": source.place,
        "weights": source.weights,
        "loaded": sorted(fitting),
        "missing": sorted(ours.keys() - source.shapes.keys()),
        "shape_differs": {
            name: [list(source.shapes[name]), list(ours[name].shape)]
            for name in sorted(ours.keys() & source.shapes.keys() - fitting.keys())
        },
        "unexpected": sorted(source.shapes.keys() - ours.keys()),
    }
    if not fitting:
        raise TrainingError(
            f"init_from {url}: none of its {len(source.shapes)} tensors has the name and shape of one of the model's "
            f"{len(ours)}; name a run of the same kind of model"
        )
    source.copy_into(fitting)
    engine.refresh_weights()
    if engine.rank == 0:
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        counts = {what: len(record[what]) for what in ("loaded", "missing", "shape_differs", "unexpected")}
        numbers = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
        print(f"init_from {source.place} ({source.weights}): {numbers}; see {directory / RECORD}", flush=True)
    return record


def _open(url: str, kind: str, engine: Engine) -> Source:
    places = on_rank0(engine, lambda: _find(url))
    if places is None:
        raise TrainingError(f"init_from {url}: no artifact and no checkpoint is there; check the path")
    what, place, step = places
    if what == "artifact":
        artifact = load_artifact(fetch_tree(place), kind)
        shapes = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
        return Source(place=place, weights="artifact", shapes=shapes, commit=None, group="", tensors=artifact.tensors)
    snapshot, complaints = newest_snapshot(open_store(place), engine, step)
    if snapshot is None or (step is not None and snapshot.step != step):
        raise TrainingError(f"init_from {url}: {complaints[0] if complaints else 'no good checkpoint is there'}")
    commit = snapshot.commit
    groups = [group for group in commit.groups if group.startswith("ema-")]
    group = snapshot.state.get("pipeline", {}).get("weights") or (groups[0] if groups else "model")
    weights = f"{group} at step {snapshot.step}"
    return Source(
        place=commit.place, weights=weights, shapes=commit.shapes(group), commit=commit, group=group, tensors={}
    )


def _find(url: str) -> tuple[str, str, int | None] | None:
    """What is at an address: ("artifact" or "commits", its place, the step if one is named), or None."""
    store = open_store(url)
    for folder in (join(url, "artifact"), url):
        if open_store(folder).exists(CONFIG_NAME):
            return "artifact", folder, None
    if store.exists(MANIFEST):
        parent, _, name = str(Path(url).resolve() if is_local(url) else url).rstrip("/").rpartition("/")
        if not name.startswith("step-") or not name.removeprefix("step-").isdigit():
            raise DataError(f"{url} holds a manifest but is not named step-00001000; name it as training wrote it")
        return "commits", parent, int(name.removeprefix("step-"))
    for folder in commit_places(url):
        if list_commits(open_store(folder)):
            return "commits", folder, None
    return None
