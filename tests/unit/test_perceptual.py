"""LPIPS against an independent writing of its formula over torchvision's VGG16, with random weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.artifact import sha256_of
from models.errors import ModelError
from models.perceptual import FILE_NAME, LPIPS, load_perceptual


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in LPIPS().state_dict().items():
        scale = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim == 4 else 0.05
        state[name] = torch.randn(tensor.shape, generator=generator) * scale
        if name.startswith("lin"):
            state[name] = state[name].abs()
    path = tmp_path_factory.mktemp("lpips") / FILE_NAME
    save_file(state, path)
    return path


def pictures(seed: int) -> torch.Tensor:
    return torch.rand((2, 3, 32, 48), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_equals_the_formula(weights: Path) -> None:
    vgg = pytest.importorskip("torchvision.models.vgg")
    state = load_perceptual(weights, None).state_dict()
    features = vgg.make_layers(vgg.cfgs["D"])
    features.load_state_dict({name[len("features.") :]: t for name, t in state.items() if name.startswith("features.")})
    images, others = pictures(1), pictures(2)
    expected = torch.zeros(2)
    outputs = []
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for batch in (images, others):
        x = ((batch + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        stages = []
        for number, layer in enumerate(features):
            x = layer(x.clone())
            if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                stages.append(torch.nn.functional.normalize(x, dim=1))
        outputs.append(stages)
    for number, (a, b) in enumerate(zip(*outputs, strict=True)):
        expected += ((a - b) ** 2 * state[f"lin{number}.model.1.weight"]).sum(1).mean((1, 2))
    torch.testing.assert_close(load_perceptual(weights, None)(images, others), expected, atol=1e-5, rtol=1e-4)


def test_gradient_and_zero(weights: Path) -> None:
    lpips = load_perceptual(weights.parent, sha256_of(weights))
    images = pictures(1).requires_grad_()
    assert not lpips(images, images).detach().any()
    distance = lpips(images, pictures(2))
    assert (distance > 0).all()
    distance.sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()
    assert images.grad.abs().sum() > 0
    assert not lpips.train().training


def test_mistakes(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{FILE_NAME} is missing: put LPIPS.*sha256 abc"):
        load_perceptual(tmp_path, "abc")
    with pytest.raises(ModelError, match="one of them is wrong"):
        load_perceptual(weights, "0" * 64)
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="is missing"):
        load_perceptual(tmp_path / "x.safetensors", None)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="is damaged"):
        load_perceptual(tmp_path / "broken.safetensors", None)
    with pytest.raises(ValueError, match="at least 16x16"):
        LPIPS()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
