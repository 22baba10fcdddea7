"""Two ranks that share a place for checkpoints and no disk, as on two machines."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.runtime import free_port
from tests.helpers import tiny
from tests.helpers.command import ROOT, write_recipe
from tests.helpers.runs import curve


def train(recipe: Path, runs: list[Path], *overrides: str) -> list[str]:
    """One rank per run directory; what each wrote to stderr."""
    world = {"WORLD_SIZE": str(len(runs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = {**os.environ, **world, "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", "launch.cli", "train", "dit", str(recipe), *overrides, "--run"]
    ranks = [
        subprocess.Popen([*command, str(run)], env=env | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank, run in enumerate(runs)
    ]
    told = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    return told


@pytest.mark.all
def test_machines_without_a_common_disk_may_change_places(world, tmp_path):
    recipe = tiny.dit_recipe(world.data, world.autoencoder)
    shared = replace(recipe.checkpoint, url=str(tmp_path / "bucket"))
    path = write_recipe(tmp_path / "dit.yaml", "dit", replace(recipe, checkpoint=shared))
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    train(path, [one, two])
    assert (two / "run.yaml").read_bytes() == (one / "run.yaml").read_bytes()
    assert not (two / "metrics.jsonl").exists()
    told = train(path, [two, three], "total_steps=10")
    assert f"resuming {two} at step 8" in told[0]
    assert [row["step"] for row in curve(two)] == list(range(1, 11))
    assert curve(two)[:8] == curve(one)
