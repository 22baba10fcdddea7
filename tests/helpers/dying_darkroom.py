"""The darkroom command, except that one rank SIGKILLs itself where DARKROOM_TEST_DIE says.

DARKROOM_TEST_DIE=log:6:1     rank 1, after the row of step 6 is due
DARKROOM_TEST_DIE=upload:8:0  rank 0, while the files of the checkpoint of step 8 are being put
DARKROOM_TEST_DIE=shard:5:1   rank 1, between the tar and the sidecar of shard 5
DARKROOM_TEST_DIE=signal:3:1  nobody: rank 1 sends SIGUSR1 to the command once the row of step 3 is due
"""

import os
import signal

from launch import cli
from launch.runtime import ranks


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(where: str, step: int, rank: int) -> None:
    if ranks().rank != rank or "RANK" not in os.environ:
        return
    if where in ("log", "signal"):
        from training.loop import Run

        log = Run.log

        def log_and_die(self: Run, **extra: float) -> None:
            log(self, **extra)
            if self.counters.step + 1 == step:
                _die() if where == "log" else os.kill(os.getppid(), signal.SIGUSR1)

        Run.log = log_and_die  # type: ignore[method-assign]
    else:
        from data.local_store import LocalStore

        put = LocalStore.put_file

        def put_and_die(self: LocalStore, path: object, key: str) -> None:
            put(self, path, key)  # type: ignore[arg-type]
            if key.startswith(f"step-{step:08d}/") or (where == "shard" and key.endswith(f"-{step:06d}.tar")):
                _die()

        LocalStore.put_file = put_and_die  # type: ignore[method-assign]


if __name__ == "__main__":
    if plan := os.environ.get("DARKROOM_TEST_DIE"):
        where, step, rank = plan.split(":")
        arm(where, int(step), int(rank))
    cli.main()
