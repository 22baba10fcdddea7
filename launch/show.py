"""Facts as text for a terminal."""

from collections.abc import Iterator
from typing import Any


def facts_text(facts: dict[str, Any]) -> str:
    """One fact per line, names aligned; mappings of mappings get dotted names, a list takes one line per element."""
    rows = list(_rows(facts, ""))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)


def _rows(facts: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, dict) and any(isinstance(inner, dict | list) for inner in value.values()):
            yield from _rows(value, f"{prefix}{name}.")
            continue
        lines = value if isinstance(value, list) else [value]
        for number, line in enumerate(lines or ["none"]):
            text = ", ".join(f"{k} {_short(v)}" for k, v in line.items()) if isinstance(line, dict) else _short(line)
            yield (prefix + name if number == 0 else "", text or "none")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
