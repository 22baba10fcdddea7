"""What becomes of a stage after an attempt: pure functions of what is on record."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from launch.attempts import Attempt, Outcome, RankEnd
from launch.cluster import RequeuePolicy
from launch.runtime import EXIT_PREEMPTED

_MISTAKE = 2


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an attempt ended."""

    outcome: Outcome
    why: str
    failed_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do next."""

    action: Literal["end", "requeue"]
    code: int = 0  # exit code of the job if it ends
    wait_s: int = 0  # before the next attempt
    exclude: tuple[str, ...] = ()  # nodes that the next attempt shall not have
    why: str = ""


def judge(ends: Sequence[RankEnd], srun_code: int, was_stopped: bool, down: Sequence[str], nodes: int) -> Verdict:
    """How an attempt ended, by how its ranks did.

    Args:
        ends: of the ranks that could still say so, first to end first.
        srun_code: of the step.
        was_stopped: SLURM told the whole job to end.
        down: nodes of the attempt that SLURM has lost.
        nodes: how many it had.

    A node is blamed if SLURM lost it, or if all ranks that caused the end were on it. Ranks that were told to end, or
    lost their connections to others, caused nothing.
    """
    if srun_code == 0 and not any(end.code for end in ends):
        return Verdict(outcome="done", why="done")
    for end in ends:
        if end.code == _MISTAKE:
            return Verdict(outcome="mistake", why=f"rank {end.rank} on {end.node} refused its input (exit code 2)")
    own = [end for end in ends if end.code not in (0, EXIT_PREEMPTED) and not end.signals]
    saved = [end for end in ends if end.code == EXIT_PREEMPTED]
    if down:
        why = f"SLURM lost {', '.join(down)}" + (": saved" if saved else "")
        return Verdict(outcome="lost", why=why, failed_nodes=tuple(down))
    if own and not was_stopped:
        # One that was killed, or else those that know why they ended, came first: the others lost their connections.
        own = [end for end in own if end.code > 128] or [end for end in own if end.has_said_why] or own
        first = own[0]
        how = f"was killed by signal {first.code - 128}" if first.code > 128 else f"ended with exit code {first.code}"
        blamed = {end.node for end in own}
        failed = tuple(blamed) if len(blamed) == 1 and nodes > 1 else ()
        return Verdict(outcome="failed", why=f"rank {first.rank} on {first.node} {how}", failed_nodes=failed)
    if saved or was_stopped or any(end.signals for end in ends) or srun_code in (128 + 10, 128 + 15):
        sent = next((end.signals[0] for end in ends if end.signals), "a signal")
        return Verdict(outcome="preempted", why=f"{sent}: " + ("saved" if saved else "ended before there was a save"))
    return Verdict(outcome="failed", why=f"srun ended with exit code {srun_code}")


def excluded(attempts: Sequence[Attempt], policy: RequeuePolicy) -> tuple[str, ...]:
    """Nodes that failed too often, and those that failed the check before the start, sorted."""
    failures = Counter(node for attempt in attempts for node in attempt.failed_nodes)
    limit = policy.exclude_node_after
    often = {node for node, count in failures.items() if limit and count >= limit}
    refused = {node for attempt in attempts if attempt.outcome == "bad nodes" for node in attempt.failed_nodes}
    return tuple(sorted(often | refused))


def of_job(attempts: Sequence[Attempt], job: str) -> list[Attempt]:
    """The attempts of one submission: patience begins anew with each."""
    return [attempt for attempt in attempts if attempt.id.rpartition("-")[0] == job]


def idle_attempts(attempts: Sequence[Attempt], job: str) -> int:
    """A job's attempts since the last one that brought a new checkpoint; those that only checked nodes do not count."""
    count = 0
    for attempt in reversed(of_job(attempts, job)):
        if attempt.outcome is None or attempt.outcome in ("bad nodes", "cancelled"):
            continue
        if attempt.has_progressed:
            break
        count += 1
    return count


def decide(attempts: Sequence[Attempt], policy: RequeuePolicy) -> Decision:
    """What to do after the last attempt, which has ended."""
    last = attempts[-1]
    if last.outcome == "done":
        return Decision(action="end", why="done")
    if last.outcome == "mistake":
        return Decision(action="end", code=_MISTAKE, why="a mistake is not tried again")
    if last.outcome == "cancelled":
        return Decision(action="end", code=1, why="cancelled")
    nodes_out = excluded(attempts, policy)
    job = last.id.rpartition("-")[0]
    idle = idle_attempts(attempts, job)
    if idle >= policy.give_up_after:
        why = f"{idle} attempts in a row without a new checkpoint (requeue.give_up_after)"
        return Decision(action="end", code=1, exclude=nodes_out, why=why)
    checks = list(takewhile(lambda attempt: attempt.outcome == "bad nodes", reversed(of_job(attempts, job))))
    if len(checks) > 2 * policy.give_up_after:
        why = f"{len(checks)} attempts in a row found bad nodes (requeue.give_up_after)"
        return Decision(action="end", code=1, exclude=nodes_out, why=why)
    wait_s = 0
    if last.outcome in ("failed", "lost"):
        wait_s = min(policy.backoff_s * 2 ** max(idle - 1, 0), policy.max_backoff_s)
    return Decision(action="requeue", wait_s=wait_s, exclude=nodes_out, why="tried again")
