"""The doctor as a command, and what it says of a login node: environment, limits, versions, folders."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.config import ClusterKind, Config
from launch.config.compose import compose_launch, sweep_points, typed_config
from launch.doctor import __main__ as doctor
from launch.doctor import job, machine
from launch.doctor.__main__ import arguments, complete, configs_of, examine, main, settle_sharing
from launch.runs import compose
from launch.slurm.facts import Finding, Level, warn
from tests.launch.test_doctor_verdict import all_rates, results
from tests.support.commands import ROOT, environment, run
from tests.support.doctor_facts import FACTS, LIMITS, OUTPUT, request

MOUNTS = """22 1 254:0 / / rw - ext4 /dev/vda rw
23 22 0:21 / /home rw - autofs systemd-1 rw
24 23 0:22 / /home/ada\\040l rw shared:1 - nfs4 server:/ada rw
25 22 0:23 / /scratch rw - lustre mgs:/scratch rw
26 25 0:24 / /scratch/tmp rw - tmpfs tmpfs rw
27 22 0:25 / /scratch/tmp rw - gpfs gpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/ada l/outputs", "nfs4"),
        ("/home/adam", "autofs"),
        ("/scratch/x", "lustre"),
        ("/scratch/tmp/x", "gpfs"),
        ("/scratchy", "ext4"),
    ],
)
def test_the_deepest_and_last_mount_decides(path: str, kind: str) -> None:
    assert machine.filesystem_in(MOUNTS, path) == kind


def test_the_type_of_a_real_filesystem_is_the_one_that_stat_knows() -> None:
    assert machine.filesystem_of(Path("/dev/shm/not/there/yet")) == "tmpfs"
    assert machine.filesystem_of(Path("/proc/self")) == "proc"


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


def test_the_nodes_word_on_a_folder_counts_more_than_its_filesystem(tmp_path: Path) -> None:
    guessed = list(machine.check_output_folder(replace(FACTS, output=replace(OUTPUT, filesystem="tmpfs"))))
    whole = {**results(all_rates(2), 2), "cluster": "sandbox ctl", "time_s": time.time()}
    for number, written in enumerate((whole, {**whole, "nodes": []})):
        folder = tmp_path / ".doctor" / f"2026010{number}-000000-a"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(written))
    earlier = job.earlier_results(tmp_path, "sandbox ctl")
    assert job.earlier_results(tmp_path, "another ctl") is None  # of a cluster that is gone
    assert [f.level for f in settle_sharing(guessed, earlier)] == [Level.ok]
    assert earlier is not None
    earlier["nodes"][0]["unseen"] = [1]
    assert settle_sharing(guessed, earlier) == guessed == settle_sharing(guessed, None)


def test_space_is_compared_with_the_checkpoints() -> None:
    asking = request()
    need = asking.plan.facts["parameters"] * 12 * (asking.config.checkpoint.keep_last + 1)
    for free, level in ((need - 1, Level.error), (need, Level.ok)):
        assert [
            f.level for f in machine.check_space(replace(FACTS, output=replace(OUTPUT, free_bytes=free)), [asking])
        ] == [level]
    unwritable = replace(FACTS, output=replace(OUTPUT, problem="Permission denied"))
    assert "Permission denied" in next(iter(machine.check_space(unwritable, [asking]))).found


def on_machine(*words: str, **different: Any) -> dict[str, Finding]:
    """Warnings and errors about a login node that differs from the recorded one, by check."""
    asking = request(*words)
    found = machine.check_machine(replace(FACTS, **different), asking.config, [asking])
    return {f.check: f for f in found if f.level is not Level.ok}


def test_a_sound_login_node_has_no_complaint() -> None:
    assert on_machine() == {}


def test_inherited_variables_are_named_and_unset() -> None:
    inherited = {"SLURM_CPU_BIND": "quiet", "RANK": "0", "PMIX_RANK": "0", "SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/x"}
    found = on_machine(environment=inherited)["environment"]
    assert set(found.fix.split()) == {"unset", "SLURM_CPU_BIND", "RANK", "PMIX_RANK", "SLURM_JOB_ID"}
    assert "inside a Slurm job" in found.found


def test_sbatch_variables_that_would_be_ignored_are_turned_into_keys() -> None:
    found = on_machine(environment={"SBATCH_ACCOUNT": "phys"})["environment"]
    assert found.fix == "cluster.account=phys"
    assert "environment" not in on_machine(found.fix, environment={"SBATCH_ACCOUNT": "phys"})


@pytest.mark.parametrize(
    ("threads", "fix"), [("64", "export OMP_NUM_THREADS=4"), ("many", "export OMP_NUM_THREADS=1"), ("4", None)]
)
def test_threads_are_compared_with_the_cpus(threads: str, fix: str | None) -> None:
    found = on_machine(environment={"OMP_NUM_THREADS": threads})
    assert (found["threads"].fix if "threads" in found else None) == fix


def test_limits_of_the_shell() -> None:
    low = on_machine(soft={"nofile": 1024, "core": -1, "memlock": 65536})
    assert "open files" not in low and low["core dumps"].fix == "ulimit -c 0"  # agents raise it to the hard limit
    few = on_machine(soft={"nofile": 256, "core": 0, "memlock": -1}, hard={"nofile": 1024, "core": 0, "memlock": -1})
    assert few["open files"].found == "ulimit -Hn is 1024" and "hard limit" in str(few["open files"].fix)
    assert "locked memory" not in low
    words = ("nodes=2", "cluster.gpus_per_node=2")
    assert (
        on_machine(*words, soft={"nofile": -1, "core": 0, "memlock": 65536})["locked memory"].fix
        == "ulimit -l unlimited"
    )


@pytest.mark.parametrize(
    ("version", "fits"), [("2.13.0+cpu", True), ("2.11.0", True), ("2.14.0", False), ("2.9.1", False)]
)
def test_versions_are_compared_without_importing(version: str, fits: bool) -> None:
    assert ("libraries" not in on_machine(versions={"torch": version})) is fits
    assert on_machine(versions={})["libraries"].fix.startswith("pip install 'torch")
    assert "python" in on_machine(python=(3, 10))


def test_a_controller_that_does_not_answer() -> None:
    gone = replace(FACTS, limits=None, slurm_problem="no answer")
    assert [f.level for f in machine.check_slurm(gone)] == [Level.error]
    local = replace(gone, kind=ClusterKind.local, was_auto=True)
    assert [f.level for f in machine.check_slurm(local)] == [Level.warning]
    assert [f.level for f in machine.check_slurm(replace(local, client=False))] == [Level.ok]


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
    assert [one.fix for one in complete([measure, words], given)] == [typed, "wait for it ..."]
    again = arguments(shlex.split(typed)[3:])
    assert again.on_cluster and (again.overrides, again.config_dir) == (given.overrides, given.config_dir)
    assert complete([measure], arguments([]))[0].fix == "python -m launch.doctor --on-cluster"


def test_its_requests_are_called_by_the_labels_of_their_points() -> None:
    _, _, requests, _ = examine([["nodes=1", "seed=7", "cluster=slurm"], ["nodes=2", "seed=7", "cluster=slurm"]])
    assert sorted(point for request in requests for point in request.points) == ["nodes=1", "nodes=2"]


def test_what_the_doctor_composes_is_what_a_run_composes() -> None:
    (config,) = configs_of([["cluster=slurm", "nodes=2"]])
    assert config.nodes == 2 and compose.plain(config.cluster.kind) == "slurm" and Path(config.output_dir).is_absolute()


def test_nodes_left_over_are_those_that_work_and_fit() -> None:
    # n1 and n3 work, n2 is drained; n3 lacks the feature.
    for words, left in (((), 1), (("nodes=2",), 0), (("cluster.constraint=fast",), 0), (("nodes=3",), 0)):
        assert doctor.left_over(FACTS, request(*words)) == left
    assert doctor.left_over(replace(FACTS, limits=None, slurm_problem="away"), request()) is None


def test_the_results_of_a_cluster_that_is_gone_tell_nothing(tmp_path: Path) -> None:
    here = job.name_of(replace(LIMITS, config={**LIMITS.config, "SlurmctldHost[0]": "ctl(10.0.0.9)"}))
    assert here == "sandbox ctl(10.0.0.9)"
    folder = tmp_path / ".doctor" / "20261122-000000-a"
    folder.mkdir(parents=True)
    for known, is_told in (
        ({"cluster": here, "time_s": 1e12}, True),
        ({"cluster": here, "time_s": 0.0}, False),
        ({"cluster": "sandbox ctl(10.9.9.9)", "time_s": 1e12}, False),
        ({}, False),
    ):
        (folder / "results.json").write_text(json.dumps({**results(all_rates(2), 2), **known}))
        assert (job.earlier_results(tmp_path, here) is not None) is is_told


def test_advice_that_only_repeats_the_command_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    again = warn("host name", "login resolves to 127.0.1.1", "why", "python -m launch.doctor --on-cluster ...")
    other = warn("disk", "full", "why", "output_dir=PATH")
    examined: tuple[list[Any], list[Any], list[Any], machine.Facts] = ([again, other], [], [], FACTS)
    measured = results(all_rates(2), 2) | {"folder": "/none"}
    measured["nodes"][0]["unseen"] = [1]
    monkeypatch.setattr(doctor, "examine", lambda *_: examined)
    monkeypatch.setattr(doctor, "run_on_cluster", lambda *_: ([], measured))
    found, _ = doctor.diagnose(doctor.arguments(["--on-cluster"]), doctor.Console())
    assert found == [other]
    assert doctor.diagnose(doctor.arguments([]), doctor.Console())[0] == [again, other]


def test_gpus_that_the_launcher_would_ask_for_are_in_the_request() -> None:
    config = typed_config(compose_launch(["cluster=slurm", "optim.global_batch=96"]))
    (gpus, cpus) = doctor.choose_resources(config, replace(FACTS, torch="2.13.0"))
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
