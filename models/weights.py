"""Weights that come from outside: safetensors only, pinned by their hash; and weights that come from a seed."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.artifact import sha256_of
from models.errors import ModelError


def seeded_tensors(
    shapes: Mapping[str, Tensor], seed: int, std_of: Callable[[str, Tensor], float]
) -> dict[str, Tensor]:
    """N(0, std²) for what std_of scales, ones for norm weights, zeros for biases; a function of the seed and names."""
    generator = torch.Generator("cpu").manual_seed(seed)
    tensors = {}
    for name in sorted(shapes):
        shape = shapes[name].shape
        if len(shape) == 1:
            tensors[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            tensors[name] = torch.randn(shape, generator=generator) * std_of(name, shapes[name])
    return tensors


def read_weights(paths: list[Path], sha256: str | None) -> dict[str, Tensor]:
    """All tensors of several safetensors files, after their hash was checked (None = not checked).

    Raises:
        ModelError: A file is missing, damaged, no safetensors, or its hash differs.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        if not path.is_file():
            raise ModelError(f"{path} is missing: copy the weights there")
        if path.suffix != ".safetensors":
            raise ModelError(f"{path} is not a safetensors file: convert the weights to safetensors first")
    if sha256 is not None:
        check_sha256(paths, sha256, str(paths[0].parent))
    for path in paths:
        try:
            tensors.update(load_file(path))
        except (SafetensorError, ValueError) as error:
            raise ModelError(f"{path} is damaged: copy it again") from error
    return tensors


def check_sha256(paths: list[Path], sha256: str, where: str) -> None:
    """Compares with the SHA-256 of one file, or of what `sha256sum *.safetensors` prints for several.

    Raises:
        ModelError: They differ.
    """
    found = sha256_of(paths[0])
    if len(paths) > 1:
        lines = "".join(f"{sha256_of(path)}  {path.name}\n" for path in paths)
        found = hashlib.sha256(lines.encode()).hexdigest()
    if found != sha256:
        raise ModelError(f"{where}: the weights have sha256 {found}, the recipe says {sha256}: one of them is wrong")
