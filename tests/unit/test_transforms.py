"""Training pictures: the box is the one asked for, the pixels come from it, and a cheap decode is good enough."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from benchmarks.photographs import jpeg, photograph
from data.decode import decode_box, read_header
from data.keyed_random import keyed_integer
from data.transforms import Picture, crop_box, load_picture, to_float

ORIENTATION = 0x0112


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, from 0 to 240."""
    x = np.arange(width) * 240 / max(1, width - 1)
    y = np.arange(height) * 240 / max(1, height - 1)
    pixels = np.zeros((height, width, 3))
    pixels[:, :, 0], pixels[:, :, 1], pixels[:, :, 2] = x, y[:, None], 128
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def shift_in_result_px(picture: Picture) -> tuple[float, float]:
    """How far the pixels of a gradient lie off where the box says, in px of the result, as (x, y)."""
    pixels = picture.pixels.numpy().astype(np.float64)
    off = []
    for channel, (first, last, side) in enumerate(
        ((picture.box[0], picture.box[2], picture.size[0]), (picture.box[1], picture.box[3], picture.size[1]))
    ):
        line = pixels[channel].mean(axis=channel)
        step = (last - first) / len(line)
        expected = (first + (np.arange(len(line)) + 0.5) * step - 0.5) * 240 / (side - 1)
        inner = slice(len(line) // 4, -(len(line) // 4))  # at its edges a filter has no neighbours outside the box
        off.append(float(np.mean(line[inner] - expected[inner]) / (step * 240 / (side - 1))))
    return off[0], off[1]


def psnr_db(picture: Picture, data: bytes, box: tuple[int, int, int, int]) -> float:
    """Against Pillow's full decode, crop and antialiased bicubic resize."""
    size = (picture.pixels.shape[2], picture.pixels.shape[1])
    full = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    reference = np.asarray(full.crop(box).resize(size, Image.Resampling.BICUBIC), np.float64)
    return float(10 * np.log10(255**2 / np.mean((picture.pixels.permute(1, 2, 0).numpy() - reference) ** 2)))


def test_boxes_are_as_large_as_can_be() -> None:
    assert crop_box((10, 4), (1, 1)) == (3, 0, 7, 4) and crop_box((4, 11), (1, 1)) == (0, 3, 4, 7)
    assert crop_box((640, 480), (768, 512)) == (0, 26, 640, 453)
    assert crop_box((300, 400), (512, 768)) == (16, 0, 283, 400)
    assert crop_box((1, 1000), (3, 1)) == (0, 499, 1, 500)
    assert crop_box((7, 5), (7, 5)) == (0, 0, 7, 5)


def test_random_boxes_depend_on_seed_and_number_alone() -> None:
    boxes = [crop_box((10, 4), (1, 1), "random", 0, number) for number in range(200)]
    assert {box[0] for box in boxes} == set(range(7))
    assert [box[0] for box in boxes] == [keyed_integer(7, 0, "crop", number) for number in range(200)]
    assert boxes != [crop_box((10, 4), (1, 1), "random", 1, number) for number in range(200)]
    assert {crop_box((4, 10), (2, 1), "random", 0, number)[1] for number in range(200)} == set(range(9))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_of_the_right_size_comes_back_pixel_for_pixel(kind: str) -> None:
    data = encode(photograph(64, 48, 0), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    picture = load_picture(data, 64, 48, crop="random")
    assert np.array_equal(picture.pixels.permute(1, 2, 0).numpy(), expected)
    assert picture.size == (64, 48) and picture.box == (0, 0, 64, 48)
    cut = load_picture(data, 48, 48)  # cropped, not resized
    assert cut.box == (8, 0, 56, 48) and np.array_equal(cut.pixels.permute(1, 2, 0).numpy(), expected[:, 8:56])


def test_the_range_of_the_models() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    values = to_float(pixels)
    assert values.dtype == torch.float32 and values.min() == -1 and values.max() == 1
    assert torch.equal(values, pixels.to(torch.float32).div(127.5).sub(1.0))
    assert pixels.sum() == 255 * 128  # not changed in place


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(333, 222), (801, 1203), (1999, 1501)])
def test_pixels_come_from_the_box(kind: str, size: tuple[int, int]) -> None:
    """All eight orientations, random boxes, and with JPEG all reduced decodes."""
    orientations = range(1, 9) if kind == "JPEG" else (1, 6)
    for orientation in orientations:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        displayed = gradient(*size)
        # Stored so that EXIF turns it back: the reverse of 6 is 8, the others are their own reverse.
        undo = Image.Exif()
        undo[ORIENTATION] = {6: 8, 8: 6}.get(orientation, orientation)
        displayed.info["exif"] = undo.tobytes()
        stored = ImageOps.exif_transpose(displayed)
        data = encode(stored, kind, exif=exif, **({"quality": 95, "subsampling": "4:4:4"} if kind == "JPEG" else {}))
        for number, (width, height) in enumerate(((64, 64), (96, 48), (100, 171))):
            picture = load_picture(data, width, height, crop="random", seed=orientation, sample_number=number)
            asked = crop_box(size, (width, height), "random", orientation, number)
            assert picture.size == size
            moved = [abs(one - other) for one, other in zip(picture.box, asked, strict=True)]
            assert moved[0] == moved[2] and moved[1] == moved[3]
            assert max(moved) < max(1, (asked[2] - asked[0]) / width)  # less than one px of the result
            assert max(abs(shift) for shift in shift_in_result_px(picture)) < 0.12, (orientation, width, height)


def test_reduced_decodes_are_used_where_they_may_be() -> None:
    stored = read_header(encode(gradient(640, 480), "JPEG"))
    for shrink, reduction in ((1.0, 1), (3.4, 1), (3.5, 2), (6.9, 2), (7, 4), (14, 8), (100, 8)):
        assert decode_box(stored, (0, 0, 640, 480), shrink).reduction == reduction
    decoded = decode_box(stored, (101, 7, 502, 408), 7.0)
    assert decoded.box == (100, 4, 501, 405) and decoded.pixels.shape == (101, 101, 3)
    assert decode_box(stored, (0, 0, 40, 40), 20.0).reduction == 1  # too small to tell the scales apart
    png = read_header(encode(gradient(640, 480)))
    assert decode_box(png, (100, 0, 500, 400), 7.0).pixels.shape == (400, 400, 3)


@pytest.mark.parametrize("size", [(640, 480), (1024, 768), (2048, 1536)])
@pytest.mark.parametrize("seed", [0, 1])
def test_quality(size: tuple[int, int], seed: int) -> None:
    data = jpeg(photograph(*size, seed))
    side = size[1]
    left = (size[0] - side) // 2
    for wanted in (256, 200):
        assert psnr_db(load_picture(data, wanted, wanted), data, (left, 0, left + side, side)) >= 41
    picture = load_picture(data, 224, 288, crop="random", seed=seed)
    assert psnr_db(picture, data, picture.box) >= 41


def test_quality_where_a_reduced_decode_just_begins() -> None:
    for reduction in (2, 4, 8):
        side = 112 * reduction  # 64 * 1.75
        data = jpeg(photograph(side + 30, side, 0))
        assert decode_box(read_header(data), (0, 0, side, side), 1.75 * reduction).reduction == reduction
        picture = load_picture(data, 64, 64, crop="random")
        assert psnr_db(picture, data, picture.box) >= 40


def test_far_reductions_are_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for data in (encode(Image.fromarray(stripes)), encode(Image.fromarray(stripes), "JPEG", quality=95)):
        assert to_float(load_picture(data, 32, 32).pixels)[:, :, 2:-2].abs().max() < 0.05  # grey


SIDE = st.integers(1, 300)
WANTED = st.integers(1, 96)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(SIDE, SIDE, WANTED, WANTED, st.sampled_from(["JPEG", "PNG"]), st.integers(1, 8), st.integers(0, 2**40))
def test_any_size(width: int, height: int, w: int, h: int, kind: str, orientation: int, number: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(Image.new("RGB", (width, height), (10, 200, 30)), kind, exif=exif)
    picture = load_picture(data, w, h, crop="random", sample_number=number)
    assert picture.pixels.shape == (3, h, w) and picture.pixels.dtype == torch.uint8
    assert picture.size == ((height, width) if orientation > 4 else (width, height))
    left, top, right, bottom = picture.box
    assert 0 <= left < right <= picture.size[0] and 0 <= top < bottom <= picture.size[1]
    assert abs((right - left) - (bottom - top) * w / h) <= 1 or abs((bottom - top) - (right - left) * h / w) <= 1
    assert right - left == picture.size[0] or bottom - top == picture.size[1]
    flat = torch.tensor((10, 200, 30)).view(3, 1, 1)
    assert (picture.pixels.int() - flat).abs().max() <= 3
