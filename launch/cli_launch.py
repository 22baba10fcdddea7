"""`darkroom launch …`: each package is named inside the command that needs it."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch.cli_common import AsJson, Quiet, darkroom_command, say

app = typer.Typer(help="Run a pipeline on a SLURM cluster.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The pipeline's folder.")]
ClusterFile = Annotated[str | None, typer.Option("--cluster", metavar="FILE", help="[default: cluster.yaml]")]


@app.command("slurm")
def launch_slurm(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="The name of a recipe, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...")] = None,
    cluster: ClusterFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job scripts; submit nothing.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Submit a pipeline as a chain of jobs. The same command submits what is not done."""
    from launch.cluster import load_cluster
    from launch.config_io import load_recipe
    from launch.pipeline import Pipeline
    from launch.pipelines import submit
    from launch.slurm import Place, render

    _, plan = load_recipe(pipeline, overrides or [], {"pipeline": Pipeline})
    site = load_cluster(cluster)
    place = Place(working_folder=Path.cwd(), darkroom=darkroom_command())
    if dry_run:
        scripts = {name: render(plan, name, site, place) for name in plan.stages}
        typer.echo(json.dumps(scripts) if as_json else "\n".join(scripts.values()))
        return
    jobs = submit(plan, site, place)
    if as_json:
        typer.echo(json.dumps({"folder": str(plan.root), "jobs": jobs}))
        return
    for name, job in jobs.items():
        say(f"{name:<16} job {job}", quiet)
    say(f"see `darkroom launch status {plan.folder}`" if jobs else f"{plan.folder}: every stage is done", quiet)


@app.command("status")
def launch_status(folder: Folder, as_json: AsJson = False) -> None:
    """Where every stage of a pipeline stands, its attempts, and which nodes failed."""
    from launch.pipelines import status

    rows = status(folder)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "stages": [asdict(row) for row in rows]}))
        return
    for row in rows:
        facts = [f"job {row.job}"] if row.job else []
        facts += [f"attempt {row.attempts}"] if row.attempts else []
        facts += [f"progress {row.progress}"] if row.progress is not None else []
        facts += [f"on {row.nodes}"] if row.nodes else []
        facts += [row.why] if row.why else []
        facts += (
            [f"failed: {', '.join(f'{node} {count} x' for node, count in row.failures.items())}"]
            if row.failures
            else []
        )
        facts += [f"excluded: {', '.join(row.excluded)}"] if row.excluded else []
        typer.echo(f"{row.stage:<16} {row.state:<12} {'; '.join(facts)}")


@app.command("logs")
def launch_logs(
    folder: Folder,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="[default: all]")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="The last so many of each log; 0 = all.")] = 50,
) -> None:
    """Print the end of a pipeline's logs."""
    from launch.pipelines import logs

    found = logs(folder, stage)
    for path in found:
        if len(found) > 1:
            typer.echo(f"==> {path} <==")
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
        typer.echo("\n".join(text[-lines:] if lines else text))


@app.command("cancel")
def launch_cancel(folder: Folder, quiet: Quiet = False) -> None:
    """End a pipeline's jobs, queued and running. `darkroom launch slurm` goes on later."""
    from launch.pipelines import cancel

    stages = cancel(folder)
    say(f"cancelled: {', '.join(stages)}" if stages else f"{folder}: nothing is queued or runs", quiet)


# --- what job scripts call ----------------------------------------------------------------------------------------


@app.command("supervise", hidden=True)
def launch_supervise(
    folder: Path,
    command: Annotated[list[str], typer.Argument(metavar="-- SRUN…")],
) -> None:
    """One attempt of a stage; job scripts call it."""
    from launch.slurm import TASK
    from launch.supervise import Supervisor

    start = next(index for index in range(len(command)) if tuple(command[index : index + 2]) == TASK)
    words = command[command.index("--", start) + 1 :]
    supervisor = Supervisor(folder, command, lambda: progress_of(words), os.environ)
    raise typer.Exit(supervisor.run())


@app.command("task", hidden=True)
def launch_task(
    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND…")],
    torchrun: Annotated[int, typer.Option(help="Ranks of this node, under torchrun.")] = 0,
) -> None:
    """Become the rank that srun's variables name, and run a darkroom command."""
    from launch.task import run_task

    raise typer.Exit(run_task([darkroom_command()], words, torchrun))


@app.command("check-node", hidden=True)
def launch_check_node(
    folder: Path,
    store: Annotated[str, typer.Option()] = "",
    min_free_gib: Annotated[float, typer.Option("--min-free-gib")] = 0.0,
    timeout: Annotated[float, typer.Option("--timeout")] = 60.0,
) -> None:
    """What one node of a cluster finds out about itself; `darkroom doctor --cluster` calls it."""
    from launch.cli_doctor import try_store
    from launch.node_check import check_node
    from launch.runtime import die_with_parent
    from launch.slurm_ranks import rank_environment

    die_with_parent()
    alone = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_ARRAY_")}
    os.environ.update(rank_environment(alone))
    check_node(folder, min_free_gib, timeout, (lambda: try_store(store)) if store else None)
    os._exit(0)  # gloo's threads have been seen to abort in the interpreter's tear-down


def progress_of(words: list[str]) -> int | None:
    """How far a command has come: the newest committed step of a training run, the shards of an encoded set.

    None = it cannot be told, now or ever.
    """
    from data.errors import DataError
    from data.manifest import list_commits
    from data.object_store import open_store
    from launch.checks import checkpoints_of
    from launch.config_io import find_recipe, read_yaml
    from launch.errors import ConfigError

    try:
        if words[0] == "train":
            run = Path(words[words.index("--run") + 1] if "--run" in words else f"runs/{Path(words[2]).stem}")
            if not (run / "run.yaml").exists():
                return 0
            url = checkpoints_of(run)
            commits = list_commits(open_store(url))
            return max(commits, default=0)
        if words[0] == "encode":
            given = [word.removeprefix("out=") for word in words if word.startswith("out=")]
            out = given[-1] if given else str(read_yaml(find_recipe(words[1])).get("out"))
            return sum(key.endswith(".tar") for key, _ in open_store(out).list())
    except (ConfigError, DataError, IndexError, OSError):
        return None
    return None
