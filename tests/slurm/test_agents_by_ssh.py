"""Agents that srun does not start: by ssh on the nodes of a job or of a hostfile, and by the batch script alone."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from launch.runs.folder import RunFolder
from launch.storm import injection
from slurm.sandbox.cluster import Cluster, cut_link, preempt
from tests.support.commands import ON_SLURM, run, start_fork, wait_for
from tests.support.runs import (
    COUNTING,
    LOCAL,
    StormyRun,
    causes,
    checkpoint,
    from_step,
    make_ssh,
    options,
    rank_hosts,
    serve_ssh,
    start_training,
)

pytestmark = pytest.mark.slurm

NO_SRUN = "export SLURM_MEM_PER_CPU=1 SLURM_MEM_PER_NODE=1"
"""Variables with which srun refuses to start anything: a frequent reason why it fails in batch scripts."""


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of the servers on all nodes. Its ``bin`` has the ssh that uses them."""
    return make_ssh(tmp_path_factory.mktemp("ssh") / "keys")


@pytest.fixture
def nodes(sandbox: Cluster, keys: Path) -> dict[str, str]:
    """Address of each node of the sandbox, where a server of ssh runs."""
    return serve_ssh(sandbox, keys)


def without_srun(folder: Path) -> str:
    """Word with which a batch script finds the ssh of a folder, and no srun that works."""
    return f"cluster.setup=['{NO_SRUN}','export PATH={folder}/bin:$PATH']"


def ranks_of(folder: RunFolder) -> set[int]:
    """Process ids of the ranks of a run, on whatever node."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("LAUNCH_RUN_DIR") == str(folder.path) and "RANK" in process.environ():
                found.add(process.pid)
    return found


def test_a_run_by_ssh_survives_preemption_a_cut_node_and_the_end_of_its_starter(
    sandbox: Cluster, nodes: dict[str, str], keys: Path, tmp_path: Path
) -> None:
    hurry = tmp_path / "hurry"
    words = [*COUNTING, *options(steps=5000, save_every=20, hurry=hurry), "resilience.node_timeout_s=5"]
    storm = StormyRun(sandbox, tmp_path, *words, "cluster.start=ssh", without_srun(keys))
    folder = storm.folder
    storm.wait_for_steps(attempt=1)
    assert storm.rank_hosts(1) == storm.hosts()
    preempt(sandbox, storm.job, seconds=1)
    storm.wait_for_steps(attempt=2)
    (stopped,) = storm.of("stopped")
    assert causes(folder) == ["preempted"] and from_step(folder, attempt=2) == stopped["step"] > 0

    cut = storm.rank_hosts(2)[1]
    cut_link(sandbox, cut)
    storm.wait_for_steps(attempt=3)
    assert [e["host"] for e in storm.of("node_lost")] == [cut] and cut not in storm.rank_hosts(3)
    assert causes(folder) == ["preempted", "node_failed"]

    left = ranks_of(folder)
    assert len(left) == 2
    (starter,) = [
        process
        for process in injection.of_job(storm.job, "python", sandbox.env["SLURM_CONF"])
        if "launch.agent.hosts" in process.cmdline()
    ]
    starter.kill()
    storm.wait_for_steps(attempt=4)
    assert not left & ranks_of(folder), "on the other node, too"
    assert causes(folder) == ["preempted", "node_failed", "node_failed"]
    hurry.touch()
    assert storm.process.wait(timeout=300) == 0, (folder.read_events(), storm.log.read_text())
    assert checkpoint(folder)["step"] == 5000
    logs = sorted(path.name for path in (folder.path.parent / ".submitit" / "slurm").glob("*_log.err"))
    assert logs == [f"{storm.job}_{node}_log.err" for node in range(2)]


def test_a_job_of_one_node_starts_its_agent_without_any_program_and_saves_when_it_is_cancelled(
    sandbox: Cluster, tmp_path: Path
) -> None:
    hurry = tmp_path / "hurry"
    words = [*COUNTING, *options(steps=5000, hurry=hurry), "cluster.start=none", f"cluster.setup=['{NO_SRUN}']"]
    storm = StormyRun(sandbox, tmp_path, *words, nodes=1)
    storm.wait_for_steps(attempt=1)
    run("launch.cancel", str(storm.folder.path), cwd=tmp_path, **sandbox.env)
    assert storm.process.wait(timeout=300) == 1
    saved = checkpoint(storm.folder)["step"]
    assert causes(storm.folder) == ["cancelled"] and saved > 0
    hurry.touch()
    run("launch", *ON_SLURM, "nodes=1", f"run_dir={storm.folder.path}", *words, cwd=tmp_path, **sandbox.env)
    assert from_step(storm.folder, attempt=2) == saved and checkpoint(storm.folder)["step"] == 5000


def test_a_run_on_the_hosts_of_a_file_is_stopped_and_resumed_and_replaces_a_lost_host(
    sandbox: Cluster, nodes: dict[str, str], keys: Path, tmp_path: Path
) -> None:
    hosts, hurry = tmp_path / "hosts", tmp_path / "hurry"
    listed = [nodes[name] for name in ("n1", "n2", "n3")]
    hosts.write_text("# of the lab\n\n" + "".join(f"{host} slots=2  # two GPUs\n" for host in listed))
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "log"
    here = ("workload=script", "launch.poll_s=1", "launch.report_files=[md,csv]", "resilience.node_timeout_s=5")
    words = [*here, *COUNTING, *options(steps=5000, save_every=20, hurry=hurry), "cluster=local", "nodes=2"]
    words += [f"cluster.hostfile={hosts}", "spare_nodes=1"]
    path = f"{keys / 'bin'}:{os.environ['PATH']}"
    process = start_training(folder, *words, begin=partial(start_fork, PATH=path))
    assert rank_hosts(folder) == ["n1", "n1", "n2", "n2"]
    cut_link(sandbox, "n2")
    wait_for(lambda: from_step(folder, attempt=2) is not None, "the start on the spare host")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130, log.read_text()
    assert causes(folder) == ["node_failed", "cancelled"]
    assert rank_hosts(folder, 2) == ["n1", "n1", "n3", "n3"]
    saved = checkpoint(folder)["step"]
    hosts.write_text(f"{listed[0]}\n{listed[2]}\n")
    hurry.touch()
    again = ["spare_nodes=0", "ranks_per_node=2", f"run_dir={folder.path}"]
    text = run("launch", *words, *again, cwd=tmp_path, PATH=path)
    assert from_step(folder, attempt=3) == saved and checkpoint(folder)["step"] == 5000, text


def test_hosts_that_cannot_be_used_are_refused_and_named(
    sandbox: Cluster, nodes: dict[str, str], keys: Path, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    stranger = make_ssh(tmp_path / "stranger")
    command = partial(run, cwd=tmp_path, status=2, PATH=f"{keys / 'bin'}:{os.environ['PATH']}")
    words = (*LOCAL, *COUNTING, *options(steps=1), f"cluster.hostfile={hosts}", "nodes=2")
    hosts.write_text("n1 slots=2\nn2 slot=2\n")
    assert f"found: cluster.hostfile={hosts}: line 2: n2 slot=2\n" in command("launch", *words)
    hosts.write_text(f"{nodes['n1']}\n")
    assert f"found: 1 host with room for 1 rank in {hosts}, and a run of 2 nodes" in command("launch", *words)
    hosts.write_text(f"{nodes['n1']}\n{nodes['n2'].rpartition('.')[0]}.250\n")
    assert ".250: ssh: connect to host " in command("launch", *words)
    hosts.write_text(f"{nodes['n1']}\n{nodes['n2']}\n")
    asks = command("launch", *words, PATH=f"{stranger / 'bin'}:{os.environ['PATH']}")
    assert f"found: host {nodes['n1']}: " in asks and "Permission denied" in asks and "without a password" in asks
    unseen = command("launch", *words, "output_dir=/dev/shm/outputs")
    assert f"host {nodes['n1']}: it does not see a new file in /dev/shm" in unseen
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("hosts", "stranger")] == []

    job = (*ON_SLURM, *COUNTING, *options(steps=1), "nodes=2", "cluster.start=ssh", without_srun(stranger))
    told = run("launch", *job, cwd=tmp_path, status=1, **sandbox.env)
    assert "found: host n2: " in told and "Permission denied" in told and "type next: ssh -o BatchMode=yes n2" in told
    refused = command("launch", *ON_SLURM, *COUNTING, "nodes=2", "cluster.start=none", **sandbox.env)
    assert "found: cluster.start=none with 2 nodes" in refused and "type next: cluster.start=ssh" in refused


def test_the_doctor_finds_what_starts_agents_in_the_place_of_srun(
    sandbox: Cluster, nodes: dict[str, str], keys: Path, tmp_path: Path
) -> None:
    words = ("cluster=slurm", "nodes=2", "ranks_per_node=1", "--on-cluster")
    text = run("launch.doctor", *words, without_srun(keys), cwd=tmp_path, status=1, **sandbox.env)
    assert "and ssh works: srun: fatal: SLURM_MEM_PER_CPU" in text
    assert "type  cluster.start=ssh\n" in text
    text = run("launch.doctor", *words, without_srun(keys), "cluster.start=ssh", cwd=tmp_path, **sandbox.env)
    assert "ran on n1, n2" in text
