"""Line charts as inline SVG: no library, no script, colours from the page's CSS so that they follow light and dark."""

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 250  # user units; the page scales the drawing to its column
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34  # margins around the plot
MAX_POINTS = 400  # a longer curve is averaged into this many bins
LOG_RATIO = 12.0  # a positive quantity that spans more than this factor is drawn on a logarithmic axis


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve.

    Attributes:
        name: shown in the legend.
        x: positions, ascending.
        y: values; not-finite ones are left out of the drawing.
        smooth: draw a running mean over the faint measured values.
    """

    name: str
    x: list[float]
    y: list[float]
    smooth: bool = True


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round positions inside [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Positions 1, 2, 5 times powers of ten inside [low, high], or the powers alone where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return fine if len(fine) <= 6 else [10.0**d for d in decades if low <= 10.0**d <= high]


def format_number(value: float) -> str:
    """Short text of a number: 1200 is 1.2k, 0.0005 is 5e-4, 0.25 stays."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e3:
        return f"{value / 1e3:.3g}k"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}"


def thin(x: list[float], y: list[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Leaves out what is not finite and averages neighbours until at most `limit` points are left."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    size = max(1, math.ceil(len(points) / limit))
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    return [sum(p[0] for p in b) / len(b) for b in bins], [sum(p[1] for p in b) / len(b) for b in bins]


def running_mean(values: list[float], share: float = 0.05) -> list[float]:
    """Centred running mean over `share` of the points; the window shrinks towards both ends so nothing lags."""
    half = max(1, int(len(values) * share / 2))
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        means.append((total[i + reach + 1] - total[i - reach]) / (2 * reach + 1))
    return means


class _Axes:
    """Maps values to user units and draws the frame."""

    def __init__(self, x: list[float], y: list[float], from_zero: bool) -> None:
        self.x_low, self.x_high = min(x), max(x)
        if self.x_high == self.x_low:
            self.x_high = self.x_low + 1
        low, high = min(y), max(y)
        self.log = not from_zero and low > 0 and high / low > LOG_RATIO
        if from_zero and low >= 0:
            self.y_low, self.y_high = 0.0, high * 1.08 or 1.0
        elif self.log:
            self.y_low, self.y_high = low * 0.9, high * 1.1
        else:
            pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
            self.y_low, self.y_high = (max(0.0, low - pad) if low >= 0 else low - pad), high + pad

    def px(self, x: float) -> float:
        return LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        if self.log:
            share = math.log(y / self.y_low) / math.log(self.y_high / self.y_low)
        else:
            share = (y - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def frame(self, x_label: str) -> list[str]:
        parts = []
        ticks = log_ticks(self.y_low, self.y_high) if self.log else nice_ticks(self.y_low, self.y_high)
        for tick in ticks:
            y = self.py(tick)
            parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{format_number(tick)}</text>')
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        for tick in nice_ticks(self.x_low, self.x_high):
            x = self.px(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
            parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{format_number(tick)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
        return parts

    def curve(self, x: list[float], y: list[float], css: str) -> str:
        points = " ".join(f"{self.px(a):.1f},{self.py(b):.1f}" for a, b in zip(x, y, strict=True))
        return f'<polyline class="{css}" points="{points}"/>'


def line_chart(title: str, series: list[Series], x_label: str = "step", from_zero: bool = False) -> str:
    """Draws curves over one axis.

    Args:
        title: of the figure.
        series: the curves; one that has no finite point is left out.
        x_label: under the horizontal axis.
        from_zero: the vertical axis starts at 0 (rates and shares, whose small changes should look small); otherwise
            it fits the values, and is logarithmic where they are positive and span more than `LOG_RATIO`.

    Returns:
        An HTML ``<figure>`` with a caption, a legend where there are several curves, and the SVG; an empty string if
        no series has a finite point.
    """
    thinned = [(s, *thin(s.x, s.y)) for s in series]
    drawn = [(s, x, y) for s, x, y in thinned if x]
    if not drawn:
        return ""
    axes = _Axes([a for _, x, _ in drawn for a in x], [b for _, _, y in drawn for b in y], from_zero)
    body = axes.frame(x_label)
    for i, (entry, x, y) in enumerate(drawn, start=1):
        if len(x) == 1:
            body.append(f'<circle class="dot c{i}" cx="{axes.px(x[0]):.1f}" cy="{axes.py(y[0]):.1f}" r="3"/>')
        elif entry.smooth and len(x) >= 20:
            body += [axes.curve(x, y, f"raw c{i}"), axes.curve(x, running_mean(y), f"curve c{i}")]
        else:
            body.append(axes.curve(x, y, f"curve c{i}"))
    last = ", ".join(f"{entry.name} {format_number(y[-1])}" for entry, _, y in drawn)
    keys = "".join(f'<span class="key c{i}">{escape(e.name)}</span>' for i, (e, _, _) in enumerate(drawn, start=1))
    legend = f'<span class="legend">{keys}</span>' if len(drawn) > 1 else ""
    note = ' <span class="note">log scale</span>' if axes.log else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{note}{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}; last values: {escape(last)}">'
        + "".join(body)
        + "</svg></figure>"
    )
