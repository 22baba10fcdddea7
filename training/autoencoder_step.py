"""The numeric step of the autoencoder stage: the generator's loss and the discriminator's, one after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

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
    """What the loop needs of the generator's turn."""

    objective: Tensor  # scalar whose gradient is that of the loss; its value means nothing
    decoded: Tensor  # (B, 3, H, W), without gradient history
    scalars: dict[str, Tensor]  # to log; "loss" is the loss


def generator_step(
    generator: nn.Module,
    discriminator: nn.Module,
    perceptual: nn.Module | None,
    images: Tensor,
    eps: Tensor,
    weights: Tensor,
    config: AutoencoderLossConfig,
    *,
    last_conv: nn.Conv2d,
    step: int,
) -> GeneratorOutput:
    """Loss of the autoencoder on images (B, 3, H, W) in [-1, 1]; `weights` (B,) masks samples.

    `generator(images, eps)` returns (decoded, mean, logvar) for `eps` (B, C, h, w) ~ N(0, I); `discriminator` is the
    bare module, not its DDP wrapper, and gets no gradients. From `disc_start_step` on the adversarial term joins,
    weighted by λ from the gradients of the decoder's last convolution: a function of this micro-batch alone, so that
    the number of ranks does not change it.

    The terms on pixels are differentiated at the decoded picture, once each. λ follows from there by the convolution's
    own weight gradient, and the generator is walked backwards once, by the objective <decoded, gradient> + w·KL:
    DeepSpeed's hooks would take a second pass for a second backward.
    """
    inputs: list[Tensor] = []
    hook = last_conv.register_forward_hook(lambda _, args, __: inputs.append(args[0].detach()))
    decoded, mean, logvar = generator(images, eps)
    hook.remove()

    pixels = decoded.detach().float().requires_grad_()
    rec = reconstruction_loss(config.reconstruction, pixels, images, weights)
    if perceptual is not None:
        rec = rec + config.perceptual_weight * (perceptual(pixels, images) * weights).mean()
    (gradient,) = torch.autograd.grad(rec, pixels)
    kl = kl_loss(mean, logvar, weights, images[0].numel())
    loss = rec + config.kl_weight * kl
    scalars = {"rec_loss": rec, "kl": kl, "psnr_db": psnr_db(pixels.detach(), images)}
    if step >= config.disc_start_step:
        adv = generator_hinge_loss(discriminator(pixels), weights)
        (adv_gradient,) = torch.autograd.grad(adv, pixels)
        rec_norm, adv_norm = (last_layer_norm(last_conv, inputs[0], g) for g in (gradient, adv_gradient))
        weight = adaptive_weight(rec_norm, adv_norm, config.max_adaptive_weight) * config.adversarial_weight
        gradient = gradient + weight * adv_gradient
        loss = loss + weight * adv
        scalars |= {"adv_g": adv, "adaptive_weight": weight}
    objective = (decoded * gradient).sum() + config.kl_weight * kl
    return GeneratorOutput(objective=objective, decoded=pixels.detach(), scalars={"loss": loss, **scalars})


def last_layer_norm(conv: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> Tensor:
    """‖∂L/∂W‖ of a convolution that saw `inputs` and whose output has ∂L/∂output = `gradient`."""
    shape = (conv.out_channels, conv.in_channels, *conv.kernel_size)
    return conv2d_weight(inputs.float(), shape, gradient, padding=conv.padding).norm()


def discriminator_step(discriminator: nn.Module, images: Tensor, decoded: Tensor, weights: Tensor) -> Tensor:
    """Hinge loss on real and decoded pictures (B, 3, H, W, without gradient history), in one concatenated forward."""
    real_logits, fake_logits = discriminator(torch.cat([images, decoded])).chunk(2)
    return hinge_loss(real_logits, fake_logits, weights)
