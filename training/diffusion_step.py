"""The numeric step of the diffusion stage: one function from a micro-batch to a loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.loader import Batch
from models import prng
from models.autoencoder import Autoencoder
from models.diffusion import DiffusionConfig, interpolate, sample_t, target
from models.text_encoder import Conditioner


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The networks that turn a picture and its caption into what the transformer sees; replicated, never trained."""

    autoencoder: Autoencoder
    autoencoder_fingerprint: str
    conditioner: Conditioner

    @property
    def device(self) -> torch.device:
        return self.autoencoder.latent_mean.device

    def to(self, device: torch.device) -> None:
        self.autoencoder.to(device)
        self.conditioner.to(device)


@torch.no_grad()
def encode_images(autoencoder: Autoencoder, images: Tensor, numbers: Tensor, seed: int, sample: bool) -> Tensor:
    """Normalised latents (B, C, h, w) of images (B, 3, H, W); a posterior sample is a function of the sample number."""
    if not sample:
        return autoencoder.encode_latents(images)
    return autoencoder.encode_latents(images, posterior_noise(autoencoder, images, numbers, seed))


def posterior_noise(autoencoder: Autoencoder, images: Tensor, numbers: Tensor, seed: int) -> Tensor:
    """ε of the reparameterised posterior sample, (B, C, h, w): a function of (seed, sample number)."""
    factor = autoencoder.config.downsampling
    shape = (autoencoder.config.latent_channels, images.shape[2] // factor, images.shape[3] // factor)
    return prng.normal(seed, prng.POSTERIOR, numbers, shape)


def diffusion_step(
    dit: nn.Module,
    batch: Batch,
    frozen: Frozen,
    diffusion: DiffusionConfig,
    *,
    seed: int,
    sample_latents: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch.

    Posterior, noise, t and CFG dropout are functions of (seed, sample number): no two ranks draw the same, and the draw
    does not depend on the number of ranks. Returns the weighted mean squared error of the velocity (Eq. 14,
    arXiv:2403.03206, without a loss weighting) and scalars to log.
    """
    device = frozen.device
    dropout = torch.tensor(frozen.conditioner.dropout)  # (E,) probability that a condition becomes the encoder's null
    numbers = batch.sample_numbers.to(device)  # (B,)
    weights = batch.weights.to(device)  # (B,)
    latents = encode_images(frozen.autoencoder, batch.images.to(device), numbers, seed, sample_latents)  # (B, C, h, w)
    noise = prng.normal(seed, prng.NOISE, numbers, tuple(latents.shape[1:]))
    t = sample_t(diffusion, prng.uniform(seed, prng.TIME, numbers))  # (B,)
    drop = prng.uniform(seed, prng.DROPOUT, batch.sample_numbers, (len(dropout),)) < dropout  # (B, E), on the host
    text = frozen.conditioner.encode(batch.captions, drop)

    x_t = interpolate(diffusion, latents, noise, t)
    prediction = dit(x_t, t, text.text_embeds, text.pooled)
    error = (prediction.float() - target(diffusion, latents, noise, t)).square().flatten(1).mean(1)  # (B,)
    loss = (error * weights).mean()
    dropped = {
        f"dropped_{name}": rate
        for name, rate in zip(frozen.conditioner.names, drop.float().mean(0).to(device), strict=True)
    }
    return loss, {"loss": loss, "latent_std": latents.std(), **dropped}
