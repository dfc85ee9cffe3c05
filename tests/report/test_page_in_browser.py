"""The HTML page of a report, opened by a real headless browser at the widths of a desk and of a telephone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from launch.report import build, write
from launch.runs.records import append_records

SLOW_RANK, LATE_S = 5, 0.03
WIDTHS = (1240, 390)
T0 = 1.7e9


def make_sweep(folder: Path, make_run: Any) -> Path:
    """Points of 1, 4 and 8 ranks of a GPT on GPUs; at the largest one rank is late. One point has a name with <."""
    for ranks in (1, 4, 8):
        typed = (f"nodes={ranks}", "name=a<b")
        gpus = {"device": "cuda:0", "device_name": "Some GPU", "extra_rank": {"device_uuid": f"{ranks}-{{rank}}"}}
        built = make_run(folder / f"nodes={ranks}", ranks, ranks, typed, **gpus).attempt()
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
            append_records(
                built.run.metrics(rank),
                [{"step": step, **known, "time": start + 20 + step * step_s} for step in range(1, 41)],
            )
        built.event("finished", attempt=1, time=start + 21 + 40 * step_s)
        built.event("agent_ended", node=0, job="1", time=start + 22 + 40 * step_s, ended_at=start + 22 + 40 * step_s)
    return folder


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory, make_run: Any) -> Path:
    folder = make_sweep(tmp_path_factory.mktemp("page") / "sweep", make_run)
    return next(path for path in write(build(folder)) if path.suffix == ".html")


@pytest.fixture(params=WIDTHS)
def opened(request: pytest.FixtureRequest, browser: webdriver.Chrome, html: Path) -> Iterator[webdriver.Chrome]:
    """The page on a screen of that width; the window itself would not become as narrow as a telephone."""
    screen = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(html.as_uri())
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    """Visible texts of elements."""
    every = f"return [...document.querySelectorAll('{selector}')].filter(one => one.checkVisibility())"
    found = browser.execute_script(f"{every}.map(one => one.innerText ?? one.textContent)")
    return [" ".join(text.split()) for text in found]


def test_the_first_screen_says_how_well_what_was_lost_and_who_is_slow(opened: webdriver.Chrome) -> None:
    shown = dict(zip(texts(opened, ".tile .name"), texts(opened, ".tile b"), strict=True))
    # Of a step of 140 ms, 100 are the eighth part of the work of one rank.
    assert shown["Efficiency at nodes=8"] == "71.4 %"
    assert shown["Most lost at nodes=8"] == "slowest rank of each step"
    assert shown["Slow rank"] == f"rank {SLOW_RANK}"
    assert any("on n6, +30 ms, 21.4 % of the step time" in text for text in texts(opened, ".tile small"))
    first = opened.execute_script("return document.querySelector('.tiles').getBoundingClientRect().bottom")
    assert first < 900, "not on the first screen"


def test_labels_of_any_length_stay_in_their_boxes(tmp_path: Path, make_run: Any, browser: webdriver.Chrome) -> None:
    folder = tmp_path / "sweep"
    for ranks in (1, 2, 4):
        label = (f"data.path=/corpora/{'without_any_break_' * 5}{ranks}", f"nodes={ranks}")
        make_run(folder / f"p{ranks}", ranks, ranks, label).attempt().steps(1, [1.0] * 20, rank_delay=0.25)
    page = next(path for path in write(build(folder)) if path.suffix == ".html")
    screen = {"width": WIDTHS[1], "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())
    script = """return [...document.querySelectorAll('.tile, .card, .tabs > label, h1, h3')].filter(
    one => one.checkVisibility() && one.scrollWidth > one.clientWidth).map(one => one.innerText)"""
    assert browser.execute_script(script) == []
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= WIDTHS[1]


def test_nothing_runs_over_the_edge_of_the_screen(opened: webdriver.Chrome) -> None:
    wide, screen = opened.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert screen in WIDTHS and wide <= screen
    script = """return [...document.querySelectorAll('svg, .bar, .fall, .tile')].filter(one => one.checkVisibility())
    .map(one => one.getBoundingClientRect()).filter(box => box.width < 60 || box.right > window.innerWidth).length"""
    assert opened.execute_script(script) == 0


def test_the_waterfall_falls_from_the_ideal_to_the_efficiency(opened: webdriver.Chrome) -> None:
    falls = [text.replace("−", "-") for text in texts(opened, ".fall")]  # noqa: RUF001
    assert len(falls) == 2 and texts(opened, ".card > h3")[:2] == ["nodes=8", "nodes=4"]
    numbers = [float(value) for value in re.findall(r"(-?\d+\.\d) %", falls[0])]
    assert numbers[0] == 100.0 and numbers[-1] == 71.4 and sum(numbers[:-1]) == pytest.approx(71.4)
    ends = opened.execute_script(
        "return [...document.querySelector('.fall').querySelectorAll('i')].map(i => i.getBoundingClientRect()).map("
        "box => [box.left, box.right])"
    )
    for (low, _), (_, high) in itertools.pairwise(ends[1:-1]):
        assert high == pytest.approx(low, abs=1.6), "each part begins where the one before ends"


def test_all_waterfalls_have_one_scale(tmp_path: Path, make_run: Any, browser: webdriver.Chrome, html: Path) -> None:
    """The ideal is as long at every point, also beside one that gained, whose bars pass it."""
    folder = tmp_path / "sweep"
    for ranks, step_s in ((1, 1.0), (2, 0.25), (4, 0.5)):  # 200 % and 50 %
        builder = make_run(folder / f"nodes={ranks}", ranks, ranks, (f"nodes={ranks}",)).attempt()
        builder.steps(1, [step_s] * 40, comm_s=0.125 * (ranks > 1), data_wait_s=0.0)
    page = next(path for path in write(build(folder)) if path.suffix == ".html")
    browser.get(page.as_uri())
    script = "return [...document.querySelectorAll('.fall')].map(f => [...f.querySelectorAll('i')].map(i => %s))"
    widths = browser.execute_script(script % "i.getBoundingClientRect().width")
    ((_, *_, half), (ideal, *_, double)), ideals = widths, [bars[0] for bars in widths]
    assert ideals == pytest.approx([ideal, ideal])
    assert (half / ideal, double / ideal) == pytest.approx((0.5, 2.0), rel=0.01)


def test_the_parts_of_the_time_add_up_to_100_percent(opened: webdriver.Chrome) -> None:
    script = """const wide = one => one.getBoundingClientRect().width;
    return [...document.querySelectorAll('.bar')].map(bar => [...bar.querySelectorAll('i')].map(
        part => [part.dataset.share, wide(part), wide(bar.lastChild)]))"""
    bars = opened.execute_script(script)
    assert len(bars) == 3
    for parts in bars:
        assert round(sum(float(share) for share, _, _ in parts), 9) == 100.0
        for share, width, whole in parts:
            assert 100 * width / whole == pytest.approx(float(share), abs=0.2)


def test_a_reader_chooses_the_point_whose_ranks_are_shown(opened: webdriver.Chrome) -> None:
    def shown() -> list[str]:
        return [text for text in texts(opened, ".pane") if text]

    assert len(shown()) == 1 and f"{SLOW_RANK} n6" in shown()[0]
    assert f"rank {SLOW_RANK}, n6" in opened.execute_script("return document.querySelector('#d2 svg').textContent")
    size = opened.execute_script(
        "const i = document.querySelector('#d2 image').getBoundingClientRect(); return i.width"
    )
    assert size > 200
    opened.execute_script("document.querySelector('label[for=p0]').click()")
    assert len(shown()) == 1 and "Fewer than two ranks recorded the same steps" in shown()[0]


def test_light_and_dark_have_colors_of_their_own(opened: webdriver.Chrome) -> None:
    found = {}
    for theme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        found[theme] = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in opened.execute_script(style)]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert found["light"][0] > 600 > 150 > found["light"][1]
    assert found["dark"][0] < 150 < 600 < found["dark"][1]


def test_the_page_asks_for_nothing_and_complains_of_nothing(opened: webdriver.Chrome, html: Path) -> None:
    assert (
        opened.execute_script(
            "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
        )
        == 0
    )
    text = html.read_text()
    assert "<script" not in text and not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert "url(" not in text and "@import" not in text
    assert opened.execute_script("return document.compatMode") == "CSS1Compat"
