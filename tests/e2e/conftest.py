"""What the end-to-end tests share: a small data set and an autoencoder artifact."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.command import write_recipe


@dataclass(frozen=True)
class World:
    """Paths of what a diffusion run needs."""

    folder: Path
    data: Path
    autoencoder: Path
    dit: Path
    autoencoder_recipe: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    data = tiny.digits(folder / "data")
    autoencoder = tiny.autoencoder_artifact(folder / "autoencoder")
    return World(
        folder=folder,
        data=data,
        autoencoder=autoencoder,
        dit=write_recipe(folder / "dit.yaml", "dit", tiny.dit_recipe(data, autoencoder)),
        autoencoder_recipe=write_recipe(folder / "autoencoder.yaml", "autoencoder", tiny.autoencoder_recipe(data)),
    )
