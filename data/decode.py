"""From the bytes of one sample to an RGB picture: only JPEG, PNG and WebP, and never more pixels than agreed."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
_ORIENTATION = 0x0112  # EXIF tag
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L")


class BadImage(Exception):
    """One picture that cannot be used; its text says why. The caller masks, skips or refuses the sample."""


def image_size(data: bytes) -> tuple[int, int]:
    """Reads (width, height) in pixels, as displayed (EXIF orientation applied), from the header alone.

    Raises:
        BadImage: not a readable JPEG, PNG or WebP.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is decoded here, so no bomb goes off
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else (image.width, image.height)
        except Exception as error:  # Pillow raises whatever its parsers trip over
            raise BadImage(_reason(error)) from error


def decode_image(data: bytes, min_side: int = 0, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a picture to 8-bit RGB: EXIF orientation applied, transparency laid over white, first frame only.

    Args:
        data: the bytes of a JPEG, PNG or WebP file.
        min_side: if not 0, a JPEG may be decoded at a half, quarter or eighth of its size as long as the shorter side
            keeps at least twice this many pixels.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        BadImage: unreadable, truncated, of another format, or too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise BadImage(f"{image.width}x{image.height} pixels, more than {max_pixels}")
                if min_side:
                    image.draft(None, (2 * min_side, 2 * min_side))
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
        except BadImage:
            raise
        except Exception as error:  # Pillow raises whatever its parsers trip over
            raise BadImage(_reason(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a readable JPEG, PNG or WebP"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "far too many pixels"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
