"""The recipes of both training stages: what a YAML in launch/recipes/ may say."""

from dataclasses import dataclass
from typing import Literal

from data.buckets import BucketConfig, make_buckets
from data.captions import CaptionConfig
from data.encoded import Latents, TextDtype
from data.loader import LoaderConfig
from data.transforms import Crop
from models.autoencoder import AutoencoderConfig
from models.conditioner import TextPadding
from models.diffusion import DiffusionConfig
from models.discriminator import DiscriminatorConfig
from models.dit import Attention
from models.text_config import TextEncoderConfig
from training.checkpoint import CheckpointConfig
from training.ema import EMAConfig
from training.engine import EngineConfig
from training.losses import AutoencoderLossConfig
from training.optim import OptimConfig
from training.schedule import ScheduleConfig
from training.step_policy import StepPolicyConfig


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

    depth: int  # blocks
    width: int  # channels
    num_heads: int  # attention heads; width / num_heads is the head's width
    patch_size: int = 2  # latent pixels per side of a token
    max_grid: int = 64  # tokens per side up to which positions exist
    attention: Attention = (
        "joint"  # "joint" = picture and text in one, as in SD3; "cross" = to itself, then to the text
    )

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
    step_policy: StepPolicyConfig = StepPolicyConfig()
    init_from: str | None = None  # averaged weights to start from: a run, checkpoint or artifact, local or s3://
    total_steps: int  # optimiser steps
    statistics_images: int = 2048  # pictures over which latent mean and std are measured
    log_every_steps: int = 10  # optimiser steps between rows of metrics.jsonl
    sample_every_steps: int = 1000  # optimiser steps between reconstruction grids
    seed: int = 0

    def __post_init__(self) -> None:
        _check_least(self, statistics_images=1, sample_every_steps=1)
        _check_steps(self)
        factor, least = self.model.downsampling, self.discriminator.smallest_image
        for size in make_buckets(self.data.image_size, self.data.buckets):
            picture = f"data.image_size and data.buckets give pictures of {size[0]}x{size[1]} px"
            if any(side % factor for side in size):
                raise ValueError(f"{picture}: both sides must be multiples of {factor}, the model's downsampling")
            if min(size) < least:
                raise ValueError(
                    f"{picture}; discriminator.num_layers {self.discriminator.num_layers} needs at least {least} px: "
                    "lower num_layers"
                )
        # Latent statistics and reconstructions are those of whole pictures of one size: the recipe's square.
        if self.data.image_size % factor:
            raise ValueError(f"data.image_size {self.data.image_size} must be a multiple of {factor}")


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
    step_policy: StepPolicyConfig = StepPolicyConfig()
    init_from: str | None = None  # averaged weights to start from: a run, checkpoint or artifact, local or s3://
    samples: SamplesConfig = SamplesConfig()
    text_padding: TextPadding = "attended"  # "masked" = nobody sees the padding of captions; "attended" = as in SD3
    latents: Literal["mean", "sample"] = "sample"  # of the autoencoder's posterior
    total_steps: int  # optimiser steps
    log_every_steps: int = 10  # optimiser steps between rows of metrics.jsonl
    seed: int = 0

    def __post_init__(self) -> None:
        _check_steps(self)
        if not self.text_encoders:
            raise ValueError("text_encoders is empty; name at least one")


@dataclass(frozen=True, kw_only=True)
class EncodeRecipe:
    """`kind: encode`."""

    shards: str  # address of the pictures' data set
    out: str  # address of the encoded data set, local or s3://; the same command goes on with it
    image_size: int  # px, side of the square picture
    buckets: BucketConfig | None = None  # shapes of pictures that are not square; None = squares
    crop: Crop = "centre"  # which part of a picture that has not its bucket's shape; random = drawn once, for good
    captions: CaptionConfig = CaptionConfig()  # all candidates are encoded, with their weights
    autoencoder: str  # autoencoder run directory or artifact, local or s3://
    latents: Latents = "moments"  # mean and standard deviation of the posterior, or one sample of it
    text_encoders: tuple[TextEncoderConfig, ...]
    text_padding: TextPadding = "attended"  # as the training recipe has it
    text_dtype: TextDtype = "bfloat16"  # of the stored tokens; float8_e4m3fn = half the size, about 3 % error
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the autoencoder; auto: bfloat16 on GPU
    batch_size: int = 32  # pictures per forward pass of the autoencoder
    num_threads: int = 4  # that decode pictures, per rank
    max_bad_fraction: float = 0.01  # share of unusable samples above which encoding stops, [0, 1]
    seed: int = 0

    def __post_init__(self) -> None:
        _check_least(self, image_size=1, batch_size=1, num_threads=1, seed=0)
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction {self.max_bad_fraction} is a share; give a number from 0 to 1")
        if not self.text_encoders:
            raise ValueError("text_encoders is empty; name at least one")
        make_buckets(self.image_size, self.buckets)


def _check_steps(recipe: AutoencoderRecipe | DiTRecipe) -> None:
    _check_least(recipe, total_steps=1, log_every_steps=1, seed=0)
    recipe.schedule.check(recipe.total_steps, recipe.engine.global_batch_size)
    if recipe.checkpoint.every_steps % recipe.log_every_steps:
        raise ValueError(
            f"checkpoint.every_steps {recipe.checkpoint.every_steps} is not a multiple of log_every_steps "
            f"{recipe.log_every_steps}; a resumed run could not repeat the same rows"
        )
