"""The diffusion stage: a ZeRO-sharded DiT on latents of a frozen autoencoder and frozen text encoders."""

from collections.abc import Callable
from pathlib import Path

from launch.runtime import ranks
from models.artifact import config_to_dict
from models.autoencoder import load_autoencoder, save_autoencoder
from models.dit import DiT, DiTConfig
from models.pipeline import TextToImage
from models.text_encoder import Conditioner
from training.checkpoint import bring_up_to_date
from training.checkpoint_writer import Groups
from training.config import DiTRecipe
from training.diffusion_step import diffusion_step
from training.ema import EMA
from training.engine import Engine
from training.errors import TrainingError
from training.fragments import gather_into
from training.frozen import Frozen, check_encodings, load_frozen
from training.hooks import sample_grid
from training.init_from import init_from
from training.loop import Run, check_data, open_checkpoints
from training.optim import parameter_groups
from training.run_checks import DiffusionChecks
from training.run_directory import open_run_directory
from training.schedule import learning_rate
from training.snapshot import on_rank0


def train(recipe: DiTRecipe, run_dir: str, quiet: bool = False) -> None:
    """Trains, or resumes, the run in `run_dir` and ends with `artifact/`.

    Raises:
        TrainingError: a recipe, data set, artifact or checkpoint that does not fit; one line with the remedy.
        Preempted: a signal asked to stop; everything is saved.
    """
    process, directory = ranks(), Path(run_dir)
    engine = Engine(recipe.engine, process.world_size)
    indexes = check_data(recipe, engine)
    bring_up_to_date(directory, recipe.checkpoint, engine, process.local_rank)
    frozen = load_frozen(recipe, directory / "frozen")
    dit_config = dit_config_of(recipe, frozen)
    check_encodings(recipe, frozen, indexes)
    dit = DiT(dit_config)
    parameter_groups(dit, recipe.optim)  # refused before there is a run directory
    open_run_directory(directory, recipe, "dit", process)

    dit.init_weights(recipe.seed)
    checkpointer, snapshot = open_checkpoints(directory, recipe.checkpoint, engine, process.local_rank)
    engine.shard(dit, recipe.optim, dit.blocks)
    # Stored features need the text encoders for the null condition and the sample grids alone: no GPU memory for that.
    frozen.to(engine.device, text=any(index.encoding is None for index in indexes))
    keep_frozen(frozen, directory, engine)
    if recipe.init_from and snapshot is None:
        init_from(recipe.init_from, "text_to_image", engine, directory)
    ema = EMA(recipe.ema, engine.weight_fragments())

    def groups() -> Groups:
        return {"model": engine.weight_fragments(), **ema.groups(), **engine.moment_fragments()}

    pipeline = {
        "dit": config_to_dict(dit_config),
        "diffusion": config_to_dict(recipe.diffusion),
        "image_size": recipe.data.image_size,
        "weights": recipe.ema.names[0],
    }
    run = Run(directory, recipe, engine, checkpointer, lambda: {"pipeline": pipeline}, indexes, quiet)
    run.resume(snapshot, groups)
    checks = DiffusionChecks(recipe.diffusion, frozen.conditioner, dit_config, run.pace)
    run.parts.add(*checks.parts)

    def draw(path: Path) -> None:
        sampler = TextToImage(frozen.autoencoder, DiT(dit_config).to(engine.device), frozen.conditioner,
                              recipe.diffusion, recipe.data.image_size)  # fmt: skip
        sample_grid(engine, ema.fragments(), sampler, recipe.samples, path)

    with run.watchdog:
        loop(recipe, run, engine, ema, frozen, groups, draw, checks)
        run.watchdog.mark("finish")
        finish(recipe, run, engine, ema, frozen, dit_config)


def loop(
    recipe: DiTRecipe,
    run: Run,
    engine: Engine,
    ema: EMA,
    frozen: Frozen,
    groups: Callable[[], Groups],
    draw: Callable[[Path], None],
    checks: DiffusionChecks,
) -> None:
    """Forward, backward and step."""
    loader = run.open_loader()
    for step in run.steps():
        rate = learning_rate(
            recipe.schedule, recipe.optim.learning_rate, step, recipe.total_steps, recipe.engine.global_batch_size
        )
        engine.set_learning_rate(rate)
        for batch in run.micro_batches(loader):
            with engine.accumulate():
                with engine.autocast():
                    loss, scalars = diffusion_step(
                        engine.model,
                        batch,
                        frozen,
                        recipe.diffusion,
                        seed=recipe.seed,
                        sample_latents=recipe.latents == "sample",
                        global_batch_size=recipe.engine.global_batch_size,
                        patch_size=recipe.model.patch_size,
                        checks=checks,
                    )
                engine.backward(loss)  # on the last micro-batch: reduce, clip, AdamW
            run.meter.add(**scalars)
        ema.update(step)
        run.log(lr=rate)
        if recipe.samples.prompts and run.due(recipe.samples.every_steps):
            with run.not_training_time():
                draw(run.directory / "samples" / f"step-{step + 1:08d}.png")
        run.save_if_due(groups)


def dit_config_of(recipe: DiTRecipe, frozen: Frozen) -> DiTConfig:
    """The transformer's sizes: the recipe's own and those that follow from the frozen networks.

    Raises:
        TrainingError: they do not go together.
    """
    grid = recipe.data.image_size // (frozen.autoencoder.config.downsampling * recipe.model.patch_size)
    try:
        return DiTConfig(
            latent_channels=frozen.autoencoder.config.latent_channels,
            patch_size=recipe.model.patch_size,
            depth=recipe.model.depth,
            width=recipe.model.width,
            num_heads=recipe.model.num_heads,
            text_dim=frozen.conditioner.text_dim,
            pooled_dim=frozen.conditioner.pooled_dim,
            max_grid=recipe.model.max_grid,
            base_grid=grid,
            attention=recipe.model.attention,
        )
    except ValueError as error:
        raise TrainingError(f"the recipe's model does not fit its data and frozen networks: {error}") from None


def keep_frozen(frozen: Frozen, directory: Path, engine: Engine) -> None:
    """Keeps the frozen networks in the run, so that its checkpoints need nothing else; refuses others on resume."""
    kept = directory / "frozen"

    def keep() -> tuple[str, str]:  # each is there whole or not at all; a kill may have come between them
        if not (kept / "autoencoder").exists():
            save_autoencoder(kept / "autoencoder", frozen.autoencoder)
        if not (kept / "text_encoders").exists():
            frozen.conditioner.save(kept / "text_encoders")
        return load_autoencoder(kept / "autoencoder")[1], Conditioner.load(kept / "text_encoders").fingerprint

    # By rank 0 alone: other machines may have a run directory of their own.
    autoencoder, text_encoders = on_rank0(engine, keep)
    for what, was, now in (
        ("autoencoder", autoencoder, frozen.autoencoder_fingerprint),
        ("text encoders", text_encoders, frozen.conditioner.fingerprint),
    ):
        if was != now:
            raise TrainingError(
                f"{directory} was trained with {what} {was[:12]}, the recipe now gives {now[:12]}; "
                "restore the old one, or give another --run"
            )


def finish(recipe: DiTRecipe, run: Run, engine: Engine, ema: EMA, frozen: Frozen, dit_config: DiTConfig) -> None:
    """Writes the artifact from the first average and leaves the process group."""
    folder = run.directory / "artifact"
    dit = DiT(dit_config) if engine.rank == 0 and not folder.exists() else None
    gather_into(dit, ema.fragments())
    if dit is not None:
        TextToImage(
            frozen.autoencoder.cpu(), dit, frozen.conditioner.cpu(), recipe.diffusion, recipe.data.image_size
        ).save(folder)
    run.metrics.say(f"{run.directory} is finished at step {run.counters.step}: {folder}")
    run.close()
