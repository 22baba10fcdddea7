"""Pictures drawn while a run trains."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from models.pipeline import TextToImage
from training.config import SamplesConfig
from training.engine import Engine
from training.fragments import Fragment, gather_into


def write_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Writes pictures (B, 3, H, W) in [0, 1] as one PNG, row by row, two grey pixels apart."""
    batch, _, height, width = images.shape
    columns = min(columns, batch)
    rows = -(-batch // columns)
    sheet = torch.full((3, rows * (height + 2) + 2, columns * (width + 2) + 2), 0.5)
    for i, image in enumerate(images):
        top, left = 2 + (i // columns) * (height + 2), 2 + (i % columns) * (width + 2)
        sheet[:, top : top + height, left : left + width] = image
    pixels = (sheet.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def sample_grid(
    engine: Engine,
    average: dict[str, Fragment],
    pipeline: TextToImage,
    samples: SamplesConfig,
    path: Path,
) -> None:
    """Draws the recipe's prompts from the averaged weights; every rank draws its share (collective)."""
    gather_into(pipeline.dit, average)
    mine = range(engine.rank, len(samples.prompts), engine.world_size)
    images = pipeline.generate(
        [samples.prompts[i] for i in mine],
        [samples.seed + i for i in mine],
        num_steps=samples.num_steps,
        guidance_scale=samples.guidance_scale,
    ).cpu()
    shares: list = [None] * engine.world_size
    if engine.world_size > 1:
        dist.all_gather_object(shares, images)
    else:
        shares = [images]
    if engine.rank == 0:
        ordered = [shares[i % engine.world_size][i // engine.world_size] for i in range(len(samples.prompts))]
        write_grid(torch.stack(ordered), path)
        prompts = path.parent / "prompts.json"
        prompts.write_text(json.dumps(list(samples.prompts), indent=1), encoding="utf-8")
