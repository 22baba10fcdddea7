"""The recipes of both training stages: what a YAML in launch/recipes/ may say."""

from dataclasses import dataclass
from typing import Literal

from data.loader import LoaderConfig
from models.autoencoder import AutoencoderConfig
from models.diffusion import DiffusionConfig
from models.discriminator import DiscriminatorConfig
from models.text_config import TextEncoderConfig
from training.checkpoint import CheckpointConfig
from training.ema import EMAConfig
from training.engine import EngineConfig
from training.losses import AutoencoderLossConfig
from training.optim import OptimConfig
from training.schedule import ScheduleConfig


def _check_least(config: object, **least: int) -> None:
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ValueError(f"{name} {getattr(config, name)} must be at least {value}")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Periodic grids in the run's `samples/` folder."""

    every_steps: int = 1000  # optimiser steps between grids; the last step always draws one
    prompts: tuple[str, ...] = ()  # one picture each; none = no grids
    num_steps: int = 20  # sampler steps
    guidance_scale: float = 3.0  # 1.0 = no guidance
    seed: int = 0  # picture i starts from seed + i

    def __post_init__(self) -> None:
        _check_least(self, every_steps=1, num_steps=1, guidance_scale=0, seed=0)


@dataclass(frozen=True, kw_only=True)
class DiTArchitecture:
    """Size of the transformer; widths of latents and text follow from the autoencoder and the text encoders."""

    depth: int  # joint blocks
    width: int  # channels
    num_heads: int  # attention heads; width / num_heads is the head's width
    patch_size: int = 2  # latent pixels per side of a token
    max_grid: int = 64  # tokens per side up to which positions exist

    def __post_init__(self) -> None:
        _check_least(self, depth=1, width=1, num_heads=1, patch_size=1, max_grid=1)


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """`kind: autoencoder`."""

    data: LoaderConfig
    validation_shards: str | None = None  # held-out shards whose PSNR is logged and reported; None = none
    model: AutoencoderConfig
    discriminator: DiscriminatorConfig
    loss: AutoencoderLossConfig
    engine: EngineConfig
    optim: OptimConfig
    discriminator_optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    total_steps: int  # optimiser steps
    statistics_images: int = 2048  # pictures over which latent mean and std are measured
    log_every_steps: int = 10  # optimiser steps between rows of metrics.jsonl
    sample_every_steps: int = 1000  # optimiser steps between reconstruction grids
    seed: int = 0

    def __post_init__(self) -> None:
        _check_least(self, statistics_images=1, sample_every_steps=1)
        _check_steps(self)
        size, factor = self.data.image_size, self.model.downsampling
        if size % factor:
            raise ValueError(f"data.image_size {size} is not a multiple of {factor}, the model's downsampling")
        if size < self.discriminator.smallest_image:
            raise ValueError(
                f"discriminator.num_layers {self.discriminator.num_layers} needs pictures of "
                f"{self.discriminator.smallest_image} px, data.image_size is {size}; lower num_layers"
            )


@dataclass(frozen=True, kw_only=True)
class DiTRecipe:
    """`kind: dit`."""

    data: LoaderConfig
    autoencoder: str  # autoencoder run directory or artifact, local or s3://
    text_encoders: tuple[TextEncoderConfig, ...]
    model: DiTArchitecture
    diffusion: DiffusionConfig = DiffusionConfig()
    engine: EngineConfig
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()
    latents: Literal["mean", "sample"] = "sample"  # of the autoencoder's posterior
    total_steps: int  # optimiser steps
    log_every_steps: int = 10  # optimiser steps between rows of metrics.jsonl
    seed: int = 0

    def __post_init__(self) -> None:
        _check_steps(self)
        if not self.text_encoders:
            raise ValueError("text_encoders is empty; name at least one")


def _check_steps(recipe: AutoencoderRecipe | DiTRecipe) -> None:
    _check_least(recipe, total_steps=1, log_every_steps=1, seed=0)
    if recipe.checkpoint.every_steps % recipe.log_every_steps:
        raise ValueError(
            f"checkpoint.every_steps {recipe.checkpoint.every_steps} is not a multiple of log_every_steps "
            f"{recipe.log_every_steps}; a resumed run could not repeat the same rows"
        )
