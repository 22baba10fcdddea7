"""The check of the nodes before ranks start on them: what each node says of itself, and who is bad by it.

Every task writes its facts to the attempt's folder, first what it can tell alone, then what all measured together
(node_check.py). Whoever hangs or dies on the way is missing there, and so named as well.
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.attempts import write_whole
from launch.cluster import Preflight
from launch.slurm import TASK

CHECK = ("launch", "check-node")


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What one task of the check found. Measurements are None until all tasks have met."""

    node: str
    rank: int
    step_nodes: str = ""  # all nodes of the check, as SLURM writes them
    versions: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()  # found by the node itself: devices, disk, store
    error: str = ""  # what ended its part in the common measurements
    error_s: float = 0.0  # s since 1970, when
    clock_s: float | None = None  # s since 1970, taken by all at the same moment
    work_s: float | None = None  # s for a fixed computation on its device
    pair_s: float | None = None  # s for a fixed transfer with a neighbour, the faster of two
    all_reduce_gb_s: float | None = None  # GB/s of gradient, with all ranks


def write_facts(folder: Path, facts: NodeFacts) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"check-{facts.rank}.json", json.dumps(asdict(facts)))


def read_facts(folder: Path) -> list[NodeFacts]:
    """By rank."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("check-*.json")]
    found = [NodeFacts(**{**row, "problems": tuple(row["problems"])}) for row in rows]
    return sorted(found, key=lambda facts: facts.rank)


def check_command(srun: Sequence[str], folder: Path, preflight: Preflight) -> list[str]:
    """The step that checks the nodes of a step: the same tasks at the same places."""
    start = next(index for index in range(len(srun)) if tuple(srun[index : index + 2]) == TASK)
    return [*srun[:start], *CHECK, str(folder), *check_options(preflight)]


def check_options(preflight: Preflight) -> list[str]:
    store = [f"--store={preflight.store}"] if preflight.store else []
    return [*store, f"--min-free-gib={preflight.min_free_gib}", f"--timeout={max(preflight.timeout_s - 10, 10)}"]


def bad_nodes(folder: Path, nodes: Sequence[str], preflight: Preflight) -> dict[str, list[str]]:
    """The nodes that should not be used, with the reasons in words."""
    return judge_nodes(read_facts(folder), nodes, preflight)


def judge_nodes(found: Sequence[NodeFacts], nodes: Sequence[str], preflight: Preflight) -> dict[str, list[str]]:
    """As `bad_nodes`, of facts.

    A node alone may be wrong against the others. Of two, the one that is slower, ahead in time or, of versions that are
    as frequent, second in the list is named.
    """
    reasons: dict[str, list[str]] = {node: [] for node in nodes}

    def blame(node: str, why: str) -> None:
        if why not in reasons.setdefault(node, []):
            reasons[node].append(why)

    for node in set(nodes) - {facts.node for facts in found}:
        blame(node, f"gave no answer within {preflight.timeout_s} s")
    for facts in found:
        for problem in facts.problems:
            blame(facts.node, problem)
    first = [facts for facts in found if facts.versions]  # one task of each node tells them
    for name in sorted({name for facts in first for name in facts.versions}):
        usual = Counter(facts.versions.get(name, "absent") for facts in first).most_common(1)[0][0]
        for facts in first:
            if (version := facts.versions.get(name, "absent")) != usual:
                blame(facts.node, f"{name} is {version}, elsewhere {usual}")
    if any(reasons.values()):
        return _named(reasons)  # the others waited for these in vain
    if broken := [facts for facts in found if facts.error]:
        earliest = min(broken, key=lambda facts: facts.error_s)  # the others lost their connections to it
        blame(earliest.node, earliest.error)
        return _named(reasons)
    for facts in found:
        if facts.all_reduce_gb_s is None:
            blame(facts.node, "did not come through the all-reduce")
    if not any(reasons.values()):
        _compare(found, preflight, blame)
    return _named(reasons)


def _compare(found: Sequence[NodeFacts], preflight: Preflight, blame: Any) -> None:
    """Who is off the median."""
    clock = statistics.median_low(_values(found, "clock_s"))
    for facts in found:
        if facts.clock_s is not None and abs(facts.clock_s - clock) > preflight.max_clock_skew_s:
            blame(facts.node, f"its clock is {facts.clock_s - clock:+.1f} s off")
    for name, what in (("work_s", "computes"), ("pair_s", "exchanges data")):
        values = _values(found, name)
        usual = statistics.median_low(values) if values else 0.0
        for facts in found:
            value = getattr(facts, name)
            if value is not None and value > preflight.max_slowdown * usual:
                blame(facts.node, f"{what} {value / usual:.1f} times slower than the median")
    slowest = min(_values(found, "all_reduce_gb_s"))
    if slowest < preflight.min_all_reduce_gb_s:
        for facts in found:
            blame(facts.node, f"all-reduce of all nodes {slowest:.2f} GB/s, wanted {preflight.min_all_reduce_gb_s}")


def _values(found: Iterable[NodeFacts], name: str) -> list[float]:
    return [value for facts in found if (value := getattr(facts, name)) is not None]


def _named(reasons: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {node: why for node, why in sorted(reasons.items()) if why}
