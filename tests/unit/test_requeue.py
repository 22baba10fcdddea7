"""How attempts are judged, and what becomes of a stage: tables of what is on record."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.attempts import Attempt, RankEnd, Record, rank_ends, write_rank_end
from launch.cluster import RequeuePolicy
from launch.requeue import decide, excluded, judge

POLICY = RequeuePolicy(give_up_after=3, backoff_s=10, max_backoff_s=25, exclude_node_after=2)


def end(rank: int, code: int, *signals: str, at_s: float = 0.0) -> RankEnd:
    return RankEnd(rank=rank, node=f"n{rank + 1}", code=code, signals=signals, ended_s=at_s + rank)


@pytest.mark.parametrize(
    ("ends", "srun", "stopped", "down", "outcome", "failed"),
    [
        ([end(0, 0), end(1, 0)], 0, False, (), "done", ()),
        ([], 0, False, (), "done", ()),
        # A signal at the time limit: both saved, and srun knows nothing of it.
        ([end(0, 75, "SIGUSR1"), end(1, 75, "SIGUSR1")], 0, False, (), "preempted", ()),
        # SLURM ends the job: one saved, one was cut off.
        ([end(0, 75, "SIGTERM")], 137, True, (), "preempted", ()),
        # The signal came before the loop was there to take it.
        ([end(0, 138, "SIGUSR1"), end(1, 138, "SIGUSR1")], 138, False, (), "preempted", ()),
        ([], 138, False, (), "preempted", ()),
        # One rank is killed, the others are ended because of it.
        ([end(1, 137)], 137, False, (), "failed", ("n2",)),
        ([end(1, 137), end(0, 143, "SIGTERM")], 137, False, (), "failed", ("n2",)),
        ([end(0, 1), end(1, 137)], 1, False, (), "failed", ("n2",)),
        ([end(0, 1), replace(end(1, 1), has_said_why=True)], 1, False, (), "failed", ("n2",)),
        # All fail alike: a bug is no node's fault.
        ([end(0, 1), end(1, 1)], 1, False, (), "failed", ()),
        ([end(0, 2), end(1, 2)], 2, False, (), "mistake", ()),
        ([end(0, 1), end(1, 2)], 1, False, (), "mistake", ()),
        # SLURM lost a node; the ranks of the others were told to end.
        ([end(0, 75, "SIGTERM")], 137, True, ("n2",), "lost", ("n2",)),
        ([end(0, 1)], 1, False, ("n2",), "lost", ("n2",)),
        ([], 1, False, (), "failed", ()),
    ],
)
def test_how_an_attempt_ended(ends, srun, stopped, down, outcome, failed) -> None:
    verdict = judge(ends, srun, stopped, down, nodes=2)
    assert (verdict.outcome, verdict.failed_nodes) == (outcome, failed)


def test_a_job_on_one_node_does_not_lose_it() -> None:
    assert judge([end(0, 137)], 137, False, (), nodes=1).failed_nodes == ()


def attempts(*outcomes: tuple[str, int, int] | tuple[str, int, int, str]) -> list[Attempt]:
    """(outcome, progress before, after[, failed node]) each."""
    return [
        Attempt(
            id=f"1-{number}",
            nodes=("n1", "n2"),
            started_s=float(number),
            progress=before,
            ended_s=number + 0.5,
            outcome=outcome,  # type: ignore[arg-type]
            progress_after=after,
            failed_nodes=tuple(failed),
        )
        for number, (outcome, before, after, *failed) in enumerate(outcomes)
    ]


@pytest.mark.parametrize(
    ("history", "action", "code", "wait_s", "exclude"),
    [
        ([("done", 0, 9)], "end", 0, 0, ()),
        ([("mistake", 0, 0)], "end", 2, 0, ()),
        ([("preempted", 0, 5)], "requeue", 0, 0, ()),
        ([("preempted", 5, 5)], "requeue", 0, 0, ()),
        ([("failed", 0, 5)], "requeue", 0, 10, ()),
        ([("failed", 0, 5), ("failed", 5, 5)], "requeue", 0, 10, ()),
        ([("failed", 0, 0), ("failed", 0, 0)], "requeue", 0, 20, ()),
        # Three in a row without progress end it, whatever they died of; a step forward begins anew.
        ([("failed", 0, 0), ("preempted", 0, 0), ("lost", 0, 0)], "end", 1, 0, ()),
        ([("failed", 0, 0), ("failed", 0, 0), ("failed", 0, 4), ("failed", 4, 4)], "requeue", 0, 10, ()),
        # A node is out after its second failure, however far apart.
        ([("failed", 0, 5, "n2")], "requeue", 0, 10, ()),
        ([("failed", 0, 5, "n2"), ("preempted", 5, 8), ("lost", 8, 9, "n2")], "requeue", 0, 10, ("n2",)),
        ([("failed", 0, 5, "n2"), ("failed", 5, 9, "n1")], "requeue", 0, 10, ()),
        # One that failed its check is out at once, and the check costs no attempt.
        ([("failed", 0, 0), ("failed", 0, 0), ("bad nodes", 0, 0, "n1")], "requeue", 0, 0, ("n1",)),
        ([("bad nodes", 0, 0, f"n{number}") for number in range(6)], "requeue", 0, 0, tuple(f"n{n}" for n in range(6))),
        ([("bad nodes", 0, 0, "n1")] * 7, "end", 1, 0, ("n1",)),
    ],
)
def test_what_becomes_of_the_stage(history, action, code, wait_s, exclude) -> None:
    decision = decide(attempts(*history), POLICY)
    assert (decision.action, decision.code, decision.wait_s, decision.exclude) == (action, code, wait_s, exclude)


def test_a_new_submission_has_new_patience_and_an_old_memory() -> None:
    history = attempts(("failed", 0, 0, "n1"), ("failed", 0, 0), ("failed", 0, 0, "n1"))
    assert decide(history, POLICY).action == "end"
    again = replace(history[0], id="2-0", failed_nodes=())
    assert decide([*history, again], POLICY).action == "requeue"
    assert decide([*history, again], POLICY).exclude == ("n1",)


def test_waits_are_bounded_and_nodes_may_stay() -> None:
    patient = replace(POLICY, give_up_after=100)
    assert decide(attempts(*[("failed", 0, 0)] * 60), patient).wait_s == 25
    assert excluded(attempts(*[("failed", 0, 0, "n1")] * 9), replace(POLICY, exclude_node_after=0)) == ()


def test_records_survive_a_torn_write(tmp_path: Path) -> None:
    record = Record(tmp_path / "dit")
    assert record.attempts() == [] and record.owner() == ""
    folder = record.start(Attempt(id="7-0", nodes=("n1",), started_s=1.0, progress=0))
    with (tmp_path / "dit" / "attempts.jsonl").open("a") as file:
        file.write('{"id": "7-0", "ended_s": 2')  # the node died over it
    record.start(Attempt(id="7-1", nodes=("n1", "n2"), started_s=3.0, progress=4))
    record.end("7-1", "failed", "why", ("n2",), 6)
    first, second = record.attempts()
    assert (first.id, first.outcome, first.nodes) == ("7-0", None, ("n1",))
    assert (second.outcome, second.failed_nodes, second.has_progressed) == ("failed", ("n2",), True)
    assert record.owner() == "7-1"
    for rank in (1, 0):
        write_rank_end(folder, end(rank, 75, "SIGTERM"))
    assert [row.rank for row in rank_ends(folder)] == [0, 1] and rank_ends(folder)[0] == end(0, 75, "SIGTERM")
