"""A trained model as a folder that diffusers' StableDiffusion3Pipeline loads, proven equal to our own sampler."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.artifact import new_folder
from models.autoencoder import autoencoder_fingerprint
from models.diffusers_map import (
    autoencoder_to_diffusers,
    clip_to_transformers,
    clip_tokenizer_to_transformers,
    dit_to_diffusers,
    t5_to_transformers,
)
from models.errors import ModelError
from models.pipeline import TextToImage
from models.text_config import ClipArchitecture, T5Architecture
from models.text_tower import TextEncoder

TOLERANCE = 1e-3  # largest allowed difference of a pixel in [0, 1]
CALL_NAME = "darkroom.json"
_PROOF_PROMPTS = ("a red seven above a blue three", "", "A photo of two cats, at night!")
_PROOF_STEPS = 4
_PROOF_GUIDANCE = (3.0, 1.0)  # with and without


def export_diffusers(pipeline: TextToImage, out: str | Path, num_steps: int = 28, guidance_scale: float = 4.0) -> float:
    """Writes the folder, loads it back and draws a few pictures with both; the folder appears only if they agree.

    Everything is written and compared in float32, on the device where the pipeline lies.

    Args:
        pipeline: What to export.
        out: The folder to make.
        num_steps: Recommended to the caller in darkroom.json.
        guidance_scale: Recommended to the caller in darkroom.json.

    Returns:
        The largest difference of a pixel in [0, 1] over all pictures of the proof.

    Raises:
        ModelError: The folder exists, diffusers is not installed, the diffusion or the attention is not the
            pipeline's, the text encoders do not fit its layout or mask their padding, or the pictures differ by more
            than 1e-3.
    """
    _check_layout(pipeline)
    with _quiet(_diffusers()) as diffusers:
        return _export(diffusers, _in_float32(pipeline), Path(out), num_steps, guidance_scale)


def _export(diffusers: Any, pipeline: TextToImage, out: Path, num_steps: int, guidance_scale: float) -> float:
    clips = [encoder for encoder in pipeline.conditioner.text_encoders() if encoder.config.kind == "clip"]
    t5s = [encoder for encoder in pipeline.conditioner.text_encoders() if encoder.config.kind == "t5"]
    call = {
        "height": pipeline.image_size,
        "width": pipeline.image_size,
        "num_inference_steps": num_steps,
        "guidance_scale": guidance_scale,
        # Without a T5 the pipeline would put this many zero tokens in its place; the DiT has never seen them.
        "max_sequence_length": t5s[0].config.max_tokens if t5s else 0,
    }
    with new_folder(out) as temporary:
        theirs = diffusers.StableDiffusion3Pipeline(
            transformer=_filled(diffusers.SD3Transformer2DModel, *_state_of(pipeline.dit, dit_to_diffusers)),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=_shift(pipeline)),
            vae=_filled(diffusers.AutoencoderKL, *_state_of(pipeline.autoencoder, autoencoder_to_diffusers)),
            text_encoder=_clip_model(clips[0]),
            tokenizer=_clip_tokenizer(clips[0]),
            text_encoder_2=_clip_model(clips[1]),
            tokenizer_2=_clip_tokenizer(clips[1]),
            text_encoder_3=_t5_model(t5s[0]) if t5s else None,
            tokenizer_3=t5s[0].tokenizer if t5s else None,
        )
        theirs.save_pretrained(temporary, safe_serialization=True)
        del theirs
        # The stock pipeline asks to be told of an absent T5.
        load: dict[str, Any] = {} if t5s else {"text_encoder_3": None, "tokenizer_3": None}
        difference = prove(pipeline, temporary, load, call)
        document = {
            "load": load,
            "call": call,
            "largest_pixel_difference": difference,
            "fingerprints": {
                "autoencoder": autoencoder_fingerprint(pipeline.autoencoder),
                "text_encoders": pipeline.conditioner.fingerprint,
            },
        }
        (temporary / CALL_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return difference


@torch.no_grad()
def prove(pipeline: TextToImage, folder: Path, load: dict[str, Any], call: dict[str, Any]) -> float:
    """Loads an exported folder and compares its pictures with ours for fixed prompts and seeds.

    Args:
        pipeline: Ours, in float32.
        folder: The exported folder.
        load: Arguments of from_pretrained beside the folder.
        call: Arguments of the call.

    Returns:
        The largest difference of a pixel in [0, 1].

    Raises:
        ModelError: It exceeds 1e-3, or a picture is not finite.
    """
    theirs = _diffusers().StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **load)
    theirs.set_progress_bar_config(disable=True)
    theirs.to(pipeline.device)
    seeds = list(range(len(_PROOF_PROMPTS)))
    largest = 0.0
    for guidance_scale in _PROOF_GUIDANCE:
        arguments = {**call, "num_inference_steps": _PROOF_STEPS, "guidance_scale": guidance_scale}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        found = theirs(list(_PROOF_PROMPTS), generator=generators, output_type="pt", **arguments).images
        expected = pipeline.generate(list(_PROOF_PROMPTS), seeds, _PROOF_STEPS, guidance_scale)
        difference = float((found.float() - expected).abs().max())
        if not difference <= TOLERANCE:  # catches NaN too
            raise ModelError(
                f"the exported pipeline's pictures differ from ours by {difference:.1e} (allowed {TOLERANCE:.0e})"
                f" with guidance {guidance_scale}: nothing was written, please report this"
            )
        largest = max(largest, difference)
    return largest


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ModelError("diffusers is not installed: pip install 'darkroom[serve]'") from error
    return diffusers


@contextmanager
def _quiet(diffusers: Any) -> Iterator[Any]:
    """Keeps the libraries' remarks and progress bars away for a while: they talk of what is meant to be so."""
    import transformers

    loggings = (diffusers.utils.logging, transformers.utils.logging)
    verbosities = [logging.get_verbosity() for logging in loggings]
    for logging in loggings:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield diffusers
    finally:
        for logging, verbosity in zip(loggings, verbosities, strict=True):
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()


def _shift(pipeline: TextToImage) -> float:
    """The scheduler's one shift: that of pictures of the size that darkroom.json recommends."""
    side = pipeline.image_size // pipeline.autoencoder.config.downsampling
    return pipeline.shift(side, side)


def _check_layout(pipeline: TextToImage) -> None:
    path, prediction = pipeline.diffusion.path, pipeline.diffusion.prediction
    if (path, prediction) != ("rectified_flow", "velocity"):
        raise ModelError(
            f"the DiT was trained with path: {path} and prediction: {prediction}, but StableDiffusion3Pipeline knows"
            " rectified_flow with velocity alone; draw with `darkroom sample`, or train with those to export"
        )
    if pipeline.dit.config.attention != "joint":
        raise ModelError(
            f"the DiT has attention: {pipeline.dit.config.attention}, but StableDiffusion3Pipeline knows joint alone;"
            " draw with `darkroom sample`, or train with attention: joint to export"
        )
    if pipeline.conditioner.text_padding == "masked":
        raise ModelError(
            "the DiT was trained with text_padding: masked, but StableDiffusion3Pipeline attends to padding;"
            " draw with `darkroom sample`, or train with text_padding: attended to export"
        )
    encoders = pipeline.conditioner.text_encoders()
    kinds = [encoder.config.kind for encoder in encoders]
    if kinds not in (["clip", "clip"], ["clip", "clip", "t5"]):
        raise ModelError(
            f"the text encoders are {', '.join(kinds)}: StableDiffusion3Pipeline takes two of kind clip, then perhaps"
            " one of kind t5; train with those to export"
        )
    if kinds[-1] == "t5" and encoders[-1].width != pipeline.conditioner.text_dim:
        raise ModelError(
            f"the T5 is {encoders[-1].width} wide and both CLIPs together {pipeline.conditioner.text_dim}:"
            " StableDiffusion3Pipeline needs a T5 that is at least as wide; train with one to export"
        )


def _in_float32(pipeline: TextToImage) -> TextToImage:
    """The pipeline itself, or a copy in float32 where a part of it is not."""
    if all(tensor.dtype == torch.float32 for tensor in pipeline.parameters()):
        return pipeline
    return copy.deepcopy(pipeline).float()


def _state_of(module: Any, mapping: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return mapping(module.config, {name: tensor.cpu() for name, tensor in module.state_dict().items()})


def _filled(cls: Any, arguments: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    model = cls(**arguments)
    model.load_state_dict(state)
    return model.eval()


def _clip_model(encoder: TextEncoder) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    assert isinstance(encoder.architecture, ClipArchitecture)
    tensors = {name: tensor.cpu() for name, tensor in encoder.artifact_tensors().items()}
    arguments, state = clip_to_transformers(encoder.architecture, encoder.config.max_tokens, tensors)
    return _filled(CLIPTextModelWithProjection, {"config": CLIPTextConfig(**arguments)}, state)


def _clip_tokenizer(encoder: TextEncoder) -> Any:
    tokenizer = encoder.tokenizer
    return clip_tokenizer_to_transformers(tokenizer.encoder, tokenizer.bpe_ranks, encoder.config.max_tokens)


def _t5_model(encoder: TextEncoder) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    assert isinstance(encoder.architecture, T5Architecture)
    tensors = {name: tensor.cpu() for name, tensor in encoder.artifact_tensors().items()}
    arguments, state = t5_to_transformers(encoder.architecture, tensors)
    return _filled(T5EncoderModel, {"config": T5Config(**arguments)}, state)
