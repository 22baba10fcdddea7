"""Configurations of the text encoders, without the libraries that run them."""

import re
from dataclasses import dataclass
from typing import Literal

CLIP_VOCAB_SIZE = 49408  # of the byte-pair vocabulary that open_clip ships
CLIP_END_ID = 49407
CLIP_PAD_ID = 0  # what open_clip pads with
CLIP_MAX_TOKENS = 77  # positions of every published CLIP text tower


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """One text encoder. Give `pretrained`, or `seed` with the sizes of a small one."""

    name: str  # label, also the folder in the artifact
    kind: Literal["clip", "t5"]
    max_tokens: int  # L, tokens per caption with the special ones; longer captions are cut
    dropout: float = 0.0  # probability in [0, 1] that training replaces a caption by "" for this encoder
    dtype: Literal["float32", "bfloat16"] = "float32"  # of its weights; what it returns is always float32
    pretrained: str | None = None  # clip: "MODEL:TAG", "MODEL:FILE.safetensors" or a folder; t5: a folder or hub name
    sha256: str | None = None  # of the pretrained weights, see docs/artifact.md; None = not checked
    seed: int | None = None  # of the weights of a small random tower
    width: int | None = None  # D; this and the following only with seed
    layers: int | None = None
    heads: int | None = None
    embed_dim: int | None = None  # P, width of the pooled vector; clip only
    vocab_size: int | None = None  # pieces in the vocabulary; t5 only

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ValueError(f"name is {self.name!r}: use letters, digits, '_' and '-', as it names a folder")
        if self.max_tokens < 2 or (self.kind == "clip" and self.max_tokens > CLIP_MAX_TOKENS):
            raise ValueError(f"max_tokens is {self.max_tokens}: give 2 to {CLIP_MAX_TOKENS} (t5: at least 2)")
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout is {self.dropout}: give a probability from 0 to 1")
        if (self.pretrained is None) == (self.seed is None):
            raise ValueError(f"text encoder {self.name!r}: give either pretrained or seed")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give at least 0")
        if self.sha256 is not None and (self.pretrained is None or not re.fullmatch(r"[0-9a-f]{64}", self.sha256)):
            raise ValueError(f"sha256 is {self.sha256!r}: give 64 lower-case hexadecimal digits, beside pretrained")
        own, other = ("embed_dim", "vocab_size") if self.kind == "clip" else ("vocab_size", "embed_dim")
        for field in ("width", "layers", "heads", own):
            value = getattr(self, field)
            if (value is None) != (self.seed is None):
                remedy = "leave it out, the pretrained model says it" if self.seed is None else "a seeded one needs it"
                raise ValueError(f"{field} is {value} in text encoder {self.name!r}: {remedy}")
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}: give at least 1")
        if getattr(self, other) is not None:
            raise ValueError(f"{other} is {getattr(self, other)}: leave it out, kind {self.kind!r} has none")
        if self.width is not None and self.heads is not None and self.width % self.heads:
            raise ValueError(f"heads is {self.heads}, which does not divide width {self.width}: give a divisor")


@dataclass(frozen=True, kw_only=True)
class ClipArchitecture:
    """Sizes of a CLIP text tower (arXiv:2103.00020, section 2.4)."""

    width: int
    layers: int
    heads: int
    embed_dim: int
    mlp_ratio: float = 4.0  # hidden width of the MLPs over width
    quick_gelu: bool = False  # x·sigmoid(1.702 x) instead of GELU


@dataclass(frozen=True, kw_only=True)
class T5Architecture:
    """Sizes of a T5 encoder, by the names of transformers' T5Config (arXiv:1910.10683)."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    feed_forward_proj: str = "gated-gelu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
