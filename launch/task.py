"""`darkroom launch task`: what srun starts once per rank (or once per node, with torchrun inside).

It gives the command its ranks, passes signals on, and leaves word of how the command ended. A rank that has saved and
ended with 75 ends with 0 for SLURM: srun ends a step at its first exit code other than 0, and the others may still be
saving. What owns the stage now is looked up now and then: a task that SLURM has lost and replaced must not go on.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from launch.attempts import ATTEMPT_VARIABLE, RankEnd, Record, rank_ends, write_rank_end
from launch.runtime import ERROR_DIR_VARIABLE, EXIT_PREEMPTED, die_with_parent, is_rank_process, run_and_note
from launch.slurm_ranks import rank_environment

OWNER_POLL_S = 2.0
_SHUTDOWN_S = 24 * 3600  # torchrun's patience with workers that are saving; SLURM's own limits come first


def run_task(darkroom: Sequence[str], words: Sequence[str], torchrun: int = 0) -> int:
    """Runs `darkroom WORDS` as this task's rank, or as `torchrun` ranks of this node.

    Args:
        darkroom: the command's own words.
        words: its arguments.
        torchrun: ranks of this node; 0 = this task is one rank.

    Returns:
        0 if the ranks are done or saved, else the exit code.
    """
    die_with_parent()
    env = dict(os.environ) if is_rank_process() else os.environ | rank_environment(os.environ)
    attempt = Path(env[ATTEMPT_VARIABLE]) if ATTEMPT_VARIABLE in env else None
    if attempt is not None:
        env.setdefault(ERROR_DIR_VARIABLE, str(attempt))
        threading.Thread(target=_end_when_replaced, args=(attempt,), daemon=True).start()
    if torchrun:
        code, _ = run_and_note(_torchrun(torchrun, env, [*darkroom, *words]), _without_ranks(env))
        return 0 if attempt is not None and _all_saved(attempt, env["SLURMD_NODENAME"], torchrun) else code
    code, signals = run_and_note([*darkroom, *words], env)
    if attempt is not None:
        _leave_word(attempt, int(env["RANK"]), env.get("SLURMD_NODENAME", ""), code, signals)
    return 0 if code == EXIT_PREEMPTED else code


def _leave_word(attempt: Path, rank: int, node: str, code: int, signals: Sequence[str]) -> None:
    said = (attempt / f"rank-{rank}.txt").exists()
    end = RankEnd(
        rank=rank, node=node, code=code, signals=tuple(signals), has_said_why=said, ended_s=round(time.time(), 3)
    )
    write_rank_end(attempt, end)
    if code not in (0, EXIT_PREEMPTED) and not said:  # before the others give their lost connections for the cause
        (attempt / "verdict.txt").write_text(f"rank {rank} ended with {code}", encoding="utf-8")


def _torchrun(ranks: int, env: dict[str, str], command: Sequence[str]) -> list[str]:
    """One agent per node; SLURM restarts, not torchrun, so that a restart is on record and resumes by itself."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--no-python"),
        f"--nnodes={env['SLURM_STEP_NUM_NODES']}",
        f"--node-rank={env['SLURM_NODEID']}",
        f"--nproc-per-node={ranks}",
        f"--master-addr={env['MASTER_ADDR']}",
        f"--master-port={env['MASTER_PORT']}",
        "--max-restarts=0",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
        f"--shutdown-timeout={_SHUTDOWN_S}",
        *(command[0], "launch", "task", "--", *command[1:]),
    ]


def _without_ranks(env: dict[str, str]) -> dict[str, str]:
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in env.items() if name not in ours}


def _all_saved(attempt: Path, node: str, ranks: int) -> bool:
    """torchrun ends badly when its workers were told to end, even if they did so well."""
    codes = [end.code for end in rank_ends(attempt) if end.node == node]
    return len(codes) == ranks and all(code in (0, EXIT_PREEMPTED) for code in codes)


def _end_when_replaced(attempt: Path) -> None:
    """Ends this task and its rank at once when a later attempt has taken over the stage."""
    record, mine = Record(attempt.parent), attempt.name.removeprefix("attempt-")
    while True:
        time.sleep(OWNER_POLL_S)
        try:
            owner = record.owner()
        except OSError:  # the shared file system stumbles; what is written goes there too
            continue
        if owner and owner != mine:
            print(f"attempt {mine} was replaced by {owner}; it ends here", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)  # the rank dies with this process, whatever it is doing
