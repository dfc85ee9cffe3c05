"""The doctor as a command, and its findings about a login node, measured nodes, and links."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.agent.health import GpuReading
from launch.bench_network.measure import partner
from launch.config import ClusterKind
from launch.config.compose import sweep_points
from launch.doctor import __main__ as doctor
from launch.doctor import findings, job
from launch.doctor.__main__ import configs_of, main
from launch.slurm.checks import Finding, Level
from tests.support.commands import ROOT, call, python, run
from tests.support.doctor_facts import FACTS, OUTPUT, request

MOUNTS = (
    *(("/", "ext4"), ("/home", "autofs"), ("/home/ada l", "nfs4"), ("/scratch", "lustre")),
    *(("/scratch/tmp", "tmpfs"), ("/scratch/tmp", "gpfs")),
)


def test_the_deepest_and_last_mount_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings.filesystem_of(Path("/dev/shm/not/there/yet")) == "tmpfs"
    mounts = [SimpleNamespace(mountpoint=path, fstype=kind) for path, kind in MOUNTS]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    paths = ("/home/ada l/outputs", "/home/adam", "/scratch/x", "/scratch/tmp/x", "/scratchy")
    assert [findings.filesystem_of(Path(path)) for path in paths] == ["nfs4", "autofs", "lustre", "gpfs", "ext4"]


def test_a_folder_that_nodes_do_not_share_is_named() -> None:
    levels = {"nfs4": Level.ok, "lustre": Level.ok, "ext4": Level.warning, "overlay": Level.warning}
    for kind, level in {**levels, "tmpfs": Level.error}.items():
        seen = replace(FACTS, output=replace(OUTPUT, filesystem=kind))
        assert [f.level for f in findings.check_output_folder(seen)] == [level]
        here = replace(seen, kind=ClusterKind.local)
        assert [f.level for f in findings.check_output_folder(here)] == [Level.ok]


TWO_WITH_GPUS = ("nodes=2", "cluster.gpus_per_node=2")
NEED = request().plan.facts["parameters"] * 12 * (request().config.checkpoint.keep_last + 1)
GONE = {"limits": None, "slurm_problem": "no answer"}
MORE_OPEN_FILES = "ask the site for a higher hard limit: agents raise the soft one to it by themselves"


@pytest.mark.parametrize(
    ("words", "different", "fixes"),
    [
        ((), {}, {}),
        ((), {"threads": "64"}, {"threads": "export OMP_NUM_THREADS=4"}),
        ((), {"threads": "many"}, {"threads": "export OMP_NUM_THREADS=4"}),
        ((), {"threads": "4"}, {}),
        ((), {"open_files": 1024, "locked_bytes": 65536}, {"open files": MORE_OPEN_FILES}),
        (TWO_WITH_GPUS, {"locked_bytes": 65536}, {"locked memory": "ulimit -l unlimited"}),
        ((), {"torch": ""}, {"python": "/home/ada/.venv/bin/python -m pip install -e ."}),
        ((), {"output": replace(OUTPUT, free_bytes=NEED)}, {}),
        (
            (),
            {"output": replace(OUTPUT, free_bytes=NEED - 1)},
            {"disk": "output_dir=PATH with more room, or checkpoint.keep_last=1"},
        ),
        ((), {"output": replace(OUTPUT, problem="Permission denied")}, {"disk": "output_dir=PATH that is yours"}),
        ((), GONE, {"slurm": "scontrol ping; then ask the site"}),
        ((), GONE | {"kind": ClusterKind.local}, {"slurm": "cluster=slurm"}),
        ((), {"limits": None, "kind": ClusterKind.local}, {}),
    ],
)
def test_what_differs_from_a_sound_login_node_is_named_with_what_to_type(
    words: tuple[str, ...], different: dict[str, Any], fixes: dict[str, str]
) -> None:
    asking = request(*words)
    found = findings.check_machine(replace(FACTS, **different), asking.config, [asking])
    assert {one.check: one.fix for one in found if one.level is not Level.ok} == fixes


def test_sweeps_are_split_as_python_m_launch_splits_them() -> None:
    assert sweep_points(["nodes=1,2", "seed=range(1,3)"]) == [
        [f"nodes={n}", f"seed={s}"] for n in (1, 2) for s in (1, 2)
    ]
    assert [config.nodes for config in configs_of(sweep_points(["+experiment=strong_scaling"]))] == [1, 2, 4]


def test_the_site_file_may_lie_in_a_folder_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    text = (ROOT / "configs" / "cluster" / "slurm.yaml").read_text()
    (tmp_path / "cluster" / "mysite.yaml").write_text(re.sub("^partition:.*", "partition: ours", text, flags=re.M))
    points = sweep_points(["cluster=mysite", "nodes=1,2"], tmp_path)
    assert [config.cluster.partition for config in configs_of(points, tmp_path)] == ["ours", "ours"]
    assert "=mysite" in call(main, "--config-dir", tmp_path, "cluster=mysit", status=2)
    assert "no folder" in call(main, "--config-dir", tmp_path / "no", "nodes=2", status=2)


def test_it_runs_on_any_machine_loads_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    script = "import sys; from launch.doctor.__main__ import main; status = main(sys.argv[1:]); "
    script += "assert 'torch' not in sys.modules; sys.exit(status)"
    words = ("--json", "-m", "nodes=1,2", "cluster=local", "device=cpu")
    report = json.loads(python(script, *words, cwd=tmp_path))
    assert report["status"] == 0 and report["on_cluster"] is None
    assert {"slurm", "python", "shared folder", "disk"} <= {finding["check"] for finding in report["findings"]}
    assert list(tmp_path.iterdir()) == []


def test_the_report_and_the_exit_status(tmp_path: Path) -> None:
    local = ("cluster=local", "device=cpu")
    text = run("launch.doctor nodes=3 optim.global_batch=8", *local, cwd=tmp_path, status=1)
    assert "error" in text and "type  optim.global_batch=9" in text and "1 errors" in text
    assert "type next: nodes=3" in call(main, "nodse=3", status=2)
    assert "without --on-cluster" in call(main, *local, "--on-cluster", status=2)


def test_a_warning_is_said_once_for_all_points_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = findings.Folder("/home/ada/code/.venv", "/home/ada/code/.venv", "ext4")
    code = findings.Folder("/home/ada/code", "/home/ada/code", "ext4")
    elsewhere = replace(inner, filesystem="overlay")
    for programs, said in (((code, inner), {code.path}), ((code, elsewhere), {code.path, elsewhere.path})):
        seen = replace(FACTS, programs=programs)
        assert {found.found.partition(":")[0] for found in findings.check_programs(seen)} == said
    monkeypatch.setattr(findings, "gather", lambda *_: FACTS)
    points = [["cluster=slurm", f"nodes={nodes}", f"output_dir={tmp_path}"] for nodes in (1, 2)]
    refused = ["cluster=slurm", "nodes=2", "optim.global_batch=7", f"output_dir={tmp_path}"]
    _, found, requests, _ = doctor.examine([*points, refused])
    assert len(requests) == 2 and len(set(found)) == len(found)
    assert [one.level for one in found if one.check in ("gpus", "cpus")] == [Level.warning, Level.ok]
    (error,) = [one for one in found if one.level is Level.error]
    assert error.check.startswith("plan cluster=slurm nodes=2") and "optim.global_batch=7" in error.found
    _, found, _, _ = doctor.examine([[*refused, "cluster.partition=absent"]])
    assert [one.check.split()[0] for one in found if one.level is Level.error] == ["partition", "plan"]


# Findings about measured nodes and links: who is slow or broken is named, and nobody else.


def results(rates: dict[tuple[int, int], float], nodes: int) -> dict[str, Any]:
    """Results of a job on ``nodes`` sound nodes, with these Gbit/s from node to node."""
    sound = {"cpus": 8, "open_files": 65536, "python": "3.11.7", "torch": "2.13.0", "error": "", "filesystem": "nfs4"}
    clock = {"clock_offset_s": 0.01, "clock_error_s": 0.001}
    each = [
        {"index": i, "host": f"n{i + 1}", "unseen": [], "ports": {str(j): "" for j in range(nodes) if j != i}}
        | sound
        | (clock if i else {})
        for i in range(nodes)
    ]
    gpu = {"backend": "nccl", "device": "H200", "gpus_seen": 1, "matmul_tflops": 700.0}
    ranks: list[dict[str, Any]] = [
        {"rank": i, "node": i, "host": f"n{i + 1}", "links": [], **gpu} for i in range(nodes)
    ]
    for (a, b), rate in rates.items():
        for one, other in ((a, b), (b, a)):
            ranks[one]["links"].append({"node": other, "bandwidth_gbit": rate})
    asked_for = {"nodes": nodes, "ranks_per_node": 1, "cpus_per_task": 8, "gpus_per_node": 1}
    about = {"job_id": "7", "state": "COMPLETED", "started": True, "folder": "/home/ada/.doctor/x", "logs": "/x/7"}
    return {**about, "asked": asked_for, "nodes": each, "ranks": ranks}


def all_rates(nodes: int, rate: float = 100.0) -> dict[tuple[int, int], float]:
    """The same rate between all nodes."""
    return {(a, b): rate for a in range(nodes) for b in range(a + 1, nodes)}


def bad(measured: dict[str, Any]) -> list[Finding]:
    """Warnings and errors about what was measured."""
    return [f for f in findings.check_results(measured) if f.level is not Level.ok]


def test_sound_nodes_are_sound() -> None:
    measured = results(all_rates(4), 4)
    assert bad(measured) == []
    found = {finding.check: finding.found for finding in findings.check_results(measured)}
    assert found["shared folder"] == "measured: seen and written by every node (nfs4)"
    assert found["matmul"] == "700 to 700 TFLOP/s a rank on H200"


@settings(deadline=None, max_examples=30)
@given(st.data(), st.integers(3, 12))
def test_one_slow_node_is_the_only_one_named(data: st.DataObject, nodes: int) -> None:
    slow = data.draw(st.integers(0, nodes - 1))
    share = data.draw(st.floats(0.001, 0.38))
    rates = {
        pair: 100 * (data.draw(st.floats(0.1, 1.0)) * share if slow in pair else data.draw(st.floats(0.8, 1.0)))
        for pair in all_rates(nodes)
    }
    (found,) = bad(results(rates, nodes))
    assert found.found.startswith(f"every link of n{slow + 1} is slow") and found.fix == f"cluster.exclude=n{slow + 1}"


@settings(deadline=None, max_examples=30)
@given(st.data(), st.integers(4, 12))
def test_one_slow_link_is_the_only_one_named(data: st.DataObject, nodes: int) -> None:
    a, b = data.draw(st.sampled_from(sorted(all_rates(nodes))))
    (found,) = bad(results({**all_rates(nodes), (a, b): 5.0}, nodes))
    assert f"the link n{a + 1} - n{b + 1}" in found.found and found.level is Level.error


def test_each_node_meets_each_other_once_and_one_at_a_time() -> None:
    for count in range(1, 41):
        pairs = []
        for turn in range(count - 1 + count % 2):
            partners = {node: partner(node, turn, count) for node in range(count)}
            assert all(other is None or partners[other] == node != other for node, other in partners.items())
            pairs += [(node, other) for node, other in partners.items() if other is not None and node < other]
        assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]


def test_every_other_thing_that_a_node_can_have_is_named() -> None:
    measured = results(all_rates(3), 3)
    first, second, third = measured["nodes"]
    first["unseen"] = [2]
    second["ports"]["0"] = "timed out"
    third |= {"clock_offset_s": -30.0, "cpus": 1, "torch": "2.12.0"}
    measured["ranks"][2] |= {"matmul_tflops": 300.0}
    measured["ranks"][1] |= {"gpus_seen": 0}
    told = {(f.check, f.level.value): f.found for f in bad(measured)}
    assert set(told) == {
        *(("shared folder", "error"), ("ports", "error"), ("clocks", "warning"), ("cpus", "warning")),
        *(("software", "error"), ("gpus", "error"), ("gpus", "warning")),
    }
    assert "n1 does not see what n3 wrote" in told["shared folder", "error"]
    assert "n2 does not reach n1: timed out" in told["ports", "error"]
    assert "clock of n3 is -30.0 s off" in told["clocks", "warning"]
    assert "rank 2 on n3: 300 TFLOP/s" in told["gpus", "warning"] and told["gpus", "error"].startswith("n2")
    assert [f.fix for f in bad(measured) if f.check == "cpus"] == ["cluster.cpus_per_task=1"]


def test_parts_that_a_node_lacks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "mlx5_0" / "ports" / "1" / "state"
    state.parent.mkdir(parents=True)
    state.write_text("4: ACTIVE\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/no/python/include")
    monkeypatch.setattr("launch.doctor.job.ctypes.util.find_library", lambda name: None)
    monkeypatch.setattr("launch.doctor.job.resource.getrlimit", lambda limit: (65536, 65536))
    monkeypatch.setattr(job, "driver_version", lambda: "550.54.15")
    monkeypatch.setattr(job, "torch_cuda", lambda: "13.0")
    (tmp_path / "nvidia-nvswitchctl").touch()
    used = [GpuReading("0000:3b:00.0", used=3 * 2**30, users=(41, 42)), GpuReading("0000:d8:00.0", is_persistent=False)]
    lacking = job.lacking_parts(used, tmp_path, tmp_path / "no shm", tmp_path)
    assert [part[0] for part in lacking] == [
        "no C compiler",
        "no /no/python/include/Python.h",
        "driver 550.54.15, and a torch for CUDA 13.0, which needs driver 580 or newer",
        "NVSwitches, and no visible nv-fabricmanager",
        "GPU 0000:3b:00.0 with 3.0 GiB in use by process 41, 42",
        "persistence mode off",
        "InfiniBand without libibverbs",
        "ulimit -l is 64 KiB",
        f"{tmp_path / 'no shm'} of 0 MiB",
    ]
    state.write_text("1: DOWN\n")
    monkeypatch.setattr(job, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(job, "running_programs", lambda: {"nv-fabricmanager"})
    idle = [GpuReading("0000:3b:00.0", used=2**29)]
    assert job.lacking_parts(idle, tmp_path, tmp_path, tmp_path) == lacking[:2]
    measured = results(all_rates(3), 3)
    measured["nodes"][0]["lacks"], measured["nodes"][2]["lacks"] = lacking[:1], lacking[:2]
    assert [(found.found, found.level) for found in bad(measured)] == [
        ("no C compiler on n1, n3", Level.warning),
        ("no /no/python/include/Python.h on n3", Level.warning),
    ]


def test_a_job_that_never_ran_or_left_nothing() -> None:
    nothing = results({}, 0) | {"asked": {"nodes": 2, "ranks_per_node": 1, "cpus_per_task": 1, "gpus_per_node": None}}
    assert [f.level for f in findings.check_results(nothing)] == [Level.error]
    assert [f.level for f in findings.check_results(nothing | {"started": False, "state": "PENDING"})] == [
        Level.warning
    ]
    apart = results({}, 3)
    for node in apart["nodes"]:
        node["skipped"] = "not every node reaches every other"
    for rank in apart["ranks"]:
        del rank["links"]
    assert [(f.check, f.level) for f in bad(apart)] == [("links", Level.warning)], "once"
    partly = results(all_rates(2), 2)
    partly["asked"]["nodes"] = 3
    assert "2 of 3 nodes wrote their record: n1, n2" in bad(partly)[0].found
