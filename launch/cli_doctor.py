"""`darkroom doctor`: each package is named inside the function that needs it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.cli_common import AsJson, darkroom_command, refuse, show

if TYPE_CHECKING:
    from launch.doctor import Finding


def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Look for its data and weights too.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...")] = None,
    store: Annotated[str, typer.Option(metavar="URL", help="Put, get and delete a file there.")] = "",
    cluster: Annotated[bool, typer.Option("--cluster", help="Check the nodes of a cluster, together.")] = False,
    cluster_file: Annotated[str | None, typer.Option(metavar="FILE", help="[default: cluster.yaml]")] = None,
    nodes: Annotated[int | None, typer.Option(metavar="N", help="With --cluster [default: all idle ones].")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine, or a cluster, offers, what is missing, and what to do about it."""
    if cluster:
        return _doctor_of_cluster(cluster_file, nodes, as_json)
    from launch.doctor import as_rows, examine, findings

    facts, found = examine(), findings()
    if store:
        found += needs_of_store(store)
    if recipe:
        found += needs_of(recipe, overrides or [])
    show({**facts, **({"findings": as_rows(found)} if as_json else {})}, as_json)
    for finding in found if not as_json else ():
        typer.echo(str(finding))
    if facts["missing"]:
        refuse(f"missing: {', '.join(facts['missing'])}; install them, or run `make install`")
    if problems := [finding for finding in found if finding.state == "problem"]:
        refuse(f"{len(problems)} problem{'s' * (len(problems) > 1)} found; the first: {problems[0].what}")


def _doctor_of_cluster(cluster_file: str | None, nodes: int | None, as_json: bool) -> None:
    from launch.cluster import load_cluster
    from launch.cluster_check import check_cluster
    from launch.slurm import Place

    place = Place(working_folder=Path.cwd(), darkroom=darkroom_command())
    asked, bad = check_cluster(load_cluster(cluster_file), place, nodes)
    if as_json:
        typer.echo(json.dumps({"nodes": asked, "bad": bad}))
    else:
        for node in asked:
            typer.echo(f"{node:<16} {'; '.join(bad.get(node, ['good']))}")
    if bad:
        refuse(f"{len(bad)} of {len(asked)} nodes should not be used: {', '.join(bad)}; mend them, or exclude them")


# --- what a recipe needs ------------------------------------------------------------------------------------------


def needs_of_store(url: str) -> "list[Finding]":
    """What is wrong with a store."""
    from launch.doctor import problem

    try:
        try_store(url)
    except (ValueError, OSError) as error:
        return [problem(f"store: {error}", "docs/store.md names the variables that give access")]
    return []


def needs_of(recipe: str, overrides: list[str]) -> "list[Finding]":
    """What a recipe asks for that is not there: data, an autoencoder, weights."""
    from eval.config import EvalRecipe
    from launch.config_io import load_recipe
    from training.config import AutoencoderRecipe, DiTRecipe, EncodeRecipe

    schemas = {"autoencoder": AutoencoderRecipe, "dit": DiTRecipe, "encode": EncodeRecipe, "eval": EvalRecipe}
    kind, config = load_recipe(recipe, overrides, schemas)
    found = list(_data(kind, config))
    if kind in ("dit", "encode"):
        found += [*_autoencoder(config.autoencoder), *_text_encoders(config.text_encoders)]
    if kind == "autoencoder":
        found += _perceptual(config)
    return found


def _data(kind: str, config: Any) -> "Iterator[Finding]":
    from data.errors import DataError
    from data.index import load_index
    from launch.doctor import problem

    if kind == "eval":
        urls = {"data.test": config.data.test, "data.train": config.data.train}
    elif kind == "encode":
        urls = {"shards": config.shards}
    else:
        urls = {"data.shards": config.data.shards}
        urls |= {f"data.mix.{number}": part.shards for number, part in enumerate(config.data.mix)}
    for place, url in urls.items():
        if not url:
            continue
        try:
            load_index(url)
        except (DataError, OSError) as error:
            yield problem(f"{place}: {error}", f"pack it, copy it there, or give {place}=URL")


def _autoencoder(url: str) -> "Iterator[Finding]":
    from data.errors import DataError
    from data.object_store import open_store
    from launch.doctor import problem

    try:
        store = open_store(url)
        there = store.exists("artifact/config.json") or store.exists("config.json")
        why = f"{url} has no finished artifact"
    except (DataError, OSError) as error:
        there, why = False, str(error)
    if not there:
        yield problem(f"autoencoder: {why}", "train it to its end, or give autoencoder=RUN")


def _text_encoders(configs: Any) -> "Iterator[Finding]":
    """Weights that would have to be fetched: the nodes of a cluster often cannot."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: look, fetch nothing
    from launch.doctor import warning
    from models import text_encoder
    from models.errors import ModelError

    for config in configs:
        if config.pretrained is None or text_encoder.is_artifact(config.pretrained):
            continue
        find = text_encoder._find_clip if config.kind == "clip" else text_encoder._find_t5
        try:
            find(config.pretrained)
        except ModelError:
            yield warning(
                f"text encoder {config.name}: the weights of {config.pretrained} are not on this machine",
                "sample or encode once where there is a network, or give a folder as pretrained",
            )


def _perceptual(config: Any) -> "Iterator[Finding]":
    from launch.doctor import problem, warning

    weights = config.loss.perceptual_weights
    if weights is None:
        yield warning("no LPIPS weights: the autoencoder trains without the perceptual loss", "docs/training.md")
    elif "://" not in weights and not Path(weights).is_file():
        yield problem(f"loss.perceptual_weights: {weights} does not exist", "correct the path")


def try_store(url: str) -> None:
    """Puts, gets and deletes a small file; raises what is wrong."""
    import uuid

    from data.object_store import open_store

    store, key = open_store(url), f"darkroom-doctor-{uuid.uuid4().hex}"
    store.put_bytes(key.encode(), key)
    try:
        with store.open_range(key) as file:
            found = file.read()
    finally:
        store.delete(key)
    if found != key.encode():
        raise ValueError(f"{url} gives back something else than was put; ask whoever runs it")
