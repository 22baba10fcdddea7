"""The whole way of the data on the embedded sample: `python -m launch.demo [--dir runs/demo]`.

Each stage is one `darkroom` command. A stage that is done is not run again, and an interrupted one goes on where it
stopped: the same command resumes. At the end `summary.json` holds what was measured and the report is named.
"""

import argparse
import json
import os
import resource
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.runtime import gpu_count, report_error, run_command

# Of the evaluation's metrics.json: what describes the evaluation, not the model.
NOT_FIGURES = ("format_version", "settings", "data", "versions", "eval_seconds")
# What each figure has to reach (fractions; dB), by place in summary.json.
WANTED = {
    "prompt_following.colour.generated": 0.98,
    "prompt_following.digit.generated": 0.85,
    "prompt_following.count.generated": 0.98,
    "prompt_following.colour.held_out_combinations": 0.90,
    "prompt_following.digit.held_out_combinations": 0.70,
    "prompt_following.count.held_out_combinations": 0.98,
    "autoencoder.psnr_db": 26.0,
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the chain."""

    name: str
    arguments: tuple[str, ...]  # of `darkroom`
    result: Path  # exists when the stage is done, and not before


def stages(folder: Path, nproc: int, overrides: Mapping[str, Sequence[str]]) -> list[Stage]:
    """The chain in `folder`.

    Args:
        folder: where everything goes.
        nproc: ranks of the training stages.
        overrides: stage name -> further overrides `a.b=c` of its recipe; of the data stage, its options as `train=512`.
    """
    data, autoencoder, dit = folder / "data", folder / "autoencoder", folder / "dit"
    more = {name: tuple(overrides.get(name, ())) for name in ("data", "autoencoder", "dit", "eval")}
    ranks = ("--nproc", str(nproc))
    train = f"data.shards={data / 'train'}"
    held_out = (
        f"data.train={data / 'train'}",
        f"data.test={data / 'test'}",
        f"data.combinations={data / 'combinations'}",
    )
    return [
        Stage(
            name="data",
            arguments=("data", "digits", str(data), *(f"--{option}" for option in more["data"])),
            result=data / "combinations" / "index.json",
        ),
        Stage(
            name="autoencoder",
            arguments=("train", "autoencoder", "digits-autoencoder", "--run", str(autoencoder), *ranks)
            + (train, f"validation_shards={data / 'test'}", *more["autoencoder"]),
            result=autoencoder / "artifact",
        ),
        Stage(
            name="dit",
            arguments=("train", "dit", "digits-dit", "--run", str(dit), *ranks)
            + (train, f"autoencoder={autoencoder}", *more["dit"]),
            result=dit / "artifact",
        ),
        Stage(
            name="eval",
            arguments=("eval", "digits-eval", "--out", str(dit / "eval"), f"model={dit}", *held_out, *more["eval"]),
            result=dit / "eval" / "metrics.json",
        ),
        Stage(name="export", arguments=("export", str(dit), "--out", str(folder / "export")), result=folder / "export"),
        Stage(name="report", arguments=("report", str(folder)), result=folder / "report.html"),
    ]


def run(folder: Path, nproc: int, overrides: Mapping[str, Sequence[str]]) -> int:
    """Runs what is left of the chain; returns the exit code of the first stage that fails, or 0."""
    folder.mkdir(parents=True, exist_ok=True)
    ledger = _Ledger(folder / "stages.json")
    chain = stages(folder, nproc, overrides)
    for number, stage in enumerate(chain, 1):
        head = f"[{number}/{len(chain)}] {stage.name}"
        if stage.result.exists():
            print(f"{head}: done before in {ledger.seconds.get(stage.name, 0.0):.0f} s", flush=True)
            continue
        if stage.name == "report":
            _write_summary(folder, ledger)  # the page shows it
        print(f"{head}: darkroom {shlex.join(stage.arguments)}", flush=True)
        code = ledger.measure(stage.name, [*_darkroom(), *stage.arguments])
        if code:
            print(f"{head}: ended with exit code {code}; the same command goes on from here", file=sys.stderr)
            return code
        if not stage.result.exists():
            raise RuntimeError(f"stage {stage.name} returned 0 without writing {stage.result}")
    print(describe(_write_summary(folder, ledger), folder / "report.html"))
    return 0


def _darkroom() -> list[str]:
    command = Path(sys.executable).with_name("darkroom")
    return [str(command)] if command.exists() else [sys.executable, "-m", "launch.cli"]


class _Ledger:
    """Seconds per stage over all attempts, and the largest process so far; kept on disk between attempts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.seconds: dict[str, float] = known.get("seconds", {})
        self.peak_rss_gib: float = known.get("peak_rss_gib", 0.0)

    def measure(self, name: str, argv: list[str]) -> int:
        started_s = time.monotonic()
        try:
            return run_command(argv)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + round(time.monotonic() - started_s, 1)
            peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest descendant that ended
            self.peak_rss_gib = max(self.peak_rss_gib, round(peak_kib / 2**20, 2))
            _write_json(self._path, {"seconds": self.seconds, "peak_rss_gib": self.peak_rss_gib})


def _write_summary(folder: Path, ledger: _Ledger) -> dict[str, Any]:
    metrics = json.loads((folder / "dit" / "eval" / "metrics.json").read_text())
    figures = {name: value for name, value in metrics.items() if name not in NOT_FIGURES}
    summary = {**figures, "seconds": ledger.seconds, "peak_rss_gib": ledger.peak_rss_gib}
    _write_json(folder / "summary.json", summary)
    return summary


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def describe(summary: dict[str, Any], report: Path) -> str:
    """What was measured, beside what it had to reach and what the reader reads on real pictures."""
    lines = ["", "measured on held-out prompts and pictures"]
    for place, wanted in WANTED.items():
        value = _at(summary, place)
        if value is None:
            continue
        is_share = not place.endswith("_db")
        shown, aim = (f"{value:7.1%}", f"{wanted:.0%}") if is_share else (f"{value:4.1f} dB", f"{wanted:.0f} dB")
        group, _, column = place.rpartition(".")
        real = _at(summary, group + (".real_held_out_combinations" if "combinations" in column else ".real"))
        upper = f", real pictures {real:.1%}" if real is not None else ""
        name = place.removeprefix("prompt_following.").replace(".", " ").replace("_", " ")
        lines.append(f"  {name:<32} {shown}   (wanted {aim}{upper}){'' if value >= wanted else '   NOT REACHED'}")
    if (distance := _at(summary, "fd_digits_cnn")) is not None:
        lines.append(f"  {'Fréchet distance, digits-cnn':<32} {distance:7.2f}")
    seconds: dict[str, float] = summary["seconds"]
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    lines.append(f"  {'seconds':<32} {sum(seconds.values()):7.0f}   ({parts})")
    lines.append(f"  {'largest process':<32} {summary['peak_rss_gib']:7.2f} GiB")
    return "\n".join([*lines, "", f"report: {report}"])


def _at(values: Any, place: str) -> float | None:
    for key in place.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return float(values) if isinstance(values, int | float) else None


def default_nproc() -> int:
    """Two ranks; one where there is a single GPU, because NCCL refuses two ranks on one device."""
    return min(2, gpu_count()) or 2


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the chain; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where everything goes [runs/demo]")
    parser.add_argument("--nproc", type=int, default=default_nproc(), help="ranks of the training stages [%(default)s]")
    parser.add_argument(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("STAGE", "OVERRIDE"),
        help="e.g. --set dit total_steps=100, --set data train=512",
    )
    options = parser.parse_args(argv)
    if not gpu_count():
        # However many cores there are: another number of threads adds in another order, and the demo's figures are to
        # be the same on two machines.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    overrides: dict[str, list[str]] = {}
    for stage, override in options.set:
        overrides.setdefault(stage, []).append(override)
    try:
        if unknown := overrides.keys() - {"data", "autoencoder", "dit", "eval"}:
            raise ConfigError(f"--set {min(unknown)}: no such stage; there are data, autoencoder, dit, eval")
        return run(options.dir, options.nproc, overrides)
    except ConfigError as error:
        report_error(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
