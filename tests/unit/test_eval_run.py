"""`run_eval` end to end on a tiny model, and the ways to open one."""

import json
from pathlib import Path

import pytest
import torch

from data.digits import write_digits
from eval.config import EvalData, EvalRecipe, ReaderConfig
from eval.digit_reader import load_reader
from eval.errors import EvalError
from eval.held_out import load_held_out
from eval.model_io import open_model
from eval.pictures import load_tiles
from eval.run import run_eval
from eval.validation import fixed_times, validation_loss
from models.artifact import config_to_dict
from models.autoencoder import save_autoencoder
from models.pipeline import TextToImage
from tests.helpers.commits import write_commit
from tests.helpers.evaluations import oracle, tiny_pipeline

READER = ReaderConfig(num_pictures=512, epochs=4, batch_size=32)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    write_digits(str(root), num_train=512, num_test=48, num_combinations=24)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "artifact"
    tiny_pipeline().save(folder)
    return folder


def recipe(model: Path, digits: Path, **changes) -> EvalRecipe:
    sets = {name: str(digits / name) for name in ("train", "test", "combinations")}
    settings = {"num_prompts": 24, "num_steps": 1, "guidance_scale": 1.0, "num_validation": 20, "reader": READER}
    return EvalRecipe(**({"model": str(model), "data": EvalData(**sets)} | settings | changes))


def test_a_perfect_generator_reaches_the_upper_bound(model, digits, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(TextToImage, "generate", oracle(digits))
    lines: list[str] = []
    metrics = run_eval(recipe(model, digits), str(tmp_path / "eval"), lines.append)
    for name in ("count", "colour", "digit"):
        figures = metrics["prompt_following"][name]
        # Two held-out pictures may share a caption; otherwise the oracle answers with the very picture.
        assert figures["generated"] == pytest.approx(figures["real"], abs=0.1)
        assert figures["held_out_combinations"] == pytest.approx(figures["real_held_out_combinations"], abs=0.1)
    assert metrics["prompt_following"]["digit"]["real"] > 0.3  # a coarse reader, still far from chance
    assert metrics["fd_digits_cnn"] < metrics["fd_digits_cnn_of_training_pictures"] * 1.5
    assert metrics["fd_digits_cnn_protocol"]["num_reference"] == 24  # the held-out pictures that were read
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == metrics
    assert load_reader(tmp_path / "eval" / "reader").fingerprint == metrics["reader"]["fingerprint"]
    rows = [json.loads(line) for line in (tmp_path / "eval" / "prompts-combinations.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert set(rows[0]) == {"key", "prompt", "asked", "read", "right", "right_on_real"}
    real = load_held_out(str(digits / "test"), 32, 24)
    assert torch.equal(load_tiles(tmp_path / "eval" / "real-test.png", 24), real.pictures)
    assert any("fitting the reader" in line for line in lines)


def test_any_data_set_without_a_reader(model, digits, tmp_path) -> None:
    wanted = recipe(model, digits, data=EvalData(test=str(digits / "test")), reader=None, num_prompts=4)
    metrics = run_eval(wanted, str(tmp_path / "eval"))
    assert "prompt_following" not in metrics
    assert metrics["autoencoder"]["num_images"] == 20
    assert 0 < metrics["autoencoder"]["psnr_db"] < 40
    assert len(metrics["validation_loss"]) == 9
    assert load_tiles(tmp_path / "eval" / "generated-test.png", 4).shape == (4, 3, 32, 32)

    # The same again does nothing, by whatever path the same data are reached; another question is refused.
    before = (tmp_path / "eval" / "metrics.json").stat().st_mtime_ns
    assert run_eval(wanted, str(tmp_path / "eval")) == metrics
    link = tmp_path / "elsewhere"
    link.symlink_to(digits)
    moved = recipe(model, link, data=EvalData(test=str(link / "test")), reader=None, num_prompts=4)
    assert run_eval(moved, str(tmp_path / "eval")) == metrics
    assert (tmp_path / "eval" / "metrics.json").stat().st_mtime_ns == before
    other = recipe(model, digits, data=EvalData(test=str(digits / "test")), reader=None, num_prompts=5)
    with pytest.raises(EvalError, match="another evaluation"):
        run_eval(other, str(tmp_path / "eval"))
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "notes.txt").write_text("mine")
    with pytest.raises(EvalError, match="something else"):
        run_eval(wanted, str(tmp_path / "busy"))


def test_too_few_prompts_leave_nothing_behind(model, digits, tmp_path) -> None:
    with pytest.raises(EvalError, match="holds 48 usable samples, 60 are needed"):
        run_eval(recipe(model, digits, num_prompts=60), str(tmp_path / "eval"))
    assert list(tmp_path.iterdir()) == []


def test_the_validation_loss_depends_on_nothing_but_the_samples(model, digits) -> None:
    pipeline = open_model(str(model)).pipeline
    held_out = load_held_out(str(digits / "test"), 32, 12)
    whole = validation_loss(pipeline, held_out, batch_size=12)
    parts = validation_loss(pipeline, held_out, batch_size=5)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert validation_loss(pipeline, held_out, batch_size=12, seed=1) != whole
    assert whole["mean"] == pytest.approx(sum(whole[f"t={t:.4f}"] for t in fixed_times()) / 8)


def test_the_validation_loss_of_a_silent_network_is_the_target(model, digits) -> None:
    """With v_pred = 0 the loss is E|noise - latents|^2: one formula, nothing of the network."""
    pipeline = open_model(str(model)).pipeline
    held_out = load_held_out(str(digits / "test"), 32, 48)
    pipeline.dit.init_weights(0)  # adaLN-zero: v_pred = 0
    losses = validation_loss(pipeline, held_out, batch_size=16)
    images = held_out.pictures.float() / 127.5 - 1
    expected = 1 + float(pipeline.autoencoder.encode_latents(images.to(pipeline.device)).square().mean())
    assert losses["mean"] == pytest.approx(expected, rel=0.05)
    assert losses["t=0.0625"] == pytest.approx(losses["t=0.9375"], rel=1e-5)


def write_checkpoint(run: Path, step: int, pipeline: TextToImage, scale: float) -> Path:
    """A commit of weights and their average, in the pieces of two ranks."""
    parts = {
        "dit": config_to_dict(pipeline.dit.config),
        "diffusion": config_to_dict(pipeline.diffusion),
        "image_size": 32,
        "weights": "ema-0.9",
    }
    weights = pipeline.dit.state_dict()
    average = {name: tensor * scale for name, tensor in weights.items()}
    return write_commit(run / "checkpoints", step, {"model": weights, "ema-0.9": average}, {"pipeline": parts})


def test_a_run_is_opened_at_its_artifact_or_newest_good_checkpoint(tmp_path) -> None:
    pipeline, run = tiny_pipeline(), tmp_path / "run"
    run.mkdir()
    (run / "run.yaml").write_text("recipe: {checkpoint: {url: null}}\n")
    with pytest.raises(EvalError, match="neither an artifact nor a checkpoint"):
        (run / "checkpoints").mkdir()
        open_model(str(run))
    save_autoencoder(run / "frozen" / "autoencoder", pipeline.autoencoder)
    pipeline.conditioner.save(run / "frozen" / "text_encoders")
    older, newer = (write_checkpoint(run, step, pipeline, scale) for step, scale in ((4, 0.25), (8, 0.5)))
    name, weight = next(iter(pipeline.dit.state_dict().items()))

    opened = open_model(str(run))
    assert opened.weights == "ema-0.9 at step 8"
    torch.testing.assert_close(opened.pipeline.dit.state_dict()[name].cpu(), weight * 0.5)
    named = open_model(f"{older}/")
    torch.testing.assert_close(named.pipeline.dit.state_dict()[name].cpu(), weight * 0.25)
    assert named.fingerprint != opened.fingerprint

    damaged = next((newer / "a0").glob("ema*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    assert open_model(str(run)).weights == open_model(str(run / "checkpoints")).weights == "ema-0.9 at step 4"
    with pytest.raises(EvalError, match=r"SHA-256.*use another checkpoint"):
        open_model(str(newer))

    pipeline.save(run / "artifact")
    assert open_model(str(run)).weights == "artifact"


def test_what_is_no_model_is_named(tmp_path) -> None:
    with pytest.raises(EvalError, match="no run directory, checkpoint or artifact"):
        open_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(EvalError, match="export for diffusers"):
        open_model(str(tmp_path))
