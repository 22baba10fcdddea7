"""Saving, retrying, finding, giving up: checkpoints on ranks that are threads, in a folder and in a bucket."""

import errno
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import data.manifest
import training.checkpoint
from data.errors import DataError
from data.local_store import LocalStore
from data.manifest import list_commits, read_manifest, verify
from data.object_store import S3Store, open_store
from tests.helpers.s3_servers import moto_server, use_endpoint
from tests.helpers.thread_ranks import cut, on_ranks, whole
from training.attempts import generation_of
from training.checkpoint import CheckpointConfig, Checkpointer
from training.checkpoint_writer import HostCopy
from training.errors import TrainingError

SHAPES = {"a": (5, 7), "b": (3,), "c": (), "d": (2, 3, 4)}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def groups_of(engine: Any, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Two sharded groups that are laid out alike, and one that every rank holds."""
    return {
        "model": cut(tensors(seed), engine.rank, engine.world_size),
        "exp_avg": cut(tensors(seed + 1), engine.rank, engine.world_size),
        "discriminator-weights": whole(tensors(seed + 2)),
    }


def blank(engine: Any) -> dict[str, dict[str, Any]]:
    groups = groups_of(engine)
    for fragments in groups.values():
        for fragment in fragments.values():
            fragment.data.fill_(torch.nan)
    return groups


def same(engine: Any, restored: dict[str, dict[str, Any]], seed: int) -> bool:
    expected = groups_of(engine, seed)
    return all(
        torch.equal(fragment.data, expected[group][name].data)
        for group, fragments in restored.items()
        for name, fragment in fragments.items()
    )


def save(folder: Path | str, step: int, world_size: int = 2, seed: int = 0, **config: Any) -> None:
    """One start of the run that commits one step."""

    def work(engine: Any) -> None:
        keeper = Checkpointer(Path("unused"), CheckpointConfig(url=str(folder), **config), engine)
        keeper.newest()
        keeper.save(step, groups_of(engine, seed), {"n": step})
        keeper.finish()

    on_ranks(world_size, work)


def find(folder: Path | str, world_size: int = 1, not_after: int | None = None) -> tuple[int | None, list[str], int]:
    """(step, complaints, commits passed over) of what a new start would go on from."""

    def work(engine: Any) -> tuple[int | None, list[str], int]:
        keeper = Checkpointer(Path("unused"), CheckpointConfig(url=str(folder)), engine)
        snapshot = keeper.newest(not_after)
        return (snapshot.step, snapshot.complaints, snapshot.passed_over) if snapshot else (None, [], 0)

    found = on_ranks(world_size, work)
    assert all(part == found[0] for part in found)
    return found[0]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path / "checkpoints")
    use_endpoint(monkeypatch, request.getfixturevalue("s3_server"))
    bucket = f"b{abs(hash(request.node.name))}"
    S3Store(bucket).client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}/run/checkpoints"


# --- pieces -------------------------------------------------------------------------------------------------------


def test_any_number_of_ranks_reads_what_any_other_wrote(place: str) -> None:
    for step, written_by in enumerate((1, 2, 3, 5), 1):
        save(place, step, written_by, seed=step)
        for read_by in (1, 2, 4):

            def restore(engine: Any, step: int = step) -> bool:
                snapshot = Checkpointer(Path("unused"), CheckpointConfig(url=place), engine).newest()
                assert snapshot is not None and snapshot.state == {"n": step}
                restored = blank(engine)
                snapshot.restore(restored)
                return same(engine, restored, step)

            assert all(on_ranks(read_by, restore))


def test_files_hold_each_element_once_and_the_layout_stands_once(tmp_path: Path) -> None:
    save(tmp_path, 7, world_size=3)
    store = open_store(tmp_path)
    manifest = read_manifest(store, 7)
    assert manifest.meta["groups"] == {"model": 0, "exp_avg": 0, "discriminator-weights": 1}
    assert manifest.meta["layouts"][0]["a"] == {"shape": [5, 7], "pieces": [[0, 0], [1, 21]]}
    assert [len(value["pieces"]) for value in manifest.meta["layouts"][1].values()] == [1] * 4
    elements: dict[str, int] = {}
    for key in manifest.files:
        group = key.split("/")[1].rpartition("-")[0]
        with safe_open(tmp_path / "step-00000007" / key, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                piece = file.get_tensor(name)
                elements[group] = elements.get(group, 0) + piece.numel()
                assert piece.dtype == torch.float32 and (tuple(piece.shape) == SHAPES[name] or piece.dim() == 1)
    assert set(elements.values()) == {35 + 3 + 1 + 24}
    dealt = next((tmp_path / "step-00000007").glob("*/discriminator-weights-00000.safetensors"))
    with safe_open(dealt, framework="pt") as file:
        assert list(file.keys()) == ["a"], "dealt by size: the largest lies alone"


def test_ranks_share_the_hashing_and_read_no_more_than_they_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, world_size=3)
    hashed: list[str] = []
    read: list[int] = []
    sha256, open_range = data.manifest.file_sha256, LocalStore.open_range

    def hash_and_tell(store: Any, key: str) -> str:
        hashed.append(key)
        return sha256(store, key)

    def open_and_tell(store: LocalStore, key: str, start: int = 0, length: int | None = None) -> Any:
        if start:  # behind a header
            read.append(length or 0)
        return open_range(store, key, start, length)

    def restore(engine: Any) -> int:
        snapshot = Checkpointer(Path("unused"), CheckpointConfig(url=str(tmp_path)), engine).newest()
        assert snapshot is not None
        groups = {name: cut(tensors(0), engine.rank, engine.world_size) for name in ("model", "exp_avg")}
        snapshot.restore(groups)
        return sum(4 * fragment.data.numel() for fragments in groups.values() for fragment in fragments.values())

    monkeypatch.setattr("data.manifest.file_sha256", hash_and_tell)
    monkeypatch.setattr("data.commit.GAP_BYTES", 0)
    monkeypatch.setattr(LocalStore, "open_range", open_and_tell)
    owned = on_ranks(4, restore)
    assert len(hashed) == len(set(hashed)) == len(read_manifest(open_store(tmp_path), 1).files)
    assert sum(read) == sum(owned)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def restore(engine: Any, groups: Any) -> None:
        snapshot = Checkpointer(Path("unused"), CheckpointConfig(url=str(tmp_path)), engine).newest()
        assert snapshot is not None
        snapshot.restore(groups)

    for shapes, message in (
        ({"other": torch.zeros(3)}, "has no tensor 'other' in group 'model'"),
        ({"b": torch.zeros(4)}, r"model/b has shape \(3,\), the model wants \(4,\)"),
    ):
        with pytest.raises((TrainingError, DataError), match=message):
            on_ranks(1, lambda engine, shapes=shapes: restore(engine, {"model": whole(shapes)}))


# --- beside the training ------------------------------------------------------------------------------------------


def test_a_save_is_what_the_weights_were_and_is_no_commit_before_all_ranks_have_written(tmp_path: Path) -> None:
    release = threading.Event()

    def work(engine: Any) -> list[bool]:
        keeper = Checkpointer(tmp_path, CheckpointConfig(), engine)
        keeper.newest()
        if engine.rank == 1:
            put = keeper.store.put_parts
            keeper.store.put_parts = lambda *arguments: release.wait(60) and put(*arguments)  # type: ignore[method-assign]
        groups = groups_of(engine, 5)
        keeper.save(10, groups, {})
        for fragments in groups.values():
            for fragment in fragments.values():
                fragment.data.fill_(torch.nan)  # the next optimiser step
        committed = []
        for _ in range(3):
            keeper.poll()
            committed.append(bool(list_commits(keeper.store)))
            engine.exchange(None)
        release.set()
        keeper.finish()
        committed.append(bool(list_commits(keeper.store)))
        assert keeper.last_good == 10 and keeper.stall_s > 0
        snapshot = keeper.newest()
        assert snapshot is not None
        restored = blank(engine)
        snapshot.restore(restored)
        assert same(engine, restored, 5)
        return committed

    assert on_ranks(2, work) == [[False, False, False, True]] * 2


def test_a_slow_save_that_is_waited_for_tells_the_watchdog_of_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1's next file is put only after the last one was told, and both ranks tell alike."""
    monkeypatch.setattr(training.checkpoint, "LOOK_S", 0.01)

    def work(engine: Any) -> list[str]:
        marks: list[str] = []
        told = threading.Semaphore(1)

        def mark(phase: str) -> None:
            marks.append(phase)
            told.release()

        engine.mark = mark
        keeper = Checkpointer(tmp_path, CheckpointConfig(), engine)
        keeper.newest()
        put = keeper.store.put_parts

        def put_parts(*arguments: Any) -> None:
            assert engine.rank == 0 or told.acquire(timeout=60), "the watchdog was not told"
            put(*arguments)

        keeper.store.put_parts = put_parts  # type: ignore[method-assign]
        keeper.save(10, groups_of(engine), {})
        keeper.finish()
        assert keeper.last_good == 10 and keeper.failed_saves == 0
        return marks

    first, second = on_ranks(2, work)
    files = read_manifest(open_store(tmp_path / "checkpoints"), 10).files
    assert first == second and set(first) == {"save"} and 2 <= len(first) <= len(files)


def test_host_buffers_are_made_once(tmp_path: Path) -> None:
    def work(engine: Any) -> set[int]:
        keeper = Checkpointer(tmp_path, CheckpointConfig(), engine)
        keeper.reserve(groups_of(engine))
        places = set()
        for step in (1, 2, 3):
            keeper.save(step, groups_of(engine, step), {})
            keeper.finish()
            places.add(keeper._copy._buffers["model"].data_ptr())
        return places

    assert len(on_ranks(1, work)[0]) == 1


@pytest.mark.cuda
def test_host_buffers_of_a_gpu_are_page_locked() -> None:
    weights = {"w": torch.arange(100_003.0, device="cuda"), "v": torch.ones(7, device="cuda")}
    copy = HostCopy(0, 1)
    for _ in range(2):
        copy.take({"model": whole(weights)})
        for tensor in weights.values():
            tensor.neg_()
    buffer = copy._buffers["model"]
    assert buffer.is_pinned() and torch.equal(buffer, torch.cat([-tensor.cpu() for tensor in weights.values()]))


def refusing(times: int, error: Exception) -> Callable[..., Any]:
    left = [times]

    def make(method: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*arguments: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise error
            return method(*arguments)

        return maybe

    return make


FAULTS = {
    "a rank's file": (1, "put_parts", DataError("the disk is full")),
    "the disk, at its end": (1, "put_parts", OSError(errno.ENOSPC, "No space left on device")),
    "the manifest": (0, "put_if_absent", DataError("the disk is full")),
    "a bug": (1, "put_parts", RuntimeError("unforeseen")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_save_fails_on_all_ranks_and_is_tried_again(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    rank, method, error = FAULTS[fault]

    def work(engine: Any) -> list[int]:
        keeper = Checkpointer(tmp_path, CheckpointConfig(), engine)
        keeper.newest()
        if engine.rank == rank:
            setattr(keeper.store, method, refusing(1, error)(getattr(keeper.store, method)))
        groups, prepared, failed = groups_of(engine), [], []
        keeper.save(3, groups, {}, lambda: prepared.append(1))
        for fragments in groups.values():
            for fragment in fragments.values():
                fragment.data.zero_()
        while keeper.last_good is None:
            keeper.poll()
            failed.append(keeper.failed_saves)
            assert engine.exchange(keeper.failed_saves) == [keeper.failed_saves] * 2
        keeper.finish()
        snapshot = keeper.newest()
        assert snapshot is not None and snapshot.step == 3
        restored = blank(engine)
        snapshot.restore(restored)
        assert same(engine, restored, 0) and len(prepared) == 2
        return [number for i, number in enumerate(failed) if not i or number != failed[i - 1]]

    for told in on_ranks(2, work):
        assert told in ([0, 1, 0], [1, 0])
    assert sum("trying again (1 of 5)" in message for message in caplog.messages) == 1
    folders = {path.name for path in (tmp_path / "checkpoints" / "step-00000003").iterdir()}
    assert len(folders) == 2 and any(name.endswith(".1") for name in folders), "the failed try is cleaned up"


def test_after_max_failed_saves_training_stops_and_names_the_last_good_commit(tmp_path: Path) -> None:
    def work(engine: Any) -> str:
        keeper = Checkpointer(tmp_path, CheckpointConfig(max_failed_saves=3), engine)
        keeper.newest()
        keeper.save(10, groups_of(engine), {})
        keeper.finish()
        if engine.rank == 1:
            keeper.store.put_parts = refusing(9, DataError("no space"))(None)  # type: ignore[method-assign]
        keeper.save(20, groups_of(engine), {})
        with pytest.raises(TrainingError) as caught:
            for _ in range(1000):
                keeper._pending.job.wait() if keeper._pending.job else None  # type: ignore[union-attr]
                keeper.poll()
        assert keeper.failed_saves == 3
        return str(caught.value)

    told = on_ranks(2, work)
    assert told[0] == told[1] and "\n" not in told[0]
    assert (
        "step-00000020 was not committed (rank 1: no space): 3 failures in a row, the last good one is step 10"
        in told[0]
    )
    assert find(tmp_path / "checkpoints")[0] == 10


def test_at_the_end_a_save_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """finish() tries as often as allowed, at once, and never returns without a commit."""

    def work(engine: Any, times: int) -> int | None:
        keeper = Checkpointer(tmp_path, CheckpointConfig(max_failed_saves=2), engine)
        keeper.newest()
        keeper.store.put_parts = refusing(times, DataError("no space"))(keeper.store.put_parts)  # type: ignore[method-assign]
        keeper.save(10 * times, groups_of(engine), {})
        keeper.finish()
        return keeper.last_good

    assert on_ranks(2, lambda engine: work(engine, 1)) == [10, 10]
    with pytest.raises(TrainingError, match="2 failures in a row"):
        on_ranks(1, lambda engine: work(engine, 2))
    assert list_commits(open_store(tmp_path / "checkpoints")) == [10]


def test_a_newer_save_takes_the_place_of_a_failed_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def work(engine: Any) -> None:
        keeper = Checkpointer(tmp_path, CheckpointConfig(), engine)
        keeper.newest()
        keeper.store.put_parts = refusing(1, DataError("no space"))(keeper.store.put_parts)  # type: ignore[method-assign]
        keeper.save(10, groups_of(engine), {})
        keeper.save(20, groups_of(engine, 3), {})  # waits for the first, which fails
        assert keeper.failed_saves == 1 and keeper.last_good is None
        keeper.finish()
        assert keeper.failed_saves == 0 and keeper.last_good == 20

    on_ranks(1, work)
    assert "step 10 stays unsaved: step 20 is saved in its place" in caplog.messages
    assert list_commits(open_store(tmp_path / "checkpoints")) == [20]


def test_a_full_or_read_only_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = LocalStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DataError, match="No space left on device; check the path, the rights and the free space"):
            store.put_parts([b"a", memoryview(b"b")], "x/y")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    store.put_parts([b"a", memoryview(b"b")], "x/y")
    assert (tmp_path / "x" / "y").read_bytes() == b"ab"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_save_onto_a_full_disk_is_made_once_there_is_room(small_disk: Path) -> None:
    """A megabyte and a half of weights onto two that somebody else has filled by half."""
    weights = {f"w{number}": torch.full((1 << 17,), float(number)) for number in range(3)}  # rank 0's lies in one file
    hog = small_disk / "hog"
    hog.write_bytes(b"x" * (1 << 20))

    def work(engine: Any) -> str:
        keeper = Checkpointer(small_disk, CheckpointConfig(max_failed_saves=2), engine)
        keeper.newest()
        keeper.save(10, {"model": whole(weights)}, {})
        keeper._settle()
        assert keeper.failed_saves == 1 and not list(small_disk.rglob(".tmp-*"))
        engine.exchange(None)
        if engine.rank == 0:
            hog.unlink()
        engine.exchange(None)
        keeper.finish()
        hog.write_bytes(b"x" * (1 << 18))
        keeper.save(20, {"model": whole(weights)}, {})
        with pytest.raises(TrainingError) as caught:
            keeper.finish()
        return str(caught.value)

    told = on_ranks(2, work)
    assert "No space left on device; check the path, the rights and the free space" in told[0]
    assert "2 failures in a row, the last good one is step 10" in told[0]
    assert find(small_disk / "checkpoints") == (10, [], 0)


# --- finding ------------------------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    victim = next(folder.glob("*/exp_avg-00001.safetensors"))
    if how == "flip":
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
    elif how == "truncate":
        victim.write_bytes(victim.read_bytes()[:-4])
    elif how == "delete":
        victim.unlink()
    elif how == "manifest":
        (folder / "manifest.json").write_text("{")
    elif how == "state":  # a manifest that says something else and is as readable as before
        text = (folder / "manifest.json").read_text()
        changed = text.replace('"state":{', '"state":{"other":1,').replace('{"other":1,}', '{"other":1}')
        assert changed != text
        (folder / "manifest.json").write_text(changed)
    else:  # one without a seal, as of earlier versions, that says of a tensor nothing that can be
        fields = json.loads((folder / "manifest.json").read_text())
        del fields["sha256"]
        text = json.dumps(fields, separators=(",", ":"))
        (folder / "manifest.json").write_text(text.replace('"pieces":[[0,0]', '"pieces":[[0,1]'))


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "manifest", "layout", "state"])
def test_a_damaged_commit_is_passed_over_aloud_and_can_be_made_again(tmp_path: Path, how: str) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    damage(tmp_path / "step-00000020", how)
    step, complaints, passed_over = find(tmp_path, world_size=3)
    assert step == 10 and passed_over == 1 and len(complaints) == 1 and "step-00000020" in complaints[0]
    assert list_commits(open_store(tmp_path)) == [10]
    save(tmp_path, 20, seed=9)
    assert find(tmp_path) == (20, [], 0)
    assert not list(tmp_path.glob("*/set-aside-*")), "what was damaged is cleaned up once the step is made again"


def test_what_was_saved_and_is_lost_is_never_started_anew(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    for step in (10, 20):
        damage(tmp_path / f"step-{step:08d}", "flip")
    for _ in range(2):
        with pytest.raises(TrainingError, match="no valid checkpoint .*exp_avg-00001.*: SHA-256"):
            find(tmp_path, world_size=2)
    for path in tmp_path.glob("*/manifest.json"):
        path.unlink()
    with pytest.raises(TrainingError, match="no valid checkpoint; restore one, or move the folder away"):
        find(tmp_path)


def test_a_finished_run_whose_checkpoints_are_gone_is_not_trained_anew(tmp_path: Path) -> None:
    def start(engine: Any) -> None:
        Checkpointer(tmp_path / "run", CheckpointConfig(url=str(tmp_path / "empty")), engine).newest()

    (tmp_path / "run" / "artifact").mkdir(parents=True)
    with pytest.raises(TrainingError, match="is a finished run .* holds no checkpoint of it; restore them"):
        on_ranks(2, start)


def test_a_start_that_ended_in_its_first_save_has_lost_nothing(place: str, caplog: pytest.LogCaptureFixture) -> None:
    def killed(engine: Any) -> None:
        keeper = Checkpointer(Path("unused"), CheckpointConfig(url=place), engine)
        assert keeper.newest() is None
        keeper.store.put_if_absent = refusing(99, DataError("killed"))(None)  # type: ignore[method-assign]
        keeper.save(4, groups_of(engine), {})
        keeper._pending.job.wait()  # type: ignore[union-attr]

    on_ranks(2, killed)
    store = open_store(place)
    assert store.list("step-") and not list_commits(store)
    assert find(place) == (None, [], 0)
    said = "the run was started before and has no checkpoint; starting from step 0"
    assert sum(said in message for message in caplog.messages) == 1, "not by the very first start"
    save(place, 4)
    left = {key.split("/")[1] for key, _ in store.list("step-")}
    assert left == {"manifest.json", read_manifest(store, 4).attempt}, "the remains are gone"

    store.put_bytes(b"x", "step-00000008/of-nobody/weights")
    store.delete("step-00000004/manifest.json")
    with pytest.raises(TrainingError, match="no valid checkpoint"):
        find(place)


def test_files_of_nobody_are_refused(tmp_path: Path) -> None:
    (tmp_path / "step-00000004" / "somebody").mkdir(parents=True)
    (tmp_path / "step-00000004" / "somebody" / "model-00000.safetensors").write_bytes(b"x")
    with pytest.raises(TrainingError, match="1 files but no valid checkpoint"):
        find(tmp_path)


@pytest.mark.parametrize("method", ["list", "open_range"])
def test_a_store_that_does_not_answer_is_no_fresh_start(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a reason to fall back: what cannot be read now may be whole."""
    for step in (10, 20):
        save(tmp_path, step)

    def silent(*_: Any) -> Any:
        raise DataError("the store does not answer")

    monkeypatch.setattr(LocalStore, method, silent)
    with pytest.raises(TrainingError, match="the store does not answer"):
        find(tmp_path, world_size=2)


def test_another_format_is_refused_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    path = tmp_path / "step-00000020" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    with pytest.raises(TrainingError, match="manifest.json: format 1, this version reads 2; go on with the version"):
        find(tmp_path)


def test_a_commit_to_roll_back_to(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert [find(tmp_path, not_after=step)[0] for step in (30, 29, 10, 9)] == [30, 20, 10, None]
    assert list_commits(open_store(tmp_path)) == [10, 20, 30], "newer ones stay"
    damage(tmp_path / "step-00000010", "flip")
    with pytest.raises(TrainingError, match="no valid checkpoint"):
        find(tmp_path, not_after=15)


# --- two at once --------------------------------------------------------------------------------------------------


def test_a_leftover_of_an_earlier_start_commits_nothing(place: str) -> None:
    save(place, 10)

    def work(engine: Any) -> None:
        zombie = Checkpointer(Path("unused"), CheckpointConfig(url=place), engine)
        zombie.newest()
        zombie.save(20, groups_of(engine, 1), {})  # its files are put
        newer = Checkpointer(Path("unused"), CheckpointConfig(url=place), engine)
        snapshot = newer.newest()
        assert snapshot is not None and snapshot.step == 10
        with pytest.raises(TrainingError, match="start 3 of this run has .* start 2: this process is a leftover"):
            zombie.finish()
        assert list_commits(newer.store) == [10]
        newer.save(20, groups_of(engine, 2), {})
        newer.finish()
        again = newer.newest()
        assert again is not None and again.step == 20 and again.commit.manifest.attempt == newer.attempt
        restored = blank(engine)
        again.restore(restored)
        assert same(engine, restored, 2)

    on_ranks(1, work)


@pytest.mark.parametrize("whole_commit", [True, False])
def test_a_commit_of_an_earlier_start_in_between_counts_if_it_is_whole(
    tmp_path: Path, whole_commit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It had looked for a newer start just before that registered."""
    save(tmp_path, 10)

    def work(engine: Any) -> str:
        older, newer = (Checkpointer(Path("unused"), CheckpointConfig(url=str(tmp_path)), engine) for _ in range(2))
        older.newest()
        older.save(20, groups_of(engine), {})
        older._pending.job.wait()  # type: ignore[union-attr]
        newer.newest()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("training.checkpoint.refuse_superseded", lambda *_: None)
            older.finish()
        assert list_commits(older.store) == [10, 20]
        if not whole_commit:
            next((tmp_path / "step-00000020").glob("*/model-*")).write_bytes(b"")
        newer.save(20, groups_of(engine), {})
        newer.finish()
        found = newer.newest()
        assert found is not None and found.step == 20 and not found.complaints
        return found.commit.manifest.attempt == (older if whole_commit else newer).attempt

    assert on_ranks(1, work) == [True]
    word = "and is whole: it counts" if whole_commit else "it is set aside"
    assert sum(word in message for message in caplog.messages) == 1


def test_starts_are_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    store = open_store(tmp_path)
    assert [generation_of(store, read_manifest(store, step).attempt) for step in (1, 2, 3)] == [1, 2, 3]
    assert generation_of(store, "nobody") == 0


# --- retention ----------------------------------------------------------------------------------------------------


def steps_after(folder: Path, steps: range, **config: Any) -> list[int]:
    def work(engine: Any) -> None:
        keeper = Checkpointer(folder, CheckpointConfig(**config), engine)
        keeper.newest()
        for step in steps:
            keeper.save(step, groups_of(engine), {})
            keeper.finish()

    on_ranks(2, work)
    return list_commits(open_store(folder / "checkpoints"))


def test_the_last_and_every_so_many_are_kept(tmp_path: Path) -> None:
    assert steps_after(tmp_path, range(1, 9), keep_last=2, keep_every=3) == [3, 6, 7, 8]
    assert {path.name for path in (tmp_path / "checkpoints").glob("step-*")} == {
        f"step-{step:08d}" for step in (3, 6, 7, 8)
    }


def test_two_known_good_commits_survive_a_failing_save_and_an_unread_past(tmp_path: Path) -> None:
    assert steps_after(tmp_path, range(1, 4), keep_last=2) == [2, 3]

    def failing(engine: Any) -> None:
        keeper = Checkpointer(tmp_path, CheckpointConfig(keep_last=2, max_failed_saves=2), engine)
        keeper.newest()
        keeper.store.put_parts = refusing(9, DataError("no space"))(None)  # type: ignore[method-assign]
        keeper.save(4, groups_of(engine), {})
        keeper.finish()

    with pytest.raises(TrainingError, match="last good one is step 3"):
        on_ranks(1, failing)
    assert list_commits(open_store(tmp_path / "checkpoints")) == [2, 3]
    # The newest is damaged, so after the next save only 2 and 4 are known to be good: 2 stays although it is third.
    damage(tmp_path / "checkpoints" / "step-00000003", "delete")
    assert steps_after(tmp_path, range(4, 5), keep_last=2) == [2, 4]


def test_deletions_that_fail_cost_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def work(engine: Any) -> None:
        keeper = Checkpointer(tmp_path, CheckpointConfig(keep_last=2), engine)
        keeper.newest()
        keeper.store.delete = refusing(1, DataError("not allowed"))(keeper.store.delete)  # type: ignore[method-assign]
        for step in (1, 2, 3, 4):
            keeper.save(step, groups_of(engine), {})
            keeper.finish()

    on_ranks(1, work)
    assert sum("old checkpoints stay: not allowed" in message for message in caplog.messages) == 1
    assert list_commits(open_store(tmp_path / "checkpoints")) == [3, 4], "the next save deletes what stayed"


def test_remains_are_cleaned_up_and_what_is_ahead_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for key in ("step-00000005/dead/model-00000.safetensors", "step-00000020/dead/x", "step-00000030/dead/x"):
        open_store(tmp_path).put_bytes(b"remains", key)
    leftover, mine = tmp_path / "step-00000010" / ".tmp-dead", tmp_path / "step-00000030" / ".tmp-alive"
    for path, age_s in ((leftover, 1000), (mine, 800)):  # by the clock of another machine, which is slow
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s,) * 2)
    save(tmp_path, 20)
    store = open_store(tmp_path)
    assert not store.list("step-00000005/") and not leftover.exists() and mine.exists()
    assert [key for key, _ in store.list("step-") if "dead" in key] == ["step-00000030/dead/x"]
    assert not any(verify(store, step, read_manifest(store, step)) for step in (10, 20))


def test_unfinished_uploads_of_the_past_are_aborted(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, s3_server)
    S3Store("sweep").client.create_bucket(Bucket="sweep")
    store, other = S3Store("sweep", "run"), S3Store("sweep", "elsewhere")
    for key in ("run/step-1/x", "run/step-2/y", "elsewhere/z"):
        store.client.create_multipart_upload(Bucket="sweep", Key=key)
    assert store.sweep(1e9) == 0, "they began later (in 2010: moto's clock stands still)"
    assert store.sweep(2e9) == 2 and store.sweep(2e9) == 0
    assert other.sweep(2e9) == 1
