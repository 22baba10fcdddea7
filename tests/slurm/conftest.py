"""A cluster of three nodes for all tests, and pipelines on it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny
from tests.helpers.command import write_recipe
from tests.helpers.slurm_cluster import SlurmCluster, until, why_absent
from tests.helpers.slurm_pipelines import Launched
from training.checkpoint import CheckpointConfig
from training.config import SamplesConfig


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    if absent := why_absent():
        pytest.skip(absent)
    with SlurmCluster(3) as started:
        yield started


@pytest.fixture(scope="session")
def long_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small steps, a checkpoint every fifty: long enough to be hit in the middle."""
    folder = tmp_path_factory.mktemp("slurm")
    data, autoencoder = tiny.digits(folder / "data"), tiny.autoencoder_artifact(folder / "autoencoder")
    recipe = tiny.dit_recipe(
        data,
        autoencoder,
        text_encoders=tiny.ENCODERS[:1],
        checkpoint=CheckpointConfig(every_steps=50, keep_last=2),
        samples=SamplesConfig(every_steps=1500, prompts=("a one",), num_steps=1),
        total_steps=1500,  # longer than SLURM takes to give up a node, on a fast machine too
    )
    return write_recipe(folder / "dit.yaml", "dit", recipe)


@pytest.fixture
def launched(cluster: SlurmCluster, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    made: list[Launched] = []

    def launch(stages: dict[str, dict[str, Any]], **site: Any) -> Launched:
        made.append(Launched(cluster, tmp_path, stages, **site))
        return made[-1]

    yield launch
    for one in made:
        if (one.root / "jobs.json").exists():
            one.darkroom("launch", "cancel", one.root)
            until("its jobs are over", lambda one=one: not cluster.run("squeue", "-h", check=False).strip())
