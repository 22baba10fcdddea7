"""What is done to blocks changes how they run, not what they compute."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.autoencoder import Autoencoder, AutoencoderConfig
from models.dit import DiT, DiTConfig
from training import blocks
from training.blocks import wrap_blocks

ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.convolution.default", ATTENTION)


class Calls(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.counts[str(operation)] += 1
        return operation(*arguments, **(options or {}))


def draw(model, *shapes):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return [torch.randn(shape, generator=generator) for shape in shapes]


def joint(side=8, mask=None, attention="joint"):
    dit = DiT(DiTConfig(latent_channels=4, depth=3, width=32, num_heads=2, max_grid=8, text_dim=8, pooled_dim=8,
                        attention=attention))  # fmt: skip
    x_t, t, text, pooled = draw(dit, (2, 4, side, side), (2,), (2, 5, 8), (2, 8))
    return dit, lambda: dit(x_t, t.sigmoid(), text, pooled, mask).square().mean()


def cross():
    return joint(mask=torch.arange(5)[None] < torch.tensor([[3], [5]]), attention="cross")


def autoencoder():
    model = Autoencoder(AutoencoderConfig(latent_channels=2, channels=(8, 16), res_blocks_per_level=1, norm_groups=4))
    images, eps = draw(model, (2, 3, 16, 16), (2, 2, 8, 8))
    return model, lambda: sum(part.square().mean() for part in model(images, eps))


def gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("make", [joint, cross, autoencoder])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_activations_give_the_same_bits(make, mode):
    model, loss = make()
    wanted, names = gradients(model, loss), list(model.state_dict())
    wrap_blocks(model.blocks, mode, compile=False)
    for mine, other in zip(gradients(model, loss), wanted, strict=True):
        assert torch.equal(mine, other)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("make", [joint, cross, autoencoder])
def test_selective_recomputes_neither_products_nor_attention(make):
    """And attention is the fused kernel in the DiT, forward and backward."""
    counts = {}
    for mode in ("none", "selective", "full"):
        model, loss = make()
        wrap_blocks(model.blocks, mode, compile=False)
        value = loss()
        with Calls() as calls:
            value.backward()
        counts[mode] = calls.counts
    assert all(counts["selective"][name] == counts["none"][name] for name in PRODUCTS)
    assert counts["none"][ATTENTION] == counts["selective"][ATTENTION] == 0
    more = counts["full"] - counts["none"]
    if make is autoencoder:
        assert more["aten.convolution.default"] > 0
    else:
        assert more[ATTENTION] == (6 if make is cross else 3) and more["aten.addmm.default"] > 0
        assert counts["none"]["aten._scaled_dot_product_flash_attention_for_cpu_backward.default"] == more[ATTENTION]


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_blocks_of_a_kind_share_one_graph(mode, monkeypatch):
    """Two kinds of three blocks: the text ends in the last. The second size of picture makes graphs for all sizes."""
    monkeypatch.setattr(blocks, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    stats.clear()
    graphs = []
    for side in (8, 12, 16):
        (plain, loss), (compiled, same_loss) = joint(side), joint(side)
        wrap_blocks(compiled.blocks, mode, compile=True)
        for mine, other in zip(gradients(compiled, same_loss), gradients(plain, loss), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
        graphs.append(stats["unique_graphs"])
    assert graphs == [2, 4, 4]
    torch._dynamo.reset()


@pytest.mark.all
@pytest.mark.parametrize("make", [joint, autoencoder])
def test_compiled_by_the_real_compiler(make):
    model, loss = make()
    wanted = gradients(model, loss)
    wrap_blocks(model.blocks, "selective", compile=True)
    for mine, other in zip(gradients(model, loss), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
