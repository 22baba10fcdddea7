"""Places where a rank may die: before or after a call at a seam that every version of the trainer has.

A process counts its own passes of each point. `count_into` writes them down, so that a test knows how many there are in
an undisturbed run and can draw one; `die_at` makes the process SIGKILL itself at one of them.
"""

import functools
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STORE = ("put_file", "put_if_absent", "put_bytes", "delete")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str, number: int) -> None:
    """This process dies at its pass `number` (from 1) of `point`, such as "put_file-after"."""
    passes: Counter[str] = Counter()

    def visit(here: str) -> None:
        passes[here] += 1
        if here == point and passes[here] == number:
            die()

    _watch(visit)


def count_into(folder: Path, rank: int) -> None:
    """Every pass of a point adds a byte to the file `point.rank` in `folder`."""

    def visit(here: str) -> None:
        with (folder / f"{here}.{rank}").open("ab") as file:
            file.write(b".")

    _watch(visit)


def counted(folder: Path) -> dict[tuple[str, int], int]:
    """Passes by (point, rank)."""
    found = ((path.name.rpartition("."), path.stat().st_size) for path in folder.iterdir())
    return {(point, int(rank)): size for (point, _, rank), size in found}


def _watch(visit: Callable[[str], None]) -> None:
    from torch.optim import AdamW

    from data.loader import Batch, Loader
    from data.object_store import LocalStore, S3Store

    _wrap(AdamW, "step", "step", visit)
    _wrap(os, "fsync", "flush", visit)  # a store's file is written, but not yet there
    _wrap(os, "rename", "rename", visit)  # a folder, or run.yaml, is written, but not yet there
    for store in (LocalStore, S3Store):
        for method in STORE:
            _wrap(store, method, method, visit)

    batches = Loader.__iter__

    def watched(self: Loader) -> Iterator[Batch]:
        for batch in batches(self):
            visit("batch-before")
            yield batch

    Loader.__iter__ = watched  # type: ignore[method-assign]


def _wrap(owner: Any, name: str, seam: str, visit: Callable[[str], None]) -> None:
    call = getattr(owner, name)

    @functools.wraps(call)
    def watched(*args: Any, **kwargs: Any) -> Any:
        visit(f"{seam}-before")
        result = call(*args, **kwargs)
        visit(f"{seam}-after")
        return result

    setattr(owner, name, watched)
