"""`--dry-run`: what a recipe would do, computed without weights, pictures or ranks."""

import torch
from torch import nn

from launch.config_io import dump_yaml, to_dict
from models.autoencoder import Autoencoder
from models.discriminator import Discriminator
from models.dit import DiT, dit_flops
from training.config import AutoencoderRecipe, DiTRecipe
from training.optim import parameter_groups
from training.train_dit import dit_config_of, load_frozen


def describe(recipe: AutoencoderRecipe | DiTRecipe, world_size: int) -> str:
    """The resolved recipe, parameter counts (meta device), tokens, and the batch arithmetic per rank.

    A DiT's widths follow from its autoencoder artifact and its text encoders, so these are opened.

    Raises:
        TrainingError: the batch does not divide over the ranks, an artifact is missing, or a parameter group is empty.
    """
    lines = _autoencoder(recipe) if isinstance(recipe, AutoencoderRecipe) else _dit(recipe)
    return f"{dump_yaml(to_dict(recipe))}---\n" + "\n".join([*lines, *_batch(recipe, world_size)])


def _autoencoder(recipe: AutoencoderRecipe) -> list[str]:
    factor, side = recipe.model.downsampling, recipe.data.image_size // recipe.model.downsampling
    with torch.device("meta"):
        autoencoder, discriminator = Autoencoder(recipe.model), Discriminator(recipe.discriminator)
    parameter_groups(autoencoder, recipe.optim)
    parameter_groups(discriminator, recipe.discriminator_optim, "discriminator_optim")
    perceptual = "LPIPS" if recipe.loss.perceptual_weights else "none (no weights given)"
    return [
        f"autoencoder     {_count(autoencoder)} parameters",
        f"discriminator   {_count(discriminator)} parameters, from step {recipe.loss.disc_start_step}",
        f"perceptual loss {perceptual}",
        f"latents         {recipe.data.image_size} px / {factor} = {recipe.model.latent_channels} x {side} x {side}",
    ]


def _dit(recipe: DiTRecipe) -> list[str]:
    frozen = load_frozen(recipe)
    config = dit_config_of(recipe, frozen)
    with torch.device("meta"):
        dit = DiT(config)
    parameter_groups(dit, recipe.optim)
    side = recipe.data.image_size // frozen.autoencoder.config.downsampling
    tokens, text_tokens = (side // config.patch_size) ** 2, frozen.conditioner.num_tokens
    most = "at most " if recipe.text_padding == "masked" else ""  # it is cut behind the longest of a batch
    gflop = 3 * dit_flops(config, tokens, text_tokens) / 1e9
    return [
        f"transformer     {_count(dit)} parameters",
        f"autoencoder     {_count(frozen.autoencoder)} parameters, frozen",
        f"text encoders   {_count(frozen.conditioner)} parameters, frozen",
        f"tokens          {tokens} picture ({side} x {side} latents, patch {config.patch_size})"
        f" + {most}{text_tokens} text",
        f"compute         {most}{gflop:.3f} GFLOP per picture, forward and backward",
    ]


def _batch(recipe: AutoencoderRecipe | DiTRecipe, world_size: int) -> list[str]:
    engine = recipe.engine
    accumulation = engine.accumulation_steps(world_size)
    return [
        f"batch           {engine.global_batch_size} = {engine.micro_batch_size} per rank x {world_size} ranks "
        f"x {accumulation} accumulation steps",
        f"run             {recipe.total_steps} steps, {recipe.total_steps * engine.global_batch_size} pictures",
        f"sharding        ZeRO-{engine.zero_stage}, precision {engine.precision}",
    ]


def _count(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"
