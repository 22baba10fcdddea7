"""`darkroom report`: one self-contained HTML page about a run or a folder of runs; no script, nothing from outside."""

import os
import tempfile
from html import escape
from pathlib import Path

from data.object_store import is_local
from eval import report_sections as sections
from eval.errors import EvalError
from eval.report_checks import run_checks
from eval.report_data import ReportFacts, collect
from eval.report_style import CSS

PAGE = "report.html"
MARK = '<meta name="generator" content="darkroom report">'  # a page without it is not ours and stays
# Belt and braces: even a mistake in a section could not make the page ask anyone for anything.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run: str | Path) -> Path:
    """Writes `report.html` into a run directory or a folder of runs (the demo's), anew if it wrote it before.

    Returns:
        The page's path.

    Raises:
        EvalError: if the folder holds no run, or a `report.html` that somebody else wrote.
    """
    if not is_local(run):
        raise EvalError(f"{run}: a report is written beside a local run; copy the run's folder here first")
    folder = Path(run)
    facts = collect(folder)
    path = folder / PAGE
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise EvalError(f"{path} was not written by darkroom and is never overwritten; move it away")
    handle, partial = tempfile.mkstemp(dir=folder, prefix=".report-", suffix=".html")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(render(facts))
    os.chmod(partial, 0o644)
    os.replace(partial, path)
    return path


def render(facts: ReportFacts) -> str:
    """The whole page."""
    body = [
        sections.header(facts),
        *(sections.prompt_following(evaluation) for evaluation in facts.evaluations),
        *(sections.pictures(evaluation) for evaluation in facts.evaluations),
        *(sections.samples_over_time(run) for run in facts.runs),
        *(sections.reconstructions(evaluation) for evaluation in facts.evaluations),
        *(sections.curves(run) for run in facts.runs),
        *(run_checks(run) for run in facts.runs),
        *(sections.figures(evaluation) for evaluation in facts.evaluations),
        sections.stages(facts),
        sections.recipes(facts),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n{MARK}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(facts.title)} – Darkroom</title>\n<style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )
