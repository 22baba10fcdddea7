"""Which samples a run leaves out, by what their JSON and the index say of them. Pure functions; docs/data.md."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Scalar = str | int | float | bool

_FROM_INDEX = ("width", "height", "pixels", "aspect_ratio")


@dataclass(frozen=True, kw_only=True)
class FilterRule:
    """One condition that a sample must meet to be trained on: bounds, one value, or one of several values."""

    field: str  # of the JSON, dotted to reach into objects; or width, height (px), pixels, aspect_ratio (>= 1)
    min: float | None = None  # smallest number that is kept
    max: float | None = None  # largest number that is kept
    equals: Scalar | None = None  # the one value that is kept
    one_of: tuple[Scalar, ...] = ()  # the values that are kept
    missing: Literal["keep", "drop"] = "drop"  # what to do with a sample without the field, or with another type

    def __post_init__(self) -> None:
        if not self.field:
            raise ValueError("field is empty; name a field of the samples' JSON")
        has_bounds = self.min is not None or self.max is not None
        if has_bounds + (self.equals is not None) + bool(self.one_of) != 1:
            raise ValueError(f"the rule for {self.field!r} needs either min and/or max, or equals, or one_of")
        if not all(math.isfinite(bound) for bound in (self.min, self.max) if bound is not None):
            raise ValueError(f"the rule for {self.field!r}: min and max must be finite numbers")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"the rule for {self.field!r}: min={self.min} is above max={self.max}; exchange them")


def label(rule: FilterRule) -> str:
    """What the rule wants, as text: "aesthetic >= 5". The key under which what it drops is counted."""
    if rule.one_of:
        return f"{rule.field} in {', '.join(map(_text, rule.one_of))}"
    if rule.equals is not None:
        return f"{rule.field} = {_text(rule.equals)}"
    if rule.min is None:
        return f"{rule.field} <= {_text(rule.max)}"
    if rule.max is None:
        return f"{rule.field} >= {_text(rule.min)}"
    return f"{_text(rule.min)} <= {rule.field} <= {_text(rule.max)}"


def first_failed(rules: Sequence[FilterRule], meta: dict[str, Any], width: int, height: int) -> str | None:
    """Returns the label of the first rule that the sample does not meet, or None if it is kept.

    Args:
        rules: in the order of the recipe.
        meta: the sample's JSON, or {}.
        width, height: px as displayed, from the index; 0 if the picture cannot be read, and then they are missing.
    """
    for rule in rules:
        if not _meets(rule, _value(rule.field, meta, width, height)):
            return label(rule)
    return None


def _meets(rule: FilterRule, value: Any) -> bool:
    options: tuple[Scalar, ...] = rule.one_of if rule.equals is None else (rule.equals,)
    kind = _kind(value)
    if kind not in (set(map(_kind, options)) or {"number"}):
        return rule.missing == "keep"
    if options:
        return any(value == option and kind == _kind(option) for option in options)
    return (rule.min is None or value >= rule.min) and (rule.max is None or value <= rule.max)


def _value(field: str, meta: dict[str, Any], width: int, height: int) -> Any:
    """The value of a field, or None. The index knows sizes better than a JSON, which may tell of another version."""
    if field in _FROM_INDEX:
        if width < 1 or height < 1:
            return None
        ratio = max(width, height) / min(width, height)
        return {"width": width, "height": height, "pixels": width * height, "aspect_ratio": ratio}[field]
    if field in meta:  # a name may itself hold a dot
        return meta[field]
    value: Any = meta
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, str):
        return "text"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return "number"
    return None


def _text(value: Scalar | None) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
