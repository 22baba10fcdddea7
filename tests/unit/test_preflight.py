"""Who is named by the check of the nodes, by the facts that each writes down."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.cluster import Preflight
from launch.node_check import disk_problems, neighbours, store_problems
from launch.preflight import NodeFacts, bad_nodes, check_command, judge_nodes, write_facts

LIMITS = Preflight(min_free_gib=1.0, max_slowdown=1.5, min_all_reduce_gb_s=1.0)
NODES = ("n1", "n2", "n3")


def facts(number: int, **changes: object) -> NodeFacts:
    good = NodeFacts(
        node=f"n{number}",
        rank=number - 1,
        versions={"torch": "2.13.0", "driver": "570"},
        clock_s=1000.0 + number / 1000,
        work_s=0.100,
        pair_s=0.020,
        all_reduce_gb_s=40.0,
    )
    return replace(good, **changes)  # type: ignore[arg-type]


def test_good_nodes_are_not_named() -> None:
    assert judge_nodes([facts(1), facts(2), facts(3)], NODES, LIMITS) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clock_s": 1007.0}, "its clock is +7.0 s off"),
        ({"clock_s": 991.001}, "its clock is -9.0 s off"),
        ({"work_s": 0.2}, "computes 2.0 times slower than the median"),
        ({"pair_s": 0.1}, "exchanges data 5.0 times slower than the median"),
        ({"versions": {"torch": "2.12.0", "driver": "570"}}, "torch is 2.12.0, elsewhere 2.13.0"),
        ({"versions": {"torch": "2.13.0"}}, "driver is absent, elsewhere 570"),
        ({"problems": ("7 GPUs instead of 8",)}, "7 GPUs instead of 8"),
        ({"all_reduce_gb_s": None}, "did not come through the all-reduce"),
    ],
)
def test_a_bad_node_is_named(change: dict[str, object], words: str) -> None:
    assert judge_nodes([facts(1), facts(2, **change), facts(3)], NODES, LIMITS) == {"n2": [words]}


def test_who_is_silent_is_named_and_nobody_who_waited_for_it() -> None:
    waiting = [facts(1, all_reduce_gb_s=None, work_s=None), facts(3, all_reduce_gb_s=None, work_s=None)]
    assert judge_nodes(waiting, NODES, LIMITS) == {"n2": ["gave no answer within 300 s"]}


def test_who_failed_first_is_named_and_nobody_who_lost_it() -> None:
    failed = {"all_reduce_gb_s": None, "error": "CUDA error: out of memory", "error_s": 5.0}
    lost = {"all_reduce_gb_s": None, "error": "Connection closed by peer", "error_s": 5.1}
    silent = facts(3, all_reduce_gb_s=None)  # ended before it could say so
    assert judge_nodes([facts(1, **lost), facts(2, **failed), silent], NODES, LIMITS) == {
        "n2": ["CUDA error: out of memory"]
    }


def test_a_slow_network_is_everybodys() -> None:
    slow = [facts(number, all_reduce_gb_s=0.5) for number in (1, 2, 3)]
    assert set(judge_nodes(slow, NODES, LIMITS)) == set(NODES)


def test_facts_go_through_files(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_facts(tmp_path, facts(number, all_reduce_gb_s=None))
    write_facts(tmp_path, facts(1, problems=("no disk",)))
    assert bad_nodes(tmp_path, NODES, LIMITS) == {"n1": ["no disk"]}


def test_the_check_starts_where_the_ranks_will(tmp_path: Path) -> None:
    srun = ["srun", "-K", "apptainer", "exec", "x.sif", "darkroom", "launch", "task", "--torchrun", "8", "--", "train"]
    command = check_command(srun, tmp_path, replace(LIMITS, store="s3://lab/x"))
    assert command[:8] == [*srun[:6], "launch", "check-node"] and command[8] == str(tmp_path)
    assert "--store=s3://lab/x" in command and "train" not in command


def test_every_node_exchanges_with_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for nodes in (3, 4, 5, 8):
        rounds = [neighbours(rank, 2 * nodes) for rank in range(2 * nodes)]
        for number in (0, 1):
            partners = [found[number] for found in rounds]
            sitting_out = [rank for rank, other in enumerate(partners) if other is None]
            assert len(sitting_out) == 2 * (nodes % 2)
            for rank, other in enumerate(partners):
                if other is not None:
                    assert partners[other] == rank and abs(rank - other) in (2, 2 * nodes - 2)
        assert all(any(other is not None for other in found) for found in rounds)
    assert neighbours(3, 4) == []


def test_what_a_node_finds_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert disk_problems(0.0) == []
    assert all("GiB free, wanted 1e+09" in problem for problem in disk_problems(1e9)) and len(disk_problems(1e9)) == 2

    def broken() -> None:
        raise OSError("no route to it")

    assert store_problems(None) == store_problems(lambda: None) == []
    assert store_problems(broken) == ["store: no route to it"]
