"""Where and when: patches of a latent picture, their 2-D sin-cos positions, and features of the path time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.errors import ModelError

TIME_FEATURES = 256  # width of the sinusoidal time features before their MLP (SD3, arXiv:2403.03206)
_MAX_PERIOD = 10_000.0  # longest period of both kinds of sinusoids, in radians' units (Vaswani et al. 2017)


def time_features(t: Tensor) -> Tensor:
    """Sinusoidal features of the path time, cosines first, of 1000 t.

    Args:
        t: (B,) path time in [0, 1].

    Returns:
        (B, 256) float32, always: phases reach 1000 radians, which bfloat16 cannot hold.
    """
    half = TIME_FEATURES // 2
    # Built in place rather than kept as a buffer: a cast of the model to bfloat16 would spoil a buffer.
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    phases = (1000.0 * t.float())[:, None] * torch.exp(steps * (-math.log(_MAX_PERIOD)) / half)[None, :]  # (B, 128)
    return torch.cat((phases.cos(), phases.sin()), dim=1)


class GridPositions(nn.Module):
    """2-D sin-cos positions of a patch grid of any aspect ratio, cropped from the middle of a square one.

    The first half of the width encodes the column, the second half the row, each as sines then cosines. Both halves
    come from one table over a side, so the square grid itself is never stored.

    Args:
        width: D, divisible by 4.
        max_grid: Patches per side of the square.
        base_grid: Patches per side at the resolution of training; neighbours lie base_grid / max_grid apart.
    """

    table: Tensor

    def __init__(self, width: int, max_grid: int, base_grid: int):
        super().__init__()
        self.width, self.max_grid, self.base_grid = width, max_grid, base_grid
        self.register_buffer("table", self._build(), persistent=False)

    def _build(self) -> Tensor:
        """(max_grid, D / 2) float32: sines then cosines of every coordinate along a side."""
        quarter = self.width // 4
        places = torch.arange(self.max_grid, dtype=torch.float32, device="cpu") / (self.max_grid / self.base_grid)
        steps = torch.arange(quarter, dtype=torch.float64, device="cpu")
        phases = torch.outer(places.double(), _MAX_PERIOD ** (-steps / quarter))
        return torch.cat((phases.sin(), phases.cos()), dim=1).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GridPositions":
        # Follow a move to another device, but not a cast to bfloat16, and never keep what to_empty() leaves behind.
        super()._apply(fn, recurse)
        if not self.table.is_meta:
            self.table = self._build().to(self.table.device)
        return self

    def forward(self, rows: int, cols: int) -> Tensor:
        """Positions of a grid of rows x cols patches, row by row.

        Returns:
            (rows * cols, D) float32.

        Raises:
            ModelError: The grid is larger than the square.
        """
        if max(rows, cols) > self.max_grid:
            raise ModelError(
                f"a grid of {rows} x {cols} patches exceeds the model's max_grid = {self.max_grid}: "
                "use a smaller picture or a model with a larger max_grid"
            )
        top, left = (self.max_grid - rows) // 2, (self.max_grid - cols) // 2
        x = self.table[left : left + cols].expand(rows, -1, -1)  # (rows, cols, D / 2)
        y = self.table[top : top + rows, None].expand(-1, cols, -1)  # (rows, cols, D / 2)
        return torch.cat((x, y), dim=2).flatten(0, 1)  # (N, D)


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Cut a latent picture into patches, row by row.

    A linear layer on these patches is a convolution with stride = kernel = patch_size, without its overhead.

    Args:
        latents: (B, C, h, w), h and w divisible by patch_size.
        patch_size: p, in latent pixels.

    Returns:
        (B, N, C * p * p), channel slowest within a patch.
    """
    B, C, h, w = latents.shape
    p = patch_size
    patches = latents.reshape(B, C, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, h/p, w/p, C, p, p)
    return patches.reshape(B, (h // p) * (w // p), C * p * p)


def unpatchify(patches: Tensor, patch_size: int, rows: int, cols: int) -> Tensor:
    """The inverse of `patchify`.

    Args:
        patches: (B, rows * cols, C * p * p).
        patch_size: p, in latent pixels.
        rows: h / p.
        cols: w / p.

    Returns:
        (B, C, h, w).
    """
    p = patch_size
    grid = patches.reshape(patches.shape[0], rows, cols, -1, p, p).permute(0, 3, 1, 4, 2, 5)  # (B, C, rows, p, cols, p)
    return grid.reshape(patches.shape[0], -1, rows * p, cols * p)
