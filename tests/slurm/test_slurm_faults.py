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


def train(recipe: Path, run: object, **more: object) -> dict[str, dict[str, object]]:
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
    cluster.limit(job, "00:01:00")  # less than a minute is left: at once
    test.until("the first attempt has ended", lambda: test.attempts("dit")[0].outcome)
    cluster.limit(job, "00:30:00")
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


@pytest.mark.parametrize("place", [0, 1])
def test_lost_node(
    place: int, launched: Callable[..., Launched], cluster: SlurmCluster, long_recipe: Path, undisturbed: Path
) -> None:
    """kill -9 of a slurmd, the first node's or the other's: resumed elsewhere, and what it leaves behind ends."""
    run = long_recipe.with_name(f"lost-{place}")
    test = launched(train(long_recipe, run))
    test.submit()
    test.until("it has a checkpoint", lambda: rows(run) >= 70)
    lost = test.attempts("dit")[0].nodes[place]
    orphans = test.pids("dit", lost)
    assert orphans
    cluster.kill_node(lost)
    test.until("another has begun", lambda: len(test.attempts("dit")) == 2)
    try:
        test.until("nothing of the lost node's is left", lambda: not any(map(alive, orphans)))
        first, second = test.attempts("dit")
        assert (first.outcome, first.failed_nodes) == ("lost", (lost,)) and first.why.startswith(f"SLURM lost {lost}")
        assert lost not in second.nodes and (second.progress or 0) >= 50
        assert test.until_over("dit")["state"] == "done"
    finally:
        cluster.start_node(lost)
    assert [attempt.outcome for attempt in test.attempts("dit")] == ["lost", "done"]
    assert test.stage("dit")["failures"] == {lost: 1}
    same_curve_and_ledger(run, undisturbed)
    test.until("no process is left", lambda: not cluster.job_processes())


def test_killed_rank(
    launched: Callable[..., Launched], cluster: SlurmCluster, long_recipe: Path, undisturbed: Path
) -> None:
    """kill -9 of a rank: all end within seconds, its node is named and left out, and the next attempt resumes."""
    run = long_recipe.with_name("killed")
    test = launched(train(long_recipe, run), requeue={"backoff_s": 1, "exclude_node_after": 1})
    test.submit()
    test.until("it has a checkpoint", lambda: rows(run) >= 70)
    first = test.attempts("dit")[0]
    ranks = test.pids("dit")
    victim = next(
        pid
        for pid in test.pids("dit", first.nodes[1])
        if b"launch\0task" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(victim, signal.SIGKILL)
    test.until("the whole step has ended", lambda: not any(map(alive, ranks)), limit_s=20)
    assert test.until_over("dit")["state"] == "done"
    first, second = test.attempts("dit")
    assert (first.outcome, first.failed_nodes) == ("failed", (first.nodes[1],))
    assert first.why == f"rank 1 on {first.nodes[1]} was killed by signal 9"
    assert second.outcome == "done" and (second.progress or 0) >= 50
    assert first.nodes[1] not in second.nodes and test.stage("dit")["excluded"] == [first.nodes[1]]
    same_curve_and_ledger(run, undisturbed)
    test.until("no process is left", lambda: not cluster.job_processes())


def test_a_limit_without_a_signal_before_it(launched: Callable[..., Launched], long_recipe: Path) -> None:
    """The limit itself ends the job; it is queued again all the same."""
    run = long_recipe.with_name("overrun")
    test = launched(train(long_recipe, f"{run} total_steps=9000"), sbatch_options=["--signal=CONT@1"])
    test.submit()
    test.until("it trains", lambda: rows(run) >= 20)
    test.cluster.limit(test.job("dit"), "00:01:00")
    test.until("the first attempt has ended", lambda: test.attempts("dit")[0].outcome)
    test.cluster.limit(test.job("dit"), "00:30:00")
    test.until("another has begun", lambda: len(test.attempts("dit")) == 2)
    first, second = test.attempts("dit")
    assert (first.outcome, first.why) == ("preempted", "SIGTERM: saved")
    assert second.progress == first.progress_after and (second.progress or 0) >= 20
