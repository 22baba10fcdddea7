"""A task that srun started, as a rank: SLURM's own variables become those that torch and its friends read.

No command of SLURM is asked: containers have none.
"""

import re
import socket
from collections.abc import Callable, Mapping
from itertools import product

from launch.errors import ConfigError
from launch.runtime import gpu_count

# Above what services use, below what the kernel gives out to clients (net.ipv4.ip_local_port_range begins at 32768).
_FIRST_PORT, _PORTS = 16000, 16000


def expand_nodes(names: str) -> list[str]:
    """`a[1-3,07],b-c` -> the nodes' names, in order; numbers keep their leading zeros.

    Raises:
        ConfigError: it is no list of nodes.
    """
    word = r"(?:[^,\[\]\s]|\[[^\[\]]*\])+"
    if not re.fullmatch(f"{word}(,{word})*", names):
        raise ConfigError(f"{names!r} is no list of nodes as SLURM writes it")
    found: list[str] = []
    for name in re.findall(word, names):
        parts = [_numbers(part) if index % 2 else [part] for index, part in enumerate(re.split(r"\[(.*?)\]", name))]
        found += ["".join(choice) for choice in product(*parts)]
    return found


def _numbers(text: str) -> list[str]:
    found: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ConfigError(f"[{text}] is no list of numbers as SLURM writes it")
        first, last = match.group(1), match.group(2) or match.group(1)
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"{text!r} is no list of tasks per node as SLURM writes it")
        found += [int(match.group(1))] * int(match.group(2) or 1)
    return found


def resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def master_address(env: Mapping[str, str], known: Callable[[str], bool] = resolves) -> str:
    """Where rank 0 is: the step's first node by name, or, if names are not resolved here, the address of the node that
    started the step, which for a batch job is the first one."""
    first = expand_nodes(_need(env, "SLURM_STEP_NODELIST"))[0]
    return first if known(first) else env.get("SLURM_LAUNCH_NODE_IPADDR") or first


def master_port(env: Mapping[str, str]) -> int:
    """The same on all tasks of a step, another for each job, restart and step: nothing old listens there."""
    job, step = int(_need(env, "SLURM_JOB_ID")), env.get("SLURM_STEP_ID", "0")
    restart = int(env.get("SLURM_RESTART_COUNT", "0"))
    return _FIRST_PORT + (job * 97 + restart * 7 + int(step if step.isdigit() else "0")) % _PORTS


def rank_environment(env: Mapping[str, str], known: Callable[[str], bool] = resolves) -> dict[str, str]:
    """What a task of srun adds to its environment to be a rank.

    The tasks of a job array are ranks of one world that never talk to each other: they share work by rank only.

    Raises:
        ConfigError: not started by srun.
    """
    local = tasks_per_node(_need(env, "SLURM_STEP_TASKS_PER_NODE"))[int(_need(env, "SLURM_NODEID"))]
    tasks, task = int(_need(env, "SLURM_STEP_NUM_TASKS")), int(_need(env, "SLURM_PROCID"))
    local_rank = int(_need(env, "SLURM_LOCALID"))
    jobs = int(env.get("SLURM_ARRAY_TASK_COUNT", "1"))
    job = int(env.get("SLURM_ARRAY_TASK_ID", "0")) - int(env.get("SLURM_ARRAY_TASK_MIN", "0"))
    devices = gpu_count()
    if devices == 1 and local > 1:  # SLURM shows each task its own GPU only, and that one is number 0
        local_rank = 0
    found = {
        "RANK": str(job * tasks + task),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(jobs * tasks),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": master_address(env, known),
        "MASTER_PORT": str(master_port(env)),
    }
    cores = int(env.get("SLURM_CPUS_PER_TASK") or 0) or max(1, int(env.get("SLURM_CPUS_ON_NODE", "1")) // local)
    defaults = {"OMP_NUM_THREADS": str(cores)} | ({} if devices else {"DS_ACCELERATOR": "cpu"})
    return {name: value for name, value in defaults.items() if name not in env} | found


def _need(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise ConfigError(f"{name} is not set: this command is for srun to start, inside a job of SLURM")
    return env[name]
