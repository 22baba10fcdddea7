"""Prompt following on the digit pictures: does a picture show what its caption says?

A reader fitted on real training pictures reads the generated ones (`eval.digit_reader`). Per picture the number of
digits is right or wrong; per object its colour and its digit are. An object counts as right only at its place: where
the picture's layout was read as another one (another number of digits, or side by side for one above the other), all
its objects are wrong. So the digit figure is never better than the reader is on real pictures, and that figure stands
beside it as `real`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.errors import EvalError


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a picture shows, or should show: the objects in reading order (left to right, top to bottom)."""

    layout: str  # "single", "horizontal" or "vertical"
    digits: tuple[int, ...]
    colours: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One reading compared with its caption."""

    count: bool  # the number of digits is right
    digits: tuple[bool, ...]  # per expected object: the right digit in the right place
    colours: tuple[bool, ...]  # per expected object: the right colour in the right place


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Fractions in 0..1 over a set of pictures."""

    colour: float  # of objects
    digit: float  # of objects
    count: float  # of pictures
    num_pictures: int
    num_objects: int


def shown_by_meta(meta: dict[str, Any], key: str) -> Shown:
    """The truth about a picture, from the JSON that `darkroom data digits` stores with each sample.

    Raises:
        EvalError: if the sample carries no such JSON.
    """
    try:
        objects = meta["objects"]
        return Shown(
            layout=str(meta["layout"]),
            digits=tuple(int(o["digit"]) for o in objects),
            colours=tuple(str(o["colour"]) for o in objects),
        )
    except (KeyError, TypeError, ValueError):
        raise EvalError(
            f"sample {key} has no digit JSON (layout, objects); leave `reader` out of the recipe for other data sets"
        ) from None


def judge(expected: Shown, read: Shown) -> Verdict:
    """Compares a reading with what the caption asks for."""
    placed = read.layout == expected.layout and len(read.digits) == len(expected.digits)
    if not placed:
        wrong = (False,) * len(expected.digits)
        return Verdict(count=len(read.digits) == len(expected.digits), digits=wrong, colours=wrong)
    return Verdict(
        count=True,
        digits=tuple(a == b for a, b in zip(expected.digits, read.digits, strict=True)),
        colours=tuple(a == b for a, b in zip(expected.colours, read.colours, strict=True)),
    )


def score(verdicts: Sequence[Verdict]) -> Scores:
    """Averages verdicts: colours and digits over objects, the count over pictures.

    Raises:
        EvalError: if there is nothing to average.
    """
    if not verdicts:
        raise EvalError("no pictures to score; the held-out set is empty")
    digits = [right for v in verdicts for right in v.digits]
    colours = [right for v in verdicts for right in v.colours]
    return Scores(
        colour=sum(colours) / len(colours),
        digit=sum(digits) / len(digits),
        count=sum(v.count for v in verdicts) / len(verdicts),
        num_pictures=len(verdicts),
        num_objects=len(digits),
    )


def table(
    generated: Scores, real: Scores, combinations: Scores | None = None, combinations_real: Scores | None = None
) -> dict[str, dict[str, float]]:
    """The figures as they are stored: per property `generated`, `real`, and those of the held-out combinations."""
    columns = {
        "generated": generated,
        "held_out_combinations": combinations,
        "real": real,
        "real_held_out_combinations": combinations_real,
    }
    return {
        name: {column: getattr(scores, name) for column, scores in columns.items() if scores is not None}
        for name in ("colour", "digit", "count")
    }
