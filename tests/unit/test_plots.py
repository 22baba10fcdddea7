"""The inline charts: axes a reader can trust, and well-formed SVG whatever the numbers are."""

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.plots import HEIGHT, WIDTH, Series, format_number, line_chart, log_ticks, nice_ticks, running_mean, thin


@settings(max_examples=100, deadline=None)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 1 <= len(ticks) <= 8
    slack = 1e-6 * (abs(low) + span)
    assert all(low - slack <= t <= low + span + slack for t in ticks)
    assert ticks == sorted(set(ticks))


def test_log_ticks() -> None:
    assert log_ticks(0.3, 4) == pytest.approx([0.5, 1, 2])
    assert log_ticks(1e-4, 10) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10])


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (1200, "1.2k"), (2.5e6, "2.5M"), (5e-4, "5e-4"), (-3, "-3")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


def test_thinning_keeps_the_mean_and_drops_what_is_not_finite() -> None:
    x, y = thin([float(i) for i in range(1000)], [float(i % 10) for i in range(1000)], limit=100)
    assert len(x) == 100
    assert y == pytest.approx([4.5] * 100)
    assert thin([0, 1, 2], [1, math.nan, math.inf]) == ([0], [1])


def test_the_running_mean_neither_lags_nor_invents() -> None:
    line = [2.0 * i for i in range(100)]
    assert running_mean(line) == pytest.approx(line)  # a straight line stays itself up to both ends


def chart_points(figure: str, css: str) -> list[tuple[float, float]]:
    root = ET.fromstring(figure)
    found = [e for e in root.iter("polyline") if e.get("class") == css]
    return [tuple(map(float, p.split(","))) for p in found[0].get("points").split()]  # type: ignore[misc, union-attr]


def test_a_falling_loss_falls_on_the_page() -> None:
    xs = [float(i) for i in range(200)]
    falling = Series(name="a&b", x=xs, y=[1 / (1 + i) for i in xs])
    figure = line_chart("Loss <train>", [falling, Series(name="c", x=xs, y=xs)])
    points = chart_points(figure, "curve c1")
    assert len(points) == 200  # in user units, whose y grows downwards
    assert all(
        later[1] >= earlier[1] - 0.05 for earlier, later in zip(points, points[1:], strict=False)
    )  # y grows down
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert "Loss &lt;train&gt;" in figure and "a&amp;b" in figure


def test_a_wide_positive_range_is_drawn_logarithmically() -> None:
    xs = [0.0, 1.0, 2.0]
    figure = line_chart("g", [Series(name="g", x=xs, y=[100, 1, 0.01])])
    assert "log scale" in figure
    heights = [y for _, y in chart_points(figure, "curve c1")]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert "log scale" not in line_chart("g", [Series(name="g", x=xs, y=[100, 1, -1])])


@pytest.mark.parametrize("ys", [[1.0], [0.0, 0.0], [5.0, 5.0], [math.nan, 2.0], [1e-9, 1e9]])
def test_odd_data_still_give_wellformed_svg(ys: list[float]) -> None:
    ET.fromstring(line_chart("odd", [Series(name="s", x=[float(i) for i in range(len(ys))], y=ys)]))


def test_nothing_finite_is_no_chart() -> None:
    assert line_chart("none", [Series(name="s", x=[0.0], y=[math.nan]), Series(name="t", x=[], y=[])]) == ""
