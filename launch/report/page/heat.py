"""The heat map of the page: ranks from top to bottom, the run from left to right, as a small PNG inside an SVG.

A rectangle for each rank and window of a run of a thousand ranks would make a page of megabytes. The color is the time
above the median of all ranks, and none where it is zero, so that one image serves a light and a dark page.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

from launch.report.details import RunDetail
from launch.report.page.chart import svg
from launch.report.page.html import Attributes, element, escape, number
from launch.report.readings import LEAST_SHARE, RankTimes

MAX_BANDS = 240
"""Rows of the image: of more ranks, neighbors share one, which shows the one that stands out most."""
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 500.0, 42.0, 8.0, 8.0, 54.0
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
    place = {"x": number(LEFT), "y": number(TOP), "width": number(WIDTH - LEFT - RIGHT), "height": number(tall)}
    parts = [
        element("rect", **place, fill="var(--paper)", stroke="var(--line)"),
        element("image", **place, href=f"data:image/png;base64,{image}", preserveAspectRatio="none", class_="heat"),
    ]
    parts += _ranks(times, tall) + _steps(times, tall) + [_key(limit, tall)]
    parts += [_arrow(found, times, tall)]
    return svg("".join(parts), "Own time of each rank above the median of all", WIDTH, TOP + tall + BOTTOM)


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
    place: Attributes = {"x": LEFT - 6, "text_anchor": "end", "class_": "axis"}
    return [
        element("text", str(rank), y=number(TOP + tall * (index + 0.5) / count + 4), **place) for index, rank in labels
    ] + [element("text", "rank", x=2, y=TOP + tall + 16, class_="axis")]


def _steps(times: RankTimes, tall: float) -> list[str]:
    y, wide = number(TOP + tall + 16), WIDTH - LEFT - RIGHT
    ends = [(LEFT, times.windows[0][0], "start"), (LEFT + wide, times.windows[-1][1], "end")]
    middle = times.windows[len(times.windows) // 2][0]
    ends += [(LEFT + wide / 2, middle, "middle")] if len(times.windows) > 8 else []
    return [
        element("text", f"step {step:,}", x=number(x), y=y, text_anchor=anchor, class_="axis")
        for x, step, anchor in ends
    ]


def _key(limit: float, tall: float) -> str:
    """Say which color means what."""
    y = TOP + tall + 30
    parts, wide = [], 22.0
    for index, share in enumerate((-1.0, -0.5, -0.2, 0.2, 0.5, 1.0)):
        *rgb, alpha = _color(share)
        fill = f"rgba({rgb[0]},{rgb[1]},{rgb[2]},{alpha / 255:.2f})"
        parts.append(element("rect", x=LEFT + 84 + wide * index, y=y, width=wide, height=12, fill=fill))
    text = {"y": number(y + 10), "class_": "axis"}
    parts.append(element("text", f"−{limit:.3g} ms", x=LEFT + 78, text_anchor="end", **text))  # noqa: RUF001
    parts.append(element("text", f"+{limit:.3g} ms, above the median", x=LEFT + 90 + 6 * wide, **text))
    return "".join(parts)


def _arrow(found: RunDetail, times: RankTimes, tall: float) -> str:
    """Name the slow ranks at their rows, of which one in a thousand is thinner than a pixel."""
    places = {rank.rank: index for index, rank in enumerate(times.ranks)}
    parts = []
    for row in [row for row in found.slowest if row.time.is_slow or row.time.waits_long][:NAMED]:
        y = TOP + tall * (places[row.time.rank] + 0.5) / len(times.ranks)
        at = f"{number(LEFT)},{number(y)} {number(LEFT - 8)},{number(y - 5)} {number(LEFT - 8)},{number(y + 5)}"
        name = f"rank {row.time.rank}" + (f", {row.host}" if row.host else "")
        label: Attributes = {"x": LEFT + 8, "y": number(y - 6 if y > TOP + 20 else y + 16)}
        halo: Attributes = {"stroke": "var(--paper)", "stroke_width": 4, "paint_order": "stroke", "font_weight": "700"}
        parts.append(element("polygon", points=at, fill="var(--c1)") + element("text", escape(name), **label, **halo))
    return "".join(parts)
