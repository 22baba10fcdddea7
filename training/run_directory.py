"""The run directory: `run.yaml` says what the run is, and refuses a recipe that would make it another one."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.errors import DataError
from launch.config_io import dump_yaml, from_dict, read_yaml, to_dict
from launch.errors import ConfigError
from launch.runtime import Ranks
from training.errors import TrainingError

# A resumed run may change these; anything else would make it another run.
CHANGEABLE = {
    *(
        "total_steps",
        "log_every_steps",
        "sample_every_steps",
        "samples",
        "checkpoint",
        "validation_shards",
        "init_from",
    ),
    "step_policy",
}
# Data sets are known by their fingerprints (check_stamp), not by where they lie.
CHANGEABLE_NESTED = {
    "engine": {"zero_stage", "offload_optimizer", "activation_checkpointing", "compile", "hang_timeout_s"},
    "data": {"num_workers", "shards", "mix", "max_bad_fraction"},
}


def open_run_directory(directory: Path, recipe: Any, kind: str, ranks: Ranks) -> None:
    """Makes the run directory and `run.yaml`, or checks that this recipe is the one the run was started with."""
    path = directory / "run.yaml"
    resolved = {"kind": kind, **to_dict(recipe)}
    if path.exists():
        old = read_yaml(path).get("recipe")
        if not isinstance(old, dict):
            raise TrainingError(f"{path} holds no recipe; restore it, or give another --run")
        refuse_other_recipe(_completed(old, type(recipe), path), resolved, directory)
    elif ranks.rank == 0:
        partial = path.with_suffix(".partial")  # also what a start leaves that was killed right here
        if directory.exists() and any(found != partial for found in directory.iterdir()):
            raise TrainingError(f"{directory} exists but is no run (no run.yaml); choose another --run or empty it")
        directory.mkdir(parents=True, exist_ok=True)
        partial.write_text(dump_yaml({"recipe": resolved, "provenance": provenance()}), encoding="utf-8")
        partial.rename(path)


def _completed(old: dict[str, Any], schema: type[Any], path: Path) -> dict[str, Any]:
    """The run's recipe with the defaults of fields that came after it, so that an old run goes on."""
    try:
        recipe: Any = from_dict(schema, {key: value for key, value in old.items() if key != "kind"}, str(path))
    except ConfigError:
        return old  # of another kind, or with a field that is no more: compared as it stands
    return {"kind": old.get("kind"), **to_dict(recipe)}


def refuse_lost(directory: Path, url: str) -> None:
    """Refuses to train a finished run anew because `url` holds none of its checkpoints any more."""
    if (directory / "artifact").exists():
        raise DataError(
            f"{directory} is a finished run (it has an artifact) and {url} holds no checkpoint of it; restore them, or "
            "give another --run to train anew"
        )


def refuse_other_recipe(old: dict[str, Any], new: dict[str, Any], directory: Path) -> None:
    """Names the first field that makes `new` a different run."""
    for key in sorted(old.keys() | new.keys(), key=lambda name: (name != "kind", name)):
        if key in CHANGEABLE:
            continue
        left, right = _without_changeable(key, old.get(key)), _without_changeable(key, new.get(key))
        if left != right:
            name, was, now = _first_difference(key, left, right)
            another = "another --run" + " and checkpoint.url" * bool((new.get("checkpoint") or {}).get("url"))
            raise TrainingError(
                f"{directory} was started with {name} = {was!r}, the recipe now says {now!r}; "
                f"restore the value, or give {another}"
            )


def _without_changeable(key: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: inner for name, inner in value.items() if name not in CHANGEABLE_NESTED.get(key, ())}


def _first_difference(path: str, left: Any, right: Any) -> tuple[str, Any, Any]:
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        left, right = dict(enumerate(left)), dict(enumerate(right))
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                return _first_difference(f"{path}.{key}", left.get(key), right.get(key))
    return path, left, right


def provenance() -> dict[str, Any]:
    """Versions and the git commit, for `run.yaml`."""
    packages = ("torch", "deepspeed", "accelerate", "webdataset", "transformers", "open-clip-torch", "safetensors")
    commit = ""
    if git := shutil.which("git"):
        command = [git, "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in packages},
    }
