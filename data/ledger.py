"""The record of what a run consumed: which sample in which epoch, by which attempt. See docs/ledger.md.

Every rank keeps its visits in memory and puts them on disk before each commit of a checkpoint, so the record reaches at
least as far as any commit. What an attempt consumed behind its last commit is consumed again by the next one, and the
next one's record then takes the place of it. `data.ledger_check` proves from the record that every sample of every
epoch was consumed exactly once.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data.errors import DataError
from data.local_store import LocalStore

if TYPE_CHECKING:  # to look at a record takes no torch
    from data.loader import Batch, Loader, LoaderConfig

ATTEMPTS = "attempts.jsonl"
FORMAT_VERSION = 1
_NAME = re.compile(r"([\w.-]+)/(\d{12})-(\d{12})-rank-(\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run: a line of attempts.jsonl."""

    attempt: str  # its name, also that of the folder of its records
    first_micro_batch: int  # micro-batches consumed before it over all ranks, as its checkpoint counted them
    world_size: int
    num_workers: int
    data_sets: tuple[dict[str, str], ...]  # {"url", "fingerprint"} of each set; the url's index.json has the rows
    stamp: dict[str, Any]  # what the order of the data depends on, see data.loader.order_stamp
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.first_micro_batch < 0 or self.world_size < 1 or not isinstance(self.stamp, dict):
            raise ValueError("no attempt of a run")


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """What one rank of one attempt consumed between two writes; all that its name tells."""

    path: Path
    attempt: str
    first: int  # micro-batches of the run before it
    last: int  # micro-batches of the run, over all ranks, once it was written
    rank: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """Micro-batches and their visits, by ascending number."""

    numbers: np.ndarray  # (n,) int64, numbers of micro-batches
    visits: np.ndarray  # (n, B) int64, packed: data set, epoch, sample, see data.streams
    filtered: np.ndarray  # (F,) int64, visits that a filter refused
    filtered_numbers: np.ndarray  # (F,) int64, the micro-batch with which each of them was reported


class Ledger:
    """Writes the record of one rank in one attempt.

    Args:
        folder: `ledger/` of the run directory, shared by all ranks.
        rank: this rank.
        attempt: name of the attempt, the same on all ranks and different in every attempt.
    """

    def __init__(self, folder: Path, rank: int, attempt: str) -> None:
        self._store, self._rank, self._attempt = LocalStore(folder), rank, attempt
        self._written = 0  # micro-batches over all ranks, at the last write
        self._numbers: list[int] = []
        self._visits: list[np.ndarray] = []
        self._filtered: list[np.ndarray] = []

    def open(self, loader: "Loader", config: "LoaderConfig", first_micro_batch: int, world_size: int) -> None:
        """Begins the attempt: rank 0 appends its line to attempts.jsonl."""
        self._written = first_micro_batch
        if self._rank:
            return
        line = Attempt(
            attempt=self._attempt,
            first_micro_batch=first_micro_batch,
            world_size=world_size,
            num_workers=config.num_workers,
            data_sets=tuple({"url": index.url, "fingerprint": index.fingerprint} for index in loader.indexes),
            stamp=loader.stamp,
        )
        path = self._store.root / ATTEMPTS
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            torn = not (file.read() or "\n").endswith("\n")  # by a power cut; it stays a line of its own
            file.write("\n" * torn + json.dumps(asdict(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def add(self, batch: "Batch") -> None:
        """Takes note of a micro-batch that this rank has consumed."""
        visits = batch.visits.numpy()
        self._numbers.append(int(batch.sample_numbers[0]) // len(visits))
        self._visits.append(visits.copy())  # it may lie in memory shared with a worker
        self._filtered.append(batch.filtered.numpy().copy())

    def write(self, micro_batches: int) -> None:
        """Puts what was consumed since the last write on disk; call it on every rank before a commit.

        Args:
            micro_batches: consumed by the run over all ranks.

        Raises:
            DataError: the disk refuses.
        """
        if self._numbers:
            record = {
                "numbers": np.array(self._numbers, dtype=np.int64),
                "visits": np.stack(self._visits),
                "filtered": np.concatenate(self._filtered),
                "filtered_counts": np.array([len(visits) for visits in self._filtered], dtype=np.int64),
            }
            name = f"{self._attempt}/{self._written:012d}-{micro_batches:012d}-rank-{self._rank:05d}.safetensors"
            self._store.put_bytes(save(record), name)
            self._numbers, self._visits, self._filtered = [], [], []
        self._written = micro_batches


# --- reading ------------------------------------------------------------------------------------------------------


def read_attempts(folder: Path) -> list[Attempt]:
    """Reads attempts.jsonl: the attempts in the order of their starts.

    A line that cannot be read is passed over: a power cut may have torn it, and then its attempt recorded nothing.
    `data.ledger_check` tells of files of an attempt without a line.

    Raises:
        DataError: the run has no record.
    """
    path = folder / ATTEMPTS
    if not path.exists():
        raise DataError(
            f"{path}: no such file, so there is no record of what the run consumed; give the directory of a run that "
            "was trained with one"
        )
    attempts = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            fields = json.loads(line)
            attempts.append(Attempt(**fields | {"data_sets": tuple(fields["data_sets"])}))
    if not attempts:
        raise DataError(f"{path}: names no attempt that can be read; restore it")
    if found := next((a.format_version for a in attempts if a.format_version != FORMAT_VERSION), None):
        raise DataError(f"{path}: format {found}, known is {FORMAT_VERSION}; update darkroom")
    return attempts


def list_records(folder: Path) -> tuple[list[RecordFile], list[str]]:
    """Returns the files of all attempts by number of micro-batch, and a line for each that is none of ours."""
    files, problems = [], []
    for key, _ in LocalStore(folder).list():
        if key == ATTEMPTS:
            continue
        match = _NAME.fullmatch(key)
        if match is None or int(match[2]) >= int(match[3]):
            problems.append(f"{folder / key}: no file of a record has this name")
            continue
        first, last, rank = map(int, match.groups()[1:])
        files.append(RecordFile(path=folder / key, attempt=match[1], first=first, last=last, rank=rank))
    return sorted(files, key=lambda file: (file.first, file.path)), problems


def read_record(file: RecordFile, begin: int, end: int, micro_batch_size: int) -> Record:
    """Reads the micro-batches `begin` to `end` - 1 of a file, and no more of it than these.

    Raises:
        DataError: the file is damaged or not what its name says.
    """
    try:
        with safe_open(str(file.path), framework="numpy") as tensors:
            numbers, counts, filtered = (
                tensors.get_tensor(name) for name in ("numbers", "filtered_counts", "filtered")
            )
            visits = tensors.get_slice("visits")
            fits = (
                {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"I64"}  # noqa: SIM118
                and numbers.shape == counts.shape == (visits.get_shape()[0],)
                and visits.get_shape() == [len(numbers), micro_batch_size]
                and filtered.shape == (counts.sum(),)
                and numbers.size > 0
                and file.first <= numbers[0] <= numbers[-1] < file.last
                and (np.diff(numbers) > 0).all()
                and (counts >= 0).all()
            )
            if fits:
                low, high = np.searchsorted(numbers, (begin, end)).tolist()
                ends = np.concatenate(([0], np.cumsum(counts)))
                return Record(
                    numbers=numbers[low:high],
                    visits=visits[low:high] if low < high else np.zeros((0, micro_batch_size), np.int64),
                    filtered=filtered[ends[low] : ends[high]],
                    filtered_numbers=np.repeat(numbers[low:high], counts[low:high]),
                )
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file.path}: cannot be read ({' '.join(str(error).split())})") from error
    raise DataError(f"{file.path}: does not hold what its name says")
