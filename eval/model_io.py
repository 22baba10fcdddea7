"""Opening MODEL: a run directory, a checkpoint of it, or an artifact, local or s3://."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.manifest import Manifest, newest_verified, read_manifest, verify
from data.object_store import fetch_tree, join, open_store
from eval.errors import EvalError
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
    """Loads MODEL: a run directory (its artifact, or its newest good checkpoint), a checkpoint folder, or an artifact.

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
    elif store.exists("run.yaml"):
        found = newest_verified(open_store(join(model, "checkpoints")))
        if found is None:
            raise EvalError(f"{model} has neither an artifact nor a checkpoint yet; train it first")
        opened = _open_checkpoint(join(model, "checkpoints", f"{STEP_PREFIX}{found[0]:08d}"))
    elif store.exists("model_index.json"):
        raise EvalError(f"{model} is an export for diffusers; name the run or artifact that it was made from")
    else:
        raise EvalError(f"{model} is no run directory, checkpoint or artifact; check the path")
    opened.pipeline.to(default_device())
    return opened


def _open_artifact(url: str) -> OpenedModel:
    folder = fetch_tree(url)
    pipeline = TextToImage.load(folder)
    fingerprint = json.loads((folder / "config.json").read_text(encoding="utf-8"))["fingerprint"]
    return OpenedModel(pipeline=pipeline, url=url, fingerprint=fingerprint, weights="artifact")


def _open_checkpoint(url: str) -> OpenedModel:
    """Averaged weights of a commit, with the frozen networks that the run keeps beside its checkpoints."""
    checkpoints, _, folder = url.rstrip("/").rpartition("/")
    run, _, _ = checkpoints.rpartition("/")
    if not folder.startswith(STEP_PREFIX) or not folder.removeprefix(STEP_PREFIX).isdigit():
        raise EvalError(f"{url} holds a manifest but is not named step-00001000; name the folder as training wrote it")
    step = int(folder.removeprefix(STEP_PREFIX))
    store = open_store(checkpoints)
    manifest = read_manifest(store, step)
    problems = verify(store, step, manifest)
    if problems:
        raise EvalError(f"{problems[0]}; restore the file or use another checkpoint")
    parts = manifest.meta.get("state", {}).get("pipeline")
    if parts is None:
        raise EvalError(f"{url} is a checkpoint of no text-to-image model; name one of a `train dit` run")
    dit = DiT(config_from_dict(DiTConfig, parts["dit"], url))
    load_weights(dit, _read_group(fetch_tree(url), manifest, parts["weights"]), url)
    autoencoder, _ = load_autoencoder(fetch_tree(join(run, "frozen", "autoencoder")))
    conditioner = Conditioner.load(fetch_tree(join(run, "frozen", "text_encoders")))
    diffusion = config_from_dict(DiffusionConfig, parts["diffusion"], url)
    pipeline = TextToImage(autoencoder, dit, conditioner, diffusion, parts["image_size"]).eval().requires_grad_(False)
    entries = {key: entry.sha256 for key, entry in sorted(manifest.files.items())}
    fingerprint = hashlib.sha256(json.dumps([step, entries]).encode()).hexdigest()
    return OpenedModel(
        pipeline=pipeline, url=url, fingerprint=fingerprint, weights=f"{parts['weights']} at step {step}"
    )


def _read_group(folder: Path, manifest: Manifest, group: str) -> dict[str, Tensor]:
    """All tensors of one group ("model", "ema-0.999") by parameter name, float32 on the CPU."""
    names = manifest.meta.get("index", {}).get(group)
    if not names:
        raise EvalError(f"{folder} holds no weights of group {group!r}; use another checkpoint")
    tensors: dict[str, Tensor] = {}
    for key in sorted(set(names.values())):
        try:
            with safe_open(str(folder / key), framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name, where in names.items() if where == key}
        except (OSError, SafetensorError) as error:
            raise EvalError(f"{folder / key} is not readable ({error}); use another checkpoint") from None
    return tensors
