"""Which updates are left out, and when leaving them out is no longer enough. Plain numbers. See docs/faults.md.

Everything follows from the gradient norm after its reduction over the ranks, which all ranks have to the bit, so all of
them come to the same decision without asking each other.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal["non-finite", "spike", "discriminator"]


@dataclass(frozen=True, kw_only=True)
class StepPolicyConfig:
    """When an optimiser step is bad, and how many bad steps a run bears. A bad step updates nothing."""

    spike_factor: float = 10.0  # a gradient norm above this many times the running quantile is bad; 0 = none is
    spike_quantile: float = 0.95  # which quantile of the remembered norms, [0, 1]
    window: int = 256  # norms of good steps that are remembered
    min_norms: int = 64  # remembered norms before any norm is called a spike
    max_bad_steps: int = 10  # bad steps in a row before the run goes back to a checkpoint
    max_roll_backs: int = 3  # times that it goes back to the same checkpoint before it is stopped

    def __post_init__(self) -> None:
        if self.spike_factor != 0 and self.spike_factor <= 1:
            raise ValueError(f"spike_factor {self.spike_factor} must be greater than 1, or 0 for no spikes")
        if not 0 <= self.spike_quantile <= 1:
            raise ValueError(f"spike_quantile {self.spike_quantile} is a share; give a number from 0 to 1")
        if not 1 <= self.min_norms <= self.window:
            raise ValueError(f"min_norms {self.min_norms} must be from 1 to window {self.window}")
        if self.max_bad_steps < 1 or self.max_roll_backs < 0:
            raise ValueError(
                f"max_bad_steps {self.max_bad_steps} must be 1 or more, max_roll_backs {self.max_roll_backs} 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """Why a step was bad."""

    reason: Reason
    norm: float  # global gradient norm before clipping; inf or nan if a loss or a gradient was not finite
    threshold: float  # above which a norm was a spike at that step; inf if none was


class StepPolicy:
    """Judges the steps of a run one after the other and counts.

    Attributes:
        skipped_steps: Bad steps of the run so far.
        bad_in_a_row: Bad steps since the last good one or the last roll-back.
        passed_over: Ranges [first, end) of steps whose updates a roll-back took away, in their order.
    """

    def __init__(self, config: StepPolicyConfig) -> None:
        self.config = config
        self.skipped_steps = 0
        self.bad_in_a_row = 0
        self.passed_over: list[tuple[int, int]] = []
        self._norms: deque[float] = deque(maxlen=config.window)  # of good steps, oldest first
        self._norm: float | None = None  # of the step being judged
        self._bad: BadStep | None = None

    # -- one step ---------------------------------------------------------------------------------------------------
    def threshold(self) -> float:
        """The gradient norm above which the next step is a spike."""
        if not self.config.spike_factor or len(self._norms) < self.config.min_norms:
            return math.inf
        quantile = sorted(self._norms)[int(self.config.spike_quantile * (len(self._norms) - 1))]
        return self.config.spike_factor * quantile if quantile > 0 else math.inf

    def judge(self, norm: float) -> bool:
        """Is the update with this global gradient norm to be left out?"""
        threshold = self.threshold()
        self._norm, self._bad = norm, None
        if not math.isfinite(norm):
            self._bad = BadStep(reason="non-finite", norm=norm, threshold=threshold)
        elif norm > threshold:
            self._bad = BadStep(reason="spike", norm=norm, threshold=threshold)
        return self._bad is not None

    def judge_discriminator(self, norm: float) -> bool:
        """Is the discriminator's update to be left out? Comes after `judge` of the same step.

        It is, if the generator's was: the batch is the same. A spike is none here: a discriminator that has won has
        gradients near zero, and every one that follows would be many times their quantile.
        """
        if self._bad is None and not math.isfinite(norm):
            self._bad = BadStep(reason="discriminator", norm=norm, threshold=math.inf)
        return self._bad is not None

    def close_step(self) -> BadStep | None:
        """Counts the step that was judged; returns why it was bad, or None. A step without a judgement is good."""
        bad, norm = self._bad, self._norm
        self._bad = self._norm = None
        if norm is not None and math.isfinite(norm) and (bad is None or bad.reason == "discriminator"):
            self._norms.append(norm)  # of an update that was made
        if bad is None:
            self.bad_in_a_row = 0
        else:
            self.bad_in_a_row += 1
            self.skipped_steps += 1
        return bad

    # -- a roll-back ------------------------------------------------------------------------------------------------
    @property
    def gives_up(self) -> bool:
        """Have there been as many bad steps in a row as the run bears?"""
        return self.bad_in_a_row >= self.config.max_bad_steps

    @property
    def roll_backs(self) -> int:
        """How often the run went back to a checkpoint."""
        return len(self.passed_over)

    def trusted(self, step: int) -> int:
        """The last step up to `step` whose commit, if there is one, holds weights that no roll-back took away."""
        for first, end in reversed(self.passed_over):
            if first < step <= end:
                step = first
        return step

    def roll_backs_to(self, step: int) -> int:
        """How often the run has gone back to the commit of this step without making another since."""
        count, end = 0, None
        for first, last in reversed(self.passed_over):
            if end not in (None, last):
                break
            count, end = count + 1, first
        return count if end == step else 0

    def roll_back(self, state: dict[str, Any], commit_step: int, step: int) -> None:
        """Goes back to the norms of a commit before `step`; the counts go on.

        Args:
            state: what `state` gave for the commit; {} if it has none.
            commit_step: of the commit.
            step: the next to be taken.
        """
        chained = self.roll_backs_to(commit_step)
        self.passed_over.append((self.passed_over[-1][1] if chained else commit_step, step))
        self._norms = deque(state.get("norms", ()), maxlen=self.config.window)
        self.bad_in_a_row = 0

    # -- a checkpoint -----------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint's state; JSON keeps every bit of a float."""
        return {
            "skipped_steps": self.skipped_steps,
            "bad_steps_in_a_row": self.bad_in_a_row,
            "passed_over": [list(steps) for steps in self.passed_over],
            "norms": list(self._norms),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes up where `state` was given."""
        self.skipped_steps = state["skipped_steps"]
        self.bad_in_a_row = state["bad_steps_in_a_row"]
        self.passed_over = [(first, end) for first, end in state["passed_over"]]
        self._norms = deque(state["norms"], maxlen=self.config.window)
