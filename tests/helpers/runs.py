"""What tests read of a run that has ended."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.commit import Commit
from data.manifest import read_manifest
from data.object_store import open_store
from training.fragments import Fragment, gather
from training.metrics import read_metrics

TIMES = re.compile(r"_s$|_share$|^mfu$|^peak_memory_gib$")  # keys of a row that measure the machine
# Those that count from the start of an attempt (docs/run_directory.md).
OF_THE_ATTEMPT = {"noise_compared", "latent_channel_mean", "latent_channel_std", "t_p_value", "drop_rates", "captions"}


def curve(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl but for what the machine or the kills have a part in."""
    rows = read_metrics(run / "metrics.jsonl")
    return [
        {key: value for key, value in row.items() if not TIMES.search(key) and key not in OF_THE_ATTEMPT}
        for row in rows
    ]


def tensors(run: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """Every tensor of a commit, whole, by group and name: weights, averages and moments."""
    store = open_store(run / "checkpoints")
    commit = Commit(store, read_manifest(store, step))
    return {
        group: {name: torch.from_numpy(array) for name, array in commit.group(group).items()} for group in commit.groups
    }


def distance(mine: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """By group, the largest difference of two commits' elements, each tensor's in parts of its largest element.

    Fails if they do not hold the same tensors.
    """
    assert {group: set(found) for group, found in mine.items()} == {group: set(f) for group, f in theirs.items()}
    return {
        group: max(
            float((mine[group][name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-12))
            for name, tensor in found.items()
        )
        for group, found in theirs.items()
    }


def gathered(fragments: dict[str, Fragment]) -> dict[str, Tensor]:
    """Whole tensors on every rank (collective)."""
    return {name: gather(fragment) for name, fragment in fragments.items()}
