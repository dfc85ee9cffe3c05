"""``hydra/launcher=multinode`` submits to Slurm: Hydra's own suite for launchers, on the sandbox."""

from __future__ import annotations

import pytest
from hydra import version
from hydra.test_utils.launcher_common_tests import LauncherTestSuite

from hydra_plugins.launch_plugin import multinode  # noqa: F401  # registers its keys
from slurm.sandbox.cluster import Cluster

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def _on_slurm(sandbox: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submit from this process to the sandbox, with the version of Hydra that the suite expects."""
    for name, value in sandbox.env.items():
        monkeypatch.setenv(name, value)
    version.setbase("1.1")


@pytest.mark.parametrize(("launcher_name", "overrides"), [("multinode", [])])
class TestLauncher(LauncherTestSuite):
    """Hydra's suite for launchers, unchanged."""
