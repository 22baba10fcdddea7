"""Kills and changes of world size within an epoch, on real ranks: the same samples, each once, and the same losses."""

import json
import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data.buckets import BucketConfig
from data.filters import FilterRule
from data.ledger import Ledger
from data.ledger_check import check_ledger
from data.loader import LoaderConfig, build_loader
from data.streams import unpack_visits
from tests.helpers import tiny
from tests.helpers.command import write_recipe
from tests.helpers.ledger_runs import Start, recorded, simulate, unequal_shards
from tests.helpers.warm_ranks import darkroom
from training.metrics import read_metrics

STEPS, PER_STEP, B = 16, 4, 2  # steps; micro-batches a step over all ranks; samples


@pytest.fixture(scope="module")
def recipe(world, tmp_path_factory):
    """Pictures of several shapes in unequal shards, one in five of them refused: 45 samples an epoch."""
    folder = tmp_path_factory.mktemp("elastic")
    data = LoaderConfig(
        shards=unequal_shards(folder / "data", (2, 5, 3, 4) * 4),
        image_size=32,
        buckets=BucketConfig(multiple=8),
        filters=(FilterRule(field="score", max=3),),
        window_micro_batches=4,
        num_streams=8,
    )
    clip = tiny.ENCODERS[:1]  # one starts faster than three
    tiny_recipe = tiny.dit_recipe(world.data, world.autoencoder, total_steps=STEPS, text_encoders=clip)
    changed = replace(tiny_recipe, data=data, checkpoint=replace(tiny_recipe.checkpoint, every_steps=2))
    return write_recipe(folder / "dit.yaml", "dit", changed)


@pytest.fixture(scope="module")
def runs(recipe):
    """An undisturbed run on one process, and one that was killed twice in its second epoch."""
    whole, torn = recipe.with_name("whole"), recipe.with_name("torn")
    with ThreadPoolExecutor(1) as beside:
        undisturbed = beside.submit(darkroom, "train", "dit", recipe, "--run", whole, "engine.zero_stage=0")

        command = ("train", "dit", recipe, "--run", torn)
        killed = darkroom(*command, "--nproc", 2, die="log:9:1")
        assert killed.code == 137, killed.err
        killed = darkroom(*command, "data.num_workers=1", "engine.zero_stage=0", die="log:11:0")
        assert killed.code == -9 and f"resuming {torn} at step 8" in killed.err, killed.err
        done = darkroom(*command, "data.num_workers=2", "--nproc", 4)
        assert done.code == 0 and f"resuming {torn} at step 10" in done.err, done.err
    assert undisturbed.result().code == 0, undisturbed.result().err
    return whole, torn


def test_kills_and_other_world_sizes_in_one_epoch(runs):
    whole, torn = runs
    verdicts = []
    for run in runs:
        result = darkroom("data", "ledger", run, "--json")
        assert result.code == 0, result.err
        verdicts.append(json.loads(result.out))
    assert [(a["micro_batches"], a["world_size"], a["num_workers"]) for a in verdicts[1]["attempts"]] == [
        ([0, 8 * PER_STEP], 2, 0),
        ([8 * PER_STEP, 10 * PER_STEP], 1, 1),
        ([10 * PER_STEP, STEPS * PER_STEP], 4, 2),
    ]
    assert verdicts[0]["epochs"] == verdicts[1]["epochs"]
    assert verdicts[0]["epochs"][0] == {
        **{"set": 0, "epochs": [0, 1], "samples": 56, "consumed": 45, "refused": 11},
        **{"to_come": 0, "twice": 0, "missing": 0},
    }

    undisturbed, visits = (
        recorded(run / "ledger", verdict["attempts"], B) for run, verdict in zip(runs, verdicts, strict=True)
    )
    assert visits == undisturbed and list(visits) == list(range(STEPS * PER_STEP))
    epochs = unpack_visits(np.array(list(visits.values())))[1]
    kills = [8 * PER_STEP, 10 * PER_STEP]
    assert 0 in epochs[: kills[0]] and all(1 in part for part in np.split(epochs, kills))

    rows, expected = (read_metrics(run / "metrics.jsonl") for run in (torn, whole))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["images_seen"] == theirs["images_seen"]
    refused = sum(row["refused"] * (row["epochs"][1] - row["epochs"][0] + 1) for row in verdicts[0]["epochs"])
    assert rows[-1]["filtered"] == expected[-1]["filtered"] == {"score <= 3": refused}


def test_a_lost_file_is_told(runs, tmp_path):
    _, torn = runs
    copy = tmp_path / "copy"
    shutil.copytree(torn, copy)
    for path in (copy / "ledger").glob("*/*-000000000064-rank-*"):  # the last write of all ranks
        path.unlink()
    result = darkroom("data", "ledger", copy)
    assert result.code == 2
    assert len(result.error_lines) == 1 and "rank 0: micro-batches 56 to 60 (2) not recorded" in result.error_lines[0]
    shutil.rmtree(copy / "ledger")
    result = darkroom("data", "ledger", copy)
    assert result.code == 2
    assert len(result.error_lines) == 1 and "there is no record of what the run consumed" in result.error_lines[0]


def consume(folder: Path, config: LoaderConfig, rank: int, world_size: int, count: int) -> None:
    """One rank, in a process of its own."""
    loader = build_loader(config, seed=3, micro_batch_size=B, rank=rank, world_size=world_size)
    ledger = Ledger(folder, rank, "only")
    ledger.open(loader, config, 0, world_size)
    for batch in islice(loader, count):
        ledger.add(batch)
    ledger.write(count * world_size)


def test_unequal_shards_on_four_ranks_with_three_workers_each(tmp_path):
    """Streams are unequal, but no rank runs dry: each yields as many micro-batches as any other, and nothing hangs."""
    config = LoaderConfig(
        shards=unequal_shards(tmp_path / "data", (7, 1, 11, 5, 9, 2, 16, 3, 4, 8)),
        image_size=16,
        num_workers=3,
        num_streams=12,
        shuffle_chunk_samples=4,
    )
    count = 48  # micro-batches of each rank: nearly six epochs
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=consume, args=(tmp_path / "run", config, rank, 4, count)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    hanging = [process for process in ranks if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0, 0, 0]
    verdict = check_ledger(tmp_path / "run")
    assert verdict.clean and verdict.micro_batches == 4 * count
    alone = simulate(
        tmp_path / "alone",
        replace(config, num_workers=0),
        [Start(world_size=1, steps=count)],
        micro_batch_size=B,
        per_step=4,
    )
    assert list(recorded(tmp_path / "run", verdict.attempts, B).values()) == alone
