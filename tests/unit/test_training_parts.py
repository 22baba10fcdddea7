"""The small pure parts of training: losses, configuration, the metrics file."""

import json
import math

import pytest
import torch
from torch import nn

from tests.helpers import tiny
from training.autoencoder_step import generator_step, last_layer_norm
from training.checkpoint import CheckpointConfig
from training.engine import EngineConfig, Fragment
from training.errors import TrainingError
from training.fragments import scatter
from training.losses import (
    AutoencoderLossConfig,
    adaptive_weight,
    generator_hinge_loss,
    hinge_loss,
    kl_loss,
    psnr_db,
    reconstruction_loss,
)
from training.metrics import Meter, Metrics, read_metrics
from training.run_directory import refuse_other_recipe


def test_kl_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=generator).double()
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    weights = torch.tensor([1.0, 0.0, 1.0]).double()
    assert kl_loss(mean, logvar, weights, 48).item() == pytest.approx((kl[0] + kl[2]).item() / 3 / 48, rel=1e-12)


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([[[[2.0]]], [[[0.5]]]]), torch.tensor([[[[-3.0]]], [[[0.25]]]])
    ones = torch.ones(2)
    assert hinge_loss(real, fake, ones).item() == pytest.approx(0.5 * (0 + (0.5 + 1.25)) / 2)
    assert generator_hinge_loss(fake, ones).item() == pytest.approx(-(-3.0 + 0.25) / 2)
    assert hinge_loss(real, fake, torch.tensor([1.0, 0.0])).item() == 0.0


def test_psnr_of_a_known_error():
    images = torch.zeros(1, 3, 4, 4)
    assert psnr_db(images + 0.2, images).item() == pytest.approx(20.0, abs=1e-4)  # error 0.1 of [0, 1]


def test_masked_samples_do_not_move_the_reconstruction():
    images = torch.rand(2, 3, 4, 4)
    decoded = images.clone().requires_grad_()
    loss = reconstruction_loss("l1", decoded + 1, images, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert decoded.grad is not None and decoded.grad[1].abs().max() == 0


class Generator(nn.Module):
    """Two convolutions that stand for an autoencoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.last_conv = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, images, eps):
        hidden = torch.tanh(self.inside(images)) + eps
        return self.last_conv(hidden), hidden, hidden * 0.1


def test_generator_step_has_the_gradient_of_the_whole_loss():
    """One walk through the generator against autograd on L_rec + w·KL + λ·w_adv·L_adv with λ from two extra walks."""
    with torch.random.fork_rng(devices=[]):
        generator = Generator()
        discriminator = nn.Conv2d(3, 1, 3)
        images, eps = torch.rand(2, 3, 6, 6), torch.randn(2, 5, 6, 6)
    weights = torch.tensor([1.0, 0.5])
    config = AutoencoderLossConfig(reconstruction="l2", kl_weight=0.1, disc_start_step=3, adversarial_weight=0.7)

    decoded, mean, logvar = generator(images, eps)
    rec = reconstruction_loss("l2", decoded, images, weights)
    adv = generator_hinge_loss(discriminator(decoded), weights)
    norms = [torch.autograd.grad(loss, generator.last_conv.weight, retain_graph=True)[0].norm() for loss in (rec, adv)]
    lam = adaptive_weight(norms[0], norms[1], config.max_adaptive_weight)
    loss = rec + 0.1 * kl_loss(mean, logvar, weights, 108) + 0.7 * lam * adv
    expected = torch.autograd.grad(loss, list(generator.parameters()))

    discriminator.zero_grad()
    turn = generator_step(
        generator, discriminator, None, images, eps, weights, config, last_conv=generator.last_conv, step=3
    )
    turn.objective.backward()
    for parameter, gradient in zip(generator.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert turn.scalars["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    before = generator_step(
        generator, discriminator, None, images, eps, weights, config, last_conv=generator.last_conv, step=2
    )
    assert "adv_g" not in before.scalars


def test_last_layer_norm_is_the_convolution_weight_gradient():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        conv, inputs, upstream = nn.Conv2d(4, 3, 3, padding=1), torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5)
    (gradient,) = torch.autograd.grad((conv(inputs) * upstream).sum(), conv.weight)
    assert last_layer_norm(conv, inputs, upstream).item() == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_scatter_takes_the_own_slice():
    fragment = Fragment(data=torch.zeros(3), start=2, shape=(2, 4))
    scatter(torch.arange(8.0).reshape(2, 4), fragment)
    assert fragment.data.tolist() == [2.0, 3.0, 4.0]


def test_ranks_that_do_not_divide_are_refused_with_the_valid_ones():
    config = EngineConfig(micro_batch_size=4, global_batch_size=24)
    assert config.accumulation_steps(3) == 2
    with pytest.raises(TrainingError, match="valid numbers of ranks: 1, 2, 3, 6"):
        config.accumulation_steps(4)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="global_batch_size 10 is not a multiple of micro_batch_size 4"):
        EngineConfig(micro_batch_size=4, global_batch_size=10)
    with pytest.raises(ValueError, match="keep_last 1"):
        CheckpointConfig(keep_last=1)
    with pytest.raises(ValueError, match=r"checkpoint.every_steps 4 is not a multiple of log_every_steps 3"):
        tiny.dit_recipe(tmp_path, tmp_path, log_every_steps=3)


def test_a_run_is_told_from_another_by_the_field_that_differs(tmp_path):
    old = {"seed": 0, "total_steps": 5, "engine": {"zero_stage": 2, "micro_batch_size": 4}, "optim": {"beta1": 0.9}}
    refuse_other_recipe(old, {**old, "total_steps": 9, "engine": {"zero_stage": 3, "micro_batch_size": 4}}, tmp_path)
    with pytest.raises(TrainingError, match=r"engine.micro_batch_size = 4, the recipe now says 8"):
        refuse_other_recipe(old, {**old, "engine": {"zero_stage": 2, "micro_batch_size": 8}}, tmp_path)
    with pytest.raises(TrainingError, match=r"optim.beta1 = 0.9, the recipe now says 0.8"):
        refuse_other_recipe(old, {**old, "optim": {"beta1": 0.8}}, tmp_path)


def test_a_meter_forgets_a_bad_step_and_nothing_else():
    meter, untouched = Meter(), Meter()
    for value, bad in ((0.1, False), (math.nan, True), (0.2, False), (0.7, False)):
        meter.mark()
        meter.add(loss=torch.tensor(value), **({"new": torch.tensor(1.0)} if bad else {}))
        if bad:
            meter.rewind()
        else:
            untouched.add(loss=torch.tensor(value))
    found, expected = (one.read(one.numbers()[None]).fields for one in (meter, untouched))
    assert found == expected and "loss" in found
    meter.mark()
    meter.add(loss=torch.tensor(math.nan))
    meter.rewind()
    assert meter.read(meter.numbers()[None]).fields == {}


def test_metrics_survive_a_torn_line_and_keep_the_last_row_of_a_step(tmp_path):
    metrics = Metrics(tmp_path, rank=0, total_steps=3, quiet=True)
    metrics.write({"step": 1, "loss": 1.0})
    metrics.path.write_bytes(metrics.path.read_bytes() + b'{"step": 2, "lo')
    metrics.write({"step": 2, "loss": 2.0})
    metrics.write({"step": 1, "loss": math.pi})
    metrics.close()
    assert read_metrics(metrics.path) == [{"step": 1, "loss": math.pi}, {"step": 2, "loss": 2.0}]
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines() if line.endswith("}")] == [
        1,
        2,
        1,
    ]


def test_a_full_disk_costs_a_row_and_not_the_run(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    metrics = Metrics(tmp_path, rank=0, total_steps=2, quiet=True)
    metrics.write({"step": 1, "loss": 1.0})
    path.unlink()
    metrics.write({"step": 2, "loss": 0.5})
    metrics.close()
    assert read_metrics(path) == [{"step": 2, "loss": 0.5}]
    assert "No space left on device; the row of step 1 may be lost" in " ".join(capsys.readouterr().err.split())
