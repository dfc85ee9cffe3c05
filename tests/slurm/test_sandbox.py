"""The sandbox as a user meets it: nodes that are hosts, faults that do what their names say, and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from launch.errors import ConfigError
from slurm.sandbox import cluster as faults
from slurm.sandbox.__main__ import main
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.state import (
    MAX_DIRECTORY_LENGTH,
    WITH_LOSS,
    Process,
    SandboxError,
    SandboxState,
    Settings,
    check_settings,
    load_state,
    missing_packages,
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
        refused(Cluster(folder).up, said="files that belong to no sandbox")
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


# Faults do on the nodes what their names say, Slurm notices, and heal undoes them.


# Waits for one connection, then says how many bytes arrived in how many seconds.
RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
connection, _ = server.accept()
start, count = time.monotonic(), 0
while data := connection.recv(65536):
    count += len(data)
print(count, time.monotonic() - start)
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    connection.sendall(bytes(int(sys.argv[3])))
"""
# A datagram server counts until it is told the end over and over, because that may be lost too.
COUNT = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE: room for all, however late this process runs
server.bind((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
seen = set()
while (data := server.recv(64)) != b"end":
    seen.add(data)
print(len(seen))
"""
SCATTER = """
import socket, sys, time
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.connect((sys.argv[1], int(sys.argv[2])))
for number in range(int(sys.argv[3])):
    sender.send(str(number).encode())
    if number % 50 == 49:
        time.sleep(0.005)
for _ in range(40):
    try:
        sender.send(b"end")
    except ConnectionRefusedError:
        break
    time.sleep(0.02)
"""
CONNECT = """
import socket, sys, time
start = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 9), timeout=5)
except ConnectionRefusedError:
    pass
print(1000 * (time.monotonic() - start))
"""


@pytest.fixture
def free_links(sandbox: Cluster) -> Iterator[None]:
    """Take the limits off the cables after a test; the rest the sandbox's fixture mends."""
    yield
    for entry in sandbox.status():
        if entry.power:
            faults.link(sandbox, entry.name)


def on_node(sandbox: Cluster, node: str, script: str, *args: str) -> subprocess.Popen[str]:
    """Start a Python script in a node's network, without Slurm in between."""
    inside = f"--net=/proc/{require_state(sandbox.directory).processes[node].pid}/ns/net"
    command = ["nsenter", inside, sys.executable, "-c", script, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def transfer(sandbox: Cluster, server: str, client: str, count: int) -> str:
    """Let ``client`` run against ``server`` between n1 and n2; the server's last words."""
    address = require_state(sandbox.directory).nodes["n1"]
    with on_node(sandbox, "n1", server, address) as receiver:
        assert receiver.stdout is not None
        port = receiver.stdout.readline().strip()
        with on_node(sandbox, "n2", client, address, port, str(count)) as sender:
            assert sender.wait(60) == 0
        return receiver.communicate(timeout=60)[0]


def round_trip_ms(sandbox: Cluster, source: str, target: str) -> float:
    """Seconds that a refused connection takes between two nodes, the second time (the first asks for the address)."""
    address = require_state(sandbox.directory).nodes[target]
    for _ in range(2):
        with on_node(sandbox, source, CONNECT, address) as attempt:
            words = attempt.communicate(timeout=30)[0]
    return float(words)


def wait_down(sandbox: Cluster, node: str) -> None:
    wait_until(lambda: sandbox.slurm_states()[node].word == "down*", timeout_s=60, what=f"{node} to be down")


def status(sandbox: Cluster, node: str) -> tuple[bool, bool, bool]:
    """A node's power, link, and whether it is frozen."""
    entry = next(entry for entry in sandbox.status() if entry.name == node)
    return entry.power, entry.link, entry.frozen


def start_ticking(sandbox: Cluster, node: str, path: Path) -> str:
    """Start a job on a node that appends a letter to a file ten times a second; its id, once it ticks."""
    script = f"while :; do printf x >> {path}; sleep 0.1; done"
    options = ["--parsable", "--no-requeue", "--output=/dev/null", f"--nodelist={node}"]
    job = sandbox.slurm("sbatch", *options, "--wrap", script).strip()
    wait_until(lambda: path.exists() and path.stat().st_size > 0, timeout_s=30, what="the job to tick")
    return job


def ticks(path: Path, *, within_s: float = 1.0) -> bool:
    """Tell whether the file grows."""
    size, deadline = path.stat().st_size, time.monotonic() + within_s
    while time.monotonic() < deadline:
        if path.stat().st_size > size:
            return True
        time.sleep(0.05)
    return False


def test_a_node_without_power_and_one_without_a_link_are_called_down(sandbox: Cluster, tmp_path: Path) -> None:
    dead, alone = tmp_path / "dead", tmp_path / "alone"
    start_ticking(sandbox, "n3", dead)
    job = start_ticking(sandbox, "n2", alone)
    owner = require_state(sandbox.directory).processes["n3"]
    inside = psutil.Process(owner.pid).children()
    faults.power_cut(sandbox, "n3")
    faults.cut_link(sandbox, "n2")
    assert not owner.find() and inside and not any(process.is_running() for process in inside)
    assert not ticks(dead)
    assert status(sandbox, "n3") == (False, False, False)
    assert status(sandbox, "n2") == (True, False, False)
    refused(faults.cut_link, sandbox, "n3", said="which is off")
    wait_down(sandbox, "n3")
    wait_down(sandbox, "n2")
    assert ticks(alone, within_s=30), "the job's processes should not have noticed"
    faults.heal(sandbox, "n3")
    faults.heal(sandbox, "n2")
    sandbox.wait_idle(timeout_s=60)
    assert sandbox.slurm("srun", "--nodelist=n3", "hostname").strip() == "n3"
    wait_until(lambda: not ticks(alone), timeout_s=30, what=f"Slurm to end what was left of job {job}")


def test_a_frozen_node_stops_and_goes_on(sandbox: Cluster, tmp_path: Path) -> None:
    job = start_ticking(sandbox, "n4", tmp_path / "ticks")
    faults.freeze(sandbox, "n4")
    assert status(sandbox, "n4") == (True, True, True)
    assert not ticks(tmp_path / "ticks")
    assert round_trip_ms(sandbox, "n1", "n4") < 1000, "its kernel should still answer"
    faults.heal(sandbox, "n4")
    assert status(sandbox, "n4") == (True, True, False)
    assert ticks(tmp_path / "ticks", within_s=10)
    sandbox.slurm("scancel", job)


@pytest.mark.usefixtures("free_links")
def test_the_command_line_says_what_it_did(sandbox: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> list[str]:
        assert main([*words, "--dir", str(sandbox.directory)]) == 0
        return capsys.readouterr().out.splitlines()

    undo = f"to undo it: python -m slurm.sandbox heal n3{sandbox.option}"
    assert said("power-cut", "n3") == ["n3 has no power", undo]
    assert said("freeze", "n4")[0] == "the processes of n4 are stopped, and its link is up"
    assert said("cut-link", "n2")[0] == "n2 has no link, and its processes run on"
    assert said("link", "n1", "--latency-ms", "5") == ["the link of n1, each direction: 5 ms of delay"]
    sandbox.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=a test")
    refused(faults.freeze, sandbox, "n5", said="one of n1, n2, n3, n4")
    for option, value in {"loss_percent": 101, "bandwidth_mbit": 0}.items():
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} {value}"):
            faults.link(sandbox, "n1", **{option: value})
    sound = "n1: nothing to heal; its link has no limits"
    assert said("heal") == [sound, "n2: link up again, drained no more", "n3: switched on", "n4: processes continue"]
    assert said("heal", "n1") == [sound]


def test_a_drained_node_is_named_with_the_reason_and_resumed(sandbox: Cluster) -> None:
    sandbox.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=Kill task failed")
    fix = f"heal --dir {sandbox.directory} n2"
    with pytest.raises(SandboxError, match=rf"n1 idle, n2 drain \(Kill task failed\), .* to resume: .* {fix}"):
        sandbox.wait_idle(timeout_s=0)
    assert [entry.name for entry in sandbox.status() if entry.slurm.is_drained] == ["n2"]
    faults.power_cut(sandbox, "n2")
    faults.heal(sandbox, "n2")
    sandbox.wait_idle(timeout_s=30)
    assert sandbox.slurm("srun", "--nodelist=n2", "hostname").strip() == "n2"


def mbit_per_s(sandbox: Cluster) -> float:
    """Rate of a transfer from n2 to n1: lower on a busy machine, and never higher than the link lets through."""
    count, seconds = transfer(sandbox, RECEIVE, SEND, 10_000_000).split()
    assert int(count) == 10_000_000
    return 8 * int(count) / 1e6 / float(seconds)


@pytest.mark.usefixtures("free_links")
def test_bandwidth_is_what_was_asked_for(sandbox: Cluster) -> None:
    faults.link(sandbox, "n1", bandwidth_mbit=40)
    # tbf counts the frames' headers too, 4 to 5 percent; the bucket is full at the start, and is 0.2 MB here.
    assert mbit_per_s(sandbox) < 42
    wait_until(lambda: 25 < mbit_per_s(sandbox) < 42, timeout_s=120, what="a transfer at the rate that is let through")
    faults.link(sandbox, "n1")
    wait_until(lambda: mbit_per_s(sandbox) > 80, timeout_s=120, what="a transfer without a limit")


@pytest.mark.usefixtures("free_links")
def test_packets_are_lost_as_often_as_was_asked_for(sandbox: Cluster) -> None:
    missing_packages(WITH_LOSS) and pytest.skip("needs apt-get install nftables")
    faults.link(sandbox, "n1", loss_percent=30)
    # Five standard deviations of a binomial with n=2000 and p=0.7 are 102.
    assert 1298 < int(transfer(sandbox, COUNT, SCATTER, 2000)) < 1502


@pytest.mark.usefixtures("free_links")
def test_a_delay_holds_for_each_direction_together_with_a_bandwidth(sandbox: Cluster) -> None:
    faults.link(sandbox, "n1", latency_ms=20, bandwidth_mbit=200)
    assert round_trip_ms(sandbox, "n2", "n1") >= 40
    # Slurm's own traffic takes the same way.
    assert sandbox.slurm("srun", "--nodelist=n1", "hostname").strip() == "n1"
    assert mbit_per_s(sandbox) < 210
    faults.link(sandbox, "n1")
    # A busy machine may take its time for one of them, but not for each.
    wait_until(lambda: round_trip_ms(sandbox, "n2", "n1") < 40, timeout_s=60, what="the delay to be gone")
