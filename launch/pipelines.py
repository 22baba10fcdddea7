"""Submitting a pipeline, and what became of it. All state lies in the pipeline's folder; nothing runs in between.

pipeline.yaml, cluster.yaml   what was submitted
jobs.json                     stage -> number of its job
STAGE/                        job.sh, plan.yaml, log.txt, and the records of attempts.py
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch import slurm_client
from launch.attempts import Attempt, Record, write_whole
from launch.cluster import Cluster
from launch.config_io import dump_yaml, from_dict, read_yaml, to_dict
from launch.errors import ConfigError
from launch.pipeline import Pipeline, Stage
from launch.requeue import excluded
from launch.slurm import Place, render, stage_folder
from launch.supervise import PLAN, Plan

_JOBS = "jobs.json"
_ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING")


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """Where a stage stands, for people and programs."""

    stage: str
    job: str  # SLURM's number; empty = not submitted
    state: str  # done, running, pending, failed, not started …
    attempts: int  # so far; over all tasks of an array
    progress: int | None  # newest checkpoint's step; of an array the tasks that are done
    nodes: str  # where it runs
    why: str  # how the last attempt ended, or what it waits for
    failures: Mapping[str, int]  # of nodes, by name
    excluded: tuple[str, ...]  # nodes that it does not start on any more


def submit(pipeline: Pipeline, cluster: Cluster, place: Place) -> dict[str, str]:
    """Writes the scripts and submits what is not done, each stage after those it needs.

    Returns:
        Stage -> job number of what was submitted.

    Raises:
        ConfigError: the pipeline is queued or runs already, a variable to pass on is not set, or SLURM refuses; then
            nothing of this submission stays queued.
    """
    absent = [name for name in cluster.pass_environment if name not in os.environ]
    if absent:
        raise ConfigError(
            f"pass_environment names {', '.join(absent)}, which is not set here; set it, or remove the name"
        )
    scripts = {name: render(pipeline, name, cluster, place) for name in pipeline.stages}  # all, before any is queued
    before = status(pipeline.root, pipeline) if (pipeline.root / _JOBS).exists() else []
    alive = [row for row in before if row.state in ("running", "pending")]
    if alive:
        raise ConfigError(
            f"{alive[0].stage} of {pipeline.root} is {alive[0].state} as job {alive[0].job}; "
            f"`darkroom launch status {pipeline.folder}` shows it, `darkroom launch cancel {pipeline.folder}` ends it"
        )
    done = {row.stage for row in before if row.state == "done"}
    for name, script in scripts.items():
        _prepare(stage_folder(pipeline, name), script, Plan(stage=pipeline.stages[name], cluster=cluster))
    write_whole(pipeline.root / "pipeline.yaml", dump_yaml({"kind": "pipeline", **to_dict(pipeline)}))
    write_whole(pipeline.root / "cluster.yaml", dump_yaml(cluster))
    jobs: dict[str, str] = {}
    try:
        for name, stage in pipeline.stages.items():
            if name in done:
                continue
            after = [jobs[earlier] for earlier in pipeline.after(name) if earlier in jobs]
            out = _excluded(_records(stage_folder(pipeline, name), stage), cluster)
            jobs[name] = slurm_client.sbatch(str(stage_folder(pipeline, name) / "job.sh"), after, out)
            _write_jobs(pipeline.root, _read_jobs(pipeline.root) | jobs)
    except ConfigError:
        if jobs:
            slurm_client.cancel(list(jobs.values()))
        raise
    return jobs


def status(root: Path, pipeline: Pipeline | None = None) -> list[StageStatus]:
    """Where every stage stands, in order. Raises ConfigError if nothing was submitted from there."""
    pipeline = pipeline or load(root)
    jobs = _read_jobs(root)
    queued = slurm_client.queue(sorted(jobs.values()))
    return [_status(pipeline, name, jobs.get(name, ""), queued, root) for name in pipeline.stages]


def _status(
    pipeline: Pipeline, name: str, job: str, queued: Mapping[str, tuple[str, str, str]], root: Path
) -> StageStatus:
    stage, folder = pipeline.stages[name], root / name
    records = _records(folder, stage)
    histories = [record.attempts() for record in records]
    attempts = [attempt for history in histories for attempt in history]
    rows = [row for number, row in queued.items() if job and (number == job or number.startswith(f"{job}_"))]
    lasts = [history[-1].outcome if history else None for history in histories]
    alive = [row for row in rows if row[0] in _ALIVE]
    if job and all(outcome == "done" for outcome in lasts):
        state, why = "done", ""
    elif alive:
        state = "running" if any(row[0] in ("RUNNING", "COMPLETING") for row in alive) else "pending"
        why = next((row[1] for row in alive if row[1] not in ("None", "")), "")
    else:
        state = "failed" if attempts else "not started"
        why = "its job was cancelled, or an earlier stage did not end well" if job and not attempts else ""
    plan = folder / PLAN
    cluster = from_dict(Plan, read_yaml(plan), str(plan)).cluster if plan.exists() else Cluster()
    failures: dict[str, int] = {}
    for node in (node for attempt in attempts for node in attempt.failed_nodes):
        failures[node] = failures.get(node, 0) + 1
    return StageStatus(
        stage=name,
        job=job,
        state=state,
        attempts=len(attempts),
        progress=lasts.count("done") if stage.array > 1 else _progress(attempts),
        nodes=",".join(row[2] for row in alive if row[2]),
        why=why or _last_words(attempts),
        failures=failures,
        excluded=_excluded(records, cluster),
    )


def _progress(attempts: list[Attempt]) -> int | None:
    known = [value for attempt in attempts for value in (attempt.progress, attempt.progress_after) if value is not None]
    return max(known, default=None)


def _last_words(attempts: list[Attempt]) -> str:
    ended = [attempt for attempt in attempts if attempt.outcome not in (None, "done")]
    return f"{ended[-1].outcome}: {ended[-1].why}" if ended else ""


def cancel(root: Path) -> list[str]:
    """Ends what is queued or runs; returns the names of those stages."""
    alive = [row for row in status(root) if row.state in ("running", "pending")]
    if alive:
        slurm_client.cancel([row.job for row in alive])
    return [row.stage for row in alive]


def logs(root: Path, stage: str | None) -> list[Path]:
    """The log files of a stage, or of all that have one. Raises ConfigError for a stage that is none."""
    names = list(load(root).stages)
    if stage is not None and stage not in names:
        raise ConfigError(f"{root} has no stage {stage!r}; there are {', '.join(names)}")
    found = [path for name in ([stage] if stage else names) for path in sorted((root / name).glob("log*.txt"))]
    if not found:
        raise ConfigError(f"{stage or root} has not written a log yet; see `darkroom launch status {root}`")
    return found


def load(root: Path) -> Pipeline:
    """The pipeline that was submitted from a folder."""
    path = root / "pipeline.yaml"
    if not path.is_file():
        raise ConfigError(f"{root} holds no pipeline.yaml; give the folder of a pipeline that was submitted")
    values = read_yaml(path)
    values.pop("kind", None)
    return from_dict(Pipeline, values, str(path))


def _prepare(folder: Path, script: str, plan: Plan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "job.sh", script)
    write_whole(folder / PLAN, dump_yaml(plan))


def _records(folder: Path, stage: Stage) -> list[Record]:
    return [Record(folder / str(task)) for task in range(stage.array)] if stage.array > 1 else [Record(folder)]


def _excluded(records: list[Record], cluster: Cluster) -> tuple[str, ...]:
    attempts = [attempt for record in records for attempt in record.attempts()]
    return excluded(attempts, cluster.requeue)


def _read_jobs(root: Path) -> dict[str, str]:
    path = root / _JOBS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _write_jobs(root: Path, jobs: Mapping[str, str]) -> None:
    write_whole(root / _JOBS, json.dumps(jobs, indent=1) + "\n")
