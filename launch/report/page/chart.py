"""Line charts and histograms as inline SVG.

Owns scales, ticks and the drawing of series; texts are as large on a telephone as they can be, since a drawing scales
with the page. Must not know what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.report.page.html import Attributes, color, element, escape, number

WIDTH, HEIGHT = 460.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 14.0, 40.0
HALO: Attributes = {"stroke": "var(--card)", "stroke_width": 4, "paint_order": "stroke"}
"""Keeps a text legible where it lies over lines."""
LEAST_GAP = 34.0
"""Distance between two labels of the axis below."""


@dataclass(frozen=True)
class Mark:
    """One point of a series: its place, its interval, and the text that a pointer over it shows."""

    x: float
    low: float
    value: float
    high: float
    text: str
    hollow: bool = False


@dataclass(frozen=True)
class Scale:
    """Map values onto the drawing, evenly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return where a value is drawn."""
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def line_chart(
    series: Sequence[Sequence[Mark]],
    ideal: Sequence[Sequence[tuple[float, float]]],
    names: tuple[str, str],
    tick: Callable[[float], str],
    log: bool,
) -> str:
    """Draw series over the number of ranks, with intervals, and dashed lines of what would be ideal.

    Args:
        series: the points of each series, in its order of color.
        ideal: (ranks, value) of each dashed line.
        names: of the axis below and of the one at the left.
        tick: writes a value of the axis at the left.
        log: the axis at the left is logarithmic.
    """
    marks = [mark for of_series in series for mark in of_series]
    sizes = sorted({mark.x for mark in marks})
    heights = [v for m in marks for v in (m.low, m.value, m.high)] + [v for line in ideal for _, v in line]
    low, high = (min(heights), max(heights)) if log else (0.0, 1.12 * max(heights))
    if log:
        margin = max(1.15, (4 * low / high) ** 0.5)  # less than a factor of 4, and noise looks like a cliff
        low, high = low / margin, high * margin
    x = Scale(sizes[0] / 2**0.4, sizes[-1] * 2**0.4, LEFT, WIDTH - RIGHT, log=True)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, log=log)
    parts = [_levels(y, ticks(low, high, log), tick), _sizes(x, sizes), _names(*names)]
    for line in ideal:
        parts.append(element("polyline", points=_path([(x(at), y(value)) for at, value in line]), class_="ideal"))
    for index, of_series in enumerate(series):
        parts.append(_series(of_series, color(index), x, y))
    return svg("".join(parts), names[1])


def svg(content: str, title: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    """Wrap a drawing, with its name for whoever cannot see it."""
    box = f"0 0 {number(width)} {number(height)}"
    return element("svg", content, viewBox=box, role="img", aria_label=title)


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Choose round values between two: 1, 2 and 5 times powers of ten."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        wanted = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        found = [value for value in wanted if low <= value <= high]
        return found if len(found) <= 8 else found[::3]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= 6)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def histogram(values: Sequence[float], marks: Sequence[tuple[str, float]], bins: int) -> str:
    """Draw how often values occur, in seconds, with named lines at some of them."""
    low, high = min(values), max(values)
    margin = 0.02 * (high - low) or 0.02 * high or 1.0
    low, high = low - margin, high + margin
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int(bins * (value - low) / (high - low)))] += 1
    x = Scale(low, high, LEFT, WIDTH - RIGHT)
    y = Scale(0, 1.2 * max(counts), HEIGHT - BOTTOM, TOP)
    parts = [_levels(y, [at for at in ticks(0, y.high, False) if at == int(at)], lambda value: f"{value:.0f}")]
    size = (WIDTH - RIGHT - LEFT) / bins
    for index, count in enumerate(counts):
        box = (LEFT + index * size, y(count), max(size - 1, 0.5), y(0) - y(count))
        names = dict(zip(("x", "y", "width", "height"), map(number, box), strict=True))
        parts.append(element("rect", **names, fill=color(0)) if count else "")
    for index, (name, value) in enumerate(marks):
        at, stroke = number(x(value)), color(1 + index)
        parts.append(element("line", x1=at, x2=at, y1=TOP, y2=number(y(0)), stroke=stroke, stroke_width=2))
        side = ("end", -5) if x(value) > WIDTH / 2 else ("start", 5)
        place: Attributes = {"x": number(x(value) + side[1]), "y": number(TOP + 11 + 15 * index)}
        place["text_anchor"] = side[0]
        parts.append(element("text", escape(name), **place, fill=stroke, font_weight="600", **HALO))
    parts += [_below(x(value), f"{value:.6g}") for value in ticks(low, high, False)]
    return svg("".join(parts) + _names("seconds", "steps"), "Distribution of step times")


def _levels(y: Scale, values: Sequence[float], tick: Callable[[float], str]) -> str:
    parts = []
    for value in values:
        at = y(value)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=number(at), y2=number(at), class_="rule"))
        text = escape(tick(value))
        parts.append(element("text", text, x=LEFT - 6, y=number(at + 4), text_anchor="end", class_="axis"))
    return "".join(parts)


def _sizes(x: Scale, sizes: Sequence[float]) -> str:
    parts, last = [], -math.inf
    for size in sizes:
        if x(size) - last >= LEAST_GAP:
            parts.append(_below(x(size), f"{size:,.0f}"))
            last = x(size)
    return "".join(parts)


def _below(at: float, text: str) -> str:
    return element("text", escape(text), x=number(at), y=HEIGHT - BOTTOM + 16, text_anchor="middle", class_="axis")


def _names(below: str, left: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    place: Attributes = {"text_anchor": "middle", "class_": "axis"}
    turned = f"rotate(-90 12 {number(middle)})"
    return element("text", escape(below), x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, **place) + element(
        "text", escape(left), x=12, y=number(middle), transform=turned, **place
    )


def _series(marks: Sequence[Mark], stroke: str, x: Scale, y: Scale) -> str:
    line = _path([(x(mark.x), y(mark.value)) for mark in marks])
    parts = [element("polyline", points=line, fill="none", stroke=stroke, stroke_width=2)]
    for mark in marks:
        at = number(x(mark.x))
        ends = {"y1": number(y(mark.low)), "y2": number(y(mark.high))} if mark.low > 0 or not y.log else {}
        parts.append(element("line", x1=at, x2=at, stroke=stroke, stroke_width=1.5, **ends) if ends else "")
        fill = "var(--card)" if mark.hollow else stroke
        dot: Attributes = {"cx": at, "cy": number(y(mark.value)), "r": 5, "fill": fill}
        dot |= {"stroke": stroke, "stroke_width": 2}
        parts.append(element("circle", element("title", escape(mark.text)), **dot))
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{number(x)},{number(y)}" for x, y in points)
