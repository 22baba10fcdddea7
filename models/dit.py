"""The diffusion transformer: MM-DiT with joint attention, as in SD3 (Esser et al. 2024, arXiv:2403.03206, fig. 2).

Image patches and text tokens run through two streams of weights and meet in one attention per block. The time and the
pooled text enter every norm as scale, shift and gate (adaLN-zero). Under a change of names (`models.diffusers_map`) the
network equals diffusers' SD3Transformer2DModel with RMS-normalised queries and keys. With `attention: cross` the text
has no stream: the image attends to itself, then to the text as it came in (PixArt-alpha, arXiv:2310.00426, sec. 2.3).
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embeddings import TIME_FEATURES, GridPositions, patchify, time_features, unpatchify
from models.errors import ModelError
from models.layers import HeadNorm, Mlp, attend, modulated_norm

MLP_RATIO = 4  # hidden width of a block's MLP over the model's width

Attention = Literal["joint", "cross"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a DiT."""

    latent_channels: int  # C, channels of the latents
    patch_size: int = 2  # latent pixels per side of a patch
    depth: int  # number of blocks
    width: int  # D, channels of both streams; divisible by num_heads and by 4
    num_heads: int  # attention heads per block
    text_dim: int  # channels of the text tokens that come in
    pooled_dim: int  # P, channels of the pooled text vector
    max_grid: int  # patches per side of the square from which positions are cropped
    base_grid: int | None = (
        None  # patches per side in training: positions lie base_grid / max_grid apart; None: 1 apart
    )
    attention: Attention = "joint"  # "joint" = image and text in one, as in SD3; "cross" = to itself, then to the text

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field.name} = {value} must be at least 1")
        if self.attention not in get_args(Attention):
            raise ValueError(f"attention = {self.attention!r} must be {' or '.join(get_args(Attention))}")
        if self.width % self.num_heads:
            raise ValueError(f"width = {self.width} must be a multiple of num_heads = {self.num_heads}")
        if self.width % 4:
            raise ValueError(f"width = {self.width} must be a multiple of 4: sines and cosines of two coordinates")
        if self.base_grid is not None and self.base_grid > self.max_grid:
            raise ValueError(f"base_grid = {self.base_grid} must not exceed max_grid = {self.max_grid}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads


class Stream(nn.Module):
    """One modality's own weights in a block: into and out of the joint attention, and its MLP.

    Args:
        config: The model's sizes.
        goes_on: False for the text in the last block: it only gives keys and values, nobody reads it afterwards.
    """

    def __init__(self, config: DiTConfig, goes_on: bool = True):
        super().__init__()
        self.kinds = 3 if goes_on else 2  # (queries,) keys, values
        self.head_shape = (self.kinds, config.num_heads, config.head_dim)
        self.qkv = nn.Linear(config.width, self.kinds * config.width)
        self.head_norm = HeadNorm(self.kinds - 1, config.head_dim)
        if goes_on:
            self.out = nn.Linear(config.width, config.width)
            self.mlp = Mlp(config.width, MLP_RATIO * config.width, config.width, "gelu_tanh")

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised (queries and) keys, and values.

        Args:
            x: (B, N, D), with shift and scale (B, 1, D).

        Returns:
            (B, N, 2 or 1, heads, d) and (B, N, heads, d).
        """
        qkv = self.qkv(modulated_norm(x, shift, scale)).unflatten(2, self.head_shape)  # (B, N, 3, heads, d)
        # Splits rather than slices: their backward is one concatenation, where slices fill zeros and add.
        qk, v = qkv.split((self.kinds - 1, 1), dim=2)
        return self.head_norm(qk), v.squeeze(2)

    def finish(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """The gated residual of the attention, then that of the MLP.

        Args:
            x: (B, N, D), what came into the block.
            attended: (B, N, D), this stream's share of the joint attention.
            modulation: Gate of the attention; shift, scale and gate of the MLP; each (B, 1, D).

        Returns:
            (B, N, D).
        """
        gate, *mlp_modulation = modulation
        return self.add_mlp(torch.addcmul(x, gate, self.out(attended)), *mlp_modulation)

    def add_mlp(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """The gated residual of the MLP on x (B, N, D); shift, scale and gate are (B, 1, D)."""
        return torch.addcmul(x, gate, self.mlp(modulated_norm(x, shift, scale)))


class JointBlock(nn.Module):
    """A block of both streams around one joint attention.

    Args:
        config: The model's sizes.
        last: The text stream ends here.
    """

    def __init__(self, config: DiTConfig, last: bool):
        super().__init__()
        self.last = last
        # Image: shift, scale, gate of the attention and of the MLP; text: the same, or shift and scale in the last.
        self.num_chunks = 8 if last else 12
        self.modulation = nn.Linear(config.width, self.num_chunks * config.width)
        self.image = Stream(config)
        self.text = Stream(config, goes_on=not last)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run both streams through the block.

        Args:
            image: (B, N, D).
            text: (B, L, D).
            condition: (B, D), after its activation.
            mask: (B, 1, 1, N + L) bool or None.

        Returns:
            The new (image, text); in the last block text comes back as it went in.
        """
        chunks = self.modulation(condition).unflatten(1, (self.num_chunks, 1, -1)).unbind(1)  # each (B, 1, D)
        image_qk, image_v = self.image.project(image, chunks[0], chunks[1])
        text_qk, text_v = self.text.project(text, chunks[6], chunks[7])
        v = torch.cat((image_v, text_v), dim=1)  # (B, N + L, heads, d)
        if self.last:  # only the image asks
            q, image_k = image_qk.unbind(2)
            k = torch.cat((image_k, text_qk.squeeze(2)), dim=1)
        else:
            q, k = torch.cat((image_qk, text_qk), dim=1).unbind(2)  # each (B, N + L, heads, d)
        attended = attend(q, k, v, mask)  # (B, N + L, D), or (B, N, D) in the last
        if self.last:
            return self.image.finish(image, attended, chunks[2:6]), text
        image_attended, text_attended = attended.split((image.shape[1], text.shape[1]), dim=1)
        image = self.image.finish(image, image_attended, chunks[2:6])
        return image, self.text.finish(text, text_attended, chunks[8:12])


class CrossAttention(nn.Module):
    """The image asks, the text answers; queries and keys are RMS-normalised per head, as in the other attentions.

    Args:
        config: The model's sizes.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.head_shape = (config.num_heads, config.head_dim)
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.q_norm, self.k_norm = HeadNorm(1, config.head_dim), HeadNorm(1, config.head_dim)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """What the image (B, N, D) finds in the text (B, L, D) where the mask (B, 1, 1, L) allows: (B, N, D)."""
        q = self.q_norm(self.q(image).unflatten(2, (1, *self.head_shape))).squeeze(2)  # (B, N, heads, d)
        k, v = self.kv(text).unflatten(2, (2, *self.head_shape)).split(1, dim=2)  # each (B, L, 1, heads, d)
        return self.out(attend(q, self.k_norm(k).squeeze(2), v.squeeze(2), mask))


class CrossBlock(nn.Module):
    """A block of the image alone: attention to itself, then to the text, then the MLP.

    The condition modulates the first and the last, as in a joint block; the attention to the text stands between them
    without norm and gate (PixArt-alpha, arXiv:2310.00426, sec. 2.3).

    Args:
        config: The model's sizes.
    """

    NUM_CHUNKS = 6  # shift, scale, gate of the attention and of the MLP

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.modulation = nn.Linear(config.width, self.NUM_CHUNKS * config.width)
        self.image = Stream(config)
        self.cross = CrossAttention(config)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the image through the block.

        Args:
            image: (B, N, D).
            text: (B, L, D).
            condition: (B, D), after its activation.
            mask: (B, 1, 1, L) bool or None.

        Returns:
            The new image, and the text as it came in.
        """
        chunks = self.modulation(condition).unflatten(1, (self.NUM_CHUNKS, 1, -1)).unbind(1)  # each (B, 1, D)
        qk, v = self.image.project(image, chunks[0], chunks[1])
        q, k = qk.unbind(2)  # each (B, N, heads, d)
        image = torch.addcmul(image, chunks[2], self.image.out(attend(q, k, v, None)))
        image = image + self.cross(image, text, mask)
        return self.image.add_mlp(image, *chunks[3:]), text


class DiT(nn.Module):
    """MM-DiT, or a DiT with cross-attention: predicts the velocity noise - latents from x_t, the time and the text.

    The weights that a fresh instance holds mean nothing: call `init_weights` or load a state.

    Args:
        config: The sizes.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        D, patch_dim = config.width, config.latent_channels * config.patch_size**2
        self.patch_in = nn.Linear(patch_dim, D)
        self.positions = GridPositions(D, config.max_grid, config.base_grid or config.max_grid)
        self.text_in = nn.Linear(config.text_dim, D)
        self.time_mlp = Mlp(TIME_FEATURES, D, D, "silu")
        self.pooled_mlp = Mlp(config.pooled_dim, D, D, "silu")
        self.blocks = nn.ModuleList(
            CrossBlock(config) if config.attention == "cross" else JointBlock(config, last=i == config.depth - 1)
            for i in range(config.depth)
        )
        self.final_modulation = nn.Linear(D, 2 * D)  # shift, scale
        self.patch_out = nn.Linear(D, patch_dim)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set every parameter as a function of the seed alone, whatever the device and the global generator.

        Xavier-uniform linear layers (queries, keys and values each for itself), zero biases; the modulations, the way
        out of each cross-attention and the last layer are zero, so that every block starts as the identity and the
        prediction as 0 (adaLN-zero).
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        zero = {id(self.final_modulation), id(self.patch_out)} | {id(block.modulation) for block in self.blocks}
        crosses = [module for module in self.modules() if isinstance(module, CrossAttention)]
        zero |= {id(cross.out) for cross in crosses}
        fused = {id(stream.qkv): stream.kinds for stream in self.modules() if isinstance(stream, Stream)}
        fused |= {id(cross.kv): 2 for cross in crosses}
        for module in self.modules():
            if isinstance(module, HeadNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Linear):
                module.bias.zero_()
                if id(module) in zero:
                    module.weight.zero_()
                    continue
                for part in module.weight.chunk(fused.get(id(module), 1)):
                    bound = (6.0 / (part.shape[0] + part.shape[1])) ** 0.5
                    values = torch.rand(part.shape, generator=generator, dtype=torch.float32) * 2.0 - 1.0
                    part.copy_(values * bound)

    def forward(
        self, x_t: Tensor, t: Tensor, text_embeds: Tensor, pooled: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x_t: (B, C, h, w), h and w divisible by the patch size.
            t: (B,) path time in [0, 1]; 0 is data.
            text_embeds: (B, L, text_dim).
            pooled: (B, P).
            text_mask: (B, L) bool, True = keep; None keeps all. A masked token is seen by nobody.

        Returns:
            (B, C, h, w) in x_t's dtype.

        Raises:
            ModelError: h or w does not fit the patch size or the position grid.
        """
        p = self.config.patch_size
        if x_t.shape[2] % p or x_t.shape[3] % p:
            raise ModelError(
                f"latents of {x_t.shape[2]} x {x_t.shape[3]} do not divide into patches of {p} x {p}: "
                "choose a picture size that is a multiple of the autoencoder's downsampling times the patch size"
            )
        rows, cols = x_t.shape[2] // p, x_t.shape[3] // p
        dtype = self.patch_in.weight.dtype  # differs from the inputs' only where the weights are stored in bfloat16
        image = self.patch_in(patchify(x_t.to(dtype), p))  # (B, N, D)
        image = image + self.positions(rows, cols).to(image.dtype)
        text = self.text_in(text_embeds.to(dtype))  # (B, L, D)
        condition = self.time_mlp(time_features(t).to(dtype)) + self.pooled_mlp(pooled.to(dtype))  # (B, D)
        condition = F.silu(condition)
        mask = None
        if text_mask is not None:
            beside = rows * cols if self.config.attention == "joint" else 0  # image tokens in the same attention
            mask = F.pad(text_mask, (beside, 0), value=True)[:, None, None]  # (B, 1, 1, N + L), or (B, 1, 1, L)
        for block in self.blocks:
            image, text = block(image, text, condition, mask)
        shift, scale = self.final_modulation(condition).unflatten(1, (2, 1, -1)).unbind(1)
        patches = self.patch_out(modulated_norm(image, shift, scale))  # (B, N, C * p * p)
        return unpatchify(patches, p, rows, cols).to(x_t.dtype)  # (B, C, h, w)


def dit_flops(config: DiTConfig, image_tokens: int, text_tokens: int) -> int:
    """Floating-point operations of one sample's forward pass, a multiply-add counted as two.

    Matrix products only: linear layers and both products of the attention. A training step costs three times this.

    Args:
        config: The model's sizes.
        image_tokens: N, patches per picture.
        text_tokens: L, text tokens that enter the attention.
    """
    N, L, D = image_tokens, text_tokens, config.width
    patch_dim = config.latent_channels * config.patch_size**2
    macs = 2 * N * patch_dim * D + L * config.text_dim * D  # patches in and out, text in
    macs += (TIME_FEATURES + config.pooled_dim + 2 * D) * D + 2 * D * D  # time and pooled MLPs, final modulation
    stream = (4 + 2 * MLP_RATIO) * D * D  # q, k, v, out and the MLP, per token
    if config.attention == "cross":
        to_text = 2 * (N + L) * D * D + 2 * N * L * D  # q, out of the image; k, v of the text; both products
        return 2 * (macs + config.depth * (CrossBlock.NUM_CHUNKS * D * D + N * stream + 2 * N * N * D + to_text))
    for last in (False,) * (config.depth - 1) + (True,):
        macs += (8 if last else 12) * D * D  # modulation
        macs += N * stream + L * (2 * D * D if last else stream)
        macs += 2 * (N if last else N + L) * (N + L) * D  # q k^T and its product with v
    return 2 * macs
