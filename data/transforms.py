"""From an RGB picture to a square training image."""

from typing import Literal

import numpy as np
import torch
from PIL import Image

from data.keyed_random import keyed_integer

Crop = Literal["centre", "random"]


def crop_box(
    width: int, height: int, crop: Crop = "centre", seed: int = 0, sample_number: int = 0
) -> tuple[int, int, int, int]:
    """Returns the largest square (x0, y0, x1, y1) in pixels: in the middle, or where seed and sample number put it."""
    side = min(width, height)
    slack = max(width, height) - side
    offset = slack // 2 if crop == "centre" else keyed_integer(slack + 1, seed, "crop", sample_number)
    x, y = (offset, 0) if width > height else (0, offset)
    return x, y, x + side, y + side


def to_square(
    image: Image.Image, size: int, crop: Crop = "centre", seed: int = 0, sample_number: int = 0
) -> torch.Tensor:
    """Crops a square, resizes it with antialiasing and scales it to [-1, 1].

    Args:
        image: RGB.
        size: side of the result in pixels.
        crop: where the square is cut.
        seed: of the run.
        sample_number: run-wide number of the sample.

    Returns:
        (3, size, size) float32 in [-1, 1].
    """
    box = crop_box(image.width, image.height, crop, seed, sample_number)
    if image.size != (size, size):
        # Lanczos widens with the reduction, so nothing aliases; far reductions begin with a cheap box filter.
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # (size, size, 3)
    return pixels.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0)  # (3, size, size)
