"""A sandbox cluster of four nodes, started once for all tests that want one; skips where the machine cannot have it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.sandbox import state as packages
from slurm.sandbox.cluster import Cluster, heal
from slurm.sandbox.state import Settings

# A lost node is DOWN after about 15 s with these, against 30 s with the sandbox's own. Runs have 20 s to save and leave
# when they are told to, as two cores are shared by all that the tests start.
QUICK = ("SlurmdTimeout=10", "MessageTimeout=5", "TCPTimeout=1", "KillWait=20", "MaxArraySize=4")


@pytest.fixture(scope="session")
def slurm_installed() -> None:
    """Skip where programs of the sandbox are not installed."""
    lacking = packages.missing_packages(packages.PROGRAMS)
    if lacking:
        pytest.skip(f"needs apt-get install --no-install-recommends {' '.join(lacking)}")


@pytest.fixture(scope="session")
def namespaces(slurm_installed: None) -> None:
    """Skip where nodes cannot be hosts of their own."""
    # The name is this process's own, so that two test runs on one machine do not meet.
    why = packages.why_no_namespaces(f"ssbt{Path('/proc/self').readlink()}")
    if why:
        pytest.skip(f"needs root and the right to make namespaces: {why}")


@pytest.fixture(scope="session")
def shared_sandbox(namespaces: None) -> Iterator[Cluster]:
    """The cluster behind ``sandbox``, which is what a test asks for."""
    # Not pytest's own temporary folder, which may be too deep for a Unix socket.
    with Cluster(Path(tempfile.mkdtemp(prefix="sandbox-"))) as cluster:
        cluster.up(Settings(slurm_conf=QUICK))
        yield cluster


@pytest.fixture
def sandbox(shared_sandbox: Cluster) -> Iterator[Cluster]:
    """A cluster with nothing to do: n1 to n4, 8 CPUs and 2 fake GPUs each. What a test breaks is mended after it."""
    yield shared_sandbox
    shared_sandbox.slurm("scancel", "--me")
    for entry in shared_sandbox.status():
        in_service = entry.slurm.word in ("idle", "alloc", "mix", "comp")
        if not (entry.power and entry.link and not entry.frozen and in_service):
            heal(shared_sandbox, entry.name)
    shared_sandbox.wait_idle(timeout_s=180)
