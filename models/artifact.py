"""What training hands to evaluation and serving: a folder of config.json and safetensors with a fingerprint.

The fingerprint is the SHA-256 of the kind, the configuration, the fingerprints of everything that the artifact was
trained against, and every tensor by name. It depends neither on the order of tensors nor on where the folder lies, so
two equal artifacts have equal fingerprints and a single flipped bit is noticed on loading. See docs/artifact.md.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import ModelError

FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

ConfigT = TypeVar("ConfigT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A loaded and verified artifact.

    Attributes:
        kind: What it is, e.g. "autoencoder".
        config: Plain JSON values.
        tensors: Name to tensor, on the CPU.
        fingerprints: Label to fingerprint of what it was trained against.
        files: Name to bytes of small extra files (a tokenizer).
        fingerprint: 64 hexadecimal digits.
    """

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    fingerprints: dict[str, str]
    files: dict[str, bytes]
    fingerprint: str


def artifact_fingerprint(
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    fingerprints: Mapping[str, str] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> str:
    """The SHA-256 (hexadecimal) that identifies an artifact, whether or not it lies on disk."""
    head = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "config": config,
        "fingerprints": dict(fingerprints or {}),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in (files or {}).items()},
    }
    digest = hashlib.sha256(_canonical_json(head))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(_canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_artifact(
    folder: str | Path,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    fingerprints: Mapping[str, str] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> str:
    """Writes an artifact folder; it appears whole or not at all.

    Args:
        folder: The folder to make; its parents are made too.
        kind: What it is; loading asks for the same kind.
        config: JSON values only (no NaN).
        tensors: Name to tensor, on any device.
        fingerprints: Label to fingerprint of what it was trained against.
        files: Small extra files that belong to it, by plain name.

    Returns:
        The fingerprint.

    Raises:
        ModelError: The folder exists already.
    """
    with new_folder(folder) as temporary:
        return write_artifact(temporary, kind, config, tensors, fingerprints, files)


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file. Raises ModelError when the disk refuses, of which safetensors does not say where."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise ModelError(f"{path}: {error}; check the path, the rights and the free space") from error


def write_artifact(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    fingerprints: Mapping[str, str] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> str:
    """Writes an artifact's files into a folder that the caller has just made with `new_folder`; see `save_artifact`."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    fingerprint = artifact_fingerprint(kind, config, on_cpu, fingerprints, files)
    document = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "fingerprint": fingerprint,
        "fingerprints": dict(fingerprints or {}),
        "files": sorted(files or {}),
        "config": config,
    }
    write_safetensors(on_cpu, folder / WEIGHTS_NAME)
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    (folder / CONFIG_NAME).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    shutil.copymode(folder / CONFIG_NAME, folder / WEIGHTS_NAME)  # safetensors writes for the owner alone
    return fingerprint


def load_artifact(folder: str | Path, kind: str) -> Artifact:
    """Reads an artifact folder and checks it against its fingerprint.

    Raises:
        ModelError: The folder or a file of it is missing, damaged, of another kind, or does not match its fingerprint.
    """
    folder = Path(folder)
    document = read_document(folder, kind)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise ModelError(f"{weights} is missing: copy the whole artifact folder again")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{weights} is damaged ({_one_line(error)}): copy the artifact folder again") from error
    files = {}
    for name in document["files"]:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing: copy the whole artifact folder again")
        files[name] = (folder / name).read_bytes()
    config, fingerprints, stored = document["config"], document["fingerprints"], document["fingerprint"]
    found = artifact_fingerprint(kind, config, tensors, fingerprints, files)
    if found != stored:
        raise ModelError(
            f"{folder} does not match its fingerprint (stored {stored[:12]}…, found {found[:12]}…):"
            " it was altered or damaged, copy the artifact folder again"
        )
    return Artifact(
        kind=kind, config=config, tensors=tensors, fingerprints=fingerprints, files=files, fingerprint=found
    )


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def config_from_dict(cls: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """Builds a flat configuration dataclass from stored values (lists become tuples).

    Args:
        cls: The dataclass.
        values: Field name to value.
        where: Named in the error.

    Raises:
        ModelError: An unknown or missing field, or a value that the dataclass refuses.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ModelError(f"{where}: unknown field {unknown[0]!r}: it was written by another version of darkroom")
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: {_one_line(error)}: it was written by another version of darkroom") from error


def load_weights(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies tensors into a module by name, strictly.

    Raises:
        ModelError: A name is missing or left over, or a shape differs.
    """
    own = module.state_dict()
    for problem, names in (("missing", set(own) - set(tensors)), ("unexpected", set(tensors) - set(own))):
        if names:
            raise ModelError(
                f"{where}: tensor {min(names)!r} is {problem} ({len(names)} in all):"
                " the weights belong to another configuration"
            )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ModelError(
                f"{where}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(own[name].shape)}:"
                " the weights belong to another configuration"
            )
    module.load_state_dict(dict(tensors))


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder` and renames it to `folder` when the block ends well.

    Raises:
        ModelError: `folder` exists already.
    """
    folder = Path(folder)
    _refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            _fsync(path)
        _refuse_existing(folder)
        os.rename(temporary, folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise ModelError(f"{folder} exists already and is never overwritten: give another folder or remove it")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_artifact(folder: str | Path) -> bool:
    """Whether a folder looks like an artifact of any kind."""
    try:
        document = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"format_version", "kind"} <= set(document)


def read_document(folder: Path, kind: str) -> dict[str, Any]:
    """An artifact's config.json, before its tensors are read or checked.

    Raises:
        ModelError: It is missing, damaged, or of another kind.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ModelError(f"{path} is missing: {folder} is not an artifact folder, or was copied in part")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({_one_line(error)}): copy the artifact folder again") from error
    if not is_artifact(folder):
        raise ModelError(f"{path} was not written by darkroom: give the folder of an artifact")
    if document["format_version"] != FORMAT_VERSION:
        raise ModelError(
            f"{path} has format_version {document['format_version']!r}, this darkroom reads {FORMAT_VERSION}:"
            " use the version that wrote it"
        )
    expected = {"config": dict, "fingerprints": dict, "files": list, "fingerprint": str, "kind": str}
    for key, shape in expected.items():
        if not isinstance(document.get(key), shape):
            raise ModelError(f"{path} has no proper {key!r}: copy the artifact folder again")
    if document["kind"] != kind:
        raise ModelError(
            f"{folder} is an artifact of kind {document['kind']!r}, but {kind!r} is needed here: give another folder"
        )
    return document


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
