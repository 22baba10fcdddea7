"""Shards made to do harm, or broken: refused by name when indexed and when read, in bounded memory."""

import bz2
import gzip
import io
import json
import os
import pickle
import sys
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DataError
from data.shards import build_index, load_index, load_rows, read_rows, read_shard, write_shards
from data.tar_members import MAX_TEXT_BYTES
from tests.helpers.tars import (
    Members,
    blob,
    encoded,
    header,
    pair,
    pax,
    png,
    samples,
    tar_bytes,
    with_size_field,
    write_tar,
)

END = bytes(10240)
MEMORY_BYTES = 8 << 20  # more than any of these tars may make us take


@contextmanager
def bounded_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


def refused(folder: Path, message: str) -> str:
    """Indexes `folder`, which holds x.tar, and returns the one line that it is refused with."""
    with bounded_memory(), pytest.raises(DataError, match=message) as caught:
        build_index(str(folder))
    text = str(caught.value)
    assert text.startswith(f"{folder}/x.tar: ") and "\n" not in text
    assert not (folder / "index.json").exists()
    return text


def refused_when_read(folder: Path, data: bytes, message: str) -> None:
    """Indexes a good x.tar, puts `data` of the same size in its place, and reads it."""
    write_tar(folder / "x.tar", [("a.jpg", png()), ("a.txt", b"x" * len(data))])
    size = (folder / "x.tar").stat().st_size
    assert len(data) <= size
    index = build_index(str(folder))
    (folder / "x.tar").write_bytes(data + bytes(size - len(data)))
    for read in (lambda: read_rows(index, 0, 0, 1), lambda: list(read_shard(index, 0))):
        with bounded_memory(), pytest.raises(DataError, match=message) as caught:
            read()
        assert str(caught.value).startswith(f"{folder}/x.tar: ") and "\n" not in str(caught.value)


BAD_MEMBERS: dict[str, tuple[Members, str]] = {
    "apart": ([*pair("a"), *pair("b"), ("a.json", b"{}")], "'a.json' is apart from .* sort the tar"),
    "twice": ([("a.jpg", png()), ("a.jpg", png()), ("a.txt", b"x")], "'a.jpg' is there twice"),
    "twice, in capitals": ([("a.jpg", png()), ("a.JPG", png()), ("a.txt", b"x")], "'a.JPG' is there twice"),
    "no text": ([("a.jpg", png())], "'a' has no caption"),
    "no image": ([("a.txt", b"x")], "'a' has no image"),
    "two images": ([("a.jpg", png()), ("a.png", png()), ("a.txt", b"x")], "several images"),
    "no extension": ([*pair("a"), ("b", b"x")], "'b' has the extension ''"),
    "dot": ([("1.0.jpg", png()), ("1.0.txt", b"x")], "no dot in the key"),
    "climbing": (pair("../a"), "unsafe name"),
    "climbing inside": (pair("a/../../b"), "unsafe name"),
    "absolute": (pair("/a"), "unsafe name"),
    "backslash": (pair("..\\a"), "unsafe name"),
    "meta": (pair("__a__/x"), "unsafe name"),
    "control": (pair("a\nb"), "unsafe name"),
    "no UTF-8": (pair("a\udcff"), "unsafe name"),
    "only an extension": ([("f/.jpg", png())], "unsafe name"),
    "long text": (
        [("a.jpg", png()), ("a.txt", bytes(MAX_TEXT_BYTES + 1))],
        "claims 4194305 bytes; the limit is 419430",
    ),
    "no member": ([], "holds no sample"),
    "folders alone": ([("f/", b"")], "holds no sample"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_members_are_refused_by_name(tmp_path: Path, case: str) -> None:
    members, message = BAD_MEMBERS[case]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message) as caught:
        build_index(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/x.tar: ") and "\n" not in str(caught.value)
    assert not (tmp_path / "index.json").exists()


KINDS = {
    "hard link": header("a.jpg", kind=tarfile.LNKTYPE, linkname="b"),
    "symbolic link": header("a.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "link with a long target": header("a.jpg", kind=tarfile.SYMTYPE, linkname="../" * 80),
    "character device": header("a.jpg", kind=tarfile.CHRTYPE),
    "block device": header("a.jpg", kind=tarfile.BLKTYPE),
    "pipe": header("a.jpg", kind=tarfile.FIFOTYPE),
    "sparse": header("a.jpg", kind=tarfile.GNUTYPE_SPARSE),
    "sparse by records": pax({"GNU.sparse.size": "1099511627776", "GNU.sparse.map": "0,512"}, header("a.jpg", 512)),
    "several volumes": header("a.jpg", kind=b"M"),
    "global header": pax({"path": "b.jpg"}, header("a.jpg"), kind=tarfile.XGLTYPE),
}


@pytest.mark.parametrize("case", KINDS)
def test_nothing_but_plain_files_is_let_in(tmp_path: Path, case: str) -> None:
    (tmp_path / "x.tar").write_bytes(KINDS[case] + END)
    refused(tmp_path, "is a link, a device, sparse or a global header; shards hold plain files only")


@pytest.mark.parametrize("case", KINDS)
def test_nothing_but_plain_files_is_read(tmp_path: Path, case: str) -> None:
    refused_when_read(tmp_path, KINDS[case], "is a link, a device, sparse or a global header")


def base256(size: int) -> bytes:
    return (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)


SIZES = {
    "1 TiB": (header("a.jpg", 1 << 40), "'a.jpg' claims 1099511627776 bytes; the limit is"),
    "1 TiB by a record": (pax({"size": str(1 << 40)}, header("a.jpg", 5)), "'a.jpg' claims 1099511627776 bytes"),
    "1 TiB of text": (header("a.txt", 1 << 40), "'a.txt' claims 1099511627776 bytes"),
    "all that base-256 holds": (with_size_field(header("a.jpg"), base256((1 << 87) - 1)), "claims 15[0-9]+ bytes"),
    "negative": (with_size_field(header("a.jpg"), base256(-512)), "'a.jpg' claims -512 bytes"),
    "negative octal": (with_size_field(header("a.jpg"), b"-0000001000\0"), "'a.jpg' claims -512 bytes"),
    "negative by a record": (pax({"size": "-512"}, header("a.jpg", 5)), "'a.jpg' claims -512 bytes"),
    "no number": (with_size_field(header("a.jpg"), b"0000000zzzz\0"), "begins with|damaged header"),
    "no number in a record": (pax({"size": "many"}, header("a.jpg", 5)), "no caption|ends inside sample 0, 'a'"),
    "long name of 1 TiB": (header("././@LongLink", 1 << 40, b"L"), "begins with|extended header claims 1099511627776"),
    "long name, negative": (with_size_field(header("@", 0, b"L"), base256(-1)), "begins with|header claims -1 bytes"),
    "records of 1 TiB": (header("x", 1 << 40, b"x"), "begins with|extended header claims 1099511627776"),
    "many long names": ((header("x", 512, b"L") + bytes(512)) * 2000, "begins with|extended header claims"),
    "a record of no length": (
        header("x", 13, b"x") + b"00 mtime=1.5\n".ljust(512, b"\0") + header("a.jpg"),
        "begins with|damaged extended header",
    ),
    "a long name like a time stamp": (
        header("x", 13, b"L") + b"13 mtime=1.5\n".ljust(512, b"\0") + header("a.jpg"),
        "unsafe name|sample 0 is '13 mtime=1'",
    ),
    "a record longer than all": (
        header("x", 20, b"x") + b"999999999 path=b.jpg".ljust(512, b"\0") + header("a.jpg"),
        "unsafe name|sample 0 is 'b', the index says 'a'",
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_absurd_sizes_are_refused_in_bounded_memory(tmp_path: Path, case: str) -> None:
    data, message = SIZES[case]
    (tmp_path / "x.tar").write_bytes(data + END)
    refused(tmp_path, message)


@pytest.mark.parametrize("case", SIZES)
def test_absurd_sizes_are_not_read(tmp_path: Path, case: str) -> None:
    data, message = SIZES[case]
    refused_when_read(tmp_path, data, message)


def zeros(count: int) -> Iterator[bytes]:
    for _ in range(count >> 20):
        yield bytes(1 << 20)


@cache
def bombs() -> dict[str, bytes]:
    """Tars of one picture of 128 MiB, compressed to some 100 kB."""
    whole = [header("a.jpg", 128 << 20), *zeros(128 << 20), END]
    zipped = zlib.compressobj(1, zlib.DEFLATED, 31)
    gz = b"".join([*(zipped.compress(piece) for piece in whole), zipped.flush()])
    return {"gzip": gz, "bzip2": bz2.compress(b"".join(whole)[: 32 << 20], 1)}


@pytest.mark.parametrize("name", ["gzip", "bzip2"])
def test_a_compressed_tar_is_refused_and_not_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(bombs()[name])
    refused(tmp_path, f"compressed with {name}; shards must be plain tars")


@pytest.mark.parametrize("name", ["gzip", "bzip2"])
def test_a_bomb_in_the_place_of_a_shard_is_not_unpacked(tmp_path: Path, name: str) -> None:
    refused_when_read(tmp_path, bombs()[name], "damaged header")


def test_a_tar_that_others_take_for_compressed_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", pair("BZh91AY&SY"))
    refused(tmp_path, "compressed with bzip2")
    write_tar(tmp_path / "x.tar", pair("BZhang"))
    assert build_index(str(tmp_path)).num_samples == 1


class _Plant:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pth", "pickle", "pt", "npy", "cbor", "py", "PKL", "json.pkl"])
def test_no_code_of_a_shard_runs(tmp_path: Path, extension: str) -> None:
    planted = tmp_path / "planted"
    payload = pickle.dumps(_Plant(planted))
    pickle.loads(payload)  # the plant is alive
    planted.rmdir()
    write_tar(tmp_path / "x.tar", [("a.jpg", png()), ("a.txt", bytes(len(payload)))])
    index = build_index(str(tmp_path))
    write_tar(tmp_path / "x.tar", [("a.jpg", png()), (f"a.{extension}", payload)])
    for read in (lambda: read_rows(index, 0, 0, 1), lambda: list(read_shard(index, 0))):
        with pytest.raises(DataError, match=r"x.tar: 'a.* is none of jpg"):
            read()
    for file in tmp_path.glob("*.json"):
        file.unlink()
    refused(tmp_path, f"'a.{extension}' has the extension '{extension.lower()}'")
    assert not planted.exists()


def test_webdataset_is_imported_with_its_pickles_and_commands_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write_shards(samples(1), str(tmp_path), "s", 1)
    for read in (lambda: list(read_shard(index, 0)), lambda: write_shards(samples(1), str(tmp_path / "b"), "s", 1)):
        monkeypatch.setenv("WDS_SECURE", "0")
        for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
            monkeypatch.delitem(sys.modules, name)
        read()
        assert sys.modules["webdataset.utils"].enforce_security is True


DAMAGES: dict[str, tuple[Callable[[bytes, list[int]], bytes], str]] = {
    "between samples": (lambda data, ends: data[: ends[1]], "end-of-archive mark is missing, so the tar was cut short"),
    "between members": (lambda data, ends: data[: ends[0]], "end-of-archive mark is missing, so the tar was cut short"),
    "between members, with a mark": (lambda data, ends: data[: ends[0]] + END, "'a' has no caption"),
    "inside a member": (lambda data, ends: data[: ends[1] - 300], "cut short or damaged after byte 1024"),
    "inside a header": (lambda data, ends: data[: ends[0] + 300], "cut short or damaged after byte 1024"),
    "inside the first header": (lambda data, ends: data[:300], "no tar"),
    "half a mark": (lambda data, ends: data[: ends[-1] + 512], "end-of-archive mark is missing"),
    "two tars": (lambda data, ends: data + data, "data after the end"),
    "two tars without a gap": (lambda data, ends: data[: ends[-1]] + data, "'a.jpg' is apart from"),
    "trailing data": (lambda data, ends: data + b"x", "data after the end"),
    "data behind half a mark": (lambda data, ends: data[: ends[-1] + 512] + b"x" * 512 + END, "data after the end"),
    "gzip": (lambda data, ends: gzip.compress(data), "compressed with gzip"),
    "HTML": (lambda data, ends: b"<html>error</html>" * 100, r"no tar \(it begins with b'<html>error<'\)"),
    "zeros": (lambda data, ends: bytes(len(data)), "holds no sample"),
    "nothing": (lambda data, ends: b"", "empty file"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_tar_is_refused(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    data = tar_bytes(pair("a") + pair("b"))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in tar.getmembers()]
    (tmp_path / "x.tar").write_bytes(damage(data, ends))
    refused(tmp_path, message)


def test_random_bytes_never_escape_as_another_exception(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "x.tar"
    goods = [
        tar_bytes(pair("a" * 120) + pair("b"), mtime=1.5, format=f) for f in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    ]
    for turn in range(120):
        data = bytearray(goods[turn % 2])
        for position in rng.integers(0, 4096, 4):
            data[position] = rng.integers(256)
        path.write_bytes(data)
        try:
            index = build_index(str(tmp_path))
            assert [s.key for s in read_shard(index, 0)] == [s.key for s in read_rows(index, 0, 0, index.num_samples)]
        except DataError:
            pass
        for file in tmp_path.glob("*.json"):
            file.unlink()


HOSTILE_ROWS: dict[str, dict[str, Any]] = {
    "behind the end": {"offsets": [0, 1 << 40]},
    "before the start": {"offsets": [-1024, 1536]},
    "over each other": {"offsets": [0, 512]},
    "backwards": {"offsets": [1536, 0]},
    "endless": {"lengths": [1536, 1 << 62]},
    "empty": {"lengths": [0, 1536]},
    "no numbers": {"offsets": [0, "1536"]},
    "fractions": {"offsets": [0, 1536.0]},
    "beyond 64 bits": {"offsets": [0, 1 << 64]},
    "too few": {"widths": [4]},
    "negative sizes": {"widths": [4, -4]},
    "no texts": {"keys": ["k000", 1]},
    "climbing": {"keys": ["k000", "../k001"]},
    "a column less": {"heights": None},
}


@pytest.mark.parametrize("case", HOSTILE_ROWS)
def test_a_sidecar_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    index = write_shards(
        [{"__key__": f"k{n:03d}", "png": png()} | {"txt": "x"} for n in range(2)], str(tmp_path), "s", 2
    )
    path = tmp_path / "s-000000.idx.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "rows": {**fields["rows"], **HOSTILE_ROWS[case]}}))
    for read in (lambda: read_rows(index, 0, 0, 1), lambda: load_rows(index, 0), lambda: list(read_shard(index, 0))):
        with (
            bounded_memory(),
            pytest.raises(DataError, match=r"s-000000.idx.json: does not fit index.json; restore it"),
        ):
            read()


def test_the_sidecar_of_another_shard_is_refused(tmp_path: Path) -> None:
    index = write_shards(encoded(2), str(tmp_path), "s", 1, encoding={"latents": "sample"})
    (tmp_path / "s-000001.idx.json").write_bytes((tmp_path / "s-000000.idx.json").read_bytes())
    with pytest.raises(DataError, match=r"s-000001.idx.json: does not fit index.json"):
        read_rows(index, 1, 0, 1)


@pytest.mark.parametrize("change", [{"samples": -1}, {"samples": True}, {"bytes": "9"}, {"name": 3}, {"sha256": None}])
def test_an_index_that_lies_is_refused_even_if_its_sum_fits(tmp_path: Path, change: dict[str, Any]) -> None:
    from data import index as index_module

    write_shards(encoded(1), str(tmp_path), "s", 1, encoding={"latents": "sample"})
    path = tmp_path / "index.json"
    fields = json.loads(path.read_text())
    fields["shards"][0].update(change)
    shards = [index_module.ShardInfo(**shard) for shard in fields["shards"]]
    fields["fingerprint"] = index_module._fingerprint(shards, fields["encoding"])
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"index.json: was edited"):
        load_index(str(tmp_path))


def test_encoded_samples_admit_nothing_else_when_read(tmp_path: Path) -> None:
    data = blob()
    index = write_shards([{"__key__": "e", "safetensors": data}], str(tmp_path), "s", 1, encoding={"latents": "sample"})
    write_tar(tmp_path / "s-000000.tar", [("e.jpg", data)])
    for read in (lambda: read_rows(index, 0, 0, 1), lambda: list(read_shard(index, 0))):
        with pytest.raises(DataError, match=r"s-000000.tar: 'e.jpg' is none of safetensors"):
            read()
