"""The patch discriminator of the autoencoder's adversarial loss (Isola et al., arXiv:1611.07004, section 3.2.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MAX_WIDTH_FACTOR = 8  # the width stops doubling here
_SLOPE = 0.2  # of the leaky ReLUs
_INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Size of the discriminator."""

    channels: int = 64  # width after the first convolution; doubles per layer up to 8 times
    num_layers: int = 3  # halvings; a logit sees 70x70 px with 3, 34x34 px with 2, 16x16 px with 1
    norm_groups: int = 32  # groups of the group norms; 0 = no normalisation

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}: give at least 1")
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}: give at least 1")
        if self.norm_groups < 0 or (self.norm_groups and (2 * self.channels) % self.norm_groups):
            raise ValueError(
                f"norm_groups is {self.norm_groups}, which does not divide {2 * self.channels} (twice channels):"
                " give a divisor, or 0 for no normalisation"
            )

    @property
    def smallest_image(self) -> int:
        """Side in px of the smallest picture that leaves a logit."""
        return 3 * 2**self.num_layers


class Discriminator(nn.Module):
    """Strided 4x4 convolutions that give one logit per overlapping patch.

    Group norm instead of the batch norm of the paper: the statistics of a batch differ from rank to rank.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels
        self.conv_in = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for number in range(1, config.num_layers + 1):
            width_out = config.channels * min(2**number, _MAX_WIDTH_FACTOR)
            stride = 2 if number < config.num_layers else 1
            # A bias would be undone by the normalisation.
            self.convs.append(nn.Conv2d(width, width_out, 4, stride=stride, padding=1, bias=config.norm_groups == 0))
            self.norms.append(nn.GroupNorm(config.norm_groups, width_out) if config.norm_groups else nn.Identity())
            width = width_out
        self.conv_out = nn.Conv2d(width, 1, 4, padding=1)

    def init_weights(self, seed: int) -> None:
        """Fills every weight as a function of the seed alone: N(0, 0.02²), biases 0 (arXiv:1611.07004, appendix)."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                with torch.no_grad():
                    module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * _INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] to patch logits (B, 1, H', W'), high = real.

        Raises:
            ValueError: The pictures are too small for the number of layers.
        """
        smallest = self.config.smallest_image
        if min(images.shape[-2:]) < smallest:
            raise ValueError(
                f"pictures of {images.shape[-1]}x{images.shape[-2]} px are too small for a discriminator with"
                f" num_layers = {self.config.num_layers} (at least {smallest} px): lower num_layers"
            )
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.leaky_relu(self.conv_in(x), _SLOPE)  # (B, channels, H/2, W/2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), _SLOPE)
        return self.conv_out(x).contiguous()
