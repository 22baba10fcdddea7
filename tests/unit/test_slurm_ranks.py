"""SLURM's variables as ranks."""

import pytest

from launch.errors import ConfigError
from launch.slurm_ranks import expand_nodes, master_port, rank_environment, tasks_per_node

# Of a task as SLURM 22.05 starts it: the second of three on the second of two nodes.
TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "gpu-a[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2,3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_CPUS_ON_NODE": "12",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("n1", ["n1"]),
        ("n[1-2]", ["n1", "n2"]),
        ("gpu-a[08-10,12],login", ["gpu-a08", "gpu-a09", "gpu-a10", "gpu-a12", "login"]),
        ("r[1-2]n[3,5]-ib", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]),
        ("a,b,c", ["a", "b", "c"]),
    ],
)
def test_lists_of_nodes(names: str, expected: list[str]) -> None:
    assert expand_nodes(names) == expected


@pytest.mark.parametrize("names", ["", "n[1-", "n[a-b]", "n[]"])
def test_what_is_no_list_of_nodes(names: str) -> None:
    with pytest.raises(ConfigError, match="as SLURM writes it"):
        expand_nodes(names)


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError):
        tasks_per_node("two")


def test_a_task_becomes_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.slurm_ranks.gpu_count", lambda: 8)
    found = rank_environment(TASK, known=lambda name: True)
    port = found.pop("MASTER_PORT")
    assert found == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "5",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu-a07",
        "OMP_NUM_THREADS": "4",
    }
    assert 1024 < int(port) < 32768
    # A name that nobody resolves: the address of the node that started the step.
    assert rank_environment(TASK, known=lambda name: False)["MASTER_ADDR"] == "10.0.0.7"
    assert "OMP_NUM_THREADS" not in rank_environment(TASK | {"OMP_NUM_THREADS": "2"})
    assert rank_environment(TASK | {"SLURM_CPUS_PER_TASK": "3"})["OMP_NUM_THREADS"] == "3"


def test_a_task_that_sees_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.slurm_ranks.gpu_count", lambda: 1)
    found = rank_environment(TASK)
    assert (found["LOCAL_RANK"], found["RANK"]) == ("0", "3") and "DS_ACCELERATOR" not in found
    monkeypatch.setattr("launch.slurm_ranks.gpu_count", lambda: 0)
    found = rank_environment(TASK)
    assert (found["LOCAL_RANK"], found["DS_ACCELERATOR"]) == ("1", "cpu")


def test_tasks_of_an_array_share_one_world() -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10"}
    found = rank_environment(TASK | array)
    assert (found["RANK"], found["WORLD_SIZE"]) == ("13", "20")


def test_ports_of_neighbours_differ() -> None:
    """Jobs on one node, restarts of one job and steps of one start do not meet; all tasks of a step agree."""
    ports = {
        master_port(TASK | {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart), "SLURM_STEP_ID": str(step)})
        for job in range(100, 120)
        for restart in range(5)
        for step in range(3)
    }
    assert len(ports) == 300
    assert master_port(TASK) == master_port(TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})


def test_outside_of_a_step() -> None:
    with pytest.raises(ConfigError, match="is not set: this command is for srun to start"):
        rank_environment({})
