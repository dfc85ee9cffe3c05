"""Event files and the runs of a report, by the reader of tensorboard, and by a real TensorBoard in a browser."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from selenium import webdriver
from selenium.common.exceptions import JavascriptException, TimeoutException
from selenium.webdriver.support.ui import WebDriverWait
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

from launch.report import build, write
from launch.runs.event_files import TAGS, Curve, EventWriter, record_scalars
from launch.runs.records import StepRecord
from tests.support.run_folders import RunBuilder, read_events, scalars


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [*scalars(folder, tag).items()]


def record(**known: float) -> StepRecord:
    return StepRecord(3, 1, 2.5, 1e-3, 0.7, 2048, (32, 47), 0.25, **known)


def a_png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Figure(figsize=(width / 10, height / 10), dpi=10).savefig(file, format="png")
    return file.getvalue()


def test_a_record_becomes_the_same_tags_everywhere() -> None:
    full = dict.fromkeys(set(TAGS) - {"loss", "lr", "grad_norm", "step_time_s"}, 1.5)
    assert set(record_scalars(record(**full).as_dict())) == set(TAGS.values())
    plain = record_scalars(record().as_dict())
    assert plain == {"train/loss": 2.5, "train/lr": 1e-3, "train/grad_norm": 0.7, "speed/step_time_s": 0.25}


def test_scalars_come_back_with_step_and_time(tmp_path: Path) -> None:
    with EventWriter(tmp_path) as writer:
        for step, value in ((1, 3.0), (2, 2.5), (3, math.inf)):
            writer.scalar("train/loss", value, step, time=1000.0 + step)
    found = read_events(tmp_path).Scalars("train/loss")
    told = [(point.step, point.value, point.wall_time) for point in found]
    assert told == [(1, 3.0, 1001.0), (2, 2.5, 1002.0), (3, math.inf, 1003.0)]


def multiplexer_curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """As ``curve``, by the reader that TensorBoard itself uses where its fast data server is not at hand."""
    found = PluginEventAccumulator(str(folder)).Reload().Tensors(tag)
    return [(point.step, tensor_util.make_ndarray(point.tensor_proto).item()) for point in found]


@pytest.mark.parametrize("reader", [curve, multiplexer_curve])
@pytest.mark.parametrize(
    ("purge_step", "kept"), [(6, [(step, 10.0 + step) for step in range(1, 6)]), (1, []), (None, [])]
)
def test_steps_done_again_after_a_crash_replace_the_old_ones(
    tmp_path: Path, purge_step: int | None, kept: list[tuple[int, float]], reader: Any
) -> None:
    with EventWriter(tmp_path) as first:
        for step in range(1, 9):
            first.scalar("train/loss", 10.0 + step, step)
    [file] = tmp_path.iterdir()
    # The last record was torn by the crash. Files are read in the order of their names, which begin with the time.
    torn = tmp_path / "events.out.tfevents.0000000001.crashed"
    torn.write_bytes(file.read_bytes()[:-3])
    file.unlink()
    with EventWriter(tmp_path, purge_step=purge_step) as second:
        for step in range(6, 8):
            second.scalar("train/loss", 20.0 + step, step)
    assert reader(tmp_path, "train/loss") == [*kept, (6, 26.0), (7, 27.0)]


def test_text_image_and_layout_come_back(tmp_path: Path) -> None:
    png = a_png(70, 30)
    with EventWriter(tmp_path) as writer:
        writer.text("notes", "| a |\n| --- |\n| ü |", step=2)
        writer.image("figure", png, step=4)
        writer.layout({"Scaling": {"Rate": Curve("r", "low", "high"), "Loss": Curve("l")}})
    found = read_events(tmp_path)
    [text] = found.Tensors("notes")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (2, "| a |\n| --- |\n| ü |")
    assert found.SummaryMetadata("notes").plugin_data.plugin_name == "text"
    [image] = found.Images("figure")
    assert (image.step, image.width, image.height, image.encoded_image_string) == (4, 70, 30, png)
    [layout] = found.Tensors("custom_scalars__config__")
    [category] = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
    bands = {chart.title: [(s.value, s.lower, s.upper) for s in chart.margin.series] for chart in category.chart}
    assert bands == {"Rate": [("r", "low", "high")], "Loss": [("l", "l", "l")]}


def test_a_file_starts_with_its_version_and_one_attempt_is_one_file(tmp_path: Path) -> None:
    for _ in range(2):
        EventWriter(tmp_path).close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    for file in files:
        assert b"brain.Event:2" in next(iter(RawEventFileLoader(str(file)).Load()))


# The Scaling dashboard in a real TensorBoard, opened by a real headless browser.


PATIENCE_S = 120
# TensorBoard is built of web components: what they show lies in shadow roots, which ordinary searches do not enter.
WALK = """
function walk(node, wanted) {
  const found = [];
  for (const child of [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...(node.childNodes || [])]) {
    if (child.localName === 'style' || child.localName === 'script') continue;
    const value = wanted(child);
    found.push(...(value ? [value] : []), ...walk(child, wanted));
  }
  return found;
}
const text = node => node.nodeType === 3 && node.data.trim();
const card = node => node.localName === 'tf-custom-scalar-margin-chart-card' && walk(node, text);
const image = node => node.localName === 'img' && [node.naturalWidth, node.naturalHeight];
"""


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three points with curves of their own, the last point crowded, and its report."""
    folder = tmp_path_factory.mktemp("logs") / "quick_test"
    for nodes, time_s in ((1, 1.0), (2, 0.52), (4, 0.32)):
        builder = RunBuilder.of_nodes(folder, nodes, cores=2).steps(1, [time_s] * 10).finished()
        with EventWriter(builder.run.tensorboard) as writer:
            for step in range(1, 11):
                writer.scalar("train/loss", 6.0 / step, step)
    write(build(folder))
    return folder


@pytest.fixture(scope="module")
def address(logdir: Path) -> Iterator[str]:
    """A TensorBoard on a port of the system's choice, once it has read the folder."""
    words = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if url := re.search(r"http://127\.0\.0\.1:\d+/", line):
                    break
            else:
                pytest.fail("TensorBoard did not start:\n" + "".join(said))
            until("the runs", lambda: "Scaling" in fetch(url[0] + "data/runs"))
            yield url[0]
        finally:
            # Not SIGTERM: TensorBoard answers with an exception, which a request that it serves just then swallows.
            process.kill()


def fetch(url: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=PATIENCE_S) as answer:
        return json.load(answer)


def until(what: str, found: Callable[[], Any]) -> Any:
    """Ask again until the answer is true; returns it. A page that is being built may make single questions fail."""
    nothing: Any = None
    wait = WebDriverWait(nothing, PATIENCE_S, 0.25, ignored_exceptions=[JavascriptException])
    return wait.until(lambda _: found(), f"waited for {what}")


def open_tab(browser: webdriver.Chrome, address: str, tab: str) -> None:
    browser.get("about:blank")  # a change of the fragment alone does not load the page again
    browser.get(f"{address}#{tab}")


def page(browser: webdriver.Chrome, what: str) -> list[Any]:
    """All texts, chart cards (as their texts) or images (as their natural sizes) of the page."""
    return list(browser.execute_script(f"{WALK} return walk(document, {what});"))


def legends(browser: webdriver.Chrome) -> dict[str, set[str]]:
    """Title of a chart -> its lines, as the chart's own legend names them, and its complaints."""
    words = ("scaling/", "Missing Tags", "do not match")
    return {title: {t for t in texts if any(w in t for w in words)} for title, *texts in page(browser, "card")}


def test_custom_scalars_show_the_scaling_charts(browser: webdriver.Chrome, address: str) -> None:
    open_tab(browser, address, "custom_scalars")
    expected = {
        "Tokens per second": {"scaling/tokens_per_s (Scaling)", "scaling/tokens_per_s (Scaling/ideal)"},
        "Efficiency": {"scaling/efficiency (Scaling)", "scaling/efficiency (Scaling/ideal)"},
        "Step time in seconds": {"scaling/step_time_s (Scaling)"},
    }
    with contextlib.suppress(TimeoutException):  # what is missing is said by the comparison
        until("the charts", lambda: legends(browser) == expected)
    assert legends(browser) == expected
    texts = page(browser, "text")
    for word in ("Scaling", "Scaling/ideal", *(f"nodes={nodes}/tensorboard" for nodes in (1, 2, 4))):
        assert word in texts, "not among the runs"


def test_images_and_text_show_the_figure_and_the_table(browser: webdriver.Chrome, address: str) -> None:
    open_tab(browser, address, "images")
    until("the figure", lambda: any(width > 1000 for width, _ in page(browser, "image")))
    assert "scaling/figure" in page(browser, "text")
    open_tab(browser, address, "text")
    texts = until("the table", lambda: "nodes=4" in (found := page(browser, "text")) and found)
    for cell in ("Strong scaling of quick_test with a global batch of 16 sequences", "3,938", "96.2 %", "not claimed"):
        assert cell in texts
