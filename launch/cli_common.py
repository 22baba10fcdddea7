"""What the modules of the command line share: common flags, and how facts, problems and refusals are shown."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def say(text: str, quiet: bool = False) -> None:
    """Prints a line for a person."""
    if not quiet:
        typer.echo(text)


def refuse(message: str) -> NoReturn:
    """Ends the command with one line and exit code 2."""
    from launch.errors import ConfigError

    raise ConfigError(message)


def show(facts: dict[str, Any], as_json: bool) -> None:
    """One fact per line, or all of them as JSON."""
    from launch.show import facts_text

    typer.echo(json.dumps(facts) if as_json else facts_text(facts))


def end_with_problems(url: str, problems: list[str], checked: str, remedy: str, quiet: bool, as_json: bool) -> None:
    """Shows the problems of a place, one per line, and ends with exit code 2 if there are any."""
    if as_json:
        typer.echo(json.dumps({"url": url, "problems": problems}))
    else:
        for problem in problems:
            typer.echo(problem, err=True)
    if problems:
        refuse(f"{url} has {len(problems)} problem{'s' * (len(problems) > 1)}; {remedy}")
    if not as_json:
        say(checked, quiet)


def darkroom_command() -> str:
    """The command that runs, as an absolute path."""
    return str(Path(sys.executable).with_name("darkroom"))
