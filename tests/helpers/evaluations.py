"""A tiny text-to-image model, and a folder that looks like a finished demo, for the tests of evaluation and report."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from eval.held_out import load_held_out
from eval.pictures import to_images, to_pictures
from launch.config_io import dump_yaml
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.diffusion import DiffusionConfig
from models.dit import DiT, DiTConfig
from models.pipeline import TextToImage
from models.text_encoder import Conditioner, TextEncoderConfig
from training.hooks import write_grid

PROMPTS = ("a red seven above a blue three", "a green four", "yellow 1 left of purple 9", "a <b>white</b> zero")


def tiny_pipeline(image_size: int = 32) -> TextToImage:
    """Untrained, seeded, a few thousand parameters; its transformer is moved away from the zeros of adaLN-zero."""
    autoencoder = Autoencoder(
        AutoencoderConfig(latent_channels=4, channels=(8, 8, 8), res_blocks_per_level=1, norm_groups=4)
    )
    autoencoder.init_weights(0)
    autoencoder.set_statistics(torch.zeros(4), torch.full((4,), 0.5))
    conditioner = Conditioner(
        (TextEncoderConfig(name="clip", kind="clip", seed=1, width=16, layers=2, heads=2, embed_dim=8, max_tokens=12),)
    )
    sizes = {"text_dim": conditioner.text_dim, "pooled_dim": conditioner.pooled_dim}
    grid = image_size // 8
    dit = DiT(DiTConfig(latent_channels=4, depth=1, width=16, num_heads=2, max_grid=8, base_grid=grid, **sizes))
    dit.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    pipeline = TextToImage(autoencoder, dit, conditioner, DiffusionConfig(), image_size)
    return pipeline.eval().requires_grad_(False)


def oracle(data: Path, wrong_every: int = 0) -> Callable[..., torch.Tensor]:
    """A stand-in for `TextToImage.generate` that knows the held-out pictures; every n-th answer is another picture."""
    known: dict[str, torch.Tensor] = {}
    for split in ("test", "combinations"):
        held_out = load_held_out(str(data / split), 32, 512)
        for prompt, picture in zip(held_out.prompts, held_out.pictures, strict=True):
            known.setdefault(prompt, picture)

    def generate(self: TextToImage, prompts: list[str], seeds: list[int], **_settings: object) -> torch.Tensor:
        answers = list(known.values())
        chosen = [
            answers[(7 * seed) % len(answers)] if wrong_every and seed % wrong_every == 0 else known[prompt]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return to_images(torch.stack(chosen)) / 2 + 0.5

    return generate


def write_run(folder: Path, kind: str, pictures: torch.Tensor, steps: int = 1000) -> None:
    """A run directory as training leaves it, with curves that fall and grids that come out of noise.

    Args:
        folder: a new folder.
        kind: "autoencoder" or "dit".
        pictures: (B, 3, H, W) uint8; the first few make the grids.
        steps: of the run.
    """
    folder.mkdir(parents=True)
    versions = {"torch": "2.15.0", "deepspeed": "0.19.8"}
    provenance = {"commit": "0" * 40, "python": "3.11.0", "platform": "Linux", "versions": versions}
    recipe = {"kind": kind, "total_steps": steps, "optim": {"learning_rate": 0.0015}}
    (folder / "run.yaml").write_text(dump_yaml({"recipe": recipe, "provenance": provenance}))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for step in range(10, steps + 1, 10):
        jitter = 1 + 0.06 * float(torch.randn((), generator=generator))
        loss = (0.35 + 1.6 * math.exp(-step / 120)) * jitter
        row = {"step": step, "images_seen": 128 * step, "time_s": 0.4 * step, "loss": loss, "lr": 1.5e-3}
        row |= {"grad_norm": 3 * loss * jitter, "images_per_s": 290 * jitter, "data_wait_share": 0.012 * jitter}
        if kind == "autoencoder":
            row |= {"rec_loss": 0.1 * loss, "psnr_db": 28 - 4 * loss, "kl": 4 + loss}
            row |= {"adv_g": 0.2 * jitter, "disc_loss": 0.9 + 0.1 * jitter} if step > steps / 2 else {}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(steps // 5, steps + 1, steps // 5):
        share = 1 - step / steps
        shown = to_images(pictures[:8] if kind == "autoencoder" else pictures[: len(PROMPTS)])
        mixed = shown * (1 - share) + share * torch.randn(shown.shape, generator=generator)
        sheet = torch.cat([shown, mixed]) if kind == "autoencoder" else mixed
        write_grid(to_pictures(sheet) / 255, folder / "samples" / f"step-{step:08d}.png")
    if kind == "dit":
        (folder / "samples" / "prompts.json").write_text(json.dumps(PROMPTS))
