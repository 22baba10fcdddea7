"""Places where a rank may die: before or after a call at a seam that lies between the parts of the trainer.

step: AdamW's. batch: a micro-batch leaves the loader. flush: bytes reach the disk, under a temporary name as yet.
rename: a folder or run.yaml gets its name. put, put_bytes, put_if_absent, delete: a store's; manifest: put_if_absent of
a checkpoint's manifest, which is its commit.

A process counts its own passes of each point. `count_into` writes them down, so that a test knows how many there are in
an undisturbed run and can draw one; `die_at` makes the process SIGKILL itself at one of them.
"""

import functools
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

STORE = {"put_file": "put", "put_parts": "put", "put_bytes": "put_bytes", "delete": "delete"}  # method: seam


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str, number: int) -> None:
    """This process dies at its pass `number` (from 1) of `point`, such as "put-after"."""
    passes: Counter[str] = Counter()
    one_at_a_time = Lock()

    def visit(here: str) -> None:
        with one_at_a_time:
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

    def exclusive(store: object, data: bytes, key: str) -> str:
        return "manifest" if key.endswith("/manifest.json") else "put_if_absent"

    _wrap(AdamW, "step", lambda *_: "step", visit)
    _wrap(os, "fsync", lambda *_: "flush", visit)
    _wrap(os, "rename", lambda *_: "rename", visit)
    for store in (LocalStore, S3Store):
        _wrap(store, "put_if_absent", exclusive, visit)
        for method, seam in STORE.items():
            _wrap(store, method, lambda *_, seam=seam: seam, visit)

    batches = Loader.__iter__

    def watched(self: Loader) -> Iterator[Batch]:
        for batch in batches(self):
            visit("batch-before")
            yield batch

    Loader.__iter__ = watched  # type: ignore[method-assign]


def _wrap(owner: Any, name: str, seam_of: Callable[..., str], visit: Callable[[str], None]) -> None:
    call = getattr(owner, name)

    @functools.wraps(call)
    def watched(*args: Any, **kwargs: Any) -> Any:
        seam = seam_of(*args)
        visit(f"{seam}-before")
        result = call(*args, **kwargs)
        visit(f"{seam}-after")
        return result

    setattr(owner, name, watched)
