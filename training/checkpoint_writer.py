"""What a save leaves behind the loop: a host copy of what this rank owns, and a thread that makes files of it."""

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.commit import Layout, file_key, tensor_file_header
from data.errors import DataError
from data.manifest import FileEntry, step_folder
from data.object_store import Store
from training.errors import TrainingError
from training.fragments import Fragment

Groups = dict[str, dict[str, Fragment]]
Pieces = dict[str, tuple[tuple[int, ...], int, int]]  # name to shape, first element and number of elements
Owned = list[tuple[list[str], Pieces]]  # groups that are laid out alike, and what one rank owns of each

COPY_THREADS = 4  # groups that are copied at once from host memory
_PORTABLE = 1  # cudaHostRegisterPortable

log = logging.getLogger(__name__)


class HostCopy:
    """Buffers in host memory that hold this rank's own fragments as they were at the last `take`.

    Allocated at the first and used again by every later one; page-locked where the fragments are on a GPU. What every
    rank holds whole (stage 0, the discriminator) is dealt to the ranks by size.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._buffers: dict[str, Tensor] = {}  # float32, one behind the other in the order of `_tensors`
        self._tensors: dict[str, Pieces] = {}

    def take(self, groups: Groups) -> None:
        """Copies; no collective, no whole tensor of what is sharded."""
        self._tensors = {}
        sources: list[tuple[Tensor, list[Tensor]]] = []  # a group's buffer, and what goes into it
        for group, fragments in groups.items():
            owned = {name: fragments[name] for name in self._own(fragments)}
            sources.append((self._buffer(group, owned), [fragment.data.detach() for fragment in owned.values()]))
            self._tensors[group] = {name: (f.shape, f.start, f.data.numel()) for name, f in owned.items()}
        if any(part.is_cuda for _, parts in sources for part in parts):
            for buffer, parts in sources:
                _fill(buffer, parts)
            torch.cuda.current_stream().synchronize()
        else:  # one core alone does not use the memory's width
            with ThreadPoolExecutor(COPY_THREADS) as pool:
                list(pool.map(_fill, *zip(*sources, strict=True)))

    def owned(self) -> Owned:
        """What this rank owns, for the manifest."""
        found: Owned = []
        for group, pieces in self._tensors.items():
            for groups, known in found:
                if known == pieces:
                    groups.append(group)
                    break
            else:
                found.append(([group], pieces))
        return found

    def files(self) -> list[tuple[str, list[bytes | memoryview]]]:
        """(group, parts of a safetensors file) of every group of which this rank owns something."""
        found: list[tuple[str, list[bytes | memoryview]]] = []
        for group, pieces in self._tensors.items():
            if pieces:
                shapes = [(name, shape if length == torch.Size(shape).numel() else (length,))
                          for name, (shape, _, length) in pieces.items()]  # fmt: skip
                content = self._buffers[group].view(torch.uint8).numpy().data
                found.append((group, [tensor_file_header(shapes), content]))
        return found

    def _own(self, fragments: dict[str, Fragment]) -> list[str]:
        load, mine = [0] * self._world_size, []
        for name, fragment in fragments.items():
            owner = self._rank
            if fragment.replicated:
                owner = load.index(min(load))
                load[owner] += fragment.numel
            if owner == self._rank and fragment.data.numel():
                mine.append(name)
        return mine

    def _buffer(self, group: str, owned: dict[str, Fragment]) -> Tensor:
        total = sum(fragment.data.numel() for fragment in owned.values())
        buffer = self._buffers.get(group)
        if buffer is None or buffer.numel() != total:
            buffer = self._buffers[group] = torch.empty(total, dtype=torch.float32)
            if any(fragment.data.is_cuda for fragment in owned.values()):
                _page_lock(buffer)
        return buffer


def _fill(buffer: Tensor, parts: list[Tensor]) -> None:
    offset = 0
    for part in parts:
        buffer[offset : offset + part.numel()].copy_(part.reshape(-1), non_blocking=True)
        offset += part.numel()


def _page_lock(buffer: Tensor) -> None:
    """Locks memory of this very size; torch's own page-locked memory comes in powers of two, up to twice as much."""
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    if int(runtime.cudaHostRegister(address, buffer.nbytes, _PORTABLE)):
        with suppress(RuntimeError):  # the refusal waits to be raised by whatever kernel is launched next
            torch.zeros(1, device="cuda")
        log.warning("the system refuses to lock %d bytes of memory; saves stall the training for longer", buffer.nbytes)
        return
    weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False


def layouts_of(owned: list[Owned]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Puts together what each rank owns: group to the number of its layout, and the layouts as the manifest has them.

    Raises:
        RuntimeError: the pieces do not cover a tensor.
    """
    by_rank = [{group: pieces for groups, pieces in part for group in groups} for part in owned]
    alike: dict[tuple[int, ...], int] = {}  # by what the ranks own of it, as identities
    groups: dict[str, int] = {}
    layouts: list[dict[str, Any]] = []
    for group in dict.fromkeys(group for part in by_rank for group in part):
        parts = [part.get(group, {}) for part in by_rank]
        same = tuple(id(part) if part else 0 for part in parts)
        if same not in alike:
            alike[same] = len(layouts)
            layouts.append(_layout(group, parts))
        groups[group] = alike[same]
    return groups, layouts


def _layout(group: str, parts: list[Pieces]) -> dict[str, Any]:
    pieces: dict[str, list[tuple[int, int, int]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, part in enumerate(parts):
        for name, (shape, start, length) in part.items():
            shapes[name] = shape
            pieces.setdefault(name, []).append((start, rank, length))
    layout = {}
    for name, found in pieces.items():
        found.sort()
        behind = 0
        for start, _, length in found:
            if start != behind:
                raise RuntimeError(f"{group}/{name}: a piece begins at {start}, the one before it ends at {behind}")
            behind += length
        if behind != torch.Size(shapes[name]).numel():
            raise RuntimeError(f"{group}/{name}: the pieces end at {behind}, the shape is {shapes[name]}")
        starts, ranks = tuple(start for start, _, _ in found), tuple(rank for _, rank, _ in found)
        layout[name] = Layout(shape=shapes[name], ranks=ranks, starts=starts).to_json()
    return layout


def put_files(store: Store, step: int, attempt: str, rank: int, copy: HostCopy, files: dict[str, FileEntry]) -> None:
    """Hashes and stores this rank's files; the bytes go from the host copy to the store.

    Args:
        store: of the checkpoints folder.
        step: optimiser steps done.
        attempt: folder of the files below the step's.
        rank: this rank.
        copy: what to store.
        files: takes each file once it is put.

    Raises:
        DataError: the store refuses.
    """
    for group, parts in copy.files():
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        key = file_key(attempt, group, rank)
        store.put_parts(parts, f"{step_folder(step)}/{key}")
        files[key] = FileEntry(size_bytes=sum(map(len, parts)), sha256=digest.hexdigest())


def drop_files(store: Store, folders: list[str], rank: int) -> None:
    """Deletes what this rank has put into folders that will not be committed; what cannot be deleted stays."""
    with suppress(DataError):
        for folder in folders:
            for key, _ in store.list(folder):
                if key.endswith(f"-{rank:05d}.safetensors"):
                    store.delete(key)


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a job ended."""

    result: Any = None
    error: str | None = None
    fatal: bool = False  # trying again would be wrong


class Job:
    """Work in a thread that nobody waits for unless asked to; a process that ends does not wait for it either."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._report: Report | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def report(self) -> Report | None:
        """How it ended; None while it runs."""
        return self._report

    def wait(self, patience_s: float | None = None) -> None:
        self._thread.join(patience_s)

    def _run(self) -> None:
        try:
            self._report = Report(result=self._work())
        except TrainingError as error:
            self._report = Report(error=str(error), fatal=True)
        except (DataError, OSError) as error:
            self._report = Report(error=" ".join(str(error).split()))
        except BaseException as error:  # a bug costs this save, and the run after max_failed_saves of them
            log.exception("a checkpoint's thread failed")
            self._report = Report(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
