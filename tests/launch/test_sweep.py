"""A sweep over nodes on real processes, to the scaling table; points side by side, in order, and attached to."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.attach.__main__ import grouped
from launch.batch import wait_for_plan
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.process import share
from launch.runs.records import OF_THE_RUN, read_records
from tests.support.commands import ROOT, TINY, run, start_fork, wait_for
from tests.support.runs import COUNTING, LOCAL, MEETING, PROGRAM, checkpoint, names, options, printed, write_script

STEPS = 8
WORDS = [*TINY, f"optim.max_steps={STEPS}", "checkpoint.interval=4", "eval.interval=4"]
UNDRAWN = ["launch.report_files=[md,csv]"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One sweep of five points, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    text = run("launch -m nodes=1,2,4 name=s", *WORDS, cwd=folder)
    text += run("launch -m nodes=1,2 parallel=fsdp name=f", *WORDS, *UNDRAWN, cwd=folder)
    return folder / "outputs", text


def point(outputs: Path, name: str, nodes: int) -> RunFolder:
    found = [p.parent for p in (outputs / name).glob("*/plan.json") if json.loads(p.read_text())["nodes"] == nodes]
    assert len(found) == 1, found
    return RunFolder(found[0])


def final(run_folder: RunFolder, key: str) -> float:
    last = read_records(run_folder.metrics(0))[-1]
    assert last["step"] == STEPS
    return float(last[key])


def test_the_loss_does_not_depend_on_nodes_or_strategy(sweep: tuple[Path, str]) -> None:
    outputs, _ = sweep
    runs = [point(outputs, "s", n) for n in (1, 2, 4)] + [point(outputs, "f", n) for n in (1, 2)]
    for key in ("loss", "val_loss", "grad_norm"):
        reference = final(runs[0], key)
        assert [final(r, key) for r in runs] == pytest.approx([reference] * 5, rel=1e-4), key


def test_the_run_folder_holds_what_is_promised(sweep: tuple[Path, str]) -> None:
    outputs, _ = sweep
    folder = point(outputs, "s", 2)
    plan = json.loads(folder.plan.read_text())
    environment = json.loads(folder.environment(1).read_text())
    assert plan["world_size"] == environment["world_size"] == 2
    assert plan["parameters"] == environment["parameters"]
    assert [r["rank"] for r in environment["ranks"]] == [0, 1]
    assert sorted(r["node"] for r in environment["ranks"]) == [0, 1]
    assert (folder.checkpoints / f"step_{STEPS:08d}" / "manifest.json").is_file()
    assert f"step {STEPS}/{STEPS}" in folder.log(1, 0).read_text()
    assert folder.log(1, 1).is_file()
    # Every sample is used once, whatever the number of ranks.
    for nodes in (1, 2, 4):
        of_nodes = point(outputs, "s", nodes)
        used: list[int] = []
        for rank in of_nodes.metric_ranks():
            for first, last in (record["samples"] for record in read_records(of_nodes.metrics(rank))):
                used += range(first, last + 1)
        assert of_nodes.metric_ranks() == list(range(nodes)) and sorted(used) == list(range(8 * STEPS))
    told = ["submitted", "agent_started", "started", "saved", "saved", "finished", "attempt_ended", "decided"]
    assert [e["event"] for e in folder.read_events()] == [*told, "agent_ended"]
    for name in ("config.yaml", "overrides.yaml"):
        assert (folder.path / ".hydra" / name).is_file()


def test_records_say_what_is_known_and_leave_out_what_is_not(sweep: tuple[Path, str]) -> None:
    outputs, _ = sweep
    first, record = (read_records(point(outputs, "s", 2).metrics(rank))[3] for rank in range(2))
    known: dict[str, Any] = {"step": 4, "attempt": 1, "tokens": 4 * 32, "samples": [3 * 8 + 4, 3 * 8 + 7]}
    assert {k: record[k] for k in known} == known
    assert first["tokens_per_s"] == pytest.approx(8 * 32 / first["step_time_s"])
    assert record["checkpoint_s"] > 0 and "val_loss" in first
    assert not {"mfu_palm", "hfu", "memory_allocated_gib"} & set(first), "unknown on this device"
    assert not set(record) & OF_THE_RUN and set(record) >= {"time", "step_time_s", "data_wait_s", "memory_peak_gib"}


def test_the_table_has_a_row_for_each_point(sweep: tuple[Path, str]) -> None:
    outputs, text = sweep
    rows = list(csv.DictReader((outputs / "s" / "scaling.csv").open()))
    assert [(r["nodes"], r["ranks"]) for r in rows] == [("1", "1"), ("2", "2"), ("4", "4")]
    assert "Strong scaling" in text
    for name in ("scaling.md", "scaling.png"):
        assert (outputs / "s" / name).stat().st_size > 0
    assert list((outputs / "s" / "Scaling").glob("events.out.tfevents.*"))
    before = (outputs / "s" / "scaling.csv").read_text()
    (outputs / "s" / "scaling.csv").unlink()
    run(f"launch.report {outputs / 's'} --files csv", cwd=outputs)
    assert (outputs / "s" / "scaling.csv").read_text() == before, "made again"
    assert list((point(outputs, "s", 1).tensorboard).glob("events.out.tfevents.*"))


def test_people_read_the_labels_of_points_whose_folders_differ_in_hashes(sweep: tuple[Path, str]) -> None:
    """Progress, table and status say nodes=1, 2 and 4, and logs finds a run by that."""
    outputs, text = sweep
    names = [point(outputs, "s", nodes).point for nodes in (1, 2, 4)]
    assert all(len(name) > 120 for name in names), "cut, and kept apart by their hashes"
    for nodes in (1, 2, 4):
        assert re.search(rf"^nodes={nodes} +finished +step {STEPS}/{STEPS}", text, re.MULTILINE), text
    assert not re.search(r"-[0-9a-f]{8} +(pending|running|finished)", text)
    rows = json.loads(run("launch.status --json outputs/s", cwd=outputs.parent))
    assert {row["label"]: row["point"] for row in rows} == dict(zip(("nodes=1", "nodes=2", "nodes=4"), names))
    for named in ("outputs/s/nodes=4", "nodes=4"):
        assert f"step {STEPS}/{STEPS}" in run("launch.logs", named, cwd=outputs.parent)
    assert "several runs are called: " in run("launch.logs nodes=2", cwd=outputs.parent, status=2)


def test_the_same_command_again_submits_only_what_is_not_finished(sweep: tuple[Path, str], tmp_path: Path) -> None:
    """A finished point starts no rank and logs no attempt; the table is shown again, the earlier sweep's as well."""
    outputs, _ = sweep
    shutil.copytree(outputs / "f", tmp_path / "outputs" / "f")
    words = ["parallel=fsdp", *WORDS, "name=f"]
    before = {path.name: path.read_bytes() for path in point(tmp_path / "outputs", "f", 2).path.glob("[a-z]*.*")}
    again = run("launch -m nodes=1,2", *words, *UNDRAWN, cwd=tmp_path)
    assert "finished already, and not submitted: nodes=1, nodes=2" in again and "Strong scaling of f" in again
    assert "worst case" not in again, "nothing is submitted"
    assert "finished    already" in run("launch -m nodes=1,2 dry_run=true", *words, cwd=tmp_path)
    more = run("launch -m nodes=2,4", *words, *UNDRAWN, cwd=tmp_path)
    assert "finished already, and not submitted: nodes=2" in more
    assert "worst case: 1 h 00 min on this machine, if the run lasts until the time limit" in more
    assert re.search(r"^nodes=4 +finished", more, re.MULTILINE) and "sweep 1: nodes=1,2" in more
    one = run("launch nodes=2", *words, cwd=tmp_path)
    assert "Summary of " in one and "Scaling" not in one
    finished = point(tmp_path / "outputs", "f", 2)
    kept = {path.name: path.read_bytes() for path in finished.path.glob("[a-z]*.*")}
    written = {f"summary.{ending}" for ending in ("md", "csv", "png", "svg", "json", "html")} | {"summary_parts.csv"}
    assert before.items() <= kept.items() and kept.keys() - before.keys() == written
    rows = list(csv.DictReader((tmp_path / "outputs" / "f" / "scaling.csv").open()))
    assert [row["nodes"] for row in rows] == ["2", "4"], "a run alone takes nothing from the sweep"
    assert "Sweep 1: " in run("launch.report outputs/f --sweep 1 --files md", cwd=tmp_path)
    agent = run(f"launch.agent {finished.path}", cwd=tmp_path)
    assert "finished already, and not started again" in agent
    assert finished.attempts() == [1] and len(finished.read_events()) == before["events.jsonl"].count(b"\n")


def test_the_worker_runs_without_the_launcher(sweep: tuple[Path, str], tmp_path: Path) -> None:
    outputs, _ = sweep
    rendezvous = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    start = ["torch.distributed.run", *rendezvous, "-m", "gpt.train", "parallel=fsdp"]
    run(*start, *WORDS, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    refused = run(*start, "optim.max_stepz=4", cwd=tmp_path, status=1)
    assert "type next: optim.max_steps=4" in refused and "hydra" not in refused, "torchrun prints three lines"
    same = final(point(outputs, "s", 1), "loss")
    assert final(RunFolder(tmp_path / "run"), "loss") == pytest.approx(same, rel=1e-4)


def test_a_stock_launcher_keeps_working(sweep: tuple[Path, str], tmp_path: Path) -> None:
    outputs, _ = sweep
    # A folder named after the job, as by default, is made by submitit 1.5 only after the local job has started.
    folder = "hydra.launcher.submitit_folder=${hydra.sweep.dir}/.submitit"
    words = [*WORDS, "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", folder, *UNDRAWN]
    run("launch nodes=2", *words, cwd=tmp_path)
    made = point(tmp_path / "outputs", "quick_test", 2)
    assert final(made, "loss") == pytest.approx(final(point(outputs, "s", 1), "loss"), rel=1e-4)
    assert len(json.loads(made.environment(1).read_text())["ranks"]) == 2
    # Each task of Hydra's would write its own over what the agents of the other nodes read, and open keys with it.
    assert {path.name for path in made.config.parent.iterdir()} == {"config.yaml", "overrides.yaml"}
    assert yaml.safe_load(made.config.read_text())["run_dir"] == str(made.path)
    run(f"launch.report {made.path} --files csv", cwd=tmp_path)
    (row,) = csv.DictReader((made.path / "summary.csv").open())
    assert (row["ranks"], row["state"]) == ("2", "finished")


def test_a_task_of_another_node_waits_for_the_plan_of_the_first(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)no .*plan\.json after 0 s.*all nodes share"):
        wait_for_plan(folder, timeout_s=0.0)
    folder.plan.write_text("{}")
    wait_for_plan(folder, timeout_s=0.0)


def test_a_stock_launcher_with_another_number_of_tasks_is_refused_before_the_queue(tmp_path: Path) -> None:
    words = ["-m", "nodes=1,2", "hydra/launcher=submitit_slurm", "hydra.launcher.nodes=1"]
    text = run("launch", *words, *TINY, cwd=tmp_path, status=2)
    assert "a point with nodes=2 (spare_nodes included), and hydra/launcher=submitit_slurm starts 1 task" in text
    assert "type next: the same without hydra/launcher=submitit_slurm" in text
    assert not list(tmp_path.rglob(".submitit")), "nothing was queued"


# Points on this machine: side by side, after other runs, stopped at the first failure, and seen from beside a rank.


TWO_CPUS = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
TRACKERS = ("LAUNCH_TRACKER_ID", "WANDB_RUN_ID", "NEPTUNE_CUSTOM_RUN_ID", "COMET_EXPERIMENT_KEY", "WANDB_RESUME")
FAILING_ONCE = f"""
import os, sys

print("ids", *(os.environ.get(name) for name in {TRACKERS!r}), flush=True)
sys.exit(os.environ["LAUNCH_ATTEMPT"] == "1")
"""


def folders(outputs: Path) -> list[RunFolder]:
    return [RunFolder(path.parent) for path in sorted(outputs.glob("*/plan.json"))]


@TWO_CPUS
def test_points_run_side_by_side_each_with_its_own_cpus(tmp_path: Path) -> None:
    script = write_script(tmp_path, MEETING)
    words = ("-m", 'script.args="a 2","b 2"', f"script.path={script}", "name=meet", *LOCAL)
    refused = run("launch launch.parallel=999", *words, cwd=tmp_path, status=2)
    assert re.search(r"found: launch.parallel=999, and this machine has \d+ [CG]PUs", refused)
    assert "launch.parallel=x" in run("launch launch.parallel=x", *words, cwd=tmp_path, status=2)
    assert not (tmp_path / "outputs").exists()
    table = run("launch launch.parallel=2", *words, cwd=tmp_path)
    one, two = folders(tmp_path / "outputs" / "meet")
    cpus = [re.findall(r"CPUs (.*)", printed(folder))[0].split() for folder in (one, two)]
    assert cpus[0] and cpus[1] and not {*cpus[0]} & {*cpus[1]}
    assert "at the same time as" in table and "no efficiency is claimed" in table


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_shares_have_every_item_once(count: int) -> None:
    for parts in (1, 2, 3):
        found = [item for part in range(parts) for item in share(range(count), part, parts)]
        assert found == [*range(count)]


def test_the_first_failure_stops_the_points_that_wait(tmp_path: Path) -> None:
    script = write_script(tmp_path, "import sys\nsys.exit(int(sys.argv[1]))\n")
    words = ("-m", "script.args=0,1,2", f"script.path={script}", "name=x", "launch.stop_at_first_failure=true", *LOCAL)
    text = run("launch", *words, cwd=tmp_path, status=1)
    assert text.count("launch.stop_at_first_failure=true: stopping the other points") == 1
    ran = ["agent_started" in names(folder) for folder in folders(tmp_path / "outputs" / "x")]
    assert ran == [True, True, False]
    refused = run("launch launch.detach=true fresh=true", *words, cwd=tmp_path, status=2)
    assert "launch.stop_at_first_failure=true with launch.detach=true" in refused


def test_a_run_after_another_begins_only_if_that_has_finished(tmp_path: Path) -> None:
    script = write_script(tmp_path, "import sys\nsys.exit(int(sys.argv[1]))\n")
    program = (f"script.path={script}", *LOCAL)
    run("launch name=good script.args=0", *program, cwd=tmp_path)
    run("launch name=bad script.args=1", *program, cwd=tmp_path, status=1)
    after = partial(run, "launch", "name=next", "script.args=0", *program, cwd=tmp_path)
    refused = after("launch.after=outputs/bad", status=2)
    assert "is failed" in refused
    assert "type next: the command of that run again, or launch.after=afterany:outputs/bad" in refused
    assert "outputs/never" in after("launch.after=outputs/never", status=2)
    assert not (tmp_path / "outputs" / "next").exists()
    after("launch.after=outputs/good")
    after("launch.after=afterany:outputs/bad", "fresh=true")


def test_trackers_continue_the_run_of_each_rank(tmp_path: Path) -> None:
    script = write_script(tmp_path, FAILING_ONCE)
    words = (f"script.path={script}", "script.resumes=true", *LOCAL[:1], "ranks_per_node=2", *LOCAL[2:])
    run("launch run_dir=run", *words, cwd=tmp_path)
    folder = RunFolder(tmp_path / "run")
    ids = [[printed(folder, attempt, rank).split()[1:] for rank in (0, 1)] for attempt in (1, 2)]
    assert ids[0] == ids[1] and ids[0][0] != ids[0][1]
    for same, wandb, neptune, comet, resume in ids[0]:
        assert same == wandb == neptune == comet and resume == "allow" and re.fullmatch(r"[0-9a-f]{32}", same)
    again = run("launch run_dir=other script.env.WANDB_RUN_ID=mine", *words, cwd=tmp_path)
    assert "finished" in again
    mine = printed(RunFolder(tmp_path / "other")).split()[1:]
    assert mine[1] == "mine" and mine[0] not in ("mine", ids[0][0][0])


def test_gpus_named_by_uuid_are_handed_on_by_uuid(tmp_path: Path) -> None:
    script = write_script(tmp_path, "import os\nprint('has', os.environ['CUDA_VISIBLE_DEVICES'])\n")
    words = (f"script.path={script}", "nodes=2", "run_dir=run", *LOCAL)
    run("launch", *words, cwd=tmp_path, CUDA_VISIBLE_DEVICES="GPU-a7, MIG-b3")
    assert [printed(RunFolder(tmp_path / "run"), 1, rank) for rank in (0, 1)] == ["has GPU-a7\n", "has MIG-b3\n"]


def test_a_script_runs_under_a_python_without_torch_and_reports_by_the_worker(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "theirs"], check=True)
    python = tmp_path / "theirs" / "bin" / "python"
    program = ("workload=script", f"script.path={PROGRAM}", *options(steps=4), *LOCAL[:2], *LOCAL[3:])
    words = (f"script.python={python}", f"script.env.PYTHONPATH={ROOT}", "nodes=2", "run_dir=run", *program)
    run("launch", *words, cwd=tmp_path)
    folder = RunFolder(tmp_path / "run")
    assert checkpoint(folder)["step"] == 4 and "finished" in names(folder)
    there = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in there.stderr


def test_a_shell_beside_a_rank_and_the_stacks_of_all(tmp_path: Path) -> None:
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "log"
    words = ("run_dir=run", "nodes=2", *LOCAL[:2], *LOCAL[3:], *COUNTING, *options(steps=1000000))
    process = start_fork("launch", *words, cwd=tmp_path, log=log)
    wait_for(lambda: folder.metrics(0).exists() and folder.metrics(0).stat().st_size, "a step")
    attach = partial(run, "launch.attach", "run", cwd=tmp_path)
    there = attach("--rank", "1", "--", "env")
    assert "\nRANK=1\n" in there and f"\nLAUNCH_RUN_DIR={folder.path}\n" in there
    stacks = attach("--stacks")
    assert re.match(r"\d of 2 ranks: 0", stacks) and "counting.py" in stacks and "most recent call first" in stacks
    assert "no process of rank 7" in attach("--rank", "7", status=2)
    run("launch.cancel run", cwd=tmp_path)
    assert process.wait(timeout=120) == 1
    assert "run is cancelled" in attach(status=2)


def test_equal_stacks_stand_together_and_the_odd_one_first() -> None:
    alike, odd = "Thread 0x00007f11 (most recent call first):\n  a", "Thread 0x00007f22 (most recent call first):\n  b"
    other = alike.replace("0x00007f11", "0x00007f33")
    text = grouped({0: alike, 1: other, 2: odd, 3: other, 5: alike})
    assert text.startswith("1 of 5 ranks: 2\n") and "4 of 5 ranks: 0-1, 3, 5\n" in text
