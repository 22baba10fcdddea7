"""From the bytes of one sample to RGB pixels: only JPEG, PNG and WebP, and never more pixels than agreed.

JPEG goes through libjpeg-turbo (simplejpeg), at a half, a quarter or an eighth of its size where that is enough; Pillow
reads headers, the other formats and the JPEGs that simplejpeg does not take.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are outside

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
# Where the caller shrinks what it gets at least so many times, a cheaper decode does: it stays within 41 dB of a full
# one on sharp photographs (39 dB at 1.5, 44 dB at 2).
CHEAP_FROM = 1.75
_REDUCTIONS = (8, 4, 2)  # the scaled decodes that libjpeg-turbo has fast code for
_LEAST_SIDE = 64  # px; simplejpeg chooses the scale by the resulting size, which tells too little of tiny pictures
_ORIENTATION = 0x0112  # EXIF tag
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L")
_JPEG = b"\xff\xd8"
# libjpeg goes on with a warning and invents what is missing. A few padding bytes before the end mark (0xd9) do occur in
# sound files; many of them are what is left over when a damaged stream was misread.
_DAMAGE = re.compile(r"Premature end|Corrupt JPEG data(?!: \d extraneous bytes before marker 0xd9)")


# read_header has its own limit of pixels, and odd metadata is nobody's concern. For the whole process, as silencing
# single calls (warnings.catch_warnings) is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\b")


class BadImage(Exception):
    """One picture that cannot be used; its text says why. The caller masks, skips or refuses the sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What EXIF asks for to display a stored picture: transpose it, then mirror it along x and along y."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def size(self, size: Size) -> Size:
        """Turns a (width, height), either way."""
        return (size[1], size[0]) if self.transpose else size

    def box_as_stored(self, box: Box, displayed: Size) -> Box:
        """Returns where a box of the displayed picture lies in the stored one."""
        return self._swap(self._mirror(box, displayed))

    def box_as_displayed(self, box: Box, displayed: Size) -> Box:
        """Returns where a box of the stored picture lies in the displayed one."""
        return self._mirror(self._swap(box), displayed)

    def _swap(self, box: Box) -> Box:
        left, top, right, bottom = box
        return (top, left, bottom, right) if self.transpose else box

    def _mirror(self, box: Box, displayed: Size) -> Box:
        left, top, right, bottom = box
        if self.mirror_x:
            left, right = displayed[0] - right, displayed[0] - left
        if self.mirror_y:
            top, bottom = displayed[1] - bottom, displayed[1] - top
        return left, top, right, bottom


_STRAIGHT = Turn()
_TURNS = {  # by EXIF orientation
    2: Turn(mirror_x=True),
    3: Turn(mirror_x=True, mirror_y=True),
    4: Turn(mirror_y=True),
    5: Turn(transpose=True),
    6: Turn(transpose=True, mirror_x=True),
    7: Turn(transpose=True, mirror_x=True, mirror_y=True),
    8: Turn(transpose=True, mirror_y=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A picture of which only the header was read."""

    data: bytes
    image: Image.Image  # not decoded yet
    size: Size  # px as stored
    turn: Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A part of a stored picture, perhaps reduced."""

    pixels: np.ndarray  # (h, w, 3) uint8; w is (right - left) / reduction, rounded up
    box: Box  # px of the stored picture at full size
    reduction: int


def image_size(data: bytes) -> Size:
    """Reads (width, height) in pixels, as displayed (EXIF orientation applied), from the header alone.

    Raises:
        BadImage: not a readable JPEG, PNG or WebP.
    """
    stored = read_header(data)
    return stored.turn.size(stored.size)


def check_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Decodes a picture and forgets it.

    Raises:
        BadImage: as read_header and decode_box do.
    """
    stored = read_header(data, max_pixels)
    decode_box(stored, (0, 0, *stored.size))


def read_header(data: bytes, max_pixels: int | None = None) -> Stored:
    """Reads what stands before the pixels: format, size, orientation.

    Args:
        data: the bytes of a JPEG, PNG or WebP file, whatever its name says.
        max_pixels: larger pictures are refused; None = any size.

    Raises:
        BadImage: unreadable, of another format, or too large.
    """
    with _every_failure_is_a_bad_image():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise BadImage(f"{width}x{height} pixels, more than {max_pixels}")
        # Not image.getexif(): of a PNG without EXIF it decodes all pixels, to look behind them.
        turn = _TURNS.get(Image.Image.getexif(image).get(_ORIENTATION, 1), _STRAIGHT)
        return Stored(data=data, image=image, size=(width, height), turn=turn)


def decode_box(stored: Stored, box: Box, shrink: float = 1.0) -> Decoded:
    """Decodes a part of a picture to 8-bit RGB, transparency laid over white, the first frame of an animation.

    Args:
        stored: from read_header.
        box: px of the stored picture.
        shrink: how many times smaller the caller will make the box. A JPEG may then come at a half, a quarter or an
            eighth of its size, and the box moves to the left and up to begin on the grid of that smaller picture.

    Raises:
        BadImage: unreadable, truncated or damaged.
    """
    reduction = 1
    if min(box[2] - box[0], box[3] - box[1]) >= _LEAST_SIDE:
        reduction = next((number for number in _REDUCTIONS if shrink >= CHEAP_FROM * number), 1)
    with _every_failure_is_a_bad_image():
        pixels = None
        if stored.data.startswith(_JPEG):
            pixels = _decode_jpeg(stored, reduction, coarse_colour=shrink >= CHEAP_FROM)
        if pixels is None:
            return Decoded(pixels=np.array(_to_rgb(stored.image.crop(box))), box=box, reduction=1)
    off_x, off_y = box[0] % reduction, box[1] % reduction
    left, top, right, bottom = box[0] - off_x, box[1] - off_y, box[2] - off_x, box[3] - off_y
    rows = slice(top // reduction, -(-bottom // reduction))
    columns = slice(left // reduction, -(-right // reduction))
    return Decoded(pixels=pixels[rows, columns], box=(left, top, right, bottom), reduction=reduction)


def _decode_jpeg(stored: Stored, reduction: int, coarse_colour: bool) -> np.ndarray | None:
    """Returns (ceil(height / reduction), ceil(width / reduction), 3), or None for a JPEG that is left to Pillow.

    `coarse_colour` repeats colour that is stored at half resolution instead of interpolating it.
    """
    wanted = -(-stored.size[1] // reduction), -(-stored.size[0] // reduction)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(stored.data)
        if (width, height) != stored.size or colours not in ("YCbCr", "RGB", "Gray"):
            return None
        pixels = simplejpeg.decode_jpeg(
            stored.data, fastupsample=coarse_colour, min_height=wanted[0], min_width=wanted[1], strict=True
        )
    except ValueError as error:
        if _DAMAGE.search(str(error)):
            raise BadImage(_reason(error)) from error
        return None
    return pixels if pixels.shape[:2] == wanted else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _every_failure_is_a_bad_image() -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except Exception as error:  # the parsers raise whatever they trip over
        raise BadImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a readable JPEG, PNG or WebP"
    if isinstance(error, Image.DecompressionBombError):
        return "far too many pixels"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
