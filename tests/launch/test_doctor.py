"""The doctor as a command, and its findings about a login node, measured nodes, and links."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config import ClusterKind, Config
from launch.config.compose import compose_launch, sweep_points, typed_config
from launch.doctor import __main__ as doctor
from launch.doctor import machine, verdict
from launch.doctor.__main__ import arguments, complete_commands, configs_of, examine, main
from launch.doctor.links import PASSES, merge_passes, partner
from launch.slurm.checks import Finding, Level, fine, warn
from launch.slurm.points import choose_on_slurm
from tests.support.commands import ROOT, environment, run
from tests.support.doctor_facts import FACTS, OUTPUT, request

MOUNTS = {"/": "ext4", "/home": "autofs", "/home/ada l": "nfs4", "/scratch": "lustre", "/scratch/tmp": "tmpfs"}


def test_the_deepest_and_last_mount_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.filesystem_of(Path("/dev/shm/not/there/yet")) == "tmpfs"
    assert machine.filesystem_of(Path("/proc/self")) == "proc"
    mounts = [
        SimpleNamespace(mountpoint=path, fstype=kind) for path, kind in (*MOUNTS.items(), ("/scratch/tmp", "gpfs"))
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    paths = ("/home/ada l/outputs", "/home/adam", "/scratch/x", "/scratch/tmp/x", "/scratchy")
    assert [machine.filesystem_of(Path(path)) for path in paths] == ["nfs4", "autofs", "lustre", "gpfs", "ext4"]


@pytest.mark.parametrize(
    ("path", "kind", "level"),
    [
        ("/home/ada/outputs", "nfs4", Level.ok),
        ("/tmp/outputs", "lustre", Level.ok),
        ("/tmp/outputs", "ext4", Level.warning),
        ("/dev/shm/x", "tmpfs", Level.error),
        ("/outputs", "overlay", Level.warning),
        ("/data/outputs", "xfs", Level.warning),
    ],
)
def test_a_folder_that_nodes_do_not_share_is_named(path: str, kind: str, level: Level) -> None:
    seen = replace(FACTS, output=replace(OUTPUT, path=path, filesystem=kind))
    assert [f.level for f in machine.check_output_folder(seen)] == [level]
    here = replace(seen, kind=ClusterKind.local)
    assert [f.level for f in machine.check_output_folder(here)] == [Level.ok]


LOW = {"nofile": 1024, "core": -1, "memlock": 65536}
TWO_WITH_GPUS = ("nodes=2", "cluster.gpus_per_node=2")
INHERITED = {"SLURM_CPU_BIND": "quiet", "RANK": "0", "SLURM_JOB_ID": "7", "SBATCH_ACCOUNT": "phys", "SLURM_CONF": "/x"}
NEED = request().plan.facts["parameters"] * 12 * (request().config.checkpoint.keep_last + 1)
MORE_OPEN_FILES = "ask the site for a higher hard limit: agents raise the soft one to it by themselves"


@pytest.mark.parametrize(
    ("words", "different", "fixes"),
    [
        ((), {}, {}),
        ((), {"environment": INHERITED}, {"environment": "unset RANK SLURM_CPU_BIND SBATCH_ACCOUNT SLURM_JOB_ID"}),
        ((), {"environment": {"OMP_NUM_THREADS": "64"}}, {"threads": "export OMP_NUM_THREADS=4"}),
        ((), {"environment": {"OMP_NUM_THREADS": "many"}}, {"threads": "export OMP_NUM_THREADS=1"}),
        ((), {"environment": {"OMP_NUM_THREADS": "4"}}, {}),
        ((), {"soft": LOW}, {"core dumps": "ulimit -c 0"}),
        ((), {"hard": LOW}, {"open files": MORE_OPEN_FILES}),
        (TWO_WITH_GPUS, {"soft": LOW | {"core": 0}}, {"locked memory": "ulimit -l unlimited"}),
        ((), {"versions": {"torch": "2.11.0"}}, {}),
        ((), {"versions": {"torch": "2.14.0"}}, {"libraries": "pip install 'torch<2.14,>=2.11'"}),
        ((), {"versions": {"torch": "2.9.1"}}, {"libraries": "pip install 'torch<2.14,>=2.11'"}),
        ((), {"versions": {}}, {"libraries": "pip install 'torch<2.14,>=2.11'"}),
        ((), {"python": (3, 10)}, {"python": "python3.13 -m venv .venv && .venv/bin/pip install -e ."}),
        ((), {"output": replace(OUTPUT, free_bytes=NEED)}, {}),
        (
            (),
            {"output": replace(OUTPUT, free_bytes=NEED - 1)},
            {"disk": "output_dir=PATH with more room, or checkpoint.keep_last=1"},
        ),
        ((), {"output": replace(OUTPUT, problem="Permission denied")}, {"disk": "output_dir=PATH that is yours"}),
        ((), {"limits": None}, {"slurm": "scontrol ping; then ask the site"}),
        ((), {"limits": None, "kind": ClusterKind.local, "was_auto": True}, {"slurm": "cluster=slurm"}),
        ((), {"limits": None, "kind": ClusterKind.local, "client": False}, {}),
    ],
)
def test_what_differs_from_a_sound_login_node_is_named_with_what_to_type(
    words: tuple[str, ...], different: dict[str, Any], fixes: dict[str, str]
) -> None:
    asking = request(*words)
    found = machine.check_machine(replace(FACTS, **different), asking.config, [asking])
    assert {one.check: one.fix for one in found if one.level is not Level.ok} == fixes


def test_sweeps_are_split_as_python_m_launch_splits_them() -> None:
    assert sweep_points(["nodes=1,2", "seed=range(1,3)"]) == [
        [f"nodes={n}", f"seed={s}"] for n in (1, 2) for s in (1, 2)
    ]
    swept = configs_of(sweep_points(["+experiment=strong_scaling"]))
    assert [config.nodes for config in swept] == [1, 2, 4]
    assert all(isinstance(config, Config) for config in swept)
    assert [config.nodes for config in configs_of(sweep_points(["experiment=weak_scaling"]))] == [1, 2, 4]


def test_the_site_file_may_lie_in_a_folder_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cluster").mkdir()
    text = (ROOT / "configs" / "cluster" / "slurm.yaml").read_text()
    (tmp_path / "cluster" / "mysite.yaml").write_text(re.sub("^partition:.*", "partition: ours", text, flags=re.M))
    points = sweep_points(["cluster=mysite", "nodes=1,2"], tmp_path)
    assert [config.cluster.partition for config in configs_of(points, tmp_path)] == ["ours", "ours"]
    assert main(["--config-dir", str(tmp_path), "cluster=mysit"]) == 2 and "=mysite" in capsys.readouterr().err
    assert main(["--config-dir", str(tmp_path / "no"), "nodes=2"]) == 2 and "no folder" in capsys.readouterr().err


def test_it_runs_on_any_machine_loads_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    script = "import sys; from launch.doctor.__main__ import main; status = main(sys.argv[1:]); "
    script += "assert 'torch' not in sys.modules; sys.exit(status)"
    command = [sys.executable, "-c", script, "--json", "-m", "nodes=1,2", "cluster=local", "device=cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == 0 and report["on_cluster"] is None
    assert {"slurm", "python", "shared folder", "disk"} <= {finding["check"] for finding in report["findings"]}
    assert list(tmp_path.iterdir()) == []


def test_the_report_and_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = ("cluster=local", "device=cpu")
    text = run("launch.doctor", *local, "nodes=3", "optim.global_batch=8", cwd=tmp_path, status=1)
    assert "error" in text and "type  optim.global_batch=9" in text and "1 errors" in text
    assert main(["nodse=3"]) == 2 and "type next: nodes=3" in capsys.readouterr().err
    assert main([*local, "--on-cluster"]) == 2 and "without --on-cluster" in capsys.readouterr().err


def test_what_it_says_to_type_can_be_pasted(tmp_path: Path) -> None:
    given = arguments(["-m", "nodes=1,2", 'cluster.exclude="n[3-4]"', "--config-dir", str(tmp_path)])
    measure = warn("links", "x", "y", "python -m launch.doctor --on-cluster ...")
    words = warn("links", "x", "y", "wait for it ...")
    typed = f"python -m launch.doctor --on-cluster -m nodes=1,2 'cluster.exclude=\"n[3-4]\"' --config-dir {tmp_path}"
    assert [one.fix for one in complete_commands([measure, words], given)] == [typed, "wait for it ..."]
    again = arguments(shlex.split(typed)[3:])
    assert again.on_cluster and (again.overrides, again.config_dir) == (given.overrides, given.config_dir)
    assert complete_commands([measure], arguments([]))[0].fix == "python -m launch.doctor --on-cluster"


def test_what_the_nodes_have_measured_takes_the_place_of_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    again = warn("shared folder", "ext4 is this machine's own", "why", "python -m launch.doctor --on-cluster ...")
    guess, other = warn("program", "/x", "why", "srun ls /x"), warn("disk", "full", "why", "output_dir=PATH")
    examined: tuple[list[Any], list[Any], list[Any], machine.Facts] = ([again, guess, other], [], [], FACTS)
    measured = [fine("shared folder", "measured")]
    monkeypatch.setattr(doctor, "examine", lambda *_: examined)
    monkeypatch.setattr(doctor, "run_on_cluster", lambda *_: (measured, results(all_rates(2), 2)))
    assert doctor.diagnose(arguments(["--on-cluster"]), doctor.Console())[0] == [other, *measured]
    assert doctor.diagnose(arguments([]), doctor.Console())[0] == [again, guess, other]


def test_gpus_that_the_launcher_would_ask_for_are_in_the_request() -> None:
    config = typed_config(compose_launch(["cluster=slurm", "optim.global_batch=96"]))
    (gpus, cpus) = choose_on_slurm(config, replace(FACTS, torch="2.13.0"))
    assert config.cluster.gpus_per_node == 2 and gpus.level is Level.ok and "every node of low has 2" in gpus.found
    assert cpus.check == "cpus" and config.cluster.cpus_per_task == 8


def test_a_warning_is_said_once_for_all_points_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = machine.Folder("/home/ada/code/.venv", "/home/ada/code/.venv", "ext4")
    code = machine.Folder("/home/ada/code", "/home/ada/code", "ext4")
    elsewhere = replace(inner, filesystem="overlay")
    for programs, said in (((code, inner), ["/home/ada/code"]), ((code, elsewhere), [code.path, elsewhere.path])):
        seen = replace(FACTS, programs=programs)
        assert [found.found.partition(":")[0] for found in machine.check_programs(seen)] == said
    monkeypatch.setattr(machine, "gather", lambda *_: replace(FACTS, torch="2.13.0+cpu"))
    points = [["cluster=slurm", f"nodes={nodes}", f"output_dir={tmp_path}"] for nodes in (1, 2)]
    _, found, requests, _ = doctor.examine(points)
    assert len(requests) == 2 and len(set(found)) == len(found)
    assert [one.level for one in found if one.check in ("gpus", "cpus")] == [Level.warning, Level.ok]


def test_a_point_that_the_launcher_refuses_is_compared_with_the_partitions_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gather", lambda *_: replace(FACTS, torch="2.13.0+cpu"))
    words = ["cluster=slurm", "nodes=4", "optim.global_batch=7", "cluster.partition=low", f"output_dir={tmp_path}"]
    _, found, requests, _ = examine([words])
    errors = {one.check.split()[0]: one for one in found if one.level is Level.error}
    assert list(errors) == ["nodes", "plan"] and not requests, "the partition first"
    assert "nodes=4 in partition low" in errors["nodes"].found and "optim.global_batch=7" in errors["plan"].found


# Findings about measured nodes and links: who is slow or broken is named, and nobody else.


def results(rates: dict[tuple[int, int], float], nodes: int) -> dict[str, Any]:
    """Results of a job on ``nodes`` sound nodes, with these Gbit/s from node to node."""
    limit = {"nofile": 65536, "core": 0, "memlock": -1}
    sound = {"cpus": 8, "cpus_of_machine": 64, "limits": limit, "python": "3.11.7", "torch": "2.13.0", "error": ""}
    sound |= {"filesystem": "nfs4", "names": {f"n{j + 1}": f"10.0.0.{j + 1}" for j in range(nodes)}}
    clock = {"clock_offset_s": 0.01, "clock_error_s": 0.001}
    each = [
        {"index": i, "host": f"n{i + 1}", "unseen": [], "ports": {str(j): "" for j in range(nodes) if j != i}}
        | deepcopy(sound)
        | (clock if i else {})
        for i in range(nodes)
    ]
    gpu = {"backend": "nccl", "device": "H200", "gpus_seen": 1, "matmul_tflops": 700.0}
    ranks: list[dict[str, Any]] = [
        {"rank": i, "node": i, "host": f"n{i + 1}", "links": [], **gpu} for i in range(nodes)
    ]
    for (a, b), rate in rates.items():
        for one, other in ((a, b), (b, a)):
            range_of = dict.fromkeys(("bandwidth_gbit", "low_gbit", "high_gbit"), rate)
            ranks[one]["links"].append({"node": other, "latency_us": 20.0, **range_of})
    asked_for = {"nodes": nodes, "ranks_per_node": 1, "cpus_per_task": 8, "gpus_per_node": 1}
    about = {"job_id": "7", "state": "COMPLETED", "started": True, "folder": "/home/ada/.doctor/x", "logs": "/x/7"}
    return {**about, "asked": asked_for, "nodes": each, "ranks": ranks}


def all_rates(nodes: int, rate: float = 100.0) -> dict[tuple[int, int], float]:
    """The same rate between all nodes."""
    return {(a, b): rate for a in range(nodes) for b in range(a + 1, nodes)}


def bad(measured: dict[str, Any]) -> list[Finding]:
    """Warnings and errors about what was measured."""
    return [f for f in verdict.check_results(measured) if f.level is not Level.ok]


def test_sound_nodes_are_sound() -> None:
    measured = results(all_rates(4), 4)
    assert bad(measured) == []
    for index, rank in enumerate(measured["ranks"]):
        rank["group"] = {"bytes": 2**24, "latency_us": 30.0 + index, "bandwidth_gbit": 80.0 - index, "bus_gbit": 120.0}
    found = {finding.check: finding.found for finding in verdict.check_results(measured)}
    assert found["shared folder"] == "measured: seen and written by every node (nfs4)"
    assert found["matmul"] == "700 to 700 TFLOP/s a rank on H200"
    assert found["all-reduce"].startswith("over 4 ranks (nccl): 33 us for 4 bytes, 16 MiB at 77 Gbit/s")


@settings(deadline=None)
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


@settings(deadline=None)
@given(st.data(), st.integers(4, 12))
def test_one_slow_link_is_the_only_one_named(data: st.DataObject, nodes: int) -> None:
    a, b = data.draw(st.sampled_from(sorted(all_rates(nodes))))
    (found,) = bad(results({**all_rates(nodes), (a, b): 5.0}, nodes))
    assert f"the link n{a + 1} - n{b + 1}" in found.found and found.level is Level.error


@pytest.mark.parametrize("count", range(1, 41))
def test_each_node_meets_each_other_once_and_one_at_a_time(count: int) -> None:
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
    second["names"]["n1"] = "127.0.1.1"
    third["names"]["n2"] = "!Name or service not known"
    third |= {"clock_offset_s": -30.0, "cpus": 1, "torch": "2.12.0"}
    measured["ranks"][2] |= {"matmul_tflops": 300.0}
    measured["ranks"][1] |= {"gpus_seen": 0}
    told = {(f.check, f.level.value): f.found for f in bad(measured)}
    assert set(told) == {
        *(("shared folder", "error"), ("ports", "error"), ("host names", "warning"), ("clocks", "warning")),
        *(("cpus", "error"), ("software", "error"), ("gpus", "error"), ("gpus", "warning")),
    }
    assert "n1 does not see what n3 wrote" in told["shared folder", "error"]
    assert "n2 does not reach n1: timed out" in told["ports", "error"]
    assert "clock of n3 is -30.0 s off" in told["clocks", "warning"]
    assert "rank 2 on n3: 300 TFLOP/s" in told["gpus", "warning"] and told["gpus", "error"].startswith("n2")
    third |= {"cpus": 4, "cpus_of_machine": 4}
    assert [f.fix for f in bad(measured) if f.check == "cpus"] == ["cluster.cpus_per_task=4"]


def test_links_that_were_not_measured_are_said_to_be_so_once() -> None:
    measured = results({}, 3)
    for node in measured["nodes"]:
        node["skipped"] = "not every node reaches every other"
    for rank in measured["ranks"]:
        del rank["links"]
    assert [(f.check, f.level) for f in bad(measured)] == [("links", Level.warning)]


def test_a_job_that_never_ran_or_left_nothing() -> None:
    nothing = results({}, 0) | {"asked": {"nodes": 2, "ranks_per_node": 1, "cpus_per_task": 1, "gpus_per_node": None}}
    assert [f.level for f in verdict.check_results(nothing)] == [Level.error]
    assert [f.level for f in verdict.check_results(nothing | {"started": False, "state": "PENDING"})] == [Level.warning]
    partly = results(all_rates(2), 2)
    partly["asked"]["nodes"] = 3
    assert "2 of 3 nodes wrote their record: n1, n2" in bad(partly)[0].found


def with_ranges(nodes: int, slow: dict[tuple[int, int], tuple[float, float, float]]) -> dict[str, Any]:
    """Results of links that do 90 to 110 Gbit/s, but for those that are given as low, median and high."""
    measured = results(all_rates(nodes), nodes)
    for rank in measured["ranks"]:
        for link in rank["links"]:
            pair = (min(rank["rank"], link["node"]), max(rank["rank"], link["node"]))
            low, middle, high = slow.get(pair, (90.0, 100.0, 110.0))
            link |= {"low_gbit": low, "bandwidth_gbit": middle, "high_gbit": high}
    return measured


def test_a_link_is_measured_several_times_and_its_median_counts() -> None:
    passes = [{"latency_us": us, "bandwidth_gbit": rate, "bytes": 7.0} for us, rate in ((9, 90.0), (5, 4.0), (7, 96.0))]
    assert len(passes) == PASSES
    assert merge_passes(passes) == {
        **{"latency_us": 5, "bandwidth_gbit": 90.0, "low_gbit": 4.0, "high_gbit": 96.0, "bytes": 7.0}
    }


def test_what_was_once_as_fast_as_the_others_is_not_called_slow() -> None:
    assert bad(with_ranges(4, {(1, 2): (4.0, 40.0, 95.0)})) == []
    (link,) = bad(with_ranges(4, {(1, 2): (4.0, 40.0, 60.0)}))
    assert link.found.startswith("the link n2 - n3: 40 Gbit/s")
    of_one = {(0, 3): (10.0, 30.0, 96.0), (1, 3): (10.0, 30.0, 60.0), (2, 3): (10.0, 30.0, 60.0)}
    assert not [found for found in bad(with_ranges(4, of_one)) if "every link" in found.found]
    (node,) = bad(with_ranges(4, {**of_one, (0, 3): (10.0, 30.0, 60.0)}))
    assert node.found.startswith("every link of n4 is slow")
    (well,) = [found for found in verdict.check_results(with_ranges(4, {})) if found.check == "bandwidth"]
    assert well.found.endswith("; single measurements 90 to 110")


def test_nodes_with_too_few_cpus_are_named_together() -> None:
    measured = results(all_rates(4), 4)
    for index, cpus in ((0, 2), (2, 2), (3, 4)):
        measured["nodes"][index] |= {"cpus": cpus, "cpus_of_machine": 2}
    few, fewer = bad(measured)
    assert few.found.startswith("each of the agents on n1, n3 may use 2 CPUs") and few.level is Level.warning
    assert fewer.found.startswith("the agent on n4 may use 4 CPUs") and fewer.level is Level.error
