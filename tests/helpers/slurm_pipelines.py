"""Pipelines on the cluster of slurm_cluster.py, driven by the command line alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.attempts import Attempt, Record
from launch.config_io import dump_yaml
from tests.helpers.command import ROOT, Result, darkroom
from tests.helpers.slurm_cluster import SlurmCluster, until

CANARY = "canary-5up3r-53cr3t"


class Launched:
    """A pipeline in a folder of its own, driven by the command line alone."""

    def __init__(self, cluster: SlurmCluster, folder: Path, stages: dict[str, dict[str, Any]], **site: Any) -> None:
        self.cluster, self.folder, self.root = cluster, folder, folder / "launch"
        folder.mkdir(exist_ok=True)
        self.site = folder / "site.yaml"
        facts: dict[str, Any] = {
            "partition": "train",
            "network_interface": "lo",
            "save_s": 20,
            "environment": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            "requeue": {"backoff_s": 1},
            # Nodes that share cores tell nothing of each other's speed.
            "preflight": {"max_slowdown": 100.0, "min_free_gib": 0.01, "store": str(folder / "store")},
        }
        self.site.write_text(dump_yaml(facts | site))
        self.pipeline = folder / "pipeline.yaml"
        stages = {name: {"time": "00:30:00", **stage} for name, stage in stages.items()}
        values = {"kind": "pipeline", "name": "test", "folder": str(self.root), "stages": stages}
        self.pipeline.write_text(dump_yaml(values))

    def darkroom(self, *words: object) -> Result:
        return darkroom(*words, env={**self.cluster.env, "AWS_SECRET_ACCESS_KEY": CANARY, "AWS_ACCESS_KEY_ID": CANARY})

    def submit(self) -> None:
        done = self.darkroom("launch", "slurm", self.pipeline, "--cluster", self.site)
        assert done.code == 0, done.err

    def stage(self, name: str) -> dict[str, Any]:
        done = self.darkroom("launch", "status", self.root, "--json")
        assert done.code == 0, done.err
        return next(row for row in json.loads(done.out)["stages"] if row["stage"] == name)

    def job(self, name: str) -> int:
        return int(json.loads((self.root / "jobs.json").read_text())[name])

    def attempts(self, name: str) -> list[Attempt]:
        return Record(self.root / name).attempts()

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in (self.root / name).glob("log*.txt"))

    def pids(self, name: str, node: str = "") -> list[int]:
        """The job's processes of the command itself, on a node or on all."""
        found = []
        for pid in self.cluster.job_processes():
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURM_JOB_ID={self.job(name)}".encode() not in words or not any(w.startswith(b"RANK=") for w in words):
                continue
            if not node or f"SLURMD_NODENAME={node}".encode() in words:
                found.append(pid)
        return found

    def until(self, what: str, check: Callable[[], object], limit_s: float = 150.0) -> object:
        try:
            return until(what, check, limit_s)
        except AssertionError:
            print("\n".join(path.read_text() for path in self.root.glob("*/log*.txt")))
            print("\n".join(path.read_text() for path in self.root.glob("*/attempts.jsonl")))
            print(self.cluster.run("squeue", "-a", check=False), self.cluster.run("sinfo", "-N", "-l", check=False))
            raise

    def until_over(self, name: str, limit_s: float = 300.0) -> dict[str, Any]:
        """Waits until a stage is done or has failed; its last status."""
        self.until(f"{name} is over", lambda: self._over(name), limit_s)
        return self.stage(name)

    def _over(self, name: str) -> bool:
        state = self.cluster.job(self.job(name)).get("JobState", "")
        return state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def rows(run: Path) -> int:
    """Steps that a run has logged."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
