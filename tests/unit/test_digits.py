"""The embedded sample and packing a folder of one's own."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.digits import COLOURS, LAYOUTS, WORDS, held_out_pairs, slots, write_digits
from data.errors import DataError
from data.pack import pack
from data.shards import RawSample, load_index, read_shard, verify


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("digits"))
    write_digits(url, num_train=800, num_test=200, num_combinations=200)
    return url


def read(url: str) -> list[RawSample]:
    index = load_index(url)
    return [sample for number in range(len(index.shards)) for sample in read_shard(index, number)]


def test_splits_hold_out_digits_and_combinations(digits: str) -> None:
    splits = {name: read(f"{digits}/{name}") for name in ("train", "test", "combinations")}
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 800, "test": 200, "combinations": 200}
    assert len(load_index(f"{digits}/train").shards) == 16
    sources = {name: {s for sample in samples for s in sample.meta["source"]} for name, samples in splits.items()}
    assert not sources["train"] & (sources["test"] | sources["combinations"])
    pairs: dict[str, set[tuple[int, str]]] = {
        name: {(o["digit"], o["colour"]) for sample in samples for o in sample.meta["objects"]}
        for name, samples in splits.items()
    }
    withheld = set(held_out_pairs())
    assert len(withheld) == 10 and {digit for digit, _ in withheld} == set(range(10))
    assert {colour for _, colour in withheld} == set(COLOURS)
    assert pairs["combinations"] == withheld
    assert pairs["train"] == {(d, c) for d in range(10) for c in COLOURS} - withheld
    assert not pairs["test"] & withheld


def test_pictures_show_what_the_json_says(digits: str) -> None:
    names = list(COLOURS)
    palette = np.array(list(COLOURS.values()), float)
    for sample in read(f"{digits}/test"):
        picture = np.asarray(Image.open(io.BytesIO(sample.image))).astype(float)
        assert picture.shape == (32, 32, 3)
        boxes = slots(sample.meta["layout"])
        assert len(boxes) == len(sample.meta["objects"]) == len(sample.meta["source"])
        outside = picture.copy()
        for (x0, y0, x1, y1), thing in zip(boxes, sample.meta["objects"], strict=True):
            area = picture[y0:y1, x0:x1].reshape(-1, 3)
            brightest = area[area.sum(1).argmax()]
            assert names[np.abs(palette - brightest).sum(1).argmin()] == thing["colour"]
            outside[y0:y1, x0:x1] = 0
        assert outside.max() == 0


def expected(caption: str) -> tuple[str, list[tuple[int, str]]]:
    """Reads a caption as a person would: layout, and (digit, colour) in reading order."""
    words = caption.split()
    pairs = [(colour, digit) for colour, digit in zip(words, words[1:], strict=False) if colour in COLOURS]
    things = [(int(digit) if digit.isdigit() else WORDS.index(digit), colour) for colour, digit in pairs]
    if "left" in words:
        return "horizontal", things
    return ("vertical" if "above" in words else "single"), things


def test_captions_determine_the_picture_in_few_tokens(digits: str) -> None:
    samples = read(f"{digits}/train")
    for sample in samples:
        assert sample.text is not None
        objects = [(o["digit"], o["colour"]) for o in sample.meta["objects"]]
        assert expected(sample.text) == (sample.meta["layout"], objects)
    assert {sample.meta["layout"] for sample in samples} == set(LAYOUTS)
    words = {word for sample in samples for word in (sample.text or "").split()}
    assert {"seven", "7", "above", "left"} <= words
    tokenizer = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    assert {word: len(tokenizer.encode(word)) for word in words} == dict.fromkeys(words, 1)
    longest = max(samples, key=lambda sample: len((sample.text or "").split()))
    assert len(tokenizer.encode(longest.text)) + 2 <= 10  # with start and end


def test_a_second_call_finds_its_work_and_another_is_refused(digits: str, tmp_path: Path) -> None:
    numbers = {"num_train": 16, "num_test": 2, "num_combinations": 2}
    first = write_digits(str(tmp_path), **numbers)
    second = write_digits(str(tmp_path), **numbers)
    assert (first["already_there"], second["already_there"]) == (False, True)
    assert first["splits"] == second["splits"]
    with pytest.raises(DataError, match="holds something else"):
        write_digits(str(tmp_path), **numbers, seed=1)
    shard = tmp_path / "test" / "test-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-2048])
    with pytest.raises(DataError, match="test-000000.tar"):
        write_digits(str(tmp_path), **numbers)
    with pytest.raises(DataError, match="num_train=3: at least 16"):
        write_digits(str(tmp_path / "new"), num_train=3)
    with pytest.raises(DataError, match="seed=-1"):
        write_digits(str(tmp_path / "new"), seed=-1)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.new("RGB", (6, 5), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "outside.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    return tmp_path


def jsonl(path: Path, entries: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    return str(path)


def test_pack(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries: list[dict[str, Any]] = [{"file": f"{n}.png", "caption": f"picture {n}", "licence": "x"} for n in range(18)]
    entries += [
        {"file": "18.png", "captions": ["one", "two"]},
        {"file": "19.png", "caption": " "},
        {"file": "broken.jpg", "caption": "c"},
        {"file": "absent.png", "caption": "c"},
        {"file": "../outside.png", "caption": "c"},
        {"file": "a.tiff", "caption": "c"},
    ]
    out = folder / "out"
    done = pack(str(folder / "images"), jsonl(folder / "captions.jsonl", entries), str(out))
    assert (done["samples"], done["shards"], sum(done["skipped"].values())) == (19, 19, 5)
    assert "5 of 24 samples skipped" in caplog.text
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [record["file"] for record in skipped] == ["19.png", "broken.jpg", "absent.png", "../outside.png", "a.tiff"]
    assert verify(str(out)) == []
    samples = read(str(out))
    assert samples[3].image == (folder / "images" / "3.png").read_bytes()
    assert (samples[3].text, samples[3].meta["licence"]) == ("picture 3", "x")
    assert (samples[18].text, samples[18].meta["captions"]) == ("one", ["one", "two"])
    with pytest.raises(DataError, match="already holds a data set"):
        pack(str(folder / "images"), str(folder / "captions.jsonl"), str(out))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: no JSON"),
        ('{"caption": "x"}', 'line 1: has no "file"'),
        ('{"file": "0.png", "caption": "x"}\n{"file": "0.png", "caption": "y"}', "line 2: '0.png' is there twice"),
        ('{"file": "none.png", "caption": "x"}', "no line can be used"),
        ('{"file": "a\\u0000.png", "caption": "x"}', "no line can be used"),
        ("", "the file is empty"),
    ],
)
def test_pack_refuses_bad_lists(folder: Path, text: str, message: str) -> None:
    (folder / "captions.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        pack(str(folder / "images"), str(folder / "captions.jsonl"), str(folder / "out"))
    assert not (folder / "out").exists()


def test_pack_leaves_another_list_of_skipped_files_alone(folder: Path) -> None:
    captions = jsonl(
        folder / "captions.jsonl", [{"file": "0.png", "caption": "x"}, {"file": "none.png", "caption": "x"}]
    )
    (folder / "images" / "skipped.jsonl").write_text("mine")
    with pytest.raises(DataError, match="skipped.jsonl: exists already"):
        pack(str(folder / "images"), captions, str(folder / "images"))
    assert (folder / "images" / "skipped.jsonl").read_text() == "mine"
