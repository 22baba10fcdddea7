"""Runs without a model: loaders and ledgers of all ranks in one process, with kills and changes of world size."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.index import write_index
from data.ledger import Ledger, list_records, read_record
from data.loader import LoaderConfig, build_loader
from data.object_store import open_store
from data.shards import write_shard
from data.streams import Cursor

SIZES = ((32, 32), (40, 24), (24, 40), (48, 32))  # px, the shapes of the pictures in turn


@dataclass(frozen=True, kw_only=True)
class Start:
    """One attempt of a simulated run."""

    world_size: int
    steps: int  # that are committed, the last of them by the last commit
    lost_steps: int = 0  # behind it, before the kill
    torn: int = 0  # ranks that have written their record of the lost steps when the kill comes
    forgets: bool = False  # where its streams stood, as a faulty resume might


def unequal_shards(folder: Path, samples: Sequence[int], scale: int = 1) -> str:
    """A data set of one shard for each count; pictures of several shapes, each with a `score` from 0 to 4."""
    store = open_store(folder)
    shards, key = [], 0
    for number, count in enumerate(samples):
        rows = []
        for _ in range(count):
            width, height = SIZES[key % len(SIZES)]
            out = io.BytesIO()
            color = (key % 256, 40 * number % 256, 255 - key % 256)
            Image.new("RGB", (width // scale, height // scale), color).save(out, "PNG")
            name = f"{key:05d}"
            rows.append({"__key__": name, "png": out.getvalue(), "txt": f"picture {key}", "json": {"score": key % 5}})
            key += 1
        shards.append(write_shard(rows, store, f"s-{number:06d}.tar"))
    write_index(store, shards)
    return str(folder)


def simulate(
    folder: Path, config: LoaderConfig, starts: Sequence[Start], *, micro_batch_size: int, per_step: int, every: int = 2
) -> list[list[int]]:
    """Consumes data as training does: `per_step` micro-batches a step over all ranks, a commit every so many steps.

    Returns:
        The visits of every micro-batch of the run, by number, as far as they are committed.
    """
    cursor = Cursor()
    seen: dict[int, list[int]] = {}
    for number, start in enumerate(starts):
        if start.forgets:
            begun = {stream: ((0, 0),) * len(found) for stream, found in cursor.positions.items()}
            cursor = Cursor(micro_batches=cursor.micro_batches, positions=begun)
        places = [{"rank": rank, "world_size": start.world_size} for rank in range(start.world_size)]
        fixed = {"seed": 3, "micro_batch_size": micro_batch_size, "cursor": cursor}
        loaders = [build_loader(config, **fixed, **place) for place in places]
        ledgers = [Ledger(folder, rank, f"try-{number}") for rank in range(start.world_size)]
        for ledger, loader in zip(ledgers, loaders, strict=True):
            ledger.open(loader, config, cursor.micro_batches, start.world_size)
        batches = [iter(loader) for loader in loaders]
        consumed, positions = cursor.micro_batches, dict(cursor.positions)
        for step in range(1, start.steps + start.lost_steps + 1):
            for _ in range(per_step // start.world_size):
                for rank, ledger in enumerate(ledgers):
                    batch = next(batches[rank])
                    positions[batch.stream] = batch.positions
                    ledger.add(batch)
                    seen[int(batch.sample_numbers[0]) // micro_batch_size] = batch.visits.tolist()
            consumed += per_step
            if step <= start.steps and (step % every == 0 or step == start.steps):
                for ledger in ledgers:
                    ledger.write(consumed)
                cursor = Cursor(micro_batches=consumed, positions=dict(positions))
        for ledger in ledgers[: start.torn]:
            ledger.write(consumed)
    return [seen[number] for number in range(cursor.micro_batches)]


def recorded(folder: Path, attempts: Iterable[dict[str, Any]], micro_batch_size: int) -> dict[int, list[int]]:
    """The visits of each micro-batch, from the attempts whose record of it counts (as a verdict lists them)."""
    ranges = {attempt["attempt"]: attempt["micro_batches"] for attempt in attempts}
    found: dict[int, list[int]] = {}
    for file in list_records(folder)[0]:
        record = read_record(file, *ranges[file.attempt], micro_batch_size)
        found |= zip(record.numbers.tolist(), record.visits.tolist(), strict=True)
    return dict(sorted(found.items()))
