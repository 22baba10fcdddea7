"""What the autoencoder loses: PSNR and SSIM of held-out pictures against their reconstructions."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.errors import EvalError
from eval.pictures import to_images, to_pictures

# Constants of Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", Sec. III-C.
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for pixels in [0, 1]
# Equal pictures have an infinite PSNR; they count as this much, so that a mean stays a number.
PSNR_CAP_DB = 100.0


class Codec(Protocol):
    """What is measured: `models.autoencoder.Autoencoder`, or anything with its two methods."""

    def encode_latents(self, images: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images of normalised latents."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Figures of one autoencoder on one set of pictures."""

    psnr_db: float  # mean over pictures of the per-picture PSNR, pixels in [0, 1]
    ssim: float  # mean over pictures, in [-1, 1]
    num_images: int


def psnr_db(pictures: Tensor, reconstructions: Tensor) -> Tensor:
    """Per-picture peak signal-to-noise ratio in dB, (B,), of (B, 3, H, W) float pictures in [0, 1]."""
    error = (pictures.double() - reconstructions.double()).square().mean(dim=(1, 2, 3))  # (B,)
    return (-10 * torch.log10(error.clamp(min=10 ** (-PSNR_CAP_DB / 10)))).float()


def ssim(pictures: Tensor, reconstructions: Tensor) -> Tensor:
    """Per-picture structural similarity, (B,), of (B, 3, H, W) float pictures in [0, 1].

    Wang et al. 2004, Eq. 13 with an 11-pixel Gaussian window of sigma 1.5, only windows that lie inside the picture,
    per colour channel, averaged.

    Raises:
        EvalError: if the pictures are smaller than the window.
    """
    channels, height, width = pictures.shape[1:]
    if min(height, width) < SSIM_WINDOW:
        raise EvalError(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels, got {width}x{height}")
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    weights = (weights / weights.sum()).to(pictures.device)

    def window_mean(values: Tensor) -> Tensor:
        rows = F.conv2d(values, weights.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
        return F.conv2d(rows, weights.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)

    # float64: the variances are differences of nearly equal numbers.
    x, y = pictures.double(), reconstructions.double()
    mean_x, mean_y = window_mean(x), window_mean(y)
    var_x, var_y = window_mean(x * x) - mean_x**2, window_mean(y * y) - mean_y**2
    covariance = window_mean(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (mean_x**2 + mean_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2)
    )
    return similarity.mean(dim=(1, 2, 3)).float()


@torch.no_grad()
def reconstruct(autoencoder: Codec, pictures: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """Encodes to the posterior mean and decodes: uint8 (B, 3, H, W) to uint8 of the same shape."""
    chunks = []
    for chunk in pictures.split(batch_size):
        latents = autoencoder.encode_latents(to_images(chunk).to(device))  # (B, C, h, w)
        chunks.append(to_pictures(autoencoder.decode(latents)))
    return torch.cat(chunks)


def measure(pictures: Tensor, reconstructions: Tensor, batch_size: int = 256) -> Reconstruction:
    """Compares uint8 pictures, (B, 3, H, W), with their uint8 reconstructions."""
    ratios, similarities = [], []
    for real, made in zip(pictures.split(batch_size), reconstructions.split(batch_size), strict=True):
        ratios.append(psnr_db(real / 255, made / 255))
        similarities.append(ssim(real / 255, made / 255))
    return Reconstruction(
        psnr_db=float(torch.cat(ratios).mean()),
        ssim=float(torch.cat(similarities).mean()),
        num_images=pictures.shape[0],
    )
