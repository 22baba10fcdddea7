"""Opening MODEL: a run directory, a checkpoint of it, or an artifact, local or s3://."""

import hashlib
import json
from dataclasses import dataclass

import torch

from data.commit import Commit
from data.manifest import newest_verified, read_manifest, step_folder, verify
from data.object_store import fetch_tree, join, open_store
from eval.errors import EvalError
from launch.checks import commit_places
from models.artifact import config_from_dict, load_weights
from models.autoencoder import load_autoencoder
from models.diffusion import DiffusionConfig
from models.dit import DiT, DiTConfig
from models.pipeline import TextToImage
from models.text_encoder import Conditioner

STEP_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A loaded model and what names it."""

    pipeline: TextToImage
    url: str  # of the artifact or checkpoint that was read
    fingerprint: str  # of the artifact, or SHA-256 of the checkpoint's manifest
    weights: str  # "artifact", or the averaged weights of a checkpoint: "ema-0.999 at step 1000"


def default_device() -> torch.device:
    """The first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_pipeline(model: str) -> TextToImage:
    """Loads MODEL onto the first GPU, or the CPU where there is none (see `open_model`)."""
    return open_model(model).pipeline


def open_model(model: str) -> OpenedModel:
    """Loads MODEL: a run directory (its artifact, or its newest good checkpoint), a checkpoint, or an artifact.

    Raises:
        EvalError: there is nothing of the kind at that address.
        DataError, ModelError: what is there is damaged or does not go together.
    """
    store = open_store(model)
    if store.exists("artifact/config.json"):
        opened = _open_artifact(join(model, "artifact"))
    elif store.exists("config.json"):
        opened = _open_artifact(model)
    elif store.exists("manifest.json"):
        opened = _open_checkpoint(model)
    elif store.exists("model_index.json"):
        raise EvalError(f"{model} is an export for diffusers; name the run or artifact that it was made from")
    elif (newest := _newest_commit(model)) is not None:
        opened = _open_checkpoint(newest)
    elif store.exists("run.yaml"):
        raise EvalError(f"{model} has neither an artifact nor a checkpoint yet; train it first")
    else:
        raise EvalError(f"{model} is no run directory, checkpoint or artifact; check the path")
    opened.pipeline.to(default_device())
    return opened


def _newest_commit(model: str) -> str | None:
    """The newest good checkpoint of a run directory or checkpoints folder."""
    for place in commit_places(model):
        if found := newest_verified(open_store(place)):
            return join(place, step_folder(found[0]))
    return None


def _open_artifact(url: str) -> OpenedModel:
    folder = fetch_tree(url)
    pipeline = TextToImage.load(folder)
    fingerprint = json.loads((folder / "config.json").read_text(encoding="utf-8"))["fingerprint"]
    return OpenedModel(pipeline=pipeline, url=url, fingerprint=fingerprint, weights="artifact")


def _open_checkpoint(url: str) -> OpenedModel:
    """Averaged weights of a commit, with the frozen networks that the run keeps with or beside its checkpoints."""
    checkpoints, _, folder = url.rstrip("/").rpartition("/")
    run, _, _ = checkpoints.rpartition("/")
    if not folder.startswith(STEP_PREFIX) or not folder.removeprefix(STEP_PREFIX).isdigit():
        raise EvalError(f"{url} holds a manifest but is not named step-00001000; name the folder as training wrote it")
    step = int(folder.removeprefix(STEP_PREFIX))
    store = open_store(checkpoints)
    manifest = read_manifest(store, step)
    parts = manifest.meta.get("state", {}).get("pipeline")
    if parts is None:
        raise EvalError(f"{url} is a checkpoint of no text-to-image model; name one of a `train dit` run")
    commit, group = Commit(store, manifest), parts["weights"]
    if not commit.shapes(group):
        raise EvalError(f"{url} holds no weights of group {group!r}; use another checkpoint")
    problems = verify(store, step, manifest, commit.files(group))
    if problems:
        raise EvalError(f"{problems[0]}; restore the file or use another checkpoint")
    dit = DiT(config_from_dict(DiTConfig, parts["dit"], url))
    load_weights(dit, {name: torch.from_numpy(array) for name, array in commit.group(group).items()}, url)
    frozen = join(checkpoints, "run", "frozen") if store.list("run/frozen/") else join(run, "frozen")
    autoencoder, _ = load_autoencoder(fetch_tree(join(frozen, "autoencoder")))
    conditioner = Conditioner.load(fetch_tree(join(frozen, "text_encoders")))
    diffusion = config_from_dict(DiffusionConfig, parts["diffusion"], url)
    pipeline = TextToImage(autoencoder, dit, conditioner, diffusion, parts["image_size"]).eval().requires_grad_(False)
    entries = {key: entry.sha256 for key, entry in sorted(manifest.files.items())}
    fingerprint = hashlib.sha256(json.dumps([step, entries]).encode()).hexdigest()
    return OpenedModel(pipeline=pipeline, url=url, fingerprint=fingerprint, weights=f"{group} at step {step}")
