"""Frozen text towers: CLIP by open_clip and T5 by transformers, pretrained or small and seeded.

A seeded tower has random weights that are a function of its seed. It is saved with the artifact, so that serving uses
the very same one. See docs/artifact.md for the folder and `models.conditioner` for how several towers are joined.
"""

import functools
import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.artifact import (
    artifact_fingerprint,
    config_from_dict,
    config_to_dict,
    load_artifact,
    load_weights,
    save_artifact,
)
from models.errors import ModelError
from models.t5_vocabulary import unigram_pieces
from models.text_config import CLIP_VOCAB_SIZE, ClipArchitecture, T5Architecture, TextEncoderConfig
from models.weights import check_sha256, read_weights, seeded_tensors

_KIND = "text_encoder"
_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


class TextEncoder(nn.Module):
    """A frozen text tower with its tokenizer; see `build_text_encoder`.

    Attributes:
        config: What it was made from.
        architecture: The tower's sizes.
        tower: The library's module.
        tokenizer: The library's tokenizer.
        files: The tokenizer's files as they are saved, empty for CLIP.
        width: D, width of a token's features.
        pooled_dim: P, 0 for T5.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        architecture: ClipArchitecture | T5Architecture,
        tower: nn.Module,
        tokenizer: Any,
        files: dict[str, bytes],
    ) -> None:
        super().__init__()
        self.config, self.architecture, self.files = config, architecture, files
        self.tower, self.tokenizer = tower, tokenizer
        if isinstance(architecture, ClipArchitecture):
            self.width, self.pooled_dim = architecture.width, architecture.embed_dim
        else:
            self.width, self.pooled_dim = architecture.d_model, 0
        self.to(getattr(torch, config.dtype)).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stays in evaluation mode: the tower is frozen."""
        return super().train(False)

    def tokenize(self, captions: list[str]) -> Tensor:
        """captions to token ids (B, L) int64 on the CPU, cut and padded to max_tokens."""
        length = self.config.max_tokens
        if self.config.kind == "clip":
            return self.tokenizer(captions, context_length=length)
        encoded = self.tokenizer(captions, padding="max_length", max_length=length, truncation=True)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids (B, L) to per-token features (B, L, D), mask (B, L) True = keep, pooled (B, P) or None.

        CLIP gives the input of its last layer ("penultimate", as SD3 does, arXiv:2403.03206, appendix B.3) and the
        projection at the end token. T5 gives its output; no token is hidden from its attention, as in SD3.
        """
        if self.config.kind == "clip":
            return self._forward_clip(ids)
        features = self.tower(input_ids=ids).last_hidden_state.float()
        return features, ids != self.tokenizer.pad_token_id, None

    def _forward_clip(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tower: Any = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]  # (B, L, D)
        hidden_future = tower.attn_mask[: ids.shape[1], : ids.shape[1]]
        *first, last = tower.transformer.resblocks
        for block in first:
            x = block(x, attn_mask=hidden_future)
        end = ids.argmax(dim=1)  # the end token has the highest id; the first one where it repeats
        at_end = last(x, attn_mask=hidden_future)[torch.arange(len(ids), device=ids.device), end]  # (B, D)
        pooled = tower.ln_final(at_end) @ tower.text_projection  # (B, P)
        keep = torch.arange(ids.shape[1], device=ids.device) <= end[:, None]
        return x.float(), keep, pooled.float()

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """captions to per-token features (B, L, D) float32, mask (B, L) True = keep, pooled (B, P) or None."""
        return self(self.tokenize(captions).to(next(self.tower.parameters()).device))

    def artifact_config(self) -> dict[str, Any]:
        """What identifies the encoder: how it is trained with (dropout) and where it came from are not part of it."""
        config = config_to_dict(self.config)
        identity = {field: config[field] for field in ("name", "kind", "max_tokens", "dtype")}
        return {**identity, "architecture": asdict(self.architecture)}

    def artifact_tensors(self) -> dict[str, Tensor]:
        """The tower's weights by the library's names, each once."""
        return {name: value for name, value in self.tower.state_dict().items() if name != _T5_ALIAS}

    def fingerprint(self) -> str:
        """What `save` would return."""
        return artifact_fingerprint(_KIND, self.artifact_config(), self.artifact_tensors(), files=self.files)

    def save(self, folder: str | Path) -> str:
        """Writes an artifact of kind "text_encoder"; returns its fingerprint."""
        return save_artifact(folder, _KIND, self.artifact_config(), self.artifact_tensors(), files=self.files)


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """Makes the encoder that a configuration describes.

    Raises:
        ModelError: The pretrained model is unknown, cannot be had, is damaged, or is not a plain CLIP or T5.
    """
    if config.pretrained is not None and (Path(config.pretrained) / "config.json").is_file():
        stored = json.loads((Path(config.pretrained) / "config.json").read_text(encoding="utf-8"))
        if stored.get("kind") == _KIND:
            return load_text_encoder(config.pretrained, config)
    if config.kind == "clip":
        if config.pretrained is None:
            architecture, tensors = _seeded_clip(config)
        else:
            architecture, tensors = _pretrained_clip(config)
        return _clip_encoder(config, architecture, tensors)
    if config.pretrained is None:
        return _seeded_t5(config)
    return _pretrained_t5(config)


def load_text_encoder(folder: str | Path, config: TextEncoderConfig | None = None) -> TextEncoder:
    """Reads an artifact of kind "text_encoder".

    Args:
        folder: The artifact.
        config: What the recipe asks for, to be checked against the artifact; None takes the artifact's word.

    Raises:
        ModelError: The artifact is missing, damaged, or not what config asks for.
    """
    artifact = load_artifact(folder, _KIND)
    stored = dict(artifact.config)
    architecture = stored.pop("architecture", {})
    if config is None:
        config = config_from_dict(TextEncoderConfig, {**stored, "pretrained": str(folder)}, str(folder))
    for field, value in stored.items():
        if getattr(config, field, None) != value:
            raise ModelError(
                f"{folder}: {field} is {value!r}, the recipe says {getattr(config, field, None)!r}: make them equal"
            )
    if config.sha256 is not None:
        check_sha256([Path(folder) / "model.safetensors"], config.sha256, str(folder))
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
        return json.loads(path.read_text(encoding="utf-8"))["model_cfg"], folder / _OPEN_CLIP_WEIGHTS
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
        raise ModelError(
            f"{pretrained!r} was trained with the other GELU: use {model}-quickgelu, or without the suffix"
        )
    try:
        return model_config, Path(download_pretrained(known))
    except Exception as error:
        raise ModelError(f"{pretrained!r} cannot be fetched ({type(error).__name__}): give a local folder") from error


# T5

_T5_ALIAS = "encoder.embed_tokens.weight"  # a second name of shared.weight


def _t5_encoder(
    config: TextEncoderConfig, architecture: T5Architecture, tensors: dict[str, Tensor], files: dict[str, bytes]
) -> TextEncoder:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    with torch.device("meta"):
        tower = T5EncoderModel(T5Config(**asdict(architecture), dropout_rate=0.0, use_cache=False))
    tower.to_empty(device="cpu")
    tower.encoder.embed_tokens = tower.shared
    load_weights(tower, {**tensors, _T5_ALIAS: tensors["shared.weight"]}, f"text encoder {config.name!r}")
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
    del shapes[_T5_ALIAS]
    return _t5_encoder(config, architecture, seeded_tensors(shapes, config.seed, std_of), _tokenizer_files(tokenizer))


def _pretrained_t5(config: TextEncoderConfig) -> TextEncoder:
    from transformers import T5Config, T5Tokenizer

    assert config.pretrained is not None
    folder = _find_t5(config.pretrained)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder} holds no *.safetensors: convert the weights to safetensors first")
    library = T5Config.from_pretrained(folder, local_files_only=True)
    if library.model_type != "t5":
        raise ModelError(f"{config.pretrained} is a {library.model_type!r}: give a T5")
    fields = {name: getattr(library, name) for name in T5Architecture.__dataclass_fields__}
    tensors = {
        name: tensor
        for name, tensor in read_weights(weights, config.sha256).items()
        if name.startswith(("shared.", "encoder.")) and name != _T5_ALIAS
    }
    tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
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
