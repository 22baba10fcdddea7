"""Artifacts: whole or not at all, never overwritten, every damage noticed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.artifact import (
    artifact_fingerprint,
    config_from_dict,
    load_artifact,
    load_weights,
    new_folder,
    save_artifact,
    write_safetensors,
)
from models.autoencoder import AutoencoderConfig
from models.errors import ModelError

CONFIG = {"width": 3, "name": "grün", "sizes": [1, 2], "rate": 0.1}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(2, 3, generator=generator),
        "a": torch.tensor(True),
        "half": torch.ones(4, dtype=torch.bfloat16),
        "empty": torch.empty(0, 2),
        "strided": torch.arange(6.0).reshape(2, 3).T,
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "deep" / "it", "thing", CONFIG, tensors(), {"other": "ab"}, {"words.json": b"{}"})
    return tmp_path / "deep" / "it"


def test_round_trip(saved: Path) -> None:
    artifact = load_artifact(saved, "thing")
    assert artifact.config == CONFIG
    assert artifact.fingerprints == {"other": "ab"}
    assert artifact.files == {"words.json": b"{}"}
    for name, tensor in tensors().items():
        assert artifact.tensors[name].dtype == tensor.dtype
        assert torch.equal(artifact.tensors[name], tensor)
    assert [path.name for path in saved.parent.iterdir()] == ["it"]  # nothing temporary is left


def test_fingerprint_depends_on_content_alone() -> None:
    reference = artifact_fingerprint("thing", CONFIG, tensors(), {"other": "ab"})
    shuffled = dict(sorted(tensors().items()))
    assert artifact_fingerprint("thing", dict(reversed(CONFIG.items())), shuffled, {"other": "ab"}) == reference
    changed = tensors()
    changed["b"][0, 0] = torch.nextafter(changed["b"][0, 0], torch.tensor(9.0))
    renamed = {("c" if name == "b" else name): tensor for name, tensor in tensors().items()}
    reshaped = {**tensors(), "b": tensors()["b"].reshape(3, 2)}
    others = [
        artifact_fingerprint("thing", CONFIG, changed, {"other": "ab"}),
        artifact_fingerprint("thing", CONFIG, renamed, {"other": "ab"}),
        artifact_fingerprint("thing", CONFIG, reshaped, {"other": "ab"}),
        artifact_fingerprint("thing", {**CONFIG, "width": 4}, tensors(), {"other": "ab"}),
        artifact_fingerprint("else", CONFIG, tensors(), {"other": "ab"}),
        artifact_fingerprint("thing", CONFIG, tensors(), {"other": "cd"}),
        artifact_fingerprint("thing", CONFIG, tensors(), {"other": "ab"}, {"words.json": b"[]"}),
    ]
    assert len({reference, *others}) == len(others) + 1


def test_existing_folder_is_refused_and_kept(saved: Path) -> None:
    with pytest.raises(ModelError, match="never overwritten"):
        save_artifact(saved, "thing", {}, {})
    assert load_artifact(saved, "thing").config == CONFIG


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent/x.safetensors: .*; check the path, the rights and the free space"):
        write_safetensors({"x": torch.ones(2)}, tmp_path / "absent" / "x.safetensors")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "it") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def damage_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap_a_tensor(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, "b": stored["b"] + 1}, folder / "model.safetensors")


def edit_config(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    document["config"]["width"] = 4
    (folder / "config.json").write_text(json.dumps(document))


def replace_config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, "does not match its fingerprint"),
        (swap_a_tensor, "does not match its fingerprint"),
        (edit_config, "does not match its fingerprint"),
        (lambda folder: (folder / "words.json").write_bytes(b"[]"), "does not match its fingerprint"),
        (lambda folder: (folder / "words.json").unlink(), "words.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 4), "is damaged"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "was not written by darkroom"),
        (
            lambda folder: (folder / "config.json").write_text('{"format_version": 9, "kind": "thing"}'),
            "format_version",
        ),
        (lambda folder: (folder / "config.json").write_text('{"format_version": 1, "kind": "thing"}'), "no proper"),
    ],
)
def test_damage_is_a_one_line_error(saved: Path, damage, message: str) -> None:
    damage(saved)
    with pytest.raises(ModelError, match=message) as caught:
        load_artifact(saved, "thing")
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)
    assert caught.value.exit_code == 2


def test_another_kind_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="kind 'thing', but 'autoencoder' is needed"):
        load_artifact(saved, "autoencoder")


def test_config_from_dict() -> None:
    config = config_from_dict(AutoencoderConfig, {"channels": [32, 64], "latent_channels": 2}, "here")
    assert config == AutoencoderConfig(channels=(32, 64), latent_channels=2)
    with pytest.raises(ModelError, match="here: unknown field 'colour'"):
        config_from_dict(AutoencoderConfig, {"colour": 1}, "here")
    with pytest.raises(ModelError, match="here: latent_channels is 0"):
        config_from_dict(AutoencoderConfig, {"latent_channels": 0}, "here")


def test_load_weights_is_strict() -> None:
    layer = torch.nn.Linear(2, 3)
    good = {name: torch.zeros_like(tensor) for name, tensor in layer.state_dict().items()}
    with pytest.raises(ModelError, match="'bias' is missing"):
        load_weights(layer, {"weight": good["weight"]}, "here")
    with pytest.raises(ModelError, match="'more' is unexpected"):
        load_weights(layer, {**good, "more": good["bias"]}, "here")
    with pytest.raises(ModelError, match=r"'weight' has shape \[3, 1\], expected \[3, 2\]"):
        load_weights(layer, {**good, "weight": torch.zeros(3, 1)}, "here")
    load_weights(layer, good, "here")
    assert not layer.weight.any()
