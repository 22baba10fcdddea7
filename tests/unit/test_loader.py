"""The loader on real shards: same batches for any number of ranks and workers, bad samples masked in place."""

import io
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.errors import DataError
from data.loader import Batch, LoaderConfig, build_loader, check_stamp, iterate_once
from data.shards import write_shards

COUNT = 40
BAD = {7: "empty caption", 11: "not a readable JPEG, PNG or WebP"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("shards"))
    samples: list[dict[str, Any]] = []
    for number in range(COUNT):
        out = io.BytesIO()
        Image.new("RGB", (12, 8), (number, 0, 255)).save(out, "PNG")
        image = b"rubbish" if number == 11 else out.getvalue()
        caption = " \n" if number == 7 else f"caption {number}"
        samples.append({"__key__": f"{number:03d}", "png": image, "txt": caption, "json": {"number": number}})
    write_shards(samples, url, "s", 9)  # five unequal shards
    return url


def load(
    shards: str, count: int, *, workers: int = 0, rank: int = 0, world_size: int = 1, first: int = 0
) -> list[Batch]:
    config = LoaderConfig(shards=shards, image_size=8, num_workers=workers, num_streams=4, shuffle_block_shards=2)
    place = {"rank": rank, "world_size": world_size, "first_micro_batch": first}
    return list(islice(build_loader(config, seed=5, micro_batch_size=3, **place), count))


def test_batches(shards: str) -> None:
    batches = load(shards, 60)
    visits: Counter[str] = Counter(key for batch in batches for key in batch.keys)
    assert len(visits) == COUNT and max(visits.values()) - min(visits.values()) <= 4  # streams are unequal here
    for number, batch in enumerate(batches):
        assert batch.images.shape == (3, 3, 8, 8) and batch.images.dtype == torch.float32
        assert batch.sample_numbers.tolist() == [number * 3, number * 3 + 1, number * 3 + 2]
        for place, meta in enumerate(batch.metas):
            original = meta["number"]
            assert batch.keys[place] == f"{original:03d}"
            if original in BAD:
                assert batch.weights[place] == 0 and batch.captions[place] == "" and batch.images[place].eq(0).all()
            else:
                assert batch.weights[place] == 1 and batch.captions[place] == f"caption {original}"
                assert torch.allclose(batch.images[place, 0], torch.tensor(original / 127.5 - 1))
        expected = [(f"{m['number']:03d}", BAD[m["number"]]) for m in batch.metas if m["number"] in BAD]
        assert [(record["key"], record["reason"]) for record in batch.bad] == expected
        assert all(record["shard"].startswith("s-00000") for record in batch.bad)


def same(one: Batch, two: Batch) -> bool:
    lists = (one.keys, one.captions, one.bad, one.metas) == (two.keys, two.captions, two.bad, two.metas)
    return lists and all(torch.equal(getattr(one, n), getattr(two, n)) for n in ("images", "sample_numbers", "weights"))


def test_ranks_workers_and_resumes_change_nothing(shards: str) -> None:
    reference = load(shards, 44)
    for world_size, workers, first in ((1, 2, 0), (2, 0, 6), (2, 2, 14), (4, 1, 20)):
        for rank in (0, world_size - 1):
            part = load(shards, 6, workers=workers, rank=rank, world_size=world_size, first=first)
            expected = reference[first + rank :: world_size]
            assert all(same(*both) for both in zip(part, expected, strict=False)) and len(part) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_ends_the_run_with_one_line(shards: str, tmp_path: Path, workers: int) -> None:
    for file in Path(shards).iterdir():
        if file.name != "s-000003.tar":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"s-000003.tar: no such file") as caught:
        load(str(tmp_path), 30, workers=workers)
    assert "\n" not in str(caught.value)


def test_mistakes_are_refused_before_reading(shards: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="num_workers to one of 0, 1, 2"):
        load(shards, 1, workers=3, world_size=2)
    with pytest.raises(DataError, match="cannot resume at micro-batch 3"):
        load(shards, 1, world_size=2, first=3)
    with pytest.raises(DataError, match="darkroom data index"):
        load(str(tmp_path), 1)
    with pytest.raises(ValueError, match="max_bad_fraction=2"):
        LoaderConfig(shards=shards, image_size=8, max_bad_fraction=2)
    with pytest.raises(ValueError, match="num_workers=-1"):
        LoaderConfig(shards=shards, image_size=8, num_workers=-1)


def test_the_stamp_tells_another_order(shards: str) -> None:
    config = LoaderConfig(shards=shards, image_size=8, num_streams=4)
    place = {"rank": 0, "world_size": 1, "first_micro_batch": 0}
    stamps = [build_loader(config, seed=seed, micro_batch_size=3, **place).stamp for seed in (0, 0, 1)]
    check_stamp(stamps[0], stamps[1])
    with pytest.raises(DataError, match="seed is 1, the checkpoint was made with 0"):
        check_stamp(stamps[0], stamps[2])


def test_iterate_once(shards: str, caplog: pytest.LogCaptureFixture) -> None:
    found = list(iterate_once(shards, 8))
    assert [meta["number"] for _, _, _, meta in found] == [n for n in range(COUNT) if n not in BAD]
    assert found[0][1].shape == (3, 8, 8) and found[3][2] == "caption 3"
    assert [reason in caplog.text for reason in BAD.values()] == [True, True]
    assert len(list(iterate_once(shards, 8, limit=5))) == 5 and not list(iterate_once(shards, 8, limit=0))
