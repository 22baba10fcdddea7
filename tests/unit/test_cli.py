"""The command line: what each command hands on, what it prints, how it ends."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import launch.cli as cli
import launch.runtime as runtime

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "pydantic",
    "yaml",
    "rich",
    "boto3",
    "numpy",
    "training",
    "data",
    "models",
    "eval",
    "launch.config_io",
)


@dataclass(frozen=True, kw_only=True)
class ToyRecipe:
    steps: int


@dataclass(frozen=True, kw_only=True)
class ToyEval:
    model: str


@pytest.fixture
def darkroom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process; gives (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["darkroom", *arguments])
        monkeypatch.setattr(cli, "_leave", sys.exit)  # a rank's os._exit would end pytest itself, with success
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A toy recipe in the current directory and trainers that only note their calls."""
    calls: list[Any] = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text("kind: dit\nsteps: 3\n")
    (tmp_path / "measure.yaml").write_text(f"kind: eval\nmodel: {tmp_path / 'run'}\n")
    monkeypatch.setattr(cli, "_schema", lambda kind: ToyEval if kind == "eval" else ToyRecipe)
    for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(variable, "")  # so that what the command sets is undone
        monkeypatch.delenv(variable)
    for variable in ("OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.setenv(variable, os.environ.get(variable, "cpu"))

    def stage(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            train=lambda recipe, run_dir, quiet: calls.append((name, recipe, run_dir, quiet, dict(os.environ)))
        )

    training = ModuleType("training")
    training.train_autoencoder, training.train_dit = stage("autoencoder"), stage("dit")  # type: ignore[attr-defined]
    dry_run = ModuleType("training.dry_run")
    dry_run.describe = lambda recipe, world_size: f"{recipe.steps} steps on {world_size}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "training", training)
    monkeypatch.setitem(sys.modules, "training.dry_run", dry_run)
    monkeypatch.setattr(runtime, "spawn", lambda nproc, argv: calls.append((nproc, argv)) or 7)
    return calls


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    program = f"import sys, launch.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"

    def cpu_s() -> float:  # not wall time: other processes may keep this one waiting
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = cpu_s()
    done = subprocess.run([sys.executable, "-m", "launch.cli", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert cpu_s() - before < 0.5
    assert done.returncode == 0
    for command in ("data", "train", "sample", "eval", "export", "checkpoint", "report", "launch", "doctor"):
        assert f"\n  {command} " in done.stdout


def test_a_wrong_recipe_name_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", "dit", "digits-diy", "--nproc", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no recipe is called 'digits-diy'; did you mean digits-dit")
    assert done.stderr.count("\n") == 1


def test_train_resolves_the_recipe_and_the_run_directory(darkroom: Any, toy: list[Any]) -> None:
    assert darkroom("train", "dit", "toy", "steps=5") == (0, "", "")
    assert darkroom("train", "dit", "./toy.yaml", "--run", "here", "--quiet") == (0, "", "")
    (name, recipe, run_dir, quiet, environment), second = toy
    assert (name, recipe, run_dir, quiet) == ("dit", ToyRecipe(steps=5), "runs/toy", False)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert second[1:4] == (ToyRecipe(steps=3), "here", True)


def test_train_refuses_what_does_not_fit(darkroom: Any, toy: list[Any]) -> None:
    assert darkroom("train", "autoencoder", "toy") == (
        2,
        "",
        "error: recipe 'toy': kind is 'dit', but this command wants autoencoder\n",
    )
    assert darkroom("train", "dit", "toy", "stepz=5", "--nproc", "2") == (
        2,
        "",
        "error: recipe 'toy': unknown key 'stepz'; did you mean 'steps'?\n",
    )
    assert darkroom("train", "dit", "toy", "--nproc", "0") == (2, "", "error: --nproc 0 must be at least 1\n")
    assert toy == [], "nothing was started"


def test_ranks_get_the_same_command(darkroom: Any, toy: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "launch.cli", "train", "dit", "toy", "--nproc", "2"])
    assert darkroom("train", "dit", "toy", "--nproc", "2")[0] == 7, "the ranks' exit code"
    assert toy == [(2, [sys.executable, "-m", "launch.cli", "train", "dit", "toy", "--nproc", "2"])]
    toy.clear()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert darkroom("train", "dit", "toy", "--nproc", "2")[0] == 0
    assert toy[0][:2] == ("dit", ToyRecipe(steps=3)), "a rank trains and starts nobody"


def test_dry_run_only_describes(darkroom: Any, toy: list[Any]) -> None:
    assert darkroom("train", "dit", "toy", "--nproc", "4", "--dry-run") == (0, "3 steps on 4\n", "")
    assert toy == []


@pytest.mark.parametrize(
    ("error_class", "code"),
    [("data.errors.DataError", 2), ("models.errors.ModelError", 2), ("eval.errors.EvalError", 2)],
)
def test_a_users_mistake_in_any_package_is_one_line(
    darkroom: Any, monkeypatch: pytest.MonkeyPatch, error_class: str, code: int
) -> None:
    module, _, name = error_class.rpartition(".")
    error = getattr(__import__(module, fromlist=[name]), name)("model.pt is missing;\nput it there")

    def fail(model: str) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "eval.model_io", SimpleNamespace(load_pipeline=fail))
    monkeypatch.setitem(sys.modules, "models.export", SimpleNamespace(export_diffusers=None))
    assert darkroom("export", "run", "--out", "there") == (code, "", "error: model.pt is missing; put it there\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> None:
        raise RuntimeError("bug")

    monkeypatch.setitem(sys.modules, "eval.model_io", SimpleNamespace(load_pipeline=fail))
    monkeypatch.setitem(sys.modules, "models.export", SimpleNamespace(export_diffusers=None))
    monkeypatch.setattr(sys, "argv", ["darkroom", "export", "run", "--out", "there"])
    with pytest.raises(RuntimeError, match="bug"):
        cli.main()


class Pipeline:
    """Draws pictures whose grey is the seed in 255ths."""

    def generate(self, prompts: list[str], seeds: list[int], *, num_steps: int, guidance_scale: float) -> torch.Tensor:
        self.asked = (prompts, seeds, num_steps, guidance_scale)
        return torch.stack([torch.full((3, 4, 6), seed / 255) for seed in seeds])


def test_sample_writes_pictures_and_what_made_them(
    darkroom: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline = Pipeline()
    monkeypatch.setitem(sys.modules, "eval.model_io", SimpleNamespace(load_pipeline=lambda model: pipeline))
    out = tmp_path / "pictures"
    arguments = ("sample", "run", "--prompt", "a red one", "--prompt", "two", "--out", str(out), "--seed", "7")
    code, printed, err = darkroom(*arguments, "--steps", "3", "--guidance", "1.5", "--json")
    assert (code, err) == (0, "")
    assert pipeline.asked == (["a red one", "two"], [7, 8], 3, 1.5)
    facts = json.loads(printed)
    assert facts == json.loads((out / "samples.json").read_text())
    assert [row["prompt"] for row in facts["pictures"]] == ["a red one", "two"]
    for row in facts["pictures"]:
        with Image.open(out / row["file"]) as picture:
            assert (picture.size, picture.mode) == ((6, 4), "RGB")
            assert picture.getpixel((5, 3)) == (row["seed"],) * 3
    kept = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    code, _, err = darkroom(*arguments)
    assert code == 2 and "nothing is overwritten" in err
    assert kept == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert darkroom("sample", "run", "--prompt", "a", "--out", "x", "--steps", "0")[0] == 2


def test_eval_writes_beside_the_run(
    darkroom: Any, toy: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outs: list[str] = []
    metrics = {"autoencoder": {"psnr_db": 26.123456}, "settings": {"seed": 0}}

    def run_eval(recipe: ToyEval, out: str, say: Callable[[str], None]) -> dict[str, Any]:
        outs.append(out)
        say("measuring")
        return metrics

    monkeypatch.setitem(sys.modules, "eval.run", SimpleNamespace(run_eval=run_eval))
    code, printed, _ = darkroom("eval", "measure")
    assert (code, printed.splitlines()[:2]) == (0, ["measuring", "autoencoder  psnr_db 26.12"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").touch()
    code, printed, _ = darkroom("eval", "measure", "--json")
    assert (code, json.loads(printed)) == (0, metrics)
    assert darkroom("eval", "measure", "--out", "there", "--quiet") == (0, "", "")
    assert outs == ["runs/measure", str(tmp_path / "run" / "eval"), "there"]


def test_pack_says_what_it_skipped(darkroom: Any, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(images / f"{number}.png")
    (images / "broken.png").write_bytes(b"no picture")
    rows = [{"file": f"{number}.png", "caption": f"picture {number}"} for number in range(3)]
    rows += [{"file": "broken.png", "caption": "x"}, {"file": "3.png", "caption": " "}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("data", "pack", str(images), str(tmp_path / "captions.jsonl"), str(tmp_path / "packed"))
    code, printed, _ = darkroom(*arguments, "--min-shards", "2", "--json")
    assert code == 0
    done = json.loads(printed)
    assert done["samples"] == 3 and sum(done["skipped"].values()) == 2
    code, _, err = darkroom(*arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, "nothing is overwritten"


def commit(run: Path, step: int, content: bytes) -> Path:
    import hashlib

    from data.manifest import FileEntry, Manifest, step_folder, write_manifest
    from data.object_store import open_store

    store = open_store(str(run / "checkpoints"))
    store.put_bytes(content, f"{step_folder(step)}/try-1/model.safetensors")
    entry = FileEntry(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = Manifest(step=step, attempt="try-1", files={"try-1/model.safetensors": entry})
    assert write_manifest(store, step_folder(step), manifest)
    return run / "checkpoints" / step_folder(step) / "try-1" / "model.safetensors"


def test_checkpoints_are_listed_and_verified(darkroom: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    commit(run, 10, b"first")
    newest = commit(run, 20, b"second")
    code, printed, _ = darkroom("checkpoint", "ls", str(run), "--json")
    assert code == 0
    assert [(row["step"], row["files"], row["bytes"]) for row in json.loads(printed)["checkpoints"]] == [
        (10, 1, 5),
        (20, 1, 6),
    ]
    assert "step         20" in darkroom("checkpoint", "ls", str(run / "checkpoints"))[1]
    assert darkroom("checkpoint", "verify", str(run)) == (0, f"{run}: 2 good\n", "")
    newest.write_bytes(b"sEcond")
    code, _, err = darkroom("checkpoint", "verify", str(run))
    assert code == 2
    damage, summary = err.strip().splitlines()
    assert str(newest) in damage
    assert summary == f"error: {run} has 1 problem; a resume takes the newest one without a problem"
    code, _, err = darkroom("checkpoint", "ls", str(tmp_path / "none"))
    assert code == 2 and "no committed checkpoint" in err


def test_old_checkpoints_are_pruned_but_never_the_only_good_one(darkroom: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    paths = {step: commit(run, step, b"content") for step in (10, 20, 30, 40)}
    command = ("checkpoint", "prune", str(run), "--keep-last", "1")
    code, printed, _ = darkroom(*command, "--keep-every", "20", "--dry-run", "--json")
    assert code == 0 and json.loads(printed)["deleted"] == [10, 30] and all(path.exists() for path in paths.values())
    assert darkroom(*command, "--keep-every", "20")[1] == "deleted: 10, 30; kept: 20, 40\n"
    assert [step for step, path in paths.items() if path.exists()] == [20, 40]
    paths[40].write_bytes(b"damaged")
    code, _, err = darkroom(*command)
    assert code == 2 and err.startswith("error: ") and "none of the 1 that would stay is good" in err
    assert paths[20].exists()
    assert darkroom("checkpoint", "prune", str(run), "--keep-last", "0")[0] == 2


def test_an_average_is_found_from_those_that_were_kept(darkroom: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from tests.helpers.commits import write_commit

    run, out = tmp_path / "run", tmp_path / "found" / "average.safetensors"
    values = {"ema-power-0.05": 1.0, "ema-power-0.10": 2.0}
    tensors = {group: {"weight": torch.full((2, 2), value)} for group, value in values.items()}
    write_commit(run / "checkpoints", 8, tensors)

    command = ("checkpoint", "ema", str(run), "--sigma-rel", "0.1", "--out")
    code, printed, _ = darkroom(*command, str(out))
    assert code == 0 and "residual" in printed and "step 8, group ema-power-0.10, weight 1" in printed
    assert load_file(out)["weight"].tolist() == [[pytest.approx(2.0)] * 2] * 2
    assert darkroom(*command, str(out))[0] == 2
    code, printed, _ = darkroom(*command, str(tmp_path / "b"), "--json", "--step", "8")
    assert [used["group"] for used in json.loads(printed)["used"]] == ["ema-power-0.05", "ema-power-0.10"]
    code, _, err = darkroom(*command, "s3://bucket/x")
    assert code == 2 and err.strip().endswith("must be a local folder")


def test_the_way_of_the_data(darkroom: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    code, printed, err = darkroom(
        "data", "digits", str(data), "--train", "16", "--test", "2", "--combinations", "2", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(printed)["splits"]["train"]["samples"] == 16
    code, printed, _ = darkroom("data", "ls", str(data / "test"), "--json")
    assert code == 0 and json.loads(printed)["samples"] == 2
    assert "samples" in darkroom("data", "ls", str(data / "test"))[1]
    assert darkroom("data", "verify", str(data / "test"))[0] == 0
    shard = next((data / "test").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(bytes(content))
    code, _, err = darkroom("data", "verify", str(data / "test"))
    assert code == 2
    assert shard.name in err.splitlines()[0]
    assert err.splitlines()[-1].startswith(f"error: {data / 'test'} has 1 problem; restore the shards")
    code, _, err = darkroom("data", "ls", str(tmp_path / "nothing"))
    assert code == 2 and err.count("\n") == 1


def test_doctor_names_what_is_missing(darkroom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed, _ = darkroom("doctor", "--json")
    facts = json.loads(printed)
    assert (code == 0) == (facts["missing"] == [])
    assert f"torch {torch.__version__.partition('+')[0]}" in facts["packages"][0]
    monkeypatch.setattr("launch.doctor.PACKAGES", ("torch", "no-such-package"))
    code, _, err = darkroom("doctor")
    assert code == 2 and "no-such-package" in err
