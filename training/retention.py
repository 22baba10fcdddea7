"""What of the checkpoints folder is given up: old commits, and files that no commit names. Rank 0 alone does it."""

import logging

from data.errors import DataError
from data.manifest import (
    MANIFEST,
    DamagedCommit,
    delete_commit,
    delete_files,
    list_commits,
    read_manifest,
    step_folder,
    superfluous,
)
from data.object_store import Store
from training.attempts import Attempt, refuse_superseded
from training.errors import TrainingError
from training.run_mirror import RunMirror

GOOD_COMMITS = 2  # known to be whole, that always stay

log = logging.getLogger(__name__)


class Retention:
    """Deletes for one attempt.

    Args:
        store: of the checkpoints folder.
        keep_last: commits to keep.
        keep_every: commits of steps that are multiples of this are kept for good; 0 = none.
        attempt: this start.
    """

    def __init__(self, store: Store, keep_last: int, keep_every: int, attempt: Attempt) -> None:
        self._store = store
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._attempt = attempt
        self._good: set[int] = set()  # commits that this attempt has verified or written
        self._files: dict[int, set[str]] = {}  # of commits, by step

    def add_good(self, step: int) -> None:
        """Takes note of a commit that is known to be whole."""
        self._good.add(step)

    def tidy(self, step: int, mirror: RunMirror | None = None) -> None:
        """Deletes what is not to be kept once `step` is committed.

        What cannot be deleted stays, with a warning: the new commit is good, and the next one tries again.
        """
        try:
            refuse_superseded(self._store, self._attempt)  # what a newer start has is its own
            self._prune()
            self._clean(step)
            if mirror is not None:
                mirror.drop_older()
            self._store.sweep(self._attempt.started_s)
        except TrainingError:
            return
        except (DataError, OSError) as error:
            log.warning("old checkpoints stay: %s", error)

    def _prune(self) -> None:
        for step in superfluous(list_commits(self._store), self._keep_last, self._keep_every):
            if len(self._good - {step}) < GOOD_COMMITS:
                return
            delete_commit(self._store, step)
            self._good.discard(step)
            self._files.pop(step, None)

    def _clean(self, newest: int) -> None:
        """Deletes files of steps up to `newest` that no commit names: what dead attempts and failed saves left."""
        kept: set[str] = set()
        unknown = []  # folders whose manifest does not say what it needs
        for step in list_commits(self._store):
            folder = step_folder(step)
            try:
                if step not in self._files:
                    self._files[step] = {f"{folder}/{key}" for key in read_manifest(self._store, step).files}
                kept |= self._files[step] | {f"{folder}/{MANIFEST}"}
            except DamagedCommit:
                unknown.append(f"{folder}/")
        last = f"{step_folder(newest)}/~"
        remains = [key for key, _ in self._store.list("step-") if key < last and key not in kept]
        delete_files(self._store, [key for key in remains if not key.startswith(tuple(unknown))])
