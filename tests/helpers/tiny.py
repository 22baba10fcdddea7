"""A training set, an autoencoder and recipes small enough for a test, all seeded."""

from pathlib import Path

import torch

from data.digits import write_digits
from data.loader import LoaderConfig
from models.autoencoder import Autoencoder, AutoencoderConfig, save_autoencoder
from models.discriminator import DiscriminatorConfig
from models.text_config import TextEncoderConfig
from training.checkpoint import CheckpointConfig
from training.config import AutoencoderRecipe, DiTArchitecture, DiTRecipe, SamplesConfig
from training.ema import EMAConfig
from training.engine import EngineConfig
from training.losses import AutoencoderLossConfig
from training.optim import OptimConfig

AUTOENCODER = AutoencoderConfig(latent_channels=4, channels=(8, 8, 8), res_blocks_per_level=1, norm_groups=4)
ENCODERS = (
    TextEncoderConfig(
        name="clip_a", kind="clip", seed=1, width=16, layers=2, heads=2, embed_dim=16, max_tokens=12, dropout=0.2
    ),
    TextEncoderConfig(
        name="clip_b", kind="clip", seed=2, width=16, layers=2, heads=2, embed_dim=16, max_tokens=12, dropout=0.2
    ),
    TextEncoderConfig(
        name="t5", kind="t5", seed=3, width=32, layers=1, heads=2, vocab_size=512, max_tokens=12, dropout=0.2
    ),
)


def digits(folder: Path) -> Path:
    """Two hundred pictures in 16 shards, with their test splits."""
    write_digits(str(folder), num_train=208, num_test=16, num_combinations=16)
    return folder


def autoencoder_artifact(folder: Path, seed: int = 0) -> Path:
    """An untrained autoencoder with plausible latent statistics."""
    autoencoder = Autoencoder(AUTOENCODER)
    autoencoder.init_weights(seed)
    autoencoder.set_statistics(torch.zeros(4), torch.full((4,), 0.5))
    save_autoencoder(folder, autoencoder)
    return folder


def dit_recipe(data: Path, autoencoder: Path, **changes) -> DiTRecipe:
    """Eight steps of a two-block transformer, global batch 8."""
    settings = {
        "data": LoaderConfig(shards=str(data / "train"), image_size=32, num_streams=8),
        "autoencoder": str(autoencoder),
        "text_encoders": ENCODERS,
        "model": DiTArchitecture(depth=2, width=32, num_heads=2, max_grid=8),
        "engine": EngineConfig(zero_stage=2, micro_batch_size=2, global_batch_size=8, max_grad_norm=0.5),
        "optim": OptimConfig(learning_rate=1e-3, weight_decay=0.01),
        "ema": EMAConfig(decays=(0.9, 0.5), sigma_rels=(0.1,)),
        "checkpoint": CheckpointConfig(every_steps=4, keep_last=2),
        "samples": SamplesConfig(every_steps=8, prompts=("a red seven", "a blue two", "a green one"), num_steps=2),
        "total_steps": 8,
        "log_every_steps": 1,
    }
    return DiTRecipe(**(settings | changes))


def autoencoder_recipe(data: Path, **changes) -> AutoencoderRecipe:
    """Six steps; the discriminator joins at step 2."""
    settings = {
        "data": LoaderConfig(shards=str(data / "train"), image_size=32, num_streams=8),
        "validation_shards": str(data / "test"),
        "model": AUTOENCODER,
        "discriminator": DiscriminatorConfig(channels=8, num_layers=2, norm_groups=4),
        "loss": AutoencoderLossConfig(kl_weight=1e-4, disc_start_step=2),
        "engine": EngineConfig(zero_stage=2, micro_batch_size=2, global_batch_size=8),
        "optim": OptimConfig(learning_rate=1e-3),
        "discriminator_optim": OptimConfig(learning_rate=1e-3, eps=1e-3),  # or Adam makes steps of rounding noise
        "ema": EMAConfig(decays=(0.9,)),
        "checkpoint": CheckpointConfig(every_steps=4),
        "total_steps": 6,
        "statistics_images": 64,
        "log_every_steps": 1,
        "sample_every_steps": 6,
    }
    return AutoencoderRecipe(**(settings | changes))
