"""The few questions and orders that Darkroom has for SLURM's commands. They need no accounting database."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Literal

from launch.errors import ConfigError
from launch.slurm_ranks import expand_nodes

_TIMEOUT_S = 60
_LOST = ("down", "unk")


def submitting_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Without what would change a script's own options: SBATCH_*, and the variables of a job that this shell is in."""
    return {
        name: value
        for name, value in env.items()
        if name == "SLURM_CONF" or not name.startswith(("SBATCH_", "SLURM_", "SLURMD_"))
    }


def sbatch(script: str, after: Sequence[str], exclude: Sequence[str]) -> str:
    """Submits a script; returns the job's number. Raises ConfigError with what SLURM says against it."""
    options = [f"--dependency=afterok:{':'.join(after)}"] if after else []
    options += [f"--exclude={','.join(exclude)}"] if exclude else []
    said = _run(["sbatch", "--parsable", *options, script], submitting_environment(os.environ))
    return said.strip().partition(";")[0]


def queue(job_ids: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """(state, reason, nodes) of those jobs that SLURM still knows, by number; NUMBER_TASK for those of an array."""
    if not job_ids:
        return {}
    command = ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%N", "-j", ",".join(job_ids)]
    try:
        said = _run(command)
    except ConfigError as error:
        if "Invalid job id" in str(error):  # none of them is known any more
            return {}
        raise
    rows = [line.split("|") for line in said.splitlines()]
    return {row[0]: (row[1], row[2], row[3]) for row in rows if len(row) == 4}


def lost_nodes(nodes: Sequence[str]) -> tuple[str, ...]:
    """Those of the nodes that do not answer or are down."""
    said = _run(["sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %t"])
    states = dict(line.split() for line in said.splitlines() if len(line.split()) == 2)
    return tuple(node for node in nodes if "*" in states.get(node, "") or states.get(node, "").startswith(_LOST))


def idle_nodes(partition: str | None) -> list[str]:
    """Nodes that wait for work."""
    chosen = ["-p", partition] if partition else []
    said = _run(["sinfo", "-h", "-N", "-t", "idle", *chosen, "-o", "%N"])
    return sorted(set(said.split()))


def job_nodes(env: Mapping[str, str]) -> tuple[str, ...]:
    """The nodes of the job that this process is in."""
    return tuple(expand_nodes(env["SLURM_JOB_NODELIST"]))


def fate(job_id: str, restarts: int) -> Literal["requeued", "time limit", "cancelled", "running"]:
    """What SLURM is doing with a job that had been restarted so many times when the caller began."""
    said = _run(["scontrol", "-o", "show", "job", job_id])
    facts = dict(re.findall(r"(\w+)=(\S*)", said))
    if int(facts.get("Restarts", "0")) > restarts:  # counted at once, for preemption and lost nodes too
        return "requeued"
    if facts.get("Reason") == "TimeLimit":
        return "time limit"
    return "running" if facts.get("JobState") == "RUNNING" else "cancelled"


def requeue(job_id: str) -> None:
    """Queues a running job again. SLURM ends its processes; the next two orders may follow all the same."""
    _run(["scontrol", "requeue", job_id])


def hold_back(job_id: str, wait_s: int) -> None:
    """Not before so many s from now."""
    _run(["scontrol", "update", f"JobId={job_id}", f"StartTime=now+{wait_s}"])


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Never on these nodes."""
    _run(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}"])


def cancel(job_ids: Sequence[str]) -> None:
    """Ends jobs; those that are over are passed over."""
    _run(["scancel", "--quiet", *job_ids])


def _run(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Output of a command, which a signal to this process's group does not reach."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=_TIMEOUT_S, start_new_session=True, env=env
        )
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is not installed here; give the command where SLURM's are") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{command[0]} has not answered for {_TIMEOUT_S} s; is SLURM's controller up?") from None
    if done.returncode:
        raise ConfigError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
