"""Text to pictures, saved and loaded, and equal to the exported StableDiffusion3Pipeline."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import export as export_module
from models.autoencoder import Autoencoder, AutoencoderConfig, save_autoencoder
from models.diffusion import DiffusionConfig
from models.dit import DiT, DiTConfig
from models.errors import ModelError
from models.export import export_diffusers
from models.pipeline import TextToImage
from models.text_encoder import Conditioner, TextEncoderConfig

CLIP_A = TextEncoderConfig(name="clip_a", kind="clip", max_tokens=8, seed=1, width=16, layers=2, heads=2, embed_dim=12)
CLIP_B = TextEncoderConfig(name="clip_b", kind="clip", max_tokens=8, seed=2, width=8, layers=3, heads=2, embed_dim=4)
T5 = TextEncoderConfig(name="t5", kind="t5", max_tokens=6, seed=3, width=32, layers=1, heads=2, vocab_size=400)
AUTOENCODER = AutoencoderConfig(latent_channels=3, channels=(8, 8), res_blocks_per_level=1, norm_groups=4)
PROMPTS, SEEDS = ["a red seven", "a blue cat", ""], [5, 6, 5]


def make_autoencoder(seed: int = 0) -> Autoencoder:
    autoencoder = Autoencoder(AUTOENCODER)
    autoencoder.init_weights(seed)
    autoencoder.set_statistics(torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 0.8, 1.2]))
    return autoencoder.eval()


def make(*encoders: TextEncoderConfig) -> TextToImage:
    conditioner = Conditioner(encoders or (CLIP_A, CLIP_B, T5))
    sizes = {"text_dim": conditioner.text_dim, "pooled_dim": conditioner.pooled_dim}
    dit = DiT(DiTConfig(latent_channels=3, depth=2, width=16, num_heads=2, max_grid=6, base_grid=4, **sizes))
    dit.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the zeros of adaLN-zero
        for parameter in dit.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return TextToImage(make_autoencoder(), dit, conditioner, DiffusionConfig(shift=1.7), 16)


@pytest.fixture(scope="module")
def pipeline() -> TextToImage:
    return make()


def test_generate(pipeline: TextToImage) -> None:
    images = pipeline.generate(PROMPTS, SEEDS, num_steps=3, guidance_scale=3.0)
    assert images.shape == (3, 3, 16, 16)
    assert images.min() >= 0.0
    assert images.max() <= 1.0
    assert (images[0] - images[2]).abs().max() > 1e-3  # the same noise, another prompt
    assert (images[0] - images[1]).abs().max() > 1e-3
    # A picture depends on its own prompt and seed alone.
    alone = pipeline.generate(PROMPTS[1:2], SEEDS[1:2], num_steps=3, guidance_scale=3.0)
    torch.testing.assert_close(alone[0], images[1], atol=1e-5, rtol=0)
    small_batches = pipeline.generate(PROMPTS, SEEDS, num_steps=3, guidance_scale=3.0, batch_size=2)
    torch.testing.assert_close(small_batches, images, atol=1e-5, rtol=0)
    assert pipeline.generate([], []).shape == (0, 3, 16, 16)
    assert pipeline.generate(["x"], [1], num_steps=1, height=24, width=8).shape == (1, 3, 24, 8)


def test_generate_mistakes(pipeline: TextToImage) -> None:
    with pytest.raises(ModelError, match="2 prompts but 1 seeds"):
        pipeline.generate(["a", "b"], [1])
    with pytest.raises(ModelError, match="18x16 px: both sides must be multiples of 4"):
        pipeline.generate(["a"], [1], width=18)
    with pytest.raises(ModelError, match="channels of the text encoders"):
        TextToImage(pipeline.autoencoder, pipeline.dit, Conditioner((CLIP_A,)), pipeline.diffusion, 16)


def test_save_and_load(pipeline: TextToImage, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "model")
    loaded = TextToImage.load(tmp_path / "model")
    assert loaded.diffusion == pipeline.diffusion
    assert loaded.dit.config == pipeline.dit.config
    assert not any(module.training for module in loaded.modules())
    expected = pipeline.generate(PROMPTS, SEEDS, num_steps=2)
    assert torch.equal(loaded.generate(PROMPTS, SEEDS, num_steps=2), expected)
    with pytest.raises(ModelError, match="never overwritten"):
        pipeline.save(tmp_path / "model")


def another_autoencoder(folder: Path) -> None:
    (folder / "autoencoder").rename(folder / "old")
    save_autoencoder(folder / "autoencoder", make_autoencoder(seed=9))


def other_text_encoders(folder: Path) -> None:
    (folder / "text_encoders").rename(folder / "old")
    Conditioner((CLIP_A, CLIP_B, replace(T5, seed=9))).save(folder / "text_encoders")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_autoencoder, "autoencoder has fingerprint .* trained against"),
        (other_text_encoders, "text_encoders has fingerprint .* trained against"),
        (
            lambda folder: (folder / "text_encoders" / "t5" / "model.safetensors").unlink(),
            "t5/model.safetensors is",
        ),
    ],
)
def test_other_parts_are_refused(
    pipeline: TextToImage, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    pipeline.save(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ModelError, match=message):
        TextToImage.load(tmp_path / "model")


@pytest.mark.parametrize("t5", [True, False], ids=["t5", "no-t5"])
def test_export_draws_our_pictures(t5: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = make() if t5 else make(CLIP_A, CLIP_B)
    difference = export_diffusers(pipeline, tmp_path / "out", num_steps=5, guidance_scale=2.5)
    assert 0.0 < difference <= 1e-5  # equal to rounding, and not because both are blank
    document = json.loads((tmp_path / "out" / "darkroom.json").read_text())
    assert document["largest_pixel_difference"] == difference
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", **document["load"])
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    found = theirs(PROMPTS, generator=generators, output_type="pt", **document["call"]).images
    expected = pipeline.generate(PROMPTS, SEEDS, num_steps=5, guidance_scale=2.5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01
    assert not list((tmp_path / "out").rglob("*.bin"))
    with pytest.raises(ModelError, match="never overwritten"):
        export_diffusers(pipeline, tmp_path / "out")


def test_export_of_bfloat16_text_encoders(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pipeline = make(*(replace(config, dtype="bfloat16") for config in (CLIP_A, CLIP_B, T5)))
    assert export_diffusers(pipeline, tmp_path / "out") <= 1e-5
    assert next(pipeline.conditioner.parameters()).dtype == torch.bfloat16  # the caller's own is left as it was


def test_an_unequal_export_is_refused(pipeline: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    honest = export_module.dit_to_diffusers

    def wrong(*arguments):  # type: ignore[no-untyped-def]
        sizes, state = honest(*arguments)
        state["proj_out.bias"] = state["proj_out.bias"] + 0.1
        return sizes, state

    monkeypatch.setattr(export_module, "dit_to_diffusers", wrong)
    with pytest.raises(ModelError, match="pictures differ from ours by"):
        export_diffusers(pipeline, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        ((CLIP_A,), "takes two of kind clip"),
        ((CLIP_A, T5), "takes two of kind clip"),
        ((CLIP_A, CLIP_B, replace(T5, width=16)), "T5 that is at least as wide"),
    ],
)
def test_layouts_that_diffusers_does_not_know(encoders, message: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(ModelError, match=message):
        export_diffusers(make(*encoders), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
