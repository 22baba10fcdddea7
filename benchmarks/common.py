"""What the benchmarks share: interleaved rounds, one form of row, the table, the command line."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

Work = Callable[[], int]  # does a fixed piece of work and returns how many units it was
SETTLE_S = 0.05  # what threads begin in one turn they should not go on with in the other's


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    name: str
    ours: float  # median rate, in `unit`
    peer: float | None  # likewise; None = there is nothing to compare with, `ours` is measured against a fixed goal
    unit: str
    ratio_median: float | None  # how many times better ours is: the median over the rounds of ours / peer
    ratio_min: float | None
    ratio_max: float | None
    rounds: int
    outputs_equal: bool  # asserted before anything was timed, in the sense that the benchmark's page states
    machine: str
    versions: dict[str, str]


def compare(
    name: str,
    ours: Work,
    peer: Work,
    *,
    unit: str,
    packages: Sequence[str],
    rounds: int = 7,
    clock: Callable[[], float] = time.process_time,
) -> Row:
    """Times both, turn by turn in this process, after one turn each that does not count.

    Args:
        name: of the row.
        ours: our work; must have been shown to give the peer's result.
        peer: theirs.
        unit: of the rate: units of work per second of `clock`.
        packages: distributions whose versions matter.
        rounds: pairs of turns; who comes first alternates.
        clock: seconds; the default counts the CPU time of all threads and no waiting.
    """
    ours(), peer()
    rates: dict[Work, list[float]] = {ours: [], peer: []}
    for number in range(rounds):
        for work in (ours, peer) if number % 2 else (peer, ours):
            start = clock()
            count = work()
            if clock is time.process_time:
                time.sleep(SETTLE_S)  # costs no CPU time
            rates[work].append(count / (clock() - start))
    ratios = [one / other for one, other in zip(rates[ours], rates[peer], strict=True)]
    return Row(
        name=name,
        ours=statistics.median(rates[ours]),
        peer=statistics.median(rates[peer]),
        unit=unit,
        ratio_median=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        rounds=rounds,
        outputs_equal=True,
        machine=machine(),
        versions={package: importlib.metadata.version(package) for package in packages},
    )


def main(description: str, benchmark: Callable[[argparse.Namespace], list[Row]], names: Sequence[str]) -> None:
    """Runs a benchmark from the command line: prints the table and writes the rows where --json says.

    Args:
        description: for --help.
        benchmark: returns the rows; reads `rows` (which of `names` to measure) and `rounds`.
        names: of the rows it knows.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds per row (default 7, at least 5)")
    parser.add_argument("--rows", nargs="+", choices=names, default=list(names), help="which rows (default all)")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error("--rounds: at least 5, or the median says nothing")
    torch.set_num_threads(1)
    rows = benchmark(arguments)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Renders rows as Markdown, with the machine and the versions below."""
    lines = ["| row | ours | peer | unit | ratio | of all rounds |", "|---|---|---|---|---|---|"]
    for row in rows:
        peer = "–" if row.peer is None else f"{row.peer:,.0f}"
        ratio = "–" if row.ratio_median is None else f"**{row.ratio_median:.2f}**"
        spread = f"{row.rounds}"
        if row.ratio_min is not None:
            spread = f"{row.ratio_min:.2f}–{row.ratio_max:.2f} ({row.rounds})"
        lines.append(f"| {row.name} | {row.ours:,.0f} | {peer} | {row.unit} | {ratio} | {spread} |")
    versions = ", ".join(f"{name} {version}" for name, version in sorted({**_all_versions(rows)}.items()))
    return "\n".join([*lines, "", f"{rows[0].machine}; {versions}" if rows else ""])


def machine() -> str:
    """Says on what this was measured: processor, cores, vector instructions that torch uses, GPU."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}{gpu}, {python}"


def _all_versions(rows: Sequence[Row]) -> dict[str, str]:
    return {name: version for row in rows for name, version in row.versions.items()}
