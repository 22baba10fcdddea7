"""What a data set holds, in numbers and one picture: sizes, aspect ratios, captions, bucket fill. docs/data.md.

The only module that knows matplotlib.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data.buckets import BucketConfig, Size, make_buckets
from data.captions import candidates
from data.decode import BadImage
from data.errors import DataError
from data.object_store import is_local
from data.shards import Index, RawSample, load_index, load_rows, read_shard
from data.size_counts import SizeCounts, classes, histogram

NUMBERS, PLOT = "stats.json", "stats.png"

_SIDECARS_AT_ONCE = 16  # bounds memory; threads wait for the store together


def measure(
    url: str, *, buckets: tuple[Size, ...], micro_batch_size: int = 32, captions_from: int = 4, out: str | None = None
) -> dict[str, Any]:
    """Measures a data set: every sidecar, and the captions of some shards. Memory does not grow with the set.

    Args:
        url: the data set, of pictures or encoded.
        buckets: shapes in pixels as `make_buckets` returns them; an encoded set has its own, and these are not used.
        micro_batch_size: of the windows whose fill is measured, samples.
        captions_from: read captions from at most this many shards, spread evenly over the set.
        out: local folder that gets stats.json and stats.png.

    Returns:
        Plain values for JSON; docs/data.md names them.

    Raises:
        DataError: the set cannot be read, a number is not possible, or `out` holds such a file already.
    """
    if out is not None:
        _check_out(out)
    if micro_batch_size < 1:
        raise DataError(f"micro_batch_size={micro_batch_size}: must be at least 1")
    if captions_from < 0:
        raise DataError(f"captions_from={captions_from}: is a number of shards; must be at least 0")
    index = load_index(url)
    sizes = SizeCounts(buckets if index.encoding is None else (), micro_batch_size)
    with ThreadPoolExecutor(_SIDECARS_AT_ONCE) as pool:
        for first in range(0, len(index.shards), _SIDECARS_AT_ONCE):
            numbers = range(first, min(first + _SIDECARS_AT_ONCE, len(index.shards)))
            for sides in pool.map(lambda number: _sides(index, number), numbers):
                sizes.add(sides)
    facts = {
        "url": index.url,
        "fingerprint": index.fingerprint,
        "encoded": index.encoding is not None,
        "samples": index.num_samples,
        "shards": len(index.shards),
        **sizes.facts(),
        "captions": _caption_facts(index, captions_from),
    }
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        plot(facts, Path(out, PLOT))
        Path(out, NUMBERS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def parse_buckets(image_size: int, resolutions: str, max_aspect_ratio: float, multiple: int) -> tuple[Size, ...]:
    """Makes buckets from what a command line gives; `resolutions` is like "256,512", or empty for image_size alone.

    Raises:
        DataError: not numbers, or not possible.
    """
    try:
        sides = tuple(int(side) for side in resolutions.split(",") if resolutions.strip())
    except ValueError:
        raise DataError(f"resolutions {resolutions!r}: give pixels with commas between them, like 256,512") from None
    try:
        config = BucketConfig(resolutions=sides, max_aspect_ratio=max_aspect_ratio, multiple=multiple)
        return make_buckets(image_size, config)
    except ValueError as error:
        raise DataError(str(error)) from None


def _check_out(out: str) -> None:
    if not is_local(out):
        raise DataError(f"{out}: must be a local folder; give another place for {NUMBERS} and {PLOT}")
    if Path(out).exists() and not Path(out).is_dir():
        raise DataError(f"{out}: is a file; give a folder for {NUMBERS} and {PLOT}")
    for name in (NUMBERS, PLOT):
        if Path(out, name).exists():
            raise DataError(f"{Path(out, name)}: is there already and nothing is overwritten; give another folder")


# --- counting -----------------------------------------------------------------------------------------------------


def _sides(index: Index, number: int) -> np.ndarray:
    rows = load_rows(index, number)
    return np.stack([np.asarray(rows.widths, np.int64), np.asarray(rows.heights, np.int64)], axis=1)  # (N, 2)


def _caption_facts(index: Index, captions_from: int) -> dict[str, Any]:
    """Lengths of every distinct caption of the samples of a few shards."""
    count = min(captions_from, len(index.shards))
    numbers = [(2 * place + 1) * len(index.shards) // (2 * count) for place in range(count)]
    lengths: dict[str, Counter[int]] = {"characters": Counter(), "words": Counter()}
    samples = empty = 0
    read = _caption_reader(index)
    for number in numbers:
        for sample in read_shard(index, number):
            texts = read(sample)
            samples += 1
            empty += not texts
            lengths["characters"].update(len(text) for text in texts)
            lengths["words"].update(len(text.split()) for text in texts)
    longest = max((max(counter, default=0) for counter in lengths.values()), default=0)
    starts = [2**power for power in range(longest.bit_length() + 1)]
    tables = {}
    for name, counter in lengths.items():
        values, counts = _columns(counter)
        tables[name] = histogram(values, starts, counts)
    return {
        "shards": count,
        "samples": samples,
        "without_caption": empty,
        "captions": lengths["words"].total(),
        **{name: _quantiles(counter) for name, counter in lengths.items()},
        "lengths": classes(starts, **tables),
    }


def _caption_reader(index: Index) -> Callable[[RawSample], list[str]]:
    """A function that gives a sample's distinct captions, none if the sample cannot be used."""
    if index.encoding is None:
        return lambda raw: [] if raw.problem else [text for text, _ in candidates(raw.text, raw.meta)]
    from data.encoded import Encoding, unpack_sample

    encoding = Encoding.from_dict(index.encoding, index.url)

    def read(raw: RawSample) -> list[str]:
        try:
            return [text for text, _ in unpack_sample(raw.image, encoding).captions if text]
        except BadImage:
            return []

    return read


def _columns(counter: Counter[int]) -> tuple[np.ndarray, np.ndarray]:
    lengths = sorted(counter)
    return np.array(lengths, np.int64), np.array([counter[length] for length in lengths], np.int64)


def _quantiles(counter: Counter[int]) -> dict[str, int | None]:
    """The least length that a share of the captions does not exceed."""
    lengths, counts = _columns(counter)
    shares = {"median": 0.5, "percentile_95": 0.95, "longest": 1.0}
    if not len(lengths):
        return dict.fromkeys(shares)
    behind = np.cumsum(counts)
    return {name: int(lengths[np.searchsorted(behind, math.ceil(part * behind[-1]))]) for name, part in shares.items()}


# --- as text ------------------------------------------------------------------------------------------------------


def stats_text(facts: Mapping[str, Any]) -> str:
    """What `measure` returned, as tables for a terminal."""
    fill, captions = facts["buckets"], facts["captions"]
    kind = "encoded samples" if facts["encoded"] else "samples"
    parts = [
        f"{facts['url']}: {facts['samples']} {kind} in {facts['shards']} shards, "
        f"{facts['unreadable_images']} unreadable",
        _table(("short side, px", "samples", "share"), _class_rows(facts["short_side_px"], "samples")),
        _table(("width/height", "samples", "share"), _class_rows(facts["aspect_ratio"], "samples", ".2f")),
        _table(
            ("bucket, px", "samples", "share", "kept", "enlarged", "moved"),
            [
                (f"{row['width']}x{row['height']}", str(row["samples"]))
                + tuple(_percent(row[name]) for name in ("share", "kept_area", "enlarged_share", "moved_share"))
                for row in fill["fill"]
            ],
        ),
        f"moved to another shape: {_percent(fill['moved_share'])}, in windows of {fill['window_micro_batches']} x "
        f"{fill['micro_batch_size']} samples in file order; of these pictures is kept: "
        f"{_percent(fill['moved_kept_area'])}",
        f"captions: {captions['captions']} of {captions['samples']} samples in {captions['shards']} of "
        f"{facts['shards']} shards, {captions['without_caption']} samples without one",
    ]
    if captions["captions"]:
        names = ("median", "percentile_95", "longest")
        rows = [(kind, *(str(captions[kind][name]) for name in names)) for kind in ("characters", "words")]
        parts.append(_table(("length", "median", "95 % up to", "longest"), rows))
        parts.append(_table(("length", "characters", "words"), list(_length_rows(captions["lengths"]))))
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (
        "  ".join([line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)])
        for line in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def _class_rows(rows: Sequence[Mapping[str, Any]], name: str, form: str = "d") -> list[tuple[str, str, str]]:
    total = sum(row[name] for row in rows)
    return [(_class_name(row, form), str(row[name]), _percent(row[name] / total)) for row in rows]


def _length_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        yield _class_name(row), str(row["characters"]), str(row["words"])


def _class_name(row: Mapping[str, Any], form: str = "d") -> str:
    if row["below"] is None:
        return f"{row['from']:{form}} and more"
    last = row["below"] - (form == "d")
    return f"{row['from']:{form}}" if last == row["from"] else f"{row['from']:{form}}–{last:{form}}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


# --- as a picture -------------------------------------------------------------------------------------------------

_BLUE, _ORANGE = "#3b6ea5", "#e08a2e"


def plot(facts: Mapping[str, Any], path: Path) -> None:
    """Draws what `measure` returned as four histograms, a PNG of 1200 x 900 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no state that pyplot would keep
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    url = facts["url"] if len(facts["url"]) <= 80 else "…" + facts["url"][-79:]
    unreadable = f", {facts['unreadable_images']:,} unreadable" if facts["unreadable_images"] else ""
    title = f"{url}\n{facts['samples']:,} samples in {facts['shards']:,} shards{unreadable}"
    figure.suptitle(title, fontsize=12, parse_math=False)  # a $ in an address is one
    (sizes, aspects), (captions, buckets) = figure.subplots(2, 2)

    rows = facts["short_side_px"]
    _bars(sizes, [_class_name(row) for row in rows], {"": [row["samples"] for row in rows]}, "samples")
    sizes.set(title="Picture size", xlabel="short side (px)")

    rows = facts["aspect_ratio"]
    _bars(aspects, [_class_name(row, ".2f") for row in rows], {"": [row["samples"] for row in rows]}, "samples")
    aspects.set(title="Aspect ratio", xlabel="width / height")

    found, rows = facts["captions"], facts["captions"]["lengths"]
    columns = {kind: [row[kind] for row in rows] for kind in ("characters", "words")}
    _bars(captions, [_class_name(row) for row in rows], columns, "captions")
    source = f"{found['captions']:,} captions from {found['shards']} of {facts['shards']:,} shards"
    captions.set(title=f"Caption length, {source}", xlabel="length (characters, words)")

    fill = facts["buckets"]
    rows = fill["fill"]
    moved = [row["samples"] * (row["moved_share"] or 0) for row in rows]
    stays = [row["samples"] - part for row, part in zip(rows, moved, strict=True)]
    names = [f"{row['width']}x{row['height']}" for row in rows]
    _bars(buckets, names, {"stays": stays, "moved": moved}, "samples", stacked=True)
    windows = (
        f"windows of {fill['window_micro_batches']} x {fill['micro_batch_size']} move {_percent(fill['moved_share'])}"
    )
    buckets.set(title=f"Bucket fill, {windows}", xlabel="bucket, width x height (px)")
    figure.savefig(path, format="png")


def _bars(
    axes: Any, names: Sequence[str], columns: Mapping[str, Sequence[float]], unit: str, stacked: bool = False
) -> None:
    """Bars side by side or on top of each other, in per cent of each column's sum (of all, where stacked)."""
    places = np.arange(len(names))
    width = 0.8 if stacked else 0.8 / len(columns)
    everything = sum(map(sum, columns.values()))
    below = np.zeros(len(names))
    tallest = 0.0
    for number, ((name, counts), colour) in enumerate(zip(columns.items(), (_BLUE, _ORANGE), strict=False)):
        shares = 100 * np.asarray(counts, float) / max(1, everything if stacked else sum(counts))
        offset = 0.0 if stacked else (number - (len(columns) - 1) / 2) * width
        axes.bar(places + offset, shares, width, bottom=below, color=colour, label=name)
        tallest = max([tallest, *(below + shares)])
        below = below + shares if stacked else below
    if len(columns) > 1 and names:
        axes.legend(frameon=False)
    every = -(-len(names) // 50) or 1  # more labels than that would run into each other
    look: dict[str, Any] = {"fontsize": 7, "rotation": 90} if len(names) > 20 else {"fontsize": 9}
    if len(names) <= 20 and sum(map(len, names)) > 50:
        look |= {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(places[::every], names[::every], **look)
    centre, half = (len(names) - 1) / 2, max(6, len(names)) / 2  # a single bar does not fill the panel
    axes.set(ylabel=f"share of {unit} (%)", xlim=(centre - half, centre + half))
    axes.set_ylim(0, 1.05 * tallest or 1)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not names:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
