"""Shards and their index: what is written comes back, and no damaged tar passes for a good one."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DataError
from data.local_store import LocalStore
from data.shards import (
    ShardInfo,
    build_index,
    describe,
    load_index,
    load_rows,
    read_rows,
    read_shard,
    shard_done,
    verify,
    write_index,
    write_shard,
    write_shards,
)
from tests.helpers.tars import blob, encoded, pair, png, samples, write_tar

ENCODING = {"autoencoder": "a", "latents": "sample", "channels": 4}


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
    assert list(rows.widths) == [4] * 3 and list(rows.heights) == [3] * 3
    assert rows.offsets[-1] + rows.lengths[-1] <= len(data) - 1024


def test_webdataset_reads_our_shards_and_we_read_those_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webdataset.utils
    from webdataset.compat import WebDataset
    from webdataset.writer import TarWriter

    monkeypatch.setattr(webdataset.utils, "enforce_security", False)  # with it, it opens no file itself
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


def test_verify_compares_every_byte(tmp_path: Path) -> None:
    write_shards(samples(6), str(tmp_path), "s", 3)
    path = tmp_path / "s-000001.tar"
    good = path.read_bytes()
    for data, problem in (
        (good[:5120], "s-000001.tar: "),
        (good[:600] + bytes([good[600] ^ 1]) + good[601:], "s-000001.tar: SHA-256 is "),
        (good + bytes(512), f"s-000001.tar: has {len(good) + 512} bytes, the index says {len(good)}"),
        ((tmp_path / "s-000000.tar").read_bytes(), "s-000001.tar: SHA-256 is "),
    ):
        path.write_bytes(data)
        (found,) = verify(str(tmp_path))
        assert found.startswith(f"{tmp_path}/{problem}"), found
    path.unlink()
    assert len(verify(str(tmp_path))) == 1
    path.write_bytes(good)
    write_tar(tmp_path / "stray.tar", pair("z"))
    assert verify(str(tmp_path)) == [f"{tmp_path}/stray.tar: not in the index"]


def test_a_missing_or_edited_index_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="darkroom data index"):
        load_index(str(tmp_path))
    (tmp_path / "encoding.json").write_text("{}")
    with pytest.raises(DataError, match="not every shard is encoded; run the same `darkroom encode` again"):
        load_index(str(tmp_path))
    (tmp_path / "encoding.json").unlink()
    write_shards(samples(2), str(tmp_path), "s", 2)
    path = tmp_path / "index.json"
    fields = json.loads(path.read_text())
    for text, message in (
        ("{", "damaged"),
        (json.dumps({**fields, "format_version": 9}), "format 9"),
        (json.dumps({**fields, "shards": [{**fields["shards"][0], "samples": 3}]}), "was edited"),
        (json.dumps({**fields, "encoding": ENCODING}), "was edited"),
        (json.dumps({**fields, "shards": []}), "was edited"),
        (json.dumps({**fields, "shards": 3}), "damaged"),
        (json.dumps({**fields, "shards": [[]]}), "damaged"),
        ("[" * 100_000, "damaged"),
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
            ("c.json", b"[" * 100_000),
            ("d.jpg", png()),
            ("d.txt", b""),
        ],
    )
    index = build_index(str(tmp_path))
    problems = ["the caption is not UTF-8", *["the .json is not a JSON object"] * 2, None]
    assert [sample.problem for sample in read_shard(index, 0)] == problems
    assert [sample.problem for sample in read_rows(index, 0, 0, 4)] == problems
    assert describe(str(tmp_path))["unreadable_images"] == 1


def test_the_pieces_of_a_resumable_writer_give_the_same_data_set(tmp_path: Path) -> None:
    whole = write_shards(samples(5), str(tmp_path / "whole"), "s", 2)
    store = LocalStore(tmp_path / "pieces")
    groups = {f"s-{n:06d}.tar": samples(5)[2 * n : 2 * n + 2] for n in range(3)}
    assert [shard_done(store, name) for name in groups] == [None] * 3
    written = {name: write_shard(group, store, name) for name, group in reversed(groups.items())}
    assert {name: shard_done(store, name) for name in groups} == written
    index = write_index(store, written.values())
    assert (index.fingerprint, index.shards) == (whole.fingerprint, whole.shards)
    with pytest.raises(DataError, match=r"index.json: another process wrote it"):
        write_index(store, list(written.values())[1:])
    assert verify(store.url) == []


def test_a_shard_counts_as_done_only_if_tar_and_sidecar_fit(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    info = write_shard(samples(2), store, "s.tar")
    tar, sidecar = tmp_path / "s.tar", tmp_path / "s.idx.json"
    good, fields = tar.read_bytes(), json.loads(sidecar.read_text())
    without_bytes = {name: value for name, value in fields.items() if name != "bytes"}
    for text in ("", "{", "[]", json.dumps(without_bytes), json.dumps({**fields, "rows": {"keys": 3}})):
        sidecar.write_text(text)
        assert shard_done(store, "s.tar") is None, text
    sidecar.write_text(json.dumps(fields))
    tar.write_bytes(good[:-512])
    assert shard_done(store, "s.tar") is None
    tar.write_bytes(good)
    assert shard_done(store, "s.tar") == info
    sidecar.unlink()
    assert shard_done(store, "s.tar") is None


def test_a_writer_that_dies_between_tar_and_sidecar_leaves_no_finished_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    write_shard(samples(2), store, "s.tar")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalStore, "put_bytes", die)
        write_shard([{**samples(1)[0], "txt": "other"}, samples(2)[1]], store, "s.tar")  # as long as the first
    assert shard_done(store, "s.tar") is None


def test_encoded_samples_have_an_index_of_their_own(tmp_path: Path) -> None:
    index = write_shards(encoded(5), str(tmp_path / "e"), "s", 3, encoding={**ENCODING, "sizes": (256, 512)})
    assert load_index(index.url) == index and index.encoding == {**ENCODING, "sizes": [256, 512]}
    rows = load_rows(index, 0)
    assert (list(rows.widths), list(rows.heights)) == ([256] * 3, [512] * 3)
    assert verify(index.url) == []
    found = [sample for number in range(2) for sample in read_shard(index, number)]
    assert [(s.key, bytes(s.image), s.extension, s.text, s.meta, s.problem) for s in found] == [
        (f"e{n:03d}", blob(n), "safetensors", None, {}, None) for n in range(5)
    ]
    for encoding in (ENCODING, {**ENCODING, "channels": 8}):
        other = write_shards(encoded(5), str(tmp_path / str(encoding["channels"])), "s", 3, encoding=encoding)
        assert other.shards == index.shards and other.fingerprint != index.fingerprint


def test_an_encoded_data_set_is_described(tmp_path: Path) -> None:
    from data.encoded import EncodedSample, EncoderShape, Encoding, pack_sample

    encoding = Encoding(
        autoencoder="a",
        text_encoders="t",
        latents="sample",
        text_padding="masked",
        text_dtype="bfloat16",
        channels=4,
        downsampling=8,
        encoders={"clip": EncoderShape(width=2, pooled=0, max_tokens=3)},
        source="s",
        sizes=[[24, 16]],
        settings={},
    )
    sample = EncodedSample(
        moments=np.zeros((4, 2, 3), np.uint16),
        captions=[("a red seven", 1.0)],
        tokens={"clip": np.zeros((2, 2), np.uint16)},
        scales={},
        lengths={"clip": [2]},
        pooled={},
        size=(24, 16),
        box=(0, 0, 24, 16),
        width=24,
        height=16,
        meta={},
    )
    group = [{"__key__": "a", "safetensors": pack_sample(sample)}, {"__key__": "b", "safetensors": b"rubbish"}]
    write_shards(group, str(tmp_path), "s", 2, encoding=encoding.to_dict())
    summary = describe(str(tmp_path))
    assert summary["sizes"] == {"24x16": 1} and summary["unreadable_images"] == 1
    assert summary["captions"][0] == "a red seven" and "damaged" in summary["captions"][1]
    assert summary["encoding"] == encoding.to_dict()


def test_the_fingerprint_of_pictures_is_that_of_their_shards(tmp_path: Path) -> None:
    index = write_shards(samples(3), str(tmp_path), "s", 2)
    facts = [[shard.name, shard.samples, shard.bytes, shard.sha256] for shard in index.shards]
    assert index.fingerprint == hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()
    assert "encoding" not in json.loads((tmp_path / "index.json").read_text())


def test_a_set_holds_one_kind_of_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s-000000.tar: holds encoded samples"):
        write_shards(encoded(1), str(tmp_path / "a"), "s", 1)
    with pytest.raises(DataError, match=r"s-000000.tar: holds pictures in a set of encoded samples"):
        write_shards(samples(1), str(tmp_path / "b"), "s", 1, encoding=ENCODING)
    write_tar(tmp_path / "x.tar", [("e.safetensors", blob())])
    with pytest.raises(DataError, match=r"x.tar: holds encoded samples.*darkroom encode"):
        build_index(str(tmp_path))
    for members in ([*pair("a"), ("e.safetensors", blob())], [("e.safetensors", blob()), ("e.txt", b"x")]):
        write_tar(tmp_path / "x.tar", members)
        with pytest.raises(DataError, match=r"x.tar: 'e.* is among samples of another kind"):
            build_index(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, blob()[:40], blob(0, -1, 5), blob(0, "x", 5), blob(0, 10**9, 1)])
def test_an_encoded_sample_that_is_damaged_has_no_size(tmp_path: Path, data: bytes) -> None:
    group = [{"__key__": "bad", "safetensors": data}, *encoded(1)]
    index = write_shards(group, str(tmp_path), "s", 2, encoding=ENCODING)
    rows = load_rows(index, 0)
    assert (list(rows.widths), list(rows.heights)) == ([0, 256], [0, 512])


def test_an_index_may_be_large(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    shards = [ShardInfo(name=f"s-{n:06d}.tar", samples=9, bytes=10_000 + n, sha256=digest) for n in range(20_000)]
    index = write_index(LocalStore(tmp_path), reversed(shards))
    assert load_index(str(tmp_path)) == index
    assert index.shards == tuple(shards) and index.num_samples == 180_000
