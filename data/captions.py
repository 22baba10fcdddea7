"""Which caption a sample trains with."""

from typing import Any

from data.keyed_random import keyed_integer


def choose_caption(text: str | None, meta: dict[str, Any], seed: int = 0, sample_number: int | None = None) -> str:
    """Chooses a caption: a function of the seed and the run-wide number of the sample (None: always the first).

    One of the JSON's "captions" (a list) if it has any, else the .txt, else the JSON's "caption". White space is
    collapsed; the answer is empty if there is no caption, and the caller then treats the sample as bad.
    """
    options = [caption for caption in map(_clean, _as_list(meta.get("captions"))) if caption]
    if options:
        return options[0 if sample_number is None else keyed_integer(len(options), seed, "caption", sample_number)]
    return _clean(text) or _clean(meta.get("caption"))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _clean(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""
