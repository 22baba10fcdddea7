"""The record of what a run consumed: clean after any kills and changes of world size, and nothing hides in it."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from data import ledger_check
from data.buckets import BucketConfig
from data.errors import DataError
from data.filters import FilterRule
from data.ledger_check import Verdict, check_ledger
from data.ledger_judge import compare
from data.loader import LoaderConfig, MixConfig
from data.streams import ALGORITHM_VERSION, unpack_visits
from tests.helpers.ledger_runs import Start, simulate, unequal_shards

B, PER_STEP = 3, 4
ORDER = {"image_size": 32, "num_streams": 4, "shuffle_block_shards": 2, "shuffle_chunk_samples": 4}
SHAPES = {"buckets": BucketConfig(multiple=8), "window_micro_batches": 4}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoaderConfig]:
    folder = tmp_path_factory.mktemp("data")
    first = unequal_shards(folder / "first", (7, 3, 11, 5, 9, 2))
    second = unequal_shards(folder / "second", (4, 6, 13))
    good = (FilterRule(field="score", max=2),)
    mix = (MixConfig(shards=first), MixConfig(shards=second, weight=2.0))
    return {
        "plain": LoaderConfig(shards=first, **ORDER),
        "filtered": LoaderConfig(shards=first, filters=good, **ORDER, **SHAPES),
        "mixed": LoaderConfig(mix=mix, filters=good, **ORDER, **SHAPES),
    }


@pytest.fixture(scope="module")
def whole(configs: dict[str, LoaderConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """The visits of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: simulate(folder / name, config, [Start(world_size=1, steps=25)], micro_batch_size=B, per_step=PER_STEP)
        for name, config in configs.items()
    }


starts = st.builds(
    Start,
    world_size=st.sampled_from((1, 2, 4)),
    steps=st.integers(0, 6),
    lost_steps=st.integers(0, 3),
    torn=st.integers(0, 4),
)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(("plain", "filtered", "mixed")),
    attempts=st.lists(starts, min_size=1, max_size=4),
    piece=st.sampled_from((1, 100, 1 << 20)),
)
def test_any_kills_and_world_sizes_are_clean(
    configs: dict[str, LoaderConfig],
    whole: dict[str, list[list[int]]],
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    attempts: list[Start],
    piece: int,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    visits = simulate(folder, configs[name], attempts, micro_batch_size=B, per_step=PER_STEP)
    assert visits == whole[name][: len(visits)]
    flat = [visit for micro_batch in visits for visit in micro_batch]
    assert len(set(flat)) == len(flat)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_check, "PIECE_VISITS", piece)
        verdict = check_ledger(folder)
    assert verdict.clean, (verdict.problems, verdict.samples)
    last = attempts[-1]
    written_behind = PER_STEP * last.lost_steps if last.torn >= last.world_size else 0
    assert verdict.micro_batches == len(visits) + written_behind
    met = Counter[tuple[int, int]]()
    for row in verdict.epochs:
        assert row["consumed"] + row["refused"] + row["to_come"] == row["samples"] == (37, 23)[row["set"]]
        assert row["twice"] == row["missing"] == 0
        assert row["to_come"] or (row["refused"] == 0) == (name == "plain")
        for epoch in range(row["epochs"][0], row["epochs"][1] + 1):
            met[row["set"], epoch] = row["consumed"]
    if not written_behind:
        sets, epochs, _ = unpack_visits(np.array(flat, dtype=np.int64))
        assert +met == Counter(zip(sets.tolist(), epochs.tolist(), strict=True))


# --- what is wrong is named ---------------------------------------------------------------------------------------

RUN = [
    Start(world_size=2, steps=6, lost_steps=2, torn=1),
    Start(world_size=4, steps=5, lost_steps=1),
    Start(world_size=1, steps=6),
]  # micro-batches 0 to 23, 24 to 43, 44 to 67


@pytest.fixture
def run(configs: dict[str, LoaderConfig], tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        simulate(tmp_path / name, configs[name], RUN, micro_batch_size=B, per_step=PER_STEP)
        assert check_ledger(tmp_path / name).clean
        return tmp_path / name

    return make


def edit(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def dirty(folder: Path) -> Verdict:
    """The verdict on a record that is not clean; it is the same for any size of the pieces."""
    verdict = check_ledger(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_check, "PIECE_VISITS", 1)
        assert check_ledger(folder) == verdict
    assert not verdict.clean
    with pytest.raises(DataError, match="does not show that every sample was consumed exactly once") as caught:
        verdict.refuse_unclean()
    assert (verdict.problems + verdict.samples)[0] in str(caught.value) and "\n" not in str(caught.value)
    json.dumps(verdict.to_dict())
    return verdict


def totals(verdict: Verdict) -> tuple[int, int]:
    """(twice, missing) over all epochs."""
    rows = [(row, row["epochs"][1] - row["epochs"][0] + 1) for row in verdict.epochs]
    return sum(row["twice"] * count for row, count in rows), sum(row["missing"] * count for row, count in rows)


def test_a_dropped_micro_batch(run: Callable[[str], Path]) -> None:
    folder = run("plain")
    path = folder / "try-1" / "000000000024-000000000032-rank-00002.safetensors"

    def drop(tensors: dict[str, np.ndarray]) -> None:
        assert tensors["numbers"].tolist() == [26, 30]
        for name in ("numbers", "visits", "filtered_counts"):
            tensors[name] = tensors[name][:1]

    lost = load_file(path)["visits"][1].tolist()
    edit(path, drop)
    verdict = dirty(folder)
    assert verdict.problems == ["attempt try-1, rank 2: micro-batches 30 not recorded"]
    assert totals(verdict) == (0, B) and verdict.num_samples == B
    _, epochs, samples = unpack_visits(np.array(sorted(lost)))
    bounds = np.cumsum([0, 7, 3, 11, 5, 9, 2])
    for line, epoch, sample in zip(verdict.samples, epochs, samples, strict=True):
        shard = int(np.searchsorted(bounds, sample, side="right")) - 1
        place = f"s-{shard:06d}.tar row {sample - bounds[shard]}"
        assert line == f"data set 0, epoch {epoch}, {place}: not consumed"


@pytest.mark.parametrize("name", ["plain", "filtered", "mixed"])
def test_a_doubled_file(run: Callable[[str], Path], name: str) -> None:
    folder = run(name)
    path = folder / "try-0" / "000000000008-000000000016-rank-00001.safetensors"
    shutil.copy(path, path.with_name(path.name.replace("rank-00001", "rank-00002")))
    tensors = load_file(path)
    verdict = dirty(folder)
    assert verdict.problems == ["attempt try-0, rank 1: micro-batches 9 to 15 (4) recorded twice"]
    assert totals(verdict) == (tensors["visits"].size + tensors["filtered"].size, 0)
    assert verdict.num_samples == totals(verdict)[0]
    assert all(line.endswith(": consumed more than once") for line in verdict.samples)


def test_a_sample_in_place_of_another(run: Callable[[str], Path]) -> None:
    folder = run("plain")
    paths = sorted((folder / "try-2").glob("*"))
    others = load_file(paths[1])["visits"]
    lost = load_file(paths[0])["visits"][2, 1]

    def swap(tensors: dict[str, np.ndarray]) -> None:
        tensors["visits"][2, 1] = others[5, 2]

    edit(paths[0], swap)
    verdict = dirty(folder)
    assert not verdict.problems and totals(verdict) == (1, 1) and verdict.num_samples == 2
    assert sorted(line.rpartition(": ")[2] for line in verdict.samples) == ["consumed more than once", "not consumed"]

    def swap_back(tensors: dict[str, np.ndarray]) -> None:
        tensors["visits"][5, 2] = lost

    edit(paths[1], swap_back)  # each sample once, but not in its turn
    verdict = dirty(folder)
    assert totals(verdict) == (0, 0) and verdict.num_samples == 2
    assert all(line.endswith("consumed where the order has another sample") for line in verdict.samples)


def test_a_sample_before_its_turn_in_the_window_at_the_end(run: Callable[[str], Path]) -> None:
    folder = run("mixed")
    path = sorted((folder / "try-2").glob("*"))[-1]

    def hurry(tensors: dict[str, np.ndarray]) -> None:
        assert tensors["numbers"][-1] == 67  # stream 3 has a window of one micro-batch there
        tensors["visits"][-1, 0] += 1 << 40  # some epochs later
        tensors["visits"][-1, 1] = -5  # no visit at all

    edit(path, hurry)
    verdict = dirty(folder)
    assert not verdict.problems and verdict.num_samples == 2 and totals(verdict) == (0, 0)
    assert any("which is in no shard" in line for line in verdict.samples)


def test_a_resume_at_the_wrong_place(configs: dict[str, LoaderConfig], tmp_path: Path) -> None:
    starts = [Start(world_size=2, steps=8), Start(world_size=1, steps=8, forgets=True)]
    simulate(tmp_path, configs["filtered"], starts, micro_batch_size=B, per_step=PER_STEP)
    verdict = dirty(tmp_path)
    assert not verdict.problems and all(count > 0 for count in totals(verdict))


def test_a_refused_sample_that_is_forgotten(run: Callable[[str], Path]) -> None:
    folder = run("filtered")
    path = folder / "try-0" / "000000000000-000000000008-rank-00000.safetensors"

    def forget(tensors: dict[str, np.ndarray]) -> None:
        assert tensors["filtered_counts"][0] > 0
        tensors["filtered_counts"][0] -= 1
        tensors["filtered"] = tensors["filtered"][1:]

    edit(path, forget)
    assert dirty(folder).num_samples > 0


def test_a_lost_file_with_the_refused_samples(run: Callable[[str], Path]) -> None:
    """What the filters refused is unknown then: the stream is compared up to there, the others to the end."""
    folder = run("filtered")
    (folder / "try-0" / "000000000016-000000000024-rank-00000.safetensors").unlink()  # a window begins at 16
    verdict = dirty(folder)
    assert verdict.problems == [
        "attempt try-0, rank 0: micro-batches 16 to 22 (4) not recorded",
        "stream 0: not compared from micro-batch 16 on, as what the filters refused there is lost",
        "stream 2: not compared from micro-batch 18 on, as what the filters refused there is lost",
    ]
    assert verdict.num_samples == 0


def test_a_lost_attempt(run: Callable[[str], Path]) -> None:
    folder = run("plain")
    lines = (folder / "attempts.jsonl").read_text().splitlines(keepends=True)
    (folder / "attempts.jsonl").write_text(lines[0] + lines[2])
    verdict = dirty(folder)
    assert verdict.problems[0] == f"{folder / 'try-1'}: 12 files of an attempt that attempts.jsonl does not name"
    # The first attempt was killed behind micro-batch 23, and rank 0 alone had written on.
    assert "attempt try-0, rank 0: micro-batches 32 to 42 (6) not recorded" in verdict.problems
    assert "attempt try-0, rank 1: micro-batches 25 to 43 (10) not recorded" in verdict.problems
    (folder / "attempts.jsonl").write_text("".join(lines))
    shutil.rmtree(folder / "try-1")
    assert dirty(folder).problems == [
        f"attempt try-1, rank {rank}: micro-batches {24 + rank} to {40 + rank} (5) not recorded" for rank in range(4)
    ]
    (folder / "attempts.jsonl").write_text("".join(lines[1:]))
    problems = dirty(folder).problems
    assert "micro-batches 0 to 23 (24) not recorded, from before the first attempt on record" in problems


def test_damaged_files(run: Callable[[str], Path]) -> None:
    folder = run("mixed")
    path = folder / "try-2" / "000000000052-000000000060-rank-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (folder / "try-2" / "notes.txt").write_text("mine")
    problems = dirty(folder).problems
    assert f"{folder / 'try-2' / 'notes.txt'}: no file of a record has this name" in problems
    assert sum(problem.startswith(f"{path}: cannot be read") for problem in problems) == 1
    assert "attempt try-2, rank 0: micro-batches 52 to 59 (8) not recorded" in problems

    (folder / "try-2" / "notes.txt").unlink()
    for change in (
        lambda tensors: tensors.update(numbers=tensors["numbers"] + 1),
        lambda tensors: tensors.update(numbers=tensors["numbers"][::-1]),
        lambda tensors: tensors.update(visits=tensors["visits"][:, :2]),
        lambda tensors: tensors.update(visits=tensors["visits"].astype(np.int32)),
        lambda tensors: tensors.update(filtered=np.append(tensors["filtered"], 1)),
        lambda tensors: tensors.pop("filtered"),
    ):
        path.write_bytes(whole)
        edit(path, change)
        assert any(re.match(rf"{path}: (does not hold what|cannot be read)", line) for line in dirty(folder).problems)


def test_another_order_in_between(run: Callable[[str], Path]) -> None:
    folder = run("plain")
    lines = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    lines[1]["stamp"]["seed"] = 4
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert dirty(folder).problems == ["attempt try-1: seed is 4, in attempt try-0 it was 3"]
    for line in lines:
        line["stamp"]["seed"] = 4
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    verdict = dirty(folder)
    assert verdict.num_samples > 20 == len(verdict.samples)


def test_the_record_must_reach_the_newest_commit(run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run("plain")
    last = sorted((folder / "try-2").glob("*"))[-1]
    last.unlink()
    verdict = check_ledger(folder)
    assert verdict.clean and verdict.micro_batches == 60  # as if the run were still before its last commit
    states = {"s3://bucket/run": {"counters": {"micro_batches": 68, "step": 17}}}
    monkeypatch.setattr(ledger_check, "_newest_state", states.__getitem__)
    verdict = check_ledger(folder, checkpoints="s3://bucket/run")
    assert verdict.problems == ["attempt try-2, rank 0: micro-batches 60 to 67 (8) not recorded"]
    assert verdict.passed_over == [] and verdict.skipped_steps == 0


def test_what_a_roll_back_passed_over_is_named_and_is_no_fault(
    run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = {"skipped_steps": 3, "passed_over": [[2, 5], [5, 6]]}
    state = {"counters": {"micro_batches": 60, "step": 15}, "step_policy": policy}
    monkeypatch.setattr(ledger_check, "_newest_state", lambda url: state)
    verdict = check_ledger(run("plain"), checkpoints="s3://bucket/run")
    assert verdict.clean and verdict.skipped_steps == 3
    size = json.loads((verdict.folder / "attempts.jsonl").read_text().splitlines()[0])["stamp"]["micro_batch_size"]
    assert verdict.to_dict()["passed_over"] == [
        {"steps": [2, 5], "micro_batches": [8, 20], "samples": 12 * size},
        {"steps": [5, 6], "micro_batches": [20, 24], "samples": 4 * size},
    ]


def test_moved_and_other_data(
    configs: dict[str, LoaderConfig], run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("plain")
    url = configs["plain"].shards
    assert url is not None
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(Path(url, "index.json"), moved)  # all that is needed of it
    assert check_ledger(folder, [str(moved)]).data_sets == [{"set": 0, "url": str(moved), "samples": 37}]
    other = unequal_shards(tmp_path / "other", (5, 5))
    with pytest.raises(DataError, match="is not the data set that the run consumed; give --shards"):
        check_ledger(folder, [other])
    with pytest.raises(DataError, match="has 1 data sets, not 2"):
        check_ledger(folder, [other, url])
    with pytest.raises(DataError, match="no record of what the run consumed; give the directory"):
        check_ledger(tmp_path / "nothing")
    text = (folder / "attempts.jsonl").read_text()
    (folder / "attempts.jsonl").write_text(text.replace('"algorithm_version": ', '"algorithm_version": 1'))
    with pytest.raises(DataError, match=f"version 1{ALGORITHM_VERSION} of the order, known is {ALGORITHM_VERSION}"):
        check_ledger(folder)
    (folder / "attempts.jsonl").write_text(text.replace('"num_streams"', '"streams"'))
    with pytest.raises(DataError, match="attempt try-2 is damaged; restore the file"):
        check_ledger(folder)
    (folder / "attempts.jsonl").write_text(text.replace('"world_size": ', '"world_size": -'))
    with pytest.raises(DataError, match="names no attempt that can be read"):
        check_ledger(folder)


def test_what_is_written(run: Callable[[str], Path]) -> None:
    folder = run("mixed")
    for line in (folder / "attempts.jsonl").read_text().splitlines():
        fields = json.loads(line)
        assert set(fields) == {
            *("attempt", "first_micro_batch", "world_size", "num_workers", "data_sets", "stamp", "format_version")
        }
        assert all(set(data_set) == {"url", "fingerprint"} for data_set in fields["data_sets"])
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    assert names[:3] == [
        "try-0/000000000000-000000000008-rank-00000.safetensors",
        "try-0/000000000000-000000000008-rank-00001.safetensors",
        "try-0/000000000008-000000000016-rank-00000.safetensors",
    ]


def test_a_torn_line_stays_alone(configs: dict[str, LoaderConfig], tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text('{"attempt": "torn')
    simulate(tmp_path, configs["plain"], [Start(world_size=1, steps=2)], micro_batch_size=B, per_step=PER_STEP)
    verdict = check_ledger(tmp_path)
    assert verdict.clean and [attempt["attempt"] for attempt in verdict.attempts] == ["try-0"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_compare_is_the_difference_of_multisets(data: st.DataObject) -> None:
    expected = data.draw(st.lists(st.integers(0, 12), unique=True))
    windows = sorted(data.draw(st.lists(st.integers(0, 2), min_size=len(expected), max_size=len(expected))))
    pairs = data.draw(st.lists(st.tuples(st.integers(-1, 14), st.integers(0, 2)), max_size=15))
    finished = data.draw(st.integers(0, 3))
    met, met_windows = (np.array([pair[n] for pair in pairs], dtype=np.int64) for n in (0, 1))
    surplus, lacking = compare(np.array(expected, np.int64), np.array(windows, np.int64), met, met_windows, finished)
    wanted = Counter(zip(expected, windows, strict=True))
    extra = Counter(pairs) - wanted
    assert Counter(surplus.tolist()) == Counter(visit for visit, _ in extra.elements())
    absent = wanted - Counter(pairs)
    assert sorted(lacking.tolist()) == sorted(visit for visit, window in absent.elements() if window < finished)
