"""The report's section on run-time checks, from rows as training writes them."""

import json
import re
from html import unescape
from pathlib import Path

import pytest

from eval.report import write_report
from launch.config_io import dump_yaml

RECIPE = {
    "kind": "dit",
    "diffusion": {"time_density": "mode", "mode_scale": 0.8, "shift": 3.0},
    "text_encoders": [{"name": "clip", "dropout": 0.1, "dtype": "bfloat16"}, {"name": "t5", "dropout": 0.46}],
    "data": {"max_bad_fraction": 0.01},
}


def row(step: int, **changes) -> dict:
    return {
        "step": step, "images_seen": 64 * step, "time_s": step, "loss": 1.0 / step, "images_per_s": 100.0,
        "tflops_per_s": 300.0, "mfu": 0.31, "peak_memory_gib": 40.5, "data_wait_share": 0.02, "bad_samples": 0,
        "noise_compared": 16 * step, "t_p_value": 0.4, "t_histogram": [2, 1] * 10, "t_declared": [1.5] * 20,
        "loss_by_t": [0.5, None, *[0.1 * step] * 8], "drop_rates": {"clip": 0.101, "t5": 0.459}, "captions": 64 * step,
        "latent_channel_mean": [0.01, -0.02], "latent_channel_std": [0.98, 1.03], "save_stall_s": 0.0, **changes,
    }  # fmt: skip


def page(folder: Path, rows: list[dict], recipe: dict = RECIPE) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(dump_yaml({"recipe": recipe, "provenance": {}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return write_report(folder).read_text()


def verdicts(text: str) -> dict[str, tuple[str, str, str]]:
    """Name to (mark, measured, declared)."""
    pattern = r'<tr><td><span class="\w+">(.)</span></td><th>(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>'
    return {unescape(name): (mark, *map(unescape, rest)) for mark, name, *rest in re.findall(pattern, text)}


def test_measured_stands_beside_declared(tmp_path):
    text = page(tmp_path / "run", [row(step, save_stall_s=1.5 * (step == 2)) for step in range(1, 31)])
    found = verdicts(text)
    assert found == {
        "Noise, times and samples": ("✓", "480 draws compared", "all different"),
        "Density of times": ("✓", "900 times, p = 0.4", "mode(0.8), shifted by 3"),
        "Condition of clip dropped": ("✓", "10.10 % of 1,920 captions", "10 %"),
        "Condition of t5 dropped": ("✓", "45.90 % of 1,920 captions", "46 %"),
        "Features of the text encoders": ("✓", "finite", "finite; weights in bfloat16, float32"),
        "Latents: mean per channel": ("✓", "-0.020 … 0.010", "0, within 0.2"),
        "Latents: deviation per channel": ("✓", "0.980 … 1.030", "1, from 0.8 to 1.25"),
        "Waiting for data": ("✓", "2.0 % of the time, median", "below 10 %"),
        "Samples that could not be used": ("✓", "0 of 1,920", "at most 1 %"),
    }
    assert "100.0 images/s, 300 TFLOP/s per rank, MFU 31.0 %" in text
    assert "Peak memory of a rank: 40.50 GiB. Standing still for saves: 1.5 s" in text
    section = text[text.index("Run checks of the diffusion transformer") : text.index("Recipes and versions")]
    assert section.count("<svg") == 4
    assert "<ul" not in section
    # Heights of the histogram are densities: bins of 2 and 1 of 30, twenty to the path, and 1 declared.
    assert "last values: measured 0.667, declared 1" in section
    assert "last values: t 0–0.2 0.5, t 0.2–0.5 3," in section


def test_bad_steps_and_roll_backs_are_told(tmp_path):
    quiet = verdicts(page(tmp_path / "run", [row(4, skipped_steps=1, bad_steps_in_a_row=0, roll_backs=0)]))
    assert quiet["Bad steps"] == ("✓", "1 of 4 updated nothing; 0 roll-backs", "none undone")
    assert "Damaged checkpoints passed over" not in quiet
    bad = verdicts(page(tmp_path / "run", [row(9, skipped_steps=6, bad_steps_in_a_row=0, roll_backs=2, fallbacks=1)]))
    assert bad["Bad steps"] == ("✗", "6 of 9 updated nothing; 2 roll-backs", "none undone")
    assert bad["Damaged checkpoints passed over"] == ("✗", "1", "0")


def test_complaints_are_told_with_their_steps(tmp_path):
    rows = [row(step) for step in range(1, 6)]
    rows[1]["warnings"] = ["data wait: 20 % of the time"]
    rows[2]["warnings"] = ["data wait: 15 % of the time", "t: the times <do> not"]
    rows[3]["warnings"] = ["t: the times <do> not"]
    rows[4] |= {"warnings": ["t: the times <do> not"], "errors": ["text t5: text encoder t5: its features"]}
    rows[4]["bad_samples"] = 11
    text = page(tmp_path / "run", rows)
    wrong = [name for name, (mark, *_) in verdicts(text).items() if mark == "✗"]
    assert wrong == ["Density of times", "Features of the text encoders", "Samples that could not be used"]
    assert "data wait</b>, steps 2 to 3: 15 % of the time</li>" in text
    assert "t</b>, steps 3 to 5: the times &lt;do&gt; not</li>" in text
    assert "text t5</b>, step 5: text encoder t5: its features</li>" in text


def test_counts_are_those_of_the_last_attempt(tmp_path):
    rows = [row(step, noise_compared=16 * (step if step < 4 else step - 3)) for step in range(1, 7)]
    assert verdicts(page(tmp_path / "run", rows))["Density of times"][1] == "90 times, p = 0.4"


def test_an_autoencoder_has_fewer_checks(tmp_path):
    rows = [
        {key: value for key, value in row(step, mfu=None).items() if key in
         ("step", "loss", "images_seen", "images_per_s", "tflops_per_s", "mfu", "noise_compared", "data_wait_share")}
        for step in (1, 2)
    ]  # fmt: skip
    text = page(tmp_path / "run", rows, {"kind": "autoencoder"})
    assert list(verdicts(text)) == [
        "Noise, times and samples",
        "Waiting for data",
        "Samples that could not be used",
    ]
    assert "Run checks of the autoencoder" in text and "MFU" not in text


@pytest.mark.parametrize("missing", ["noise_compared", "t_histogram", "loss_by_t", "drop_rates", "mfu", "t_p_value"])
def test_rows_without_a_field_leave_it_out(tmp_path, missing):
    rows = [{key: value for key, value in row(step).items() if key != missing} for step in (1, 2)]
    text = page(tmp_path / "run", rows)
    assert ("Run checks" in text) == (missing != "noise_compared")
