"""What a job script runs: one attempt of a stage, and what becomes of the stage afterwards.

It runs on the job's first node, outside of any container. The ranks get their signals from SLURM themselves; this
process only notes that the job was told to end. All that it decides with stands in the stage's folder (attempts.py),
so that the next attempt, on whichever nodes, decides on from there.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch import slurm_client
from launch.attempts import ATTEMPT_VARIABLE, Attempt, Record, rank_ends
from launch.cluster import Cluster
from launch.config_io import from_dict, read_yaml
from launch.errors import ConfigError
from launch.pipeline import Stage
from launch.preflight import bad_nodes, check_command
from launch.requeue import Decision, Verdict, decide, excluded, idle_attempts, judge
from launch.runtime import EXIT_PREEMPTED
from launch.task import OWNER_POLL_S

PLAN = "plan.yaml"
_TRIES = 5  # of an order to SLURM while it is ending this very job


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was submitted: a changed file of the site does not change a job that waits."""

    stage: Stage
    cluster: Cluster


class Supervisor:
    """One attempt.

    Args:
        folder: of the stage; a task of an array has its own inside.
        srun: the step's command.
        progress: how far the stage has come, as a number that only grows; None if it cannot be told.
        env: of the batch script.
    """

    def __init__(
        self, folder: Path, srun: Sequence[str], progress: Callable[[], int | None], env: Mapping[str, str]
    ) -> None:
        self.plan = from_dict(Plan, read_yaml(folder / PLAN), str(folder / PLAN))
        self.record = Record(folder / env.get("SLURM_ARRAY_TASK_ID", ""))
        self.srun = list(srun)
        self.progress = progress
        self.env = env
        self.job_id = env["SLURM_JOB_ID"]
        # One task of an array may have the array's own number: an order to that would be one to all tasks.
        is_task = "SLURM_ARRAY_TASK_ID" in env
        self.name = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if is_task else self.job_id
        self.id = f"{self.job_id}-{env.get('SLURM_RESTART_COUNT', '0')}"
        self.nodes = slurm_client.job_nodes(env)
        self.was_stopped = False

    def run(self) -> int:
        """Runs the attempt and arranges the next; returns the batch script's exit code."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGUSR1, lambda number, frame: None)  # meant for the ranks, if it comes here too
        self._close_lost_attempts()
        before = self.record.attempts()
        policy = self.plan.cluster.requeue
        if (idle := idle_attempts(before, self.job_id)) >= policy.give_up_after:
            say(f"not started: {idle} attempts in a row without a new checkpoint (requeue.give_up_after)")
            return 1
        attempt = Attempt(id=self.id, nodes=self.nodes, started_s=round(time.time(), 3), progress=self.progress())
        folder = self.record.start(attempt)
        say(f"attempt {len(before) + 1} ({self.id}) on {', '.join(self.nodes)}; progress {attempt.progress}")
        if unwanted := set(self.nodes) & set(excluded(before, policy)):  # it was queued before they failed
            verdict = Verdict(outcome="bad nodes", why="excluded", failed_nodes=tuple(sorted(unwanted)))
        else:
            verdict = self._check_nodes(folder) or self._attempt(folder)
        if self.was_stopped and verdict.outcome not in ("done", "mistake") and self._fate() == "cancelled":
            verdict = Verdict(outcome="cancelled", why=verdict.why)
        if self.record.owner() != self.id:  # SLURM lost this node and started the job elsewhere
            say(f"attempt {self.id} was replaced by {self.record.owner()}")
            return 1
        self.record.end(self.id, verdict.outcome, verdict.why, verdict.failed_nodes, self.progress())
        decision = decide(self.record.attempts(), policy)
        if verdict.outcome == "bad nodes" and not self.plan.cluster.preflight.exclude:
            decision = Decision(action="end", code=1, why="preflight.exclude is false")
        say(f"{verdict.outcome}: {verdict.why}; " + (decision.why if decision.action == "end" else "queued again"))
        return self._arrange(decision)

    def _close_lost_attempts(self) -> None:
        """Puts on record how an attempt ended whose own supervisor could not, and lets the leftovers of one end."""
        lost = [attempt for attempt in self.record.attempts() if attempt.outcome is None and attempt.id != self.id]
        for attempt in lost:
            down = _lost(attempt.nodes)
            why = f"SLURM lost {', '.join(down)}" if down else "it left no word"
            self.record.end(attempt.id, "lost", why, down, self.progress())
        if any(attempt.outcome == "lost" for attempt in self.record.attempts()[-1:]):
            self.record.take(self.id)
            time.sleep(3 * OWNER_POLL_S)  # what is left of it on a lost node ends by itself now

    def _check_nodes(self, folder: Path) -> Verdict | None:
        """Runs the check of the nodes, if it is wanted; None = go on."""
        preflight = self.plan.cluster.preflight
        ranks = self.plan.stage.ranks_on_node(self.plan.cluster.gpus_per_node) * len(self.nodes)
        if not preflight.enabled or ranks == 1 or not self.plan.stage.is_of_several_ranks:
            return None
        self._step(check_command(self.srun, folder, preflight), folder, timeout_s=preflight.timeout_s)
        if self.was_stopped:
            return Verdict(outcome="preempted", why="a signal: ended before there was a save")
        found = bad_nodes(folder, self.nodes, preflight)
        for node, reasons in found.items():
            say(f"preflight: {node}: {'; '.join(reasons)}")
        if not found:
            return None
        why = "; ".join(f"{node}: {', '.join(reasons)}" for node, reasons in found.items())
        if len(found) == len(self.nodes):  # the store or the network, say: there is nowhere else to go
            return Verdict(outcome="failed", why=f"no node is good: {why}")
        return Verdict(outcome="bad nodes", why=why, failed_nodes=tuple(found))

    def _attempt(self, folder: Path) -> Verdict:
        """Runs the stage's own command on all ranks."""
        code = self._step(self.srun, folder)
        ends = rank_ends(folder)
        for line in dict.fromkeys(path.read_text(encoding="utf-8") for path in sorted(folder.glob("rank-*.txt"))):
            say(line)
        is_whole = code == 0 and not any(end.code for end in ends)
        return judge(ends, code, self.was_stopped, () if is_whole else _lost(self.nodes), len(self.nodes))

    def _fate(self) -> str:
        """What SLURM is doing with the job."""
        try:
            return slurm_client.fate(self.name, int(self.env.get("SLURM_RESTART_COUNT", "0")))
        except ConfigError as error:
            say(str(error))
            return "requeued"

    def _step(self, command: Sequence[str], folder: Path, timeout_s: float | None = None) -> int:
        """Runs srun in a session of its own: SLURM signals the ranks, and srun must outlast them."""
        env = {**self.env, ATTEMPT_VARIABLE: str(folder)}
        child = subprocess.Popen(command, env=env, start_new_session=True)
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            child.terminate()
            code = child.wait()
        return 128 - code if code < 0 else code

    def _arrange(self, decision: Decision) -> int:
        """Queues the job again or lets it end; returns the exit code."""
        if decision.action == "end":
            return decision.code
        if self._fate() != "requeued":  # it may be running elsewhere by now
            _insist(lambda: slurm_client.requeue(self.name))
        if decision.wait_s:
            _insist(lambda: slurm_client.hold_back(self.name, decision.wait_s))
        if decision.exclude:
            _insist(lambda: slurm_client.exclude(self.name, decision.exclude))
        return EXIT_PREEMPTED

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.was_stopped = True


def _lost(nodes: Sequence[str]) -> tuple[str, ...]:
    """Nodes that SLURM has lost; none if it does not answer."""
    try:
        return slurm_client.lost_nodes(nodes)
    except ConfigError as error:
        say(str(error))
        return ()


def _insist(order: Callable[[], None]) -> None:
    """Gives an order that may come too early for SLURM, some times; a failure is said and no more."""
    for attempt in range(_TRIES):
        try:
            return order()
        except ConfigError as error:
            if attempt == _TRIES - 1:
                say(str(error))
            time.sleep(0.5)


def say(text: str) -> None:
    print(f"darkroom launch: {text}", file=sys.stderr, flush=True)
