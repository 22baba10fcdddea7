"""Two real ranks that are alike where they must differ: every one of them ends with the same line, and saves nothing."""

import json
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.warm_ranks import run_ranks
from training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    tiny.digits(folder / "data")
    tiny.autoencoder_artifact(folder / "autoencoder")
    result = run_ranks(2, ROOT / "tests" / "helpers" / "broken_ranks.py", folder)
    assert result.code == 0, result.err
    return folder


@pytest.mark.parametrize(
    "fault, message",
    [
        ("same seed", "ranks 0 and 1 drew the same noise for different samples: their seed is the same"),
        ("same times", "ranks 0 and 1 drew the same times"),
        ("same data", "ranks 0 and 1 train on the same samples: the loader gave them one share of the data"),
        ("half on one", "text encoder t5: its weights are float16 where the recipe says float32"),
    ],
)
def test_a_fault_ends_both_ranks_with_its_name(world, fault, message):
    first, second = (json.loads((world / f"told-{rank}.json").read_text())[fault] for rank in (0, 1))
    assert first == second
    assert first.startswith(message) and first.endswith(f"(step 1 of {world / fault})")
    (row,) = read_metrics(world / fault / "metrics.jsonl")
    assert any(message in line for line in row["errors"])
    assert not list(world.glob(f"{fault}/checkpoints/*/manifest.json"))


def test_what_makes_every_step_bad_is_named_before_a_roll_back(world):
    first, second = (json.loads((world / f"told-{rank}.json").read_text())["nan on one"] for rank in (0, 1))
    assert first == second
    assert first.startswith("text encoder t5: its features are not finite")
    assert first.endswith(f"(step 2 of {world / 'nan on one'})")


def test_without_a_fault_nobody_complains(world):
    assert json.loads((world / "told-0.json").read_text())["none"] == ""
    rows = read_metrics(world / "none" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all("errors" not in row and "warnings" not in row for row in rows)
    assert rows[-1]["noise_compared"] == 4 * 2 * 2
