"""Natural-looking pictures of any size, from the two photographs that scikit-learn ships (china.jpg, flower.jpg)."""

import importlib.util
import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

NOISE = 3.0  # standard deviation of the added noise, of 255: what a sensor leaves


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Returns a window of a photograph, enlarged up to 1.5 times, continued by reflection, with noise. RGB."""
    rng = np.random.default_rng((seed, width, height))
    photo = _photos()[seed % 2]
    zoom = rng.uniform(1.0, 1.5)
    enlarged = photo.resize((round(photo.width * zoom), round(photo.height * zoom)), Image.Resampling.LANCZOS)
    x, y = (int(rng.integers(side)) for side in enlarged.size)
    tiled = np.pad(np.asarray(enlarged), ((0, y + height), (0, x + width), (0, 0)), mode="symmetric")
    window = tiled[y : y + height, x : x + width].astype(np.float32)
    noisy = window + rng.normal(0.0, NOISE, window.shape).astype(np.float32)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """Encodes as most pictures of the web are: baseline, colour at half resolution (4:2:0)."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()


@cache
def _photos() -> list[Image.Image]:
    # The package is not imported, only found: importing it takes a second.
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("scikit-learn is not installed; run `make install`")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "images"
    return [Image.open(folder / name).convert("RGB") for name in ("china.jpg", "flower.jpg")]
