"""PSNR, SSIM and the picture helpers they stand on."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from eval.errors import EvalError
from eval.pictures import digest, load_tiles, mosaic, save_mosaic, to_images, to_pictures
from eval.reconstruction import measure, psnr_db, reconstruct, ssim


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_known_errors() -> None:
    base = torch.full((3, 3, 8, 8), 0.5)
    off = base.clone()
    off[0] += 0.1  # MSE 0.01 -> 20 dB
    off[1, 0] += 0.1  # a third of it -> 20 + 10 log10(3) dB
    assert psnr_db(base, off).tolist() == pytest.approx([20, 20 + 10 * math.log10(3), 100], abs=1e-4)


def test_psnr_is_averaged_over_pictures_not_over_errors() -> None:
    pictures = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    made = pictures.clone()
    made[0] += 1
    made[1] += 50
    each = [20 * math.log10(255 / 1), 20 * math.log10(255 / 50)]
    result = measure(pictures, made, batch_size=1)
    assert result.psnr_db == pytest.approx(sum(each) / 2, abs=1e-4)
    assert result.num_images == 2


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One channel, straight from the paper: filter the whole plane, keep the windows inside it."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(plane: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(plane, taps, axis=0), taps, axis=1)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    top = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
    return float((top / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4))).mean())


def test_ssim_equals_the_formula_and_knows_its_limits() -> None:
    x = noise(0, 2, 3, 24, 20)
    y = (x + 0.2 * noise(1, 2, 3, 24, 20)).clamp(0, 1)
    expected = [np.mean([reference_ssim(x[b, c].numpy(), y[b, c].numpy()) for c in range(3)]) for b in range(2)]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-5)
    assert ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert ssim(x, 1 - x).max() < 0  # inverted structure
    with pytest.raises(EvalError, match="at least 11 pixels"):
        ssim(x[..., :10], y[..., :10])


class HalfTone(torch.nn.Module):
    """Stands for an autoencoder: its latents are the images, its decoding halves the contrast."""

    def encode_latents(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / 2


def test_reconstruct_goes_through_eight_bits_in_batches() -> None:
    pictures = torch.tensor([0, 100, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4).contiguous()
    made = reconstruct(HalfTone(), pictures, batch_size=2, device=torch.device("cpu"))
    assert made[:, 0, 0, 0].tolist() == [64, 114, 191]
    assert made.dtype == torch.uint8


def test_eight_bits_round_trip_and_clip() -> None:
    every_level = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_pictures(to_images(every_level)), every_level)
    assert to_pictures(torch.tensor([[[[-3.0, 2.0]]]])).flatten().tolist() == [0, 255]


@pytest.mark.parametrize(("count", "columns", "gap"), [(16, 4, 0), (10, 4, 0), (8, 8, 2), (7, 3, 2), (1, 1, 0)])
def test_a_mosaic_is_cut_back_into_its_tiles(tmp_path, count: int, columns: int, gap: int) -> None:
    pictures = (noise(2, count, 3, 12, 12) * 255).to(torch.uint8)
    path = tmp_path / "grid.png"
    if gap:
        from torchvision.utils import make_grid, save_image

        save_image(make_grid(pictures / 255, nrow=columns, padding=gap), path)
    else:
        save_mosaic(path, pictures, columns)
        with pytest.raises(EvalError, match="never overwritten"):
            save_mosaic(path, pictures, columns)
    assert torch.equal(load_tiles(path, count), pictures)


def test_broken_grids_are_named(tmp_path) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"no picture")
    with pytest.raises(EvalError, match=r"grid\.png"):
        load_tiles(path, 4)
    mosaic(torch.zeros(1, 3, 10, 13, dtype=torch.uint8), 1).save(tmp_path / "odd.png")
    with pytest.raises(EvalError, match="no mosaic of 9"):
        load_tiles(tmp_path / "odd.png", 9)


def test_the_digest_depends_on_order_and_borders() -> None:
    assert len({digest(["a", "b"]), digest(["b", "a"]), digest(["ab"]), digest(["a"])}) == 4
