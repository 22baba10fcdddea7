"""Every file that both stages, encoding, sampling and the export leave: none is a pickle, and none is ever loaded."""

import gzip
import io
import json
import pickle
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.diffusers_map import dit_to_diffusers
from models.errors import ModelError
from models.export import prove
from models.pipeline import TextToImage
from tests.helpers import tiny, warm_ranks
from tests.helpers.command import ROOT, write_recipe
from tests.helpers.pickles import Unknown, kinds, kinds_below
from tests.helpers.runs import tensors
from tests.helpers.warm_ranks import darkroom
from training.config import EncodeRecipe

TRUNCATED = "file not fully covered|Unable to load weights from checkpoint file"  # transformers, diffusers
GUARDED = ROOT / "tests" / "helpers" / "unpickling_refused.py"


@dataclass(frozen=True)
class Left:
    """What a pipeline left behind, in one folder."""

    folder: Path
    autoencoder: Path
    dit: Path
    export: Path


def guarded(*arguments: object) -> None:
    result = warm_ranks.start(*arguments, script=GUARDED).wait()
    assert result.code == 0, result.err


@pytest.fixture(scope="module")
def left(world, tmp_path_factory):
    """Both stages killed and resumed, the second on encoded shards; samples; an export."""
    folder = tmp_path_factory.mktemp("left")
    where = Left(folder=folder, autoencoder=folder / "autoencoder", dit=folder / "dit", export=folder / "export")
    stage = ("train", "autoencoder", world.autoencoder_recipe, "--run", where.autoencoder, "--nproc", 2)
    assert darkroom(*stage, die="log:5:1").code == 137
    guarded(*stage, "data.num_workers=1")
    networks = {"autoencoder": str(where.autoencoder), "text_encoders": tiny.ENCODERS}
    encode = EncodeRecipe(
        shards=str(world.data / "train"), out=str(folder / "encoded"), image_size=32, batch_size=4, **networks
    )
    guarded("encode", write_recipe(folder / "encode.yaml", "encode", encode))
    recipe = write_recipe(folder / "dit.yaml", "dit", tiny.dit_recipe(world.data, where.autoencoder))
    stage = ("train", "dit", recipe, "--run", where.dit, "--nproc", 2, f"data.shards={folder / 'encoded'}")
    assert darkroom(*stage, die="log:6:1").code == 137
    guarded(*stage)
    guarded("sample", where.dit, "--prompt", "a red seven", "--steps", 2, "--out", folder / "samples")
    result = darkroom("export", where.dit, "--out", where.export)
    assert result.code == 0, result.err
    return where


def test_no_file_is_a_pickle(left):
    found = kinds_below(left.folder)
    for part in ("checkpoints/", "artifact/", "ledger/", "tb/", "frozen/", "samples/"):
        assert any(f"dit/{part}" in name for name in found), part
    assert {kind for of_file in found.values() for kind in of_file} == {
        "safetensors",
        "picture",
        "events",
        "tar",
        "text",
    }
    weights = {name for name, of_file in found.items() if "safetensors" in of_file and "tar" not in of_file}
    assert weights == {name for name in found if name.endswith(".safetensors")}
    assert any(name.startswith("encoded/") and "tar" in of_file for name, of_file in found.items())


def planted(kind: str) -> bytes:
    """A content with a pickle in it."""
    payload, out = pickle.dumps({"weights": [1.0, 2.0]}, protocol=4), io.BytesIO()
    if kind.startswith("protocol"):
        return pickle.dumps({"weights": [1.0, 2.0]}, protocol=int(kind[-1]))
    if kind == "torch":
        torch.save({"weights": torch.ones(2)}, out)
    elif kind == "numpy":
        np.savez(out, weights=np.array([{"a": 1}], dtype=object))
    elif kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as packed:
            member = tarfile.TarInfo("0.json")
            member.size = len(payload)
            packed.addfile(member, io.BytesIO(payload))
    else:
        out.write(gzip.compress(payload))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["protocol 0", "protocol 2", "protocol 5", "torch", "numpy", "tar", "gzip"])
def test_a_planted_pickle_would_be_found(kind):
    with pytest.raises(Unknown):
        kinds("planted", planted(kind))


def test_a_pickle_would_end_the_guarded_command(tmp_path):
    """The guard itself, also against names that were imported before it."""
    trap, command = tmp_path / "trap.py", "    cli.main()\n"
    source = GUARDED.read_text(encoding="utf-8")
    assert source.endswith(command)
    for load in (
        "pickle.loads(b'N.')",
        "pickle.Unpickler(open('x', 'wb'))",
        "torch.load('x')",
        "import _pickle; _pickle.loads(pickle.dumps(ValueError))",
    ):
        trap.write_text(
            f"{source.removesuffix(command)}\n    exec({load!r}, {{**globals(), '__name__': 'a_library'}})\n"
        )
        result = warm_ranks.start(script=trap).wait()
        assert result.code == 1 and "AssertionError: a_library loads a pickle" in result.err, (load, result.err)


def test_the_artifact_and_the_export_are_the_averaged_weights(left):
    """Tensor by tensor, bit for bit: the last commit's first average, the artifact, and the export's own names."""
    average = tensors(left.dit, 8)["ema-0.9"]
    artifact = load_file(left.dit / "artifact" / "model.safetensors")
    trained = {name: tensor for name, tensor in artifact.items() if name in average}
    assert trained.keys() == average.keys()
    assert all(tensor.equal(average[name]) for name, tensor in trained.items())
    pipeline = TextToImage.load(left.dit / "artifact")
    _, expected = dit_to_diffusers(pipeline.dit.config, artifact)
    found = load_file(left.export / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def weights_of(export: Path) -> list[Path]:
    return sorted(export.rglob("*.safetensors"))


def test_a_truncated_export_is_refused(left, tmp_path):
    """By the serving side, by the proof that every export must pass, and our own commands take no export at all."""
    diffusers = pytest.importorskip("diffusers")
    names = [str(path.relative_to(left.export)) for path in weights_of(left.export)]
    assert {name.split("/")[0] for name in names} == {
        *("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    }
    call = json.loads((left.export / "darkroom.json").read_text())["call"]
    pipeline = TextToImage.load(left.dit / "artifact")
    for name in names:
        export = tmp_path / name.split("/")[0]
        shutil.copytree(left.export, export)
        content = (export / name).read_bytes()
        (export / name).write_bytes(content[:-1])
        with pytest.raises((SafetensorError, OSError), match=TRUNCATED):
            diffusers.StableDiffusion3Pipeline.from_pretrained(export, local_files_only=True)
    with pytest.raises((SafetensorError, OSError), match=TRUNCATED):
        prove(pipeline, tmp_path / "transformer", {}, call)
    result = darkroom("sample", left.export, "--prompt", "x", "--out", tmp_path / "out")
    assert result.code == 2 and "is an export for diffusers" in result.err


def test_a_truncated_artifact_is_refused(left, tmp_path):
    for number, path in enumerate(weights_of(left.dit / "artifact")):
        copy = tmp_path / str(number)
        shutil.copytree(left.dit / "artifact", copy)
        victim = copy / path.relative_to(left.dit / "artifact")
        victim.write_bytes(victim.read_bytes()[:-1])
        with pytest.raises(ModelError, match="damaged"):
            TextToImage.load(copy)
