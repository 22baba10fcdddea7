"""The classifier that reads digit pictures, and the feature network `digits-cnn`.

It is fitted on real training pictures alone and sees no generated one, so what it reads on generated pictures is a
measurement; how well it reads real held-out ones bounds that measurement from above.

Digits and layout are read from the *ink* (how far a pixel is from the picture's background, whatever its colour), and
colours from a picture of a few cells in which no digit can be made out. So neither can be guessed from the other, which
matters on combinations that the training pictures never show.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.config import ReaderConfig
from eval.errors import EvalError
from eval.pictures import to_images
from eval.prompt_following import Shown, shown_by_meta
from models.artifact import artifact_fingerprint, load_artifact, load_weights, save_artifact

ARTIFACT_KIND = "digit-reader"
NETWORK = "digits-cnn"
IMAGE_SIZE = 32  # pixels per side
LAYOUTS = ("single", "horizontal", "vertical")
MAX_OBJECTS = 2
ABSENT = -100  # label of an object that a picture does not have (ignored by the cross entropy)
DIGIT_FEATURES, COLOUR_FEATURES = 96, 32
CELL = 8  # pixels per side of a cell that a colour is read from
MIN_INK = 0.02  # mean ink of a cell (0..2) below which its colour fades out


@dataclass(frozen=True, kw_only=True)
class LabelledPictures:
    """Real pictures with the truth about them."""

    pictures: Tensor  # (B, 3, 32, 32) uint8
    layouts: Tensor  # (B,) int64 into LAYOUTS
    digits: Tensor  # (B, 2) int64, ABSENT where there is no second object
    colours: Tensor  # (B, 2) int64 into the reader's colours, or ABSENT


class DigitReader(nn.Module):
    """A small convolutional classifier with three heads over one feature vector.

    Args:
        colours: names of the colours it knows, in the order of its outputs.
    """

    def __init__(self, colours: tuple[str, ...]) -> None:
        super().__init__()
        self.colours = colours
        self.fingerprint = ""  # set when fitted or loaded
        grid = IMAGE_SIZE // 4
        self.digit_trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.ReLU(),  # (B, 32, 16, 16)
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, 64, 8, 8)
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * grid * grid, DIGIT_FEATURES),
            nn.ReLU(),
        )
        cells = 3 * (IMAGE_SIZE // CELL) ** 2
        self.colour_trunk = nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(cells), nn.Linear(cells, COLOUR_FEATURES), nn.ReLU()
        )
        self.layout_head = nn.Linear(DIGIT_FEATURES, len(LAYOUTS))
        self.digit_head = nn.Linear(DIGIT_FEATURES, MAX_OBJECTS * 10)
        self.colour_head = nn.Linear(COLOUR_FEATURES, MAX_OBJECTS * len(colours))
        self.dropout = nn.Dropout(0.2)

    def features(self, images: Tensor) -> Tensor:
        """The network `digits-cnn`: (B, 128) float32 of images (B, 3, 32, 32) in [-1, 1]."""
        border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=-1)
        contrast = images - border.median(dim=-1).values[:, :, None, None]  # (B, 3, H, W), 0 on the background
        ink = contrast.abs().amax(dim=1, keepdim=True)  # (B, 1, H, W)
        # The mean colour of a cell's ink, however much of it there is: a stroke's soft edge has the stroke's hue.
        cells = F.avg_pool2d(contrast, CELL) / (F.avg_pool2d(ink, CELL) + MIN_INK)  # (B, 3, 4, 4)
        return torch.cat([self.digit_trunk(ink), self.colour_trunk(cells)], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the layout (B, 3), the digits (B, 2, 10) and the colours (B, 2, number of colours)."""
        form, colour = self.features(images).split([DIGIT_FEATURES, COLOUR_FEATURES], dim=1)
        form = self.dropout(form)
        digits = self.digit_head(form).unflatten(1, (MAX_OBJECTS, 10))
        colours = self.colour_head(colour).unflatten(1, (MAX_OBJECTS, len(self.colours)))
        return self.layout_head(form), digits, colours

    @torch.no_grad()
    def read(self, pictures: Tensor, batch_size: int = 256) -> list[Shown]:
        """Reads uint8 pictures, (B, 3, 32, 32).

        Raises:
            EvalError: if the pictures have another size.
        """
        require_size(pictures)
        self.eval()
        readings = []
        for chunk in pictures.split(batch_size):
            layouts, digits, colours = (logits.argmax(dim=-1).tolist() for logits in self(to_images(chunk)))
            for layout, digit, colour in zip(layouts, digits, colours, strict=True):
                number = num_objects(LAYOUTS[layout])
                names = tuple(self.colours[c] for c in colour[:number])
                readings.append(Shown(layout=LAYOUTS[layout], digits=tuple(digit[:number]), colours=names))
        return readings


def num_objects(layout: str) -> int:
    """How many digits a picture of this layout shows."""
    return 1 if layout == "single" else 2


def require_size(pictures: Tensor) -> None:
    """Refuses pictures that the reader was not made for.

    Raises:
        EvalError: naming both sizes.
    """
    if tuple(pictures.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise EvalError(
            f"the digit reader reads {IMAGE_SIZE}x{IMAGE_SIZE} pictures, got {pictures.shape[-1]}x{pictures.shape[-2]};"
            " leave `reader` out of the recipe for other data sets"
        )


def label(samples: Iterable[tuple[str, Tensor, dict[str, Any]]], colours: tuple[str, ...]) -> LabelledPictures:
    """Collects (key, picture uint8, JSON) into tensors.

    Raises:
        EvalError: if a sample carries no digit JSON, names an unknown layout or colour, or nothing comes.
    """
    pictures, layouts, digits, names = [], [], [], []
    for key, picture, meta in samples:
        truth = shown_by_meta(meta, key)
        unknown = set(truth.colours) - set(colours)
        if truth.layout not in LAYOUTS or unknown or len(truth.digits) != num_objects(truth.layout):
            raise EvalError(f"sample {key} shows {truth}, which the digit reader does not know; pack the digits again")
        padding = (ABSENT,) * (MAX_OBJECTS - len(truth.digits))
        pictures.append(picture)
        layouts.append(LAYOUTS.index(truth.layout))
        digits.append(truth.digits + padding)
        names.append(tuple(colours.index(c) for c in truth.colours) + padding)
    if not pictures:
        raise EvalError("the training set holds no pictures to fit the digit reader on; name another data.train")
    stacked = torch.stack(pictures)
    require_size(stacked)
    return LabelledPictures(
        pictures=stacked, layouts=torch.tensor(layouts), digits=torch.tensor(digits), colours=torch.tensor(names)
    )


def init_weights(reader: DigitReader, generator: torch.Generator) -> None:
    """He-normal weights (arXiv:1502.01852, Eq. 10) and zero biases, from `generator` alone."""
    for module in reader.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            with torch.no_grad():
                module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


def fit_reader(config: ReaderConfig, data: LabelledPictures, colours: tuple[str, ...]) -> tuple[DigitReader, float]:
    """Fits a reader on real pictures; each step shifts its pictures by up to one pixel.

    Returns:
        The reader in eval mode and the seconds it took.
    """
    start_s = time.perf_counter()
    generator = torch.Generator().manual_seed(config.seed)
    count = data.pictures.shape[0]
    batch_size = min(config.batch_size, count)
    steps = config.epochs * (count // batch_size)
    with torch.random.fork_rng(devices=[]):  # torch's modules and dropout draw from the global generator
        torch.manual_seed(config.seed)
        reader = DigitReader(colours).train()
        init_weights(reader, generator)
        optimizer = torch.optim.AdamW(reader.parameters(), lr=config.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=max(steps, 2))
        for _ in range(config.epochs):
            order = torch.randperm(count, generator=generator)
            for chosen in order.split(batch_size)[: count // batch_size]:
                shift = (torch.randint(-1, 2, (2,), generator=generator)).tolist()
                images = tint(to_images(torch.roll(data.pictures[chosen], shift, dims=(2, 3))), generator)
                loss = reader_loss(reader, images, data.layouts[chosen], data.digits[chosen], data.colours[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    reader.eval().requires_grad_(False)
    reader.fingerprint = artifact_fingerprint(ARTIFACT_KIND, _config(reader), reader.state_dict())
    return reader, time.perf_counter() - start_s


def tint(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scales each channel of each picture by 0.75 to 1.25 and adds noise of 0.05, pixels in [0, 1].

    Real pictures hold six exact colours. A reader that saw nothing else answers at random where a reconstruction is a
    shade off; this one takes the nearest of the six, as a person would.
    """
    gain = 0.75 + 0.5 * torch.rand(images.shape[0], 3, 1, 1, generator=generator)
    noise = 0.05 * torch.randn(images.shape, generator=generator)
    return ((images + 1) / 2 * gain + noise).clamp(0, 1) * 2 - 1


def reader_loss(reader: DigitReader, images: Tensor, layouts: Tensor, digits: Tensor, colours: Tensor) -> Tensor:
    """Sum of the cross entropies of the three heads; objects that a picture lacks do not count."""
    layout_logits, digit_logits, colour_logits = reader(images)
    return (
        F.cross_entropy(layout_logits, layouts)
        + F.cross_entropy(digit_logits.flatten(0, 1), digits.flatten(), ignore_index=ABSENT)
        + F.cross_entropy(colour_logits.flatten(0, 1), colours.flatten(), ignore_index=ABSENT)
    )


def _config(reader: DigitReader) -> dict[str, Any]:
    return {"colours": list(reader.colours), "image_size": IMAGE_SIZE}


def save_reader(folder: Path, reader: DigitReader) -> str:
    """Writes the reader as a new artifact folder and returns its fingerprint."""
    return save_artifact(folder, ARTIFACT_KIND, _config(reader), reader.state_dict())


def load_reader(folder: Path) -> DigitReader:
    """Reads a reader that `save_reader` wrote.

    Raises:
        ModelError: if the folder is no such artifact, is damaged, or does not match its fingerprint.
    """
    artifact = load_artifact(folder, ARTIFACT_KIND)
    reader = DigitReader(tuple(artifact.config["colours"]))
    load_weights(reader, artifact.tensors, str(folder))
    reader.fingerprint = artifact.fingerprint
    return reader.eval().requires_grad_(False)
