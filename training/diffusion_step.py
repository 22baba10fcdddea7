"""The numeric step of the diffusion stage: one function from a micro-batch to a loss."""

import torch
from torch import Tensor, nn

from data.encoded import EncodedBatch
from data.loader import Batch
from models import prng
from models.autoencoder import Autoencoder
from models.conditioner import TextCondition, TextFeatures
from models.diffusion import DiffusionConfig, interpolate, loss_weight, network_input, target
from models.text_encoder import Conditioner
from models.time_density import sample_t, time_uniforms
from training.frozen import Frozen
from training.run_checks import DiffusionChecks


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


@torch.no_grad()
def stored_latents(autoencoder: Autoencoder, moments: Tensor, numbers: Tensor, seed: int, sample: bool) -> Tensor:
    """Normalised latents (B, C, h, w) of what was stored: (B, 2C, h, w) moments, or (B, C, h, w), a sample already.

    From moments they are the ones that `encode_images` gives, up to the rounding to bfloat16.
    """
    raw = moments.float()
    if raw.shape[1] == 2 * autoencoder.config.latent_channels:
        mean, std = raw.chunk(2, dim=1)
        raw = mean + std * prng.normal(seed, prng.POSTERIOR, numbers, tuple(mean.shape[1:])) if sample else mean
    return autoencoder.normalise(raw)


def stored_text(conditioner: Conditioner, encoded: EncodedBatch, device: torch.device) -> list[TextFeatures]:
    """The features that the encoders would give for the captions, from what was stored."""
    features = []
    for encoder in conditioner.text_encoders():
        name = encoder.config.name
        tokens, mask = encoded.features(name, device), encoded.masks[name]
        pooled = encoded.pooled.get(name, torch.zeros(len(tokens), 0)).to(device, torch.float32, non_blocking=True)
        features.append(TextFeatures(tokens, mask, pooled))
    return features


def text_of(batch: Batch, frozen: Frozen, drop: Tensor, checks: DiffusionChecks | None) -> TextCondition:
    """What the network is told of a micro-batch whose conditions `drop` (B, E), on the CPU, replaces by the null."""
    conditioner, stored = frozen.conditioner, None
    if batch.encoded is None:
        features = conditioner.recall(batch.captions, drop)
    else:
        features = conditioner.with_nulls(stored_text(conditioner, batch.encoded, frozen.device), drop)
        stored = [batch.encoded.tokens[name].dtype for name in conditioner.names]
    if checks is not None:
        checks.text.add(features, batch.captions, batch.weights, stored)
    return conditioner.join(features)


def diffusion_step(
    dit: nn.Module,
    batch: Batch,
    frozen: Frozen,
    diffusion: DiffusionConfig,
    *,
    seed: int,
    sample_latents: bool,
    global_batch_size: int,
    patch_size: int,
    checks: DiffusionChecks | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch of pictures and captions, or of what was encoded from them.

    Posterior, noise, t and CFG dropout are functions of (seed, sample number), and with strata of global_batch_size: no
    two ranks draw the same, and the draw does not depend on the number of ranks. Returns the mean squared error of what
    the network predicts, weighted by time as the diffusion says (for the velocity of rectified flow without weights:
    Eq. 14, arXiv:2403.03206), and scalars to log. `checks` looks on and changes nothing.
    """
    device = frozen.device
    dropout = torch.tensor(frozen.conditioner.dropout)  # (E,) probability that a condition becomes the encoder's null
    numbers = batch.sample_numbers.to(device, non_blocking=True)  # (B,)
    weights = batch.weights.to(device, non_blocking=True)  # (B,)
    if batch.encoded is None:
        latents = encode_images(frozen.autoencoder, batch.images(device), numbers, seed, sample_latents)  # (B, C, h, w)
    else:
        latents = stored_latents(
            frozen.autoencoder, batch.encoded.moments.to(device, non_blocking=True), numbers, seed, sample_latents
        )
    noise = prng.normal(seed, prng.NOISE, numbers, tuple(latents.shape[1:]))
    tokens = latents.shape[2] * latents.shape[3] // patch_size**2  # a micro-batch has one shape
    t = sample_t(diffusion, time_uniforms(diffusion, seed, numbers, global_batch_size), tokens)  # (B,)
    drop = prng.uniform(seed, prng.DROPOUT, batch.sample_numbers, (len(dropout),)) < dropout  # (B, E), on the host
    text = text_of(batch, frozen, drop, checks)

    x_t = interpolate(diffusion, latents, noise, t)
    prediction = dit(network_input(diffusion, x_t, t), t, text.text_embeds, text.pooled, text.text_mask)
    error = (prediction.float() - target(diffusion, latents, noise, t)).square().flatten(1).mean(1)  # (B,)
    losses = error * loss_weight(diffusion, t)  # (B,)
    if checks is not None:
        checks.draws.add(batch.sample_numbers, noise)
        checks.times.add(t, losses, weights, tokens)
        checks.latents.add(latents, weights)
        checks.network(len(t), tokens, text.text_embeds.shape[1])
    loss = (losses * weights).mean()
    return loss, {"loss": loss, "latent_std": latents.std()}
