"""`make demo` as a user runs it: the figures it promises, and that the same command again does nothing twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.demo import WANTED
from tests.helpers.command import ROOT


def demo(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "launch.demo", "--dir", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2400)


def at(summary: dict, place: str) -> float:
    for key in place.split("."):
        summary = summary[key]
    return summary  # type: ignore[return-value]


@pytest.mark.all
def test_demo_keeps_its_promises(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    first = demo(folder)
    assert first.returncode == 0, first.stderr[-3000:]
    summary = json.loads((folder / "summary.json").read_text())
    print(json.dumps({place: at(summary, place) for place in WANTED} | {"seconds": summary["seconds"]}))
    missed = {place: at(summary, place) for place, wanted in WANTED.items() if at(summary, place) < wanted}
    assert not missed
    assert at(summary, "prompt_following.digit.real") >= 0.90
    assert summary["peak_rss_gib"] <= 6.0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="http' not in page
    again = demo(folder)
    assert again.returncode == 0 and again.stdout.count("done before") == 6
