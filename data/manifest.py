"""The commit of a checkpoint: a manifest, written last, without which the step does not exist.

The store is rooted at the checkpoints folder. A step's files lie under `step-%08d/`, in a sub-folder that names the
attempt that wrote them, so that a leftover process of an earlier attempt cannot overwrite them. Its manifest.json
lists each file with its size and SHA-256 and is put only if absent: the first writer wins, and it is the commit.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from data.errors import DataError
from data.local_store import COPY_BYTES, checked_key
from data.object_store import Store, join

FORMAT_VERSION = 2
DELETE_THREADS = 8
VERIFY_THREADS = 4
MANIFEST = "manifest.json"
_COMMIT = re.compile(r"step-(\d{8})/manifest\.json")


class DamagedCommit(DataError):
    """A manifest that cannot be what was written, in contrast to a store that does not answer."""


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
    fields = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    content = _compact({**fields, "sha256": hashlib.sha256(_compact(fields)).hexdigest()})
    return store.put_if_absent(content, f"{folder}/{MANIFEST}")


def _compact(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def list_commits(store: Store) -> list[int]:
    """Returns the steps that have a manifest, ascending."""
    matches = (_COMMIT.fullmatch(key) for key, _ in store.list("step-"))
    return sorted(int(match[1]) for match in matches if match)


def read_manifest(store: Store, step: int) -> Manifest:
    """Reads the manifest of a step.

    Raises:
        DamagedCommit: it is not what was written.
        DataError: there is none, the store does not answer, or it has another format.
    """
    key = f"{step_folder(step)}/{MANIFEST}"
    place = join(store.url, key)
    with store.open_range(key) as file:
        data = file.read()
    damaged = DamagedCommit(f"{place}: damaged manifest; restore it or use another checkpoint")
    try:
        fields = json.loads(data)
        seal = fields.pop("sha256", None)  # none in those of before there was one
        whole = seal in (None, hashlib.sha256(_compact(fields)).hexdigest())
        version = fields.pop("format_version")
        if not isinstance(version, int):
            raise damaged
        files = {checked_key(name): FileEntry(**entry) for name, entry in fields.pop("files").items()}
        manifest = Manifest(files=files, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged from error
    if version != FORMAT_VERSION:
        remedy = "update darkroom" if version > FORMAT_VERSION else "go on with the version that wrote it"
        raise DataError(f"{place}: format {version}, this version reads {FORMAT_VERSION}; {remedy}")
    if not whole:
        raise damaged
    if manifest.step != step:
        raise DamagedCommit(f"{place}: speaks of step {manifest.step}; restore it or use another checkpoint")
    return manifest


def verify(store: Store, step: int, manifest: Manifest, keys: Iterable[str] | None = None) -> list[str]:
    """Compares the files of the step with its manifest, to the last byte.

    Args:
        store: of the checkpoints folder.
        step: the manifest's.
        manifest: what the files must be.
        keys: only these of its files; None = all.

    Returns:
        One line per missing or damaged file; empty if all is well.

    Raises:
        DataError: the store does not answer.
    """
    sizes = dict(store.list(f"{step_folder(step)}/"))

    def problem(name: str) -> str | None:
        key = f"{step_folder(step)}/{name}"
        entry, address = manifest.files[name], join(store.url, key)
        if key not in sizes:
            return f"{address}: missing"
        if sizes[key] != entry.size_bytes:
            return f"{address}: has {sizes[key]} bytes, the manifest says {entry.size_bytes}"
        try:
            found = file_sha256(store, key)
        except OSError as error:  # a disk that cannot read it any more
            return f"{address}: {error.strerror}"
        if found != entry.sha256:
            return f"{address}: SHA-256 is {found[:12]}…, the manifest says {entry.sha256[:12]}…"
        return None

    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        return [found for found in pool.map(problem, sorted(manifest.files if keys is None else keys)) if found]


def newest_verified(store: Store) -> tuple[int, Manifest, list[str]] | None:
    """Finds the newest commit whose files all verify.

    Returns:
        (step, manifest, complaints about newer commits that had to be passed over), or None if there is no step at all.

    Raises:
        DataError: there are files of steps but no valid commit; starting anew over them must be the user's decision.
    """
    complaints: list[str] = []
    for step in reversed(list_commits(store)):
        try:
            manifest = read_manifest(store, step)
        except DamagedCommit as error:
            complaints.append(str(error))
            continue
        problems = verify(store, step, manifest)
        if not problems:
            return step, manifest, complaints
        complaints += problems
    found = len(store.list("step-"))
    if not found:
        return None
    raise no_valid_commit(store, found, complaints)


def no_valid_commit(store: Store, num_files: int, complaints: list[str]) -> DataError:
    """The refusal of a place where something was saved and nothing of it is whole."""
    first = f" ({complaints[0]})" if complaints else ""
    remedy = "restore one, or move the folder away to start anew"
    return DataError(f"{store.url}: {num_files} files but no valid checkpoint{first}; {remedy}")


def superfluous(steps: Iterable[int], keep_last: int, keep_every: int) -> list[int]:
    """The steps that retention gives up: all but the last `keep_last` and the multiples of `keep_every` (0 = none)."""
    ordered = sorted(steps)
    return [step for step in ordered[: max(0, len(ordered) - keep_last)] if not keep_every or step % keep_every]


def delete_commit(store: Store, step: int) -> None:
    """Deletes a step, the manifest first, so that it is never half there."""
    store.delete(f"{step_folder(step)}/{MANIFEST}")
    delete_files(store, [key for key, _ in store.list(f"{step_folder(step)}/")])


def delete_files(store: Store, keys: Iterable[str]) -> None:
    """Deletes many files, several at a time. Raises DataError when one of them cannot be deleted."""
    with ThreadPoolExecutor(DELETE_THREADS) as pool:
        for _ in pool.map(store.delete, keys):
            pass


def file_sha256(store: Store, key: str) -> str:
    """Returns the SHA-256 of a stored file in hexadecimal, reading it once."""
    digest = hashlib.sha256()
    with store.open_range(key) as file:
        while chunk := file.read(COPY_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
