"""Shards and their index: what is written comes back, and no damaged tar passes for a good one."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.shards import build_index, describe, load_index, load_rows, read_shard, verify, write_shards


def png(value: int = 0, size: tuple[int, int] = (4, 3)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def samples(count: int) -> list[dict[str, Any]]:
    return [{"__key__": f"k{n:03d}", "png": png(n), "txt": f"caption {n}", "json": {"n": n}} for n in range(count)]


Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, **kwargs: Any) -> None:
    with tarfile.open(path, "w", **kwargs) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pair(key: str) -> Members:
    return [(f"{key}.jpg", png()), (f"{key}.txt", b"a caption")]


def test_written_shards_come_back(tmp_path: Path) -> None:
    index = write_shards(samples(10), str(tmp_path), "s", 4)
    assert load_index(str(tmp_path)) == index
    assert [(s.name, s.samples) for s in index.shards] == [
        ("s-000000.tar", 4),
        ("s-000001.tar", 4),
        ("s-000002.tar", 2),
    ]
    found = [sample for number in range(3) for sample in read_shard(index, number)]
    assert [(s.key, s.image, s.text, s.meta) for s in found] == [
        (s["__key__"], s["png"], s["txt"], s["json"]) for s in samples(10)
    ]
    assert verify(str(tmp_path)) == []
    summary = describe(str(tmp_path), num_captions=2)
    assert summary["samples"] == 10 and summary["sizes"] == {"4x3": 10}
    assert summary["captions"] == ["caption 0", "caption 1"]


def test_the_sidecar_says_where_samples_lie(tmp_path: Path) -> None:
    index = write_shards(samples(3), str(tmp_path), "s", 3)
    rows = load_rows(index, 0)
    data = (tmp_path / "s-000000.tar").read_bytes()
    for number, (offset, length) in enumerate(zip(rows.offsets, rows.lengths, strict=True)):
        with tarfile.open(fileobj=io.BytesIO(data[offset : offset + length] + bytes(1024))) as tar:
            assert tar.getnames() == [f"k{number:03d}.json", f"k{number:03d}.png", f"k{number:03d}.txt"]
    assert rows.widths == [4] * 3 and rows.heights == [3] * 3


def test_webdataset_reads_our_shards_and_we_read_those_of_others(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset
    from webdataset.writer import TarWriter

    write_shards(samples(5), str(tmp_path / "ours"), "s", 5)
    ours = list(WebDataset(str(tmp_path / "ours" / "s-000000.tar"), shardshuffle=False))
    assert [(s["__key__"], s["txt"]) for s in ours] == [(f"k{n:03d}", f"caption {n}".encode()) for n in range(5)]
    (tmp_path / "theirs").mkdir()
    with TarWriter(str(tmp_path / "theirs" / "00000.tar")) as writer:
        for sample in samples(3):
            writer.write(sample)
    write_tar(tmp_path / "theirs" / "00001.tar", [*pair("./dir.x/a"), *pair("./dir.x/b")], format=tarfile.PAX_FORMAT)
    (tmp_path / "theirs" / "00000_stats.json").write_text("{}")
    index = build_index(str(tmp_path / "theirs"))
    assert index.num_samples == 5 and [s.key for s in read_shard(index, 1)] == ["./dir.x/a", "./dir.x/b"]


def test_same_samples_same_bytes_and_nothing_is_overwritten(tmp_path: Path) -> None:
    first = write_shards(samples(3), str(tmp_path / "a"), "s", 2)
    second = write_shards(samples(3), str(tmp_path / "b"), "s", 2)
    assert first.fingerprint == second.fingerprint
    with pytest.raises(DataError, match="already holds a data set"):
        write_shards(samples(3), str(tmp_path / "a"), "s", 2)
    with pytest.raises(DataError, match="exists already"):
        build_index(str(tmp_path / "a"))
    (tmp_path / "a" / "index.json").unlink()
    with pytest.raises(DataError, match="shards without index.json"):
        write_shards(samples(3), str(tmp_path / "a"), "s", 2)
    assert build_index(str(tmp_path / "a")).fingerprint == first.fingerprint
    with pytest.raises(DataError, match="no samples"):
        write_shards([], str(tmp_path / "c"), "s", 2)


BAD_MEMBERS: dict[str, tuple[Members, str]] = {
    "apart": ([*pair("a"), *pair("b"), ("a.json", b"{}")], "'a.json' is apart from .* sort the tar"),
    "twice": ([("a.jpg", png()), ("a.jpg", png()), ("a.txt", b"x")], "'a.jpg' is there twice"),
    "no text": ([("a.jpg", png())], "'a' has no caption"),
    "no image": ([("a.txt", b"x")], "'a' has no image"),
    "two images": ([("a.jpg", png()), ("a.png", png()), ("a.txt", b"x")], "several images"),
    "pickle": ([*pair("a"), ("a.pkl", b"x")], "'a.pkl' has the extension 'pkl'"),
    "dot": ([("1.0.jpg", png()), ("1.0.txt", b"x")], "no dot in the key"),
    "climbing": (pair("../a"), "unsafe name"),
    "absolute": (pair("/a"), "unsafe name"),
    "meta": (pair("__a__/x"), "unsafe name"),
    "control": (pair("a\nb"), "unsafe name"),
    "empty": ([], "no tar|holds no sample"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_members_are_refused_by_name(tmp_path: Path, case: str) -> None:
    members, message = BAD_MEMBERS[case]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message) as caught:
        build_index(str(tmp_path))
    assert f"{tmp_path}/x.tar: " in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "index.json").exists()


def test_links_and_huge_members_are_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 1 << 40
    for info, message in ((link, "is a link"), (huge, "claims 1099511627776 bytes")):
        (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(10240))
        with pytest.raises(DataError, match=message):
            build_index(str(tmp_path))


DAMAGES: dict[str, tuple[Callable[[bytes, list[int]], bytes], str]] = {
    "between samples": (lambda data, ends: data[: ends[1]], "end-of-archive mark is missing"),
    "between members": (lambda data, ends: data[: ends[0]], "no caption"),
    "inside a member": (lambda data, ends: data[: ends[1] - 300], "cut short or damaged"),
    "half a mark": (lambda data, ends: data[: ends[-1] + 512], "end-of-archive mark is missing"),
    "two tars": (lambda data, ends: data + data, "data after the end"),
    "gzip": (lambda data, ends: gzip.compress(data), "compressed with gzip"),
    "HTML": (lambda data, ends: b"<html>error</html>" * 100, "no tar"),
    "nothing": (lambda data, ends: b"", "empty file"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_tar_is_refused(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    path = tmp_path / "x.tar"
    write_tar(path, pair("a") + pair("b"))
    with tarfile.open(path) as tar:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in tar.getmembers()]
    path.write_bytes(damage(path.read_bytes(), ends))
    with pytest.raises(DataError, match=message) as caught:
        build_index(str(tmp_path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_reading_notices_what_changed_after_indexing(tmp_path: Path) -> None:
    index = write_shards(samples(6), str(tmp_path), "s", 3)
    path = tmp_path / "s-000001.tar"
    good = path.read_bytes()
    path.write_bytes(good[:5120])
    with pytest.raises(DataError, match=f"s-000001.tar: has 5120 bytes, the index says {len(good)}"):
        list(read_shard(index, 1))
    assert any("s-000001.tar" in problem for problem in verify(str(tmp_path)))
    path.write_bytes((tmp_path / "s-000000.tar").read_bytes())  # same size, other samples
    with pytest.raises(DataError, match="sample 0 is 'k000', the index says 'k003'"):
        list(read_shard(index, 1))
    flipped = bytearray(good)
    flipped[600] ^= 1
    path.write_bytes(flipped)
    assert len(verify(str(tmp_path))) == 1
    path.unlink()
    with pytest.raises(DataError, match=r"s-000001.tar: no such file"):
        list(read_shard(index, 1))
    path.write_bytes(good)
    write_tar(tmp_path / "stray.tar", pair("z"))
    assert verify(str(tmp_path)) == [f"{tmp_path}/stray.tar: not in the index"]


def test_a_missing_or_edited_index_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="darkroom data index"):
        load_index(str(tmp_path))
    write_shards(samples(2), str(tmp_path), "s", 2)
    path = tmp_path / "index.json"
    fields = json.loads(path.read_text())
    for text, message in (
        ("{", "damaged"),
        (json.dumps({**fields, "format_version": 9}), "format 9"),
        (json.dumps({**fields, "shards": [{**fields["shards"][0], "samples": 3}]}), "was edited"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            load_index(str(tmp_path))
    path.write_text(json.dumps(fields))
    (tmp_path / "s-000000.idx.json").unlink()
    with pytest.raises(DataError, match=r"s-000000.idx.json: no such file"):
        list(read_shard(load_index(str(tmp_path)), 0))


def test_unreadable_texts_and_images_stay_single_problems(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "x.tar",
        [
            ("a.jpg", b"rubbish"),
            ("a.txt", b"\xff"),
            ("b.jpg", png()),
            ("b.json", b"[1]"),
            ("c.jpg", png()),
            ("c.txt", b""),
        ],
    )
    index = build_index(str(tmp_path))
    problems = [sample.problem for sample in read_shard(index, 0)]
    assert problems == ["the caption is not UTF-8", "the .json is not a JSON object", None]
    assert describe(str(tmp_path))["unreadable_images"] == 1


def test_random_bytes_never_escape_as_another_exception(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "x.tar"
    write_tar(path, pair("a") + pair("b"))
    good = path.read_bytes()
    for _ in range(60):
        data = bytearray(good)
        for position in rng.integers(0, 2048, 4):
            data[position] = rng.integers(256)
        path.write_bytes(data)
        try:
            build_index(str(tmp_path))
        except DataError:
            continue
        for file in tmp_path.glob("*.json"):
            file.unlink()
