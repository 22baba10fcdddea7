"""Pipelines on a real cluster: the demo's chain, bad nodes, mistakes, giving up, other numbers of nodes, torchrun."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.config_io import dump_yaml
from tests.helpers.command import darkroom
from tests.helpers.slurm_cluster import SlurmCluster
from tests.helpers.slurm_pipelines import Launched, rows
from training.metrics import read_metrics

pytestmark = pytest.mark.all


def wrapper(path: Path, body: str) -> Path:
    """A `darkroom` command in which something goes wrong."""
    from launch.cli_common import darkroom_command

    path.write_text(f'#!/bin/bash\n{body}\nexec {darkroom_command()} "$@"\n')
    path.chmod(0o755)
    return path


def short(recipe: Path, run: Path, *overrides: str) -> str:
    return f"train dit {recipe} --run {run} {' '.join(overrides)}"


def test_the_demo_on_two_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The recipe that comes with Darkroom, with a smaller model and less data: six stages, one command."""
    demo = tmp_path / "demo"
    at = f"{demo}"
    small = " ".join(
        (
            "model.depth=2 model.width=32 model.num_heads=2 total_steps=12 log_every_steps=1 checkpoint.every_steps=6",
            "schedule.warmup_steps=2 samples.every_steps=12 samples.num_steps=2",
        )
    )
    runs = {
        "data": f"data digits {at}/data --train 256 --test 32 --combinations 32",
        "autoencoder": f"train autoencoder digits-autoencoder --run {at}/autoencoder data.shards={at}/data/train "
        f"validation_shards={at}/data/test total_steps=8 statistics_images=64 loss.disc_start_step=4 "
        "schedule.warmup_steps=2 sample_every_steps=8 data.shuffle_chunk_samples=64",
        "encode": f"encode digits-encode shards={at}/data/train out={at}/encoded autoencoder={at}/autoencoder",
        "dit": f"train dit digits-dit --run {at}/dit data.shards={at}/encoded autoencoder={at}/autoencoder {small}",
        "eval": f"eval digits-eval --out {at}/dit/eval model={at}/dit data.train={at}/data/train "
        f"data.test={at}/data/test data.combinations={at}/data/combinations num_prompts=8 num_steps=2 "
        "reader.num_pictures=256 reader.epochs=1",
        "export": f"export {at}/dit --out {at}/export --steps 2",
    }
    test = Launched(cluster, tmp_path / "site", {"unused": {"run": "report x"}})
    test.root = tmp_path / "launch"
    overrides = [f"stages.{name}.run={json.dumps(run)}" for name, run in runs.items()]
    command = ("launch", "slurm", "digits-pipeline", "--cluster", test.site, f"folder={test.root}", *overrides)
    shown = test.darkroom(*command, "--dry-run")
    assert shown.code == 0 and shown.out.count("#!/bin/bash") == 6 and not test.root.exists()
    submitted = test.darkroom(*command, "--json")
    assert submitted.code == 0, submitted.err
    assert list(json.loads(submitted.out)["jobs"]) == list(runs)
    again = test.darkroom(*command)
    assert again.code == 2 and "`darkroom launch cancel" in again.err
    assert cluster.job(test.job("dit"))["Dependency"].startswith(f"afterok:{test.job('encode')}")

    done = test.until_over("export", limit_s=500)
    assert done["state"] == "done", test.log("export")
    stages = json.loads(test.darkroom("launch", "status", test.root, "--json").out)["stages"]
    assert [(row["stage"], row["state"], row["attempts"]) for row in stages] == [
        *(("data", "done", 1), ("autoencoder", "done", 1), ("encode", "done", 2)),  # one of each task of the array
        *(("dit", "done", 1), ("eval", "done", 1), ("export", "done", 1)),
    ]
    assert len(test.attempts("dit")[0].nodes) == 2
    checks = [json.loads(path.read_text()) for path in (test.root / "dit").glob("attempt-*/check-*.json")]
    assert len(checks) == 2 and all(check["all_reduce_gb_s"] > 0 for check in checks)
    state = json.loads(darkroom("data", "ledger", demo / "dit", "--json").out)
    assert [attempt["world_size"] for attempt in state["attempts"]] == [2]
    assert (demo / "dit" / "eval" / "metrics.json").exists() and (demo / "export" / "model_index.json").exists()
    assert "is finished at step 12" in test.darkroom("launch", "logs", test.root, "dit").out
    once_more = test.darkroom(*command)
    assert once_more.code == 0 and "every stage is done" in once_more.out


def test_a_bad_node_is_left_out(launched: Callable[..., Launched], long_recipe: Path, tmp_path: Path) -> None:
    """Its check fails before training starts: named, excluded, and the job goes on elsewhere."""
    broken = wrapper(
        tmp_path / "darkroom",
        '[ "$SLURMD_NODENAME $2" = "n1 check-node" ] && export TMPDIR=/nowhere',
    )
    run = tmp_path / "run"
    stage = {"run": short(long_recipe, run, "total_steps=4", "samples.every_steps=4"), "nodes": 2}
    test = launched({"dit": stage}, darkroom=str(broken))
    test.submit()
    assert test.until_over("dit")["state"] == "done"
    first, second = test.attempts("dit")
    assert (first.outcome, first.nodes, first.failed_nodes) == ("bad nodes", ("n1", "n2"), ("n1",))
    assert (second.outcome, second.nodes) == ("done", ("n2", "n3"))
    status = test.stage("dit")
    assert status["excluded"] == ["n1"] and status["failures"] == {"n1": 1}
    assert "preflight: n1: /nowhere (temporary files): No such file or directory" in test.log("dit")
    assert "excluded: n1" in test.darkroom("launch", "status", test.root).out


def test_mistakes_end_and_failures_end_after_a_while(launched: Callable[..., Launched], tmp_path: Path) -> None:
    failing = wrapper(tmp_path / "darkroom", '[ "$1 $2 $4" = "launch task export" ] && exit 3')
    test = launched(
        {
            "mistake": {"run": "data ls /nowhere"},
            "later": {"run": "data ls /nowhere"},
            "failing": {"run": "export a --out b", "after": []},
        },
        darkroom=str(failing),
        requeue={"give_up_after": 2, "backoff_s": 1},
    )
    test.submit()
    mistake, later, failing_stage = (test.until_over(name) for name in ("mistake", "later", "failing"))
    assert (mistake["state"], mistake["attempts"]) == ("failed", 1) and "exit code 2" in mistake["why"]
    assert "darkroom launch: error: /nowhere" in test.log("mistake")
    assert (later["state"], later["attempts"]) == ("not started", 0) and "an earlier stage" in later["why"]
    assert (failing_stage["state"], failing_stage["attempts"]) == ("failed", 2)
    assert "2 attempts in a row without a new checkpoint" in test.log("failing")
    assert test.cluster.job(test.job("mistake"))["ExitCode"] == "2:0"


def test_tasks_of_an_array_are_queued_again_one_by_one(launched: Callable[..., Launched], tmp_path: Path) -> None:
    """Task 2, which SLURM gives the array's own number, fails once and task 0 twice; nobody else is disturbed."""
    failing = 'case "$SLURM_ARRAY_TASK_ID/$SLURM_RESTART_COUNT" in 0/|0/1|2/) exit 3;; *) exit 0;; esac'
    body = f'if [ "$1 $2 $4" = "launch task encode" ]; then {failing}; fi'
    test = launched({"encode": {"run": "encode x", "array": 3}}, darkroom=str(wrapper(tmp_path / "darkroom", body)))
    test.submit()
    test.until("it is done", lambda: test.stage("encode")["state"] == "done")
    tries = [[attempt.outcome for attempt in test.attempts(f"encode/{task}")] for task in range(3)]
    assert tries == [["failed", "failed", "done"], ["done"], ["failed", "done"]]


def test_cancel_and_go_on(launched: Callable[..., Launched], long_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    test = launched({"dit": {"run": short(long_recipe, run), "nodes": 2}, "report": {"run": f"report {run}"}})
    test.submit()
    test.until("it trains", lambda: rows(run) >= 10)
    cancelled = test.darkroom("launch", "cancel", test.root)
    assert cancelled.code == 0 and cancelled.out == "cancelled: dit, report\n"
    test.until("nothing is left", lambda: not test.cluster.job_processes())
    test.until_over("dit")
    assert [test.stage(name)["state"] for name in ("dit", "report")] == ["failed", "not started"]
    assert test.attempts("dit")[0].outcome == "cancelled"
    before = max(row["step"] for row in read_metrics(run / "metrics.jsonl"))

    changed = test.pipeline.read_text().replace(str(long_recipe), f"{long_recipe} total_steps={before + 2}")
    test.pipeline.write_text(changed)
    test.submit()
    assert test.until_over("report")["state"] == "done", test.log("dit")
    assert f"resuming {run} at step {before}" in test.log("dit")


def test_fewer_nodes_and_torchrun(
    launched: Callable[..., Launched], cluster: SlurmCluster, long_recipe: Path, tmp_path: Path
) -> None:
    """Two nodes with one torchrun each, then two ranks on the only node that is left: the same curve."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    steps = ("total_steps=200", "samples.every_steps=200")
    stage = {"run": short(long_recipe, run, *steps), "nodes": 2, "min_nodes": 1, "ranks_per_node": 2}
    test = launched({"dit": stage}, tasks="node", cpus_per_rank=1)
    test.submit()
    test.until("it trains", lambda: rows(run) >= 20)
    cluster.run("scontrol", "update", "NodeName=n2,n3", "State=DRAIN", "Reason=test")
    try:
        cluster.run("scancel", "--signal=USR1", str(test.job("dit")))
        assert test.until_over("dit")["state"] == "done"
    finally:
        cluster.run("scontrol", "update", "NodeName=n2,n3", "State=RESUME")
    first, second = test.attempts("dit")
    assert (first.outcome, first.why, len(first.nodes)) == ("preempted", "SIGUSR1: saved", 2)
    assert (second.outcome, second.nodes, second.progress) == ("done", ("n1",), first.progress_after)
    attempts = json.loads(darkroom("data", "ledger", run, "--json").out)["attempts"]
    assert [attempt["world_size"] for attempt in attempts] == [4, 2]
    done = darkroom("train", "dit", long_recipe, "--run", alone, *steps, "--nproc", 2)
    assert done.code == 0, done.err
    for mine, theirs in zip(read_metrics(run / "metrics.jsonl"), read_metrics(alone / "metrics.jsonl"), strict=True):
        assert mine["step"] == theirs["step"] and mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_doctor_of_the_cluster(cluster: SlurmCluster, tmp_path: Path) -> None:
    test = Launched(cluster, tmp_path, {"unused": {"run": "report x"}})
    done = test.darkroom("doctor", "--cluster", "--cluster-file", test.site, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"nodes": ["n1", "n2", "n3"], "bad": {}}
    site = test.site.read_text() + dump_yaml({"darkroom": str(wrapper(tmp_path / "d", "TMPDIR=/$SLURMD_NODENAME"))})
    test.site.write_text(site)
    done = test.darkroom("doctor", "--cluster", "--cluster-file", test.site)
    assert done.code == 2 and "3 of 3 nodes should not be used: n1, n2, n3" in done.err
