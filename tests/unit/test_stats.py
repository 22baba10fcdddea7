"""`data stats`: every number against a slow count, a set on disk, and the files that are written."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.buckets import BucketConfig, Size, assign_buckets, group_window, make_buckets
from data.encoded import EncodedSample, EncoderShape, Encoding, pack_sample
from data.errors import DataError
from data.shards import write_shards
from data.size_counts import WINDOW_MICRO_BATCHES, SizeCounts
from data.stats import measure, parse_buckets, stats_text
from launch import cli

BUCKETS = make_buckets(64, BucketConfig(resolutions=(32, 64), multiple=16))
SIZES = st.tuples(st.integers(0, 150), st.integers(0, 150))


def _counted(parts: list[list[Size]], buckets: tuple[Size, ...], micro_batch_size: int) -> dict[str, Any]:
    counts = SizeCounts(buckets, micro_batch_size)
    for part in parts:
        counts.add(np.array(part, np.int64).reshape(-1, 2))
    return counts.facts()


# --- sizes and buckets --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(SIZES, max_size=200), max_size=4), st.integers(1, 3), st.booleans())
def test_sizes_are_counted_as_by_hand(parts: list[list[Size]], micro_batch_size: int, encoded: bool) -> None:
    facts = _counted(parts, () if encoded else BUCKETS, micro_batch_size)
    sizes = [size for part in parts for size in part if min(size) > 0]
    own = sizes if encoded or not sizes else [BUCKETS[n] for n in assign_buckets(*np.array(sizes).T, BUCKETS)]
    window = WINDOW_MICRO_BATCHES * micro_batch_size
    moved: Counter[Size] = Counter()
    grouped: Counter[Size] = Counter()
    for first in range(0, len(own), window):
        members_own = own[first : first + window]
        members_own = members_own[: len(members_own) // micro_batch_size * micro_batch_size]
        grouped.update(members_own)
        for shape, places in group_window(members_own, micro_batch_size, fixed=encoded):
            moved.update(members_own[place] for place in places if members_own[place] != shape)

    assert facts["unreadable_images"] == sum(min(size) == 0 for part in parts for size in part)
    assert sum(row["samples"] for row in facts["short_side_px"]) == len(sizes)
    for row in facts["short_side_px"]:
        assert row["samples"] == sum(row["from"] <= min(size) < (row["below"] or 1e9) for size in sizes)
    for row in facts["aspect_ratio"]:
        assert row["samples"] == sum(row["from"] <= w / h < (row["below"] or 1e9) for w, h in sizes)
    fill = {(row["width"], row["height"]): row for row in facts["buckets"]["fill"]}
    assert encoded or tuple(fill) == BUCKETS
    assert {size: row["samples"] for size, row in fill.items() if row["samples"]} == Counter(own)
    for size, row in fill.items():
        mine = [picture for picture, bucket in zip(sizes, own, strict=True) if bucket == size]
        kept = [min(w * size[1] / (h * size[0]), h * size[0] / (w * size[1])) for w, h in mine]
        assert row["kept_area"] == (pytest.approx(np.mean(kept)) if mine else None)
        enlarged = [w < size[0] or h < size[1] for w, h in mine]
        assert row["enlarged_share"] == (pytest.approx(np.mean(enlarged)) if mine else None)
        expected = moved[size] / grouped[size] if grouped[size] else None
        assert row["moved_share"] == (expected if expected is None else pytest.approx(expected))


def test_what_a_move_keeps_of_pictures_and_of_latents() -> None:
    # Two groups of two fit; the odd 32 x 32 and 64 x 64 share one.
    sizes = [(64, 64), (32, 32), (64, 64), (32, 32), (64, 64), (32, 32)]
    fill = _counted([sizes], ((32, 32), (64, 64)), 2)["buckets"]
    assert fill["moved_share"] == pytest.approx(1 / 6) and fill["moved_kept_area"] == 1.0  # scaled down, nothing cut
    assert [row["moved_share"] for row in fill["fill"]] == [0.0, pytest.approx(1 / 3)]
    fill = _counted([sizes], (), 2)["buckets"]
    assert fill["moved_share"] == pytest.approx(1 / 6) and fill["moved_kept_area"] == 0.25


def test_memory_holds_one_window() -> None:
    counts = SizeCounts(BUCKETS, 2)
    for _ in range(5):
        counts.add(np.full((1000, 2), 64))
        assert len(counts._waiting) < WINDOW_MICRO_BATCHES * 2


def test_buckets_of_a_command_line() -> None:
    assert parse_buckets(64, "", 2.0, 64) == ((64, 64),)
    assert parse_buckets(0, "32, 64", 2.0, 16) == BUCKETS
    for resolutions, words in (
        ("256,wide", "commas"),
        ("64,,128", "commas"),
        ("250", "no multiple"),
        ("64,64", "twice"),
    ):
        with pytest.raises(DataError, match=words):
            parse_buckets(64, resolutions, 2.0, 64)


# --- a set on disk ------------------------------------------------------------------------------------------------


def _png(size: Size) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six shards of two: widths 32 … 43; the captions of shard s have s + 1 words; one picture is broken."""
    url = str(tmp_path_factory.mktemp("stats") / "set")
    samples: list[dict[str, Any]] = []
    for number in range(12):
        words = " ".join(["four"] * (number // 2 + 1))
        sample = {"__key__": f"k{number:02d}", "png": _png((32 + number, 32)) if number != 3 else b"broken"}
        sample |= {"txt": words} if number % 2 else {"json": {"captions": [words, words + "!", "", words]}}
        samples.append(sample)
    samples[6] |= {"json": {"captions": []}}
    write_shards(samples, url, "s", 2)
    return url


def test_a_set_is_measured(shards: str) -> None:
    facts = measure(shards, buckets=BUCKETS, micro_batch_size=2, captions_from=2)
    assert (facts["samples"], facts["shards"], facts["unreadable_images"], facts["encoded"]) == (12, 6, 1, False)
    assert facts["short_side_px"] == [{"from": 32, "below": 64, "samples": 11}]
    captions = facts["captions"]
    # Shards 1 and 4 of 0 … 5; each distinct caption of a sample counts once: "four four", "four four!", "four four".
    assert (captions["shards"], captions["samples"], captions["captions"], captions["without_caption"]) == (2, 4, 6, 0)
    assert captions["words"] == {"median": 2, "percentile_95": 5, "longest": 5}
    assert captions["characters"] == {"median": 10, "percentile_95": 25, "longest": 25}
    assert (
        sum(row["words"] for row in captions["lengths"]) == sum(row["characters"] for row in captions["lengths"]) == 6
    )
    assert captions["lengths"][0] == {"from": 2, "below": 4, "characters": 0, "words": 3}
    assert measure(shards, buckets=BUCKETS, captions_from=100)["captions"]["shards"] == 6
    assert measure(shards, buckets=BUCKETS, captions_from=100)["captions"]["without_caption"] == 1


def test_a_set_may_be_measured_without_captions(shards: str, tmp_path: Path) -> None:
    facts = measure(shards, buckets=BUCKETS, captions_from=0, out=str(tmp_path))
    assert (tmp_path / "stats.png").stat().st_size > 10_000
    assert facts["captions"]["captions"] == 0 and facts["captions"]["lengths"] == []
    assert "0 of 6 shards" in stats_text(facts)
    # Eleven samples fill no micro-batch of 32.
    assert facts["buckets"]["moved_share"] is None and facts["buckets"]["fill"][0]["samples"] == 11


def test_an_encoded_set_has_its_own_buckets_and_captions(tmp_path: Path) -> None:
    encoding = Encoding(
        autoencoder="a",
        text_encoders="t",
        latents="moments",
        text_padding="masked",
        text_dtype="bfloat16",
        channels=1,
        downsampling=8,
        encoders={"clip": EncoderShape(width=2, pooled=0, max_tokens=8)},
        source="s",
        sizes=[[32, 64], [64, 64]],
        settings={},
    )
    samples = []
    for number, (width, height) in enumerate([(32, 64), (64, 64), (32, 64), (64, 64), (32, 64), (64, 64)]):
        sample = EncodedSample(
            moments=np.zeros((2, height // 8, width // 8), np.uint16),
            captions=[("one", 1.0), ("two words", 1.0)],
            tokens={"clip": np.zeros((3, 2), np.uint16)},
            scales={},
            lengths={"clip": [1, 2]},
            pooled={},
            size=(width, height),
            box=(0, 0, width, height),
            width=width,
            height=height,
            meta={},
        )
        samples.append({"__key__": f"k{number}", "safetensors": pack_sample(sample)})
    write_shards(samples, str(tmp_path), "s", 4, encoding.to_dict())
    facts = measure(str(tmp_path), buckets=BUCKETS, micro_batch_size=2)
    fill = facts["buckets"]
    assert facts["encoded"] and [(row["width"], row["height"]) for row in fill["fill"]] == [(32, 64), (64, 64)]
    # One 64 x 64 of three finds no partner of its own shape and is cut in half.
    assert [row["moved_share"] for row in fill["fill"]] == [0.0, pytest.approx(1 / 3)]
    assert fill["moved_kept_area"] == 0.5 and fill["kept_area"] == 1.0
    assert facts["captions"]["captions"] == 12 and facts["captions"]["words"]["longest"] == 2
    assert "6 encoded samples in 2 shards" in stats_text(facts)


def test_impossible_numbers_are_refused(shards: str) -> None:
    for name, value in (("micro_batch_size", 0), ("captions_from", -1)):
        with pytest.raises(DataError, match=f"{name}={value}: .*at least"):
            measure(shards, buckets=BUCKETS, **{name: value})


def test_files_are_written_once(shards: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "stats"
    facts = measure(shards, buckets=BUCKETS, micro_batch_size=2, out=str(out))
    assert json.loads((out / "stats.json").read_text()) == facts
    with Image.open(out / "stats.png") as picture:
        assert picture.size == (1200, 900) and picture.format == "PNG"
    (out / "stats.json").unlink()
    with pytest.raises(DataError, match=r"stats\.png: is there already"):
        measure(str(tmp_path / "no set is read"), buckets=BUCKETS, out=str(out))
    with pytest.raises(DataError, match="local folder"):
        measure(shards, buckets=BUCKETS, out="s3://bucket/stats")
    with pytest.raises(DataError, match="is a file"):
        measure(shards, buckets=BUCKETS, out=str(out / "stats.png"))


def test_the_command_prints_tables_or_json(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["darkroom", "data", "stats", shards, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    options = ("--resolutions", "32,64", "--multiple", "16", "--micro-batch-size", "2")
    code, out, _ = run(*options, "--out", str(tmp_path))
    assert code == 0 and (tmp_path / "stats.png").is_file()
    lines = [line.split() for line in out.splitlines()]
    assert ["32–63", "11", "100.0", "%"] in lines and ["words", "3", "6", "6"] in lines
    assert [line for line in lines if line[:2] == ["32x32", "11"]]
    code, out, _ = run(*options, "--json")
    assert code == 0 and json.loads(out)["samples"] == 12
    code, _, err = run("--resolutions", "33", "--multiple", "16")
    assert code == 2 and len(err.splitlines()) == 1 and "no multiple" in err
