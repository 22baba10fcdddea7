"""The numeric step of the autoencoder stage: the generator's loss and the discriminator's, one after the other."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.losses import (
    AutoencoderLossConfig,
    adaptive_weight,
    generator_hinge_loss,
    hinge_loss,
    kl_loss,
    psnr_db,
    reconstruction_loss,
)


@dataclass(frozen=True, kw_only=True)
class GeneratorOutput:
    """What the discriminator's turn and the log need of the generator's turn."""

    loss: Tensor
    decoded: Tensor  # (B, 3, H, W), with gradient history
    scalars: dict[str, Tensor]


def generator_step(
    generator: nn.Module,
    discriminator: nn.Module,
    perceptual: nn.Module | None,
    images: Tensor,
    eps: Tensor,
    weights: Tensor,
    config: AutoencoderLossConfig,
    *,
    last_layer: nn.Parameter,
    step: int,
) -> GeneratorOutput:
    """Loss of the autoencoder on images (B, 3, H, W) in [-1, 1].

    `generator(images, eps)` returns (decoded, mean, logvar) for `eps` (B, C, h, w) ~ N(0, I); `discriminator` is the bare
    module, not its DDP wrapper, and gets no gradients from this pass. From `disc_start_step` on the adversarial term joins, weighted by λ
    from gradients of `last_layer`, which are averaged over ranks so that λ is that of the global batch.
    """
    decoded, mean, logvar = generator(images, eps)
    rec = reconstruction_loss(config.reconstruction, decoded, images, weights)
    if perceptual is not None:
        rec = rec + config.perceptual_weight * (perceptual(decoded, images) * weights).mean()
    kl = kl_loss(mean, logvar, weights, images[0].numel())
    loss = rec + config.kl_weight * kl
    scalars = {"rec_loss": rec, "kl": kl, "psnr_db": psnr_db(decoded.detach(), images)}
    if step >= config.disc_start_step:
        discriminator.requires_grad_(False)
        adv = generator_hinge_loss(discriminator(decoded), weights)
        discriminator.requires_grad_(True)
        rec_grad = _mean_over_ranks(torch.autograd.grad(rec, last_layer, retain_graph=True)[0])
        adv_grad = _mean_over_ranks(torch.autograd.grad(adv, last_layer, retain_graph=True)[0])
        weight = adaptive_weight(rec_grad, adv_grad, config.max_adaptive_weight)
        loss = loss + weight * config.adversarial_weight * adv
        scalars |= {"adv_g": adv, "adaptive_weight": weight}
    return GeneratorOutput(loss=loss, decoded=decoded, scalars={"loss": loss, **scalars})


def discriminator_step(discriminator: nn.Module, images: Tensor, decoded: Tensor, weights: Tensor) -> Tensor:
    """Hinge loss on real and decoded pictures (B, 3, H, W), in one concatenated forward; the generator gets nothing."""
    real_logits, fake_logits = discriminator(torch.cat([images, decoded.detach()])).chunk(2)
    return hinge_loss(real_logits, fake_logits, weights)


def _mean_over_ranks(gradient: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(gradient)
        gradient = gradient / dist.get_world_size()
    return gradient
