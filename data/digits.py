"""The embedded sample: scikit-learn's 1,797 real handwritten digits (UCI, 8x8 pixels) as captioned colour pictures.

A picture holds one digit, two side by side, or one above the other, each in one of six colours on black. Some digits'
images (held-out digits) and ten digit–colour pairs (held-out combinations) never occur in the training split, so what a
model learned can be told from what it remembers.
"""

import io
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from PIL import Image

from data.errors import DataError
from data.keyed_random import keyed_generator
from data.object_store import join, open_store
from data.shards import INDEX, load_index, verify, write_shards

Layout = Literal["single", "horizontal", "vertical"]
Box = tuple[int, int, int, int]

IMAGE_SIZE = 32  # px
DIGIT_SIZE = 14  # px
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 40),
    "green": (40, 200, 60),
    "blue": (60, 95, 255),
    "yellow": (250, 215, 30),
    "purple": (190, 60, 225),
    "white": (245, 245, 245),
}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LAYOUTS: tuple[Layout, ...] = ("single", "horizontal", "vertical")
SPLITS = ("train", "test", "combinations")

_BACKGROUND = (0, 0, 0)
_HELD_OUT_SHARE = 0.2  # of each class's digit images
_TRAIN_SHARDS = 16
_NUMERALS_SHARE = 0.2  # of the captions, which say "7" and not "seven"
_SINGLE = ("a {a}", "one {a}", "only a {a}")
_PAIR = {  # objects are named in reading order: told in either order, the demo would need twice the pictures
    "horizontal": ("a {a} left of a {b}", "one {a} left of one {b}", "left a {a} right a {b}"),
    "vertical": ("a {a} above a {b}", "one {a} above one {b}", "above a {a} below a {b}"),
}


def slots(layout: Layout) -> list[Box]:
    """Returns the box (x0, y0, x1, y1) in pixels that holds each object, in reading order."""
    half, quarter = IMAGE_SIZE // 2, IMAGE_SIZE // 4
    corners = {
        "single": [(quarter, quarter)],
        "horizontal": [(0, quarter), (half, quarter)],
        "vertical": [(quarter, 0), (quarter, half)],
    }
    return [(x, y, x + half, y + half) for x, y in corners[layout]]


def held_out_pairs() -> list[tuple[int, str]]:
    """Returns the ten (digit, colour) pairs that no training picture holds: each digit misses one colour."""
    names = list(COLOURS)
    return [(digit, names[digit % len(names)]) for digit in range(10)]


def write_digits(
    out: str, *, num_train: int = 16384, num_test: int = 512, num_combinations: int = 512, seed: int = 0
) -> dict[str, Any]:
    """Writes the three splits as data sets `out`/train, `out`/test and `out`/combinations.

    train: training digits, training combinations. test: held-out digits, training combinations. combinations: held-out
    digits, every object a held-out pair. A second call with the same arguments verifies what is there and says so.

    Args:
        out: a folder or s3 address.
        num_train: pictures in the training split, in 16 shards.
        num_test: pictures in the test split.
        num_combinations: pictures in the combinations split.
        seed: of everything that is drawn.

    Returns:
        {"already_there": bool, "splits": {split: {"url", "samples", "shards", "bytes", "fingerprint"}}}.

    Raises:
        DataError: a number is too small, or `out` holds something else.
    """
    counts = dict(zip(SPLITS, (num_train, num_test, num_combinations), strict=True))
    for split, count in counts.items():
        least = _TRAIN_SHARDS if split == "train" else 1
        if count < least:
            raise DataError(f"num_{split}={count}: at least {least} pictures are needed")
    if seed < 0:
        raise DataError(f"seed={seed}: must not be negative")
    request = json.dumps({"version": 1, "seed": seed, "counts": counts}, sort_keys=True).encode()
    store = open_store(out)
    if store.list() and (not store.exists("digits.json") or store.open_range("digits.json").read() != request):
        raise DataError(f"{store.url}: holds something else; choose another place or remove it")
    store.put_if_absent(request, "digits.json")
    already_there = True
    summary: dict[str, Any] = {}
    for split, count in counts.items():
        url = join(out, split)
        if open_store(url).exists(INDEX):
            problems = verify(url)
            if problems:
                raise DataError(f"{problems[0]}; remove {url} and run again")
            index = load_index(url)
        else:
            already_there = False
            per_shard = -(-count // _TRAIN_SHARDS) if split == "train" else count
            index = write_shards(_samples(split, count, seed), url, split, per_shard)
        summary[split] = {
            "url": url,
            "samples": index.num_samples,
            "shards": len(index.shards),
            "bytes": sum(shard.bytes for shard in index.shards),
            "fingerprint": index.fingerprint,
        }
    return {"already_there": already_there, "splits": summary}


def _samples(split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    masks, labels = _load_masks()
    held_out = _held_out_digits(labels, seed)
    by_class = [np.flatnonzero((labels == digit) & (held_out != (split == "train"))) for digit in range(10)]
    pairs = [(digit, colour) for digit in range(10) for colour in COLOURS]
    withheld = set(held_out_pairs())
    pairs = [pair for pair in pairs if (pair in withheld) == (split == "combinations")]
    for number in range(count):
        rng = keyed_generator(seed, "digits", SPLITS.index(split), number)
        layout = LAYOUTS[rng.integers(len(LAYOUTS))]
        chosen = [pairs[rng.integers(len(pairs))] for _ in slots(layout)]
        sources = [int(rng.choice(by_class[digit])) for digit, _ in chosen]
        picture = np.broadcast_to(np.array(_BACKGROUND, np.float32), (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
        for (_, colour), source, box in zip(chosen, sources, slots(layout), strict=True):
            _paint(picture, masks[source], COLOURS[colour], box, rng)
        png = io.BytesIO()
        Image.fromarray(np.rint(picture).astype(np.uint8)).save(png, "PNG")
        objects = [{"digit": digit, "colour": colour} for digit, colour in chosen]
        yield {
            "__key__": f"{split}-{number:06d}",
            "png": png.getvalue(),
            "txt": _caption(layout, objects, rng),
            "json": {"layout": layout, "objects": objects, "source": sources},
        }


def _paint(picture: np.ndarray, mask: np.ndarray, colour: Any, box: Box, rng: np.random.Generator) -> None:
    """Lays the mask in the colour over the picture, somewhere inside the box."""
    x = box[0] + int(rng.integers(box[2] - box[0] - DIGIT_SIZE + 1))
    y = box[1] + int(rng.integers(box[3] - box[1] - DIGIT_SIZE + 1))
    alpha = mask[:, :, None]
    area = picture[y : y + DIGIT_SIZE, x : x + DIGIT_SIZE]
    area[:] = (1 - alpha) * area + alpha * np.array(colour, np.float32)


def _caption(layout: Layout, objects: list[dict[str, Any]], rng: np.random.Generator) -> str:
    """Says what is where, in one of several phrasings, each of which determines layout, digits, colours and places."""
    as_word = rng.random() >= _NUMERALS_SHARE
    names = [f"{o['colour']} {WORDS[o['digit']] if as_word else o['digit']}" for o in objects]
    phrasings = _SINGLE if layout == "single" else _PAIR[layout]
    return phrasings[rng.integers(len(phrasings))].format(a=names[0], b=names[-1])


def _held_out_digits(labels: np.ndarray, seed: int) -> np.ndarray:
    """Marks the digit images kept from training: the same share of each class."""
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        order = keyed_generator(seed, "digits-split", digit).permutation(members)
        held_out[order[: round(_HELD_OUT_SHARE * len(members))]] = True
    return held_out


def _load_masks() -> tuple[np.ndarray, np.ndarray]:
    """Returns the digits as (1797, 14, 14) opacities in [0, 1] and their labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    masks = []
    for image in digits.images:
        smooth = Image.fromarray((image / 16).astype(np.float32)).resize(
            (DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC
        )
        masks.append(np.clip(np.asarray(smooth) * 1.5 - 0.3, 0, 1))  # steeper edges: enlarged strokes look washed out
    return np.stack(masks), digits.target
