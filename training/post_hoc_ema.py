"""Averages that were not kept, found afterwards from those that were (Section C and Algorithm 3 of arXiv:2312.02696).

Every commit of a run with `ema.sigma_rels` holds averages whose profiles over the steps τ in [0, t] are known:
(γ + 1) τ^γ / t^(γ+1). The wanted profile is fitted by least squares with these, and the same weights applied to the
stored averages give its average. In contrast to the paper the weights are held to a sum of one, so that what all steps
have in common is kept exactly however rough the fit.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.commit import Commit
from data.manifest import list_commits, read_manifest, verify
from data.object_store import open_store
from models.artifact import write_safetensors
from training.ema import check_sigma_rel, gamma_of
from training.errors import TrainingError

PREFIX = "ema-power-"
BATCH_ELEMENTS = 1 << 26  # of tensors that are read and summed at once


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The power-function average with exponent `gamma` after `step` optimiser steps."""

    gamma: float
    step: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Weights of the stored averages, of sum one, and what is left of the wanted profile."""

    weights: NDArray[np.float64]  # (number of stored averages,)
    residual: float  # L2 norm of what the fit misses over that of the wanted profile


@dataclass(frozen=True, kw_only=True)
class _Stored:
    profile: Profile
    group: str
    commit: Commit


def dot(a: Profile, b: Profile) -> float:
    """∫ of the product of two profiles: (γa + 1)(γb + 1) / (γa + γb + 1) · (ta / tb)^γb / tb with ta ≤ tb."""
    a, b = sorted((a, b), key=lambda profile: profile.step)
    share = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return share * (a.step / b.step) ** b.gamma / b.step


def fit(wanted: Profile, stored: list[Profile]) -> Fit:
    """Least squares over weights of sum one; nearly equal profiles share what cannot be told apart."""
    count, unit = len(stored), wanted.step  # times the step: every entry is of the order of one
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = [[unit * dot(a, b) for b in stored] for a in stored]
    system[count, :count] = system[:count, count] = 1.0  # the sum, by a Lagrange multiplier
    right = np.array([*(unit * dot(wanted, profile) for profile in stored), 1.0])
    weights = np.linalg.lstsq(system, right, rcond=1e-12)[0][:count]
    norm = unit * dot(wanted, wanted)
    missed = norm - 2 * weights @ right[:count] + weights @ system[:count, :count] @ weights
    return Fit(weights=weights, residual=float(np.sqrt(max(0.0, missed) / norm)))


def write_post_hoc_ema(url: str, sigma_rel: float, out: Path, step: int | None = None) -> dict[str, Any]:
    """Fits the average of width `sigma_rel` at a committed step and writes it as one safetensors file, float32.

    Args:
        url: checkpoints folder, local or s3://.
        sigma_rel: the wanted relative width.
        out: the file to make.
        step: the committed step at which the average ends; None = the newest. Earlier commits are used too.

    Returns:
        step, sigma_rel, residual of the fit, and what was used with which weight; also in the file's metadata.

    Raises:
        TrainingError: an impossible width or step, too few stored averages, a damaged file, `out` exists.
    """
    try:
        check_sigma_rel("--sigma-rel", sigma_rel)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    if out.exists():
        raise TrainingError(f"{out} is there already and nothing is overwritten; give another --out")
    store = open_store(url)
    steps = list_commits(store)
    end = steps[-1] if step is None and steps else step
    if end is None or end not in steps:
        raise TrainingError(f"{url} has no commit of step {end}; there are: {', '.join(map(str, steps)) or 'none'}")
    stored = _stored([Commit(store, read_manifest(store, number)) for number in steps if number <= end])
    wanted = Profile(gamma=gamma_of(sigma_rel), step=end)
    if not stored or (len(stored) == 1 and stored[0].profile != wanted):
        raise TrainingError(
            f"{url} holds {len(stored)} power-function averages up to step {end}, at least two are needed; train with "
            "two ema.sigma_rels, or keep more commits (checkpoint.keep_last)"
        )
    found = fit(wanted, [average.profile for average in stored])
    used = [
        {"step": average.profile.step, "group": average.group, "weight": float(weight)}
        for average, weight in zip(stored, found.weights, strict=True)
    ]
    facts = {"step": end, "sigma_rel": sigma_rel, "residual": found.residual, "used": used}
    tensors = _combine(stored, found.weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    write_safetensors(tensors, partial, metadata={key: json.dumps(value) for key, value in facts.items()})
    partial.rename(out)
    return facts


def _stored(commits: list[Commit]) -> list[_Stored]:
    """The power-function averages of all commits; the step of a commit is that of its averages."""
    return [
        _Stored(profile=Profile(gamma=gamma_of(float(group.removeprefix(PREFIX))), step=commit.manifest.step),
                group=group, commit=commit)
        for commit in commits
        for group in sorted(commit.groups)
        if group.startswith(PREFIX)
    ]  # fmt: skip


def _combine(stored: list[_Stored], weights: NDArray[np.float64]) -> dict[str, Tensor]:
    """Weighted sums by parameter name, in float64 a batch of tensors at a time: large weights of both signs may cancel.

    Everything is verified first.
    """
    for average in stored:
        commit = average.commit
        files = commit.files(average.group)
        problems = verify(commit.store, commit.manifest.step, commit.manifest, files)
        if problems:
            raise TrainingError(f"{problems[0]}; restore it or delete the commit")
    shapes = stored[-1].commit.shapes(stored[-1].group)
    if any(average.commit.shapes(average.group) != shapes for average in stored):
        raise TrainingError(
            f"{stored[-1].commit.store.url}: not every commit has the same tensors; the folder holds more than one run"
        )
    tensors: dict[str, Tensor] = {}
    for names in _batches(shapes):
        totals = {name: np.zeros(math.prod(shapes[name])) for name in names}
        for weight, average in zip(weights.tolist(), stored, strict=True):
            parts = {name: np.empty(len(total), np.float32) for name, total in totals.items()}
            average.commit.fill(average.group, {name: (0, part) for name, part in parts.items()})
            for name, part in parts.items():
                totals[name] += weight * part.astype(np.float64)
        tensors |= {name: torch.from_numpy(totals[name].astype(np.float32).reshape(shapes[name])) for name in names}
    return tensors


def _batches(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of tensors that are read at once: few requests, yet not the whole model in float64."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + math.prod(shape) > BATCH_ELEMENTS:
            yield names
            names, size = [], 0
        names.append(name)
        size += math.prod(shape)
    yield names
