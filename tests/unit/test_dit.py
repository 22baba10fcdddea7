"""The diffusion transformer: equality with the stock implementation, masks, initial state, sizes, precision."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.diffusers_map import dit_to_diffusers
from models.dit import DiT, DiTConfig, dit_flops
from models.embeddings import GridPositions, patchify, time_features, unpatchify
from models.errors import ModelError

TINY = DiTConfig(latent_channels=3, depth=3, width=24, num_heads=2, text_dim=10, pooled_dim=7, max_grid=8, base_grid=4)


def random_dit(config, seed=0):
    """A DiT none of whose weights is zero or special."""
    dit = DiT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return dit


def inputs(config, rows=4, cols=4, batch=3, tokens=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    p = config.patch_size
    return {
        "x_t": torch.randn(batch, config.latent_channels, rows * p, cols * p, generator=g),
        "t": torch.rand(batch, generator=g),
        "text_embeds": torch.randn(batch, tokens, config.text_dim, generator=g),
        "pooled": torch.randn(batch, config.pooled_dim, generator=g),
    }


def stock(dit):
    diffusers = pytest.importorskip("diffusers")
    arguments, state = dit_to_diffusers(dit.config, dit.state_dict())
    peer = diffusers.SD3Transformer2DModel(**arguments)
    missing = set(peer.state_dict()) ^ set(state)
    assert not missing
    peer.load_state_dict(state, strict=True)
    return peer


@pytest.mark.parametrize(
    ("rows", "cols", "changes"),
    [
        (4, 4, {}),
        (2, 7, {}),  # not square, off the middle by half a patch
        (8, 3, {"base_grid": None}),
        (3, 5, {"depth": 1, "num_heads": 3}),
        (2, 2, {"patch_size": 1, "latent_channels": 4}),
    ],
)
def test_equals_the_stock_transformer(rows, cols, changes):
    config = DiTConfig(**{**vars(TINY), **changes})
    dit = random_dit(config)
    batch = inputs(config, rows, cols)
    peer = stock(dit)
    ours = dit(**batch)
    theirs = peer(
        hidden_states=batch["x_t"],
        encoder_hidden_states=batch["text_embeds"],
        pooled_projections=batch["pooled"],
        timestep=batch["t"] * 1000,
    ).sample
    assert theirs.std() > 0.1  # the comparison says something
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_equal_the_stock_transformers():
    dit, batch = random_dit(TINY), inputs(TINY)
    peer = stock(dit)
    dit(**batch).square().sum().backward()
    peer(batch["x_t"], batch["text_embeds"], batch["pooled"], batch["t"] * 1000).sample.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in dit.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    _, mapped = dit_to_diffusers(TINY, gradients)
    for name, parameter in peer.named_parameters():
        if f"transformer_blocks.{TINY.depth - 1}.attn" in name and ("add_q_proj" in name or "norm_added_q" in name):
            continue  # theirs computes these and throws the result away
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(mapped[name] / scale, parameter.grad / scale, atol=1e-5, rtol=0, msg=name)


def test_the_mapping_loses_nothing():
    dit = random_dit(TINY)
    _, state = dit_to_diffusers(TINY, dit.state_dict())
    spare = sum(state[n].numel() for n in state if n.startswith(f"transformer_blocks.{TINY.depth - 1}.attn.add_q_proj"))
    spare += TINY.head_dim + state["pos_embed.pos_embed"].numel()
    assert sum(tensor.numel() for tensor in state.values()) - spare == sum(p.numel() for p in dit.parameters())


def test_masked_tokens_are_seen_by_nobody():
    dit, batch = random_dit(TINY), inputs(TINY)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [False] * 5])
    masked = dit(**batch, text_mask=mask)
    torch.testing.assert_close(masked[0], dit(**batch)[0])
    short = {**batch, "text_embeds": batch["text_embeds"][:, :3]}
    torch.testing.assert_close(masked[1], dit(**short)[1])
    garbage = {**batch, "text_embeds": torch.where(mask[..., None], batch["text_embeds"], 1e3)}
    torch.testing.assert_close(dit(**garbage, text_mask=mask), masked)
    assert torch.isfinite(masked).all()
    assert not torch.allclose(masked, dit(**batch))


def test_samples_do_not_see_one_another():
    dit, batch = random_dit(TINY), inputs(TINY)
    alone = dit(**{name: value[1:2] for name, value in batch.items()})
    torch.testing.assert_close(alone, dit(**batch)[1:2])


def test_every_input_matters():
    dit, batch = random_dit(TINY), inputs(TINY)
    out = dit(**batch)
    for name, value in inputs(TINY, seed=2).items():
        assert not torch.allclose(dit(**{**batch, name: value}), out, atol=1e-3), name


def test_initial_weights():
    first, second = DiT(TINY), DiT(TINY)
    torch.manual_seed(5)
    first.init_weights(seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(6)
    second.init_weights(seed=3)
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.dtype == torch.float32
    second.init_weights(seed=4)
    assert not torch.equal(first.patch_in.weight, second.patch_in.weight)
    assert torch.equal(first(**inputs(TINY)), torch.zeros(3, 3, 8, 8))  # adaLN-zero
    for part in first.blocks[0].image.qkv.weight.chunk(3):
        bound = (6 / (2 * TINY.width)) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound
    loss = (first(**inputs(TINY)) - 1).square().mean()
    loss.backward()
    assert first.patch_out.bias.grad.abs().sum() > 0  # it can leave zero


@pytest.mark.parametrize("changes", [{}, {"depth": 1}, {"width": 48, "num_heads": 4, "pooled_dim": 3}])
def test_flops_are_counted_exactly(changes):
    config = DiTConfig(**{**vars(TINY), **changes})
    dit = random_dit(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        dit(**inputs(config, rows=3, cols=4, batch=2, tokens=5))
    assert 2 * dit_flops(config, image_tokens=12, text_tokens=5) == counter.get_total_flops()


def test_flops_of_a_two_billion_parameter_model():
    config = DiTConfig(
        latent_channels=16, depth=24, width=1536, num_heads=24, text_dim=4096, pooled_dim=2048, max_grid=192
    )
    assert dit_flops(config, image_tokens=256, text_tokens=77) == pytest.approx(467e9, rel=0.03)


def test_one_graph_and_bfloat16():
    dit, batch = random_dit(TINY), inputs(TINY)
    mask = torch.ones(3, 5, dtype=torch.bool)
    expected = dit(**batch, text_mask=mask)
    compiled = torch.compile(dit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch, text_mask=mask), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = dit(**batch, text_mask=mask)
    assert half.dtype == torch.float32
    tolerance = 0.05 * expected.std().item()
    torch.testing.assert_close(half, expected, atol=5 * tolerance, rtol=0)
    assert (half - expected).square().mean().sqrt() < tolerance
    stored = random_dit(TINY).to(torch.bfloat16)
    assert stored.positions.table.dtype == torch.float32
    assert (stored(**batch, text_mask=mask) - expected).square().mean().sqrt() < tolerance


def test_positions_survive_meta_and_empty():
    with torch.device("meta"):
        dit = DiT(TINY)
    dit.to_empty(device="cpu")
    assert torch.equal(dit.positions.table, GridPositions(24, 8, 4).table)
    assert not any("positions" in name for name in dit.state_dict())


def test_positions_are_cropped_from_the_middle():
    positions = GridPositions(16, max_grid=6, base_grid=6)
    whole = positions(6, 6).unflatten(0, (6, 6))
    torch.testing.assert_close(positions(2, 4).unflatten(0, (2, 4)), whole[2:4, 1:5])
    torch.testing.assert_close(whole[2, 5, :8], whole[4, 5, :8])  # the column's half
    torch.testing.assert_close(whole[2, 5, 8:], whole[2, 0, 8:])  # the row's half


def test_patches_and_back():
    latents = torch.randn(2, 3, 6, 4)
    patches = patchify(latents, 2)
    assert patches.shape == (2, 6, 12)
    torch.testing.assert_close(patches[0, 1].reshape(3, 2, 2), latents[0, :, 0:2, 2:4])
    assert torch.equal(unpatchify(patches, 2, 3, 2), latents)


def test_time_features_need_float32():
    t = torch.tensor([0.0, 0.5, 1.0])
    features = time_features(t)
    assert features.shape == (3, 256)
    torch.testing.assert_close(features[0], torch.cat((torch.ones(128), torch.zeros(128))))  # cosines first
    torch.testing.assert_close(features[2, 0], torch.tensor(1000.0).cos())
    assert time_features(t.bfloat16()).dtype == torch.float32


def test_pictures_that_do_not_fit():
    dit = random_dit(TINY)
    batch = inputs(TINY)
    with pytest.raises(ModelError, match="max_grid = 8"):
        dit(**{**batch, "x_t": torch.randn(3, 3, 4, 18)})
    with pytest.raises(ModelError, match="patches of 2 x 2"):
        dit(**{**batch, "x_t": torch.randn(3, 3, 4, 5)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 25, "num_heads": 5}, "multiple of 4"),
        ({"num_heads": 5}, "multiple of num_heads = 5"),
        ({"depth": 0}, "depth = 0 must be at least 1"),
        ({"base_grid": 9}, "must not exceed max_grid = 8"),
        ({"base_grid": 0}, "base_grid = 0 must be at least 1"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**{**vars(TINY), **changes})
