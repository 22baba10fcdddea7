"""Runs the darkroom command as a user does: a cold start. tests/helpers/warm_ranks.py has a faster one."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config_io import dump_yaml, to_dict

ROOT = Path(__file__).resolve().parents[2]
DYING = ROOT / "tests" / "helpers" / "dying_darkroom.py"


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def darkroom(*arguments: object, die: str = "", env: dict[str, str] | None = None) -> Result:
    """`darkroom ARGUMENTS`; `die` makes a rank kill itself (see dying_darkroom.py)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    environment["DARKROOM_TEST_DIE"] = die
    script = DYING if die else Path(sys.executable).with_name("darkroom")
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)


def write_recipe(path: Path, kind: str, recipe: Any) -> Path:
    path.write_text(dump_yaml({"kind": kind, **to_dict(recipe)}), encoding="utf-8")
    return path
