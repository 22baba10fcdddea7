"""`darkroom data …`: each package is named inside the command that needs it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launch.cli_common import AsJson, Quiet, end_with_problems, say, show

app = typer.Typer(help="Make, index and check shards of captioned images.", no_args_is_help=True)

Shards = Annotated[str, typer.Argument(metavar="URL", help="Folder of shards, local or s3://.")]


@app.command("digits")
def data_digits(
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder: train/, test/ and combinations/ go in.")],
    train: Annotated[int, typer.Option(help="Training pictures.")] = 16384,
    test: Annotated[int, typer.Option(help="Pictures of held-out digits.")] = 512,
    combinations: Annotated[int, typer.Option(help="Pictures of held-out digit-colour pairs.")] = 512,
    seed: int = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compose the embedded sample: captioned 32x32 pictures of real handwritten digits."""
    from data.digits import write_digits

    done = write_digits(out, num_train=train, num_test=test, num_combinations=combinations, seed=seed)
    if as_json or not quiet:
        show(done, as_json)


@app.command("pack")
def data_pack(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="Folder of JPEG, PNG or WebP files.")],
    captions: Annotated[str, typer.Argument(metavar="CAPTIONS", help='JSONL: {"file": "a.jpg", "caption": "…"}.')],
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder of shards, local or s3://.")],
    samples_per_shard: Annotated[int, typer.Option(help="At most this many pictures in a shard.")] = 4096,
    min_shards: Annotated[int, typer.Option(help="At least this many shards, if there are as many pictures.")] = 16,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Pack a folder of images and their captions into shards with an index."""
    from data.pack import pack

    done = pack(images, captions, out, samples_per_shard=samples_per_shard, min_shards=min_shards)
    if as_json or not quiet:
        show(done, as_json)


@app.command("index")
def data_index(url: Shards, quiet: Quiet = False) -> None:
    """Write the index of a folder of tars that something else packed."""
    from data.shards import build_index

    build_index(url)
    say(f"{url}: indexed", quiet)


@app.command("verify")
def data_verify(url: Shards, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Read every shard and compare it with the index. Exit code 2 if anything differs."""
    from data.shards import verify

    remedy = "restore the shards, or pack or index them anew in a new folder"
    end_with_problems(url, verify(url), f"{url}: every shard is as the index says", remedy, quiet, as_json)


@app.command("ls")
def data_ls(url: Shards, as_json: AsJson = False) -> None:
    """Say what a folder of shards holds."""
    from data.shards import describe

    show(describe(url), as_json)


@app.command("stats")
def data_stats(
    url: Shards,
    image_size: Annotated[int, typer.Option(help="px; the one resolution if --resolutions is not given.")] = 256,
    resolutions: Annotated[str, typer.Option(help="px, like 256,512.")] = "",
    max_aspect_ratio: Annotated[float, typer.Option(help="Longest side over shortest.")] = 2.0,
    multiple: Annotated[int, typer.Option(help="px; sides of buckets are multiples of it.")] = 64,
    micro_batch_size: Annotated[int, typer.Option(help="Samples; for the fill of buckets.")] = 32,
    captions_from: Annotated[int, typer.Option(metavar="N", help="Read captions from at most N shards.")] = 4,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Write stats.json and stats.png there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure sizes, aspect ratios, caption lengths and how samples fill the buckets."""
    from data.stats import measure, parse_buckets, stats_text

    buckets = parse_buckets(image_size, resolutions, max_aspect_ratio, multiple)
    facts = measure(url, buckets=buckets, micro_batch_size=micro_batch_size, captions_from=captions_from, out=out)
    typer.echo(json.dumps(facts) if as_json else stats_text(facts))


@app.command("ledger")
def data_ledger(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    shards: Annotated[list[str] | None, typer.Option(help="Where its data set lies now; once for each.")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove that a run consumed every sample exactly once per epoch. Exit code 2 if its record does not."""
    from data.ledger_check import check_ledger
    from launch.checks import checkpoints_of

    verdict = check_ledger(run / "ledger", shards or (), checkpoints_of(run))
    show(verdict.to_dict(), as_json)
    verdict.refuse_unclean()
