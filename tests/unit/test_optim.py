"""AdamW's parameter groups: who decays, at which rate, and what a recipe may say of it."""

import pytest
import torch
import yaml
from torch import nn

from launch.config_io import dump_yaml, from_dict, load_recipe
from training.config import DiTRecipe
from training.errors import TrainingError
from training.optim import OptimConfig, ParameterGroup, build_adamw, parameter_groups, set_learning_rate


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def table(config: OptimConfig) -> dict[str, tuple[float, float]]:
    """(weight decay, learning rate) by name, as AdamW has them."""
    network = model()
    optimizer = build_adamw(network, config)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(p)]: (group["weight_decay"], group["lr"]) for group in optimizer.param_groups
            for p in group["params"]}  # fmt: skip


def test_matrices_alone_decay_unless_told_otherwise() -> None:
    groups = build_adamw(model(), OptimConfig(learning_rate=1.0, weight_decay=0.5)).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.5, [2, 2]),
        (0.0, [1, 1, 1, 1]),
    ]
    every = table(OptimConfig(learning_rate=1.0, weight_decay=0.5, decay_biases_and_norms=True))
    assert set(every.values()) == {(0.5, 1.0)}


def test_first_matching_group_wins() -> None:
    config = OptimConfig(
        learning_rate=1.0,
        weight_decay=0.5,
        groups=(
            ParameterGroup(match="2.*", learning_rate_scale=0.1),
            ParameterGroup(match="*.bias", weight_decay=0.25, learning_rate_scale=2.0),
        ),
    )
    assert table(config) == {
        "0.weight": (0.5, 1.0),
        "1.weight": (0.0, 1.0),
        "2.weight": (0.5, 0.1),
        "2.bias": (0.0, 0.1),
        "0.bias": (0.25, 2.0),
        "1.bias": (0.25, 2.0),
    }


def test_setting_the_rate_keeps_the_scales() -> None:
    config = OptimConfig(learning_rate=1.0, groups=(ParameterGroup(match="0.weight", learning_rate_scale=0.5),))
    optimizer = build_adamw(model(), config)
    set_learning_rate(optimizer.param_groups, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2, 0.1]


def test_one_step_is_adamw_of_each_group() -> None:
    """θ ← θ(1 − lr·wd) − lr·sign(g), the first step where eps is nothing."""
    config = OptimConfig(
        learning_rate=0.1,
        weight_decay=0.5,
        eps=1e-30,
        groups=(ParameterGroup(match="2.weight", weight_decay=0.0, learning_rate_scale=0.25),),
    )
    network = model()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = build_adamw(network, config)
    network(torch.linspace(-1, 1, 6).reshape(2, 3)).square().sum().backward()
    optimizer.step()
    for name, rate, decay in (("0.weight", 0.1, 0.5), ("2.weight", 0.025, 0.0), ("2.bias", 0.1, 0.0)):
        parameter = network.get_parameter(name)
        assert parameter.grad is not None
        expected = before[name] * (1 - rate * decay) - rate * parameter.grad.sign()
        assert torch.allclose(parameter.detach(), expected, atol=1e-6), name


def test_a_fused_step_is_asked_for_or_left_to_the_device() -> None:
    assert build_adamw(model(), OptimConfig(learning_rate=1.0)).defaults["fused"] is torch.cuda.is_available()
    assert build_adamw(model(), OptimConfig(learning_rate=1.0, fused=True)).defaults["fused"] is True


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("block.*",), "optim.groups.0: 'block.*' matches no parameter, like 0.weight; or leave it out"),
        (("*.bias", "2.bias"), "optim.groups.1: '2.bias' matches only what earlier groups match"),
    ],
)
def test_a_group_of_nothing_is_refused(patterns: tuple[str, ...], message: str) -> None:
    groups = tuple(ParameterGroup(match=pattern) for pattern in patterns)
    with pytest.raises(TrainingError) as caught:
        parameter_groups(model(), OptimConfig(learning_rate=1.0, groups=groups))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_groups_survive_a_recipe() -> None:
    overrides = [
        "optim.groups=[{match: '*.bias', weight_decay: 0.1}, {match: 'text_in.*', learning_rate_scale: 0.5}]",
        "schedule={kind: wsd, warmup_steps: 0, warmup_images: 6400, decay_shape: linear}",
        "ema.sigma_rels=[0.05, 0.10]",
    ]
    _, recipe = load_recipe("digits-dit", overrides, {"dit": DiTRecipe})
    assert recipe.optim.groups == (
        ParameterGroup(match="*.bias", weight_decay=0.1),
        ParameterGroup(match="text_in.*", learning_rate_scale=0.5),
    )
    assert recipe.ema.names == ("ema-0.998", "ema-power-0.05", "ema-power-0.10")
    assert from_dict(DiTRecipe, yaml.safe_load(dump_yaml(recipe))) == recipe
