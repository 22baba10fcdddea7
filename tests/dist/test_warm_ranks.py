"""The forked ranks of the tests are ranks: their own process each, nothing of their parent's, and they end together."""

import json
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.runtime import ranks, spawn
from launch.runtime import EXIT_PREEMPTED
from tests.helpers import warm_ranks

HERE = Path(__file__)  # it is also the script of the ranks


def tell() -> None:
    """Says who this process is."""
    import torch

    heard = {number.name for number in signal.valid_signals() if callable(signal.getsignal(number))}
    facts = {"rank": os.environ["RANK"], "world": os.environ["WORLD_SIZE"], "port": os.environ["MASTER_PORT"]}
    own = {"sid": os.getsid(0) == os.getpid(), "heard": sorted(heard), "cwd": os.getcwd(), "argv": sys.argv[1:]}
    there = {"warm": "deepspeed" in sys.modules, "threads": torch.get_num_threads(), "mark": os.environ.get("MARK")}
    os.write(1, (json.dumps(facts | own | there) + "\n").encode())


def fail() -> None:
    """Rank 1 fails; the others would wait for an hour."""
    if ranks().rank == 1:
        raise ValueError("rank 1 cannot go on")
    time.sleep(3600)


def wait() -> None:
    """Says its process on the pipe, then waits."""
    with open(sys.argv[2], "w") as pipe:
        pipe.write(f"{os.getpid()}\n")
    time.sleep(3600)


def spawn_beside_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    sys.exit(spawn(2, [sys.executable, str(HERE), "tell"]))


def test_ranks_are_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARK", "of the test")
    result = warm_ranks.run_ranks(3, HERE, "tell", 1)
    assert (result.code, result.err) == (0, "")
    told = sorted((json.loads(line) for line in result.out.splitlines()), key=lambda facts: facts["rank"])
    assert [facts.pop("rank") for facts in told] == ["0", "1", "2"]
    assert told[0] == told[1] == told[2]
    assert told[0].pop("port").isdigit()
    assert told[0] == {
        **{"world": "3", "sid": True, "heard": ["SIGINT"], "cwd": str(tmp_path), "argv": ["tell", "1"]},
        **{"warm": True, "threads": 1, "mark": "of the test"},
    }


def test_a_rank_that_fails_ends_the_others():
    result = warm_ranks.run_ranks(3, HERE, "fail")
    assert result.code == 1
    assert "ValueError: rank 1 cannot go on" in result.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_command_ends_its_ranks(tmp_path, number):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = warm_ranks.start_ranks(2, HERE, "wait", pipe)
    said: list[str] = []
    while len(said) < 2:
        said += pipe.read_text().split()
    processes = [os.pidfd_open(int(pid)) for pid in said]
    command.send_signal(number)
    assert command.wait(30).code == (-9 if number == signal.SIGKILL else EXIT_PREEMPTED)
    for process in processes:
        assert select.select([process], [], [], 30)[0], "a rank is left behind"
        os.close(process)


def test_a_fork_beside_a_thread_is_refused():
    """The thread's locks would stay taken in the child."""
    result = warm_ranks.start("spawn_beside_a_thread", script=HERE).wait(60)
    assert result.code == 1 and "RuntimeError: 2 threads before a fork" in result.err


if __name__ == "__main__":
    globals()[sys.argv[1]]()
