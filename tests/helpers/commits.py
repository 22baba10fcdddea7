"""Commits written without the code that trains: pieces cut by hand, put into files by the safetensors library."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from data.manifest import FileEntry, Manifest, step_folder, write_manifest
from data.object_store import open_store


def write_commit(
    url: str | Path,
    step: int,
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    state: dict[str, Any] | None = None,
    *,
    ranks: int = 2,
    attempt: str = "a0",
) -> Path:
    """Commits `groups`: every second tensor whole on one rank in turn, the others cut in unequal parts over all.

    Returns the step's folder.
    """
    store = open_store(str(url))
    files: dict[str, FileEntry] = {}
    layouts = []
    for group, tensors in groups.items():
        pieces: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
        layout = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            tensor = tensor.detach().float().cpu().contiguous()
            if number % 2 or tensor.numel() < ranks:
                pieces[number % ranks][name] = tensor
                starts = [(number % ranks, 0)]
            else:
                cuts = [0, *(max(i, tensor.numel() * i // (ranks + 1)) for i in range(1, ranks)), tensor.numel()]
                starts = list(enumerate(cuts[:-1]))
                for rank, start in starts:
                    pieces[rank][name] = tensor.reshape(-1)[start : cuts[rank + 1]].clone()
            layout[name] = {"shape": list(tensor.shape), "pieces": starts}
        layouts.append(layout)
        for rank, part in enumerate(pieces):
            if part:
                content = save(part)
                key = f"{attempt}/{group}-{rank:05d}.safetensors"
                store.put_bytes(content, f"{step_folder(step)}/{key}")
                files[key] = FileEntry(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    meta = {"state": state or {}, "layouts": layouts, "groups": {group: i for i, group in enumerate(groups)}}
    manifest = Manifest(step=step, attempt=attempt, files=files, meta=meta)
    assert write_manifest(store, step_folder(step), manifest)
    return Path(str(url)) / step_folder(step)
