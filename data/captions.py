"""Which caption a sample trains with. Pure functions; docs/data.md."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.keyed_random import keyed_integer

_UNIT = 1 << 53  # a double holds every integer up to here


@dataclass(frozen=True, kw_only=True)
class CaptionSource:
    """One place where captions come from."""

    field: str  # "txt" = the .txt, else a field of the JSON that holds a text or a list of texts
    weight: float = 1.0  # share of the draws, relative to the other sources that the sample has; > 0

    def __post_init__(self) -> None:
        if not self.field:
            raise ValueError('field is empty; give "txt" or a field of the samples\' JSON')
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight={self.weight}: must be a number above 0; leave {self.field!r} out instead of 0")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Which captions a run draws from."""

    sources: tuple[CaptionSource, ...] = ()  # () = the JSON's list "captions", else the .txt, else the JSON's "caption"
    max_chars: int | None = None  # longest caption in characters, cut between words; None = as it is

    def __post_init__(self) -> None:
        fields = [source.field for source in self.sources]
        if len(set(fields)) < len(fields):
            raise ValueError(f"sources: a field is given twice ({', '.join(fields)}); keep one of them")
        if self.max_chars is not None and self.max_chars < 1:
            raise ValueError(f"max_chars={self.max_chars}: must be at least 1; leave it out for whole captions")


_DEFAULT = CaptionConfig()


def candidates(text: str | None, meta: dict[str, Any], config: CaptionConfig = _DEFAULT) -> list[tuple[str, float]]:
    """Returns every distinct caption that a sample may train with, and its weight (relative to the others', > 0).

    The texts of a list share their source's weight evenly; a text that occurs twice has the sum. White space is
    collapsed and the text cut to max_chars; empty texts do not count.

    Args:
        text: the .txt, or None.
        meta: the JSON, or {}.
        config: where captions come from.
    """
    weights: dict[str, float] = {}
    for caption, weight in _options(text, meta, config):
        weights[caption] = weights.get(caption, 0.0) + weight
    return list(weights.items())


def choose_caption(
    text: str | None,
    meta: dict[str, Any],
    seed: int = 0,
    sample_number: int | None = None,
    config: CaptionConfig = _DEFAULT,
) -> str:
    """Draws a caption by weight: a function of the seed and the run-wide number of the sample.

    Args:
        text: the .txt, or None.
        meta: the JSON, or {}.
        seed: of the run.
        sample_number: run-wide number of the sample; None = the heaviest caption, and the first of equals.
        config: where captions come from.

    Returns:
        The caption; empty if there is none, and the caller then treats the sample as bad.
    """
    # Without sources a text that a list holds twice keeps its two places, so that runs go on drawing what they drew.
    options = candidates(text, meta, config) if config.sources else _options(text, meta, config)
    if not options:
        return ""
    return options[choose_index([weight for _, weight in options], seed, sample_number)][0]


def choose_index(weights: Sequence[float], seed: int, sample_number: int | None) -> int:
    """Draws a place in a list of weights (> 0, at least one) as `choose_caption` does."""
    if sample_number is None or len(weights) == 1:
        return weights.index(max(weights))
    if min(weights) == max(weights):
        return keyed_integer(len(weights), seed, "caption", sample_number)
    left = keyed_integer(_UNIT, seed, "caption", sample_number) / _UNIT * sum(weights)
    for place, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return place
    return len(weights) - 1  # rounding may leave a crumb


def _options(text: str | None, meta: dict[str, Any], config: CaptionConfig) -> list[tuple[str, float]]:
    if config.sources:
        sources = [(_texts(text if s.field == "txt" else meta.get(s.field), config), s.weight) for s in config.sources]
        return [(caption, weight / len(texts)) for texts, weight in sources for caption in texts]
    listed = meta.get("captions")
    texts = _texts(listed, config) if isinstance(listed, list) else []
    texts = texts or _texts(text, config) or _texts(_text(meta.get("caption")), config)
    return [(caption, 1.0 / len(texts)) for caption in texts]


def _texts(value: Any, config: CaptionConfig) -> list[str]:
    """The non-empty texts of a text or a list of texts, ready for use."""
    cleaned = (_cut(" ".join(item.split()), config.max_chars) for item in _as_list(value) if isinstance(item, str))
    return [caption for caption in cleaned if caption]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _cut(caption: str, max_chars: int | None) -> str:
    if max_chars is None or len(caption) <= max_chars:
        return caption
    return caption[: max_chars + 1].rpartition(" ")[0] or caption[:max_chars]  # one endless word is cut inside
