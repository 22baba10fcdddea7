"""Submitting and following a pipeline, with stand-ins for SLURM's commands that note what they are asked."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch.attempts import Attempt, Record
from launch.cluster import Cluster
from launch.errors import ConfigError
from launch.pipeline import Pipeline, Stage
from launch.pipelines import StageStatus, cancel, load, logs, status, submit
from launch.slurm import Place
from launch.slurm_client import fate, lost_nodes

SBATCH = """
n=$(($(cat {0}/count 2>/dev/null || echo 0) + 1)); echo $n > {0}/count
echo "sbatch $*" >> {0}/asked; env | grep ^SBATCH_ >> {0}/asked
[ "$n" = "$(cat {0}/refuse 2>/dev/null)" ] && {{ echo "sbatch: error: no such partition" >&2; exit 1; }}
echo "10$n;cluster"
"""


NUMBERS = {"data": "101", "encode": "102", "dit": "103", "plots": "104"}


class Slurm:
    """Answers from files; keeps what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("sbatch", SBATCH.format(folder))
        for name in ("scancel", "scontrol"):
            self.write(name, f'echo "{name} $*" >> {folder}/asked; cat {folder}/{name}.says 2>/dev/null')
        for name in ("squeue", "sinfo"):
            self.write(name, f"cat {folder}/{name}.says 2>/dev/null")

    def write(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{body}\nexit 0\n")
        path.chmod(0o755)

    def says(self, name: str, text: str) -> None:
        (self.folder / f"{name}.says").write_text(text)

    def asked(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Slurm(folder)


def pipeline(folder: Path, **stages: Any) -> Pipeline:
    stages = stages or {
        "data": Stage(run="data digits x"),
        "encode": Stage(run="encode e", array=2),
        "dit": Stage(run="train dit d", nodes=2),
        "plots": Stage(run="report x", after=("data",)),
    }
    return Pipeline(name="p", folder=str(folder), stages=stages)


def place(folder: Path) -> Place:
    return Place(working_folder=folder, darkroom="/opt/darkroom")


def ended(root: Path, stage: str, outcome: Any, failed: tuple[str, ...] = (), job: str = "1-0") -> None:
    record = Record(root / stage)
    record.start(Attempt(id=job, nodes=("n1", "n2"), started_s=1.0, progress=0))
    record.end(job, outcome, "why", failed, 7)


def test_a_chain(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "wrong")  # would win over the script
    root = tmp_path / "p"
    assert submit(pipeline(root), Cluster(), place(tmp_path)) == NUMBERS
    assert slurm.asked() == [
        f"sbatch --parsable {root}/data/job.sh",
        f"sbatch --parsable --dependency=afterok:101 {root}/encode/job.sh",
        f"sbatch --parsable --dependency=afterok:102 {root}/dit/job.sh",
        f"sbatch --parsable --dependency=afterok:101 {root}/plots/job.sh",
    ]
    assert load(root) == pipeline(root)
    assert json.loads((root / "jobs.json").read_text()) == NUMBERS


def test_what_is_done_is_not_submitted_again(slurm: Slurm, tmp_path: Path) -> None:
    root = tmp_path / "p"
    submit(pipeline(root), Cluster(), place(tmp_path))
    ended(root, "data", "done")
    ended(root, "encode/0", "done")  # one of two
    ended(root, "dit", "failed", ("n7",))
    ended(root, "dit", "failed", ("n7",), "1-1")
    slurm.says("squeue", "103|PENDING|Resources|\n")
    with pytest.raises(ConfigError, match=r"dit of .* is pending as job 103; `darkroom launch status"):
        submit(pipeline(root), Cluster(), place(tmp_path))
    slurm.says("squeue", "")
    before = len(slurm.asked())
    assert list(submit(pipeline(root), Cluster(), place(tmp_path))) == ["encode", "dit", "plots"]
    assert slurm.asked()[before:] == [
        f"sbatch --parsable {root}/encode/job.sh",
        f"sbatch --parsable --dependency=afterok:105 --exclude=n7 {root}/dit/job.sh",
        f"sbatch --parsable {root}/plots/job.sh",
    ]


def test_half_a_chain_is_taken_back(slurm: Slurm, tmp_path: Path) -> None:
    (slurm.folder / "refuse").write_text("3")
    with pytest.raises(ConfigError, match="sbatch: sbatch: error: no such partition"):
        submit(pipeline(tmp_path / "p"), Cluster(), place(tmp_path))
    assert slurm.asked()[-1] == "scancel --quiet 101 102"


def test_variables_to_pass_on_must_be_there(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_THERE", raising=False)
    with pytest.raises(ConfigError, match="pass_environment names NOT_THERE, which is not set here"):
        submit(pipeline(tmp_path / "p"), Cluster(pass_environment=("HOME", "NOT_THERE")), place(tmp_path))
    assert slurm.asked() == [] and not (tmp_path / "p").exists()


def test_where_the_stages_stand(slurm: Slurm, tmp_path: Path) -> None:
    root = tmp_path / "p"
    submit(pipeline(root), Cluster(), place(tmp_path))
    ended(root, "data", "done")
    for task in range(2):
        ended(root, f"encode/{task}", "done")
    ended(root, "dit", "lost", ("n2",), "103-0")
    Record(root / "dit").start(Attempt(id="103-1", nodes=("n1", "n3"), started_s=2.0, progress=7))
    slurm.says("squeue", "103|RUNNING|None|n[1,3]\n104|PENDING|Dependency|\n")
    rows = {row.stage: row for row in status(root)}
    assert [row.state for row in rows.values()] == ["done", "done", "running", "pending"]
    assert rows["encode"].progress == 2 and rows["plots"].why == "Dependency"
    assert rows["dit"] == StageStatus(
        stage="dit",
        job="103",
        state="running",
        attempts=2,
        progress=7,
        nodes="n[1,3]",
        why="lost: why",
        failures={"n2": 1},
        excluded=(),
    )
    assert cancel(root) == ["dit", "plots"] and slurm.asked()[-1] == "scancel --quiet 103 104"
    slurm.says("squeue", "")
    rows = {row.stage: row for row in status(root)}
    assert (rows["dit"].state, rows["plots"].state) == ("failed", "not started")
    assert cancel(root) == []


def test_logs(slurm: Slurm, tmp_path: Path) -> None:
    root = tmp_path / "p"
    with pytest.raises(ConfigError, match="holds no pipeline.yaml"):
        logs(root, None)
    submit(pipeline(root), Cluster(), place(tmp_path))
    with pytest.raises(ConfigError, match="has not written a log yet"):
        logs(root, "dit")
    with pytest.raises(ConfigError, match="has no stage 'dat'; there are data, encode"):
        logs(root, "dat")
    for name in ("log-0.txt", "log-1.txt"):
        (root / "encode" / name).write_text("x")
    assert [path.name for path in logs(root, None)] == ["log-0.txt", "log-1.txt"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("JobId=7 Restarts=2 JobState=COMPLETING Reason=None", "requeued"),
        ("JobId=7 Restarts=1 JobState=COMPLETING Reason=TimeLimit", "time limit"),
        ("JobId=7 Restarts=1 JobState=COMPLETING Reason=None", "cancelled"),
        ("JobId=7 Restarts=1 JobState=RUNNING Reason=None", "running"),
    ],
)
def test_what_slurm_does_with_a_job(slurm: Slurm, said: str, expected: str) -> None:
    slurm.says("scontrol", said)
    assert fate("7", 1) == expected


def test_which_nodes_are_lost(slurm: Slurm) -> None:
    slurm.says("sinfo", "n1 idle\nn2 down*\nn3 mix*\nn4 drain\nn5 alloc\n")
    assert lost_nodes(["n1", "n2", "n3", "n4", "n5"]) == ("n2", "n3")


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not installed here; give the command where SLURM's are"):
        submit(pipeline(tmp_path / "p"), Cluster(), place(tmp_path))
