"""The validation loss at fixed times: the cheap figure of convergence, comparable between runs and world sizes."""

import torch
from torch import Tensor

from eval.held_out import HeldOut
from eval.pictures import to_images
from models import prng
from models.diffusion import interpolate, network_input, target, velocity_error
from models.pipeline import TextToImage

NUM_TIMES = 8  # t = 1/16, 3/16, …, 15/16: the middles of eight equal parts of [0, 1]


@torch.no_grad()
def validation_loss(pipeline: TextToImage, held_out: HeldOut, batch_size: int, seed: int = 0) -> dict[str, float]:
    """Mean squared error of the predicted velocity on held-out pictures, conditional, per time and averaged.

    Whatever the network predicts, the error is that of noise - latents, without the weights of training; at one t two
    paths differ in noise, so figures compare within a path. Latents are posterior means; the noise of sample i is a
    function of (seed, i), the same at every time.

    Returns:
        ``{"mean": …, "t=0.0625": …, …}``.
    """
    totals = torch.zeros(NUM_TIMES, dtype=torch.float64)
    count = len(held_out.prompts)
    for start in range(0, count, batch_size):
        rows = slice(start, min(start + batch_size, count))
        latents = pipeline.autoencoder.encode_latents(to_images(held_out.pictures[rows]).to(pipeline.device))
        numbers = torch.arange(rows.start, rows.stop, device=pipeline.device)
        noise = prng.normal(seed, prng.NOISE, numbers, tuple(latents.shape[1:]))  # (B, C, h, w)
        text = pipeline.conditioner.encode(held_out.prompts[rows])
        for i, time in enumerate(fixed_times()):
            t = torch.full((len(latents),), time, device=pipeline.device)
            x_t = interpolate(pipeline.diffusion, latents, noise, t)
            x_in = network_input(pipeline.diffusion, x_t, t)
            predicted = pipeline.dit(x_in, t, text.text_embeds, text.pooled, text.text_mask)
            totals[i] += _squared_error(predicted, target(pipeline.diffusion, latents, noise, t))
    totals *= velocity_error(pipeline.diffusion, torch.tensor(fixed_times(), dtype=torch.float64))
    losses = (totals / count).tolist()
    return {"mean": sum(losses) / NUM_TIMES} | {
        f"t={time:.4f}": loss for time, loss in zip(fixed_times(), losses, strict=True)
    }


def fixed_times() -> list[float]:
    """The times at which the loss is taken."""
    return [(i + 0.5) / NUM_TIMES for i in range(NUM_TIMES)]


def _squared_error(predicted: Tensor, wanted: Tensor) -> float:
    """Sum over samples of the mean squared error."""
    return float((predicted.float() - wanted.float()).square().flatten(1).mean(dim=1).double().sum())
