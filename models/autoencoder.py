"""The KL autoencoder: pictures to latents and back, with the measured statistics that normalise the latents.

A convolutional variational autoencoder (Kingma & Welling, arXiv:1312.6114) in the shape that latent diffusion uses
(Rombach et al., arXiv:2112.10752, appendix G): residual blocks with group norm and SiLU, halving by strided
convolutions, doubling by nearest neighbour and convolution, and one self-attention in the middle of either half.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact import (
    artifact_fingerprint,
    config_from_dict,
    config_to_dict,
    load_artifact,
    load_weights,
    save_artifact,
)
from models.errors import ModelError

_NORM_EPS = 1e-6
_LOGVAR_RANGE = (-30.0, 20.0)  # keeps exp() finite in float32
_STD_FLOOR = 1e-6  # a channel below this standard deviation is dead and cannot be normalised


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Size of the autoencoder. It shrinks each side by D = 2 ** (len(channels) - 1)."""

    latent_channels: int = 16  # C
    channels: tuple[int, ...] = (128, 256, 512, 512)  # feature channels per resolution, finest first
    res_blocks_per_level: int = 2  # of the encoder; the decoder has one more
    norm_groups: int = 32  # groups of every group norm; divides every entry of channels

    def __post_init__(self) -> None:
        if self.latent_channels < 1:
            raise ValueError(f"latent_channels is {self.latent_channels}: give at least 1")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels is {list(self.channels)}: give one positive number per resolution")
        if self.res_blocks_per_level < 1:
            raise ValueError(f"res_blocks_per_level is {self.res_blocks_per_level}: give at least 1")
        if self.norm_groups < 1 or any(width % self.norm_groups for width in self.channels):
            raise ValueError(
                f"norm_groups is {self.norm_groups}, which does not divide every one of channels {list(self.channels)}:"
                " give a common divisor"
            )

    @property
    def downsampling(self) -> int:
        """D, pixels per latent position along one side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian q(latent | image), not normalised.

    Attributes:
        mean: (B, C, h, w).
        logvar: (B, C, h, w), log of the variance.
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """mean + sigma * eps for eps ~ N(0, I), (B, C, h, w): Eq. 10, arXiv:1312.6114."""
        return self.mean + torch.exp(0.5 * self.logvar) * eps

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) in nats, summed over each latent, (B,): appendix B, arXiv:1312.6114."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class Autoencoder(nn.Module):
    """Encoder, decoder and the latent statistics.

    Latents that leave `encode_latents` and enter `decode` have zero mean and unit variance per channel under the
    statistics in the buffers `latent_mean` and `latent_std`, (C,); `encode` and `decode_raw` do not know of them.
    """

    latent_mean: Tensor
    latent_std: Tensor
    statistics_measured: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        self.register_buffer("statistics_measured", torch.zeros((), dtype=torch.bool))

    @property
    def last_conv(self) -> nn.Conv2d:
        """The last convolution, at whose weight the adaptive weight of the adversarial loss is taken."""
        return self.decoder.conv_out

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks and attentions, which hold most of the activations."""
        return [module for module in self.modules() if isinstance(module, _ResBlock | _Attention)]

    def init_weights(self, seed: int) -> None:
        """Fills every weight as a function of the seed alone: U(±1/sqrt(fan_in)) for weights and biases.

        The same on every device and rank; no global random state is read or moved.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = module.weight[0].numel() ** -0.5
                _fill_uniform(module.weight, bound, generator)
                assert module.bias is not None
                _fill_uniform(module.bias, bound, generator)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pass of training: reconstruct through one sample of the posterior.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            eps: (B, C, h, w) ~ N(0, I).

        Returns:
            Reconstruction like images, and the posterior's mean and logvar (B, C, h, w). Plain tensors, because the
            wrappers of distributed training look for nothing else.
        """
        posterior = self.encode(images)
        return self.decode_raw(posterior.sample(eps)), posterior.mean, posterior.logvar

    def encode(self, images: Tensor) -> Posterior:
        """images (B, 3, H, W) in [-1, 1] to the posterior over raw latents (B, C, H/D, W/D).

        Raises:
            ModelError: H or W is not a multiple of D.
        """
        factor = self.config.downsampling
        if images.shape[-2] % factor or images.shape[-1] % factor:
            raise ModelError(
                f"pictures of {images.shape[-1]}x{images.shape[-2]} px: both sides must be multiples of {factor},"
                " the autoencoder's downsampling"
            )
        moments = self.encoder(_fast_layout(images))  # (B, 2C, h, w)
        mean, logvar = moments.contiguous().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*_LOGVAR_RANGE))

    def decode_raw(self, raw_latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) to pictures (B, 3, D·h, D·w), about [-1, 1] and not clamped."""
        return self.decoder(_fast_layout(raw_latents)).contiguous()

    def encode_latents(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) to normalised latents (B, C, h, w): a sample when eps is given, else the mean."""
        posterior = self.encode(images)
        return self.normalise(posterior.mean if eps is None else posterior.sample(eps))

    def normalise(self, raw_latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) to normalised ones."""
        return (raw_latents - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) to pictures (B, 3, D·h, D·w), about [-1, 1] and not clamped."""
        return self.decode_raw(latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None])

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Writes the measured statistics of raw latents, (C,) each.

        Raises:
            ModelError: A value is not finite, or a channel does not vary.
        """
        shape = self.latent_mean.shape
        if mean.shape != shape or std.shape != shape:
            raise ModelError(
                f"latent statistics of shape {list(mean.shape)} and {list(std.shape)}: expected {list(shape)}"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise ModelError("the latent statistics are not finite: the autoencoder diverged, train it again")
        if bool((std < _STD_FLOOR).any()):
            raise ModelError(
                f"latent channel {int(std.argmin())} has standard deviation {float(std.min()):.2e}:"
                " it carries nothing, train with a smaller KL weight or fewer latent_channels"
            )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
        self.statistics_measured.fill_(True)


def save_autoencoder(folder: str | Path, autoencoder: Autoencoder) -> str:
    """Writes the autoencoder with its statistics as an artifact of kind "autoencoder"; returns its fingerprint.

    Raises:
        ModelError: The folder exists, or the latent statistics were not measured.
    """
    if not autoencoder.statistics_measured:
        raise ModelError(f"{folder}: the latent statistics are not measured yet: call set_statistics before saving")
    return save_artifact(folder, "autoencoder", config_to_dict(autoencoder.config), autoencoder.state_dict())


def autoencoder_fingerprint(autoencoder: Autoencoder) -> str:
    """What `save_autoencoder` returns, without writing."""
    return artifact_fingerprint("autoencoder", config_to_dict(autoencoder.config), autoencoder.state_dict())


def load_autoencoder(folder: str | Path) -> tuple[Autoencoder, str]:
    """Reads an artifact of kind "autoencoder".

    Returns:
        The autoencoder in evaluation mode without gradients, and its fingerprint.

    Raises:
        ModelError: The artifact is missing, damaged, or of another kind.
    """
    artifact = load_artifact(folder, "autoencoder")
    config = config_from_dict(AutoencoderConfig, artifact.config, str(folder))
    with torch.device("meta"):  # the weights come from the file: nothing is drawn
        autoencoder = Autoencoder(config)
    autoencoder.to_empty(device="cpu")
    load_weights(autoencoder, artifact.tensors, str(folder))
    if not autoencoder.statistics_measured:
        raise ModelError(f"{folder} has no measured latent statistics: finish the autoencoder's training")
    return autoencoder.eval().requires_grad_(False), artifact.fingerprint


class _ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the skip where the width changes."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=_NORM_EPS)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=_NORM_EPS)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.skip is None else self.skip(x))  # (B, width_out, h, w)


class _Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(batch, 1, height * columns, width)  # (B, 1, h·w, width)
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        mixed = self.out(F.scaled_dot_product_attention(query, key, value))  # (B, 1, h·w, width)
        return x + mixed.reshape(batch, height, columns, width).permute(0, 3, 1, 2)


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block1 = _ResBlock(width, width, groups)
        self.attention = _Attention(width, groups)
        self.block2 = _ResBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class _Halve(nn.Module):
    """Strided convolution. The one row and column of padding stand below and to the right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, width, h/2, w/2)


class _Double(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, width, 2h, 2w)


class _Level(nn.Module):
    """The residual blocks of one resolution and, unless it is the last one, the step to the next."""

    def __init__(self, width_in: int, width_out: int, num_blocks: int, groups: int, step: nn.Module | None) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * num_blocks
        self.blocks = nn.ModuleList(_ResBlock(a, b, groups) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.step is None else self.step(x)


class _Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for number, width in enumerate(widths):
            step = _Halve(width) if number < len(widths) - 1 else None
            width_in = widths[max(0, number - 1)]
            self.levels.append(_Level(width_in, width, config.res_blocks_per_level, groups, step))
        self.middle = _Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)  # (B, channels[0], H, W)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)  # (B, channels[-1], h, w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2C, h, w)


class _Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = _Middle(widths[0], groups)
        self.levels = nn.ModuleList()
        for number, width in enumerate(widths):
            step = _Double(width) if number < len(widths) - 1 else None
            width_in = widths[max(0, number - 1)]
            self.levels.append(_Level(width_in, width, config.res_blocks_per_level + 1, groups, step))
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, raw_latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(raw_latents))  # (B, channels[-1], h, w)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


def _fast_layout(x: Tensor) -> Tensor:
    """Channels last: 15-20 % faster on CPU here, and what tensor cores want on GPU. Values do not change."""
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _fill_uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    values = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    parameter.copy_(values)
