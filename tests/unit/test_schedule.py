"""The learning rate at the corners of every schedule."""

import math

import pytest

from launch.config_io import load_recipe
from launch.errors import ConfigError
from training.config import DiTRecipe
from training.schedule import ScheduleConfig, learning_rate


def rates(config: ScheduleConfig, total_steps: int, batch: int = 8) -> list[float]:
    return [learning_rate(config, 1.0, step, total_steps, batch) for step in range(total_steps + 1)]


def test_cosine() -> None:
    found = rates(ScheduleConfig(kind="cosine", warmup_steps=4, final_fraction=0.1), 104)
    assert [found[step] for step in (0, 3, 4, 54, 104)] == pytest.approx([0.25, 1.0, 1.0, 0.55, 0.1])


def test_constant_stays_at_the_peak() -> None:
    assert set(rates(ScheduleConfig(), 100)) == {1.0}


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.1 + 0.9 * 0.5), ("1-sqrt", 0.1 + 0.9 * (1 - math.sqrt(0.5)))])
def test_warmup_stable_decay(shape: str, half: float) -> None:
    config = ScheduleConfig(
        kind="wsd", warmup_steps=5, decay_fraction=0.2, decay_shape=shape, final_fraction=0.1
    )  # fmt: skip
    found = rates(config, 100)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(found[5:81]) == {1.0}  # the last step at the peak is the one that the decay counts from
    assert found[81] < 1 and found[90] == pytest.approx(half) and found[100] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in zip(found[80:], found[81:], strict=False))


def test_a_longer_run_shares_the_stable_stage() -> None:
    """What wsd is for: a run is resumed before its decay and given more steps."""
    config = ScheduleConfig(kind="wsd", warmup_steps=5, decay_fraction=0.1)
    assert rates(config, 100)[:91] == rates(config, 1000)[:91]


def test_decay_from_the_first_step_on_and_of_a_single_step() -> None:
    whole = ScheduleConfig(kind="wsd", decay_fraction=1.0, decay_shape="linear")
    assert rates(whole, 4) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert rates(ScheduleConfig(kind="wsd", decay_fraction=0.01), 4) == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.0])


def test_warmup_in_images_is_that_in_steps() -> None:
    for kind in ("constant", "cosine", "wsd"):
        by_images = ScheduleConfig(kind=kind, warmup_images=64)
        assert rates(by_images, 50, batch=8) == rates(ScheduleConfig(kind=kind, warmup_steps=8), 50, batch=8)


def test_warmup_in_images_that_the_batch_does_not_divide_ends_at_the_peak() -> None:
    config = ScheduleConfig(warmup_images=20)
    assert rates(config, 5, batch=8) == pytest.approx([0.4, 0.8, 1.0, 1.0, 1.0, 1.0])
    assert rates(config, 2, batch=32) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule={kind: wsd, warmup_steps: 100, warmup_images: 5}"], "warmup_images 5 must be"),
        (["schedule.kind=wsd", "schedule.decay_fraction=0"], "decay_fraction 0"),
        (
            ["schedule.kind=wsd", "schedule.decay_fraction=0.99"],
            "warm-up takes 100 steps, the decay starts at step 22 ",
        ),
        (["schedule.kind=stable"], "schedule.kind"),
    ],
)
def test_impossible_schedules_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("digits-dit", overrides, {"dit": DiTRecipe})
    assert message in str(caught.value) and "\n" not in str(caught.value)
