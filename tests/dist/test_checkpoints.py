"""Two real DeepSpeed ranks: checkpoints under every ZeRO stage, read under every other, by one process and by three."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.thread_ranks import cut, on_ranks
from tests.helpers.warm_ranks import run_ranks
from training.checkpoint import CheckpointConfig, Checkpointer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    worker = ROOT / "tests" / "helpers" / "checkpoint_worker.py"
    result = run_ranks(2, worker, folder)
    assert result.code == 0, result.err
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_stage_loads_every_other_to_the_bit(results):
    """Although the weights moved on while the files were being written."""
    pairs = {f"{source} under {stage}": [] for source in range(4) for stage in range(4)}
    assert {name: results[name] for name in pairs} == pairs


def test_and_goes_on_alike(results):
    assert [results[f"a step on under {stage}"] for stage in range(4)] == [[]] * 4


@pytest.mark.parametrize("stage", range(4))
def test_one_process_and_three_read_what_two_ranks_wrote(folder, stage):
    place = folder / f"stage-{stage}"
    expected = load_file(place / "expected.safetensors")

    def read(engine):
        snapshot = Checkpointer(place, CheckpointConfig(), engine).newest()
        assert snapshot is not None
        groups = {}
        for group in snapshot.commit.groups:
            tensors = {name: expected[f"{group}/{name}"] for name in snapshot.commit.shapes(group)}
            groups[group] = cut(tensors, engine.rank, engine.world_size)
            for fragment in groups[group].values():
                fragment.data.fill_(torch.nan)
        assert sum(map(len, groups.values())) == len(expected)
        snapshot.restore(groups)
        return groups

    for world_size in (1, 3):
        parts = on_ranks(world_size, read)
        for name, tensor in expected.items():
            group, _, name = name.partition("/")
            assert torch.equal(torch.cat([part[group][name].data for part in parts]), tensor.reshape(-1))


@pytest.mark.parametrize("stage", range(4))
def test_a_rank_writes_what_it_owns_and_no_more(folder, stage):
    """Two equal halves, but for padding, headers and, at stage 0, for tensors that are dealt whole."""
    sizes = [
        sum(path.stat().st_size for path in (folder / f"stage-{stage}").glob(f"*/step-*/*/exp_avg-{rank:05d}.safetensors"))
        for rank in (0, 1)
    ]
    elements = sum(tensor.numel() for name, tensor in load_file(folder / f"stage-{stage}" / "expected.safetensors").items()
                   if name.startswith("exp_avg/"))  # fmt: skip
    assert 4 * elements <= sum(sizes) < 4 * elements + 2 * 1000
    assert min(sizes) > 0.3 * sum(sizes)


def test_a_save_that_one_rank_cannot_make_fails_on_all_and_is_made_again(results):
    assert results["failing"]["failures"] == [1, 1]
    told = results["failing"]["told"]
    assert told[0] == told[1] and "step-00000002 was not committed (rank 1: the disk is full)" in told[0]
    assert "3 failures in a row, the last good one is step 1" in told[0]
    assert results["failing"]["commits"] == [1]


def test_a_run_starts_from_the_average_of_another(results):
    found = results["init_from"]
    assert found["loaded"] == 3 and found["wrong"] == []
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-6), "the weights that compute are these"
