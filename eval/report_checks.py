"""The report's section on a run's own checks: what was measured beside what was declared (docs/run_checks.md)."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from eval.plots import Series, line_chart
from eval.report_data import RunFacts

KINDS = {"autoencoder": "autoencoder", "dit": "diffusion transformer"}
TIME_RANGES = ((0, 2), (2, 5), (5, 8), (8, 10))  # tenths of the path, of which the loss is drawn
WAIT_SHARE = 0.1  # of the time, that waiting for data should not pass


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table."""

    name: str
    measured: str
    declared: str
    checks: tuple[str, ...] = ()  # whose complaints make it wrong
    wrong: bool = False  # whatever the complaints


def run_checks(run: RunFacts) -> str:
    """The table, the complaints and the charts of one run; nothing for a run whose rows hold no checks."""
    checked = [row for row in run.rows if "noise_compared" in row]
    if not checked:
        return ""
    last = checked[-1]
    lines = [*_draws(last), *_times(run, checked), *_text(run, last), *_latents(last), *_data(run, last), *_steps(last)]
    complaints = _complaints(run.rows)
    now = {line.partition(":")[0] for kind in ("warnings", "errors") for line in last.get(kind, ())}
    body = "".join(_row(line, now) for line in lines)
    head = "<thead><tr><th></th><th></th><th>measured</th><th>declared</th></tr></thead>"
    return (
        f"<h2>Run checks of the {escape(KINDS.get(run.kind, run.kind))}</h2>"
        f"<p>What the run measured of itself, all ranks together; counts since the last start. {escape(_pace(run))}</p>"
        f'<div class="scroll"><table class="checks">{head}<tbody>{body}</tbody></table></div>'
        f'{complaints}<div class="charts">{_charts(run, checked)}</div>'
    )


def _row(line: Line, now: set[str]) -> str:
    wrong = line.wrong or any(check in now for check in line.checks)
    verdict = '<span class="wrong">✗</span>' if wrong else '<span class="right">✓</span>'
    cells = "".join(f"<td>{escape(text)}</td>" for text in (line.measured, line.declared))
    return f"<tr><td>{verdict}</td><th>{escape(line.name)}</th>{cells}</tr>"


def _complaints(rows: list[dict[str, Any]]) -> str:
    """Each check that ever complained: its latest words, and the steps between which it did."""
    steps: dict[str, list[int]] = {}
    words: dict[str, str] = {}
    for row in rows:
        for line in (*row.get("errors", ()), *row.get("warnings", ())):
            check, _, message = line.partition(": ")
            steps.setdefault(check, []).append(row["step"])
            words[check] = message
    items = []
    for check, message in words.items():
        first, last = min(steps[check]), max(steps[check])
        when = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        items.append(f'<li><b class="wrong">{escape(check)}</b>, {when}: {escape(message)}</li>')
    return f'<ul class="complaints">{"".join(items)}</ul>' if items else ""


# -- the lines -----------------------------------------------------------------------------------------------------
def _draws(last: dict[str, Any]) -> Iterator[Line]:
    compared = f"{last['noise_compared']:,} draws compared"
    yield Line(name="Noise, times and samples", measured=compared, declared="all different",
               checks=("noise", "samples", "times"))  # fmt: skip


def _times(run: RunFacts, rows: list[dict[str, Any]]) -> Iterator[Line]:
    last = rows[-1]
    if "t_p_value" not in last:
        return
    p = last["t_p_value"]
    seen = sum(sum(row.get("t_histogram", ())) for row in _of_this_attempt(rows))
    measured = f"{seen:,} times, " + ("too few to tell" if p is None else f"p = {p:.2g}")
    yield Line(name="Density of times", measured=measured, declared=_density(run.settings), checks=("t",))


def _of_this_attempt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows since the last start, at which all counts begin anew."""
    first = len(rows) - 1
    while first > 0 and rows[first - 1]["noise_compared"] < rows[first]["noise_compared"]:
        first -= 1
    return rows[first:]


def _density(recipe: dict[str, Any]) -> str:
    diffusion = recipe.get("diffusion", {})
    name = str(diffusion.get("time_density", "logit_normal"))
    if name == "logit_normal":
        name += f"({diffusion.get('logit_mean', 0.0):g}, {diffusion.get('logit_std', 1.0):g})"
    elif name == "mode":
        name += f"({diffusion.get('mode_scale', 1.29):g})"
    if diffusion.get("base_tokens"):
        return f"{name}, shifted from {diffusion['base_tokens']} tokens"
    shift = diffusion.get("shift", 1.0)
    return name if shift == 1.0 else f"{name}, shifted by {shift:g}"


def _text(run: RunFacts, last: dict[str, Any]) -> Iterator[Line]:
    if "drop_rates" not in last:
        return
    declared = {encoder["name"]: encoder for encoder in run.settings.get("text_encoders", ())}
    for name, rate in last["drop_rates"].items():
        dropout = declared.get(name, {}).get("dropout", 0.0)
        measured = f"{100 * rate:.2f} % of {last['captions']:,} captions"
        yield Line(name=f"Condition of {name} dropped", measured=measured, declared=f"{100 * dropout:g} %",
                   checks=(f"dropout {name}",))  # fmt: skip
    types = {str(encoder.get("dtype", "float32")) for encoder in declared.values()} or {"as in the recipe"}
    names = tuple(f"text {name}" for name in last["drop_rates"])
    broken = any(line.startswith("text ") for line in last.get("errors", ()))
    measured = "see below" if broken else "finite"
    yield Line(name="Features of the text encoders", measured=measured,
               declared=f"finite; weights in {', '.join(sorted(types))}", checks=names)  # fmt: skip


def _latents(last: dict[str, Any]) -> Iterator[Line]:
    for key, name, declared in (
        ("latent_channel_mean", "Latents: mean per channel", "0, within 0.2"),
        ("latent_channel_std", "Latents: deviation per channel", "1, from 0.8 to 1.25"),
    ):
        if key in last:
            low, high = min(last[key]), max(last[key])
            yield Line(name=name, measured=f"{low:.3f} … {high:.3f}", declared=declared,
                       checks=("latents", "latents finite"))  # fmt: skip


def _data(run: RunFacts, last: dict[str, Any]) -> Iterator[Line]:
    _, waits = run.column("data_wait_share")
    if waits:
        measured = f"{100 * statistics.median(waits):.1f} % of the time, median"
        yield Line(name="Waiting for data", measured=measured, declared=f"below {100 * WAIT_SHARE:g} %",
                   checks=("data wait",))  # fmt: skip
    bad, seen = last.get("bad_samples", 0), last.get("images_seen", 0)
    allowed = run.settings.get("data", {}).get("max_bad_fraction", 1.0)
    yield Line(name="Samples that could not be used", measured=f"{bad:,} of {seen:,}",
               declared=f"at most {100 * allowed:g} %", wrong=bad > allowed * max(seen, 1000))  # fmt: skip


def _steps(last: dict[str, Any]) -> Iterator[Line]:
    """What the run left out, undid or lost (docs/faults.md, docs/checkpoint.md); since its first start."""
    if "skipped_steps" in last:
        skipped, undone = last["skipped_steps"], last.get("roll_backs", 0)
        measured = f"{skipped:,} of {last['step']:,} updated nothing; {undone:,} roll-backs"
        yield Line(name="Bad steps", measured=measured, declared="none undone", wrong=undone > 0)
    if last.get("fallbacks"):
        yield Line(name="Damaged checkpoints passed over", measured=f"{last['fallbacks']:,}", declared="0", wrong=True)


def _pace(run: RunFacts) -> str:
    """A sentence on speed, memory and saves."""
    facts = []
    for key, factor, text in (
        ("images_per_s", 1, "{:,.1f} images/s"),
        ("tflops_per_s", 1, "{:.3g} TFLOP/s per rank"),
        ("mfu", 100, "MFU {:.1f} %"),
    ):
        _, values = run.column(key)
        if values:
            facts.append(text.format(factor * statistics.median(values)))
    sentence = f"Median pace: {', '.join(facts)}. " if facts else ""
    _, memory = run.column("peak_memory_gib")
    if memory:
        sentence += f"Peak memory of a rank: {max(memory):.2f} GiB. "
    _, stalls = run.column("save_stall_s")
    if any(stalls):
        sentence += f"Standing still for saves: {sum(stalls):,.1f} s, at most {max(stalls):,.1f} s between two rows."
    return sentence.strip()


# -- the charts ----------------------------------------------------------------------------------------------------
def _charts(run: RunFacts, rows: list[dict[str, Any]]) -> str:
    charts = [_time_chart(rows), _loss_chart(rows)]
    for title, key in (("Operations (TFLOP/s per rank)", "tflops_per_s"), ("Share of the device's peak (MFU)", "mfu")):
        steps, values = run.column(key)
        series = [Series(name=key, x=steps, y=values)]
        charts.append(line_chart(title, series, x_label="optimiser step", from_zero=True))
    return "".join(charts)


def _time_chart(rows: list[dict[str, Any]]) -> str:
    """The histogram of all times over the declared density."""
    pairs = [(row["t_histogram"], row["t_declared"]) for row in rows if "t_histogram" in row]
    if not pairs:
        return ""
    counts, expected = ([sum(bins) for bins in zip(*side, strict=True)] for side in zip(*pairs, strict=True))
    width = len(counts) / max(1, sum(counts))  # makes densities of counts
    edges = [place / len(counts) for place in range(len(counts) + 1)]
    steps = [(edge, count * width) for i, count in enumerate(counts) for edge in edges[i : i + 2]]
    centres = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    return line_chart(
        "Training times and their density",
        [
            Series(name="measured", x=[x for x, _ in steps], y=[y for _, y in steps], smooth=False),
            Series(name="declared", x=centres, y=[share * width for share in expected], smooth=False),
        ],
        x_label="t (0 = data, 1 = noise)",
        from_zero=True,
    )


def _loss_chart(rows: list[dict[str, Any]]) -> str:
    """The loss over training, for parts of the path."""
    series = []
    for first, last in TIME_RANGES:
        points = []
        for row in rows:
            means = [mean for mean in row.get("loss_by_t", ())[first:last] if mean is not None]
            if means:
                points.append((float(row["step"]), sum(means) / len(means)))
        name = f"t {first / 10:g}–{last / 10:g}"
        series.append(Series(name=name, x=[x for x, _ in points], y=[y for _, y in points]))
    return line_chart("Loss by path time", series, x_label="optimiser step")
