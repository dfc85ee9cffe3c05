"""The main job: a sweep over nodes on real processes, from the command line to the scaling table."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.batch import wait_for_plan
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.records import OF_THE_RUN, read_records
from tests.support.commands import TINY, run

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
