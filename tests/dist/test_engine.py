"""Two real DeepSpeed ranks against plain torch, for every ZeRO stage, and checkpoints carried from stage to stage."""

import json
from pathlib import Path

import pytest

from tests.helpers.warm_ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    worker = ROOT / "tests" / "helpers" / "engine_worker.py"
    result = run_ranks(2, worker, folder)
    assert result.code == 0, result.err
    return json.loads((folder / "results.json").read_text())


CASES = [
    *(f"stage {stage}{optim}" for stage in range(4) for optim in ("", ", groups")),
    *("2 then 3", "3 then 1", "1 then 0", "0 then 2", "3 then 2, groups"),
]


@pytest.mark.parametrize("case", CASES)
def test_weights_and_averages_are_those_of_one_process(results, case):
    """Accumulation 2, clipping active, a falling rate, several parameter groups; what differs is the order of a sum."""
    assert results[case]["weights"] < 1e-6
    assert results[case]["ema"] < 1e-6
    assert results[case]["adam_step"] == 5
    assert max(map(abs, results[case]["norms"])) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_what_trains(results, case):
    assert results[case]["masters_are_what_is_saved"] == 0.0


@pytest.mark.parametrize("stage, owned", [(0, 429), (1, 216), (2, 216), (3, 216)])
def test_ema_is_sharded_like_the_masters(results, stage, owned):
    """429 parameters over two ranks: half each, plus the padding of two groups."""
    assert results[f"stage {stage}"]["ema_elements_on_this_rank"] <= owned


STAGES = ["stage 0", *(f"stage {stage}{where}" for stage in (1, 2, 3) for where in ("", ", offload"))]


@pytest.mark.parametrize("case", STAGES)
def test_recomputation_and_offload_change_no_step(results, case):
    """Losses, masters and averages after two clipped steps of accumulation 2."""
    found = results["options"]["ways"][case]
    assert found["plain"] < 1e-5 and found["full"] < 1e-5
    assert found["modes"] == 0.0


@pytest.mark.parametrize("case", ["stage 2, none, compiled", "stage 3, selective, compiled"])
def test_compiled_blocks_train_alike(results, case):
    assert results["options"]["ways"][case] < 1e-5


@pytest.mark.parametrize("case", ["stage 1", "stage 2, offload", "stage 3", "stage 3, offload"])
def test_bfloat16_weights_are_the_rounded_masters(results, case):
    """After a resume as well, which goes on with the same bits."""
    found = results["options"]["bfloat16"][case]
    assert found["master dtypes"] == ["torch.float32"] and found["computing dtypes"] == ["torch.bfloat16"]
    assert found["changed"] > 0 and found["refreshed"] and found["masters are finer"] > 0
    assert found["resumed"] == 0.0


def test_stage_3_leaves_frozen_encoders_alone(results):
    """transformers partitions what it loads as soon as it sees a stage-3 configuration; it must not see the engine's."""
    assert results["options"]["encoders"] == {
        "ours are whole": [True, True],
        "ours are": [["torch.bfloat16"]] * 2,
        "those of transformers are whole": [True, True],
    }
