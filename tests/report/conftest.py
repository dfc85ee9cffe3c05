"""A sweep with known numbers, and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from tests.support.run_folders import RunBuilder

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --no-proxy-server --window-size=1400,1000"
)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three points of 1, 2 and 4 ranks, 2048 tokens a step, with medians of 1.0, 0.52 and 0.32 s; the last one crowded.

    The first five steps of each take ten times as long and belong to the warm-up.
    """
    folder = tmp_path / "quick_test"
    for nodes, median in ((1, 1.0), (2, 0.52), (4, 0.32)):
        spread = [median * factor for factor in (0.98, 0.99, 1.0, 1.01, 1.02)]
        RunBuilder.of_nodes(folder, nodes, cores=2).steps(1, [10 * median] * 5 + spread).finished()
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A headless Chromium, started once."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium or chromedriver on this machine: apt-get install chromium chromium-driver")
    options = Options()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()
