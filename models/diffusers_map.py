"""Names and layouts of our tensors in the diffusers and transformers libraries: pure renaming, splitting, folding."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from models.autoencoder import AutoencoderConfig
from models.dit import DiTConfig
from models.embeddings import GridPositions
from models.text_config import CLIP_END_ID, CLIP_PAD_ID, CLIP_VOCAB_SIZE, ClipArchitecture, T5Architecture
from models.text_tower import T5_ALIAS

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


_RES_BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "conv_shortcut"}


def _res_block(out: Tensors, theirs: str, tensors: Tensors, ours: str) -> None:
    """One residual block of the autoencoder, with its skip where it has one."""
    for name, their_name in _RES_BLOCK.items():
        if f"{ours}.{name}.weight" in tensors:
            _copy_linear(out, f"{theirs}.{their_name}", tensors, f"{ours}.{name}")


def _autoencoder_half(out: Tensors, half: str, tensors: Tensors, config: AutoencoderConfig) -> None:
    """The encoder or the decoder of the autoencoder."""
    blocks, steps = ("down_blocks", "downsamplers") if half == "encoder" else ("up_blocks", "upsamplers")
    for name, theirs in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
        _copy_linear(out, f"{half}.{theirs}", tensors, f"{half}.{name}")
    for i in range(len(config.channels)):
        for j in range(config.res_blocks_per_level + (half == "decoder")):
            _res_block(out, f"{half}.{blocks}.{i}.resnets.{j}", tensors, f"{half}.levels.{i}.blocks.{j}")
        if i < len(config.channels) - 1:
            _copy_linear(out, f"{half}.{blocks}.{i}.{steps}.0.conv", tensors, f"{half}.levels.{i}.step.conv")
    for j in range(2):
        _res_block(out, f"{half}.mid_block.resnets.{j}", tensors, f"{half}.middle.block{j + 1}")
    attention, ours = f"{half}.mid_block.attentions.0", f"{half}.middle.attention"
    _copy_linear(out, f"{attention}.group_norm", tensors, f"{ours}.norm")
    _split_linear(out, [f"{attention}.to_{kind}" for kind in "qkv"], tensors, f"{ours}.qkv")
    _copy_linear(out, f"{attention}.to_out.0", tensors, f"{ours}.out")


def autoencoder_to_diffusers(config: AutoencoderConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """An autoencoder as diffusers' AutoencoderKL, whose latents are our normalised ones.

    Their scaling and shift are scalars, so the statistics of each channel go into the 1x1 convolutions beside the
    latents: into the last one of the encoder, mean' = (mean - m) / s and logvar' = logvar - 2 log s, and into the first
    one of the decoder, z s + m. scaling_factor is 1 and shift_factor 0.

    Args:
        config: The autoencoder's sizes.
        tensors: The autoencoder's state, by its own names.

    Returns:
        The arguments of AutoencoderKL, and its state by its names.
    """
    levels = len(config.channels)
    arguments = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.channels,
        "layers_per_block": config.res_blocks_per_level,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "force_upcast": False,
    }
    out: Tensors = {}
    _autoencoder_half(out, "encoder", tensors, config)
    _autoencoder_half(out, "decoder", tensors, config)
    mean, std = tensors["latent_mean"], tensors["latent_std"]
    one = torch.ones_like(std)
    out["quant_conv.weight"] = torch.diag(torch.cat((1.0 / std, one)))[:, :, None, None]
    out["quant_conv.bias"] = torch.cat((-mean / std, -2.0 * std.log()))
    out["post_quant_conv.weight"] = torch.diag(std)[:, :, None, None]
    out["post_quant_conv.bias"] = mean
    return arguments, {name: tensor.contiguous() for name, tensor in out.items()}


_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_to_transformers(
    architecture: ClipArchitecture, max_tokens: int, tensors: Tensors
) -> tuple[dict[str, Any], Tensors]:
    """A CLIP text tower as transformers' CLIPTextModelWithProjection.

    open_clip pads with id 0, which is also the "!" inside a word. Theirs finds its pad token in the text and would
    read a "!" as padding, so padding gets an id of its own behind the vocabulary, whose embedding is a copy of row 0.

    Args:
        architecture: The tower's sizes.
        max_tokens: Its context length.
        tensors: The tower's state, by open_clip's names.

    Returns:
        The arguments of CLIPTextConfig, and the state of CLIPTextModelWithProjection by its names.
    """
    arguments = {
        "vocab_size": CLIP_VOCAB_SIZE + 1,
        "hidden_size": architecture.width,
        "intermediate_size": int(architecture.width * architecture.mlp_ratio),
        "projection_dim": architecture.embed_dim,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "max_position_embeddings": max_tokens,
        "hidden_act": "quick_gelu" if architecture.quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": CLIP_END_ID - 1,
        "eos_token_id": CLIP_END_ID,
        "pad_token_id": CLIP_VOCAB_SIZE,
    }
    tokens = tensors["token_embedding.weight"]
    out = {
        "text_model.embeddings.token_embedding.weight": torch.cat((tokens, tokens[CLIP_PAD_ID : CLIP_PAD_ID + 1])),
        "text_model.embeddings.position_embedding.weight": tensors["positional_embedding"],
        "text_projection.weight": tensors["text_projection"].T,
    }
    _copy_linear(out, "text_model.final_layer_norm", tensors, "ln_final")
    for i in range(architecture.layers):
        theirs, ours = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for name, their_name in _CLIP_BLOCK.items():
            _copy_linear(out, f"{theirs}.{their_name}", tensors, f"{ours}.{name}")
        for kind in ("weight", "bias"):
            parts = tensors[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                out[f"{theirs}.self_attn.{projection}.{kind}"] = part
    return arguments, {name: tensor.contiguous() for name, tensor in out.items()}


_CLIP_RENAMED = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
_CLIP_PAD_TOKEN = "<|pad|>"


def clip_tokenizer_to_transformers(encoder: dict[str, int], ranks: dict[tuple[str, str], int], max_tokens: int) -> Any:
    """open_clip's tokenizer as transformers' CLIPTokenizer.

    Args:
        encoder: Piece to id.
        ranks: Pair of pieces to the rank of its merge.
        max_tokens: The context length, which the serving side reads from the tokenizer.

    Returns:
        A CLIPTokenizer that gives the same ids, but for padding: see `clip_to_transformers`.
    """
    from transformers import CLIPTokenizer

    # Under other names the end and start tokens would silently be added anew, outside the embedding.
    vocabulary = {_CLIP_RENAMED.get(piece, piece): number for piece, number in encoder.items()}
    merges = sorted((pair for pair in ranks if len(pair) == 2), key=lambda pair: ranks[pair])
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=_CLIP_PAD_TOKEN, model_max_length=max_tokens)


def t5_to_transformers(architecture: T5Architecture, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """A T5 encoder as transformers' T5EncoderModel, which it already is.

    Args:
        architecture: The tower's sizes.
        tensors: The tower's state, each tensor once.

    Returns:
        The arguments of T5Config, and the state of T5EncoderModel.
    """
    arguments = {**asdict(architecture), "dropout_rate": 0.0, "use_cache": False}
    return arguments, {**tensors, T5_ALIAS: tensors["shared.weight"]}
