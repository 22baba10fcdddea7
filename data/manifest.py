"""The commit of a checkpoint: a manifest, written last, without which the step does not exist.

The store is rooted at the checkpoints folder. A step's files lie under `step-%08d/`, in a sub-folder that names the
attempt that wrote them, so that a leftover process of an earlier attempt cannot overwrite them. Its manifest.json
lists each file with its size and SHA-256 and is put only if absent: the first writer wins, and it is the commit.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from data.errors import DataError
from data.local_store import COPY_BYTES, checked_key
from data.object_store import Store, join

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_COMMIT = re.compile(r"step-(\d{8})/manifest\.json")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file must be."""

    size_bytes: int
    sha256: str  # hexadecimal


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a commit."""

    step: int  # optimiser steps done
    attempt: str  # who wrote it: job, restart, uuid
    files: dict[str, FileEntry]  # by key relative to the step's folder
    meta: dict[str, Any] = field(default_factory=dict)  # counters, data cursor, versions: anything JSON


def step_folder(step: int) -> str:
    """Returns the folder of a step: `step-00001000`."""
    return f"step-{step:08d}"


def write_manifest(store: Store, folder: str, manifest: Manifest) -> bool:
    """Commits: puts `folder`/manifest.json unless somebody else did. All files must have been put before.

    Returns:
        True if the store now holds this very manifest, False if another attempt has committed the step.
    """
    if folder != step_folder(manifest.step):
        raise ValueError(f"folder {folder!r} is not that of step {manifest.step}: {step_folder(manifest.step)!r}")
    for key in manifest.files:
        checked_key(key)
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(manifest)}, indent=1, sort_keys=True)
    return store.put_if_absent(text.encode(), f"{folder}/{MANIFEST}")


def list_commits(store: Store) -> list[int]:
    """Returns the steps that have a manifest, ascending."""
    matches = (_COMMIT.fullmatch(key) for key, _ in store.list("step-"))
    return sorted(int(match[1]) for match in matches if match)


def read_manifest(store: Store, step: int) -> Manifest:
    """Reads the manifest of a step.

    Raises:
        DataError: there is none, it is damaged, or a newer format.
    """
    key = f"{step_folder(step)}/{MANIFEST}"
    with store.open_range(key) as file:
        data = file.read()
    try:
        fields = json.loads(data)
        version = fields.pop("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{join(store.url, key)}: format {version}, this version reads {FORMAT_VERSION}; update darkroom"
            )
        files = {checked_key(name): FileEntry(**entry) for name, entry in fields.pop("files").items()}
        manifest = Manifest(files=files, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, DataError) and str(error).startswith(store.url):
            raise
        raise DataError(f"{join(store.url, key)}: damaged manifest; restore it or use another checkpoint") from error
    if manifest.step != step:
        raise DataError(f"{join(store.url, key)}: speaks of step {manifest.step}; restore it or use another checkpoint")
    return manifest


def verify(store: Store, step: int, manifest: Manifest) -> list[str]:
    """Compares every file of the step with its manifest, to the last byte.

    Returns:
        One line per missing or damaged file; empty if all is well.
    """
    folder = step_folder(step)
    sizes = dict(store.list(f"{folder}/"))
    problems = []
    for name, entry in sorted(manifest.files.items()):
        key = f"{folder}/{name}"
        address = join(store.url, key)
        if key not in sizes:
            problems.append(f"{address}: missing")
        elif sizes[key] != entry.size_bytes:
            problems.append(f"{address}: has {sizes[key]} bytes, the manifest says {entry.size_bytes}")
        elif (found := file_sha256(store, key)) != entry.sha256:
            problems.append(f"{address}: SHA-256 is {found[:12]}…, the manifest says {entry.sha256[:12]}…")
    return problems


def newest_verified(store: Store, not_after: int | None = None) -> tuple[int, Manifest, list[str]] | None:
    """Finds the newest commit whose files all verify, up to a step if one is given.

    Returns:
        (step, manifest, complaints about newer commits that had to be passed over), or None if the store is empty.

    Raises:
        DataError: the store holds files but no valid commit; starting anew over them must be the user's decision.
    """
    complaints: list[str] = []
    for step in reversed(list_commits(store)):
        if not_after is not None and step > not_after:
            continue
        try:
            manifest = read_manifest(store, step)
        except DataError as error:
            complaints.append(str(error))
            continue
        problems = verify(store, step, manifest)
        if not problems:
            return step, manifest, complaints
        complaints += problems
    found = len(store.list())
    if not found or not_after is not None:
        return None
    first = f" ({complaints[0]})" if complaints else ""
    raise DataError(
        f"{store.url}: {found} files but no valid checkpoint{first}; restore one, or move the folder away to start anew"
    )


def file_sha256(store: Store, key: str) -> str:
    """Returns the SHA-256 of a stored file in hexadecimal, reading it once."""
    digest = hashlib.sha256()
    with store.open_range(key) as file:
        while chunk := file.read(COPY_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
