"""``hydra/launcher=multinode`` for any Hydra app: Hydra's own suites for launchers, and an app of a user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import version
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite

from hydra_plugins.launch_plugin.multinode import MultinodeLauncher


@pytest.fixture(autouse=True)
def _as_hydra_begins() -> None:
    """Hydra's suites expect the version of a fresh process; other tests of this process have set another."""
    version.setbase("1.1")


LOCAL = [("multinode_local", []), ("multinode", [])]


def test_hydra_discovers_the_launcher() -> None:
    assert MultinodeLauncher.__name__ in [found.__name__ for found in Plugins.instance().discover(Launcher)]


@pytest.mark.parametrize(("launcher_name", "overrides"), LOCAL[:1])
class TestLauncher(LauncherTestSuite):
    """Hydra's suite for launchers, unchanged."""


@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=multinode_local"])])
class TestIntegration(IntegrationTestSuite):
    """Hydra's suite for apps, unchanged."""


APP = """
import hydra

@hydra.main(version_base=None, config_path=None)
def main(config):
    print("it runs")

main()
"""


@pytest.mark.parametrize("key", ["submitit_folder=logs", "gpus_per_task=1"])
def test_a_key_of_submitit_without_a_counterpart_is_refused(key: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    words = [sys.executable, "app.py", "-m", "hydra/launcher=multinode_local", f"hydra.launcher.{key}"]
    told = subprocess.run(words, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert told.returncode != 0 and f"found: hydra.launcher.{key}" in told.stdout and "type next:" in told.stdout
    assert [*tmp_path.rglob("launch")] == [] and "it runs" not in told.stdout
