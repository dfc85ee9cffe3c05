"""The sandbox as a user meets it: nodes that are hosts, partitions that preempt each other, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from slurm.sandbox import cluster as faults
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.state import (
    MAX_DIRECTORY_LENGTH,
    Process,
    SandboxError,
    SandboxState,
    Settings,
    check_settings,
    load_state,
    require_state,
    run_program,
    wait_until,
)
from tests.support.commands import ROOT
from tests.support.planning import refused

SMALL = Settings(nodes=2, gpus_per_node=0)


def command_line(*args: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m slurm.sandbox`` as a user would."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"PATH": path} if path is not None else {})
    command = [sys.executable, "-m", "slurm.sandbox", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd="/", check=False)


def test_nodes_have_names_addresses_and_shared_memory_of_their_own(sandbox: Cluster) -> None:
    script = "echo $(hostname) $(hostname -I) $(ls /sys/class/net) $(getent hosts n3 | cut -d' ' -f1); "
    script += "touch /dev/shm/$(hostname); echo shm $(ls /dev/shm)"
    lines = sandbox.slurm("srun", "--nodes=2", "--nodelist=n1,n2", "sh", "-c", script).splitlines()
    address = {entry.name: entry.address for entry in sandbox.status()}
    own = [f"{name} {address[name]} eth0 lo {address['n3']}" for name in ("n1", "n2")]
    assert sorted(lines) == sorted([*own, "shm n1", "shm n2"])
    assert not Path("/dev/shm/n1").exists()


def test_gpus_cpus_and_memory_are_those_asked_for_and_no_more(sandbox: Cluster) -> None:
    show = ["sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $SLURM_CPUS_PER_TASK"]
    sizes = ("--gpus-per-node=2", "--cpus-per-task=8", "--mem=256G")
    both = sandbox.slurm("srun", "--nodes=2", "--nodelist=n1,n2", *sizes, *show).splitlines()
    assert sorted(both) == ["n1 0,1 8", "n2 0,1 8"]
    with pytest.raises(SandboxError, match=r"not available|can not be satisfied"):
        sandbox.slurm("srun", "--gpus-per-node=3", "true")


def test_a_batch_job_finds_the_cluster_without_the_users_environment(sandbox: Cluster, tmp_path: Path) -> None:
    script = "unset SLURM_CONF; /usr/bin/squeue --noheader --format=%N --jobs=$SLURM_JOB_ID"
    output = tmp_path / "out"
    sandbox.slurm("sbatch", "--export=NONE", f"--output={output}", "--wrap", script)
    wait_until(lambda: output.exists() and output.read_text().endswith("\n"), timeout_s=30, what="the job's output")
    assert output.read_text().strip() in sandbox.nodes


def test_what_a_job_leaves_behind_ends_with_it(sandbox: Cluster, tmp_path: Path) -> None:
    def left() -> list[int]:
        found = psutil.process_iter(["environ"])
        return [process.pid for process in found if (process.info["environ"] or {}).get("LEFT_BY") == str(tmp_path)]

    there = tmp_path / "there"
    orphan = f"setsid sh -c 'touch {there}; exec sleep 300' & while [ ! -e {there} ]; do sleep 0.1; done"
    options = ["--parsable", f"--export=ALL,LEFT_BY={tmp_path}", "--output=/dev/null", "--chdir=/"]
    job = sandbox.slurm("sbatch", *options, "--wrap", orphan).strip()
    show = ("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    wait_until(lambda: sandbox.slurm(*show).strip() == "COMPLETED", timeout_s=30, what="the end of the job")
    assert there.exists() and left() == []


def test_the_command_line_from_up_to_down(namespaces: None) -> None:
    with Cluster(Path(tempfile.mkdtemp(prefix="sandbox-"))) as cluster:
        where = f"--dir={cluster.directory}"
        up = command_line("up", where, "--nodes=1", "--partitions", "short:MaxTime=5", "long", "--set", "KillWait=7")
        assert up.returncode == 0, up.stderr
        assert f"export SLURM_CONF={cluster.directory}/etc/slurm.conf" in up.stdout
        assert cluster.slurm("sinfo", "--noheader", "--format=%P %l").splitlines() == ["short* 5:00", "long infinite"]
        assert "KillWait                = 7" in cluster.slurm("scontrol", "show", "config")
        assert " idle" in command_line("status", where).stdout
        assert command_line("power-cut", where, "n1").returncode == 0
        assert " off " in command_line("status", where).stdout
        refused = command_line("freeze", where, "n1")
        assert refused.returncode == 2 and "type next: python -m slurm.sandbox heal n1" in refused.stderr
        assert command_line("heal", where).returncode == 0, "all nodes, where none is named"
        cluster.wait_idle()
        assert command_line("preempt", where, "12345").returncode == 2
        assert command_line("down", where).returncode == 0 and not cluster.directory.exists()
        assert command_line("status", where).returncode == 3
        again = command_line("down", where)
        assert again.returncode == 0 and "nothing is up" in again.stdout


def test_missing_packages_are_named_with_the_command_and_nothing_is_started(tmp_path: Path) -> None:
    # What lies in /usr/sbin is found without PATH; the clients are not.
    there = Path(tempfile.gettempdir()) / f"sandbox-{os.getpid()}-missing"  # short, as sockets would lie in it
    done = command_line("up", "--dir", str(there), path=str(tmp_path))
    assert done.returncode == 2
    command = [line for line in done.stderr.splitlines() if "apt-get install --no-install-recommends" in line]
    assert len(command) == 1 and "slurm-client" in command[0].split()
    assert not there.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        Settings(nodes=0),
        Settings(nodes=201),
        Settings(partitions=()),
        Settings(partitions=("low", "low")),
        Settings(partitions=("low high",)),
        Settings(slurm_conf=("KillWait",)),
        Settings(slurm_conf=("KillWait=5\nSlurmUser=root",)),
    ],
)
def test_impossible_settings_are_refused(wrong: Settings) -> None:
    check_settings(Settings(), Path("/" + "d" * (MAX_DIRECTORY_LENGTH - 1)))
    refused(check_settings, wrong, Path("/tmp/sandbox"))
    refused(check_settings, Settings(), Path("/" + "d" * MAX_DIRECTORY_LENGTH), said="bytes")


def test_the_users_lines_replace_those_of_the_sandbox() -> None:
    asked = Settings(
        nodes=1, partitions=("short:maxtime=5,Default=NO", "long"), slurm_conf=("killwait=30", "Epilog=/x")
    )
    state = SandboxState(Path("/s"), asked, "10.0.0.1", 7, {"n1": "10.0.0.2"})
    lines = faults.filled("slurm.conf", state).splitlines()
    assert [line for line in lines if line.lower().startswith("killwait")] == ["killwait=30"]
    assert [line for line in lines if line.startswith("Epilog")] == ["Epilog=/x"]
    words = [line.split() for line in lines if line.startswith("Partition")]
    short, long = ({key.lower(): value for key, _, value in (word.partition("=") for word in line)} for line in words)
    assert (short["maxtime"], short["default"], short["preemptmode"]) == ("5", "NO", "REQUEUE")
    assert int(long["prioritytier"]) > int(short["prioritytier"]) and long["preemptmode"] == "OFF"


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
    for pid in psutil.pids():
        with suppress(OSError):
            found.add(str(Path(f"/proc/{pid}/ns/net").readlink()))
    return found


def interfaces(cluster: Cluster) -> list[str]:
    """This machine's interfaces that carry the name of a sandbox's directory."""
    links = json.loads(run_program(["ip", "-json", "link", "show"]))
    tag = SandboxState(cluster.directory, SMALL).bridge.removeprefix("ssb")
    return [link["ifname"] for link in links if tag in link["ifname"]]


def processes_of(cluster: Cluster) -> list[int]:
    """All living processes with a sandbox's directory in their environment or among their files, jobs included."""
    found = psutil.process_iter(["environ", "open_files"])
    return [process.pid for process in found if str(cluster.directory) in str(process.info)]


def assert_nothing_left(cluster: Cluster, namespaces_used: set[str]) -> None:
    assert not cluster.directory.exists()
    assert interfaces(cluster) == []
    assert processes_of(cluster) == []
    assert not namespaces_used & network_namespaces()
    assert str(cluster.directory) not in Path("/proc/self/mountinfo").read_text()


@contextmanager
def namespaces_of(cluster: Cluster) -> Iterator[set[str]]:
    """The network namespaces of a sandbox's nodes, held open so that no later namespace gets one of their numbers."""
    owners = [owner for name, owner in require_state(cluster.directory).processes.items() if name in cluster.nodes]
    paths = [Path(f"/proc/{owner.pid}/ns/net") for owner in owners]
    with ExitStack() as held:
        for path in paths:
            held.enter_context(path.open())
        yield {str(path.readlink()) for path in paths}


def test_down_leaves_nothing_and_two_sandboxes_share_nothing(sandbox: Cluster, place: Cluster) -> None:
    place.up(SMALL)
    with namespaces_of(place) as used:
        assert len(used) == 2 and used <= network_namespaces()
        bridge = require_state(place.directory).bridge
        assert sorted(interfaces(place)) == [bridge, f"{bridge}n1", f"{bridge}n2"]
        addresses = {entry.address for cluster in (sandbox, place) for entry in cluster.status()}
        assert len(addresses) == 6
        here = place.slurm("srun", "--nodes=2", "hostname", "-I").split()
        there = sandbox.slurm("srun", "--nodes=2", "hostname", "-I").split()
        assert len({*here, *there}) == 4
        place.slurm("sbatch", "--output=/dev/null", "--nodes=2", "--wrap", "srun sleep 300 & setsid sleep 300")
        wait_until(
            lambda: "R" in place.slurm("squeue", "--noheader", "--format=%t"), timeout_s=30, what="the job to run"
        )
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
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(cluster), timeout_s=20, what="the killed processes to be gone")


def test_up_clears_what_a_killed_up_had_built_and_the_remains_of_a_killed_sandbox(place: Cluster) -> None:
    command = [sys.executable, "-m", "slurm.sandbox", "up", "--nodes=2", f"--dir={place.directory}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as half_way:

        def has_a_node() -> bool:
            state = load_state(place.directory)
            return state is not None and "n1" in state.processes

        wait_until(has_a_node, timeout_s=30, what="the first node to be recorded")
        half_way.kill()
    old = require_state(place.directory)
    assert not old.started and old.find("slurmctld")
    place.up(SMALL)
    assert not any(map(old.find, old.processes))
    kill_all(place)
    assert len(interfaces(place)) > 0 and place.directory.exists()
    place.up(SMALL)
    assert len(place.slurm("srun", "--nodes=2", "hostname").split()) == 2


def test_up_refuses_a_directory_that_is_in_use(sandbox: Cluster) -> None:
    refused(sandbox.up, said="a sandbox is up in")
    sandbox.wait_idle()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as name:  # short, as sockets would lie in it
        folder = Path(name)
        (folder / "thesis.txt").write_text("three years")
        refused(Cluster(folder).up, said="files that are no sandbox's")
        assert not Cluster(folder).down()
        assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_start_that_fails_says_why_and_leaves_nothing(place: Cluster) -> None:
    # slurmd reads the same file, and on a busy machine has ended as well when somebody looks.
    with pytest.raises(SandboxError, match=r"slurmctld(, n1)? ended(.|\n)*NoSuchKey"):
        place.up(Settings(nodes=1, slurm_conf=("NoSuchKey=1",)))
    assert_nothing_left(place, set())


def test_a_number_that_was_used_again_is_another_process() -> None:
    started = psutil.Process().create_time()
    assert Process(os.getpid(), started).find() == psutil.Process()
    assert Process(os.getpid(), started - 60).find() is None
