"""What a run says of itself: `metrics.jsonl` always, TensorBoard through accelerate's tracker, a progress line.

A row is made of parts: the mean scalars (`Meter`), the pace (training/throughput.py) and the run-time checks
(training/run_checks.py). Each keeps its numbers on the device, or on the host if they come from there; once per row
all of them travel between the ranks in one exchange (`Parts`), and every rank draws the same conclusions.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Complaint:
    """Something measured that is not as declared. One line: what, the likely cause, the remedy."""

    check: str  # what was checked, the same for all complaints of one kind
    message: str
    fatal: bool = False  # the run is worth nothing, so it stops


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a part has to say in a row, the same on every rank."""

    fields: dict[str, Any]
    complaints: list[Complaint] = field(default_factory=list)

    def complaint_fields(self) -> dict[str, list[str]]:
        """`warnings` and `errors` as a row holds them, "CHECK: MESSAGE"; neither if there are none."""
        lines: dict[str, list[str]] = {}
        for complaint in self.complaints:
            kind = "errors" if complaint.fatal else "warnings"
            lines.setdefault(kind, []).append(f"{complaint.check}: {complaint.message}")
        return lines


class Part(Protocol):
    """A part of the row."""

    def numbers(self) -> Tensor:
        """This rank's numbers since the last row: a float64 or int64 vector, as long as on every other rank."""
        ...

    def read(self, table: Tensor) -> Reading:
        """What the numbers of all ranks, (world size, n) on the CPU, mean; begins the next row."""
        ...


class Meter:
    """Sums on the device; nothing is copied to the host between rows."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._mark: tuple[dict[str, Tensor], dict[str, int]] = ({}, {})

    def mark(self) -> None:
        """The place to which `rewind` goes back: before a step that may turn out bad."""
        self._mark = dict(self._sums), dict(self._counts)

    def rewind(self) -> None:
        """Forgets what was added since `mark`."""
        self._sums, self._counts = self._mark

    @torch.no_grad()
    def add(self, **values: Tensor) -> None:
        """Adds scalar tensors by name."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def numbers(self) -> Tensor:
        """Means since the last row, by name in alphabetical order."""
        means = [self._sums[name] / self._counts[name] for name in sorted(self._sums)]
        return torch.stack(means).double() if means else torch.zeros(0, dtype=torch.float64)

    def read(self, table: Tensor) -> Reading:
        """Means over the ranks; empties the meter."""
        means = table.float().sum(0) / len(table)  # in float32, as the values are
        fields = dict(zip(sorted(self._sums), means.tolist(), strict=True))
        self._sums, self._counts = {}, {}
        return Reading(fields=fields)


class Parts:
    """The parts of a row and their exchange.

    Args:
        all_ranks: gives every rank's (n,) int64 on every rank, (world size, n) (collective).
        device: where it wants them.
    """

    def __init__(self, all_ranks: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._all_ranks, self._device = all_ranks, device
        self._parts: list[Part] = []
        self._said: Counter[str] = Counter()

    def add(self, *parts: Part) -> None:
        """Adds parts; every rank adds the same in the same order."""
        self._parts += parts

    def read(self) -> Reading:
        """One exchange and one host sync, then what every part says. Collective."""
        mine = [part.numbers() for part in self._parts]
        # As int64, bit for bit: whole words that no conversion rounds, for hashes as for float64.
        words = torch.cat([numbers.view(torch.int64).to(self._device) for numbers in mine])
        columns = self._all_ranks(words).cpu().split([len(numbers) for numbers in mine], dim=1)
        fields: dict[str, Any] = {}
        complaints: list[Complaint] = []
        for part, numbers, column in zip(self._parts, mine, columns, strict=True):
            reading = part.read(column.contiguous().view(numbers.dtype))
            fields |= reading.fields
            complaints += reading.complaints
        return Reading(fields=fields, complaints=complaints)

    def to_say(self, reading: Reading) -> list[str]:
        """The warnings that are worth a line: of each check the first, the 10th, 100th, … time that it holds."""
        lines = []
        for complaint in reading.complaints:
            self._said[complaint.check] += 1
            times = self._said[complaint.check]
            if not complaint.fatal and 10 ** (len(str(times)) - 1) == times:
                lines.append(complaint.message + (f" (for the {times}th row)" if times > 1 else ""))
        return lines


class Metrics:
    """Rank 0 writes; other ranks are silent."""

    def __init__(self, run_dir: Path, rank: int, total_steps: int, quiet: bool) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.rank = rank
        self.console = Console(stderr=True)
        self._tracker = None
        self._progress: Progress | None = None
        if rank != 0:
            return
        from accelerate.tracking import TensorBoardTracker

        self._tracker = TensorBoardTracker(run_name="tb", logging_dir=str(run_dir))
        self._tracker.start()
        if not quiet and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self._task = self._progress.add_task(run_dir.name, total=total_steps, line="")
            self._progress.start()
        self._quiet = quiet
        self._last_line_s = 0.0

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row; a restart appends again, and readers keep the last row of a step. A disk may refuse."""
        if self.rank != 0:
            return
        try:
            with self.path.open("ab+") as file:
                torn = file.tell() > 0 and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
                file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
            if self._tracker is not None:
                scalars = {key: value for key, value in row.items() if isinstance(value, int | float)}
                self._tracker.log(scalars, step=row["step"])
        except OSError as error:  # a full disk: whether training stops is for the saves to say
            self.say(f"warning: {self.path}: {error.strerror}; the row of step {row['step']} may be lost")

    def show(self, step: int, total_steps: int, row: dict[str, Any]) -> None:
        """The progress line: loss, images/s, data wait and time left; on a plain log one line every ten seconds."""
        if self.rank != 0 or self._quiet:
            return
        wait = 100 * row["data_wait_share"]
        loss = f"{row['loss']:.4f}" if "loss" in row else "–"  # no step since the last row was good
        line = f"loss {loss}  {row['images_per_s']:.0f} images/s  data wait {wait:.1f} %"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=line)
        elif step == total_steps or time.monotonic() - self._last_line_s > 10:
            self._last_line_s = time.monotonic()
            self.console.print(f"step {step}/{total_steps}  {line}  ETA {row['eta_s']:.0f} s", highlight=False)

    def say(self, message: str) -> None:
        """One line for the person who watches (rank 0)."""
        if self.rank == 0:
            self.console.print(message, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._tracker is not None:
            with contextlib.suppress(OSError):
                self._tracker.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` in step order, the last written of each step."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # A line that a kill cut short, whose step was taken again, or what a power cut left.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]
