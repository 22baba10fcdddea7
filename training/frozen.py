"""The networks that turn pictures and captions into what the transformer sees; replicated, never trained."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.buckets import make_buckets
from data.encoded import Encoding
from data.errors import DataError
from data.index import Index
from data.object_store import fetch_tree
from models.autoencoder import Autoencoder, load_autoencoder
from models.conditioner import TextPadding
from models.errors import ModelError
from models.text_config import TextEncoderConfig
from models.text_encoder import Conditioner, stored_config
from training.config import DiTRecipe
from training.errors import TrainingError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """An autoencoder and text encoders."""

    autoencoder: Autoencoder
    autoencoder_fingerprint: str
    conditioner: Conditioner

    @property
    def device(self) -> torch.device:
        return self.autoencoder.latent_mean.device

    def to(self, device: torch.device, text: bool = True) -> None:
        """Moves the autoencoder and, if asked, the text encoders."""
        self.autoencoder.to(device)
        if text:
            self.conditioner.to(device)


def load_networks(autoencoder: str, text_encoders: Sequence[TextEncoderConfig], text_padding: TextPadding) -> Frozen:
    """Loads the networks that a recipe names, on the CPU.

    Args:
        autoencoder: run directory or artifact, local or s3://.
        text_encoders: in the order of the recipe.
        text_padding: whether padding is attended to.

    Raises:
        TrainingError: the autoencoder is not there.
        ModelError: an artifact is damaged, or a text encoder cannot be made.
    """
    source = fetch_tree(autoencoder)
    folder = source / "artifact" if (source / "run.yaml").exists() else source
    if not folder.is_dir():
        raise TrainingError(
            f"autoencoder {autoencoder} has no finished artifact; run `darkroom train autoencoder` to its end "
            "or name an artifact folder"
        )
    loaded, fingerprint = load_autoencoder(folder)
    conditioner = Conditioner(text_encoders, text_padding)
    return Frozen(autoencoder=loaded, autoencoder_fingerprint=fingerprint, conditioner=conditioner)


def load_frozen(recipe: DiTRecipe, kept: Path | None = None) -> Frozen:
    """The networks of a diffusion recipe, or those that its run keeps where the recipe's are not there any more.

    Args:
        recipe: names them.
        kept: `frozen/` of the run directory, if there may be one.

    Raises:
        TrainingError: the autoencoder is not there, or its downsampling does not fit the picture size.
    """
    try:
        frozen = load_networks(recipe.autoencoder, recipe.text_encoders, recipe.text_padding)
    except (DataError, ModelError, TrainingError) as error:
        if kept is None or not all((kept / name).exists() for name in ("autoencoder", "text_encoders")):
            raise
        log.warning("%s; going on with the networks that the run keeps in %s", error, kept)
        frozen = _load_kept(recipe, kept)
    downsampling = frozen.autoencoder.config.downsampling
    side = downsampling * recipe.model.patch_size
    for size in {(recipe.data.image_size,) * 2, *make_buckets(recipe.data.image_size, recipe.data.buckets)}:
        if any(length % side or length // side > recipe.model.max_grid for length in size):
            raise TrainingError(
                f"data.image_size and data.buckets give pictures of {size[0]}x{size[1]} px; their sides must be "
                f"multiples of {side} up to {side * recipe.model.max_grid} (downsampling {downsampling} x patch_size "
                f"{recipe.model.patch_size}, x max_grid): change one of them"
            )
    return frozen


def _load_kept(recipe: DiTRecipe, kept: Path) -> Frozen:
    """The networks are the run's; how often captions are dropped is for the recipe alone to say."""
    autoencoder, fingerprint = load_autoencoder(kept / "autoencoder")
    folder = kept / "text_encoders"
    configs = [replace(stored_config(folder / config.name), dropout=config.dropout) for config in recipe.text_encoders]
    conditioner = Conditioner(configs, recipe.text_padding)
    if conditioner.fingerprint != Conditioner.load(folder).fingerprint:
        raise TrainingError(f"{folder} holds other text encoders than the recipe names; restore what it names")
    return Frozen(autoencoder=autoencoder, autoencoder_fingerprint=fingerprint, conditioner=conditioner)


def check_encodings(recipe: DiTRecipe, frozen: Frozen, indexes: Iterable[Index]) -> None:
    """Refuses encoded data that other networks made than those of this run, or that this run cannot use.

    Raises:
        TrainingError: names the data set, what it was encoded with, and what the recipe gives.
        DataError: an index describes no encoding that is known.
    """
    side = frozen.autoencoder.config.downsampling * recipe.model.patch_size
    for index in indexes:
        if index.encoding is None:
            continue
        encoding = Encoding.from_dict(index.encoding, index.url)
        for what, was, now in (
            ("text_padding:", encoding.text_padding, recipe.text_padding),
            ("autoencoder", encoding.autoencoder, frozen.autoencoder_fingerprint),
            ("text encoders", encoding.text_encoders, frozen.conditioner.fingerprint),
        ):
            if was != now:
                raise TrainingError(
                    f"{index.url} was encoded with {what} {was[:12]}, the recipe gives {now[:12]}; "
                    "name the same one in the recipe, or encode the pictures again"
                )
        if encoding.latents == "sample" and recipe.latents == "mean":
            raise TrainingError(
                f"{index.url} holds a sample of each posterior, not its mean; "
                "set latents: sample, or encode the pictures again with latents: moments"
            )
        for size in encoding.sizes:
            if any(length % side or length // side > recipe.model.max_grid for length in size):
                raise TrainingError(
                    f"{index.url} holds pictures of {size[0]}x{size[1]} px; their sides must be multiples of {side} "
                    f"up to {side * recipe.model.max_grid} (downsampling x patch_size, x max_grid): "
                    "change model.patch_size or model.max_grid, or encode other sizes"
                )
