"""Who may commit: every start of a run registers in its checkpoints folder, and only the newest one may.

A process of an earlier start can live on after its job was given up (a lost node, a hung kill). It writes under keys
of its own, so it overwrites nothing; before it commits it finds the newer registration and stops.

    attempts/000007.json    the seventh start: its attempt's name; put only if absent, so no number is given twice
    attempts/committed.json put after the first commit: from then on a folder without a good commit has lost something
"""

import json
import re
import time
from dataclasses import dataclass

from data.errors import DataError
from data.object_store import Store
from training.errors import TrainingError

FOLDER = "attempts/"
COMMITTED = f"{FOLDER}committed.json"
_NUMBER = re.compile(r"attempts/(\d{6})\.json")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run."""

    generation: int  # starts are counted from 1
    name: str  # different for every start
    started_s: float  # since the epoch, by the clock of the machine with rank 0


def register(store: Store, name: str) -> Attempt:
    """Takes the next generation. Raises DataError when the store does not answer."""
    generation = max(_generations(store), default=0)
    while True:
        generation += 1
        attempt = Attempt(generation=generation, name=name, started_s=time.time())
        content = json.dumps({"attempt": name, "started_s": attempt.started_s}).encode()
        if store.put_if_absent(content, f"{FOLDER}{generation:06d}.json"):
            return attempt


def refuse_superseded(store: Store, attempt: Attempt) -> None:
    """Raises TrainingError if the run has been started again since `attempt`."""
    newest = max(_generations(store), default=0)
    if newest > attempt.generation:
        raise TrainingError(
            f"start {newest} of this run has taken over the checkpoints in {store.url} from this one, start "
            f"{attempt.generation}: this process is a leftover, stops, and committed nothing of what it had in hand"
        )


def generation_of(store: Store, name: str) -> int:
    """The generation of the attempt that wrote a folder `name` or `name.RETRY`; 0 if it never registered."""
    for generation in sorted(_generations(store), reverse=True):
        if _name_of(store, generation) == base_name(name):
            return generation
    return 0


def base_name(folder: str) -> str:
    """The attempt of a folder: retries of a save add a number behind a dot."""
    return folder.partition(".")[0]


def mark_committed(store: Store) -> None:
    """Leaves word that this run has committed something."""
    store.put_if_absent(b"{}", COMMITTED)


def only_unfinished(store: Store, keys: list[str]) -> bool:
    """Are these keys what starts leave behind that were ended before their first commit, and nothing else?"""
    if COMMITTED in keys:
        return False
    names = {_name_of(store, generation) for generation in _generations(store)}
    steps = [key.split("/") for key in keys if not key.startswith((FOLDER, "run/"))]
    return all(len(key) == 3 and key[0].startswith("step-") and base_name(key[1]) in names for key in steps)


def _generations(store: Store) -> list[int]:
    matches = (_NUMBER.fullmatch(key) for key, _ in store.list(FOLDER))
    return [int(match[1]) for match in matches if match]


def _name_of(store: Store, generation: int) -> str:
    with store.open_range(f"{FOLDER}{generation:06d}.json") as file:
        data = file.read()
    try:
        return str(json.loads(data)["attempt"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store.url}/{FOLDER}{generation:06d}.json: damaged; delete it") from error
