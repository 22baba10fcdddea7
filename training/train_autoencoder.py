"""The autoencoder stage: a VAE with a PatchGAN discriminator; ends with weights and measured latent statistics."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.index import Index, load_index
from data.loader import iterate_once
from data.object_store import fetch_tree
from launch.runtime import Ranks, ranks
from models.autoencoder import Autoencoder, save_autoencoder
from models.discriminator import Discriminator
from models.perceptual import load_perceptual
from training.autoencoder_step import discriminator_step, generator_step
from training.checkpoint import bring_up_to_date
from training.checkpoint_writer import Groups
from training.config import AutoencoderRecipe
from training.diffusion_step import posterior_noise
from training.ema import EMA
from training.engine import Engine
from training.errors import TrainingError
from training.fragments import gather_into
from training.hooks import write_grid
from training.init_from import init_from
from training.loop import Run, check_data, open_checkpoints
from training.losses import psnr_db
from training.optim import parameter_groups
from training.replica import Replica
from training.run_checks import DrawsCheck
from training.run_directory import open_run_directory
from training.schedule import learning_rate
from training.throughput import AutoencoderFlops
from training.update_gate import guarded


def train(recipe: AutoencoderRecipe, run_dir: str, quiet: bool = False) -> None:
    """Trains, or resumes, the run in `run_dir` and ends with `artifact/` (kind "autoencoder") and `summary.json`.

    Raises:
        TrainingError: a recipe, data set or checkpoint that does not fit; one line with the remedy.
        Preempted: a signal asked to stop; everything is saved.
    """
    process, directory = ranks(), Path(run_dir)
    engine = Engine(recipe.engine, process.world_size)
    indexes = check_data(recipe, engine)
    bring_up_to_date(directory, recipe.checkpoint, engine, process.local_rank)
    refuse_encoded(indexes)
    if recipe.validation_shards:
        refuse_encoded([load_index(recipe.validation_shards)])
    perceptual = _perceptual(recipe, process)
    autoencoder, discriminator = Autoencoder(recipe.model), Discriminator(recipe.discriminator)
    parameter_groups(autoencoder, recipe.optim)  # refused before there is a run directory
    parameter_groups(discriminator, recipe.discriminator_optim, "discriminator_optim")
    open_run_directory(directory, recipe, "autoencoder", process)

    autoencoder.init_weights(recipe.seed)
    discriminator.init_weights(recipe.seed + 1)
    checkpointer, snapshot = open_checkpoints(directory, recipe.checkpoint, engine, process.local_rank)
    engine.shard(autoencoder, recipe.optim, autoencoder.blocks)
    replica = Replica(discriminator, recipe.discriminator_optim, engine.device)
    if recipe.init_from and snapshot is None:
        init_from(recipe.init_from, "autoencoder", engine, directory)
    ema = EMA(recipe.ema, engine.weight_fragments())
    if perceptual is not None:
        perceptual.to(engine.device)

    def groups() -> Groups:
        adversary = {f"discriminator-{group}": tensors for group, tensors in replica.fragments().items()}
        return {"model": engine.weight_fragments(), **ema.groups(), **engine.moment_fragments(), **adversary}

    run = Run(directory, recipe, engine, checkpointer, replica.counters, indexes, quiet)
    replica.judge = run.bad_steps.policy.judge_discriminator
    run.resume(snapshot, groups, lambda state: replica.set_adam_step(state["discriminator_adam_step"]))

    def averaged() -> Autoencoder:
        copy = Autoencoder(recipe.model).to(engine.device)
        gather_into(copy, ema.fragments())
        return copy.eval().requires_grad_(False)

    with run.watchdog:
        loop(recipe, run, engine, replica, perceptual, ema, groups, averaged)
        run.watchdog.mark("finish")
        finish(recipe, run, engine, averaged())


def loop(
    recipe: AutoencoderRecipe,
    run: Run,
    engine: Engine,
    replica: Replica,
    perceptual: nn.Module | None,
    ema: EMA,
    groups: Callable[[], Groups],
    averaged: Callable[[], Autoencoder],
) -> None:
    """Generator's turn, then discriminator's turn, on the same micro-batch."""
    loader = run.open_loader()
    autoencoder = engine.module
    assert isinstance(autoencoder, Autoencoder)
    draws, flops = DrawsCheck(), AutoencoderFlops(recipe.model, recipe.discriminator, recipe.loss)
    run.parts.add(draws)
    for step in run.steps():
        rate = learning_rate(
            recipe.schedule, recipe.optim.learning_rate, step, recipe.total_steps, recipe.engine.global_batch_size
        )
        engine.set_learning_rate(rate)
        for micro, batch in enumerate(run.micro_batches(loader)):
            images, weights = batch.images(engine.device), batch.weights.to(engine.device, non_blocking=True)
            numbers = batch.sample_numbers.to(engine.device, non_blocking=True)
            eps = posterior_noise(autoencoder, images, numbers, recipe.seed)
            draws.add(batch.sample_numbers, eps)
            run.pace.flops += flops(images, step)
            with engine.accumulate():
                with engine.autocast():
                    turn = generator_step(
                        engine.model,
                        replica.module,
                        perceptual,
                        images,
                        eps,
                        weights,
                        recipe.loss,
                        last_conv=autoencoder.last_conv,
                        step=step,
                    )
                engine.backward(turn.objective, turn.scalars["loss"])  # on the last micro-batch: reduce, clip, AdamW
            run.meter.add(**turn.scalars)
            if step >= recipe.loss.disc_start_step:
                with replica.accumulate(first=micro == 0, last=micro == engine.accumulation_steps - 1):
                    with engine.autocast():
                        disc_loss = discriminator_step(replica.model, images, turn.decoded, weights)
                    (guarded(disc_loss) / engine.accumulation_steps).backward()
                run.meter.add(disc_loss=disc_loss)
        ema.update(step)
        run.log(lr=rate)
        if run.due(recipe.sample_every_steps):
            with run.not_training_time():
                draw(recipe, engine, averaged(), run.directory / "samples" / f"step-{step + 1:08d}.png")
        run.save_if_due(groups)


def refuse_encoded(indexes: Iterable[Index]) -> None:
    """Raises TrainingError for a data set of latents: an autoencoder learns from pictures."""
    for index in indexes:
        if index.encoding is not None:
            raise TrainingError(f"{index.url} holds encoded samples; give the pictures that they were made of")


def draw(recipe: AutoencoderRecipe, engine: Engine, autoencoder: Autoencoder, path: Path) -> None:
    """Eight pictures above their reconstructions by the averaged weights (rank 0)."""
    if engine.rank == 0:
        shards = recipe.validation_shards or recipe.data.sources[0].shards
        images = torch.stack([sample[1] for sample in iterate_once(shards, recipe.data.image_size, limit=8)])
        decoded = reconstruct(autoencoder, images.to(engine.device)).cpu()
        write_grid((torch.cat([images, decoded]) + 1) / 2, path, columns=8)


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Pictures through the posterior's mean and back, (B, 3, H, W) in about [-1, 1]."""
    return autoencoder.decode_raw(autoencoder.encode(images).mean)


def finish(recipe: AutoencoderRecipe, run: Run, engine: Engine, autoencoder: Autoencoder) -> None:
    """Measures the latent statistics and the held-out PSNR, writes the artifact, leaves the process group."""
    mean, std = measure_statistics(recipe, engine, autoencoder)
    autoencoder.set_statistics(mean, std)
    folder = run.directory / "artifact"
    if engine.rank == 0 and not folder.exists():
        summary: dict[str, Any] = {"latent_mean": mean.tolist(), "latent_std": std.tolist()}
        if recipe.validation_shards:
            values = [
                psnr_db(reconstruct(autoencoder, images), images)
                for images in _batches(recipe.validation_shards, recipe, range(0, 512), engine.device)
            ]
            summary["psnr_db"] = float(torch.stack(values).mean())
            run.metrics.say(f"held-out PSNR {summary['psnr_db']:.2f} dB")
        (run.directory / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        save_autoencoder(folder, autoencoder.cpu())
    run.metrics.say(f"{run.directory} is finished at step {run.counters.step}: {folder}")
    run.close()


@torch.no_grad()
def measure_statistics(recipe: AutoencoderRecipe, engine: Engine, autoencoder: Autoencoder) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of raw posterior samples over the first pictures of each data set.

    The variance is that of the sampled latent: Var[μ] + E[σ²]. Every rank encodes its share; sums are float64.
    """
    channels = recipe.model.latent_channels
    sums = torch.zeros(3, channels, dtype=torch.float64, device=engine.device)  # Σμ, Σ(μ² + σ²), count
    weights = sum(source.weight for source in recipe.data.sources)
    for source in recipe.data.sources:
        count = max(1, round(recipe.statistics_images * source.weight / weights))
        for images in _batches(source.shards, recipe, range(engine.rank, count, engine.world_size), engine.device):
            posterior = autoencoder.encode(images)
            mu = posterior.mean.double()
            sums[0] += mu.sum((0, 2, 3))
            sums[1] += (mu.square() + posterior.logvar.double().exp()).sum((0, 2, 3))
            sums[2] += mu[:, 0].numel()
    sums = engine.mean(sums)
    mean = sums[0] / sums[2]
    return mean.float(), (sums[1] / sums[2] - mean.square()).sqrt().float()


def _batches(shards: str, recipe: AutoencoderRecipe, numbers: range, device: torch.device) -> Iterator[Tensor]:
    samples = iterate_once(shards, recipe.data.image_size, limit=numbers.stop)
    mine = (sample[1] for sample in islice(samples, numbers.start, None, numbers.step))
    while chunk := list(islice(mine, 64)):
        yield torch.stack(chunk).to(device)


def _perceptual(recipe: AutoencoderRecipe, process: Ranks) -> nn.Module | None:
    """LPIPS when its weights are given; their absence is said aloud."""
    if recipe.loss.perceptual_weights is None:
        if process.rank == 0:
            print("loss.perceptual_weights is not given: this run trains without the perceptual loss", flush=True)
        return None
    return load_perceptual(fetch_tree(recipe.loss.perceptual_weights), recipe.loss.perceptual_sha256)
