"""What a report is made of, read from a run directory or from a folder of runs."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.errors import EvalError
from launch.config_io import dump_yaml, read_yaml

EVALUATION = "eval"  # the folder of a run's own evaluation


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One training run."""

    name: str
    kind: str  # "autoencoder" or "dit"
    recipe: str  # resolved, as YAML
    settings: dict[str, Any] = field(default_factory=dict)  # the same, as values
    provenance: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl, ascending by step, the last written row of each step
    grids: list[tuple[int, Path]]  # (step, PNG), ascending
    prompts: list[str]  # of the grids; empty where a grid shows no prompts

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one quantity; rows that lack it are left out."""
        pairs = [(float(row["step"]), float(row[key])) for row in self.rows if isinstance(row.get(key), int | float)]
        return [step for step, _ in pairs], [value for _, value in pairs]


@dataclass(frozen=True, kw_only=True)
class EvaluationFacts:
    """One evaluation folder."""

    name: str
    folder: Path
    metrics: dict[str, Any]
    prompts: dict[str, list[dict[str, Any]]]  # set name -> rows of prompts-SET.jsonl


@dataclass(frozen=True, kw_only=True)
class ReportFacts:
    """Everything that a page shows."""

    title: str
    runs: list[RunFacts]
    evaluations: list[EvaluationFacts]
    seconds: dict[str, float] = field(default_factory=dict)  # per stage, of a demo's summary.json
    peak_rss_gib: float | None = None


def collect(folder: Path) -> ReportFacts:
    """Reads a run directory, or a folder whose sub-folders are runs (the demo's).

    Raises:
        EvalError: if there is no run, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise EvalError(f"{folder} is no folder; name a run directory, or a folder of runs")
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    runs = [_read_run(path) for path in candidates if (path / "run.yaml").is_file()]
    places = [place for path in candidates for place in (path / EVALUATION, path) if (place / "metrics.json").is_file()]
    evaluations = [_read_evaluation(place) for place in dict.fromkeys(places)]
    if not runs and not evaluations:
        raise EvalError(f"{folder} holds no run (run.yaml) and no evaluation (metrics.json); name another folder")
    order = {"autoencoder": 0, "dit": 1}
    summary = _read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    return ReportFacts(
        title=folder.resolve().name,
        runs=sorted(runs, key=lambda run: order.get(run.kind, 2)),
        evaluations=evaluations,
        seconds={str(k): float(v) for k, v in summary.get("seconds", {}).items()},
        peak_rss_gib=summary.get("peak_rss_gib"),
    )


def _read_run(folder: Path) -> RunFacts:
    stored = read_yaml(folder / "run.yaml")
    recipe = stored.get("recipe", stored)
    samples = folder / "samples"
    grids = [(int(path.stem.removeprefix("step-")), path) for path in sorted(samples.glob("step-[0-9]*.png"))]
    prompts = _read_json(samples / "prompts.json") if (samples / "prompts.json").is_file() else []
    return RunFacts(
        name=folder.resolve().name,
        kind=str(recipe.get("kind", "run")),
        recipe=dump_yaml(recipe),
        settings=recipe,
        provenance=stored.get("provenance", {}),
        rows=_read_rows(folder / "metrics.jsonl"),
        grids=grids,
        prompts=[str(prompt) for prompt in prompts],
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows by step; a line that a kill cut short is passed over (a resume goes on below it)."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            if not line.startswith("{") or line.endswith("}"):
                raise EvalError(f"{path}, line {number}: no row of metrics; repair or remove that line") from None
    return [rows[step] for step in sorted(rows)]


def _read_evaluation(folder: Path) -> EvaluationFacts:
    prompts = {}
    for path in sorted(folder.glob("prompts-*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts[path.stem.removeprefix("prompts-")] = [json.loads(line) for line in lines]
    name = folder.parent.name if folder.name == EVALUATION else folder.name
    return EvaluationFacts(name=name, folder=folder, metrics=_read_json(folder / "metrics.json"), prompts=prompts)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvalError(f"{path} is not JSON ({error}); remove it or write it again") from None
