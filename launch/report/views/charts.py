"""Line charts, histograms and heat maps as inline SVG."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape as _escape

from launch.report.steps import LEAST_SHARE, RankTimes
from launch.report.table import RunDetail

# Pieces of the page: escaped text, elements, and coordinates that are no longer than a screen can show.


Attributes = dict[str, str | float]

SERIES = 7
"""Colors of series and parts that the style knows, ``--c0`` to ``--c6``."""


def escape(text: object) -> str:
    """Make text fit between tags and in attributes."""
    return _escape(str(text), quote=True)


def element(name: str, content: str = "", /, **attributes: str | float) -> str:
    """Write an element; ``content`` is markup. ``class_`` is class, and _ in a name is -."""
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{told}>{content}</{name}>"


def section(heading: str, *blocks: str, lead: str = "") -> str:
    """Write a section of the page; empty where no block has anything."""
    told = "".join(filter(None, blocks))
    quiet = f'<p class="quiet">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(heading)}</h2>{quiet}{told}</section>" if told else ""


def number(value: float) -> str:
    """A coordinate to a hundredth, without zeros at its end."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def grid(blocks: Iterable[str]) -> str:
    """Put blocks beside each other if there is room, else below."""
    told = "".join(filter(None, blocks))
    return f'<div class="grid">{told}</div>' if told else ""


def color(index: int) -> str:
    """Return the color of a series."""
    return f"var(--c{index % SERIES})"


# Line charts and histograms as inline SVG.


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


# The heat map of the page: ranks from top to bottom, the run from left to right, as a small PNG inside an SVG.


MAX_BANDS = 240
"""Rows of the image: of more ranks, neighbors share one, which shows the one that stands out most."""
MAP_WIDTH, MAP_LEFT, MAP_RIGHT, MAP_TOP, MAP_BOTTOM = 500.0, 42.0, 8.0, 8.0, 54.0
LEAST_HEIGHT, MOST_HEIGHT, PER_BAND = 80.0, 250.0, 16.0
SLOW, FAST = (213, 94, 0), (0, 114, 178)
LABELS = 8
NAMED = 4
"""Slow ranks that are named beside their rows; more would cover each other."""


def heat_map(found: RunDetail, times: RankTimes) -> str:
    """Draw the heat map of one run, with the names of its slow ranks."""
    rows = [[1000 * value for value in row] for row in times.excess_s]
    # Not less than what is worth naming, or the noise of a healthy run looks like a finding.
    limit = max(1000 * LEAST_SHARE * found.step_time_s, *(abs(value) for row in rows for value in row))
    bands = banded(rows, MAX_BANDS)
    tall = min(MOST_HEIGHT, max(LEAST_HEIGHT, PER_BAND * len(bands)))
    image = base64.b64encode(png([[_color(value / limit) for value in row] for row in bands])).decode()
    place = {
        "x": number(MAP_LEFT),
        "y": number(MAP_TOP),
        "width": number(MAP_WIDTH - MAP_LEFT - MAP_RIGHT),
        "height": number(tall),
    }
    parts = [
        element("rect", **place, fill="var(--paper)", stroke="var(--line)"),
        element("image", **place, href=f"data:image/png;base64,{image}", preserveAspectRatio="none", class_="heat"),
    ]
    parts += _ranks(times, tall) + _steps(times, tall) + [_key(limit, tall)]
    parts += [_arrow(found, times, tall)]
    return svg("".join(parts), "Own time of each rank above the median of all", MAP_WIDTH, MAP_TOP + tall + MAP_BOTTOM)


def banded(rows: Sequence[Sequence[float]], most: int) -> list[list[float]]:
    """Join neighboring rows to at most so many; each cell has the value of its rows that is farthest from zero."""
    size = -(-len(rows) // most)
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [[max(cells, key=abs) for cells in zip(*group, strict=True)] for group in groups]


def png(pixels: Sequence[Sequence[tuple[int, int, int, int]]]) -> bytes:
    """Write an image of red, green, blue and opacity as PNG (ISO/IEC 15948)."""
    lines = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in pixels)
    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _color(share: float) -> tuple[int, int, int, int]:
    """Color of a time, as a share of the largest: orange above the median, blue below it."""
    return *(SLOW if share > 0 else FAST), round(255 * min(1.0, abs(share)) ** 0.7)


def _ranks(times: RankTimes, tall: float) -> list[str]:
    count = len(times.ranks)
    step = -(-count // LABELS)
    labels = [(index, times.ranks[index].rank) for index in range(0, count, step)]
    place: Attributes = {"x": MAP_LEFT - 6, "text_anchor": "end", "class_": "axis"}
    return [
        element("text", str(rank), y=number(MAP_TOP + tall * (index + 0.5) / count + 4), **place)
        for index, rank in labels
    ] + [element("text", "rank", x=2, y=MAP_TOP + tall + 16, class_="axis")]


def _steps(times: RankTimes, tall: float) -> list[str]:
    y, wide = number(MAP_TOP + tall + 16), MAP_WIDTH - MAP_LEFT - MAP_RIGHT
    ends = [(MAP_LEFT, times.windows[0][0], "start"), (MAP_LEFT + wide, times.windows[-1][1], "end")]
    middle = times.windows[len(times.windows) // 2][0]
    ends += [(MAP_LEFT + wide / 2, middle, "middle")] if len(times.windows) > 8 else []
    return [
        element("text", f"step {step:,}", x=number(x), y=y, text_anchor=anchor, class_="axis")
        for x, step, anchor in ends
    ]


def _key(limit: float, tall: float) -> str:
    """Say which color means what."""
    y = MAP_TOP + tall + 30
    parts, wide = [], 22.0
    for index, share in enumerate((-1.0, -0.5, -0.2, 0.2, 0.5, 1.0)):
        *rgb, alpha = _color(share)
        fill = f"rgba({rgb[0]},{rgb[1]},{rgb[2]},{alpha / 255:.2f})"
        parts.append(element("rect", x=MAP_LEFT + 84 + wide * index, y=y, width=wide, height=12, fill=fill))
    text = {"y": number(y + 10), "class_": "axis"}
    parts.append(element("text", f"−{limit:.3g} ms", x=MAP_LEFT + 78, text_anchor="end", **text))  # noqa: RUF001
    parts.append(element("text", f"+{limit:.3g} ms, above the median", x=MAP_LEFT + 90 + 6 * wide, **text))
    return "".join(parts)


def _arrow(found: RunDetail, times: RankTimes, tall: float) -> str:
    """Name the slow ranks at their rows, of which one in a thousand is thinner than a pixel."""
    places = {rank.rank: index for index, rank in enumerate(times.ranks)}
    parts = []
    for row in [row for row in found.slowest if row.time.is_slow or row.time.waits_long][:NAMED]:
        y = MAP_TOP + tall * (places[row.time.rank] + 0.5) / len(times.ranks)
        back, up, down = number(MAP_LEFT - 8), number(y - 5), number(y + 5)
        at = f"{number(MAP_LEFT)},{number(y)} {back},{up} {back},{down}"
        name = f"rank {row.time.rank}" + (f", {row.host}" if row.host else "")
        label: Attributes = {"x": MAP_LEFT + 8, "y": number(y - 6 if y > MAP_TOP + 20 else y + 16)}
        halo: Attributes = {"stroke": "var(--paper)", "stroke_width": 4, "paint_order": "stroke", "font_weight": "700"}
        parts.append(element("polygon", points=at, fill="var(--c1)") + element("text", escape(name), **label, **halo))
    return "".join(parts)
