"""The report's sections; each returns HTML, or nothing where the run has nothing to show."""

import base64
import statistics
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.pictures import data_uri, load_tiles
from eval.plots import Series, line_chart
from eval.report_data import EvaluationFacts, ReportFacts, RunFacts
from launch.config_io import dump_yaml

CARDS = 24  # held-out prompts shown per set, in file order: not chosen
WRONG_CARDS = 16  # of the others, those that were read wrong
GRID_STEPS = 8  # columns of the samples over time
GRID_PROMPTS = 12  # rows of it
PAIRS = 12  # reconstructions shown
PIXELATED_BELOW = 96  # smaller pictures are enlarged with hard pixel edges

PROPERTIES = (("count", "number of digits"), ("colour", "colour"), ("digit", "right digit, right place"))
COLUMNS = (
    ("generated", "generated, held-out prompts", ""),
    ("real", "real pictures of the same prompts (upper bound)", "bound"),
    ("held_out_combinations", "generated, held-out combinations", ""),
    ("real_held_out_combinations", "real pictures of those (upper bound)", "bound"),
)
SET_NAMES = {"test": "Held-out prompts", "combinations": "Held-out combinations of digit and colour"}
KINDS = {"autoencoder": "autoencoder", "dit": "diffusion transformer"}
CHARTS: dict[str, tuple[tuple[str, tuple[tuple[str, str], ...]], ...]] = {
    "dit": (
        ("Training loss (velocity MSE)", (("loss", "loss"),)),
        ("Gradient norm", (("grad_norm", "gradient norm"),)),
    ),
    "autoencoder": (
        ("Reconstruction loss", (("rec_loss", "reconstruction"),)),
        ("PSNR on training pictures (dB)", (("psnr_db", "PSNR"),)),
        ("Adversarial losses", (("adv_g", "generator"), ("disc_loss", "discriminator"))),
        ("Divergence from the prior (KL)", (("kl", "KL"),)),
    ),
}
COMMON_CHARTS = (
    ("Learning rate", (("lr", "learning rate"),)),
    ("Throughput (images/s, all ranks)", (("images_per_s", "images/s"),)),
    ("Share of time spent waiting for data", (("data_wait_share", "data wait"),)),
)


def image(picture: Tensor, text: str) -> str:
    """An ``<img>`` of one (3, H, W) uint8 picture."""
    css = "" if picture.shape[-1] < PIXELATED_BELOW else ' class="photo"'
    return f'<img{css} src="{data_uri(picture)}" alt="{escape(text, quote=True)}">'


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# -- head ----------------------------------------------------------------------------------------------------------
def header(facts: ReportFacts) -> str:
    """Title, what was trained, and the headline figures."""
    trained = [f"{KINDS.get(run.kind, run.kind)} {_progress(run)}" for run in facts.runs]
    tiles = [tile for evaluation in facts.evaluations for tile in _evaluation_tiles(evaluation)]
    if facts.seconds:
        total = sum(facts.seconds.values())
        tiles.append((f"{int(total // 60)}:{int(total % 60):02d} min", "whole chain, first to last stage"))
    if not facts.evaluations:
        tiles += [tile for run in facts.runs for tile in _run_tiles(run)]
    boxes = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return (
        f"<h1>Darkroom: {escape(facts.title)}</h1>\n"
        f'<p class="soft">{escape("; ".join(trained).capitalize())}{"." if trained else ""}</p>\n'
        f'<div class="tiles">{boxes}</div>'
    )


def _progress(run: RunFacts) -> str:
    if not run.rows:
        return "not yet logged"
    last = run.rows[-1]
    return f"trained for {last['step']:,} steps on {last.get('images_seen', 0):,} pictures"


def _evaluation_tiles(evaluation: EvaluationFacts) -> list[tuple[str, str]]:
    metrics = evaluation.metrics
    follow = metrics.get("prompt_following", {})
    tiles = [
        (percent(follow[name]["generated"]), f"{text}; real pictures {percent(follow[name]['real'])}")
        for name, text in reversed(PROPERTIES)
        if name in follow
    ]
    if "autoencoder" in metrics:
        tiles.append((f"{metrics['autoencoder']['psnr_db']:.1f} dB", "PSNR of held-out reconstructions"))
    for value, text in _distances(metrics)[:1]:
        scale = [other for other, name in _distances(metrics) if "for scale" in name]
        tiles.append((f"{value:.1f}", text + (f"; real ones {scale[0]:.1f}" if scale else "")))
    if not follow and "validation_loss" in metrics:
        tiles.append((f"{metrics['validation_loss']['mean']:.4f}", "validation loss at fixed times"))
    return tiles


def _distances(metrics: dict[str, Any]) -> list[tuple[float, str]]:
    found = []
    for key, protocol in metrics.items():
        if key.startswith("fd_") and key.endswith("_protocol"):
            name, network = key.removesuffix("_protocol"), protocol["network"]
            found.append((metrics[name], f"FD-{network}: {protocol['num_generated']} generated pictures"))
            if f"{name}_of_training_pictures" in metrics:
                scale = metrics[f"{name}_of_training_pictures"]
                found.append((scale, f"FD-{network}: as many real training pictures, for scale"))
    return found


def _run_tiles(run: RunFacts) -> list[tuple[str, str]]:
    if not run.rows:
        return []
    _, losses = run.column("loss")
    _, speeds = run.column("images_per_s")
    tiles = [(f"{losses[-1]:.4f}", f"{run.name}: training loss, last row")] if losses else []
    return tiles + ([(f"{statistics.median(speeds):,.0f}", f"{run.name}: images/s, median")] if speeds else [])


# -- evaluation ----------------------------------------------------------------------------------------------------
def prompt_following(evaluation: EvaluationFacts) -> str:
    """The table of prompt following, generated above its upper bound."""
    follow = evaluation.metrics.get("prompt_following")
    if not follow:
        return ""
    head = "".join(f'<th class="num">{escape(text)}</th>' for _, text in PROPERTIES)
    rows = []
    for column, text, css in COLUMNS:
        if column in follow["digit"]:
            cells = "".join(f'<td class="num">{percent(follow[name][column])}</td>' for name, _ in PROPERTIES)
            rows.append(f'<tr class="{css}"><th>{escape(text)}</th>{cells}</tr>')
    prompts = evaluation.metrics["prompts"]["test"]["num"]
    settings = evaluation.metrics["settings"]
    return (
        "<h2>Prompt following</h2>"
        f"<p>{prompts} captions of held-out pictures, one picture each, {settings['num_steps']} steps, guidance "
        f"{settings['guidance_scale']:g}. A classifier fitted on real training pictures reads them; what it reads on "
        "the real held-out pictures of the same captions is the upper bound. Colour and digit are counted per object, "
        "the number of digits per picture; chance for a digit is 10 %.</p>"
        f'<div class="scroll"><table class="wide figures"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def pictures(evaluation: EvaluationFacts) -> str:
    """Held-out prompts with the generated picture, the real one, and what was read."""
    parts = []
    for name in sorted(evaluation.prompts, reverse=True):  # test before combinations
        rows = evaluation.prompts[name]
        generated = load_tiles(evaluation.folder / f"generated-{name}.png", len(rows))
        real = load_tiles(evaluation.folder / f"real-{name}.png", len(rows))
        cards = [_card(row, generated[i], real[i]) for i, row in enumerate(rows)]
        wrong = [card for card, row in zip(cards[CARDS:], rows[CARDS:], strict=True) if not _all_right(row)]
        parts.append(f"<h3>{escape(SET_NAMES.get(name, name))}</h3>")
        parts.append(f'<div class="cards">{"".join(cards[:CARDS])}</div>')
        if wrong:
            note = f"{len(wrong)} of the other {len(rows) - CARDS} prompts have something wrong"
            more = f"; the first {WRONG_CARDS} of them" if len(wrong) > WRONG_CARDS else ""
            parts.append(f"<details><summary>{note}{more}</summary>")
            parts.append(f'<div class="cards">{"".join(wrong[:WRONG_CARDS])}</div></details>')
    if not parts:
        return ""
    read = any("read" in row for rows in evaluation.prompts.values() for row in rows)
    reader = " Below each caption stands what the classifier reads: ✓ as asked, ✗ not." if read else ""
    return (
        "<h2>Pictures for held-out prompts</h2>"
        f"<p>Large: generated. Small: the real picture that the caption belongs to.{reader} "
        f"The first {CARDS} in file order, not chosen.</p>" + "".join(parts)
    )


def _card(row: dict[str, Any], generated: Tensor, real: Tensor) -> str:
    pair = image(generated, f"generated: {row['prompt']}") + image(real, "real picture of this caption")
    return f'<div class="card"><div class="pair">{pair}</div><p>{escape(row["prompt"])}</p><p>{_verdict(row)}</p></div>'


def _all_right(row: dict[str, Any]) -> bool:
    right = row.get("right")
    return right is None or (right["count"] and all(right["digits"]) and all(right["colours"]))


def _verdict(row: dict[str, Any]) -> str:
    """What was read, object by object, each marked right or wrong."""
    if "read" not in row:
        return ""
    read, right = row["read"], row["right"]
    marks = right["digits"] if len(right["digits"]) == len(read["digits"]) else [False] * len(read["digits"])
    colours = right["colours"] if len(right["colours"]) == len(read["colours"]) else [False] * len(read["colours"])
    objects = []
    for digit, colour, digit_right, colour_right in zip(read["digits"], read["colours"], marks, colours, strict=True):
        good = digit_right and colour_right
        objects.append(
            f'<span class="{"right" if good else "wrong"}">{escape(colour)} {digit} {"✓" if good else "✗"}</span>'
        )
    joint = {"single": "", "horizontal": " · ", "vertical": " / "}.get(read["layout"], " ")
    return joint.join(objects)


def reconstructions(evaluation: EvaluationFacts) -> str:
    """Held-out pictures above what the autoencoder makes of them."""
    path = evaluation.folder / "reconstructions.png"
    facts = evaluation.metrics.get("autoencoder")
    if facts is None or not path.is_file():
        return ""
    count = min(facts["num_images"], 16)
    tiles = load_tiles(path, 2 * count)
    pairs = "".join(
        f"<div>{image(tiles[i], 'held-out picture')}{image(tiles[count + i], 'its reconstruction')}</div>"
        for i in range(min(count, PAIRS))
    )
    return (
        "<h2>Reconstructions by the autoencoder</h2>"
        f"<p>Above a held-out picture, below what the autoencoder makes of it. Over {facts['num_images']} pictures: "
        f"PSNR {facts['psnr_db']:.2f} dB, SSIM {facts['ssim']:.4f}.</p>"
        f'<div class="pairs">{pairs}</div>'
    )


def figures(evaluation: EvaluationFacts) -> str:
    """All other figures of an evaluation, and what they were measured with."""
    metrics = evaluation.metrics
    rows = [(text, f"{value:.2f}") for value, text in _distances(metrics)]
    if "validation_loss" in metrics:
        rows.append(("validation loss, mean over fixed times", f"{metrics['validation_loss']['mean']:.4f}"))
    if "reader" in metrics:
        reader = metrics["reader"]
        rows.append(
            (f"seconds to fit the reader on {reader['num_pictures']:,} real pictures", f"{reader['fit_s']:.1f}")
        )
    if "throughput" in metrics:
        rows.append(("generated pictures per second", f"{metrics['throughput']['generated_images_per_s']:.1f}"))
    body = "".join(f'<tr><th>{escape(name)}</th><td class="num">{value}</td></tr>' for name, value in rows)
    model = metrics["model"]
    return (
        f'<h2>Further figures</h2><div class="charts"><table><tbody>{body}</tbody></table>'
        f"{_loss_over_time(metrics)}</div>"
        f'<p class="note">Model <code>{escape(model["url"])}</code>, weights {escape(model["weights"])}, fingerprint '
        f"<code>{model['fingerprint'][:16]}</code>. A Fréchet distance under any network but the FID's own Inception "
        "carries that network's name and compares only with itself.</p>"
    )


def _loss_over_time(metrics: dict[str, Any]) -> str:
    losses = {key: value for key, value in metrics.get("validation_loss", {}).items() if key.startswith("t=")}
    times = [float(key.removeprefix("t=")) for key in losses]
    series = Series(name="loss", x=times, y=list(losses.values()), smooth=False)
    return line_chart("Validation loss by path time (0 = data, 1 = noise)", [series], x_label="t", from_zero=True)


# -- training ------------------------------------------------------------------------------------------------------
def samples_over_time(run: RunFacts) -> str:
    """One row per prompt, one column per step; for a run without prompts, its first and last sheet."""
    if not run.grids:
        return ""
    title = f"<h2>Samples while the {escape(KINDS.get(run.kind, run.kind))} trained</h2>"
    if not run.prompts:
        sheets = dict([run.grids[0], run.grids[-1]])
        parts = [
            f"<figure><figcaption>step {step:,}</figcaption>{_sheet(path)}</figure>" for step, path in sheets.items()
        ]
        return f'{title}<p>Held-out pictures above their reconstructions.</p><div class="charts">{"".join(parts)}</div>'
    last = len(run.grids) - 1
    picked = sorted({round(i * last / max(GRID_STEPS - 1, 1)) for i in range(GRID_STEPS)})
    chosen = [run.grids[i] for i in picked]
    columns = [load_tiles(path, len(run.prompts)) for _, path in chosen]
    head = "".join(f"<th>{step:,}</th>" for step, _ in chosen)
    rows = []
    for number, prompt in enumerate(run.prompts[:GRID_PROMPTS]):
        cells = "".join(
            f"<td>{image(tiles[number], f'{prompt}, step {step}')}</td>"
            for (step, _), tiles in zip(chosen, columns, strict=True)
        )
        rows.append(f'<tr><th class="prompt">{escape(prompt)}</th>{cells}</tr>')
    return (
        f"{title}<p>The same prompts and the same noise, drawn from the averaged weights as training went on.</p>"
        f'<div class="scroll"><table class="time"><thead><tr><th>step</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _sheet(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img class="sheet" src="data:image/png;base64,{data}" alt="pictures above their reconstructions">'


def curves(run: RunFacts) -> str:
    """Loss curves and throughput of one run."""
    charts = []
    for title, keys in (*CHARTS.get(run.kind, (("Training loss", (("loss", "loss"),)),)), *COMMON_CHARTS):
        series = []
        for key, name in keys:
            steps, values = run.column(key)
            series.append(Series(name=name, x=steps, y=values))
        from_zero = (title, keys) in COMMON_CHARTS
        charts.append(line_chart(title, series, x_label="optimiser step", from_zero=from_zero))
    drawn = "".join(charts)
    if not drawn:
        return ""
    return (
        f'<h2>Training the {escape(KINDS.get(run.kind, run.kind))}</h2>{_summary(run)}<div class="charts">{drawn}</div>'
    )


def _summary(run: RunFacts) -> str:
    last = run.rows[-1]
    _, speeds = run.column("images_per_s")
    _, waits = run.column("data_wait_share")
    facts = [f"{last['step']:,} steps", f"{last.get('images_seen', 0):,} pictures", f"{last.get('time_s', 0):,.0f} s"]
    if speeds:
        facts.append(f"median {statistics.median(speeds):,.0f} images/s")
    if waits:
        facts.append(f"data wait {percent(statistics.median(waits))} of the time")
    if last.get("bad_samples"):
        facts.append(f"{last['bad_samples']} samples could not be used")
    return f"<p>{escape(', '.join(facts))}.</p>"


# -- foot ----------------------------------------------------------------------------------------------------------
def stages(facts: ReportFacts) -> str:
    """Seconds per stage of the whole chain."""
    if not facts.seconds:
        return ""
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td class="num">{value:,.1f}</td></tr>' for name, value in facts.seconds.items()
    )
    peak = f"<p>The largest process held {facts.peak_rss_gib:.2f} GiB.</p>" if facts.peak_rss_gib else ""
    head = '<thead><tr><th>stage</th><th class="num">seconds</th></tr></thead>'
    return f"<h2>Time</h2><table>{head}<tbody>{rows}</tbody></table>{peak}"


def recipes(facts: ReportFacts) -> str:
    """The resolved recipes and what they ran on."""
    parts = []
    for run in facts.runs:
        parts.append(f"<details><summary>{escape(run.name)}: {escape(run.kind)}</summary>")
        parts.append(f"<pre>{escape(run.recipe)}</pre></details>")
    for evaluation in facts.evaluations:
        settings = escape(dump_yaml(evaluation.metrics["settings"]))
        parts.append(f"<details><summary>{escape(evaluation.name)}: eval</summary><pre>{settings}</pre></details>")
    provenance = next((run.provenance for run in facts.runs if run.provenance), {})
    versions = provenance.get("versions", {})
    rows = [(name, str(provenance[name])) for name in ("commit", "python", "platform") if name in provenance]
    rows += [(name, str(value)) for name, value in versions.items()]
    table = "".join(f"<tr><th>{escape(a)}</th><td><code>{escape(b)}</code></td></tr>" for a, b in rows)
    return f"<h2>Recipes and versions</h2>{''.join(parts)}<table><tbody>{table}</tbody></table>"
