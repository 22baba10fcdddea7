"""The loader on real shards: same batches for any number of ranks and workers, bad samples masked in place."""

import io
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.buckets import BucketConfig
from data.captions import CaptionConfig, CaptionSource
from data.encoded import EncodedBatch
from data.errors import DataError
from data.filters import FilterRule
from data.loader import Batch, LoaderConfig, MixConfig, build_loader, check_stamp, iterate_once
from data.shards import write_shards
from data.streams import Cursor, unpack_visits

COUNT = 40
BAD = {7: "empty caption", 11: "not a readable JPEG, PNG or WebP"}


def picture(number: int, size: tuple[int, int] = (12, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (number, 0, 255)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("shards"))
    samples: list[dict[str, Any]] = []
    for number in range(COUNT):
        image = b"rubbish" if number == 11 else picture(number)
        caption = " \n" if number == 7 else f"caption {number}"
        samples.append({"__key__": f"{number:03d}", "png": image, "txt": caption, "json": {"number": number}})
    write_shards(samples, url, "s", 9)  # five unequal shards
    return url


SIZES = ((16, 8), (8, 16), (32, 32), (24, 12), (9, 9), (64, 30))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three data sets of unequal shards, with pictures of several shapes."""
    urls = []
    for number, count in enumerate((70, 23, 12)):
        urls.append(str(tmp_path_factory.mktemp("mixed")))
        samples = (
            {
                "__key__": f"{n:03d}",
                "png": picture(n, SIZES[n % len(SIZES)]),
                "json": {"caption": f"{n}", "score": n % 5},
            }
            for n in range(count)
        )
        write_shards(samples, urls[-1], f"m{number}", 5 + number)
    return urls


PLAIN = {"image_size": 8, "num_streams": 4, "shuffle_block_shards": 2, "shuffle_chunk_samples": 5}


def load(
    config: LoaderConfig, count: int, *, rank: int = 0, world_size: int = 1, cursor: Cursor | None = None
) -> list[Batch]:
    loader = build_loader(config, seed=5, micro_batch_size=3, rank=rank, world_size=world_size, cursor=cursor)
    return list(islice(loader, count))


def cursor_behind(batches: Iterable[Batch], before: Cursor | None = None) -> Cursor:
    """Where the data stands when these batches, of all ranks in order, were consumed."""
    before = before or Cursor()
    positions = dict(before.positions)
    count = before.micro_batches
    for batch in batches:
        positions[batch.stream] = batch.positions
        count += 1
    return Cursor(micro_batches=count, positions=positions)


def same(one: Batch, two: Batch) -> bool:
    lists = ("keys", "captions", "bad", "metas", "filtered_by", "stream", "positions")
    tensors = ("pixels", "sample_numbers", "weights", "sizes", "crops", "visits", "filtered")
    return all(getattr(one, n) == getattr(two, n) for n in lists) and all(
        torch.equal(getattr(one, n), getattr(two, n)) for n in tensors
    )


def test_batches(shards: str) -> None:
    batches = load(LoaderConfig(shards=shards, **PLAIN), 60)
    visits: Counter[str] = Counter(key for batch in batches for key in batch.keys)
    assert len(visits) == COUNT and max(visits.values()) - min(visits.values()) <= 4  # streams are unequal here
    for number, batch in enumerate(batches):
        images = batch.images()
        assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
        assert batch.sample_numbers.tolist() == [number * 3, number * 3 + 1, number * 3 + 2]
        for place, meta in enumerate(batch.metas):
            original = meta["number"]
            assert batch.keys[place] == f"{original:03d}"
            if original in BAD:
                assert batch.weights[place] == 0 and batch.captions[place] == "" and batch.pixels[place].eq(128).all()
            else:
                assert batch.weights[place] == 1 and batch.captions[place] == f"caption {original}"
                assert torch.allclose(images[place, 0], torch.tensor(original / 127.5 - 1))
                assert batch.sizes[place].tolist() == [12, 8] and batch.crops[place].tolist() == [2, 0, 10, 8]
        expected = [(f"{m['number']:03d}", BAD[m["number"]]) for m in batch.metas if m["number"] in BAD]
        assert [(record["key"], record["reason"]) for record in batch.bad] == expected
        assert all(record["shard"].startswith("s-00000") for record in batch.bad)


RICH = {
    "buckets": BucketConfig(resolutions=(8, 16), multiple=4),
    "filters": (FilterRule(field="score", max=3), FilterRule(field="width", min=9)),
    "captions": CaptionConfig(sources=(CaptionSource(field="caption"),), max_chars=5),
    "crop": "random",
    "window_micro_batches": 7,
}


def rich(mixed: list[str], **changes: Any) -> LoaderConfig:
    mix = tuple(MixConfig(shards=url, weight=weight) for url, weight in zip(mixed, (5, 2, 1), strict=True))
    return LoaderConfig(mix=mix, **{**PLAIN, **RICH, **changes})


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_ranks_workers_and_resumes_change_nothing(shards: str, mixed: list[str], kind: str) -> None:
    def config(workers: int) -> LoaderConfig:
        return (
            rich(mixed, num_workers=workers)
            if kind == "rich"
            else LoaderConfig(shards=shards, num_workers=workers, **PLAIN)
        )

    reference = load(config(0), 60)
    for world_size, workers, first in ((1, 2, 0), (2, 0, 6), (2, 2, 34), (4, 1, 20)):
        cursor = cursor_behind(reference[:first])
        for rank in (0, world_size - 1):
            part = load(config(workers), 6, rank=rank, world_size=world_size, cursor=cursor)
            expected = reference[first + rank :: world_size]
            assert all(same(*both) for both in zip(part, expected, strict=False)) and len(part) == 6


@pytest.mark.parametrize("workers", [0, 2, 5])
def test_stopped_twice_in_an_epoch_and_once_beyond_it(mixed: list[str], workers: int) -> None:
    config = rich(mixed, num_streams=10, num_workers=workers)
    reference = load(rich(mixed, num_streams=10), 54)
    assert {e for batch in reference for e in unpack_visits(batch.visits.numpy())[1]} >= {0, 1}
    cursor, stops = Cursor(), (8, 14, 40, 54)
    for begin, end in zip((0, *stops), stops, strict=False):
        consumed = load(config, end - begin + 2, cursor=cursor)[: end - begin]  # two more were prefetched
        assert all(same(*both) for both in zip(consumed, reference[begin:end], strict=True))
        cursor = cursor_behind(consumed, cursor)


def test_ten_unequal_shards_on_four_ranks_with_three_workers(tmp_path: Path) -> None:
    """More streams than shards: parts of shards are dealt, nobody runs dry, and every epoch is whole."""
    samples = ({"__key__": f"{n:04d}", "png": picture(n), "txt": f"{n}"} for n in range(103))
    write_shards(samples, str(tmp_path), "t", 11)
    config = LoaderConfig(shards=str(tmp_path), num_workers=3, **{**PLAIN, "num_streams": 12})
    steps = 20
    shares = [load(config, steps, rank=rank, world_size=4) for rank in range(4)]
    assert [len(share) for share in shares] == [steps] * 4
    seen = Counter(visit for share in shares for batch in share for visit in batch.visits.tolist())
    assert set(seen.values()) == {1}
    assert len(set(unpack_visits(torch.tensor(list(seen)).numpy())[2])) == 103
    in_turn = load(LoaderConfig(shards=str(tmp_path), **{**PLAIN, "num_streams": 12}), 4 * steps)
    assert all(same(in_turn[4 * n + rank], shares[rank][n]) for rank in range(4) for n in range(steps))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_every_sample_once_per_epoch_across_kills(mixed: list[str], data: st.DataObject) -> None:
    """Random kills and numbers of ranks: the sequence goes on, and each visit is consumed or filtered exactly once."""
    config = rich(mixed, num_streams=data.draw(st.sampled_from([2, 4])))
    cursor, consumed = Cursor(), []
    while len(consumed) < 80:
        world_size = data.draw(st.sampled_from([1, 2]))
        steps = data.draw(st.integers(1, 15))
        lost = data.draw(st.integers(0, 3))  # steps after the last checkpoint
        shares = [load(config, steps + lost, rank=r, world_size=world_size, cursor=cursor) for r in range(world_size)]
        kept = [shares[rank][step] for step in range(steps) for rank in range(world_size)]
        if cursor.micro_batches % world_size == 0:
            cursor = cursor_behind(kept, cursor)
            consumed += kept
        if cursor.micro_batches % 2:
            extra = load(config, 1, cursor=cursor)
            cursor, consumed = cursor_behind(extra, cursor), consumed + extra
    reference = load(config, len(consumed))
    assert all(same(*both) for both in zip(consumed, reference, strict=True))
    visits = Counter(v for batch in consumed for v in [*batch.visits.tolist(), *batch.filtered.tolist()])
    assert set(visits.values()) == {1}


def test_buckets_filters_and_mixing(mixed: list[str]) -> None:
    config = rich(mixed)
    batches = load(config, 7 * 4 * 6)  # six windows of each stream
    shapes = Counter(tuple(batch.pixels.shape[2:]) for batch in batches)
    assert {(8, 8), (16, 16), (12, 20)} <= set(shapes)  # 9 x 9, 32 x 32 and the wide ones
    sets = Counter(int(s) for batch in batches for s in unpack_visits(batch.visits.numpy())[0])
    total = sum(sets.values())
    assert [round(sets[d] / total, 2) for d in range(3)] == pytest.approx([5 / 8, 2 / 8, 1 / 8], abs=0.02)
    kept = [(meta, size) for batch in batches for meta, size in zip(batch.metas, batch.sizes.tolist(), strict=True)]
    assert {meta["score"] for meta, _ in kept} == {0, 1, 2, 3} and min(width for _, (width, _) in kept) == 9
    counts = sum((Counter(batch.filtered_by) for batch in batches), Counter())
    assert set(counts) == {"score <= 3", "width >= 9"}
    assert sum(counts.values()) == sum(len(batch.filtered) for batch in batches)
    for batch in batches:  # the crop has the shape of the pictures, to a pixel of the original
        height, width = batch.pixels.shape[2:]
        for left, top, right, bottom in batch.crops.tolist():
            assert abs((right - left) * height - (bottom - top) * width) <= max(height, width)
    epochs = {
        d: max(e for b in batches for s, e, _ in zip(*unpack_visits(b.visits.numpy()), strict=True) if s == d)
        for d in range(3)
    }
    assert epochs[2] > epochs[0]  # each set counts its own epochs


def test_what_is_damaged_is_reported_and_not_filtered_out(shards: str) -> None:
    """A sample whose size or JSON cannot be read meets no rule; it must not vanish among what the filters refuse."""
    filters = (FilterRule(field="width", min=4), FilterRule(field="number", min=3))
    batches = load(LoaderConfig(shards=shards, filters=filters, **PLAIN), 40)
    assert {record["key"] for batch in batches for record in batch.bad} == {f"{number:03d}" for number in BAD}
    assert {rule for batch in batches for rule in batch.filtered_by} == {"number >= 3"}


KILLED_READER = """
import itertools, multiprocessing, os, signal, sys
from data.encoded import EncodedBatch
from data.loader import LoaderConfig, build_loader
config = LoaderConfig(shards=sys.argv[1], image_size=8, num_streams=4, num_workers=2)
batches = iter(build_loader(config, seed=5, micro_batch_size=3, rank=0, world_size=1))
next(batches)
for child in multiprocessing.active_children():
    os.kill(child.pid, signal.SIGKILL)
for batch in itertools.islice(batches, 1000):
    pass
"""


def test_a_reader_that_dies_is_an_error_and_no_hang(shards: str) -> None:
    """By the text that launch.checks makes one line of; in a process of its own, as torch raises it anywhere."""
    command = [sys.executable, "-c", KILLED_READER, shards]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and "RuntimeError: DataLoader worker" in done.stderr, (done.returncode, done.stderr)


def test_readers_that_would_fill_the_machine_are_announced(shards: str, caplog: pytest.LogCaptureFixture) -> None:
    load(LoaderConfig(shards=shards, **PLAIN), 1)
    assert "GiB" not in caplog.text
    with mock.patch("os.sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 9000}[name]):
        load(LoaderConfig(shards=shards, **PLAIN), 1)
    assert "lower data.shuffle_chunk_samples" in caplog.text


def test_filters_that_keep_nothing_are_an_error(mixed: list[str]) -> None:
    config = LoaderConfig(shards=mixed[0], filters=(FilterRule(field="score", min=9),), **PLAIN)
    with pytest.raises(DataError, match="refused 10001 samples in a row.*'score >= 9'.*loosen"):
        load(config, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_ends_the_run_with_one_line(shards: str, tmp_path: Path, workers: int) -> None:
    for file in Path(shards).iterdir():
        if file.name != "s-000003.tar":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"s-000003.tar: no such file") as caught:
        load(LoaderConfig(shards=str(tmp_path), num_workers=workers, **PLAIN), 30)
    assert "\n" not in str(caught.value)


def test_mistakes_are_refused_before_reading(shards: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="num_workers to one of 0, 1, 2"):
        load(LoaderConfig(shards=shards, num_workers=3, **PLAIN), 1, world_size=2)
    with pytest.raises(DataError, match="cannot resume at micro-batch 3"):
        load(LoaderConfig(shards=shards, **PLAIN), 1, world_size=2, cursor=Cursor(micro_batches=3))
    with pytest.raises(DataError, match="darkroom data index"):
        load(LoaderConfig(shards=str(tmp_path), **PLAIN), 1)
    with pytest.raises(DataError, match="too short to mix 2"):
        mix = (MixConfig(shards=shards), MixConfig(shards=shards))
        load(LoaderConfig(mix=mix, window_micro_batches=1, **PLAIN), 1)
    with pytest.raises(ValueError, match="max_bad_fraction=2"):
        LoaderConfig(shards=shards, max_bad_fraction=2, **PLAIN)
    with pytest.raises(ValueError, match="num_workers=-1"):
        LoaderConfig(shards=shards, num_workers=-1, **PLAIN)
    with pytest.raises(ValueError, match="either shards"):
        LoaderConfig(**PLAIN)
    with pytest.raises(ValueError, match="either shards"):
        LoaderConfig(shards=shards, mix=(MixConfig(shards=shards),), **PLAIN)
    with pytest.raises(ValueError, match="weight=0"):
        MixConfig(shards=shards, weight=0)


def test_the_stamp_tells_another_order(shards: str) -> None:
    config = LoaderConfig(shards=shards, filters=(FilterRule(field="number", one_of=(1, 2)),), **PLAIN)
    place = {"rank": 0, "world_size": 1}
    stamps = [build_loader(config, seed=seed, micro_batch_size=3, **place).stamp for seed in (0, 0, 1)]
    import json

    check_stamp(json.loads(json.dumps(stamps[0])), stamps[1])
    with pytest.raises(DataError, match="seed is 1, the checkpoint was made with 0"):
        check_stamp(stamps[0], stamps[2])


def test_iterate_once(shards: str, caplog: pytest.LogCaptureFixture) -> None:
    found = list(iterate_once(shards, 8))
    assert [meta["number"] for _, _, _, meta in found] == [n for n in range(COUNT) if n not in BAD]
    assert found[0][1].shape == (3, 8, 8) and found[3][2] == "caption 3"
    assert [reason in caplog.text for reason in BAD.values()] == [True, True]
    assert len(list(iterate_once(shards, 8, limit=5))) == 5 and not list(iterate_once(shards, 8, limit=0))


def test_every_tensor_of_a_batch_is_pinned(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be page-locked; a copy stands in and shows that no tensor was forgotten or mixed up."""
    batch = next(
        iter(build_loader(LoaderConfig(shards=shards, **PLAIN), seed=0, micro_batch_size=3, rank=0, world_size=1))
    )
    numbers = torch.arange(12.0)
    batch.encoded = EncodedBatch(
        moments=numbers, tokens={"a": numbers + 1}, scales={}, masks={"a": numbers > 3}, pooled={"a": numbers + 2}
    )
    before = vars(batch) | vars(batch.encoded)
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append(tensor) or tensor.clone())
    pinned = batch.pin_memory()
    after = vars(pinned) | vars(pinned.encoded)
    assert before.keys() == after.keys()
    tensors = [name for name, value in before.items() if isinstance(value, torch.Tensor)]
    assert len(seen) == len(tensors) + 3
    for name, value in before.items():
        if name == "encoded":
            continue
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]) and value.data_ptr() != after[name].data_ptr() or not value.numel()
        elif isinstance(value, dict) and name in ("tokens", "masks", "pooled"):
            assert torch.equal(value["a"], after[name]["a"]) and value["a"].data_ptr() != after[name]["a"].data_ptr()
        else:
            assert value == after[name]
