"""The sandbox as a user meets it: nodes that are hosts, Slurm's commands, partitions that preempt each other."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch.errors import ConfigError
from slurm.sandbox import configuration, faults, processes
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.processes import SandboxError, wait_until
from slurm.sandbox.state import MAX_DIRECTORY_LENGTH, Endpoint, Settings, State, check

REPOSITORY = Path(__file__).parents[2]


def command_line(*args: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m slurm.sandbox`` as a user would."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)} | ({"PATH": path} if path is not None else {})
    command = [sys.executable, "-m", "slurm.sandbox", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd="/", check=False)


def test_every_node_is_idle_and_status_says_so(sandbox: Cluster) -> None:
    assert [entry.name for entry in sandbox.status()] == ["n1", "n2", "n3", "n4"]
    sandbox.wait_idle()
    assert all(entry.is_sound for entry in sandbox.status())
    printed = command_line("status", "--dir", str(sandbox.directory))
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.count("idle") == 4 and f"SLURM_CONF={sandbox.env['SLURM_CONF']}" in printed.stdout


def test_nodes_have_names_addresses_and_shared_memory_of_their_own(sandbox: Cluster) -> None:
    script = "echo $(hostname) $(hostname -I) $(ls /sys/class/net) $(getent hosts n3 | cut -d' ' -f1); "
    script += "touch /dev/shm/$(hostname); echo shm $(ls /dev/shm)"
    lines = sandbox.slurm("srun", "--nodes=2", "--nodelist=n1,n2", "sh", "-c", script).splitlines()
    address = {entry.name: entry.address for entry in sandbox.status()}
    own = [f"{name} {address[name]} eth0 lo {address['n3']}" for name in ("n1", "n2")]
    assert sorted(lines) == sorted([*own, "shm n1", "shm n2"])
    assert not Path("/dev/shm/n1").exists()


def test_gpus_are_handed_out_and_no_more_than_there_are(sandbox: Cluster) -> None:
    show = ["sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"]
    both = sandbox.slurm("srun", "--nodes=2", "--nodelist=n1,n2", "--gpus-per-node=2", *show).splitlines()
    assert sorted(both) == ["n1 0,1", "n2 0,1"]
    with pytest.raises(SandboxError, match="Requested node configuration is not available"):
        sandbox.slurm("srun", "--gpus-per-node=3", *show)


def test_cpus_and_memory_are_those_asked_for_whatever_the_machine_has(sandbox: Cluster) -> None:
    shown = sandbox.slurm("srun", "--cpus-per-task=8", "--mem=256G", "sh", "-c", "echo $SLURM_CPUS_PER_TASK")
    assert shown.strip() == "8"
    for too_much in ("--cpus-per-task=9", "--mem=257G"):
        with pytest.raises(SandboxError, match=r"not available|can not be satisfied"):
            sandbox.slurm("srun", too_much, "true")


def test_a_batch_job_finds_the_cluster_without_the_users_environment(sandbox: Cluster, tmp_path: Path) -> None:
    script = "unset SLURM_CONF; /usr/bin/squeue --noheader --format=%N --jobs=$SLURM_JOB_ID"
    output = tmp_path / "out"
    sandbox.slurm("sbatch", "--export=NONE", f"--output={output}", "--wrap", script)
    wait_until(lambda: output.exists() and output.read_text().endswith("\n"), timeout_s=30, what="the job's output")
    assert output.read_text().strip() in sandbox.nodes


def test_what_a_job_leaves_behind_ends_with_it(sandbox: Cluster, tmp_path: Path) -> None:
    def left() -> list[int]:
        return [pid for pid in processes.all_pids() if processes.environment(pid).get("LEFT_BY") == str(tmp_path)]

    there = tmp_path / "there"
    orphan = f"setsid sh -c 'touch {there}; exec sleep 300' & while [ ! -e {there} ]; do sleep 0.1; done"
    options = ["--parsable", f"--export=ALL,LEFT_BY={tmp_path}", "--output=/dev/null", "--chdir=/"]
    job = sandbox.slurm("sbatch", *options, "--wrap", orphan).strip()
    wait_until(lambda: dict(sandbox_job_states(sandbox))[job] == "COMPLETED", timeout_s=30, what="the end of the job")
    assert there.exists() and left() == []


def test_a_job_in_high_requeues_one_in_low(sandbox: Cluster, tmp_path: Path) -> None:
    sandbox.slurm("scontrol", "update", "PartitionName=low", "GraceTime=0")
    output = tmp_path / "out"
    options = ["--parsable", "--requeue", "--open-mode=append", f"--output={output}", "--nodelist=n1"]
    script = "echo start ${SLURM_RESTART_COUNT:-0}; [ ${SLURM_RESTART_COUNT:-0} -gt 0 ] || sleep 300"
    job = sandbox.slurm("sbatch", *options, "--wrap", script).strip()
    try:
        wait_until(lambda: output.exists() and "start 0" in output.read_text(), timeout_s=30, what="the job to start")
        high = faults.preempt(sandbox, job, seconds=0)
        wait_until(lambda: "start 1" in output.read_text(), timeout_s=60, what="the job to start again")
        states = dict(sandbox_job_states(sandbox))
        assert states[high] == "COMPLETED"
        with pytest.raises(ConfigError, match="does not run"):
            wait_until(lambda: dict(sandbox_job_states(sandbox))[job] == "COMPLETED", timeout_s=30, what="its end")
            faults.preempt(sandbox, job)
    finally:
        sandbox.slurm("scontrol", "update", "PartitionName=low", "GraceTime=10")
        sandbox.slurm("scancel", job)


def sandbox_job_states(sandbox: Cluster) -> list[tuple[str, str]]:
    """The id and the state of every job that Slurm remembers."""
    lines = sandbox.slurm("squeue", "--noheader", "--states=all", "--format=%i %T").splitlines()
    return [(line.split()[0], line.split()[1]) for line in lines]


def test_the_command_line_from_up_to_down(namespaces: None) -> None:
    with Cluster(Path(tempfile.mkdtemp(prefix="sandbox-"))) as cluster:
        where = f"--dir={cluster.directory}"
        up = command_line("up", where, "--nodes=1", "--partitions", "short:MaxTime=5", "long", "--set", "KillWait=7")
        assert up.returncode == 0, up.stderr
        assert f"export SLURM_CONF={cluster.directory}/etc/slurm.conf" in up.stdout
        assert cluster.slurm("sinfo", "--noheader", "--format=%P %l").splitlines() == ["short* 5:00", "long infinite"]
        assert "KillWait                = 7" in cluster.slurm("scontrol", "show", "config")
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
        Settings(cpus_per_node=0),
        Settings(gpus_per_node=-1),
        Settings(partitions=()),
        Settings(partitions=("low", "low")),
        Settings(partitions=("low:MaxTime",)),
        Settings(partitions=("low high",)),
        Settings(cluster_name="Beta"),
        Settings(accounting=True, join="/tmp"),
        Settings(slurm_conf=("KillWait",)),
        Settings(slurm_conf=("KillWait=5\nSlurmUser=root",)),
    ],
)
def test_impossible_settings_are_refused(wrong: Settings) -> None:
    check(Settings(), Path("/tmp/sandbox"))
    with pytest.raises(ConfigError):
        check(wrong, Path("/tmp/sandbox"))


def test_a_directory_too_deep_for_a_socket_is_refused() -> None:
    check(Settings(), Path("/" + "d" * (MAX_DIRECTORY_LENGTH - 1)))
    with pytest.raises(ConfigError, match="bytes"):
        check(Settings(), Path("/" + "d" * MAX_DIRECTORY_LENGTH))


def test_the_users_lines_replace_those_of_the_sandbox() -> None:
    asked = Settings(
        nodes=1, partitions=("short:maxtime=5,Default=NO", "long"), slurm_conf=("killwait=30", "Epilog=/x")
    )
    state = State(Path("/s"), asked, "namespaces", "", Endpoint("10.0.0.1", 7), {"n1": Endpoint("10.0.0.2", 8)})
    lines = configuration.slurm_conf(state).splitlines()
    assert [line for line in lines if line.lower().startswith("killwait")] == ["KillWait=30"]
    assert "Epilog=/x" in lines
    short, long = (dict(word.split("=") for word in line.split()) for line in lines if line.startswith("Partition"))
    assert (short["MaxTime"], short["Default"], short["PreemptMode"]) == ("5", "NO", "REQUEUE")
    assert int(long["PriorityTier"]) > int(short["PriorityTier"]) and long["PreemptMode"] == "OFF"
