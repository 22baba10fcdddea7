"""The darkroom command, except that it meets the faults that the environment names.

A rank SIGKILLs itself where DARKROOM_TEST_DIE says:

DARKROOM_TEST_DIE=log:6:1     rank 1, after the row of step 6 is due; saves are waited for, so that it is certain
                              which of them are committed
DARKROOM_TEST_DIE=upload:8:0  rank 0, while the files of the checkpoint of step 8 are being put
DARKROOM_TEST_DIE=shard:5:1   rank 1, between the tar and the sidecar of shard 5
DARKROOM_TEST_DIE=signal:3:1  nobody: rank 1 sends SIGUSR1 to the command once the row of step 3 is due
DARKROOM_TEST_DIE=delete-before:3:0  rank 0, at its third pass of a point (see fault_points.py)
DARKROOM_TEST_DIE=count:FOLDER       nobody: all ranks count their passes of all points into FOLDER

DARKROOM_TEST_NAN=41,51       pictures 41 and 51 of the run, counted from 0, are NaN
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from launch import cli
from launch.runtime import ranks
from tests.helpers import fault_points
from tests.helpers.fault_points import die


def wait_for_saves() -> None:
    """On every rank."""
    from training.checkpoint import Checkpointer

    save = Checkpointer.save

    def save_and_wait(self: Checkpointer, *arguments: Any) -> None:
        save(self, *arguments)
        self.finish()

    Checkpointer.save = save_and_wait  # type: ignore[method-assign]


def arm(where: str, step: int, rank: int) -> None:
    if where == "log":
        wait_for_saves()
    if ranks().rank != rank:
        return
    if where in ("log", "signal"):
        from training.loop import Run

        log = Run.log

        def log_and_die(self: Run, **extra: float) -> None:
            log(self, **extra)
            if self.counters.step + 1 == step:
                die() if where == "log" else os.kill(os.getppid(), signal.SIGUSR1)

        Run.log = log_and_die  # type: ignore[method-assign]
    elif where in ("upload", "shard"):
        from data.local_store import LocalStore

        method = "put_parts" if where == "upload" else "put_file"
        put = getattr(LocalStore, method)

        def put_and_die(self: LocalStore, what: object, key: str) -> None:
            put(self, what, key)
            if key.startswith(f"step-{step:08d}/") or (where == "shard" and key.endswith(f"-{step:06d}.tar")):
                die()

        setattr(LocalStore, method, put_and_die)
    else:
        fault_points.die_at(where, step)


def poison(numbers: set[int]) -> None:
    import torch

    from data.loader import Batch

    images = Batch.images

    def images_and_nan(self: Batch, device: torch.device | str = "cpu") -> torch.Tensor:
        pictures = images(self, device)
        for row, number in enumerate(self.sample_numbers.tolist()):
            if number in numbers:
                pictures[row] = torch.nan
        return pictures

    Batch.images = images_and_nan  # type: ignore[method-assign]


if __name__ == "__main__":
    if numbers := os.environ.get("DARKROOM_TEST_NAN"):
        poison({int(number) for number in numbers.split(",")})
    plan = os.environ.get("DARKROOM_TEST_DIE")
    alone = "--nproc" not in sys.argv or sys.argv[sys.argv.index("--nproc") + 1] == "1"
    if plan and ("RANK" in os.environ or alone):  # the command that starts the ranks lives
        where, _, rest = plan.partition(":")
        if where == "count":
            fault_points.count_into(Path(rest), ranks().rank)
        else:
            step, _, rank = rest.partition(":")
            arm(where, int(step), int(rank))
    cli.main()
