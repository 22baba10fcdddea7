"""Every accepted kind of picture becomes RGB as Pillow has it in full; all else is refused with a reason."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from benchmarks.photographs import photograph
from data import decode
from data.decode import BadImage, check_picture, image_size
from data.keyed_random import keyed_integer, keyed_permutation
from data.transforms import load_picture

ORIENTATION = 0x0112


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def decoded(data: bytes) -> np.ndarray:
    """(h, w, 3), at the picture's own size: nothing is resized."""
    return load_picture(data, *image_size(data)).pixels.permute(1, 2, 0).numpy()


def ramp(mode: str = "L") -> Image.Image:
    return Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)


def png(width: int, height: int, pixels: bytes = b"", bits: int = 8, colours: int = 0, **chunks: bytes) -> bytes:
    """A PNG by hand; `pixels` are the rows with their filter bytes."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))]
    parts += [(name.encode(), body) for name, body in chunks.items()]
    parts += [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in parts:
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def assert_refused(data: bytes, reason: str | None = None) -> None:
    for action in (lambda: load_picture(data, 16, 16), lambda: check_picture(data)):
        with pytest.raises(BadImage, match=reason) as caught:
            action()
        assert 0 < len(str(caught.value)) <= 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"subsampling": "4:4:4"}, {"progressive": True}, {"quality": 100}])
def test_a_jpeg_is_what_pillow_makes_of_it(options: dict[str, Any]) -> None:
    data = encode(photograph(157, 83, 0), "JPEG", **options)
    assert np.array_equal(decoded(data), np.asarray(opened(data)))


def test_jpegs_of_other_colours() -> None:
    grey = encode(photograph(64, 48, 1).convert("L"), "JPEG")
    assert np.array_equal(decoded(grey), np.asarray(opened(grey).convert("RGB")))
    plain = encode(photograph(64, 48, 1), "JPEG", keep_rgb=True)  # RGB in the file, not YCbCr
    assert np.array_equal(decoded(plain), np.asarray(opened(plain)))
    cmyk = encode(photograph(64, 48, 1).convert("CMYK"), "JPEG", quality=95)
    assert opened(cmyk).mode == "CMYK"
    assert np.array_equal(decoded(cmyk), np.asarray(opened(cmyk).convert("RGB")))
    assert np.abs(decoded(cmyk).astype(int) - np.asarray(photograph(64, 48, 1))).mean() < 4  # and not its negative


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_grey_palette_and_colour(kind: str, options: dict[str, Any]) -> None:
    for mode in ("L", "P", "RGB"):
        if (kind, mode) != ("WEBP", "P"):
            assert np.array_equal(decoded(encode(ramp(mode), kind, **options)), np.asarray(ramp("RGB"))), mode
    assert (decoded(encode(Image.new("1", (3, 3), 1), kind, **options)) == 255).all()


def test_sixteen_bits_keep_the_high_byte() -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(decoded(encode(Image.fromarray(values * 256 + 17))), np.asarray(ramp("RGB")))
    row = b"".join(struct.pack(">HHH", value * 256, 65535, 255) for value in range(16))
    assert decoded(png(16, 1, b"\0" + row, bits=16, colours=2)).tolist() == [[[value, 255, 0] for value in range(16)]]


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    clear.putpixel((0, 0), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 51))
    for data in (encode(clear), encode(clear, "WEBP", lossless=True, exact=True)):
        assert decoded(data).tolist() == [[[255, 255, 255], [204, 204, 204], [255, 0, 0]]]
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((0, 0), (0, 0))
    assert decoded(encode(grey)).tolist() == [[[255] * 3, [0] * 3]]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    assert decoded(encode(palette, transparency=0)).tolist() == [[[255] * 3, [40, 50, 60]]]
    assert decoded(encode(Image.new("RGB", (1, 1), "red"), transparency=(255, 0, 0))).tolist() == [[[255] * 3]]


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_the_first_frame_of_an_animation(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(opened(data), "n_frames", 1) == 3
    assert (decoded(data) == (255, 0, 0)).all()


def test_the_first_picture_of_a_file_with_several() -> None:
    pictures = [photograph(64, 48, seed) for seed in range(2)]
    data = encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:])  # as phones and stereo cameras do
    assert np.array_equal(decoded(data), np.asarray(opened(encode(pictures[0], "JPEG"))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_orientation(kind: str, options: dict[str, Any], orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(photograph(75, 38, 1), kind, exif=exif, **options)
    displayed = ImageOps.exif_transpose(opened(data))
    assert image_size(data) == displayed.size
    assert np.array_equal(decoded(data), np.asarray(displayed))
    picture = load_picture(data, 30, 36, crop="random", seed=3, sample_number=orientation)
    cut = displayed.crop(picture.box).resize((30, 36), Image.Resampling.BICUBIC)
    assert picture.size == displayed.size
    assert (
        np.abs(picture.pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(cut)).max() <= 5
    )  # columns first, or rows


def test_an_impossible_orientation_is_none() -> None:
    for value in (0, 9, 700):
        exif = Image.Exif()
        exif[ORIENTATION] = value
        assert image_size(encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)) == (8, 4)
    assert image_size(encode(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0MM\0*garbage")) == (8, 4)


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "BMP", "GIF", "PPM", "ICO", "TGA", "JPEG2000", "PDF"])
def test_other_formats_are_refused_whatever_their_name(kind: str) -> None:
    assert_refused(encode(Image.new("RGB", (32, 32), "red"), kind), "not a readable JPEG, PNG or WebP")


def test_no_pictures_are_refused() -> None:
    fits = b"".join(card.ljust(80) for card in (b"SIMPLE  =   T", b"BITPIX  =   8", b"NAXIS   =   0", b"END"))
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"<html>403</html>", b"RIFF\x10\0\0\0WEBPVP8 ", fits.ljust(2880)):
        assert_refused(data)
        with pytest.raises(BadImage):
            image_size(data)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"restart_marker_rows": 1}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_a_file_cut_short_is_refused(kind: str, options: dict[str, Any]) -> None:
    data = encode(photograph(96, 64, 0), kind, **options)
    assert decoded(data).shape == (64, 96, 3)
    # In a PNG's last 22 bytes are only checksums and the end mark: all pixels have come by then.
    last = len(data) - (23 if kind == "PNG" else 1)
    for length in [*range(0, last, 37), last]:
        assert_refused(data[:length])


def test_a_cut_cmyk_is_refused_too() -> None:
    data = encode(photograph(96, 64, 0).convert("CMYK"), "JPEG")
    for length in (len(data) // 3, len(data) - 400):
        assert_refused(data[:length])


def test_a_damaged_scan_is_refused_and_padding_is_not() -> None:
    data = encode(photograph(96, 64, 0), "JPEG")
    spoilt = bytearray(data)
    spoilt[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    assert_refused(bytes(spoilt), "Corrupt JPEG data")
    assert_refused(data[: len(data) // 2] + b"\xff\xd9", "Corrupt JPEG data")  # cut, and the end mark put back
    padded = data[:-2] + bytes(2) + data[-2:]
    assert np.array_equal(decoded(padded), np.asarray(opened(data)))
    assert np.array_equal(decoded(data + b"a second file"), np.asarray(opened(data)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_flipped_bytes_are_a_picture_or_refused(kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encode(photograph(48, 40, 1), kind, exif=exif)
    rng = np.random.default_rng(0)
    refused = 0
    for turn in range(300):
        flipped = bytearray(data)
        last = len(data) if turn % 2 else 100  # half of them among the headers
        for place in rng.integers(0, last, 1 + turn % 3):
            flipped[place] = rng.integers(256)
        try:
            picture = load_picture(bytes(flipped), 12, 16, max_pixels=10_000)
            assert picture.pixels.shape == (3, 16, 12) and picture.pixels.dtype == torch.uint8
        except BadImage:
            refused += 1
    assert refused > 30


def test_too_many_pixels_are_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", refuse)
    rows = zlib.compressobj(9)  # 169 megapixels in 165 kB
    body = b"".join(rows.compress(bytes(13_001 * 1000)) for _ in range(13)) + rows.flush()
    bomb = png(13_000, 13_000).replace(zlib.compress(b""), body)
    assert len(bomb) < 200_000 and image_size(bomb) == (13_000, 13_000)
    assert_refused(bomb, "13000x13000 pixels, more than 64000000")
    jpeg = bytearray(encode(Image.new("RGB", (16, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 65_500, 65_500)
    webp = bytearray(encode(Image.new("RGB", (16, 8)), "WEBP", lossless=True, icc_profile=b"any"))
    canvas = webp.index(b"VP8X") + 12
    webp[canvas : canvas + 6] = (16_383).to_bytes(3, "little") * 2
    for data in (png(60_000, 60_000), png(2**31 - 1, 2**31 - 1), bytes(jpeg), bytes(webp)):
        assert_refused(data, "far too many pixels")
    assert_refused(png(0, 5), "not a readable")
    small = encode(Image.new("RGB", (64, 64)), "JPEG")
    with pytest.raises(BadImage, match="64x64 pixels, more than 4095"):
        load_picture(small, 8, 8, max_pixels=64 * 64 - 1)
    monkeypatch.undo()
    assert load_picture(small, 8, 8, max_pixels=64 * 64).size == (64, 64)


def test_a_header_is_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    for kind in ("PNG", "JPEG"):
        assert image_size(encode(Image.new("RGB", (8, 4)), kind)) == (8, 4)


def test_keyed_randomness_is_pinned() -> None:
    """These values are part of the order's version: if they change, no run can be resumed exactly."""
    assert keyed_permutation(8, 0, "shards", 1).tolist() == [5, 6, 3, 4, 1, 0, 2, 7]
    assert [keyed_integer(1000, 0, "crop", n) for n in range(3)] == [193, 282, 827]
    with pytest.raises(ValueError, match="seed=-1"):
        keyed_integer(2, -1, "crop")
