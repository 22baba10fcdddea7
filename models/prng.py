"""Random numbers as pure functions of (seed, stream, sample number, element).

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) written in int64 tensor
operations, so that the same numbers come out on every device, whatever else is in the batch, whichever rank draws
them and in whatever order. No state, no generator object, nothing to save in a checkpoint.

The counter of one Philox call is (element // 4, stream, low and high word of the sample number), its key the two
words of the seed; each call gives four consecutive elements.
"""

import math

import torch
from torch import Tensor

from models.errors import ModelError

# What a draw is for. Two purposes never share a stream, and a number never changes its meaning: the streams are part
# of what makes an old run reproducible. Append only.
NOISE = 0  # the noise end of the diffusion path
TIME = 1  # the path time t
DROPOUT = 2  # which text encoders lose their condition (classifier-free guidance)
POSTERIOR = 3  # epsilon of the autoencoder's reparameterised sample
STRATUM = 4  # which part of (0, 1) a sample's time lies in; here the number is the optimiser step's

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: the Weyl sequence of the key schedule
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: Four int64 tensors that broadcast together, each element in [0, 2**32).
        key: Two integers in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, each element in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products wrap into negative int64; the bits are right, and the mask after the arithmetic shift
        # takes away the sign's copies.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _words(seed: int, stream: int, numbers: Tensor, num_elements: int) -> Tensor:
    """Four random words for each block of four elements: (B, ceil(num_elements / 4), 4) int64 in [0, 2**32)."""
    if not 0 <= seed < 2**64:
        raise ModelError(f"seed {seed} is out of range: give an integer in [0, 2**64)")
    if not 0 <= stream <= _WORD:
        raise ModelError(f"random stream {stream} is out of range: give an integer in [0, 2**32)")
    if numbers.dtype != torch.int64 or numbers.ndim != 1:
        raise ValueError(f"numbers must be an int64 vector, got {numbers.dtype} of shape {tuple(numbers.shape)}")
    blocks = torch.arange((num_elements + 3) // 4, device=numbers.device)[None, :]
    number = numbers[:, None]
    counter = (blocks, torch.full_like(blocks, stream), number & _WORD, (number >> 32) & _WORD)
    return torch.stack(torch.broadcast_tensors(*philox(counter, (seed & _WORD, seed >> 32))), dim=-1)


def uniform(seed: int, stream: int, numbers: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        seed: The run's seed, in [0, 2**64).
        stream: What the draw is for: one of this module's constants.
        numbers: (B,) int64, the global sample numbers; the result lies on their device.
        shape: Shape of one sample's draw; () gives one number per sample.

    Returns:
        (B, *shape) float32, multiples of 2**-24 in [2**-24, 1 - 2**-24].

    Raises:
        ModelError: The seed or the stream is out of range.
    """
    num_elements = math.prod(shape)
    words = _words(seed, stream, numbers, num_elements).flatten(1)[:, :num_elements]
    # 23 bits plus a half: 24 significant bits, so float32 holds it exactly and neither 0 nor 1 can come out.
    values = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return values.reshape(-1, *shape)


def normal(seed: int, stream: int, numbers: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal numbers, by Box-Muller on 32-bit uniforms (so |value| stays below 6.8).

    Args:
        seed: The run's seed, in [0, 2**64).
        stream: What the draw is for: one of this module's constants.
        numbers: (B,) int64, the global sample numbers; the result lies on their device.
        shape: Shape of one sample's draw; () gives one number per sample.

    Returns:
        (B, *shape) float32. Computed in float64, so devices agree to the last rounding of float32.

    Raises:
        ModelError: The seed or the stream is out of range.
    """
    num_elements = math.prod(shape)
    words = (_words(seed, stream, numbers, num_elements).to(torch.float64) + 0.5) * 2.0**-32  # (B, blocks, 4)
    radius = torch.sqrt(-2.0 * torch.log(words[..., 0::2]))  # (B, blocks, 2)
    angle = (2.0 * math.pi) * words[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)  # (B, blocks, 2, 2)
    return pairs.flatten(1)[:, :num_elements].to(torch.float32).reshape(-1, *shape)
