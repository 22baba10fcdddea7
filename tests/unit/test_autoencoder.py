"""The autoencoder: equal to diffusers' AutoencoderKL, normalised by its own statistics, a function of its seed."""

from pathlib import Path

import pytest
import torch

from models.autoencoder import Autoencoder, AutoencoderConfig, Posterior, load_autoencoder, save_autoencoder
from models.diffusers_map import autoencoder_to_diffusers
from models.discriminator import Discriminator, DiscriminatorConfig
from models.errors import ModelError

CONFIG = AutoencoderConfig(latent_channels=3, channels=(8, 16, 8), res_blocks_per_level=2, norm_groups=4)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(config: AutoencoderConfig = CONFIG) -> Autoencoder:
    autoencoder = Autoencoder(config)
    autoencoder.init_weights(0)
    with torch.no_grad():
        for number, parameter in enumerate(autoencoder.parameters()):  # norms too, so that a swap would be seen
            parameter.add_(0.1 * normal(*parameter.shape, seed=number))
    C = config.latent_channels
    autoencoder.set_statistics(normal(C, seed=1), normal(C, seed=2).abs() + 0.3)
    return autoencoder.eval()


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        AutoencoderConfig(latent_channels=4, channels=(8,), res_blocks_per_level=1, norm_groups=2),
        AutoencoderConfig(latent_channels=2, channels=(8, 8, 16, 16), res_blocks_per_level=1, norm_groups=8),
    ],
    ids=["D=4", "D=1", "D=8"],
)
@torch.no_grad()
def test_equals_diffusers(config: AutoencoderConfig) -> None:
    diffusers = pytest.importorskip("diffusers")
    ours = make(config)
    arguments, state = autoencoder_to_diffusers(config, ours.state_dict())
    theirs = diffusers.AutoencoderKL(**arguments).eval()
    theirs.load_state_dict(state)
    factor = config.downsampling
    images = normal(2, 3, 2 * factor, 3 * factor, seed=3).clamp(-1, 1)
    eps = normal(2, config.latent_channels, 2, 3, seed=4)
    posterior = theirs.encode(images).latent_dist
    torch.testing.assert_close(ours.encode_latents(images), posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours.encode_latents(images, eps), posterior.mean + posterior.std * eps, atol=1e-5, rtol=1e-5
    )
    latents = normal(2, config.latent_channels, 2, 3, seed=5)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_statistics_only_rescale() -> None:
    ours = make()
    images = normal(2, 3, 8, 8)
    raw = ours.encode(images).mean
    latents = ours.encode_latents(images)
    mean, std = ours.latent_mean[:, None, None], ours.latent_std[:, None, None]
    torch.testing.assert_close(latents * std + mean, raw)
    torch.testing.assert_close(ours.decode(latents), ours.decode_raw(raw))


def test_posterior() -> None:
    posterior = Posterior(torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 2, 2), 2.0).log())
    assert posterior.kl() == pytest.approx([4 * 0.5 * (0.25 + 2.0 - 1.0 - 0.6931472)] * 2)
    torch.testing.assert_close(posterior.sample(torch.ones(2, 1, 2, 2)), torch.full((2, 1, 2, 2), 0.5 + 2.0**0.5))


def test_forward_trains_every_parameter_through_the_sample() -> None:
    autoencoder = make()
    images, eps = normal(2, 3, 8, 8), normal(2, 3, 2, 2, seed=1)
    reconstruction, mean, logvar = autoencoder(images, eps)
    assert reconstruction.shape == images.shape
    assert mean.shape == logvar.shape == (2, 3, 2, 2)
    torch.testing.assert_close(reconstruction, autoencoder.decode_raw(mean + (0.5 * logvar).exp() * eps))
    reconstruction.square().sum().backward()
    assert all(parameter.grad is not None for parameter in autoencoder.parameters())
    assert autoencoder.last_conv.weight.grad is not None


def test_init_is_a_function_of_the_seed() -> None:
    before = torch.random.get_rng_state()
    first, second, third = (Autoencoder(CONFIG) for _ in range(3))
    torch.random.set_rng_state(before)
    for autoencoder, seed in ((first, 7), (second, 7), (third, 8)):
        autoencoder.init_weights(seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.last_conv.weight, second.last_conv.weight)
    assert not torch.equal(first.last_conv.weight, third.last_conv.weight)


def test_save_and_load(tmp_path: Path) -> None:
    autoencoder = make()
    fingerprint = save_autoencoder(tmp_path / "ae", autoencoder)
    loaded, found = load_autoencoder(tmp_path / "ae")
    assert found == fingerprint
    assert loaded.config == CONFIG
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = normal(1, 3, 4, 8)
    assert torch.equal(loaded.encode_latents(images), autoencoder.encode_latents(images))


def test_mistakes(tmp_path: Path) -> None:
    autoencoder = Autoencoder(CONFIG)
    with pytest.raises(ModelError, match="not measured"):
        save_autoencoder(tmp_path / "ae", autoencoder)
    with pytest.raises(ModelError, match="10x8 px: both sides must be multiples of 4"):
        autoencoder.encode(torch.zeros(1, 3, 8, 10))
    with pytest.raises(ModelError, match="channel 1 has standard deviation"):
        autoencoder.set_statistics(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ModelError, match="not finite"):
        autoencoder.set_statistics(torch.tensor([0.0, float("nan"), 0.0]), torch.ones(3))
    with pytest.raises(ValueError, match="norm_groups is 3"):
        AutoencoderConfig(channels=(8, 16), norm_groups=3)


@pytest.mark.parametrize("groups", [8, 0])
def test_discriminator(groups: int) -> None:
    discriminator = Discriminator(DiscriminatorConfig(channels=8, num_layers=2, norm_groups=groups))
    before = torch.random.get_rng_state()
    discriminator.init_weights(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    images = normal(3, 3, 32, 32)
    logits = discriminator(images)
    assert logits.shape == (3, 1, 6, 6)
    # No statistics are shared between samples: a rank's logits depend on its own pictures alone.
    torch.testing.assert_close(discriminator(images[:1]), logits[:1], atol=1e-5, rtol=1e-5)
    assert not list(discriminator.buffers())
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_discriminator_sees_the_published_patch() -> None:
    discriminator = Discriminator(DiscriminatorConfig(channels=4, num_layers=3, norm_groups=0))
    discriminator.init_weights(0)
    images = torch.zeros(1, 3, 128, 128, requires_grad=True)
    discriminator(images)[0, 0, 7, 7].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70  # arXiv:1611.07004


def test_discriminator_mistakes() -> None:
    with pytest.raises(ValueError, match="norm_groups is 7"):
        DiscriminatorConfig(channels=8, norm_groups=7)
    with pytest.raises(ValueError, match="lower num_layers"):
        Discriminator(DiscriminatorConfig(channels=8, num_layers=3, norm_groups=8))(torch.zeros(1, 3, 16, 16))
