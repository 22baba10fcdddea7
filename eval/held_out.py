"""Held-out pictures and their prompts, read once in file order."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.loader import iterate_once
from eval.errors import EvalError
from eval.pictures import to_pictures


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The first samples of a packed set; the choice is part of the protocol and needs no random number."""

    url: str
    keys: list[str]
    prompts: list[str]  # each sample's first caption
    metas: list[dict[str, Any]]  # each sample's JSON, {} if it has none
    pictures: Tensor  # (B, 3, H, W) uint8


def load_held_out(url: str, image_size: int, limit: int, least: int = 1) -> HeldOut:
    """Reads at most `limit` samples, resized and centre-cropped to image_size pixels.

    Raises:
        EvalError: if the set holds fewer than `least` samples.
        DataError: if the set is not there or damaged.
    """
    keys, prompts, metas, pictures = [], [], [], []
    for key, image, caption, meta in iterate_once(url, image_size, limit):
        keys.append(key)
        prompts.append(caption)
        metas.append(meta)
        pictures.append(to_pictures(image[None])[0])
    if len(keys) < least:
        raise EvalError(f"{url} holds {len(keys)} usable samples, {least} are needed; lower num_prompts or add samples")
    return HeldOut(url=url, keys=keys, prompts=prompts, metas=metas, pictures=torch.stack(pictures))
