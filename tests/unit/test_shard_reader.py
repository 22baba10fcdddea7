"""Reading rows: the samples that webdataset gives, from one request; never fewer or others when a tar changed."""

import gzip
import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import shard_reader
from data.errors import DataError
from data.local_store import LocalStore
from data.shards import Index, RawSample, build_index, load_rows, read_rows, read_shard, verify, write_shards
from data.tar_members import is_safe, split_name
from tests.helpers.tars import Members, encoded, header, pair, png, samples, tar_bytes, with_size_field, write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
ENCODING = {"latents": "sample"}

_letters = st.characters(exclude_characters="./\\", exclude_categories=["C", "Z"])
_parts = st.text(_letters, min_size=1, max_size=12) | st.integers(90, 130).map(lambda count: "long" * (count // 4))
_keys = st.lists(_parts, min_size=1, max_size=3).map("/".join).filter(lambda key: is_safe(f"{key}.jpg"))
_contents = st.fixed_dictionaries(
    {"jpg": st.binary(max_size=1200)},
    optional={"txt": st.text(max_size=40).map(str.encode), "json": st.sampled_from([b'{"a": [1, "b"]}', b"{}", b"["])},
)
_sets = st.lists(st.tuples(_keys, _contents, st.booleans()), min_size=1, max_size=6, unique_by=lambda row: row[0])


def by_webdataset(path: Path) -> list[dict[str, Any]]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with path.open("rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": "", "stream": stream}]), keys=split_name))


def same(found: Iterable[RawSample], expected: Iterable[RawSample]) -> bool:
    return list(found) == list(expected)  # a view of bytes equals the bytes


@settings(max_examples=50, deadline=None)
@given(_sets, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.sampled_from([0, 1.5, 1e10]), st.data())
def test_rows_are_what_webdataset_reads(
    tmp_path_factory: pytest.TempPathFactory, content: Any, format: int, mtime: float, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("set")
    members: Members = []
    for key, files, with_folder in content:
        members += [(f"folder-{key}/", b"")] * with_folder
        members += [(f"{key}.{extension}", file) for extension, file in files.items()]
    write_tar(folder / "x.tar", members, mtime=mtime, format=format)
    index = build_index(str(folder), required=("image",))
    whole = list(read_shard(index, 0))
    assert [(s.key, s.image) for s in whole] == [(m["__key__"], m["jpg"]) for m in by_webdataset(folder / "x.tar")]
    assert [(s.key, s.image) for s in whole] == [(key, files["jpg"]) for key, files, _ in content]
    for _ in range(4):
        first = data.draw(st.integers(0, len(content)))
        last = data.draw(st.integers(first, len(content)))
        assert same(read_rows(index, 0, first, last), whole[first:last])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mtime", [0, 1.25])
def test_rows_of_every_tar_format(tmp_path: Path, format: str, mtime: float) -> None:
    keys = ["a", "folder/" * 12 + "b", "./c"]
    members = [(f"{key}{name[1:]}", data) for key in keys for name, data in pair("x")]
    write_tar(tmp_path / "x.tar", members, format=FORMATS[format], mtime=mtime)
    index = build_index(str(tmp_path))
    assert [(s.key, s.image, s.text) for s in read_rows(index, 0, 0, 3)] == [(k, png(), "a caption") for k in keys]
    assert same(read_rows(index, 0, 1, 2), list(read_shard(index, 0))[1:2])


def test_a_shard_is_read_in_spans_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_shards(samples(7), str(tmp_path), "s", 7)
    whole = list(read_shard(index, 0))
    lengths = load_rows(index, 0).lengths
    asked: list[int] = []
    count_requests(monkeypatch, asked)
    for span in (1, 2 * lengths[0], 3 * lengths[0] + 1):
        asked.clear()
        monkeypatch.setattr(shard_reader, "_SPAN_BYTES", span)
        assert same(read_shard(index, 0), whole)
        assert len(asked) > 1 and max(asked) < span + max(lengths) and sum(asked) == sum(lengths)


def count_requests(monkeypatch: pytest.MonkeyPatch, asked: list[int]) -> list[str]:
    """Keeps the length of every ranged read of a tar, and the names of the other requests for it."""
    others: list[str] = []
    open_range, size, exists = LocalStore.open_range, LocalStore.size, LocalStore.exists

    def counted(self: LocalStore, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        if key.endswith(".tar"):
            asked.append(-1 if length is None else length)
        else:
            others.append(key)
        return open_range(self, key, start, length)

    monkeypatch.setattr(LocalStore, "open_range", counted)
    monkeypatch.setattr(LocalStore, "size", lambda self, key: others.append("size") or size(self, key))
    monkeypatch.setattr(LocalStore, "exists", lambda self, key: others.append("exists") or exists(self, key))
    return others


def test_a_range_of_rows_is_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_shards(samples(6), str(tmp_path), "s", 3)
    asked: list[int] = []
    others = count_requests(monkeypatch, asked)
    rows = load_rows(index, 1)
    read_rows(index, 1, 1, 3)
    assert asked == [rows.lengths[1] + rows.lengths[2]]
    assert sorted(others) == ["exists", "s-000001.idx.json", "size"]
    read_rows(index, 1, 0, 1)
    assert asked[1:] == [rows.lengths[0]] and len(others) == 3  # sidecar and size are known by now
    assert read_rows(index, 1, 2, 2) == [] and len(asked) == 2


def test_encoded_rows_are_views_of_one_buffer_and_pictures_are_not(tmp_path: Path) -> None:
    index = write_shards(encoded(4), str(tmp_path / "e"), "s", 4, encoding=ENCODING)
    rows = read_rows(index, 0, 1, 4)
    views = [row.image for row in rows]
    assert all(isinstance(view, memoryview) and view.obj is views[0].obj for view in views)
    assert same(rows, list(read_shard(index, 0))[1:])
    pictures = write_shards(samples(2), str(tmp_path / "p"), "s", 2)
    assert [type(row.image) for row in read_rows(pictures, 0, 0, 2)] == [bytes, bytes]


def test_rows_that_are_not_there_are_a_programmers_mistake(tmp_path: Path) -> None:
    index = write_shards(samples(3), str(tmp_path), "s", 3)
    for first, last in ((-1, 2), (0, 4), (2, 1)):
        with pytest.raises(ValueError, match="s-000000.tar has 3"):
            read_rows(index, 0, first, last)


def ends(data: bytes) -> list[int]:
    """Where each member ends, padding included."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [member.offset_data + -(-member.size // 512) * 512 for member in tar.getmembers()]


def rewritten(order: tuple[int, ...], name: str | None = None) -> Callable[[bytes], bytes]:
    """The same members in another order, or some of them twice, and the last under another name."""

    def damage(data: bytes) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]
        chosen = [members[number] for number in order]
        return tar_bytes(chosen if name is None else [*chosen[:-1], (name, chosen[-1][1])])

    return damage


def longer(number: int) -> Callable[[bytes], bytes]:
    """A member whose header claims two blocks of content where it has one."""

    def damage(data: bytes) -> bytes:
        start = ends(data)[number] - 1024
        return data[:start] + with_size_field(data[start : start + 512], b"00000001130\0") + data[start + 512 :]

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a longer member": longer(2),
    "a longer last member": longer(5),
    "folders instead": lambda data: data[: ends(data)[3]] + header("f/", kind=tarfile.DIRTYPE) * 4 + bytes(1024),
    "cut between samples": lambda data: data[: ends(data)[1]],
    "cut between members": lambda data: data[: ends(data)[2]],
    "cut inside a member": lambda data: data[: ends(data)[3] - 300],
    "cut inside the last header": lambda data: data[: ends(data)[4] + 100],
    "not neighbours": rewritten((0, 2, 1, 3, 4, 5)),
    "a member twice": rewritten((0, 0, 2, 3, 4, 5)),
    "a sample twice": rewritten((0, 1, 0, 1, 4, 5)),
    "other order": rewritten((2, 3, 0, 1, 4, 5)),
    "another extension": rewritten((0, 1, 2, 3, 4, 5), "c.pkl"),
    "another key": rewritten((0, 1, 2, 3, 4, 5), "d.txt"),
    "climbing": rewritten((0, 1, 2, 3, 4, 5), "../c.txt"),
    "empty": lambda data: b"",
    "HTML": lambda data: b"<html>503 Slow Down</html>" * 40,
    "gzip": gzip.compress,
    "zeros": lambda data: bytes(len(data)),
}


def three_samples(folder: Path) -> tuple[Index, Path, bytes, list[RawSample]]:
    path = folder / "x.tar"
    write_tar(path, pair("a") + pair("b") + pair("c"))
    index = build_index(str(folder))
    return index, path, path.read_bytes(), list(read_shard(index, 0))


@pytest.mark.parametrize("same_size", [False, True])
@pytest.mark.parametrize("case", DAMAGES)
def test_damage_after_indexing_is_an_error_and_never_fewer_samples(tmp_path: Path, case: str, same_size: bool) -> None:
    index, path, good, whole = three_samples(tmp_path)
    if same_size:
        assert same(read_rows(index, 0, 0, 3), whole)  # from now on the size is not asked for again
    damaged = DAMAGES[case](good)
    path.write_bytes((damaged + bytes(len(good)))[: len(good)] if same_size else damaged)
    for read in (lambda: read_rows(index, 0, 0, 3), lambda: list(read_shard(index, 0))):
        with pytest.raises(DataError, match=r"x.tar: .*; restore it, or delete index.json") as caught:
            read()
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    for row in range(3):  # a row that the damage did not touch may be read
        try:
            assert same(read_rows(index, 0, row, row + 1), whole[row : row + 1])
        except DataError:
            continue
    assert len(verify(str(tmp_path))) == 1


@pytest.mark.parametrize("data", [bytes(512), b"rubbish" * 100, tar_bytes(pair("z"))], ids=["zeros", "text", "tar"])
def test_data_behind_the_end_is_another_size(tmp_path: Path, data: bytes) -> None:
    index, path, good, _ = three_samples(tmp_path)
    path.write_bytes(good + data)
    message = f"x.tar: has {len(good) + len(data)} bytes, the index says {len(good)}; restore it"
    for read in (lambda: read_rows(index, 0, 0, 1), lambda: list(read_shard(index, 0))):
        with pytest.raises(DataError, match=message):
            read()


@pytest.mark.parametrize(
    ("span", "kept"),
    [(1 << 20, slice(0, 2)), (1 << 20, slice(1, 3)), (1 << 20, slice(None, None, -1)), (1, slice(0, 0))],
)
def test_samples_that_webdataset_would_leave_out_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: int, kept: slice
) -> None:
    import webdataset.tariterators

    index, path, _, _ = three_samples(tmp_path)
    group = webdataset.tariterators.group_by_keys
    monkeypatch.setattr(shard_reader, "_SPAN_BYTES", span)
    monkeypatch.setattr(webdataset.tariterators, "group_by_keys", lambda *a, **k: iter(list(group(*a, **k))[kept]))
    with pytest.raises(DataError, match="to webdataset|webdataset finds no sample") as caught:
        list(read_shard(index, 0))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index, path, _, _ = three_samples(tmp_path)
    path.unlink()
    for read in (lambda: read_rows(index, 0, 0, 1), lambda: list(read_shard(index, 0))):
        with pytest.raises(DataError, match=r"x.tar: no such file, though the index names it; restore it"):
            read()


@pytest.mark.parametrize(
    ("format", "long", "mtime"),
    [("ustar", "", 0), ("gnu", "ö" * 60, 0), ("pax", "ö" * 60, 1.5), ("pax", "", 1.5)],
    ids=["ustar", "gnu", "pax", "pax with time stamps alone"],
)
def test_no_flipped_byte_of_a_header_gives_another_sample(tmp_path: Path, format: str, long: str, mtime: float) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, [(f"a{long}.png", png(1)), (f"b{long}.png", png(2))], format=FORMATS[format], mtime=mtime)
    index = build_index(str(tmp_path), required=("image",))
    good = path.read_bytes()
    whole = read_rows(index, 0, 0, 2)
    with tarfile.open(path) as tar:
        contents = {n for m in tar.getmembers() for n in range(m.offset_data, m.offset_data + 512)}
    assert max(len(row.image) for row in whole) <= 512
    flips = np.random.default_rng(0).integers(1, 256, len(good))
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for position in range(load_rows(index, 0).offsets[-1] + load_rows(index, 0).lengths[-1]):
            if position in contents:  # and their padding
                continue
            file.seek(position)
            file.write(bytes([good[position] ^ flips[position]]))
            try:
                found: list[RawSample] = read_rows(index, 0, 0, 2)
            except DataError:
                refused += 1
            else:
                assert same(found, whole), position  # a field that changes nothing
            file.seek(position)
            file.write(good[position : position + 1])
    assert refused >= 2 * 500  # the headers of both members are protected by sums


def test_a_flipped_byte_of_content_is_left_to_verify(tmp_path: Path) -> None:
    index = write_shards(encoded(2), str(tmp_path), "s", 2, encoding=ENCODING)
    whole = list(read_shard(index, 0))
    path = tmp_path / "s-000000.tar"
    data = bytearray(path.read_bytes())
    rows = load_rows(index, 0)
    data[rows.offsets[1] + 512 + len(whole[1].image) - 1] ^= 1
    path.write_bytes(data)
    assert not same(read_rows(index, 0, 0, 2), whole) and not same(read_shard(index, 0), whole)
    (problem,) = verify(str(tmp_path))
    assert problem.startswith(f"{path}: SHA-256 is ")


def test_the_remedy_for_encoded_samples_is_to_encode_them_again(tmp_path: Path) -> None:
    index = write_shards(encoded(2), str(tmp_path), "s", 2, encoding=ENCODING)
    (tmp_path / "s-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"s-000000.tar: has 0 bytes, .* run `darkroom encode` again"):
        read_rows(index, 0, 0, 1)
