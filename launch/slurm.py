"""Job scripts for SLURM: a pure function of pipeline, site and paths. It asks nothing and submits nothing.

A script is for reading: what the job needs, what its environment is, and the command. Whatever comes from a file
stands in it as a checked #SBATCH value or as one quoted word, so that no value becomes shell code.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import Cluster, check_path
from launch.errors import ConfigError
from launch.pipeline import Pipeline, Stage

# What a job takes along from the shell that submits, besides pass_environment: no credential by default.
KEPT_VARIABLES = ("HOME", "USER", "LOGNAME", "PATH", "LANG")
TASK = ("launch", "task")  # the subcommand that becomes a rank
_LINE = 100  # columns of a command, about


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a script is made; the same on all nodes."""

    working_folder: Path  # in which `darkroom launch slurm` was given: relative paths mean this
    darkroom: str  # the command that submits, absolute


def seconds(time: str) -> int:
    """A time limit as sbatch takes it, in s: MINUTES, MINUTES:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, secs = (parts + [0, 0])[:3]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def stage_folder(pipeline: Pipeline, name: str) -> Path:
    """Where a stage's script, log and records are."""
    return pipeline.root / name


def job_name(pipeline: Pipeline, name: str) -> str:
    return f"{pipeline.name}.{name}"


def render(pipeline: Pipeline, name: str, cluster: Cluster, place: Place) -> str:
    """The sbatch script of one stage.

    Raises:
        ConfigError: a time limit that leaves no time to train before the save, or a path that needs quotes.
    """
    stage, folder = pipeline.stages[name], stage_folder(pipeline, name)
    if seconds(stage.time) <= cluster.save_s + 60:  # SLURM may signal up to a minute early
        raise ConfigError(
            f"stages.{name}.time {stage.time} is no more than save_s {cluster.save_s} and a minute; "
            "raise time, or lower save_s in the cluster's file"
        )
    try:
        check_path("folder", str(folder))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    ranks = stage.ranks_on_node(cluster.gpus_per_node)
    lines = [
        "#!/bin/bash -l" if cluster.modules else "#!/bin/bash",  # a login shell knows `module`
        f"# Stage {name} of pipeline {pipeline.name}, written by `darkroom launch slurm`.",
        *(f"#SBATCH {option}" for option in _options(pipeline, name, cluster, ranks)),
        "",
        "set -eo pipefail",
        f"cd {shlex.quote(str(place.working_folder))}",
        *(f"module load {shlex.quote(module)}" for module in cluster.modules),
        *(f"export {key}={shlex.quote(value)}" for key, value in environment(cluster).items()),
        "",
        *_wrapped(["exec", cluster.darkroom or place.darkroom, "launch", "supervise", str(folder), "--"]),
    ]
    lines[-1] += " \\"
    srun = srun_command(stage, cluster, place)
    return "\n".join([*lines, *_wrapped(srun, " \\"), *_wrapped(stage.words, "", indent="    ")]) + "\n"


def _options(pipeline: Pipeline, name: str, cluster: Cluster, ranks: int) -> list[str]:
    """The #SBATCH lines. Every value has been checked against a pattern or is a number of ours."""
    stage = pipeline.stages[name]
    fewest = stage.min_nodes or stage.nodes
    tasks = _tasks_on_node(stage, cluster)
    log = stage_folder(pipeline, name) / ("log-%a.txt" if stage.array > 1 else "log.txt")
    options = [f"--job-name={job_name(pipeline, name)}"]
    options += [f"--partition={cluster.partition}"] if cluster.partition else []
    options += [f"--account={cluster.account}"] if cluster.account else []
    options += [f"--array=0-{stage.array - 1}"] if stage.array > 1 else []
    if fewest < stage.nodes:  # with a number of tasks SLURM may be content with fewer nodes than are free
        options += [f"--nodes={fewest}-{stage.nodes}", f"--mincpus={ranks * (cluster.cpus_per_rank or 1)}"]
    else:
        options += [f"--nodes={stage.nodes}", f"--ntasks-per-node={tasks}"]
        if cluster.cpus_per_rank:
            options.append(f"--cpus-per-task={cluster.cpus_per_rank * ranks // tasks}")
    if cluster.gpus_per_node:
        options.append(f"--gpus-per-node={min(ranks, cluster.gpus_per_node)}")
    options += [
        f"--time={stage.time}",
        f"--signal=USR1@{cluster.save_s}",
        "--requeue",
        "--kill-on-invalid-dep=yes",
        "--open-mode=append",
        f"--output={log}",
        f"--export={','.join([*KEPT_VARIABLES, *cluster.pass_environment])}",
    ]
    return options + list(cluster.sbatch_options)


def environment(cluster: Cluster) -> dict[str, str]:
    """What a job script exports."""
    found = {"PYTHONUNBUFFERED": "1"}
    if cluster.network_interface:
        found |= {f"{library}_SOCKET_IFNAME": cluster.network_interface for library in ("NCCL", "GLOO")}
    if cluster.scratch:
        found["TMPDIR"] = cluster.scratch
    return found | dict(cluster.environment)


def srun_command(stage: Stage, cluster: Cluster, place: Place) -> list[str]:
    """How ranks start: everything up to the words of the stage's own command.

    The first rank to end badly ends the others at once (--kill-on-bad-exit); one that has saved and ended does not.
    """
    ranks = stage.ranks_on_node(cluster.gpus_per_node)
    tasks = _tasks_on_node(stage, cluster)
    command = ["srun", "--kill-on-bad-exit=1", "--wait=0", "--export=ALL", f"--ntasks-per-node={tasks}"]
    if cluster.cpus_per_rank:  # srun takes it over from sbatch in some versions only
        command.append(f"--cpus-per-task={cluster.cpus_per_rank * ranks // tasks}")
    darkroom = cluster.darkroom or place.darkroom
    if cluster.container is not None:
        command += _in_container(cluster, place)
        darkroom = cluster.container.darkroom
    torchrun = ["--torchrun", str(ranks)] if tasks != ranks else []
    return [*command, darkroom, *TASK, *torchrun, "--"]


def _tasks_on_node(stage: Stage, cluster: Cluster) -> int:
    """What srun starts on each node: the ranks, or one torchrun for ranks that talk to each other."""
    ranks = stage.ranks_on_node(cluster.gpus_per_node)
    return 1 if cluster.tasks == "node" and stage.words[0] == "train" else ranks


def _in_container(cluster: Cluster, place: Place) -> list[str]:
    container = cluster.container
    assert container is not None
    if container.kind == "pyxis":
        mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
        return [f"--container-image={container.image}", *mounts, f"--container-workdir={place.working_folder}"]
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    gpus = ["--nv"] if cluster.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(place.working_folder), container.image]


def _wrapped(words: list[str], end: str = "", indent: str = "  ") -> list[str]:
    """Quoted words on lines of a readable width, joined by backslashes."""
    lines: list[str] = []
    for word in map(shlex.quote, words):
        if lines and len(lines[-1]) + len(word) < _LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(word if words[0] == "exec" and not lines else f"{indent}{word}")
    return [line + " \\" for line in lines[:-1]] + [lines[-1] + end]
