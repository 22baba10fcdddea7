"""A frozen text tower with its tokenizer, whichever library they come from."""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.artifact import artifact_fingerprint, config_to_dict, save_artifact
from models.text_config import ClipArchitecture, T5Architecture, TextEncoderConfig

KIND = "text_encoder"  # of the artifact
T5_ALIAS = "encoder.embed_tokens.weight"  # a second name of shared.weight


class TextEncoder(nn.Module):
    """A frozen text tower with its tokenizer; see `models.text_encoder.build_text_encoder`.

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
    def forward(self, ids: Tensor, masked: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids (B, L) to per-token features (B, L, D), mask (B, L) True = keep, pooled (B, P) or None.

        CLIP gives the input of its last layer ("penultimate", as SD3 does, arXiv:2403.03206, appendix B.3) and the
        projection at the end token. T5 gives its output; as in SD3, no token is hidden from its attention unless
        `masked`. Then padding is, and its features are zero. (A CLIP's attention is causal: padding comes too late.)
        """
        mask, pooled = self._mask(ids), None
        if self.config.kind == "clip":
            features, pooled = self._forward_clip(ids)
        else:
            hidden = self.tower(input_ids=ids, **({"attention_mask": self._hiding(mask)} if masked else {}))
            features = hidden.last_hidden_state.float()
        if masked:
            features = features.masked_fill(~mask[:, :, None], 0.0)
        return features, mask, pooled

    def _hiding(self, mask: Tensor) -> Tensor:
        """What is added to a T5's attention scores, (B, 1, 1, L).

        Of a mask (B, L) transformers itself would make the same, but only after it has waited for the device to say
        whether anything is hidden at all.
        """
        dtype = next(self.tower.parameters()).dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[
            :, None, None
        ]

    def _forward_clip(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        tower: Any = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]  # (B, L, D)
        hidden_future = tower.attn_mask[: ids.shape[1], : ids.shape[1]]
        *first, last = tower.transformer.resblocks
        for block in first:
            x = block(x, attn_mask=hidden_future)
        at_end = last(x, attn_mask=hidden_future)[torch.arange(len(ids), device=ids.device), _end(ids)]  # (B, D)
        pooled = tower.ln_final(at_end) @ tower.text_projection  # (B, P)
        return x.float(), pooled.float()

    def encode(self, captions: list[str], masked: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """captions to per-token features (B, L, D) float32, mask (B, L) True = keep, pooled (B, P) or None.

        The mask lies on the CPU, where the captions are: its lengths cost no host sync.
        """
        ids = self.tokenize(captions)
        features, _, pooled = self(ids.to(next(self.tower.parameters()).device, non_blocking=True), masked)
        return features, self._mask(ids), pooled

    def _mask(self, ids: Tensor) -> Tensor:
        """(B, L) bool on the ids' device, True = a token of the caption."""
        if self.config.kind == "t5":
            return ids != self.tokenizer.pad_token_id
        return torch.arange(ids.shape[1], device=ids.device) <= _end(ids)[:, None]

    def artifact_config(self) -> dict[str, Any]:
        """What identifies the encoder: how it is trained with (dropout) and where it came from are not part of it."""
        config = config_to_dict(self.config)
        identity = {field: config[field] for field in ("name", "kind", "max_tokens", "dtype")}
        return {**identity, "architecture": asdict(self.architecture)}

    def artifact_tensors(self) -> dict[str, Tensor]:
        """The tower's weights by the library's names, each once."""
        return {name: value for name, value in self.tower.state_dict().items() if name != T5_ALIAS}

    @cached_property
    def fingerprint(self) -> str:
        """What `save` would return."""
        return artifact_fingerprint(KIND, self.artifact_config(), self.artifact_tensors(), files=self.files)

    def save(self, folder: str | Path) -> str:
        """Writes an artifact of kind "text_encoder"; returns its fingerprint."""
        return save_artifact(folder, KIND, self.artifact_config(), self.artifact_tensors(), files=self.files)


def _end(ids: Tensor) -> Tensor:
    """Where CLIP's end token stands, (B,): it has the highest id; the first one where it repeats."""
    return ids.argmax(dim=1)
