"""Pictures as they are saved: 8-bit tensors, mosaics of equal tiles in one PNG, and data URIs for the report.

Everything that is measured passes through 8 bits first, so a figure belongs to the pictures a user would look at.
`images` are float in [-1, 1] as everywhere; `pictures` are uint8, both (B, 3, H, W).
"""

import base64
import hashlib
import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.errors import EvalError


def to_pictures(images: Tensor) -> Tensor:
    """Rounds images, (B, 3, H, W) float in [-1, 1], to uint8; what lies outside is clipped."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_images(pictures: Tensor) -> Tensor:
    """The float images in [-1, 1], (B, 3, H, W), of uint8 pictures."""
    return pictures.float() / 127.5 - 1


def mosaic(pictures: Tensor, columns: int) -> Image.Image:
    """Sets (B, 3, H, W) uint8 pictures side by side, row by row, without gaps; a short last row is left white."""
    count, channels, height, width = pictures.shape
    rows = math.ceil(count / columns)
    canvas = torch.full((rows * columns, channels, height, width), 255, dtype=torch.uint8)
    canvas[:count] = pictures
    canvas = canvas.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)  # (R, H, K, W, 3)
    return Image.fromarray(canvas.reshape(rows * height, columns * width, channels).numpy())


def save_mosaic(path: Path, pictures: Tensor, columns: int = 16) -> None:
    """Writes pictures as one new PNG (see `mosaic`).

    Raises:
        EvalError: if the file exists.
    """
    if path.exists():
        raise EvalError(f"{path} exists and is never overwritten; give another name or move it away")
    mosaic(pictures, columns).save(path, format="PNG")


def load_tiles(path: Path, count: int) -> Tensor:
    """Cuts a mosaic of `count` square tiles (gaps of 0, 1 or 2 pixels around them) into (count, 3, P, P) uint8.

    The tile size is the largest one that fits the file's size, the count, and a last row that is not empty.

    Raises:
        EvalError: if the file is no such mosaic.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3)
    except OSError as error:
        raise EvalError(f"{path}: not readable as a PNG ({error}); make the samples again") from None
    height, width = pixels.shape[:2]
    for gap in (0, 2, 1):
        for size in range(min(height, width), 3, -1):
            columns, spare_w = divmod(width - gap, size + gap)
            rows, spare_h = divmod(height - gap, size + gap)
            if spare_w or spare_h or columns < 1 or not (rows - 1) * columns < count <= rows * columns:
                continue
            corners = [(gap + r * (size + gap), gap + c * (size + gap)) for r in range(rows) for c in range(columns)]
            tiles = [pixels[y : y + size, x : x + size] for y, x in corners[:count]]
            return torch.stack(tiles).permute(0, 3, 1, 2).contiguous()
    raise EvalError(f"{path}: {width}x{height} pixels are no mosaic of {count} square pictures")


def data_uri(picture: Tensor) -> str:
    """One (3, H, W) uint8 picture as a ``data:image/png`` address."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def digest(texts: list[str]) -> str:
    """SHA-256 of a list of prompts in their order: two results with one digest answered the same list."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
