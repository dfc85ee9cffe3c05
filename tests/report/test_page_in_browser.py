"""The HTML page of a report, opened by a real headless browser at the widths of two screens and of a telephone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from launch.report import build, write
from launch.report.goodput import PARTS
from launch.runs.folder import ReportFile, append_lines
from tests.support.run_folders import RunBuilder

SLOW_RANK, LATE_S = 5, 0.03
WIDTHS = (1400, 800, 390)
T0 = 1.7e9


def make_sweep(folder: Path) -> Path:
    """Points of 1, 4 and 8 ranks of a GPT on GPUs; at the largest one rank is late. One point has a name with <."""
    for ranks in (1, 4, 8):
        typed = (f"nodes={ranks}", "name=a<b")
        gpus = {"device": "cuda:0", "device_name": "Some GPU", "extra_rank": {"device_uuid": f"{ranks}-{{rank}}"}}
        built = RunBuilder(folder / f"nodes={ranks}", ranks, ranks, typed, **gpus).attempt()
        start = T0 + 1000 * ranks
        begun = {"job": "1", "nodes": ranks, "gpus": ranks, "price_per_gpu_hour": 2.0, "limit_s": 3600.0}
        built.event("submitted", time=start - 10, cluster="slurm")
        built.event("agent_started", time=start + 1, node=0, allocated_at=start, **begun)
        built.event("started", attempt=1, time=start + 2, world_size=ranks)
        for rank in range(ranks):
            late = LATE_S * (ranks == 8 and rank == SLOW_RANK)
            step_s = 0.8 / ranks + (ranks == 8) * LATE_S + 0.01 * (ranks > 1)
            comm_s = (0.01 * (ranks > 1)) + (ranks == 8) * LATE_S - late
            known = {"attempt": 1, "tokens": 2048 // ranks, "loss": 2.0, "step_time_s": step_s, "comm_s": comm_s}
            known |= {"data_wait_s": 0.0}
            append_lines(
                built.run.metrics(rank),
                [{"step": step, **known, "time": start + 20 + step * step_s} for step in range(1, 41)],
            )
        built.finished(1, time=start + 21 + 40 * step_s)
        built.event("agent_ended", node=0, job="1", time=start + 22 + 40 * step_s, ended_at=start + 22 + 40 * step_s)
    return folder


def page_of(folder: Path) -> Path:
    """Write the page of a sweep."""
    (page,) = write(build(folder), files={ReportFile.html})
    return page


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_of(make_sweep(tmp_path_factory.mktemp("page") / "sweep"))


Opener = Callable[..., webdriver.Chrome]


@pytest.fixture
def opened(browser: webdriver.Chrome, html: Path) -> Iterator[Opener]:
    """Opens a page on a screen of some width; the window itself would not become as narrow as a telephone."""

    def open_page(width: int = WIDTHS[0], page: Path = html) -> webdriver.Chrome:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(page.as_uri())
        return browser

    yield open_page
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    """Visible texts of elements."""
    every = f"return [...document.querySelectorAll('{selector}')].filter(one => one.checkVisibility())"
    found = browser.execute_script(f"{every}.map(one => one.innerText ?? one.textContent)")
    return [" ".join(text.split()) for text in found]


BOXES = """return [...document.querySelectorAll('.card')]
.filter(card => card.firstChild.innerText.startsWith(arguments[0]))
.map(card => [...card.querySelectorAll('path')].filter(path => path.style.fill.startsWith('var(--'))
.map(path => path.getBoundingClientRect()).map(box => [box.left, box.right]))"""
"""Left and right ends of the bars of the drawings whose title begins so, in their order."""


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_fits_the_screen_and_fills_its_card(opened: Opener, width: int) -> None:
    page = opened(width)
    wide, screen = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert screen == width and wide <= width
    script = """return [...document.querySelectorAll('.card')].filter(one => one.checkVisibility()).map(card => {
    const svg = card.querySelector('svg').getBoundingClientRect(), box = card.getBoundingClientRect();
    return [svg.right, svg.width / (box.width - 30), svg.height / box.height] })"""
    drawings = page.execute_script(script)
    assert len(drawings) == 7
    for right, share_of_width, share_of_height in drawings:
        assert right <= width and share_of_width > 0.95 and share_of_height > 0.45
    cut = "return [...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
    assert width < 1400 or page.execute_script(cut) == 0, "a table is cut"
    first = page.execute_script("return document.querySelector('.tiles').getBoundingClientRect().bottom")
    assert first < 900, "not on the first screen"


def test_the_first_screen_says_how_well_what_was_lost_and_who_is_slow(opened: Opener) -> None:
    page = opened()
    shown = dict(zip(texts(page, ".tile .name"), texts(page, ".tile b"), strict=True))
    # Of a step of 140 ms, 100 are the eighth part of the work of one rank.
    assert shown["Efficiency at nodes=8"] == "71.4 %"
    assert shown["Most lost at nodes=8"] == "slowest rank of each step"
    assert shown["Slow rank"] == f"rank {SLOW_RANK}"
    assert any("on n6, +30 ms, 21.4 % of the step time" in text for text in texts(page, ".tile small"))


def test_labels_of_any_length_stay_in_their_boxes(tmp_path: Path, opened: Opener) -> None:
    folder = tmp_path / "sweep"
    for ranks in (1, 2, 4):
        label = (f"data.path=/corpora/{'without_any_break_' * 5}{ranks}", f"nodes={ranks}")
        RunBuilder(folder / f"p{ranks}", ranks, ranks, label).attempt().steps(1, [1.0] * 20, rank_delay=0.25)
    page = opened(WIDTHS[-1], page_of(folder))
    script = """return [...document.querySelectorAll('.tile, .card, .tabs > label, h1, h3')].filter(
    one => one.checkVisibility() && one.scrollWidth > one.clientWidth).map(one => one.innerText)"""
    assert page.execute_script(script) == []
    assert page.execute_script("return document.documentElement.scrollWidth") <= WIDTHS[-1]


def test_the_waterfall_falls_from_the_ideal_to_the_efficiency(opened: Opener) -> None:
    page = opened()
    titles = [title for title in texts(page, ".card > h3") if title.startswith("What was lost")]
    assert titles == ["What was lost to what at nodes=8", "What was lost to what at nodes=4"]
    fall = next(text for text in texts(page, "svg") if "ideal" in text and "efficiency" in text).replace("−", "-")  # noqa: RUF001
    numbers = [float(value) for value in re.findall(r"(-?\d+\.\d) %", fall)]
    assert numbers[0] == 100.0 and numbers[-1] == 71.4
    assert sum(numbers[:-1]) == pytest.approx(71.4, abs=0.05 * len(numbers)), "each is rounded"
    for (low, _), (_, high) in itertools.pairwise(page.execute_script(BOXES, "What was lost")[0][1:-1]):
        assert high == pytest.approx(low, abs=1.6), "each part begins where the one before ends"


def test_all_waterfalls_have_one_scale(tmp_path: Path, opened: Opener) -> None:
    """The ideal is as long at every point, also at one that gained, whose bars pass it."""
    folder = tmp_path / "sweep"
    for ranks, step_s in ((1, 1.0), (2, 0.25), (4, 0.5)):  # 200 % and 50 %
        builder = RunBuilder.of_nodes(folder, ranks)
        builder.steps(1, [step_s] * 40, comm_s=0.125 * (ranks > 1), data_wait_s=0.0)
    found = opened(page=page_of(folder)).execute_script(BOXES, "What was lost")
    (four, *_, half), (two, *_, double) = ([high - low for low, high in boxes] for boxes in found)
    assert four == pytest.approx(two, rel=0.01)
    assert (half / two, double / two) == pytest.approx((0.5, 2.0), rel=0.01)


def test_the_bars_of_the_time_have_the_lengths_of_its_parts(opened: Opener, html: Path) -> None:
    bars = opened().execute_script(BOXES, "Where the time went")[0]
    rows = build(html.parent).rows
    spent = [row.parts_s.get(part, 0.0) for part in PARTS for row in rows if any(row.parts_s.get(part) for row in rows)]
    whole = sum(high - low for low, high in bars[:: len(rows)][: len(spent) // len(rows)])
    for (low, high), (at, seconds) in zip(bars, enumerate(spent), strict=False):
        share = seconds / sum(rows[at % len(rows)].parts_s.values())
        assert (high - low) / whole == pytest.approx(share, abs=0.002)


def test_a_reader_chooses_the_point_whose_ranks_are_shown(opened: Opener) -> None:
    page = opened()

    def shown() -> list[str]:
        return [text for text in texts(page, ".pane") if text]

    assert len(shown()) == 1 and f"{SLOW_RANK} n6" in shown()[0]
    assert f"rank {SLOW_RANK}, n6" in page.execute_script("return document.querySelector('#d0 svg').textContent")
    script = "const i = document.querySelector('#d0 image').getBoundingClientRect(); return i.width"
    assert page.execute_script(script) > 200
    page.execute_script("document.querySelector('label[for=p2]').click()")
    assert len(shown()) == 1 and "Step times after warm-up" in shown()[0] and f"{SLOW_RANK} n6" not in shown()[0]


def test_light_and_dark_have_colors_of_their_own(opened: Opener) -> None:
    page, found = opened(), {}
    style = """const color = (one, name) => getComputedStyle(document.querySelector(one))[name];
    return [color('body', 'backgroundColor'), color('body', 'color'), color('svg text', 'fill')]"""
    for theme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        found[theme] = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in page.execute_script(style)]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert found["light"][0] > 600 > 350 > max(found["light"][1:])
    assert found["dark"][0] < 150 < 400 < min(found["dark"][1:])


def test_the_page_loads_nothing_and_is_in_standards_mode(opened: Opener, html: Path) -> None:
    page = opened()
    loaded = "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
    assert page.execute_script(loaded) == 0
    text = html.read_text()
    assert "<script" not in text and not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert not re.findall(r"url\((?!#)", text) and "@import" not in text
    assert page.execute_script("return document.compatMode") == "CSS1Compat"
