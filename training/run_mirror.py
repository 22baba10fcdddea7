"""The run directory's copy beside the checkpoints, so that a new machine with nothing but the bucket goes on.

Kept where `checkpoint.url` is set, and brought up to date before every commit:

    run/run.yaml, run/frozen/…, run/init_from.json    as they are; written once
    run/ledger/ATTEMPT/…safetensors                   as they are; written once
    run/parts/FILE/GENERATION-OFFSET                  what FILE has grown by; FILE is metrics.jsonl,
                                                      ledger/attempts.jsonl, bad_samples-R.jsonl or
                                                      bad_steps-R.jsonl

Every start of the run puts the whole of a growing file under its own generation (training/attempts.py) and then what is
added to it, so a leftover process of an earlier start changes nothing of what the newest one has put.
"""

import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError
from data.ledger import ATTEMPTS, read_attempts
from data.local_store import COPY_BYTES, TEMP_PREFIX, LocalStore, checked_key
from data.manifest import delete_files, list_commits
from data.object_store import Store
from training.attempts import Attempt
from training.errors import TrainingError

FOLDER = "run/"
RUN_YAML = "run.yaml"
_PART = re.compile(r"run/parts/(.+)/(\d{6})-(\d{15})")


class RunMirror:
    """Puts what one rank has: its own part of the ledger and the quarantine; rank 0 also what there is once.

    Args:
        store: of the checkpoints folder.
        directory: the run's.
        rank: this rank.
        attempt: this start.
    """

    def __init__(self, store: Store, directory: Path, rank: int, attempt: Attempt) -> None:
        self._store = store
        self._directory = directory
        self._rank = rank
        self._attempt = attempt
        self._there: set[str] | None = None  # what is written once and known to be there
        self._sizes: dict[str, int] = {}  # bytes of growing files that this attempt has put

    def put_mine(self) -> None:
        """Before the rank reports that its files are put. Raises DataError when the store or the disk refuses."""
        self._put_once(f"ledger/{self._attempt.name}/*-rank-{self._rank:05d}.safetensors")
        for name in ("bad_samples", "bad_steps"):
            self._put_growth(f"{name}-{self._rank}.jsonl")

    def put_shared(self) -> None:
        """Rank 0, before the manifest. Raises DataError when the store or the disk refuses."""
        for pattern in ("init_from.json", "frozen/**/*"):
            self._put_once(pattern)
        for name in ("metrics.jsonl", f"ledger/{ATTEMPTS}"):
            self._put_growth(name)

    def drop_older(self) -> None:
        """Deletes the growing files of earlier starts where this one has put its own."""
        old = [
            key
            for key, name, generation, _ in _parts(self._store)
            if generation < self._attempt.generation and self._sizes.get(name)
        ]
        delete_files(self._store, old)

    def _put_once(self, pattern: str) -> None:
        if self._there is None:
            # What a start put that never committed may be half of it, or of other networks.
            self._there = {key for key, _ in self._store.list(FOLDER)} if list_commits(self._store) else set()
        for path in sorted(self._directory.glob(pattern)):
            key = FOLDER + path.relative_to(self._directory).as_posix()
            if path.is_file() and key not in self._there and not path.name.startswith(TEMP_PREFIX):
                self._store.put_file(path, key)
                self._there.add(key)

    def _put_growth(self, name: str) -> None:
        path, begin = self._directory / name, self._sizes.get(name, 0)
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(begin)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]  # whole lines
        if added:
            self._store.put_bytes(added, f"{FOLDER}parts/{name}/{self._attempt.generation:06d}-{begin:015d}")
            self._sizes[name] = begin + len(added)


def claim(store: Store, directory: Path) -> None:
    """Puts this run's run.yaml beside its checkpoints, where no other run's may be.

    Raises:
        TrainingError: the checkpoints are those of another run.
        DataError: the store refuses.
    """
    path = directory / RUN_YAML
    if path.exists() and not store.put_if_absent(path.read_bytes(), FOLDER + RUN_YAML):
        raise TrainingError(
            f"{store.url} holds the checkpoints of another run than {directory} (its {FOLDER}{RUN_YAML} differs); "
            "give another checkpoint.url, or an empty --run to go on with that run"
        )


def fetch_run(store: Store, directory: Path) -> None:
    """Brings a run directory up to date: what the store has and it has not, and what of a growing file it has not.

    A directory that is no run and not empty is left as it is, as is one whose run never committed anything.

    Raises:
        DataError: the store does not answer, or the disk refuses.
    """
    keys = [key for key, _ in store.list(FOLDER)]
    local = LocalStore(directory)
    if not (directory / RUN_YAML).exists():
        if FOLDER + RUN_YAML not in keys or (directory.exists() and any(directory.iterdir())):
            return
        _fetch(store, FOLDER + RUN_YAML, directory / RUN_YAML)
    if not list_commits(store):
        return
    _fetch_growing(store, local)
    attempts = directory / "ledger" / ATTEMPTS
    names = {attempt.attempt for attempt in read_attempts(attempts.parent)} if attempts.exists() else set()
    for key in keys:
        name = checked_key(key.removeprefix(FOLDER))
        head, _, rest = name.partition("/")
        wanted = head in ("frozen", "init_from.json") or (head == "ledger" and rest.partition("/")[0] in names)
        if wanted and not local.exists(name):
            _fetch(store, key, directory / name)


def _fetch_growing(store: Store, local: LocalStore) -> None:
    """A local file that goes on from what the store has stays; any other gives way to it."""
    newest: dict[str, int] = {}
    parts = sorted(_parts(store))
    for _, name, generation, _ in parts:
        newest[name] = max(generation, newest.get(name, 0))
    for name, generation in newest.items():
        content = b""
        for key, part_of, number, offset in parts:
            if part_of == name and number == generation:
                if offset != len(content):
                    raise DataError(f"{store.url}/{key}: what comes before it is missing; restore it")
                with store.open_range(key) as file:
                    content += file.read()
        path = local.root / checked_key(name)
        if not path.exists() or not path.read_bytes().startswith(content):
            local.put_bytes(content, name)


def _parts(store: Store) -> Iterator[tuple[str, str, int, int]]:
    """Yields (key, file, generation, offset in bytes) of every part of a growing file."""
    for key, _ in store.list(f"{FOLDER}parts/"):
        if match := _PART.fullmatch(key):
            yield key, match[1], int(match[2]), int(match[3])


def _fetch(store: Store, key: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}")
    try:
        with store.open_range(key) as source, partial.open("wb") as out:
            shutil.copyfileobj(source, out, COPY_BYTES)
        partial.rename(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path, the rights and the free space") from error
    finally:
        partial.unlink(missing_ok=True)
