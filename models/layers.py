"""The small parts of a transformer block: norms, modulation, MLP and attention between heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of every norm in the DiT (SD3, arXiv:2403.03206)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then a scale and a shift from the condition (adaLN; Peebles & Xie 2023, sec. 3.2).

    Args:
        x: (B, N, D).
        shift: (B, 1, D).
        scale: (B, 1, D); 0 leaves the normalised value as it is.

    Returns:
        (B, N, D) in x's dtype.
    """
    # Autocast would lift the norm's input and output to float32, three passes over memory; the kernel already keeps
    # its statistics in float32 whatever comes in.
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), scale + 1)


class HeadNorm(nn.Module):
    """RMS norm of several kinds of heads at once, each kind with its own weight (queries and keys together).

    Args:
        kinds: K, how many kinds: 2 for (queries, keys), 1 for keys alone.
        head_dim: d, the width of one head.
    """

    def __init__(self, kinds: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(kinds, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, N, K, heads, d) over d; returns the same shape and dtype."""
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS) * self.weight[:, None].to(x.dtype)


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        in_features: Width that comes in.
        hidden_features: Width between the layers.
        out_features: Width that goes out.
        activation: "silu" (embeddings) or "gelu_tanh" (blocks).
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int, activation: str):
        super().__init__()
        self.inner = nn.Linear(in_features, hidden_features)
        self.outer = nn.Linear(hidden_features, out_features)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        hidden = self.inner(x)
        hidden = F.silu(hidden) if self.activation == "silu" else F.gelu(hidden, approximate="tanh")
        return self.outer(hidden)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention with the heads kept beside the tokens.

    Args:
        q: (B, N, heads, d).
        k: (B, S, heads, d).
        v: (B, S, heads, d).
        mask: (B, 1, 1, S) bool, True = may be attended to; None = everything may.

    Returns:
        (B, N, heads * d).
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)
