"""The proof that a run consumed every sample of every epoch exactly once, from its record alone. See docs/ledger.md.

The order of the data is computed anew, as far as the record goes, and each window of each stream is compared with what
was recorded for it. All of it is done in pieces of the run, so memory does not grow with the run's length.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.ledger import ATTEMPTS, Attempt, Record, RecordFile, list_records, read_attempts, read_record
from data.ledger_judge import NO_VISITS, Judge, Plan, make_plan
from data.manifest import list_commits, read_manifest
from data.object_store import open_store
from data.streams import unpack_visits

NAMED = 20  # problems of one kind, and samples, that are named one by one
PIECE_VISITS = 1 << 21  # visits that are compared at a time, unless one window of all streams holds more
_MAX_ODD = 1 << 24  # samples that are not where they belong, after which the comparison is given up


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the record of a run proves.

    Attributes:
        folder: Of the record.
        micro_batches: How many of the run, over all ranks, the record covers.
        attempts: One per start of the run, with the range of micro-batches [first, behind the last] for which its
            record is the one that counts.
        data_sets: One per set.
        epochs: One per set and range of epochs [first, last] with equal counts: `samples` in the set, `consumed` and
            `refused` ones (records), those `to_come`, those met `twice` or more often, and `missing` ones, which the
            run went past.
        problems: What is wrong with the record, one line each; of each kind no more than NAMED.
        passed_over: Consumed, but without effect on the weights: ranges [first, end) of steps and of micro-batches
            whose updates the run undid when it went back to a checkpoint, and how many samples that are.
        skipped_steps: Steps without an update, whose samples the run directory's bad_steps-*.jsonl names. Like
            `passed_over` as the newest commit counts them, and no fault of the record.
        num_samples: Samples that were not met exactly once and in their turn.
        samples: The first NAMED of them.
    """

    folder: Path
    micro_batches: int
    attempts: list[dict[str, Any]]
    data_sets: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    passed_over: list[dict[str, Any]]
    skipped_steps: int
    problems: list[str]
    num_samples: int
    samples: list[str]

    @property
    def clean(self) -> bool:
        """Whether every sample was consumed exactly once."""
        return not self.problems and not self.num_samples

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"clean": self.clean} | vars(self) | {"folder": str(self.folder)}

    def refuse_unclean(self) -> None:
        """Ends a command whose record is not clean.

        Raises:
            DataError: it is not; counts what is wrong and names the first of it.
        """
        counts = {"problem": len(self.problems), "sample": self.num_samples}
        told = [f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count]
        if told:
            raise DataError(
                f"{self.folder}: does not show that every sample was consumed exactly once ({' and '.join(told)}, "
                f"first: {(self.problems + self.samples)[0]}); restore files that it lost, or do not rely on this run"
            )


def check_ledger(folder: Path, shards: Sequence[str] = (), checkpoints: str | None = None) -> Verdict:
    """Checks the record of a run against the order of its data.

    Args:
        folder: `ledger/` of the run directory.
        shards: addresses of the data sets, if they no longer lie where they lay in training.
        checkpoints: address of the run's commits, if the record is to reach as far as the newest of them.

    Raises:
        DataError: there is no record, or the data sets or the version of the order are not those of the run.
    """
    attempts = read_attempts(folder)
    files, problems = list_records(folder)
    problems += _attempt_problems(folder, attempts, files)
    try:
        plan = make_plan(attempts[-1], shards)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / ATTEMPTS}: attempt {attempts[-1].attempt} is damaged; restore the file") from error
    state = _newest_state(checkpoints) if checkpoints else {}
    spans = _spans(attempts, files, state.get("counters", {}).get("micro_batches", 0))
    reader = _Reader(files, spans, plan)
    judge = Judge(plan=plan)
    for begin, end, record in reader.pieces():
        judge.look(begin, end, record)
        if judge.num_odd > _MAX_ODD:
            problems.append(f"micro-batches 0 to {end - 1}: nearly nothing is as the order has it; given up there")
            break
    odd = _classify(reader, judge)
    return Verdict(
        folder=folder,
        micro_batches=reader.end,
        attempts=[
            {
                "attempt": span.attempt.attempt,
                "micro_batches": [span.begin, span.end],
                "world_size": span.attempt.world_size,
                "num_workers": span.attempt.num_workers,
            }
            for span in spans
        ],
        data_sets=[
            {"set": number, "url": index.url, "samples": index.num_samples} for number, index in enumerate(plan.indexes)
        ],
        epochs=_epoch_rows(plan, judge, odd),
        passed_over=_passed_over(state, plan),
        skipped_steps=state.get("step_policy", {}).get("skipped_steps", 0),
        problems=problems + reader.problems + _number_problems(spans, judge) + _unjudged_problems(judge),
        num_samples=len(odd.missing) + len(odd.twice) + len(odd.misplaced),
        samples=_name(plan, odd),
    )


def _newest_state(checkpoints: str) -> dict[str, Any]:
    """The training state of the newest readable commit, {} without commits."""
    store = open_store(checkpoints)
    for step in reversed(list_commits(store)):
        try:
            state = read_manifest(store, step).meta["state"]
            int(state["counters"]["micro_batches"])
        except (DataError, KeyError, TypeError, ValueError):
            continue  # a resume falls back to an older one, too
        return dict(state)
    return {}


def _passed_over(state: dict[str, Any], plan: Plan) -> list[dict[str, Any]]:
    """What the run consumed and then went back behind. A step always takes the same number of micro-batches."""
    rows = []
    for first, end in state.get("step_policy", {}).get("passed_over", ()):
        per_step = state["counters"]["micro_batches"] // state["counters"]["step"]
        micro_batches = [first * per_step, end * per_step]
        samples = (end - first) * per_step * plan.micro_batch_size
        rows.append({"steps": [first, end], "micro_batches": micro_batches, "samples": samples})
    return rows


# --- the record that counts ---------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """An attempt, and the micro-batches of which its record is the one that counts."""

    attempt: Attempt
    begin: int
    end: int


def _spans(attempts: list[Attempt], files: list[RecordFile], committed: int) -> list[_Span]:
    """The record of an attempt counts up to where a later one began. The last one's ends with its last write that all
    ranks finished, as a commit comes after that, and what is not committed will be consumed again."""
    last = attempts[-1]
    written = Counter(file.last for file in files if file.attempt == last.attempt)
    end = max([last.first_micro_batch, committed, *(n for n, ranks in written.items() if ranks >= last.world_size)])
    spans: list[_Span] = []
    for attempt in reversed(attempts):
        spans.append(_Span(attempt, min(attempt.first_micro_batch, end), end))
        end = spans[-1].begin
    return spans[::-1]


class _Reader:
    """The record that counts, piece by piece."""

    def __init__(self, files: list[RecordFile], spans: list[_Span], plan: Plan) -> None:
        self.end = spans[-1].end
        self.problems: list[str] = []
        self._plan = plan
        row = plan.num_streams * plan.window  # one window of every stream
        self._step = row * max(1, PIECE_VISITS // (row * plan.micro_batch_size))
        bounds = {span.attempt.attempt: (span.begin, span.end) for span in spans}
        self._files: dict[int, list[tuple[RecordFile, int, int]]] = {}
        for file in files:
            begin, end = bounds.get(file.attempt, (0, 0))
            begin, end = max(begin, file.first), min(end, file.last)
            for piece in range(begin // self._step, -(-end // self._step)) if begin < end else ():
                self._files.setdefault(piece, []).append((file, begin, end))

    def pieces(self) -> Iterator[tuple[int, int, Record]]:
        """Yields (first micro-batch, first behind it, their record) of whole windows of all streams."""
        self.problems.clear()
        for piece in range(-(-self.end // self._step)):
            first = piece * self._step
            parts = []
            for file, begin, end in self._files.get(piece, ()):
                bounds = max(begin, first), min(end, first + self._step)
                try:
                    parts.append(read_record(file, *bounds, self._plan.micro_batch_size))
                except DataError as error:
                    self.problems += [str(error)] * (str(error) not in self.problems)
            yield first, min(first + self._step, self.end), _joined(parts, self._plan.micro_batch_size)


def _joined(parts: list[Record], micro_batch_size: int) -> Record:
    numbers = np.concatenate([NO_VISITS, *(part.numbers for part in parts)])
    visits = np.concatenate([NO_VISITS.reshape(0, micro_batch_size), *(part.visits for part in parts)])
    order = np.argsort(numbers, kind="stable")
    return Record(
        numbers=numbers[order],
        visits=visits[order],
        filtered=np.concatenate([NO_VISITS, *(part.filtered for part in parts)]),
        filtered_numbers=np.concatenate([NO_VISITS, *(part.filtered_numbers for part in parts)]),
    )


# --- what is said of it -------------------------------------------------------------------------------------------


class _Odd(NamedTuple):
    """Visits that are not as they should be; distinct, ascending."""

    missing: np.ndarray  # not consumed, though the run went past them
    twice: np.ndarray  # consumed or refused more than once
    misplaced: np.ndarray  # consumed once, where the order has another sample
    again: Counter[int]  # records beyond the first, by packed set and epoch


def _classify(reader: _Reader, judge: Judge) -> _Odd:
    """Looks up in the whole record how often each visit that does not fit is there."""
    surplus, lacking = (np.unique(np.concatenate([NO_VISITS, *parts])) for parts in (judge.surplus, judge.lacking))
    suspects = np.union1d(surplus, lacking)
    counts = np.zeros(len(suspects), np.int64)
    again: Counter[int] = Counter()
    if len(suspects):
        for _, _, record in reader.pieces():
            visits = np.concatenate([record.visits.ravel(), record.filtered])
            places = np.minimum(np.searchsorted(suspects, visits), len(suspects) - 1)
            counts += np.bincount(places[suspects[places] == visits], minlength=len(suspects))
        for head, count in zip(_heads(suspects), counts.tolist(), strict=True):
            again[head] += max(0, count - 1)
    return _Odd(
        missing=np.setdiff1d(lacking, suspects[counts > 0]),
        twice=suspects[counts > 1],
        misplaced=np.setdiff1d(surplus, suspects[counts > 1]),
        again=again,
    )


def _heads(visits: np.ndarray) -> list[int]:
    return (visits - unpack_visits(visits)[2]).tolist()


def _attempt_problems(folder: Path, attempts: list[Attempt], files: list[RecordFile]) -> list[str]:
    problems = []
    names = [attempt.attempt for attempt in attempts]
    for name, count in Counter(file.attempt for file in files if file.attempt not in names).items():
        problems.append(f"{folder / name}: {count} files of an attempt that attempts.jsonl does not name")
    problems += [f"attempt {name}: begins twice" for name, count in Counter(names).items() if count > 1]
    first = attempts[0]
    for attempt in attempts[1:]:
        keys = sorted(first.stamp.keys() | attempt.stamp.keys())
        if key := next((key for key in keys if attempt.stamp.get(key) != first.stamp.get(key)), None):
            was, now = first.stamp.get(key), attempt.stamp.get(key)
            problems.append(f"attempt {attempt.attempt}: {key} is {now!r}, in attempt {first.attempt} it was {was!r}")
    return _limited(problems)


def _number_problems(spans: list[_Span], judge: Judge) -> list[str]:
    problems = []
    for what, parts in (("not recorded", judge.missing_numbers), ("recorded twice", judge.double_numbers)):
        numbers = np.concatenate([NO_VISITS, *parts])
        lines = [f"micro-batches {runs} {what}, from before the first attempt on record"
                 for runs in _runs(numbers[numbers < spans[0].begin], 1)]  # fmt: skip
        for span in spans:
            mine = numbers[(numbers >= span.begin) & (numbers < span.end)]
            world_size = span.attempt.world_size
            for rank in np.unique(mine % world_size).tolist():
                runs = _runs(mine[mine % world_size == rank], world_size)
                lines += [f"attempt {span.attempt.attempt}, rank {rank}: micro-batches {run} {what}" for run in runs]
        problems += _limited(lines)
    return problems


def _runs(numbers: np.ndarray, stride: int) -> Iterator[str]:
    """Ranges of ascending numbers that lie `stride` apart, as text."""
    if len(numbers):
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != stride) + 1):
            yield f"{run[0]} to {run[-1]} ({len(run)})" if len(run) > 1 else str(run[0])


def _unjudged_problems(judge: Judge) -> list[str]:
    return _limited(
        [
            f"stream {stream}: not compared from micro-batch {number} on, as what the filters refused there is lost"
            for stream, number in sorted(judge.unjudged.items())
        ]
    )


def _limited(lines: list[str]) -> list[str]:
    return lines if len(lines) <= NAMED else [*lines[:NAMED], f"… and {len(lines) - NAMED} more like the last one"]


def _epoch_rows(plan: Plan, judge: Judge, odd: _Odd) -> list[dict[str, Any]]:
    """Counts by set and epoch; successive epochs with the same counts share a row."""
    missing, twice = Counter(_heads(odd.missing)), Counter(_heads(odd.twice))
    rows: list[dict[str, Any]] = []
    for head in sorted(judge.consumed.keys() | judge.refused.keys() | missing.keys()):
        number, epoch = (int(part) for part in unpack_visits(np.array(head))[:2])
        samples = plan.indexes[number].num_samples if 0 <= number < len(plan.indexes) else 0
        met = judge.consumed[head] + judge.refused[head] - odd.again[head]
        counts = {
            "samples": samples,
            "consumed": judge.consumed[head],
            "refused": judge.refused[head],
            "to_come": max(0, samples - met - missing[head]),
            "twice": twice[head],
            "missing": missing[head],
        }
        if rows and rows[-1] == {"set": number, "epochs": [rows[-1]["epochs"][0], epoch - 1], **counts}:
            rows[-1]["epochs"][1] = epoch
        else:
            rows.append({"set": number, "epochs": [epoch, epoch], **counts})
    return rows


def _name(plan: Plan, odd: _Odd) -> list[str]:
    """The first samples that are not as they should be, by shard and row."""
    kinds = {
        "not consumed": odd.missing,
        "consumed more than once": odd.twice,
        "consumed where the order has another sample": odd.misplaced,
    }
    found = sorted((visit, what) for what, visits in kinds.items() for visit in visits[:NAMED].tolist())
    lines = []
    for visit, what in found[:NAMED]:
        number, epoch, sample = (int(part) for part in unpack_visits(np.array(visit)))
        place = f"data set {number}, epoch {epoch}, "
        if 0 <= number < len(plan.indexes) and sample < plan.indexes[number].num_samples:
            shard = int(np.searchsorted(plan.starts[number], sample, side="right")) - 1
            place += f"{plan.indexes[number].shards[shard].name} row {sample - plan.starts[number][shard]}"
        else:
            place += f"sample {sample}, which is in no shard"
        lines.append(f"{place}: {what}")
    return lines
