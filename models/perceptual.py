"""LPIPS, the perceptual distance of the autoencoder's loss (Zhang et al. 2018, arXiv:1801.03924, Eq. 1).

The weights are not part of darkroom: docs/artifact.md says how to make the file from the published ones.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.artifact import load_weights
from models.errors import ModelError
from models.weights import read_weights

FILE_NAME = "lpips_vgg16.safetensors"
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG16's convolutions
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet in [0, 1], as VGG16 was trained
_EPS = 1e-10  # beside the norm of a feature vector


class LPIPS(nn.Module):
    """Frozen VGG16 features after each of the five stages, compared channel by channel with learned weights.

    The state has the published names: `features.N.weight` and `.bias` as in torchvision's VGG16, and
    `linK.model.1.weight` (1, channels, 1, 1).
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []  # layers of the feature stack that end a stage
        width = 3
        for number, stage in enumerate(_STAGES):
            if number:
                layers.append(nn.MaxPool2d(2))
            for width_out in stage:
                layers += [nn.Conv2d(width, width_out, 3, padding=1), nn.ReLU()]
                width = width_out
            self.ends.append(len(layers) - 1)
        self.features = nn.ModuleList(layers)
        for number, stage in enumerate(_STAGES):
            # The published module has a dropout first, so its convolution carries the number 1.
            linear = nn.Sequential(nn.Identity(), nn.Conv2d(stage[-1], 1, 1, bias=False))
            self.add_module(f"lin{number}", nn.ModuleDict({"model": linear}))
        self.register_buffer("mean", 2.0 * torch.tensor(_MEAN)[:, None, None] - 1.0, persistent=False)
        self.register_buffer("std", 2.0 * torch.tensor(_STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in evaluation mode: the network is frozen."""
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance of each pair, (B,), at least 0 and without unit. Gradients flow to both inputs.

        Args:
            images: (B, 3, H, W) in [-1, 1], at least 16x16 px.
            others: Like images.

        Raises:
            ValueError: The pictures are smaller than 16x16 px.
        """
        if min(images.shape[-2:]) < 2 ** (len(_STAGES) - 1):
            raise ValueError(f"pictures of {images.shape[-1]}x{images.shape[-2]} px: LPIPS needs at least 16x16")
        x = (torch.cat((images, others)) - self.mean) / self.std  # (2B, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last)
        distance = images.new_zeros(len(images))
        number = 0  # of the stage
        for position, layer in enumerate(self.features):
            x = layer(x)  # (2B, channels, H / 2^stage, W / 2^stage)
            if position in self.ends:
                ours, theirs = (x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPS)).chunk(2)
                linear = self.get_submodule(f"lin{number}.model.1")
                distance = distance + linear((ours - theirs).square()).mean(dim=(1, 2, 3))
                number += 1
        return distance


def load_perceptual(path: str | Path, sha256: str | None) -> LPIPS:
    """Reads LPIPS from a local safetensors file.

    Args:
        path: The file, or the folder that holds lpips_vgg16.safetensors.
        sha256: Of the file; None = not checked.

    Raises:
        ModelError: The file is missing, damaged, has another hash, or does not hold LPIPS(VGG16).
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise ModelError(
            f"{path} is missing: put LPIPS(VGG16) weights there (sha256 {sha256 or 'any'}; docs/artifact.md says how to"
            " make the file), or leave the perceptual loss out"
        )
    lpips = LPIPS()
    load_weights(lpips, read_weights([path], sha256), str(path))
    return lpips
