"""Blocks with cross-attention to the text: what is hidden has no influence, a fresh block is the identity, the rest."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.artifact import config_from_dict, config_to_dict, load_artifact
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.diffusion import DiffusionConfig
from models.dit import CrossBlock, DiT, DiTConfig, dit_flops
from models.errors import ModelError
from models.export import export_diffusers
from models.pipeline import TextToImage
from models.text_encoder import Conditioner, TextEncoderConfig
from training.config import DiTArchitecture

TINY = DiTConfig(
    latent_channels=3, depth=3, width=24, num_heads=2, text_dim=10, pooled_dim=7, max_grid=8, attention="cross"
)
B, L = 3, 5


def random_dit(config: DiTConfig) -> DiT:
    dit = DiT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return dit


def inputs(config: DiTConfig, rows: int = 4, cols: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    size = (rows * config.patch_size, cols * config.patch_size)
    return {
        "x_t": torch.randn(B, config.latent_channels, *size, generator=g),
        "t": torch.rand(B, generator=g),
        "text_embeds": torch.randn(B, L, config.text_dim, generator=g),
        "pooled": torch.randn(B, config.pooled_dim, generator=g),
    }


def test_hiding_tokens_is_removing_them() -> None:
    dit, batch = random_dit(TINY), inputs(TINY)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [False, True, True, True, False]])
    masked = dit(**batch, text_mask=mask)
    for sample in range(B):
        alone = {name: value[sample : sample + 1] for name, value in batch.items()}
        alone["text_embeds"] = alone["text_embeds"][:, mask[sample]]
        torch.testing.assert_close(masked[sample], dit(**alone)[0])
    assert (masked - dit(**batch)).flatten(1).abs().amax(1)[1:].min() > 1e-3


def test_hidden_text_has_no_influence() -> None:
    dit, batch = random_dit(TINY), inputs(TINY)
    mask = torch.tensor([[True] * 5, [True, False, False, False, False], [False] * 5])
    text = batch["text_embeds"].requires_grad_()
    out = dit(**batch, text_mask=mask)
    garbage = torch.where(mask[..., None], text.detach(), 1e3)
    torch.testing.assert_close(dit(**{**batch, "text_embeds": garbage}, text_mask=mask), out)
    out.square().sum().backward()
    assert text.grad is not None
    assert torch.equal(text.grad.ne(0).any(2), mask)
    assert all(torch.isfinite(p.grad).all() for p in dit.parameters() if p.grad is not None)


def test_a_fresh_block_is_the_identity() -> None:
    dit = DiT(TINY)
    dit.init_weights(seed=3)
    g = torch.Generator().manual_seed(2)
    image, text, condition = (torch.randn(2, *shape, generator=g) for shape in ((6, 24), (4, 24), (24,)))
    for block in dit.blocks:
        assert isinstance(block, CrossBlock)
        new_image, new_text = block(image, text, condition, None)
        assert torch.equal(new_image, image) and new_text is text
        bound = (6 / (2 * TINY.width)) ** 0.5
        for part in (block.cross.q.weight, *block.cross.kv.weight.chunk(2)):
            assert 0.9 * bound < part.abs().max() <= bound
    assert not dit(**inputs(TINY)).any()
    other = DiT(TINY)
    other.init_weights(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(dit.parameters(), other.parameters(), strict=True))


def test_every_parameter_and_every_input_has_a_gradient() -> None:
    dit, batch = random_dit(TINY), inputs(TINY)
    told = {name: value.requires_grad_() for name, value in batch.items()}
    dit(**told).square().sum().backward()
    for name, tensor in [*dit.named_parameters(), *told.items()]:
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name


def test_a_fresh_network_learns_from_its_text() -> None:
    dit, batch = DiT(TINY), inputs(TINY)
    dit.init_weights(seed=0)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-3)
    wanted = torch.randn(batch["x_t"].shape, generator=torch.Generator().manual_seed(3))
    for _ in range(3):  # the last layer leaves zero first, then the ways out, then what leads to them
        optimizer.zero_grad()
        (dit(**batch) - wanted).square().mean().backward()
        optimizer.step()
    grads = {name: p.grad for name, p in dit.named_parameters() if ".cross." in name}
    assert len(grads) == 8 * TINY.depth
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize("changes", [{}, {"depth": 1}, {"width": 48, "num_heads": 4, "pooled_dim": 3}])
def test_flops_are_counted_exactly(changes: dict[str, int]) -> None:
    config = DiTConfig(**{**vars(TINY), **changes})
    dit, batch = random_dit(config), inputs(config, rows=3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        dit(**batch)
    assert B * dit_flops(config, image_tokens=12, text_tokens=L) == counter.get_total_flops()


def test_one_graph_and_bfloat16() -> None:
    dit, batch = random_dit(TINY), inputs(TINY)
    mask = torch.ones(B, L, dtype=torch.bool)
    expected = dit(**batch, text_mask=mask)
    compiled = torch.compile(dit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch, text_mask=mask), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = dit(**batch, text_mask=mask)
    assert half.dtype == torch.float32
    assert (half - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize("value", ["", "Cross", "both"])
def test_an_unknown_attention_is_refused(value: str) -> None:
    with pytest.raises(ModelError, match=f"here: attention = '{value}' must be joint or cross"):
        config_from_dict(DiTConfig, {**vars(TINY), "attention": value}, "here")


def test_joint_is_the_default_and_its_artifacts_stay_as_they_were(tmp_path: Path) -> None:
    assert DiTArchitecture(depth=1, width=8, num_heads=1).attention == "joint"
    without = {name: value for name, value in config_to_dict(TINY).items() if name != "attention"}
    assert config_from_dict(DiTConfig, without, "here").attention == "joint"
    make(replace(TINY, attention="joint")).save(tmp_path / "joint")
    assert "attention" not in load_artifact(tmp_path / "joint", "text_to_image").config["dit"]
    assert TextToImage.load(tmp_path / "joint").dit.config.attention == "joint"


def make(config: DiTConfig) -> TextToImage:
    clip = TextEncoderConfig(name="a", kind="clip", max_tokens=12, seed=1, width=16, layers=1, heads=2, embed_dim=12)
    conditioner = Conditioner([clip, replace(clip, name="b", seed=2)], "masked")
    autoencoder = Autoencoder(AutoencoderConfig(latent_channels=3, channels=(8, 8), norm_groups=4))
    autoencoder.init_weights(0)
    autoencoder.set_statistics(torch.zeros(3), torch.ones(3))
    sizes = {"text_dim": conditioner.text_dim, "pooled_dim": conditioner.pooled_dim}
    return TextToImage(autoencoder, random_dit(replace(config, **sizes)), conditioner, DiffusionConfig(), 16).eval()


def test_saved_loaded_drawn_and_not_exported(tmp_path: Path) -> None:
    pipeline = make(TINY)
    fingerprint = pipeline.save(tmp_path / "cross")
    loaded = TextToImage.load(tmp_path / "cross")
    assert loaded.dit.config == pipeline.dit.config and loaded.dit.config.attention == "cross"
    assert load_artifact(tmp_path / "cross", "text_to_image").fingerprint == fingerprint

    def draw(model: TextToImage, *prompts: str) -> Tensor:
        return model.generate(list(prompts), [1] * len(prompts), num_steps=2, guidance_scale=2.0)

    pictures = draw(pipeline, "a red seven", "a blue two above a dog")
    assert torch.equal(draw(loaded, "a red seven", "a blue two above a dog"), pictures)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3
    torch.testing.assert_close(draw(pipeline, "a red seven"), pictures[:1], rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="attention: cross.*knows joint alone.*train with attention: joint to export"):
        export_diffusers(pipeline, tmp_path / "export")
    assert not (tmp_path / "export").exists()
