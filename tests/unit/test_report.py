"""The report: complete, self-contained, and really drawn by a browser."""

import json
import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.digits import write_digits
from eval.config import EvalData, EvalRecipe, ReaderConfig
from eval.errors import EvalError
from eval.held_out import load_held_out
from eval.report import write_report
from eval.run import run_eval
from models.pipeline import TextToImage
from tests.helpers.evaluations import PROMPTS, oracle, tiny_pipeline, write_run

HEADINGS = [
    "Prompt following",
    "Pictures for held-out prompts",
    "Samples while the autoencoder trained",
    "Samples while the diffusion transformer trained",
    "Reconstructions by the autoencoder",
    "Training the autoencoder",
    "Training the diffusion transformer",
    "Further figures",
    "Time",
    "Recipes and versions",
]
NUM_PROMPTS = 40


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo with a reader, an evaluation, two runs and a summary."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    data = folder / "data"
    write_digits(str(data), num_train=512, num_test=64, num_combinations=48)
    pictures = load_held_out(str(data / "test"), 32, 8).pictures
    write_run(folder / "autoencoder", "autoencoder", pictures)
    write_run(folder / "dit", "dit", pictures)
    tiny_pipeline().save(folder / "dit" / "artifact")
    sets = {name: str(data / name) for name in ("train", "test", "combinations")}
    reader = ReaderConfig(num_pictures=512, epochs=4, batch_size=32)
    recipe = EvalRecipe(
        model=str(folder / "dit"),
        data=EvalData(**sets),
        num_prompts=NUM_PROMPTS,
        num_steps=1,
        guidance_scale=3.0,
        reader=reader,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextToImage, "generate", oracle(data, wrong_every=4))
        run_eval(recipe, str(folder / "dit" / "eval"))
    summary = {"seconds": {"data": 9.5, "autoencoder": 140.2, "dit": 402.0, "eval": 31.0}, "peak_rss_gib": 1.9}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """Collects what the assertions ask for, and that every element is closed."""

    VOID = ("meta", "img", "br", "line", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)


def test_the_page_holds_everything_and_asks_nobody(demo: Path) -> None:
    path = write_report(demo)
    assert path == demo / "report.html"
    text = path.read_text()
    page = Page(text)
    assert page.headings == HEADINGS
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("svg") == 13  # four and two, three common ones each, and the validation loss
    shown = " ".join(page.text)
    metrics = json.loads((demo / "dit" / "eval" / "metrics.json").read_text())
    for name in ("count", "colour", "digit"):
        for value in metrics["prompt_following"][name].values():
            assert f"{100 * value:.1f} %" in shown
    assert f"{metrics['autoencoder']['psnr_db']:.2f} dB" in shown
    for wanted in ("9:42 min", "total_steps: 1000", "deepspeed", "0.19.8", "✓", "✗", "fit the reader"):
        assert wanted in shown
    rows = [json.loads(line) for line in (demo / "dit" / "eval" / "prompts-test.jsonl").read_text().splitlines()]
    assert all(row["prompt"] in shown for row in rows[:24])
    assert len(text) < 3_000_000


def test_texts_of_users_cannot_become_markup(demo: Path) -> None:
    text = write_report(demo).read_text()
    assert PROMPTS[3] == "a <b>white</b> zero"
    assert "a &lt;b&gt;white&lt;/b&gt; zero" in text
    assert "<b>white" not in text


def test_a_page_is_renewed_but_a_stranger_s_is_kept(demo: Path, tmp_path: Path) -> None:
    first = write_report(demo).read_text()
    assert write_report(str(demo)).read_text() == first  # the same facts, the same page
    shutil.copytree(demo / "dit", tmp_path / "dit")
    (tmp_path / "dit" / "report.html").write_text("<html>my own</html>")
    with pytest.raises(EvalError, match="never overwritten"):
        write_report(tmp_path / "dit")
    assert (tmp_path / "dit" / "report.html").read_text() == "<html>my own</html>"
    assert not list((tmp_path / "dit").glob(".report-*"))


def test_a_run_that_just_began_has_a_page_too(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "young"
    run.mkdir()
    shutil.copy(demo / "dit" / "run.yaml", run / "run.yaml")
    assert "not yet logged" in write_report(run).read_text()
    rows = (demo / "dit" / "metrics.jsonl").read_text().splitlines()[:3]
    (run / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 40, "lo')  # killed while it wrote
    page = Page(write_report(run).read_text())
    assert page.headings == ["Training the diffusion transformer", "Recipes and versions"]
    assert page.tags.count("svg") == 5
    (run / "metrics.jsonl").write_text("broken\n" + "\n".join(rows))
    with pytest.raises(EvalError, match="line 1"):
        write_report(run)


def test_rows_written_again_after_a_restart_count_once(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(demo / "dit" / "run.yaml", run / "run.yaml")
    rows = [{"step": step, "images_seen": step, "loss": loss} for step, loss in ((1, 9.0), (2, 8.0), (2, 4.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(run).read_text()
    assert "4.0000" in text
    assert "last values: loss 4" in text


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(EvalError, match="no folder"):
        write_report(tmp_path / "missing")
    with pytest.raises(EvalError, match="copy the run's folder"):
        write_report("s3://bucket/run")


# -- in a real browser ------------------------------------------------------------------------------------------------
def browse(profile: Path, *arguments: str) -> str:
    """Runs headless Chromium without network and returns its standard output; its process group ends with it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian package: chromium)")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [browser, *flags, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    return output


@pytest.mark.all
def test_a_browser_draws_the_page_wide_and_on_a_phone(demo: Path, tmp_path: Path) -> None:
    address = write_report(demo).resolve().as_uri()
    dom = browse(tmp_path / "a", "--dump-dom", address)
    assert re.findall(r"<h2>(.*?)</h2>", dom) == HEADINGS
    assert dom.count("<polyline") >= 11
    for name, size in (("wide", "1200,2400"), ("phone", "390,2400")):
        picture = tmp_path / f"{name}.png"
        browse(tmp_path / name, f"--screenshot={picture}", f"--window-size={size}", address)
        with Image.open(picture) as shot:
            pixels = np.asarray(shot.convert("RGB")).astype(int)
        drawn = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
        bands = drawn.reshape(8, -1, drawn.shape[1]).any(axis=(1, 2))
        assert bands.all(), f"{name}: an empty band on the page"
        assert not drawn[:, -4:].any(), f"{name}: something runs over the right edge"
        colourful = (pixels.max(-1) - pixels.min(-1) > 100).mean()
        assert colourful > 0.002, f"{name}: the coloured digits are not there"
