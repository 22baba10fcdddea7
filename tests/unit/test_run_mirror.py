"""The run directory's copy beside the checkpoints, and starting from another run's weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import DataError
from data.manifest import Manifest, step_folder, write_manifest
from data.object_store import LocalStore, open_store
from models.artifact import save_artifact
from models.autoencoder import save_autoencoder
from tests.helpers import tiny
from tests.helpers.commits import write_commit
from tests.helpers.thread_ranks import cut, on_ranks, whole
from training.attempts import Attempt, register
from training.checkpoint import CheckpointConfig, Checkpointer, bring_up_to_date
from training.errors import TrainingError
from training.frozen import load_frozen
from training.init_from import init_from
from training.loop import open_checkpoints
from training.run_mirror import RunMirror, fetch_run

LINE = json.dumps(
    {
        **{"attempt": "try-1", "first_micro_batch": 0, "world_size": 1, "num_workers": 0, "data_sets": []},
        **{"stamp": {}, "format_version": 1},
    }
)


def a_run(folder: Path) -> Path:
    """What the first machine has on its disk."""
    store = LocalStore(folder)
    store.put_bytes(b"recipe: {}\n", "run.yaml")
    store.put_bytes(b'{"step": 1}\n{"step": 2}\n', "metrics.jsonl")
    store.put_bytes(f"{LINE}\n".encode(), "ledger/attempts.jsonl")
    store.put_bytes(b"visits", "ledger/try-1/000000000000-000000000004-rank-00000.safetensors")
    store.put_bytes(b'{"key": "x"}\n', "bad_samples-0.jsonl")
    store.put_bytes(b"network", "frozen/autoencoder/model.safetensors")
    store.put_bytes(b"grid", "samples/step-00000001.png")
    return folder


def commit(store: Any, step: int) -> None:
    assert write_manifest(store, step_folder(step), Manifest(step=step, attempt="a", files={}))


def mirror(store: Any, folder: Path, name: str) -> RunMirror:
    return RunMirror(store, folder, 0, register(store, name))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Any:
    return open_store(tmp_path / "bucket")


def test_an_empty_directory_becomes_the_run(tmp_path: Path, store: Any) -> None:
    run = a_run(tmp_path / "run")
    first = mirror(store, run, "try-1")
    store.put_bytes((run / "run.yaml").read_bytes(), "run/run.yaml")
    for number in (3, 4):
        first.put_mine()
        first.put_shared()
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": number}) + "\n")
    first.put_shared()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5')  # a torn line stays here
    first.put_shared()

    fetch_run(store, tmp_path / "early")
    assert set(files(tmp_path / "early")) == {"run.yaml"}, "nothing was ever committed: the run begins anew"
    commit(store, 4)
    fetch_run(store, tmp_path / "new")
    expected = files(run)
    expected["metrics.jsonl"] = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4}\n'
    del expected["samples/step-00000001.png"]
    assert files(tmp_path / "new") == expected
    assert len(store.list("run/parts/metrics.jsonl/")) == 3, "a growing file is put bit by bit"

    fetch_run(store, run)
    assert (run / "metrics.jsonl").read_bytes().endswith(b'{"step": 5'), "what goes on from the copy stays"


def test_the_newest_start_wins_over_a_leftover_and_over_a_machine_that_was_left(tmp_path: Path, store: Any) -> None:
    old = a_run(tmp_path / "old")
    first = mirror(store, old, "try-1")
    store.put_bytes((old / "run.yaml").read_bytes(), "run/run.yaml")
    first.put_shared()
    commit(store, 4)
    new = tmp_path / "new"
    fetch_run(store, new)
    second = mirror(store, new, "try-2")
    for folder, step in ((old, 66), (new, 3)):  # the leftover goes on writing
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
    second.put_shared()
    first.put_shared()
    for folder in (tmp_path / "third", old):
        fetch_run(store, folder)
        assert (folder / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    second.drop_older()
    assert {key.rpartition("/")[2][:6] for key, _ in store.list("run/parts/metrics.jsonl/")} == {"000002"}


def test_what_an_earlier_start_put_until_it_was_taken_over_is_there(tmp_path: Path) -> None:
    old, new = a_run(tmp_path / "old"), tmp_path / "new"
    config = CheckpointConfig(url=str(tmp_path / "bucket"))

    def work(engine: Any) -> None:
        first = Checkpointer(old, config, engine)
        first.newest()
        first.save(2, {"model": whole({"w": torch.ones(3)})}, {})
        first.finish()
        bring_up_to_date(new, config, engine, 0)  # the second start begins, and the first goes on
        with (old / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3}\n{"step": 4}\n')
        first.save(4, {"model": whole({"w": torch.ones(3)})}, {})
        first.finish()
        _, snapshot = open_checkpoints(new, config, engine, 0)
        assert snapshot is not None and snapshot.step == 4

    on_ranks(1, work)
    assert (new / "metrics.jsonl").read_bytes() == (old / "metrics.jsonl").read_bytes()


def test_a_copy_with_a_hole_is_refused(tmp_path: Path, store: Any) -> None:
    run = a_run(tmp_path / "run")
    first = mirror(store, run, "try-1")
    store.put_bytes((run / "run.yaml").read_bytes(), "run/run.yaml")
    first.put_shared()
    commit(store, 4)
    (part,) = [key for key, _ in store.list("run/parts/metrics.jsonl/")]
    store.put_bytes(b"more\n", part[:-3] + "999")
    with pytest.raises(DataError, match="what comes before it is missing"):
        fetch_run(store, tmp_path / "new")


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path, store: Any) -> None:
    store.put_bytes(b"recipe: {}\n", "run/run.yaml")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    fetch_run(store, tmp_path / "mine")
    assert set(files(tmp_path / "mine")) == {"letter"}


def test_checkpoints_of_another_run_are_refused_before_it_is_disturbed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(f"recipe: {{name: {name}}}\n")
    config = CheckpointConfig(url=str(tmp_path / "bucket"))
    on_ranks(1, lambda engine: Checkpointer(tmp_path / "one", config, engine).newest())

    def refused(engine: Any) -> str:
        with pytest.raises(TrainingError) as caught:  # on both: nobody is left waiting for rank 0
            Checkpointer(tmp_path / "two", config, engine).newest()
        return str(caught.value)

    told = on_ranks(2, refused)
    assert told[0] == told[1] and f"holds the checkpoints of another run than {tmp_path / 'two'}" in told[0]
    assert len(open_store(tmp_path / "bucket").list("attempts/")) == 1


def test_an_empty_place_is_no_fresh_start_for_a_run_with_commits_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.yaml").write_text("recipe: {checkpoint: {url: null}}\n")
    moved = CheckpointConfig(url=str(tmp_path / "bucket"))
    on_ranks(1, lambda engine: Checkpointer(run, moved, engine).newest())
    write_commit(run / "checkpoints", 4, {"model": {"w": torch.ones(3)}}, {"n": 1})
    with pytest.raises(TrainingError, match="has its checkpoints in .*run/checkpoints, and .*bucket holds none"):
        on_ranks(2, lambda engine: Checkpointer(run, moved, engine).newest())


def test_what_a_run_keeps_is_there_before_its_commit(tmp_path: Path) -> None:
    """The mirror's failure is the save's."""
    run = a_run(tmp_path / "run")

    def work(engine: Any) -> None:
        keeper = Checkpointer(run, CheckpointConfig(url=str(tmp_path / "bucket")), engine)
        keeper.newest()
        puts: list[str] = []
        put = keeper.store.put_bytes
        refused = []

        def put_bytes(data: bytes, key: str) -> None:
            if key.startswith("run/parts/metrics.jsonl") and not refused:
                refused.append(key)
                raise DataError("no space")
            puts.append(key)
            put(data, key)

        keeper.store.put_bytes = put_bytes  # type: ignore[method-assign]
        keeper.save(4, {"model": whole({"w": torch.ones(3)})}, {})
        while keeper.last_good is None:
            keeper.poll()
        keeper.finish()
        assert refused and any(key.startswith("run/parts/metrics.jsonl") for key in puts)

    on_ranks(1, work)
    fetch_run(open_store(tmp_path / "bucket"), tmp_path / "new")
    assert (tmp_path / "new" / "frozen" / "autoencoder" / "model.safetensors").read_bytes() == b"network"
    assert (tmp_path / "new" / "bad_samples-0.jsonl").exists()


def test_ledger_files_of_all_ranks_are_kept_once(tmp_path: Path, store: Any) -> None:
    run = a_run(tmp_path / "run")
    LocalStore(run).put_bytes(b"other", "ledger/try-1/000000000000-000000000004-rank-00001.safetensors")
    attempt = Attempt(generation=1, name="try-1", started_s=0.0)
    RunMirror(store, run, 0, attempt).put_mine()
    assert [key for key, _ in store.list("run/ledger/")] == [
        "run/ledger/try-1/000000000000-000000000004-rank-00000.safetensors"
    ]
    RunMirror(store, run, 1, attempt).put_mine()
    assert len(store.list("run/ledger/")) == 2


def test_kept_networks_stand_in_for_the_recipes_and_drop_captions_as_it_says(tmp_path: Path) -> None:
    autoencoder = tiny.autoencoder_artifact(tmp_path / "autoencoder")
    recipe = tiny.dit_recipe(tmp_path, autoencoder, text_encoders=tiny.ENCODERS[:1])
    made = load_frozen(recipe)
    with pytest.raises(DataError, match="no such file or folder"):
        load_frozen(replace(recipe, autoencoder=str(tmp_path / "gone")), tmp_path / "frozen")
    save_autoencoder(tmp_path / "frozen" / "autoencoder", made.autoencoder)
    made.conditioner.save(tmp_path / "frozen" / "text_encoders")
    kept = load_frozen(replace(recipe, autoencoder=str(tmp_path / "gone")), tmp_path / "frozen")
    assert kept.autoencoder_fingerprint == made.autoencoder_fingerprint
    assert kept.conditioner.fingerprint == made.conditioner.fingerprint
    assert kept.conditioner.dropout == made.conditioner.dropout == [0.2]


# --- init_from ----------------------------------------------------------------------------------------------------

THEIRS = {
    "kept": torch.arange(10.0).reshape(2, 5),
    "wider": torch.ones(4),
    "gone": torch.ones(2),
    "also": torch.arange(7.0) + 100,
}


class Model:
    """What init_from needs of an engine beside the exchange."""

    def __init__(self, engine: Any) -> None:
        ours = {"kept": torch.zeros(2, 5), "wider": torch.zeros(6), "new": torch.zeros(3), "also": torch.zeros(7)}
        self.fragments = cut(ours, engine.rank, engine.world_size)
        self.rank, self.world_size = engine.rank, engine.world_size
        self.exchange, self.from_rank0 = engine.exchange, engine.from_rank0
        self.refreshed = 0

    def weight_fragments(self) -> dict[str, Any]:
        return self.fragments

    def refresh_weights(self) -> None:
        self.refreshed += 1


def loaded_from(url: str, folder: Path, world_size: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The list, and our tensors afterwards."""
    folder.mkdir()

    def work(engine: Any) -> tuple[dict[str, Any], Model]:
        model = Model(engine)
        record = init_from(url, "net", model, folder)  # type: ignore[arg-type]
        assert model.refreshed == 1
        return record, model

    results = on_ranks(world_size, work)
    assert json.loads((folder / "init_from.json").read_text()) == results[0][0]
    names = results[0][1].fragments
    return results[0][0], {name: torch.cat([model.fragments[name].data for _, model in results]) for name in names}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("what", ["run", "folder", "step", "artifact", "finished run"])
def test_weights_of_another_run_are_taken_by_name_and_shape(
    tmp_path: Path, what: str, world_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "theirs"
    other = {name: tensor * 0 - 1 for name, tensor in THEIRS.items()}
    write_commit(run / "checkpoints", 4, {"model": other, "ema-0.9": THEIRS, "ema-0.5": other}, {"n": 1})
    write_commit(run / "checkpoints", 8, {"model": other, "ema-0.9": THEIRS if what != "step" else other}, {"n": 1})
    if what in ("artifact", "finished run"):
        save_artifact(run / "artifact", "net", {}, THEIRS)
    place = {"folder": "checkpoints", "step": "checkpoints/step-00000004", "artifact": "artifact"}.get(what, "")
    record, ours = loaded_from(str(run / place), tmp_path / "ours", world_size)
    assert torch.equal(ours["kept"], THEIRS["kept"].reshape(-1)) and torch.equal(ours["also"], THEIRS["also"])
    assert not ours["wider"].any() and not ours["new"].any()
    step = 4 if what == "step" else 8
    assert record == {
        "source": str(run / "artifact") if "checkpoints" not in record["source"] else record["source"],
        "weights": "artifact" if what in ("artifact", "finished run") else f"ema-0.9 at step {step}",
        "loaded": ["also", "kept"],
        "missing": ["new"],
        "shape_differs": {"wider": [[4], [6]]},
        "unexpected": ["gone"],
    }
    assert "2 loaded, 1 missing, 1 shape differs, 1 unexpected" in capsys.readouterr().out


def test_weights_that_cannot_be_taken_are_refused(tmp_path: Path) -> None:
    write_commit(tmp_path / "a", 4, {"ema-0.9": {"x": torch.ones(3)}}, {"n": 1})
    (tmp_path / "empty").mkdir()
    write_commit(tmp_path / "bad", 4, {"ema-0.9": THEIRS}, {"n": 1})
    write_commit(tmp_path / "bad", 8, {"ema-0.9": THEIRS}, {"n": 1})
    next((tmp_path / "bad" / step_folder(8)).glob("*/*.safetensors")).write_bytes(b"")
    for number, (url, message) in enumerate(
        (
            ("a", "none of its 1 tensors has the name and shape of one of the model's 4"),
            ("empty", "no artifact and no checkpoint is there"),
            (f"bad/{step_folder(8)}", "has 0 bytes, the manifest says"),
        )
    ):
        with pytest.raises(TrainingError, match=message):
            loaded_from(str(tmp_path / url), tmp_path / f"ours-{number}", 1)
        assert not (tmp_path / f"ours-{number}" / "init_from.json").exists()
    assert loaded_from(str(tmp_path / "bad"), tmp_path / "ours", 2)[0]["weights"] == "ema-0.9 at step 4"
