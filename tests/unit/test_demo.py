"""The demo's chain: its commands fit the recipes, what is done stays, the summary says what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch import demo
from launch.config_io import load_recipe

METRICS = {
    "prompt_following": {
        "colour": {"generated": 0.99, "held_out_combinations": 0.95, "real": 1.0, "real_held_out_combinations": 0.99},
        "digit": {"generated": 0.80, "held_out_combinations": 0.75, "real": 0.95, "real_held_out_combinations": 0.94},
        "count": {"generated": 1.0, "held_out_combinations": 0.99, "real": 1.0, "real_held_out_combinations": 1.0},
    },
    "autoencoder": {"psnr_db": 27.5},
    "fd_digits_cnn": 1.25,
}


class Commands:
    """Stands in for `darkroom`: each command leaves its stage's result, or fails."""

    def __init__(self, folder: Path) -> None:
        self.chain = {stage.arguments: stage for stage in demo.stages(folder, 2, {})}
        self.ran: list[str] = []
        self.failing = ""

    def __call__(self, argv: list[str]) -> int:
        arguments = tuple(
            argv[next(i for i, part in enumerate(argv) if part in ("data", "train", "eval", "export", "report")) :]
        )
        stage = self.chain[arguments]
        self.ran.append(stage.name)
        if stage.name == self.failing:
            return 75
        stage.result.parent.mkdir(parents=True, exist_ok=True)
        stage.result.write_text(json.dumps(METRICS) if stage.name == "eval" else "")
        return 0


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    fake = Commands(tmp_path)
    monkeypatch.setattr(demo, "run_command", fake)
    return fake


def test_a_stopped_demo_goes_on_where_it_was(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.failing = "dit"
    assert demo.main(["--dir", str(tmp_path), "--nproc", "2"]) == 75
    assert commands.ran == ["data", "autoencoder", "dit"]
    assert "the same command goes on from here" in capsys.readouterr().err
    commands.failing, commands.ran = "", []
    assert demo.main(["--dir", str(tmp_path), "--nproc", "2"]) == 0
    assert commands.ran == ["dit", "eval", "export", "report"]
    printed = capsys.readouterr().out
    assert "[1/6] data: done before" in printed
    assert printed.rstrip().endswith(f"report: {tmp_path / 'report.html'}")
    commands.ran = []
    assert demo.main(["--dir", str(tmp_path), "--nproc", "2"]) == 0
    assert commands.ran == [], "a finished demo says what was measured"
    assert "digit generated" in capsys.readouterr().out


def test_the_summary_holds_metrics_and_seconds(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--dir", str(tmp_path), "--nproc", "2"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {key: summary[key] for key in METRICS} == METRICS
    assert list(summary["seconds"]) == ["data", "autoencoder", "dit", "eval", "export", "report"]
    lines = capsys.readouterr().out.splitlines()
    (digit,) = [line for line in lines if "digit generated" in line]
    assert "80.0%" in digit and "wanted 85%" in digit and "real pictures 95.0%" in digit and "NOT REACHED" in digit
    (combinations,) = [line for line in lines if "digit held out combinations" in line]
    assert "75.0%" in combinations and "real pictures 94.0%" in combinations and "NOT" not in combinations
    assert any("27.5 dB" in line for line in lines)


def test_an_unknown_stage_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert demo.main(["--dir", str(tmp_path / "x"), "--set", "tid", "total_steps=1"]) == 2
    assert capsys.readouterr().err == "error: --set tid: no such stage; there are data, autoencoder, dit, eval\n"
    assert not (tmp_path / "x").exists()


def test_the_chain_fits_its_recipes(tmp_path: Path) -> None:
    from eval.config import EvalRecipe
    from training.config import AutoencoderRecipe, DiTRecipe

    schemas = {"autoencoder": AutoencoderRecipe, "dit": DiTRecipe, "eval": EvalRecipe}
    recipes: dict[str, Any] = {}
    chain = {stage.name: stage for stage in demo.stages(tmp_path, 2, {"dit": ["total_steps=7"]})}
    for name in ("autoencoder", "dit", "eval"):
        overrides = [part for part in chain[name].arguments if "=" in part]
        recipe_name = next(part for part in chain[name].arguments if part.startswith("digits-"))
        _, recipes[name] = load_recipe(recipe_name, overrides, schemas)
    assert recipes["dit"].total_steps == 7
    assert recipes["dit"].engine.zero_stage == 2
    assert recipes["dit"].autoencoder == str(chain["autoencoder"].result.parent)
    assert recipes["eval"].model == str(chain["dit"].result.parent)
    assert recipes["eval"].data.test == recipes["autoencoder"].validation_shards
    for name in ("autoencoder", "dit"):
        recipes[name].engine.accumulation_steps(2)  # two ranks divide the global batch
        assert recipes[name].data.num_streams % 2 == 0


def test_one_gpu_gets_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, expected in ((0, 2), (1, 1), (2, 2), (8, 2)):
        monkeypatch.setattr(demo, "gpu_count", lambda gpus=gpus: gpus)
        assert demo.default_nproc() == expected
