"""What a run says of itself: `metrics.jsonl` always, TensorBoard through accelerate's tracker, a progress line."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


class Meter:
    """Sums on the device; nothing is copied to the host until `read` (one host sync per logged row)."""

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

    def read(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last read, averaged over ranks by one collective; empties the meter. {} if it is empty."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name] / self._counts[name] for name in names])
        means = mean_over_ranks(stacked).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, means, strict=True))


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
        """Appends one row; a restart appends again, and readers keep the last row of a step."""
        if self.rank != 0:
            return
        with self.path.open("ab+") as file:
            torn = file.tell() > 0 and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
            file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        if self._tracker is not None:
            scalars = {key: value for key, value in row.items() if isinstance(value, int | float)}
            self._tracker.log(scalars, step=row["step"])

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
            self._tracker.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` in step order, the last written of each step."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a line that a kill cut short; its step was taken again
            row = json.loads(line)
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]
