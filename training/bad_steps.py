"""What a run does about bad steps: keeps a record of their samples, goes back to a checkpoint, and stops in the end.

When a step is bad is `training.step_policy`'s; docs/faults.md is the contract.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.loader import Batch
from training.checkpoint import Checkpointer, Snapshot
from training.engine import Engine
from training.errors import TrainingError
from training.step_policy import BadStep, StepPolicy, StepPolicyConfig

log = logging.getLogger(__name__)

NAMED_KEYS = 5  # samples that the line named which ends a run; its files name them all


class BadSteps:
    """Joins the policy to the engine, which asks it before every update.

    Args:
        directory: of the run; bad_steps-RANK.jsonl is written there.
        config: the policy's.
        engine: this rank's.
    """

    def __init__(self, directory: Path, config: StepPolicyConfig, engine: Engine) -> None:
        self.policy = StepPolicy(config)
        self._directory, self._engine = directory, engine
        self._keys: list[str] = []  # of this rank's first samples since the last good step or roll-back
        self._reasons: set[str] = set()
        engine.judge = self.policy.judge

    def close_step(self, step: int, batches: Sequence[Batch]) -> bool:
        """Ends step number `step` (from 1), which consumed `batches` on this rank; was it bad?"""
        bad = self.policy.close_step()
        if bad is None:
            self._keys, self._reasons = [], set()
            return False
        self._keys = [*self._keys, *(key for batch in batches for key in batch.keys)][:NAMED_KEYS]
        self._reasons.add(bad.reason)
        self._write(step, bad, batches)
        count = self.policy.skipped_steps
        if self._engine.rank == 0 and str(count).strip("0") == "1":  # the first, the 10th, the 100th, …
            above = f" above {bad.threshold:.3g}" * math.isfinite(bad.threshold)
            which = "" if count == 1 else f" (the {count}th such step)"
            why, record = f"{bad.reason}, norm {bad.norm:.3g}{above}{which}", self._directory / "bad_steps-*.jsonl"
            log.warning("step %d updated nothing: %s; %s has its samples", step, why, record)
        return True

    def _write(self, step: int, bad: BadStep, batches: Sequence[Batch]) -> None:
        losses = self._engine.last_losses()
        line = {
            "step": step,
            "reason": bad.reason,
            "norm": _number(bad.norm),
            "threshold": _number(bad.threshold) if math.isfinite(bad.threshold) else None,
            "micro_batches": [
                {"loss": _number(loss), "keys": batch.keys, "sample_numbers": batch.sample_numbers.tolist()}
                for batch, loss in zip(batches, losses, strict=True)
            ],
        }
        path = self._directory / f"bad_steps-{self._engine.rank}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def row(self) -> dict[str, int]:
        """What a row of metrics.jsonl says of bad steps."""
        return {
            "skipped_steps": self.policy.skipped_steps,
            "bad_steps_in_a_row": self.policy.bad_in_a_row,
            "roll_backs": self.policy.roll_backs,
        }

    # -- going back -------------------------------------------------------------------------------------------------
    def roll_back(self, step: int, checkpointer: Checkpointer, restore: Callable[[Snapshot], None]) -> str:
        """Brings back weights, averages and moments of before the bad steps; the data goes on. Collective.

        Args:
            step: optimiser steps taken; the last of them were bad.
            checkpointer: of the run; nothing of it is in flight.
            restore: copies a commit into this rank's fragments.

        Returns:
            One line for the log.

        Raises:
            TrainingError: there is no commit to go back to, or the run went back to it too often; names the samples.
        """
        policy, first_bad = self.policy, step - self.policy.bad_in_a_row
        snapshot = self._newest_trusted(checkpointer, first_bad)
        what = f"steps {first_bad + 1} to {step} were bad ({', '.join(sorted(self._reasons)) or 'see its record'})"
        if snapshot is None:
            raise TrainingError(self._last_words(what, "and there is no checkpoint from before them"))
        done = policy.roll_backs_to(snapshot.step)
        if done >= policy.config.max_roll_backs:
            raise TrainingError(self._last_words(what, f"after {done} roll-backs to step {snapshot.step}"))
        restore(snapshot)
        policy.roll_back(snapshot.state.get("step_policy", {}), snapshot.step, step)
        self._keys, self._reasons = [], set()
        return (
            f"{what}: went back to the weights of step {snapshot.step}; the data goes on, samples of steps "
            f"{policy.passed_over[-1][0] + 1} to {step} are passed over (roll-back {done + 1} to this checkpoint)"
        )

    def _newest_trusted(self, checkpointer: Checkpointer, limit: int) -> Snapshot | None:
        """The newest commit up to a step that verifies and was not itself undone by a roll-back. Collective."""
        while True:
            limit = self.policy.trusted(limit)
            snapshot = checkpointer.newest(not_after=limit)
            if snapshot is None or self.policy.trusted(snapshot.step) == snapshot.step:
                return snapshot
            limit = snapshot.step

    def _last_words(self, what: str, why: str) -> str:
        """Collective."""
        keys = [key for part in self._engine.exchange(self._keys) for key in part][:NAMED_KEYS]
        first = f"; the first samples: {', '.join(keys)}" if keys else ""
        return (
            f"{self._directory}: {what} {why}{first}; {self._directory}/bad_steps-*.jsonl lists them all: look at "
            "them, or start another --run with a lower optim.learning_rate or engine.max_grad_norm, or let this one "
            "bear more with step_policy.max_bad_steps or step_policy.max_roll_backs"
        )


def _number(value: float) -> Any:
    """JSON has no nan and no inf."""
    return value if math.isfinite(value) else str(value)
