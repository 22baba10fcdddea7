"""`darkroom eval`: everything the recipe asks for, into one new folder.

The folder holds `metrics.json` (figures, settings, fingerprints), per set of prompts `generated-SET.png`,
`real-SET.png` and `prompts-SET.jsonl` (what was asked and what was read), `reconstructions.png`, and the fitted
`reader/`. It appears whole or not at all. docs/evaluation.md has the protocol.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.digits import COLOURS
from data.object_store import is_local, open_store, put_tree
from data.shards import load_index
from eval import prompt_following
from eval.config import EvalRecipe, ReaderConfig
from eval.digit_reader import NETWORK, DigitReader, fit_reader, label, save_reader
from eval.errors import EvalError
from eval.features import DigitFeatures, feature_statistics
from eval.fid import frechet_distance, metric_name
from eval.generate import generate_pictures
from eval.held_out import HeldOut, load_held_out
from eval.model_io import OpenedModel, open_model
from eval.pictures import digest, save_mosaic
from eval.prompt_following import Scores
from eval.reconstruction import measure, reconstruct
from eval.validation import validation_loss
from launch.config_io import to_dict
from models.artifact import new_folder

FORMAT_VERSION = 1
METRICS = "metrics.json"
MOSAIC_COLUMNS = 16
RECONSTRUCTIONS_SHOWN = 16  # pairs in reconstructions.png


def run_eval(recipe: EvalRecipe, out: str, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measures a model and writes the figures and pictures to `out`, a new folder or s3 prefix.

    Args:
        recipe: what to measure.
        out: where; if the very same evaluation lies there already, it is returned and nothing is done.
        say: gets one line per part of the work.

    Returns:
        The content of metrics.json.

    Raises:
        EvalError: `out` holds something else, or the data do not fit the recipe.
        DataError, ModelError: data or model are missing or damaged.
    """
    speak = say or (lambda _line: None)
    model = open_model(recipe.model)
    identity = {
        "format_version": FORMAT_VERSION,
        "model": {"url": model.url, "fingerprint": model.fingerprint, "weights": model.weights},
        "settings": {"kind": "eval", **to_dict(recipe)},
        "data": {
            name: {"url": url, "fingerprint": load_index(url).fingerprint}
            for name, url in asdict(recipe.data).items()
            if url is not None
        },
    }
    found = _already_there(identity, out)
    if found is not None:
        speak(f"{out}: already there")
        return found
    if is_local(out):
        with new_folder(out) as folder:
            return _Evaluation(recipe, model, folder, speak).measure_all(identity)
    with tempfile.TemporaryDirectory(prefix="darkroom-eval-") as name:
        metrics = _Evaluation(recipe, model, Path(name), speak).measure_all(identity)
        put_tree(Path(name), out)
    return metrics


def _already_there(identity: dict[str, Any], out: str) -> dict[str, Any] | None:
    """The finished metrics in `out` if they answer the same question; None if nothing is there.

    Addresses do not count: the same fingerprints reached by another path are the same evaluation.
    """
    store = open_store(out)
    if not store.exists(METRICS):
        if store.list():
            raise EvalError(f"{out} holds something else than an evaluation; give another --out")
        return None
    with store.open_range(METRICS) as file:
        metrics = json.loads(file.read())
    if _essence(metrics) != _essence(identity):
        raise EvalError(f"{out} holds another evaluation (model, data or settings differ); give another --out")
    return metrics


def _essence(values: dict[str, Any]) -> Any:
    settings = {key: value for key, value in values["settings"].items() if key not in ("model", "data")}
    data = {name: entry["fingerprint"] for name, entry in values["data"].items()}
    return values["format_version"], values["model"]["fingerprint"], settings, data


class _Evaluation:
    """One pass over everything a recipe asks for."""

    def __init__(self, recipe: EvalRecipe, model: OpenedModel, folder: Path, speak: Callable[[str], None]) -> None:
        self.recipe, self.model, self.folder, self.speak = recipe, model, folder, speak
        self.pipeline = model.pipeline
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str, line: str) -> Iterator[None]:
        self.speak(line)
        start_s = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start_s, 2)

    def measure_all(self, metrics: dict[str, Any]) -> dict[str, Any]:
        recipe = self.recipe
        test = self.read_set(recipe.data.test, max(recipe.num_prompts, recipe.num_validation))
        metrics = metrics | self.autoencoder(test) | self.validation(test)
        generated = self.generate("test", test)
        if recipe.reader is None:
            self.write_prompts("test", test, [{} for _ in range(recipe.num_prompts)])
            metrics["prompts"] = {"test": self.prompt_list(test)}
        else:
            metrics |= self.follow(recipe.reader, test, generated)
        metrics["throughput"] = {"generated_images_per_s": round(self.images_per_s(), 2)}
        metrics["eval_seconds"] = self.seconds
        metrics["versions"] = {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "safetensors")},
        }
        text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
        (self.folder / METRICS).write_text(text, encoding="utf-8")
        return json.loads(text)

    def read_set(self, url: str, limit: int) -> HeldOut:
        with self.part("read", f"reading {url}"):
            return load_held_out(url, self.pipeline.image_size, limit, least=self.recipe.num_prompts)

    # -- any data set -----------------------------------------------------------------------------------------------
    def autoencoder(self, test: HeldOut) -> dict[str, Any]:
        pictures = test.pictures[: self.recipe.num_validation]
        with self.part("reconstruction", f"reconstructing {len(pictures)} held-out pictures"):
            autoencoder, size = self.pipeline.autoencoder, self.recipe.batch_size
            made = reconstruct(autoencoder, pictures, size, self.pipeline.device)
            result = measure(pictures, made)
        shown = [pictures[:RECONSTRUCTIONS_SHOWN], made[:RECONSTRUCTIONS_SHOWN]]
        columns = shown[0].shape[0]
        save_mosaic(self.folder / "reconstructions.png", torch.cat(shown), columns)  # real above reconstructed
        return {"autoencoder": asdict(result)}

    def validation(self, test: HeldOut) -> dict[str, Any]:
        count = self.recipe.num_validation
        chosen = HeldOut(
            url=test.url,
            keys=test.keys[:count],
            prompts=test.prompts[:count],
            metas=test.metas[:count],
            pictures=test.pictures[:count],
        )
        with self.part("validation", "validation loss at fixed times"):
            return {"validation_loss": validation_loss(self.pipeline, chosen, self.recipe.batch_size)}

    def generate(self, name: str, held_out: HeldOut) -> Tensor:
        count = self.recipe.num_prompts
        with self.part("generate", f"generating {count} pictures for prompts of {name}"):
            pictures = generate_pictures(self.pipeline, held_out.prompts[:count], self.recipe)
        save_mosaic(self.folder / f"generated-{name}.png", pictures, MOSAIC_COLUMNS)
        save_mosaic(self.folder / f"real-{name}.png", held_out.pictures[:count], MOSAIC_COLUMNS)
        return pictures

    def images_per_s(self) -> float:
        sets = 2 if self.recipe.data.combinations else 1
        return sets * self.recipe.num_prompts / max(self.seconds["generate"], 1e-9)

    def prompt_list(self, held_out: HeldOut) -> dict[str, Any]:
        count = self.recipe.num_prompts
        return {"num": count, "sha256": digest(held_out.prompts[:count])}

    def write_prompts(self, name: str, held_out: HeldOut, more: list[dict[str, Any]]) -> None:
        rows = zip(held_out.keys, held_out.prompts, more, strict=False)  # `more` is as long as there are prompts
        lines = [json.dumps({"key": key, "prompt": prompt, **extra}) + "\n" for key, prompt, extra in rows]
        (self.folder / f"prompts-{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    # -- the digit pictures -----------------------------------------------------------------------------------------
    def follow(self, config: ReaderConfig, test: HeldOut, generated: Tensor) -> dict[str, Any]:
        """Prompt following on both sets of prompts, and the distance under the reader's features."""
        assert self.recipe.data.train is not None  # the recipe checked it
        with self.part("read", f"reading {self.recipe.data.train}"):
            train = load_held_out(self.recipe.data.train, self.pipeline.image_size, config.num_pictures)
        with self.part("reader", f"fitting the reader on {len(train.keys)} real training pictures"):
            samples = zip(train.keys, train.pictures, train.metas, strict=True)
            reader, fit_s = fit_reader(config, label(samples, tuple(COLOURS)), tuple(COLOURS))
        save_reader(self.folder / "reader", reader)
        scores = {"test": self.judge_set("test", reader, test, generated)}
        prompts = {"test": self.prompt_list(test)}
        if self.recipe.data.combinations is not None:
            other = self.read_set(self.recipe.data.combinations, self.recipe.num_prompts)
            made = self.generate("combinations", other)
            scores["combinations"] = self.judge_set("combinations", reader, other, made)
            prompts["combinations"] = self.prompt_list(other)
        table = prompt_following.table(*scores["test"], *scores.get("combinations", ()))
        with self.part("distance", f"Fréchet distance under {NETWORK}"):
            distance = self.distance(reader, test, train, generated)
        reader_facts = {"fingerprint": reader.fingerprint, "num_pictures": len(train.keys), "fit_s": round(fit_s, 2)}
        return {"prompt_following": table, "prompts": prompts, "reader": reader_facts, **distance}

    def judge_set(self, name: str, reader: DigitReader, held_out: HeldOut, generated: Tensor) -> tuple[Scores, Scores]:
        """Scores of the generated and of the real pictures of the same prompts; every reading goes to a file."""
        verdicts, real_verdicts, rows = [], [], []
        readings, real_readings = reader.read(generated), reader.read(held_out.pictures[: len(generated)])
        for number, (read, read_real) in enumerate(zip(readings, real_readings, strict=True)):
            asked = prompt_following.shown_by_meta(held_out.metas[number], held_out.keys[number])
            verdicts.append(prompt_following.judge(asked, read))
            real_verdicts.append(prompt_following.judge(asked, read_real))
            rows.append(
                {
                    "asked": asdict(asked),
                    "read": asdict(read),
                    "right": asdict(verdicts[-1]),
                    "right_on_real": asdict(real_verdicts[-1]),
                }
            )
        self.write_prompts(name, held_out, rows)
        return prompt_following.score(verdicts), prompt_following.score(real_verdicts)

    def distance(self, reader: DigitReader, test: HeldOut, train: HeldOut, generated: Tensor) -> dict[str, Any]:
        """Generated pictures against real held-out ones; as many real training pictures give the scale."""
        network = DigitFeatures(reader)
        reference = feature_statistics(network, test.pictures)
        key = metric_name(network.name)
        return {
            key: frechet_distance(feature_statistics(network, generated), reference),
            f"{key}_of_training_pictures": frechet_distance(
                feature_statistics(network, train.pictures[: len(generated)]), reference
            ),
            f"{key}_protocol": {
                "network": network.name,
                "fingerprint": network.fingerprint,
                "num_generated": len(generated),
                "num_reference": reference.count,
            },
        }
