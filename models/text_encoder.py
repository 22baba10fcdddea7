"""Frozen text towers: CLIP by open_clip and T5 by transformers, pretrained or small and seeded.

A seeded tower has random weights that are a function of its seed. It is saved with the artifact, so that serving uses
the very same one. See docs/artifact.md for the folder and `models.conditioner` for how several towers are joined.
"""

import functools
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from models.artifact import (
    WEIGHTS_NAME,
    artifact_fingerprint,
    config_from_dict,
    is_artifact,
    load_artifact,
    load_weights,
    new_folder,
    read_document,
    write_artifact,
)
from models.conditioner import JointEncoders, TextPadding
from models.conditioner import TextCondition as TextCondition  # for those who use the conditioner
from models.errors import ModelError
from models.t5_vocabulary import unigram_pieces
from models.text_config import CLIP_VOCAB_SIZE, ClipArchitecture, T5Architecture, TextEncoderConfig
from models.text_tower import KIND, T5_ALIAS, TextEncoder
from models.weights import check_sha256, read_weights, seeded_tensors

_KIND_OF_ALL = "text_encoders"
_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


class Conditioner(JointEncoders):
    """All text encoders of a model: captions to a `TextCondition`. See `models.conditioner` for the layout.

    Args:
        configs: One or more of kind "clip", all with the same max_tokens, then at most one of kind "t5".
        text_padding: Whether padding is "attended" to or "masked".

    Raises:
        ModelError: An encoder cannot be built, or they do not go together.
    """

    def __init__(self, configs: Sequence[TextEncoderConfig], text_padding: TextPadding = "attended") -> None:
        super().__init__([build_text_encoder(config) for config in configs], text_padding)
        self.configs = tuple(configs)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Label to fingerprint of every encoder."""
        return {encoder.config.name: encoder.fingerprint for encoder in self.text_encoders()}

    @property
    def fingerprint(self) -> str:
        """What `save` returns: of all encoders, their order, and whether their padding is masked."""
        return artifact_fingerprint(_KIND_OF_ALL, self._artifact_config(), {}, self.fingerprints)

    def _artifact_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"encoders": self.names}
        return config if self.text_padding == "attended" else {**config, "text_padding": self.text_padding}

    def save(self, folder: str | Path) -> str:
        """Writes a folder with one artifact per encoder and their order; returns its fingerprint.

        Raises:
            ModelError: The folder exists.
        """
        with new_folder(folder) as temporary:
            fingerprint = write_artifact(temporary, _KIND_OF_ALL, self._artifact_config(), {}, self.fingerprints)
            for encoder in self.text_encoders():
                encoder.save(temporary / encoder.config.name)
        return fingerprint

    @classmethod
    def load(cls, folder: str | Path) -> "Conditioner":
        """Reads what `save` wrote.

        Raises:
            ModelError: An encoder is missing, damaged, or not the one that was saved.
        """
        artifact = load_artifact(folder, _KIND_OF_ALL)
        folders = {name: Path(folder) / name for name in artifact.config["encoders"]}
        text_padding = artifact.config.get("text_padding", "attended")
        if text_padding not in get_args(TextPadding):
            raise ModelError(f"{folder}: text_padding {text_padding!r} is not known: update darkroom")
        conditioner = cls([stored_config(path) for path in folders.values()], text_padding)
        for name, path in folders.items():
            if conditioner.fingerprints[name] != artifact.fingerprints[name]:
                raise ModelError(f"{path} is another encoder than the one that was saved: copy the folder again")
        return conditioner


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """Makes the encoder that a configuration describes.

    Raises:
        ModelError: The pretrained model is unknown, cannot be had, is damaged, or is not a plain CLIP or T5.
    """
    if config.pretrained is not None and is_artifact(config.pretrained):
        return _load_text_encoder(Path(config.pretrained), config)
    if config.kind == "clip":
        if config.pretrained is None:
            architecture, tensors = _seeded_clip(config)
        else:
            architecture, tensors = _pretrained_clip(config)
        return _clip_encoder(config, architecture, tensors)
    if config.pretrained is None:
        return _seeded_t5(config)
    return _pretrained_t5(config)


def stored_config(folder: str | Path) -> TextEncoderConfig:
    """The configuration that builds the encoder in an artifact folder.

    Raises:
        ModelError: The folder is no artifact of a text encoder.
    """
    document = read_document(Path(folder), KIND)
    identity = {name: value for name, value in document["config"].items() if name != "architecture"}
    return config_from_dict(TextEncoderConfig, {**identity, "pretrained": str(folder)}, str(folder))


def _load_text_encoder(folder: Path, config: TextEncoderConfig) -> TextEncoder:
    """Reads an artifact of kind "text_encoder" and checks it against what the recipe asks for."""
    artifact = load_artifact(folder, KIND)
    stored = dict(artifact.config)
    architecture = stored.pop("architecture", {})
    for field, value in stored.items():
        if getattr(config, field, None) != value:
            raise ModelError(
                f"{folder}: {field} is {value!r}, the recipe says {getattr(config, field, None)!r}: make them equal"
            )
    if config.sha256 is not None:
        check_sha256([folder / WEIGHTS_NAME], config.sha256, str(folder))
    if config.kind == "clip":
        clip = config_from_dict(ClipArchitecture, architecture, str(folder))
        return _clip_encoder(config, clip, artifact.tensors)
    t5 = config_from_dict(T5Architecture, architecture, str(folder))
    return _t5_encoder(config, t5, artifact.tensors, artifact.files)


# CLIP


@functools.lru_cache(maxsize=1)
def clip_tokenizer() -> Any:
    """open_clip's tokenizer, with the byte-pair vocabulary that it ships."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _clip_tower(architecture: ClipArchitecture, max_tokens: int) -> nn.Module:
    """An empty tower on the CPU."""
    from open_clip.transformer import QuickGELU, TextTransformer

    with torch.device("meta"):  # draws nothing from the global random state
        tower = TextTransformer(
            context_length=max_tokens,
            vocab_size=CLIP_VOCAB_SIZE,
            width=architecture.width,
            heads=architecture.heads,
            layers=architecture.layers,
            mlp_ratio=architecture.mlp_ratio,
            output_dim=architecture.embed_dim,
            act_layer=QuickGELU if architecture.quick_gelu else nn.GELU,
        )
    tower.to_empty(device="cpu")
    tower.attn_mask = tower.build_causal_mask()
    return tower


def _clip_encoder(config: TextEncoderConfig, architecture: ClipArchitecture, tensors: dict[str, Tensor]) -> TextEncoder:
    tower = _clip_tower(architecture, config.max_tokens)
    load_weights(tower, tensors, f"text encoder {config.name!r}")
    return TextEncoder(config, architecture, tower, clip_tokenizer(), {})


def _seeded_clip(config: TextEncoderConfig) -> tuple[ClipArchitecture, dict[str, Tensor]]:
    assert config.width and config.layers and config.heads and config.embed_dim and config.seed is not None
    architecture = ClipArchitecture(
        width=config.width, layers=config.layers, heads=config.heads, embed_dim=config.embed_dim
    )
    layer_std = (2 * config.layers) ** -0.5  # of what a layer adds to the residual stream

    def std_of(name: str, tensor: Tensor) -> float:
        # Tokens and positions at unit scale, unlike a CLIP before training: nothing will grow them later, and
        # the transformer that reads them expects features of about unit variance.
        if name in ("token_embedding.weight", "positional_embedding"):
            return 1.0
        if name == "text_projection":
            return tensor.shape[0] ** -0.5
        fan_in = tensor.shape[1] ** -0.5
        return fan_in * layer_std if name.endswith(("out_proj.weight", "c_proj.weight")) else fan_in

    shapes = _clip_tower(architecture, config.max_tokens).state_dict()
    return architecture, seeded_tensors(shapes, config.seed, std_of)


def _pretrained_clip(config: TextEncoderConfig) -> tuple[ClipArchitecture, dict[str, Tensor]]:
    assert config.pretrained is not None
    model_config, weights = _find_clip(config.pretrained)
    text = dict(model_config["text_cfg"])
    plain = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    if set(text) - plain or text.get("vocab_size", CLIP_VOCAB_SIZE) != CLIP_VOCAB_SIZE:
        odd = min(set(text) - plain, default="vocab_size")
        raise ModelError(f"{config.pretrained}: its text tower sets {odd!r}: choose a plain CLIP (e.g. ViT-L-14)")
    architecture = ClipArchitecture(
        width=text.get("width", 512),
        layers=text.get("layers", 12),
        heads=text.get("heads", 8),
        embed_dim=model_config["embed_dim"],
        mlp_ratio=text.get("mlp_ratio", 4.0),
        quick_gelu=model_config.get("quick_gelu", False),
    )
    tensors = read_weights([weights], config.sha256)
    tensors = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
    tensors = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(("visual.", "logit_", "attn_mask"))
    }
    positions = tensors.get("positional_embedding")
    if positions is not None:
        if len(positions) < config.max_tokens:
            raise ModelError(f"{config.pretrained} reads {len(positions)} tokens: lower max_tokens to that")
        # Attention is causal, so a shorter context changes nothing before it.
        tensors["positional_embedding"] = positions[: config.max_tokens].clone()
    return architecture, tensors


def _find_clip(pretrained: str) -> tuple[dict[str, Any], Path]:
    """open_clip's model configuration and the file of the weights."""
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    folder = Path(pretrained)
    if folder.is_dir():
        path = folder / _OPEN_CLIP_CONFIG
        if not path.is_file():
            raise ModelError(f"{path} is missing: give a folder with {_OPEN_CLIP_CONFIG} and {_OPEN_CLIP_WEIGHTS}")
        try:
            return json.loads(path.read_text(encoding="utf-8"))["model_cfg"], folder / _OPEN_CLIP_WEIGHTS
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is no open_clip configuration: copy the folder again") from error
    model, _, tag = pretrained.partition(":")
    model_config = open_clip.get_model_config(model)
    if model_config is None or not tag:
        raise ModelError(f"{pretrained!r} is neither a folder nor open_clip's MODEL:TAG or MODEL:FILE.safetensors")
    if tag.endswith(".safetensors"):
        return model_config, Path(tag)
    known = get_pretrained_cfg(model, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ModelError(f"{pretrained!r}: open_clip knows no tag {tag!r} of {model} (it knows: {tags})")
    if bool(known.get("quick_gelu")) != bool(model_config.get("quick_gelu")):
        raise ModelError(f"{pretrained!r} was trained with the other GELU: choose {model} with(out) -quickgelu")
    try:
        return model_config, Path(download_pretrained(known))
    except Exception as error:
        raise ModelError(f"{pretrained!r} cannot be fetched ({type(error).__name__}): give a local folder") from error


# T5


def _t5_encoder(
    config: TextEncoderConfig, architecture: T5Architecture, tensors: dict[str, Tensor], files: dict[str, bytes]
) -> TextEncoder:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    with torch.device("meta"):
        tower = T5EncoderModel(T5Config(**asdict(architecture), dropout_rate=0.0, use_cache=False))
    tower.to_empty(device="cpu")
    tower.encoder.embed_tokens = tower.shared
    load_weights(tower, {**tensors, T5_ALIAS: tensors["shared.weight"]}, f"text encoder {config.name!r}")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) > architecture.vocab_size:
        raise ModelError(
            f"text encoder {config.name!r}: its tokenizer has {len(tokenizer)} pieces, its embedding"
            f" {architecture.vocab_size}: they do not belong together"
        )
    return TextEncoder(config, architecture, tower, tokenizer, files)


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # Names apart from those of the artifact's own files.
        return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*token*.json"))}


def _seeded_t5(config: TextEncoderConfig) -> TextEncoder:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    assert config.width and config.layers and config.heads and config.vocab_size and config.seed is not None
    ranked = sorted(clip_tokenizer().encoder.items(), key=lambda item: item[1])  # most frequent merges first
    words = [piece.removesuffix("</w>") for piece, _ in ranked if re.fullmatch(r"[a-z]+</w>", piece)]
    tokenizer = T5Tokenizer(vocab=unigram_pieces(words, config.vocab_size), extra_ids=0)
    architecture = T5Architecture(
        vocab_size=config.vocab_size,
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=2 * config.width,
        num_layers=config.layers,
        num_heads=config.heads,
    )

    def std_of(name: str, tensor: Tensor) -> float:
        # Mesh-TensorFlow's initialisation: no scale in the attention, so the queries carry it.
        if name == "shared.weight":
            return 1.0
        if name.endswith("relative_attention_bias.weight"):
            return 1.0  # larger than usual: this is all that a frozen tower will ever know of order
        fan_in = tensor.shape[1] ** -0.5
        return fan_in * architecture.d_kv**-0.5 if name.endswith(".q.weight") else fan_in

    with torch.device("meta"):
        shapes = T5EncoderModel(T5Config(**asdict(architecture))).state_dict()
    del shapes[T5_ALIAS]
    return _t5_encoder(config, architecture, seeded_tensors(shapes, config.seed, std_of), _tokenizer_files(tokenizer))


def _pretrained_t5(config: TextEncoderConfig) -> TextEncoder:
    from transformers import T5Config, T5Tokenizer

    assert config.pretrained is not None
    folder = _find_t5(config.pretrained)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder} holds no *.safetensors: convert the weights to safetensors first")
    try:
        library = T5Config.from_pretrained(folder, local_files_only=True)
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers trips over in a folder that was copied in part
        raise ModelError(
            f"{folder} holds no readable T5 configuration and tokenizer ({type(error).__name__}): copy the folder again"
        ) from error
    if library.model_type != "t5":
        raise ModelError(f"{config.pretrained} is a {library.model_type!r}: give a T5")
    fields = {name: getattr(library, name) for name in T5Architecture.__dataclass_fields__}
    tensors = {
        name: tensor
        for name, tensor in read_weights(weights, config.sha256).items()
        if name.startswith(("shared.", "encoder.")) and name != T5_ALIAS
    }
    return _t5_encoder(config, T5Architecture(**fields), tensors, _tokenizer_files(tokenizer))


def _find_t5(pretrained: str) -> Path:
    if Path(pretrained).is_dir():
        return Path(pretrained)
    from huggingface_hub import snapshot_download

    name, _, revision = pretrained.partition("@")
    try:
        patterns = ["*.safetensors", "*.json", "spiece.model"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"{pretrained!r} is no folder and cannot be fetched from the hub ({type(error).__name__}):"
            " give a local folder, or NAME@REVISION"
        ) from error
