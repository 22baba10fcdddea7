"""What is on record of a stage's attempts, in its folder on the shared file system.

attempts.jsonl         a row when an attempt starts and one when it ends; written by the stage's supervisor only
current                the attempt that owns the stage: a rank of an older one that finds itself replaced ends
attempt-JOB-RESTART/   per rank how it ended (rank-N.json) and what it said of a mistake (rank-N.txt)
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ATTEMPT_VARIABLE = "DARKROOM_ATTEMPT"  # the attempt's folder, in the environment of its tasks
Outcome = Literal["done", "preempted", "failed", "mistake", "bad nodes", "lost", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a stage's job."""

    id: str  # JOB-RESTART
    nodes: tuple[str, ...]
    started_s: float  # s since 1970
    progress: int | None = None  # newest checkpoint's step at the start; None = not known
    ended_s: float | None = None  # None = running, or lost
    outcome: Outcome | None = None
    why: str = ""
    failed_nodes: tuple[str, ...] = ()  # blamed for the end
    progress_after: int | None = None

    @property
    def has_progressed(self) -> bool:
        return (self.progress_after or 0) > (self.progress or 0)


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank ended."""

    rank: int
    node: str
    code: int  # 128 + n: killed by signal n
    signals: tuple[str, ...]  # that it was sent before, in order
    has_said_why: bool = False  # in rank-N.txt; one whose connection was lost with another rank has not
    ended_s: float  # s since 1970


class Record:
    """The folder of a stage, or of one task of its array."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows = folder / "attempts.jsonl"
        self._owner = folder / "current"

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        found: dict[str, dict[str, Any]] = {}
        for line in self._rows.read_text(encoding="utf-8").splitlines() if self._rows.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # half a row: the node died over it
            found.setdefault(row["id"], {}).update(row)
        return [_attempt(row) for row in found.values() if "nodes" in row]

    def attempt_folder(self, attempt_id: str) -> Path:
        return self.folder / f"attempt-{attempt_id}"

    def start(self, attempt: Attempt) -> Path:
        """Takes the stage over for this attempt; returns the attempt's folder."""
        folder = self.attempt_folder(attempt.id)
        folder.mkdir(parents=True, exist_ok=True)
        self.take(attempt.id)
        self._append({key: value for key, value in asdict(attempt).items() if value not in (None, "", ())})
        return folder

    def take(self, attempt_id: str) -> None:
        """From now on ranks of other attempts end by themselves."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._owner, attempt_id)

    def end(self, attempt_id: str, outcome: Outcome, why: str, failed: tuple[str, ...], progress: int | None) -> None:
        row = {"id": attempt_id, "ended_s": round(time.time(), 3), "outcome": outcome, "why": why}
        self._append({**row, "failed_nodes": failed, "progress_after": progress})

    def owner(self) -> str:
        """The attempt that owns the stage, or nothing."""
        return self._owner.read_text(encoding="utf-8") if self._owner.exists() else ""

    def _append(self, row: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = (json.dumps(row) + "\n").encode()
        torn = self._rows.exists() and not self._rows.read_bytes().endswith(b"\n")
        file = os.open(self._rows, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, (b"\n" if torn else b"") + data)
            os.fsync(file)
        finally:
            os.close(file)


def _attempt(row: dict[str, Any]) -> Attempt:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Attempt(**values)


def write_rank_end(folder: Path, end: RankEnd) -> None:
    write_whole(folder / f"rank-{end.rank}.json", json.dumps(asdict(end)))


def rank_ends(folder: Path) -> list[RankEnd]:
    """How the ranks of an attempt ended, first to end first; those that were killed with their node are absent."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank-*.json")]
    ends = [RankEnd(**{**row, "signals": tuple(row["signals"])}) for row in rows]
    return sorted(ends, key=lambda end: end.ended_s)


def write_whole(path: Path, text: str) -> None:
    """Readers see the old text or the new."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
