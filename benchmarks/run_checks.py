"""What the run-time checks cost: the CPU time inside them as a share of training steps.

A step is `training.diffusion_step` with its backward pass on stored latents and stored text, so that no frozen network
hides the cost: four pictures of 256 px (256 tokens), CLIP of 77 x 768 and T5 of 77 x 1024. A row is read after every
fourth step, more often than any recipe does. Two interleaved runs would differ by more than the checks cost, so what is
timed is the calls themselves. Asserted before: losses with and without checks are equal to the bit. The rates are
samples per second of CPU time, with the checks and without the time spent in them; the ratio is one over the other.
"""

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common import Row, machine, main
from data.batch import Batch
from data.encoded import EncodedBatch
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.diffusion import DiffusionConfig
from models.dit import DiT, DiTConfig
from models.text_config import TextEncoderConfig
from models.text_encoder import Conditioner
from training.diffusion_step import diffusion_step
from training.metrics import Parts
from training.run_checks import DiffusionChecks
from training.throughput import Pace

ROWS = {"width 384, depth 6": (384, 6), "width 128, depth 5": (128, 5)}
BATCH, STEPS = 4, 4  # samples per step, steps per row
CPU = torch.device("cpu")


class Timed:
    """Calls another object's methods and adds up the CPU time inside them."""

    spent_s = 0.0

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return timed(found) if callable(found) else Timed(found)


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its CPU time added up."""

    def call(*arguments: Any, **named: Any) -> Any:
        start = time.process_time()
        result = function(*arguments, **named)
        Timed.spent_s += time.process_time() - start
        return result

    return call


def make_batch(step: int) -> Batch:
    """Random features and latents."""
    generator = torch.Generator().manual_seed(step)

    def features(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator).bfloat16()

    mask = torch.ones(BATCH, 77, dtype=torch.bool)
    encoded = EncodedBatch(
        moments=features(8, 32, 32).abs(), tokens={"clip": features(77, 768), "t5": features(77, 1024)}, scales={},
        masks={"clip": mask, "t5": mask}, pooled={"clip": features(768)},
    )  # fmt: skip
    numbers = step * BATCH + torch.arange(BATCH)
    return Batch(
        pixels=torch.zeros(BATCH, 3, 0, 0, dtype=torch.uint8), encoded=encoded, captions=["x"] * BATCH,
        keys=["x"] * BATCH, sample_numbers=numbers, weights=torch.ones(BATCH),
        sizes=torch.zeros(BATCH, 2, dtype=torch.int32), crops=torch.zeros(BATCH, 4, dtype=torch.int32), bad=[],
        metas=[{}] * BATCH, visits=numbers, filtered=numbers[:0], stream=0, positions=(),
    )  # fmt: skip


def measure(name: str, rounds: int) -> Row:
    """One row."""
    width, depth = ROWS[name]
    towers = [
        TextEncoderConfig(name="clip", kind="clip", max_tokens=77, seed=1, width=768, layers=1, heads=8,
                          embed_dim=768, dropout=0.1),
        TextEncoderConfig(name="t5", kind="t5", max_tokens=77, seed=2, width=1024, layers=1, heads=8, vocab_size=400,
                          dropout=0.1),
    ]  # fmt: skip
    conditioner = Conditioner(towers)
    sizes = {"text_dim": conditioner.text_dim, "pooled_dim": conditioner.pooled_dim}
    config = DiTConfig(latent_channels=4, depth=depth, width=width, num_heads=width // 32, max_grid=16, **sizes)
    dit = DiT(config)
    dit.init_weights(0)
    autoencoder = Autoencoder(AutoencoderConfig(latent_channels=4, channels=(8, 8, 8, 8), norm_groups=4))
    frozen: Any = SimpleNamespace(device=CPU, autoencoder=autoencoder, conditioner=conditioner)
    diffusion, pace = DiffusionConfig(), Pace(CPU)
    plain = DiffusionChecks(diffusion, conditioner, config, pace)
    parts, checks = Parts(lambda words: words[None], CPU), Timed(plain)
    parts.add(pace, *plain.parts)
    read, step = timed(parts.read), 0

    def take(checks: Any) -> torch.Tensor:
        dit.zero_grad()
        loss, _ = diffusion_step(
            dit, make_batch(step), frozen, diffusion, seed=0, sample_latents=True, global_batch_size=BATCH,
            patch_size=2, checks=checks,
        )  # fmt: skip
        loss.backward()
        return loss.detach()

    assert torch.equal(take(None), take(checks))
    read()
    with_s, without_s = [], []
    for _ in range(rounds):
        Timed.spent_s, start = 0.0, time.process_time()
        for _ in range(STEPS):
            step += 1
            take(checks)
        read()
        total = time.process_time() - start
        with_s.append(total)
        without_s.append(total - Timed.spent_s)
    ratios = [without / total for without, total in zip(without_s, with_s, strict=True)]
    print(f"{name}: {1e3 * (sum(with_s) - sum(without_s)) / rounds / STEPS:.2f} ms of "
          f"{1e3 * sum(with_s) / rounds / STEPS:.0f} ms per step in the checks")  # fmt: skip
    return Row(
        name=name, ours=BATCH * STEPS / statistics.median(with_s), peer=BATCH * STEPS / statistics.median(without_s),
        unit="samples/s", ratio_median=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios),
        rounds=rounds, outputs_equal=True, machine=machine(), versions={"torch": importlib.metadata.version("torch")},
    )  # fmt: skip


def benchmark(arguments: argparse.Namespace) -> list[Row]:
    """All rows that were asked for."""
    return [measure(name, arguments.rounds) for name in arguments.rows]


if __name__ == "__main__":
    main(__doc__ or "", benchmark, list(ROWS))
