"""What a cluster does to a run: time limits, preemption, lost nodes, killed ranks; each ends in the same curve."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.attempts import rank_ends
from tests.helpers.command import darkroom
from tests.helpers.slurm_cluster import SlurmCluster, alive
from tests.helpers.slurm_pipelines import CANARY, Launched, rows
from training.metrics import read_metrics

pytestmark = pytest.mark.all


@pytest.fixture(scope="module")
def undisturbed(long_recipe: Path) -> Path:
    """The same run of two ranks without any cluster."""
    run = long_recipe.with_name("undisturbed")
    done = darkroom("train", "dit", long_recipe, "--run", run, "--nproc", 2)
    assert done.code == 0, done.err
    return run


def train(recipe: Path, run: Path, **more: object) -> dict[str, dict[str, object]]:
    return {"dit": {"run": f"train dit {recipe} --run {run}", "nodes": 2, **more}}


def same_curve_and_ledger(run: Path, expected: Path) -> None:
    """Bit for bit, however often it was stopped; every sample once per epoch."""
    for mine, theirs in zip(read_metrics(run / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl"), strict=True):
        assert (mine["step"], mine["loss"], mine["images_seen"]) == (
            theirs["step"],
            theirs["loss"],
            theirs["images_seen"],
        )
    verdicts = [darkroom("data", "ledger", folder, "--json") for folder in (run, expected)]
    assert [verdict.code for verdict in verdicts] == [0, 0], verdicts[0].err
    epochs = [json.loads(verdict.out)["epochs"] for verdict in verdicts]
    assert epochs[0] == epochs[1]


def commits(run: Path) -> list[int]:
    return [int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*/manifest.json")]


def test_time_limit_then_preemption(launched: Callable[..., Launched], long_recipe: Path, undisturbed: Path) -> None:
    """SLURM's own --signal at a time limit, early; then scontrol requeue with more signals while it saves."""
    run = long_recipe.with_name("limited")
    test = launched(train(long_recipe, run))
    test.submit()
    cluster, job = test.cluster, test.job("dit")
    test.until("it has trained", lambda: rows(run) >= 60)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")  # less than a minute is left: at once
    test.until("the first attempt has ended", lambda: test.attempts("dit")[0].outcome)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    first = test.attempts("dit")[0]
    assert (first.outcome, first.why) == ("preempted", "SIGUSR1: saved")
    ends = rank_ends(test.root / "dit" / f"attempt-{first.id}")
    assert [(end.rank, end.node, end.code, end.signals[0]) for end in sorted(ends, key=lambda end: end.rank)] == [
        (0, first.nodes[0], 75, "SIGUSR1"),
        (1, first.nodes[1], 75, "SIGUSR1"),
    ]
    assert max(commits(run)) == first.progress_after and (first.progress_after or 0) >= 60

    test.until("the second attempt trains", lambda: rows(run) >= (first.progress_after or 0) + 60)
    cluster.run("scontrol", "requeue", str(job))
    for pid in test.pids("dit"):  # as impatient schedulers do
        for number in (signal.SIGUSR1, signal.SIGTERM):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
    assert test.until_over("dit")["state"] == "done"
    second, third = test.attempts("dit")[1:]
    assert (second.outcome, second.why[-7:], second.progress) == ("preempted", ": saved", first.progress_after)
    assert (third.outcome, third.progress, third.id) == ("done", second.progress_after, f"{job}-2")
    assert f"resuming {run} at step {second.progress_after}" in test.log("dit")
    same_curve_and_ledger(run, undisturbed)
    secret_is_nowhere([run, test.folder, cluster.folder])


def secret_is_nowhere(folders: list[Path]) -> None:
    done = subprocess.run(["grep", "-rlaF", CANARY, *map(str, folders)], capture_output=True, text=True)
    assert done.stdout == ""


def test_lost_node_then_killed_rank(
    launched: Callable[..., Launched], cluster: SlurmCluster, long_recipe: Path, undisturbed: Path
) -> None:
    """kill -9 of a slurmd: queued again, resumed, and the task it leaves behind ends; kill -9 of a rank: all end."""
    run = long_recipe.with_name("torn")
    test = launched(train(long_recipe, run))
    test.submit()
    test.until("it has a checkpoint", lambda: rows(run) >= 70)
    lost = test.attempts("dit")[0].nodes[1]
    orphans = test.pids("dit", lost)
    assert orphans
    cluster.kill_node(lost)
    test.until("the first attempt has ended", lambda: test.attempts("dit")[0].outcome)
    test.until("another has begun", lambda: len(test.attempts("dit")) == 2)
    cluster.start_node(lost)
    test.until("nothing of the lost node's is left", lambda: not any(map(alive, orphans)))
    start = test.attempts("dit")[1].progress or 0
    assert start >= 50
    first = test.attempts("dit")[0]
    assert (first.outcome, first.failed_nodes) == ("lost", (lost,)) and first.why.startswith(f"SLURM lost {lost}")

    test.until("the second attempt trains", lambda: rows(run) >= start + 60)
    second = test.attempts("dit")[1]
    ranks = test.pids("dit")
    victim = next(
        pid
        for pid in test.pids("dit", second.nodes[1])
        if b"launch\0task" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(victim, signal.SIGKILL)
    test.until("the whole step has ended", lambda: not any(map(alive, ranks)), limit_s=20)
    assert test.until_over("dit")["state"] == "done"
    second, third = test.attempts("dit")[1:]
    assert (second.outcome, second.failed_nodes) == ("failed", (second.nodes[1],))
    assert second.why == f"rank 1 on {second.nodes[1]} was killed by signal 9"
    assert third.outcome == "done"
    assert test.stage("dit")["failures"] == {lost: 1} | {second.nodes[1]: 1 + (lost == second.nodes[1])}
    same_curve_and_ledger(run, undisturbed)
    test.until("no process is left", lambda: not cluster.job_processes())
