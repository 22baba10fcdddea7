"""Losses of the autoencoder stage: reconstruction, KL, hinge GAN and its adaptive weight."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    """L1/L2 + w_kl·KL + w_perceptual·LPIPS + λ·w_adversarial·(−E[D(x̂)]); λ adapts (Esser et al. 2021, Eq. 7)."""

    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-6  # on the KL summed over the latent, per element of the picture
    perceptual_weight: float = 1.0  # on LPIPS, when its weights are given
    perceptual_weights: str | None = None  # LPIPS(VGG16) safetensors file, local or s3://; None = said aloud, left out
    perceptual_sha256: str | None = None  # of that file
    adversarial_weight: float = 0.5  # on the GAN terms, before λ
    disc_start_step: int = 50_001  # optimiser step at which the GAN terms begin
    max_adaptive_weight: float = 1e4  # clamp of λ

    def __post_init__(self) -> None:
        for name in ("kl_weight", "perceptual_weight", "adversarial_weight", "disc_start_step", "max_adaptive_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if self.perceptual_weights and not self.perceptual_sha256:
            raise ValueError("perceptual_weights needs perceptual_sha256, or a damaged file would train in silence")


def reconstruction_loss(kind: str, decoded: Tensor, images: Tensor, weights: Tensor) -> Tensor:
    """Mean L1 or L2 over pixels of (B, 3, H, W), then over the batch with `weights` (B,): 0 masks a sample."""
    error = (decoded - images).abs() if kind == "l1" else (decoded - images).square()
    return (error.flatten(1).mean(1) * weights).mean()


def kl_loss(mean: Tensor, logvar: Tensor, weights: Tensor, num_pixel_values: int) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) = −½ Σ(1 + log σ² − μ² − σ²) (Kingma & Welling 2014, Appendix B), per picture element."""
    kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).flatten(1).sum(1)
    return (kl * weights).mean() / num_pixel_values


def hinge_loss(real_logits: Tensor, fake_logits: Tensor, weights: Tensor) -> Tensor:
    """Discriminator's hinge: ½(E[max(0, 1 − D(x))] + E[max(0, 1 + D(x̂))]) (Lim & Ye 2017).

    Patch logits (B, 1, h, w) are averaged per sample, then over the batch with `weights` (B,).
    """
    per_sample = (F.relu(1 - real_logits) + F.relu(1 + fake_logits)).flatten(1).mean(1)
    return 0.5 * (per_sample * weights).mean()


def generator_hinge_loss(fake_logits: Tensor, weights: Tensor) -> Tensor:
    """−E[D(x̂)] over patches and the weighted batch."""
    return -(fake_logits.flatten(1).mean(1) * weights).mean()


def adaptive_weight(rec_norm: Tensor, adv_norm: Tensor, maximum: float) -> Tensor:
    """λ = ‖∇L_rec‖ / (‖∇L_adv‖ + 1e-4), clamped; norms of the gradients of the decoder's last layer."""
    return (rec_norm / (adv_norm + 1e-4)).clamp(0.0, maximum)


def psnr_db(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean over the batch of each picture's PSNR in dB, pixels in [0, 1] (so peak 1; inputs are in [-1, 1])."""
    mse = ((decoded.clamp(-1, 1) - images) / 2).square().flatten(1).mean(1)
    return (-10 * torch.log10(mse.clamp_min(1e-10))).mean()
