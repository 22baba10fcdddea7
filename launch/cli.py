"""The command line. With cli_data and cli_checkpoint it alone names every package, each inside the command that needs
it.

Exit codes: 0 done, 1 a bug (with its traceback), 2 a user's mistake (one line), 75 preempted and saved.
docs/commands.md is the user's page.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launch import cli_checkpoint, cli_data
from launch.cli_common import AsJson, Quiet, refuse, say, show

app = typer.Typer(
    name="darkroom",
    help="Pretrain text-to-image latent-diffusion models from scratch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows a plain traceback
    rich_markup_mode=None,  # rich would double the time of --help
)
train_app = typer.Typer(help="Train the autoencoder, then the diffusion transformer.", no_args_is_help=True)
app.add_typer(cli_data.app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(cli_checkpoint.app, name="checkpoint")

# Of metrics.json: what a terminal is spared.
NOT_FIGURES = ("format_version", "model", "settings", "data", "prompts", "reader", "versions", "eval_seconds")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="The name of a recipe, or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Values that replace the recipe's.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Run directory, checkpoint or artifact, local or s3://.")]


def main() -> NoReturn:
    """Runs the command of `sys.argv`; a user's mistake becomes one line and its exit code."""
    try:
        app()
    except Exception as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise again, for each reader that ends
        from launch.checks import mistake_behind
        from launch.runtime import follows_from_another, is_rank_process, report_crash, report_error

        mistake = mistake_behind(error) or error
        code = getattr(mistake, "exit_code", None)
        if isinstance(code, int):
            report_error(mistake)
            _leave(code)
        if is_rank_process():
            if not follows_from_another(error):  # else its traceback would hide that rank's
                report_crash(error)
            _leave(1)
        raise
    except SystemExit as done:
        if done.code:
            if isinstance(done.code, int):
                _leave(done.code)
            raise
    _leave(0)


def _leave(code: int) -> NoReturn:
    """A rank skips the interpreter's tear-down, in which threads of gloo have been seen to abort after all was done."""
    from launch.runtime import is_rank_process

    if is_rank_process():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# --- train --------------------------------------------------------------------------------------------------------

Nproc = Annotated[int, typer.Option("--nproc", metavar="N", help="Processes on this machine, one per GPU.")]
RunDir = Annotated[str | None, typer.Option("--run", metavar="DIR", help="Run directory [default: runs/RECIPE].")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and its arithmetic; train nothing.")]


@train_app.command("autoencoder")
def train_autoencoder(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = 1,
    run: RunDir = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Train the autoencoder. The same command resumes."""
    _train("autoencoder", recipe, overrides or [], nproc, run, dry_run, quiet)


@train_app.command("dit")
def train_dit(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = 1,
    run: RunDir = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Train the diffusion transformer on an autoencoder's latents. The same command resumes."""
    _train("dit", recipe, overrides or [], nproc, run, dry_run, quiet)


def _train(
    kind: str, recipe: str, overrides: list[str], nproc: int, run: str | None, dry_run: bool, quiet: bool
) -> None:
    from launch.checks import check_local
    from launch.config_io import find_recipe, load_recipe
    from launch.runtime import become_single_rank, is_rank_process, leave_when_preempted, ranks

    leave_when_preempted()
    run_dir = run or f"runs/{Path(recipe).stem}"
    check_local("--run", run_dir)
    find_recipe(recipe)  # a wrong name is said before torch is imported for the recipe's dataclasses
    _, config = load_recipe(recipe, overrides, {kind: _schema(kind)})
    if dry_run:
        from training.dry_run import describe

        typer.echo(describe(config, ranks().world_size if is_rank_process() else nproc))
        return
    _spread(nproc)
    if not is_rank_process():
        become_single_rank()
    if kind == "autoencoder":
        from training import train_autoencoder as autoencoder_stage

        autoencoder_stage.train(config, run_dir, quiet=quiet)
    else:
        from training import train_dit as dit_stage

        dit_stage.train(config, run_dir, quiet=quiet)


def _spread(nproc: int) -> None:
    """Runs this command as several ranks and ends with their exit code; a rank, or a single process, goes on."""
    from launch.runtime import is_rank_process, spawn

    if nproc < 1:
        refuse(f"--nproc {nproc} must be at least 1")
    if nproc > 1 and not is_rank_process():
        raise typer.Exit(spawn(nproc, [sys.executable, *sys.orig_argv[1:]]))


@app.command("encode")
def encode(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Encode pictures and captions once, for training to read. The same command goes on."""
    from launch.config_io import find_recipe, load_recipe
    from launch.runtime import leave_when_preempted

    leave_when_preempted()
    find_recipe(recipe)
    _, config = load_recipe(recipe, overrides or [], {"encode": _schema("encode")})
    _spread(nproc)
    from training.encode import encode as encode_set

    summary = encode_set(config, quiet=quiet or as_json)
    if summary is not None and (as_json or not quiet):
        show(summary, as_json)


def _schema(kind: str) -> type:
    """The dataclass that a recipe of this kind fills."""
    if kind == "eval":
        from eval.config import EvalRecipe

        return EvalRecipe
    from training.config import AutoencoderRecipe, DiTRecipe, EncodeRecipe

    return {"autoencoder": AutoencoderRecipe, "dit": DiTRecipe, "encode": EncodeRecipe}[kind]


# --- what a model is asked ----------------------------------------------------------------------------------------


@app.command("sample")
def sample(
    model: Model,
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text; repeat for more pictures.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the PNG files.")],
    seed: Annotated[int, typer.Option(help="Picture i starts from seed + i.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 28,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 4.0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw pictures for prompts."""
    from launch.checks import check_new_folder, check_sampling

    check_sampling(steps, guidance, seed)
    check_new_folder("--out", out)
    from PIL import Image

    from eval.model_io import load_pipeline

    pipeline = load_pipeline(model)
    seeds = [seed + number for number in range(len(prompt))]
    pictures = pipeline.generate(prompt, seeds, num_steps=steps, guidance_scale=guidance)  # (B, 3, H, W), [0, 1]
    pixels = (pictures * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, picture in enumerate(pixels):
        name = f"{number:04d}.png"
        Image.fromarray(picture).save(out / name)
        rows.append({"file": name, "prompt": prompt[number], "seed": seeds[number]})
    facts = {"model": model, "num_steps": steps, "guidance_scale": guidance, "pictures": rows}
    (out / "samples.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        say(f"{out}: {len(rows)} picture{'s' * (len(rows) > 1)}", quiet)


@app.command("eval")
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="[default: the run's eval/ folder]")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on held-out data."""
    from launch.config_io import find_recipe, load_recipe

    find_recipe(recipe)
    _, config = load_recipe(recipe, overrides or [], {"eval": _schema("eval")})
    if out is None:
        is_run = Path(config.model, "run.yaml").is_file()
        out = str(Path(config.model, "eval") if is_run else Path("runs", Path(recipe).stem))
    from eval.run import run_eval

    metrics = run_eval(config, out, say=lambda line: say(line, quiet or as_json))
    if as_json:
        show(metrics, as_json)
    elif not quiet:
        show({key: value for key, value in metrics.items() if key not in NOT_FIGURES}, as_json)
        say(f"{out}: metrics.json, pictures and prompts")


@app.command("export")
def export(
    model: Model,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="New folder that diffusers loads.")],
    steps: Annotated[int, typer.Option(help="Sampler steps recommended to the caller.")] = 28,
    guidance: Annotated[float, typer.Option(help="Guidance scale recommended to the caller.")] = 4.0,
    quiet: Quiet = False,
) -> None:
    """Write a diffusers pipeline and prove that it draws the pictures our own sampler draws."""
    from launch.checks import check_new_folder, check_sampling

    check_sampling(steps, guidance)
    check_new_folder("--out", out)
    from eval.model_io import load_pipeline
    from models.export import export_diffusers

    difference = export_diffusers(load_pipeline(model), out, num_steps=steps, guidance_scale=guidance)
    say(f"{out}: written; largest pixel difference to our own sampler {difference:.1e} of 1", quiet)


@app.command("report")
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or the demo's folder.")],
    quiet: Quiet = False,
) -> None:
    """Write RUN's report: one HTML page with curves, samples, metrics and the recipe."""
    from eval.report import write_report

    say(str(write_report(run)), quiet)


# --- doctor -------------------------------------------------------------------------------------------------------


@app.command("doctor")
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine and installation offer, and what is missing."""
    from launch.doctor import examine

    facts = examine()
    show(facts, as_json)
    if facts["missing"]:
        refuse(f"missing: {', '.join(facts['missing'])}; install them, or run `make install`")


if __name__ == "__main__":
    main()
