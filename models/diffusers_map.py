"""Names and layouts of our tensors in the diffusers and transformers libraries: pure renaming, splitting, folding."""

from typing import Any

import torch
from torch import Tensor

from models.dit import DiTConfig
from models.embeddings import GridPositions

Tensors = dict[str, Tensor]


def _copy_linear(out: Tensors, theirs: str, tensors: Tensors, ours: str) -> None:
    """Rename the weight and the bias of a linear layer."""
    for kind in ("weight", "bias"):
        out[f"{theirs}.{kind}"] = tensors[f"{ours}.{kind}"]


def _split_linear(out: Tensors, theirs: list[str], tensors: Tensors, ours: str) -> None:
    """Deal the rows of a fused linear layer to several of theirs, in equal shares."""
    for kind in ("weight", "bias"):
        for name, part in zip(theirs, tensors[f"{ours}.{kind}"].chunk(len(theirs)), strict=True):
            out[f"{name}.{kind}"] = part.contiguous()


def _scale_first(tensors: Tensors, ours: str, chunks: slice, num_chunks: int) -> Tensors:
    """Rows of a modulation whose (shift, scale) they keep as (scale, shift)."""
    rows = {}
    for kind in ("weight", "bias"):
        shift, scale = tensors[f"{ours}.{kind}"].chunk(num_chunks)[chunks]
        rows[kind] = torch.cat((scale, shift))
    return rows


def _dit_block(out: Tensors, theirs: str, tensors: Tensors, ours: str, last: bool) -> None:
    """One joint block of the DiT."""
    num_chunks = 8 if last else 12
    for kind in ("weight", "bias"):
        modulation = tensors[f"{ours}.modulation.{kind}"].chunk(num_chunks)
        out[f"{theirs}.norm1.linear.{kind}"] = torch.cat(modulation[:6])
        if not last:
            out[f"{theirs}.norm1_context.linear.{kind}"] = torch.cat(modulation[6:])
    attn = f"{theirs}.attn"
    _split_linear(out, [f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"], tensors, f"{ours}.image.qkv")
    out[f"{attn}.norm_q.weight"], out[f"{attn}.norm_k.weight"] = tensors[f"{ours}.image.head_norm.weight"].unbind(0)
    _copy_linear(out, f"{attn}.to_out.0", tensors, f"{ours}.image.out")
    _copy_linear(out, f"{theirs}.ff.net.0.proj", tensors, f"{ours}.image.mlp.inner")
    _copy_linear(out, f"{theirs}.ff.net.2", tensors, f"{ours}.image.mlp.outer")
    text_names = [f"{attn}.add_q_proj", f"{attn}.add_k_proj", f"{attn}.add_v_proj"]
    text_norms = tensors[f"{ours}.text.head_norm.weight"]
    if last:
        for kind, rows in _scale_first(tensors, f"{ours}.modulation", slice(6, 8), num_chunks).items():
            out[f"{theirs}.norm1_context.linear.{kind}"] = rows
        _split_linear(out, text_names[1:], tensors, f"{ours}.text.qkv")
        out[f"{attn}.norm_added_k.weight"] = text_norms[0]
        # Theirs also computes the last block's text queries and throws their result away: any weights will do.
        for kind in ("weight", "bias"):
            out[f"{attn}.add_q_proj.{kind}"] = torch.zeros_like(out[f"{attn}.add_k_proj.{kind}"])
        out[f"{attn}.norm_added_q.weight"] = torch.ones_like(text_norms[0])
    else:
        _split_linear(out, text_names, tensors, f"{ours}.text.qkv")
        out[f"{attn}.norm_added_q.weight"], out[f"{attn}.norm_added_k.weight"] = text_norms.unbind(0)
        _copy_linear(out, f"{attn}.to_add_out", tensors, f"{ours}.text.out")
        _copy_linear(out, f"{theirs}.ff_context.net.0.proj", tensors, f"{ours}.text.mlp.inner")
        _copy_linear(out, f"{theirs}.ff_context.net.2", tensors, f"{ours}.text.mlp.outer")


def dit_to_diffusers(config: DiTConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """A DiT as diffusers' SD3Transformer2DModel.

    Args:
        config: The DiT's sizes.
        tensors: The DiT's state, by its own names.

    Returns:
        The arguments of SD3Transformer2DModel, and its state by its names (positions included).
    """
    C, p, D = config.latent_channels, config.patch_size, config.width
    base_grid = config.base_grid or config.max_grid
    arguments = {
        "sample_size": base_grid * p,
        "patch_size": p,
        "in_channels": C,
        "out_channels": C,
        "num_layers": config.depth,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.text_dim,
        "caption_projection_dim": D,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.max_grid,
        "qk_norm": "rms_norm",
    }
    out: Tensors = {}
    positions = GridPositions(D, config.max_grid, base_grid)
    out["pos_embed.pos_embed"] = positions(config.max_grid, config.max_grid)[None]
    out["pos_embed.proj.weight"] = tensors["patch_in.weight"].reshape(D, C, p, p)
    out["pos_embed.proj.bias"] = tensors["patch_in.bias"]
    _copy_linear(out, "context_embedder", tensors, "text_in")
    for ours, theirs in (("time_mlp", "timestep_embedder"), ("pooled_mlp", "text_embedder")):
        _copy_linear(out, f"time_text_embed.{theirs}.linear_1", tensors, f"{ours}.inner")
        _copy_linear(out, f"time_text_embed.{theirs}.linear_2", tensors, f"{ours}.outer")
    for i in range(config.depth):
        _dit_block(out, f"transformer_blocks.{i}", tensors, f"blocks.{i}", last=i == config.depth - 1)
    for kind, rows in _scale_first(tensors, "final_modulation", slice(0, 2), 2).items():
        out[f"norm_out.linear.{kind}"] = rows
    # Within a patch we keep the channel slowest, as a convolution does; their last layer keeps it fastest.
    weight, bias = tensors["patch_out.weight"], tensors["patch_out.bias"]
    out["proj_out.weight"] = weight.reshape(C, p, p, D).permute(1, 2, 0, 3).reshape(p * p * C, D)
    out["proj_out.bias"] = bias.reshape(C, p, p).permute(1, 2, 0).reshape(p * p * C)
    return arguments, {name: tensor.contiguous() for name, tensor in out.items()}
