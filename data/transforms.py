"""From the bytes of a picture to the training picture: crop, antialiased resize, the range the models see."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from data.decode import MAX_PIXELS, Box, Decoded, Size, Turn, decode_box, read_header
from data.keyed_random import keyed_integer

Crop = Literal["centre", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A training picture and where it comes from."""

    pixels: torch.Tensor  # (3, height, width) uint8, perhaps a view of (height, width, 3)
    size: Size  # px of the original as displayed
    box: Box  # px of the original as displayed: what the crop kept


def load_picture(
    data: bytes,
    width: int,
    height: int,
    *,
    crop: Crop = "centre",
    seed: int = 0,
    sample_number: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """Decodes a picture, turns it as EXIF says, crops the largest box of the wanted aspect and resizes it.

    The resize is bicubic with antialiasing. A JPEG that is far larger than the result is decoded at a half, a quarter
    or an eighth of its size; its box then begins on that grid, less than one pixel of the result from where `crop` put
    it, and `box` says so. A picture that has the wanted size comes back pixel for pixel.

    Args:
        data: the bytes of a JPEG, PNG or WebP file.
        width: of the result in pixels.
        height: of the result in pixels.
        crop: where the box lies; see crop_box.
        seed: of the run.
        sample_number: run-wide number of the sample.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        BadImage: unreadable, truncated, damaged, of another format, or too large.
    """
    stored = read_header(data, max_pixels)
    turn = stored.turn
    size = turn.size(stored.size)
    box = turn.box_as_stored(crop_box(size, (width, height), crop, seed, sample_number), size)
    wanted = turn.size((width, height))
    shrink = min((box[2] - box[0]) / wanted[0], (box[3] - box[1]) / wanted[1])
    decoded = decode_box(stored, box, shrink)
    pixels = _turned(_resized(decoded, wanted), turn)  # (3, height, width)
    return Picture(pixels=pixels, size=size, box=turn.box_as_displayed(decoded.box, size))


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Scales 8-bit pixels 0 … 255 to float32 in [-1, 1]."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def crop_box(size: Size, aspect: Size, crop: Crop = "centre", seed: int = 0, sample_number: int = 0) -> Box:
    """Returns the largest box in a picture that has the aspect ratio of `aspect`, to the nearest pixel.

    Args:
        size: of the picture.
        aspect: the wanted (width, height), of any scale.
        crop: in the middle, or where seed and sample number put it.
        seed: of the run.
        sample_number: run-wide number of the sample.
    """
    width, height = size
    if width * aspect[1] >= height * aspect[0]:
        box_width, box_height = max(1, round(height * aspect[0] / aspect[1])), height
    else:
        box_width, box_height = width, max(1, round(width * aspect[1] / aspect[0]))
    slack = width - box_width + height - box_height  # one of the two differences is 0
    offset = slack // 2 if crop == "centre" else keyed_integer(slack + 1, seed, "crop", sample_number)
    x, y = (offset, 0) if box_width < width else (0, offset)
    return x, y, x + box_width, y + box_height


def _resized(decoded: Decoded, wanted: Size) -> torch.Tensor:
    """Returns the decoded box at the wanted (width, height): (3, height, width) uint8."""
    left, top, right, bottom = decoded.box
    pixels = torch.from_numpy(decoded.pixels).permute(2, 0, 1)  # (3, h, w), channels last
    if (right - left, bottom - top) == wanted:
        return pixels
    # The last row and column of a reduced picture may lie half outside the box: so the scale is given, not the size.
    scale_y = wanted[1] * decoded.reduction / (bottom - top)
    scale_x = wanted[0] * decoded.reduction / (right - left)
    above = 1 + 1e-9  # or rounding would lose a row: the size is floor(h * scale)
    # For 8-bit pixels with the channels last, torch has a vectorised kernel, ten times as fast as Pillow's.
    return F.interpolate(
        pixels.unsqueeze(0), scale_factor=(scale_y * above, scale_x * above), mode="bicubic", antialias=True
    )[0]


def _turned(pixels: torch.Tensor, turn: Turn) -> torch.Tensor:
    if turn.transpose:
        pixels = pixels.transpose(1, 2)
    mirrored = [dim for dim, mirror in ((2, turn.mirror_x), (1, turn.mirror_y)) if mirror]
    return pixels.flip(mirrored) if mirrored else pixels
