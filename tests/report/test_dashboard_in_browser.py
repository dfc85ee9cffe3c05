"""The Scaling dashboard in a real TensorBoard, opened by a real headless browser."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import JavascriptException, TimeoutException
from selenium.webdriver.support.ui import WebDriverWait

from launch.report import build, write
from launch.runs.tensorboard import EventWriter

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
def logdir(tmp_path_factory: pytest.TempPathFactory, make_run: Any) -> Path:
    """A sweep of three points with curves of their own, the last point crowded, and its report."""
    folder = tmp_path_factory.mktemp("logs") / "quick_test"
    for nodes, time_s in ((1, 1.0), (2, 0.52), (4, 0.32)):
        builder = make_run(folder / f"nodes={nodes}", nodes, nodes, (f"nodes={nodes}",), cores=2)
        builder.attempt().steps(1, [time_s] * 10).event("finished", attempt=1)
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


def fetch(url: str, asked: Any = None) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if asked is None else json.dumps(asked).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with opener.open(request, timeout=PATIENCE_S) as answer:
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


def test_hparams_has_a_row_for_each_point(address: str, logdir: Path) -> None:
    """As the tab asks for them."""
    asked = {"startIndex": 0, "sliceSize": 9, "allowedStatuses": ["STATUS_SUCCESS"], "colParams": []}
    url = f"{address}data/plugin/hparams/session_groups"
    groups = until("the points", lambda: len(found := fetch(url, asked)["sessionGroups"]) == 3 and found)
    told = {
        group["hparams"]["nodes"]: {one["name"]["tag"]: one["value"] for one in group["metricValues"]}
        for group in groups
    }
    rows = {row.nodes: row for row in build(logdir).rows}
    assert told.keys() == rows.keys() == {1, 2, 4}
    for nodes, values in told.items():
        assert values["point/tokens_per_s"] == pytest.approx(rows[nodes].throughput)
        assert values.get("point/efficiency") == pytest.approx(rows[nodes].efficiency)
        assert values["point/loss"] == pytest.approx(0.6)
    assert "point/efficiency" not in told[4], "it is not claimed where ranks shared cores"


def test_images_show_the_figure(browser: webdriver.Chrome, address: str) -> None:
    open_tab(browser, address, "images")
    sizes = until("the figure", lambda: [size for size in page(browser, "image") if size[0] > 1000])
    assert max(size[0] for size in sizes) > 1000
    assert "scaling/figure" in page(browser, "text")


def test_text_shows_the_table(browser: webdriver.Chrome, address: str) -> None:
    open_tab(browser, address, "text")
    texts = until("the table", lambda: "nodes=4" in (found := page(browser, "text")) and found)
    for cell in ("Strong scaling of quick_test with a global batch of 16 sequences", "3,938", "96.2 %", "not claimed"):
        assert cell in texts
