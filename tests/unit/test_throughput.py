"""Operations per step, the peaks of devices, and when waiting for data is worth a word."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.autoencoder import Autoencoder
from models.discriminator import Discriminator, DiscriminatorConfig
from models.dit import DiT, DiTConfig, dit_flops
from tests.helpers import tiny
from training.autoencoder_step import discriminator_step, generator_step
from training.losses import AutoencoderLossConfig
from training.throughput import AutoencoderFlops, Pace, peak_memory_bytes, peak_tflops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA A100-PCIE-40GB", 311.9),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_are_found_by_the_device_name(name, peak):
    assert peak_tflops(name) == peak


@pytest.mark.parametrize("attention", ["joint", "cross"])
def test_a_training_step_of_the_transformer_is_three_forwards(attention):
    """All but the gradients of what comes in from outside, which nobody asks for."""
    config = DiTConfig(latent_channels=4, depth=3, width=64, num_heads=4, max_grid=8, text_dim=48, pooled_dim=32,
                       attention=attention)  # fmt: skip
    dit, batch, text = DiT(config), 2, 5
    dit.init_weights(0)
    arguments = (torch.randn(batch, 4, 16, 16), torch.rand(batch), torch.randn(batch, text, 48), torch.randn(batch, 32))
    # The kernel of the CPU computes the attention once more in its backward pass: asked for its plain form.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        dit(*arguments).sum().backward()
    outside = 2 * batch * (64 * 16 * 64 + text * 48 * 64 + 32 * 64 + 256 * 64)  # patches, text, pooled, time features
    assert counter.get_total_flops() + outside == 3 * batch * dit_flops(config, 64, text)


def test_the_autoencoder_s_operations_are_those_of_its_step():
    loss = AutoencoderLossConfig(disc_start_step=2)
    sizes = DiscriminatorConfig(channels=8, num_layers=2, norm_groups=4)
    count = AutoencoderFlops(tiny.AUTOENCODER, sizes, loss)
    generator, discriminator = Autoencoder(tiny.AUTOENCODER), Discriminator(sizes)
    images, eps, weights = torch.rand(3, 3, 32, 48), torch.randn(3, 4, 8, 12), torch.ones(3)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as alone:
        turn = generator_step(generator, discriminator, None, images, eps, weights, loss,
                              last_conv=generator.last_conv, step=0)  # fmt: skip
        turn.objective.backward()
    assert count(images, 0) == count(images, 1) == alone.get_total_flops()
    discriminator.requires_grad_(False)
    pixels = images.clone().requires_grad_()
    with FlopCounterMode(display=False) as judged:
        discriminator(pixels).sum().backward()  # to the pixels alone
    discriminator.requires_grad_(True)
    with FlopCounterMode(display=False) as learns:
        discriminator_step(discriminator, images, images, weights).backward()
    conv = generator.last_conv
    last_layer = 2 * conv.weight.numel() * 3 * 32 * 48  # once per norm in the adaptive weight
    adversarial = judged.get_total_flops() + learns.get_total_flops() + 2 * last_layer
    assert count(images, 2) - count(images, 0) == adversarial


def rows(pace: Pace, *waits: float, steps: int = 50):
    """Rows of a hundred seconds each, of which so many were spent waiting."""
    for wait_s in waits:
        pace.started_s -= 100.0
        pace.wait_s, pace.steps, pace.images, pace.flops = wait_s, steps, 6400, 10**15
        yield pace.read(pace.numbers()[None])


def test_rates_of_a_row():
    pace = Pace(CPU)
    pace.started_s -= 100.0
    pace.wait_s, pace.steps, pace.images, pace.flops = 3.0, 50, 6400, 10**15
    mine = pace.numbers()
    other = mine * torch.tensor([7.0, 3.0, 0.5])
    fields = pace.read(torch.stack([mine, other])).fields
    assert fields["images_per_s"] == pytest.approx(64.0, rel=0.05)
    assert fields["tflops_per_s"] == pytest.approx(20.0, rel=0.05)  # mean of the ranks
    assert fields["data_wait_share"] == pytest.approx(0.21, rel=0.05)  # of the one that waits longest
    assert fields["mfu"] is None
    assert fields["peak_memory_gib"] == pytest.approx(peak_memory_bytes(CPU) / 2**30, rel=0.05)
    assert (pace.wait_s, pace.steps, pace.images, pace.flops) == (0.0, 0, 0, 0)
    assert pace.seconds == pytest.approx(100.0, rel=0.05)


def test_mfu_is_the_share_of_the_peak():
    pace = Pace(CPU)
    pace.peak = 40.0
    (reading,) = rows(pace, 0.0)
    assert reading.fields["mfu"] == pytest.approx(0.25, rel=0.05)


def test_waiting_for_data_is_named_over_a_hundred_steps():
    pace = Pace(CPU)
    said = [[c.check for c in reading.complaints] for reading in rows(pace, 90.0, 20.0, 2.0, 30.0, 1.0, 1.0, 8.0, 9.0)]
    # The first row holds the loader's start. Windows: 11 %, 15.5 %, 4.5 %; a verdict holds until the next.
    assert said == [[], [], ["data wait"], ["data wait"], ["data wait"], ["data wait"], [], []]
    (_, reading) = rows(Pace(CPU), 0.0, 15.0, steps=100)
    assert "15 % of the time of 100 steps went into waiting for data" in reading.complaints[0].message
    assert "data.num_workers" in reading.complaints[0].message


def test_one_long_wait_is_no_trend():
    pace = Pace(CPU)
    assert all(not reading.complaints for reading in rows(pace, 0.0, 90.0, 0.5, 0.5, steps=9))
