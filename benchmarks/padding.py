"""Masked text cut behind each batch's longest against the same text padded to the towers' length, on training steps.

A step is the layout of the features, the DiT's forward and backward; the towers are left out. The lengths of the
captions are log-normal (sigma 0.5), the same for both parts: CLIP of 77 tokens, T5 of 77 or 256. Asserted before
anything is timed: predictions and gradients agree to 1e-5 of their largest number. Rows: real tokens on average of
padded ones, both parts together, and the tokens of the picture. The rate is samples per second of CPU time.
"""

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from benchmarks.common import Row, compare, main
from models import conditioner as conditioner_module
from models.conditioner import JointEncoders, TextCondition, TextFeatures
from models.dit import DiT, DiTConfig
from models.text_config import TextEncoderConfig
from models.text_encoder import build_text_encoder

ROWS = {  # name: (mean of real tokens, T5's max_tokens, picture tokens)
    "20 of 154, 64 picture": (20, 77, 64),
    "20 of 154, 256 picture": (20, 77, 256),
    "77 of 333, 64 picture": (77, 256, 64),
    "77 of 333, 256 picture": (77, 256, 256),
}
BATCH, BATCHES = 8, 2  # samples per step, different batches per turn
SPREAD = 0.5  # sigma of the logarithm of a caption's length
NEVER_CUT = 10**6  # rounding up to this many tokens leaves all padding in place


def make_features(conditioner: JointEncoders, mean: float, generator: torch.Generator) -> list[TextFeatures]:
    """Random features of captions whose lengths have about the given mean, padded to max_tokens."""
    wanted = mean * torch.exp(SPREAD * torch.randn(BATCH, generator=generator) - SPREAD**2 / 2)
    features = []
    for encoder in conditioner.text_encoders():
        places = torch.arange(encoder.config.max_tokens)
        mask = places < wanted.round().clamp(2, len(places))[:, None]
        tokens = torch.randn(BATCH, len(places), encoder.width, generator=generator) * mask[..., None]
        features.append(TextFeatures(tokens, mask, torch.randn(BATCH, encoder.pooled_dim, generator=generator)))
    return features


def measure(name: str, rounds: int) -> Row:
    """One row."""
    mean, t5_tokens, picture_tokens = ROWS[name]
    generator = torch.Generator().manual_seed(0)
    sizes = {"width": 64, "layers": 1, "heads": 2}
    towers = [
        TextEncoderConfig(name="clip", kind="clip", max_tokens=77, seed=1, embed_dim=64, **sizes),
        TextEncoderConfig(name="t5", kind="t5", max_tokens=t5_tokens, seed=2, vocab_size=400, **sizes),
    ]
    conditioner = JointEncoders([build_text_encoder(tower) for tower in towers], "masked")
    side = 2 * int(picture_tokens**0.5)
    dit = DiT(DiTConfig(latent_channels=4, depth=4, width=256, num_heads=4, max_grid=16, text_dim=64, pooled_dim=64))
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    batches = [make_features(conditioner, mean / 2, generator) for _ in range(BATCHES)]
    x_t = torch.randn(BATCH, 4, side, side, generator=generator)
    t = torch.rand(BATCH, generator=generator)

    def step(condition: TextCondition) -> torch.Tensor:
        dit.zero_grad()
        prediction = dit(x_t, t, condition.text_embeds, condition.pooled, condition.text_mask)
        prediction.square().mean().backward()
        return prediction.detach()

    def turn() -> int:
        for features in batches:
            step(conditioner.join(features))
        return BATCH * BATCHES

    def padded(work: Callable[[], Any]) -> Any:
        with mock.patch.object(conditioner_module, "_LENGTH_MULTIPLE", NEVER_CUT):
            return work()

    for features in batches:
        cut, whole = conditioner.join(features), padded(lambda features=features: conditioner.join(features))
        assert whole.text_embeds.shape[1] == 77 + t5_tokens > cut.text_embeds.shape[1]
        _assert_close(step(cut), step(whole))
        gradients = []
        for condition in (cut, whole):
            step(condition)
            gradients.append(torch.cat([p.grad.flatten() for p in dit.parameters() if p.grad is not None]))
        _assert_close(*gradients)
    return compare(name, turn, lambda: padded(turn), unit="samples/s", packages=("torch",), rounds=rounds)


def _assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def benchmark(arguments: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    return [measure(name, arguments.rounds) for name in arguments.rows]


if __name__ == "__main__":
    main(__doc__ or "", benchmark, list(ROWS))
