"""A sandbox leaves nothing behind, also after a crash, and keeps out of the way of others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.errors import ConfigError
from slurm.sandbox import faults, processes
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.processes import SandboxError, run, wait_until
from slurm.sandbox.state import Settings, directory_tag, load, require

REPOSITORY = Path(__file__).parents[2]
SMALL = Settings(nodes=2, gpus_per_node=0)


@pytest.fixture
def place(namespaces: None) -> Iterator[Cluster]:
    """A sandbox of its own, not up yet."""
    with Cluster(Path(tempfile.mkdtemp(prefix="sandbox-"))) as cluster:
        yield cluster
    if cluster.directory.exists():
        cluster.directory.rmdir()


def network_namespaces() -> set[str]:
    """The network namespaces of all living processes."""
    found = set()
    for pid in processes.all_pids():
        try:
            found.add(str(Path(f"/proc/{pid}/ns/net").readlink()))
        except OSError:
            continue
    return found


def interfaces(cluster: Cluster) -> list[str]:
    """This machine's interfaces that carry the name of a sandbox's directory."""
    links = json.loads(run(["ip", "-json", "link", "show"]))
    return [link["ifname"] for link in links if directory_tag(cluster.directory) in link["ifname"]]


def processes_of(cluster: Cluster) -> list[int]:
    """All living processes with a sandbox's directory in their environment or among their files, jobs included."""
    words = str(cluster.directory)
    return [
        pid
        for pid in processes.all_pids()
        if words in str(processes.environment(pid)) or words in str(processes.open_files(pid))
    ]


def assert_nothing_left(cluster: Cluster, namespaces_used: set[str]) -> None:
    assert not cluster.directory.exists()
    assert interfaces(cluster) == []
    assert processes_of(cluster) == []
    assert not namespaces_used & network_namespaces()
    assert str(cluster.directory) not in Path("/proc/self/mountinfo").read_text()


def namespaces_of(cluster: Cluster) -> set[str]:
    """The network namespaces of a sandbox's nodes."""
    owners = [owner for name, owner in require(cluster.directory).processes.items() if name in cluster.nodes]
    return {str(Path(f"/proc/{owner.pid}/ns/net").readlink()) for owner in owners}


def test_down_leaves_nothing_and_two_sandboxes_share_nothing(sandbox: Cluster, place: Cluster) -> None:
    place.up(SMALL)
    used = namespaces_of(place)
    assert len(used) == 2 and used <= network_namespaces()
    bridge = require(place.directory).bridge
    assert sorted(interfaces(place)) == [bridge, f"{bridge}n1", f"{bridge}n2"]
    addresses = {entry.address for cluster in (sandbox, place) for entry in cluster.status()}
    assert len(addresses) == 6
    here = place.slurm("srun", "--nodes=2", "hostname", "-I").split()
    there = sandbox.slurm("srun", "--nodes=2", "hostname", "-I").split()
    assert len({*here, *there}) == 4
    place.slurm("sbatch", "--output=/dev/null", "--nodes=2", "--wrap", "srun sleep 300 & setsid sleep 300")
    wait_until(lambda: "R" in place.slurm("squeue", "--noheader", "--format=%t"), timeout_s=30, what="the job to run")
    faults.freeze(place, "n2")
    assert place.down()
    assert_nothing_left(place, used)
    assert not place.down()
    sandbox.wait_idle()


def kill_all(cluster: Cluster) -> None:
    """Crash a sandbox: every process gone at once, nobody to clean up."""
    victims = processes_of(cluster)
    assert len(victims) > 4
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_until(lambda: not processes_of(cluster), timeout_s=20, what="the killed processes to be gone")


def test_up_clears_the_remains_of_a_sandbox_that_was_killed(place: Cluster) -> None:
    place.up(SMALL)
    kill_all(place)
    assert len(interfaces(place)) > 0 and place.directory.exists()
    place.up(SMALL)
    assert len(place.slurm("srun", "--nodes=2", "hostname").split()) == 2


def test_up_clears_nodes_whose_controller_died(place: Cluster) -> None:
    place.up(SMALL)
    old = require(place.directory).processes
    processes.send(old["slurmctld"], signal.SIGKILL)
    assert processes.wait_gone(old["slurmctld"], 20) and old["n1"].alive()
    place.up(SMALL)
    assert not any(process.alive() for process in old.values())
    place.wait_idle()


def test_up_clears_what_an_up_that_was_killed_had_built(place: Cluster) -> None:
    command = [sys.executable, "-m", "slurm.sandbox", "up", "--nodes=2", f"--dir={place.directory}"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as half_way:

        def has_a_node() -> bool:
            state = load(place.directory)
            return state is not None and "n1" in state.processes

        wait_until(has_a_node, timeout_s=30, what="the first node to be recorded", interval_s=0.001)
        half_way.kill()
    old = require(place.directory)
    assert not old.started and old.processes["slurmctld"].alive()
    place.up(SMALL)
    assert not any(process.alive() for process in old.processes.values())
    assert len(place.slurm("srun", "--nodes=2", "hostname").split()) == 2


def test_up_refuses_a_directory_that_is_in_use(sandbox: Cluster) -> None:
    with pytest.raises(ConfigError, match="a sandbox is up in"):
        sandbox.up()
    sandbox.wait_idle()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as name:  # short, as sockets would lie in it
        folder = Path(name)
        (folder / "thesis.txt").write_text("three years")
        with pytest.raises(ConfigError, match="files that are no sandbox's"):
            Cluster(folder).up()
        assert not Cluster(folder).down()
        assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_start_that_fails_says_why_and_leaves_nothing(place: Cluster) -> None:
    # slurmd reads the same file, and on a busy machine has ended as well when somebody looks.
    with pytest.raises(SandboxError, match=r"slurmctld(, n1)? ended(.|\n)*NoSuchKey"):
        place.up(Settings(nodes=1, slurm_conf=("NoSuchKey=1",)))
    assert_nothing_left(place, set())


def test_nodes_on_one_host_run_jobs_and_refuse_what_they_cannot_show(slurm_installed: None) -> None:
    with Cluster(Path(tempfile.mkdtemp(prefix="sandbox-"))) as cluster:
        state = cluster.up(Settings(nodes=2, namespaces=False))
        assert state.mode == "one-host" and "--no-namespaces" in state.why_one_host
        show = ["sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"]
        names = cluster.slurm("srun", "--nodes=2", "--gpus-per-node=2", *show).splitlines()
        assert sorted(names) == ["n1 0,1", "n2 0,1"]
        with pytest.raises(ConfigError, match="hosts of their own"):
            faults.power_cut(cluster, "n1")
        cluster.slurm("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=to be resumed")
        faults.heal(cluster, "n1")
        cluster.wait_idle()
        cluster.slurm("sbatch", "--output=/dev/null", "--nodes=2", "--wrap", "setsid sleep 300 & srun sleep 300")
        wait_until(lambda: "R" in cluster.slurm("squeue", "-h", "-o", "%t"), timeout_s=30, what="the job to run")
    assert_nothing_left(cluster, set())


def test_the_log_of_a_program_is_there_once_it_is_started(tmp_path: Path) -> None:
    log, env = tmp_path / "log", dict(os.environ)
    there: list[bool] = []

    def record(process: processes.Process) -> None:
        there.append(log.exists())

    started = processes.start(["true"], log=log, env=env, record=record)
    assert there == [True] and processes.wait_gone(started, 20)
    with pytest.raises(SandboxError, match=r"did not start: .*nowhere/log"):
        processes.start(["true"], log=tmp_path / "nowhere" / "log", env=env, record=record)
    assert there == [True], "what cannot write its log does not run"


def test_a_number_that_was_used_again_is_another_process() -> None:
    this = processes.identify(os.getpid())
    assert this.alive()
    earlier = processes.Process(this.pid, this.start_ticks - 1, this.boot)
    assert not earlier.alive() and not processes.Process(this.pid, this.start_ticks, "another boot").alive()
    assert not processes.send(earlier, signal.SIGKILL)
    processes.end(earlier, grace_s=1.0)
