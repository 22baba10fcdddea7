"""`darkroom checkpoint …`: each package is named inside the command that needs it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.cli_common import AsJson, Quiet, end_with_problems, refuse, say, show

app = typer.Typer(help="Look at a run's checkpoints, and delete old ones.", no_args_is_help=True)

Checkpoints = Annotated[str, typer.Argument(metavar="URL", help="Run directory or checkpoints folder, or s3://.")]


def _commits(url: str) -> tuple[Any, list[int]]:
    """The store of a run's checkpoints and the committed steps; refuses a place without any."""
    from data.manifest import list_commits
    from data.object_store import open_store
    from launch.checks import commit_places

    for place in commit_places(url):
        store = open_store(place)
        steps = list_commits(store)
        if steps:
            return store, steps
    refuse(f"{url} holds no committed checkpoint; give a run directory or its checkpoints folder")


@app.command("ls")
def checkpoint_ls(url: Checkpoints, as_json: AsJson = False) -> None:
    """List the committed checkpoints."""
    from data.manifest import DamagedCommit, read_manifest

    store, steps = _commits(url)
    rows: list[dict[str, Any]] = []
    for step in steps:
        try:
            manifest = read_manifest(store, step)
        except DamagedCommit as error:
            rows.append({"step": step, "damaged": str(error)})
            continue
        size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
        rows.append({"step": step, "files": len(manifest.files), "bytes": size_bytes, "attempt": manifest.attempt})
    if as_json:
        typer.echo(json.dumps({"url": url, "checkpoints": rows}))
    else:
        for row in rows:
            if "damaged" in row:
                typer.echo(f"step {row['step']:>10}  {row['damaged']}")
                continue
            size_mib = row["bytes"] / 2**20
            typer.echo(f"step {row['step']:>10}  {row['files']:>4} files  {size_mib:>10.1f} MiB  {row['attempt']}")


@app.command("verify")
def checkpoint_verify(url: Checkpoints, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Read every committed checkpoint and compare sizes and SHA-256. Exit code 2 if anything differs."""
    store, steps = _commits(url)
    problems = [problem for step in steps for problem in _problems(store, step)]
    remedy = "a resume takes the newest one without a problem"
    end_with_problems(url, problems, f"{url}: {len(steps)} good", remedy, quiet, as_json)


@app.command("prune")
def checkpoint_prune(
    url: Checkpoints,
    keep_last: Annotated[int, typer.Option(min=1, help="Commits to keep.")],
    keep_every: Annotated[int, typer.Option(min=0, help="Keep those of multiples of this step, too; 0 = none.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Delete old checkpoints. The newest of those that stay is read first: the only good one is never deleted."""
    from data.manifest import delete_commit, superfluous

    store, steps = _commits(url)
    doomed = superfluous(steps, keep_last, keep_every)
    kept = [step for step in steps if step not in doomed]
    if doomed and all(_problems(store, step) for step in reversed(kept)):  # read until one is good
        refuse(f"{url}: none of the {len(kept)} that would stay is good; `darkroom checkpoint verify` says why")
    for step in doomed if not dry_run else ():
        delete_commit(store, step)
    if as_json:
        typer.echo(json.dumps({"url": url, "deleted": doomed, "kept": kept, "dry_run": dry_run}))
        return
    what = "would be deleted" if dry_run else "deleted"
    say(f"{what}: {', '.join(map(str, doomed)) or 'none'}; kept: {', '.join(map(str, kept))}", quiet)


@app.command("ema")
def checkpoint_ema(
    url: Checkpoints,
    sigma_rel: Annotated[float, typer.Option(help="Width of the average, as a share of the steps: 0.10.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="New safetensors file.")],
    step: Annotated[int | None, typer.Option(help="Committed step at which it ends [default: the newest].")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit an average of the weights that was not kept from those that were (ema.sigma_rels)."""
    from launch.checks import check_local

    check_local("--out", out)
    store, _ = _commits(url)
    from training.post_hoc_ema import write_post_hoc_ema

    facts = write_post_hoc_ema(store.url, sigma_rel, out, step)
    if as_json or not quiet:
        show(facts, as_json)


def _problems(store: Any, step: int) -> list[str]:
    """What is wrong with a commit."""
    from data.manifest import DamagedCommit, read_manifest, verify

    try:
        return verify(store, step, read_manifest(store, step))
    except DamagedCommit as error:
        return [str(error)]
