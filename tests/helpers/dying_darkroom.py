"""The darkroom command, except that one rank SIGKILLs itself where DARKROOM_TEST_DIE says.

DARKROOM_TEST_DIE=log:6:1     rank 1, after the row of step 6 is due; saves are waited for, so that it is certain
                              which of them are committed
DARKROOM_TEST_DIE=upload:8:0  rank 0, while the files of the checkpoint of step 8 are being put
DARKROOM_TEST_DIE=shard:5:1   rank 1, between the tar and the sidecar of shard 5
"""

import os
import signal
from typing import Any

from launch import cli
from launch.runtime import ranks


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_saves() -> None:
    """On every rank."""
    from training.checkpoint import Checkpointer

    save = Checkpointer.save

    def save_and_wait(self: Checkpointer, *arguments: Any) -> None:
        save(self, *arguments)
        self.finish()

    Checkpointer.save = save_and_wait  # type: ignore[method-assign]


def arm(where: str, step: int, rank: int) -> None:
    if where == "log" and "RANK" in os.environ:
        wait_for_saves()
    if ranks().rank != rank or "RANK" not in os.environ:
        return
    if where == "log":
        from training.loop import Run

        log = Run.log

        def log_and_die(self: Run, **extra: float) -> None:
            log(self, **extra)
            if self.counters.step + 1 == step:
                _die()

        Run.log = log_and_die  # type: ignore[method-assign]
    else:
        from data.local_store import LocalStore

        method = "put_parts" if where == "upload" else "put_file"
        put = getattr(LocalStore, method)

        def put_and_die(self: LocalStore, what: object, key: str) -> None:
            put(self, what, key)
            if key.startswith(f"step-{step:08d}/") or (where == "shard" and key.endswith(f"-{step:06d}.tar")):
                _die()

        setattr(LocalStore, method, put_and_die)


if __name__ == "__main__":
    if plan := os.environ.get("DARKROOM_TEST_DIE"):
        where, step, rank = plan.split(":")
        arm(where, int(step), int(rank))
    cli.main()
