"""Files and text of a report, made again, and of several sweeps; and a report that is repeated while runs continue."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch.report import build, write
from launch.report.__main__ import main
from launch.report.selection import Selection, compare_selections, select, source_labels
from launch.report.table import ScalingTable, tabulate_selection
from launch.report.text import markdown_text
from launch.runs.event_files import EventWriter
from launch.runs.find import record_sweep
from launch.runs.folder import ReportFile
from tests.support import commands
from tests.support.commands import call
from tests.support.planning import refused
from tests.support.run_folders import RunBuilder, column, notes_with, read_events, scalars, shown
from tests.support.runs import png_shape

COLUMNS = (
    *("point", "nodes", "ranks", "topology", "tokens_per_s", "tokens_per_s_per_rank", "step_time_s"),
    *("step_time_s_spread", "speedup", "efficiency", "mfu_palm", "oversubscribed"),
)

FILES = {f"scaling.{ending}" for ending in ("md", "csv", "png", "svg", "json", "html")} | {"scaling_parts.csv"}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_csv_has_the_promised_columns_and_empty_cells_for_what_is_not_known(sweep: Path) -> None:
    write(build(sweep), files={ReportFile.csv})
    with (sweep / "scaling.csv").open() as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0])[: len(COLUMNS)] == COLUMNS and len(found[0]) == 29
    assert [row["oversubscribed"] for row in found] == ["false", "false", "true"]
    assert found[2]["efficiency"] == "" and {row["mfu_palm"] for row in found} == {""}


def test_markdown_and_terminal_show_the_same_cells(sweep: Path) -> None:
    write(build(sweep))
    text = (sweep / "scaling.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    title = "point|nodes|ranks|topology|tokens/s|tokens/s per rank|step time|spread|speedup|efficiency|loss|state"
    assert cells[0] == title.split("|")
    two = "nodes=2|2|2|ddp dp_replicate=2|3,938|1,969|520 ms|10.4 ms|1.92|96.2 %|0.6000|finished"
    assert cells[3] == two.split("|")
    assert cells[4][9] == "not claimed"
    terminal = shown(build(sweep))
    for row in cells[2:]:
        assert any(line.split() == " ".join(row).split() for line in terminal.splitlines()), row
    assert text.startswith("# Strong scaling of quick_test") and "![Scaling of quick_test](scaling.png)" in text


COMMANDS = """
import shutil, sys
from launch.report.__main__ import main
def loaded(*names):
    return {*names} & {name.split(".")[0] for name in sys.modules}
assert main([sys.argv[1], "--files", "csv,md"]) == 0 and not loaded("matplotlib", "tensorboard")
shutil.copytree(sys.argv[1], sys.argv[2])
print("ALL OF THEM")
assert main([sys.argv[1]]) == 0 and not loaded("torch", "tensorflow", "hydra", "submitit")
"""


def test_the_command_makes_the_files_that_are_asked_for_and_loads_no_more(sweep: Path, tmp_path: Path) -> None:
    before, few = snapshot(sweep), tmp_path / "few"
    words = [sys.executable, "-c", COMMANDS, str(sweep), str(few)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_few, of_all = done.stdout.split("ALL OF THEM")
    assert snapshot(few).keys() - before.keys() == {"scaling.md", "scaling.csv", "scaling_parts.csv"}
    assert of_few.count("wrote ") == 3 and "dashboard" not in of_few and ".png" not in (few / "scaling.md").read_text()
    assert "Strong scaling of quick_test with a global batch of 16 sequences" in of_all
    for name in (*FILES, "Scaling"):
        assert f"wrote {sweep / name}" in of_all and (sweep / name).exists()
    refused = call(main, sweep, "--files", "md,pdf", status=2)
    assert "'pdf', and not kinds of files, such as --files md,csv" in refused


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_terminal_never_gets_a_folded_number(sweep: Path, width: int) -> None:
    text = shown(build(sweep), force_terminal=True, width=width, color_system=None)
    table = text[: text.index("\n\nquick_test with")].splitlines()[3:]  # without the heading
    assert max(map(len, table)) <= width
    [row] = [line for line in table if line.startswith("nodes=2")]
    for cell in ("3,938", "520 ms", "96.2 %", "finished"):
        assert cell in row
    assert (re.search(r"too narrow for .*topology", text) is not None) is (width < 118)


def test_unknown_figures_are_unavailable_never_zero(tmp_path: Path) -> None:
    RunBuilder(tmp_path / "nodes=1", overrides=("nodes=1",)).attempt()
    RunBuilder.of_nodes(tmp_path, 2).steps(1, [1.0] * 20)
    [row] = [line for line in shown(build(tmp_path)).splitlines() if line.startswith("nodes=1 ") and " ddp " in line]
    assert row.split().count("unavailable") == 7 and " 0" not in row


def test_a_run_of_too_few_steps_has_one_sentence_and_no_empty_columns(tmp_path: Path) -> None:
    RunBuilder(tmp_path, overrides=("nodes=1",)).attempt().steps(1, [1.0] * 6).finished()
    table = build(tmp_path)
    text, terminal = markdown_text(table), shown(table)
    for told in (text, terminal):
        assert told.count("Too few steps for a figure") == 1 and "unavailable" not in told
    assert [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")] == [
        *("point", "nodes", "ranks", "topology", "loss", "state")
    ]


def test_json_has_every_figure_and_no_number_that_is_none(sweep: Path) -> None:
    diverged = RunBuilder(sweep / "nodes=8", 8, 8, ("nodes=8",), cores=64).attempt()
    diverged.steps(1, [0.2] * 12).steps(13, [0.2], loss=float("nan"))
    table = build(sweep)
    write(table, files={ReportFile.json})
    found = json.loads((sweep / "scaling.json").read_text(), parse_constant=pytest.fail)
    for name in ("step_time_s", "efficiency", "label"):
        assert [row[name] for row in found["rows"]] == [getattr(row, name) for row in table.rows]
    assert [row["loss"] is None for row in found["rows"]] == [False, False, False, True]
    assert found["notes"] == list(table.notes) and found["unit"] == "tokens"
    assert found["details"][0]["step_times_s"] == list(table.details[0].step_times_s)


def test_the_svg_is_a_drawing_with_text_that_can_be_searched_and_the_same_each_time(sweep: Path) -> None:
    write(build(sweep), files={ReportFile.svg})
    first = (sweep / "scaling.svg").read_bytes()
    words = " ".join(text.text or "" for text in ElementTree.fromstring(first).iter("{http://www.w3.org/2000/svg}text"))
    assert "Strong scaling of quick_test" in words and "Throughput" in words
    write(build(sweep), files={ReportFile.svg})
    assert (sweep / "scaling.svg").read_bytes() == first


@pytest.mark.parametrize("kind", ["twelve sizes in two series", "nothing measured"])
def test_the_figure_is_drawn_in_every_situation(tmp_path: Path, kind: str) -> None:
    for word in ("ddp", "fsdp"):
        for ranks in range(1, 13) if kind.startswith("twelve") else (1, 2):
            words = (f"nodes={ranks}", f"parallel={word}")
            builder = RunBuilder(tmp_path / ",".join(words), ranks, ranks, words, cores=4, global_batch=27720).attempt()
            if kind.startswith("twelve"):
                builder.steps(1, [1.0 / ranks] * 10)
    (png,) = write(build(tmp_path), files={ReportFile.png})
    width, height, _ = png_shape(png.read_bytes())
    assert png.name == "scaling.png" and width > 1000 and height > 500


def test_the_scaling_run_holds_curves_over_ranks(sweep: Path) -> None:
    write(build(sweep))
    run = sweep / "Scaling"
    assert scalars(run, "scaling/tokens_per_s") == pytest.approx({1: 2048, 2: 3938.4615, 4: 6400})
    assert scalars(run / "ideal", "scaling/tokens_per_s") == pytest.approx({1: 2048, 2: 4096, 4: 8192})
    assert scalars(run, "scaling/efficiency") == pytest.approx({1: 1, 2: 0.96153846})
    assert scalars(run, "scaling/step_time_s_low") == pytest.approx({1: 0.99, 2: 0.5148, 4: 0.3168})
    assert scalars(run, "scaling/loss") == pytest.approx({1: 0.6, 2: 0.6, 4: 0.6})
    found = read_events(run)
    assert found.Images("scaling/figure")[0].encoded_image_string == (sweep / "scaling.png").read_bytes()
    text = found.Tensors("scaling/table")[0].tensor_proto.string_val[0].decode()
    assert (sweep / "scaling.md").read_text().startswith(text)


def test_series_are_runs_with_the_same_tags(tmp_path: Path) -> None:
    for strategy in ("ddp", "fsdp"):
        for nodes in (1, 2):
            words = (f"nodes={nodes}", f"parallel={strategy}")
            RunBuilder(tmp_path / f"{strategy}{nodes}", nodes, nodes, words).attempt().steps(1, [1.0] * 10)
    write(build(tmp_path), files={ReportFile.tensorboard})
    for strategy in ("ddp", "fsdp"):
        assert scalars(tmp_path / "Scaling" / f"parallel={strategy}", "scaling/tokens_per_s") == {1: 2048, 2: 2048}
    record_sweep(tmp_path, ["ddp1", "ddp2"], ["nodes=1,2"])
    write(build(tmp_path), files={ReportFile.tensorboard})
    left = sorted(path.name for path in (tmp_path / "Scaling").iterdir() if path.is_dir())
    assert left == ["ideal"], "a series that is gone leaves no empty folder"


def test_made_again_it_replaces_its_own_files_only(sweep: Path) -> None:
    runs = snapshot(sweep)
    write(build(sweep))
    with EventWriter(sweep / "Scaling") as other:
        other.text("notes", "somebody else's")
    for name in ("scaling.txt", "Scaling/notes.txt"):
        (sweep / name).write_text("kept")
    first = snapshot(sweep)
    (sweep / "sweep.json").write_text('{"points": ["nodes=1", "nodes=2"]}')
    write(build(sweep))
    second = snapshot(sweep)
    assert runs.items() <= second.items()
    changed = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    events = {name for name in changed if name.startswith("Scaling/") and name.endswith(".scaling")}
    assert changed == {*FILES, "sweep.json", *events} - {"scaling_parts.csv"}, "which had no parts before and has none"
    assert [len(list((sweep / "Scaling").rglob("*.scaling"))), second["Scaling/notes.txt"]] == [2, b"kept"]
    assert list(scalars(sweep / "Scaling", "scaling/loss")) == [1, 2]


def test_one_run_has_a_summary_in_its_folder_and_touches_nothing_else(sweep: Path) -> None:
    write(build(sweep), files=set(ReportFile) - {ReportFile.tensorboard})
    before = snapshot(sweep)
    assert shown(build(sweep / "nodes=2")).startswith("\nSummary of nodes=2 with a global batch of 16 sequences")
    write(build(sweep / "nodes=2"))
    new = {f"nodes=2/{name.replace('scaling', 'summary')}" for name in FILES}
    made = snapshot(sweep).keys() - before.keys()
    [events] = [name for name in made if name.startswith("nodes=2/Summary/")]
    assert made == {*new, events} and before.items() <= snapshot(sweep).items()
    picture = read_events(sweep / "nodes=2" / "Summary").Images("summary/figure")[0]
    assert picture.encoded_image_string == (sweep / "nodes=2" / "summary.png").read_bytes()
    assert "efficiency" not in (sweep / "nodes=2" / "summary.md").read_text().lower()


def test_a_later_sweep_leaves_the_earlier_one_its_table_and_says_what_to_type(sweep: Path) -> None:
    """A report names its sweep; the folder of the record keeps each one, and the newest lies beside the points."""
    record_sweep(sweep, ["nodes=1", "nodes=2"], ["nodes=1,2"])
    call(main, sweep, "--files", "md,csv")
    first = {name: (sweep / name).read_bytes() for name in ("scaling.md", "scaling.csv")}
    assert record_sweep(sweep, ["nodes=2", "nodes=4"], ["nodes=2,4"]).number == 2
    later = call(main, sweep, "--files", "md,csv")
    assert "Sweep 2: nodes=2,4 (2 points, typed " in later and "Sweep 2" in (sweep / "scaling.md").read_text()
    assert "sweep 1: nodes=1,2 (2 points, typed " in later
    assert f"python -m launch.report {sweep} --sweep 1" in later and "all 3 runs of the folder: " in later
    now = (sweep / "scaling.csv").read_bytes()
    (sweep / "sweeps" / "0001" / "scaling.csv").unlink()
    assert "Sweep 1: nodes=1,2" in call(main, sweep, "--sweep", 1, "--files", "md,csv")
    assert {name: (sweep / "sweeps" / "0001" / name).read_bytes() for name in first} == first
    assert (sweep / "scaling.csv").read_bytes() == now == (sweep / "sweeps" / "0002" / "scaling.csv").read_bytes()
    call(main, sweep, "--all", "--files", "csv")
    assert column(build(sweep).rows, "point") == ["nodes=2", "nodes=4"]
    assert (sweep / "all_runs.csv").read_text().count("nodes=") == 6 and (sweep / "scaling.csv").read_bytes() == now
    assert record_sweep(sweep, ["nodes=2", "nodes=1"], ["nodes=2,1"]).number == 1, "the same points are the same sweep"
    assert column(build(sweep).rows, "point") == ["nodes=1", "nodes=2"]
    assert "sweep 2: nodes=2,4" in call(main, sweep, "--sweep", 7, status=2)


def test_a_number_where_no_sweep_was_recorded_is_refused_with_what_works(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (sweep, tmp_path / "empty"):
        refusal = refused(select, folder, 3)
        assert "of which none is recorded in" in refusal.expected
        assert folder != sweep or refusal.fix.endswith(f"python -m launch.report {sweep}")


# The command: several sweeps and runs in one report.


STEP_S = {"old": {1: 1.0, 2: 0.8, 4: 0.5}, "new": {1: 0.5, 2: 0.25, 8: 0.1}}


@pytest.fixture
def sweeps(tmp_path: Path) -> dict[str, Path]:
    """Two sweeps with points of the same names; the second one with other GPUs and in bf16."""
    other = {"device_name": "NVIDIA H100", "precision": "bf16"}
    for name, times in STEP_S.items():
        for ranks, step_s in times.items():
            point = tmp_path / name / f"nodes={ranks}"
            built = RunBuilder(point, ranks, ranks, (f"nodes={ranks}",), **(other if name == "new" else {}))
            built.attempt().steps(1, [step_s] * 12).finished()
    return {name: tmp_path / name for name in STEP_S}


def compared(*folders: Path) -> ScalingTable:
    return tabulate_selection(compare_selections([select(folder) for folder in folders]))


def test_each_sweep_has_its_own_baseline_and_sizes_compare_across(sweeps: dict[str, Path]) -> None:
    table = compared(*sweeps.values())
    work = 16 * 128  # tokens of a step in every run
    for row in table.rows:
        times = STEP_S[row.source]
        assert row.ranks is not None and row.label == f"{row.source}/nodes={row.ranks}" and row.series == row.source
        assert row.throughput == pytest.approx(work / times[row.ranks])
        assert row.efficiency == pytest.approx(times[1] / times[row.ranks] / row.ranks)
    [differences] = notes_with(
        table, "new differs from old in ", "hardware (NVIDIA H100, not AMD EPYC 7763)", "precision (bf16, not fp32)"
    )
    assert "software" not in differences
    for name in sweeps:
        assert notes_with(table, f"Speedup and efficiency of {name} are against {name}/nodes=1")


def test_a_comparison_is_written_beside_the_first_and_takes_nothing_from_its_report(
    sweeps: dict[str, Path],
) -> None:
    old, new = sweeps.values()
    kinds = "--files=md,csv,json,html"
    call(main, old, kinds)
    before = {path.name: path.read_bytes() for path in old.iterdir() if path.is_file()}
    both = old.parent / "both"
    assert "new/nodes=8" in call(main, old, new, kinds) + call(main, old, new, kinds, "--out", both)
    for folder in (old, both):
        with (folder / "comparison.csv").open() as file:
            rows = {row["label"]: row for row in csv.DictReader(file)}
        assert list(rows) == [f"{name}/nodes={ranks}" for name, times in STEP_S.items() for ranks in times]
        report = json.loads((folder / "comparison.json").read_text())
        assert report["title"] == "Comparison of old and new" and len(report["rows"]) == 6
        for ending in ("md", "html"):
            assert "new/nodes=8" in (folder / f"comparison.{ending}").read_text()
    assert {name: (old / name).read_bytes() for name in before} == before
    assert not list(new.glob("comparison*"))


def test_runs_of_one_folder_are_compared_as_a_sweep_and_sweeps_by_their_records(sweeps: dict[str, Path]) -> None:
    old, new = sweeps.values()
    table = compared(old / "nodes=1", old / "nodes=4", new / "nodes=1")
    assert column(table.rows, "label") == ["old/nodes=1", "old/nodes=4", "new/nodes=1"]
    assert column(table.rows, "efficiency") == [1.0, pytest.approx(0.5), None], "one alone scales nothing"
    for nodes in ((1, 2), (1, 2, 4)):
        record_sweep(old, [f"nodes={n}" for n in nodes], ["nodes=" + ",".join(map(str, nodes))])
    table = compared(old / "sweeps/0001", old / "sweeps/0002")
    assert [row.label for row in table.rows[:3]] == [f"old sweep 1/nodes={n}" for n in (1, 2)] + ["old sweep 2/nodes=1"]
    assert column(table.rows, "efficiency") == [pytest.approx(e) for e in (1, 0.625, 1, 0.625, 0.5)]
    assert not any(row.oversubscribed for row in table.rows), "a run is no neighbour of itself"


def test_folders_of_the_same_name_are_told_apart_by_their_paths() -> None:
    parts = [Selection(Path(path), ()) for path in ("/a/x/scaling", "/a/y/scaling", "/a/other")]
    assert source_labels(parts) == ["/a/x/scaling", "/a/y/scaling", "other"]


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["{old}", "{new}", "{old}"], "{old} and {old}, which share runs", "launch.report {old} {new}"),
        (["{old}", "{old}/nodes=2"], "{old}/nodes=2 and {old}, which share runs", "python -m launch.report {old}"),
        (["{old}", "{old}/absent"], "no folder {old}/absent", "python -m launch.report {old}"),
        (["{old}", "{old}/nodes=1/metrics"], "no run in {old}/nodes=1/metrics", "python -m launch"),
        (["{old}", "{new}", "--sweep", "2"], "--sweep 2 with 2 folders", "{old}/sweeps/0002 {new}"),
        (["{old}", "--out", "/proc/report"], "--out /proc/report, which cannot be written", "the same without --out"),
        (["{old}", "--out", "/proc"], "--out /proc, which cannot be written", "the same without --out"),
        (["{old}", "--out", "{new}"], "--out {new}, with runs in it", "--out {above}/report"),
        (["{old}", "{new}", "--out", "{new}/nodes=1/metrics/rank_00000.jsonl"], "which is a file", "/comparison"),
    ],
    ids=["twice", "a run of the sweep", "no folder", "no run", "a number", "/proc/x", "/proc", "runs", "a file"],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    sweeps: dict[str, Path], words: list[str], found: str, fix: str
) -> None:
    above = sweeps["old"].parent
    before = sorted(above.rglob("*"))
    names = {"above": above, **sweeps}
    error = call(main, *(word.format(**names) for word in words), status=2)
    assert found.format(**names) in error and fix.format(**names) in error.replace("'", "")
    assert sorted(above.rglob("*")) == before


def test_a_report_that_cannot_be_written_beside_the_runs_is_refused_with_out(sweeps: dict[str, Path]) -> None:
    (sweeps["old"] / "scaling.md").mkdir()  # root may write everywhere, but not replace a folder by a file
    error = call(main, sweeps["old"], status=2)
    assert f"{sweeps['old']}: " in error and f"launch.report {sweeps['old']} --out FOLDER" in error


# A watched report follows its runs, and ends with them.


def test_a_report_follows_its_runs_until_they_end(tmp_path: Path) -> None:
    built = [RunBuilder(tmp_path / "s" / f"nodes={n}", n, n, (f"nodes={n}",)).attempt() for n in (1, 2)]
    for run in built:
        run.steps(1, [1.0 / run.ranks] * 12)
    page, table = tmp_path / "s" / "scaling.html", tmp_path / "s" / "scaling.csv"
    words = [sys.executable, "-m", "launch.report", str(tmp_path / "s"), "--watch", "0.2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        commands.wait_for(page.exists, "the page")
        assert 'http-equiv="refresh" content="1"' in page.read_text()
        built[0].steps(13, [1.0] * 8)
        commands.wait_for(lambda: ",15," in table.read_text().splitlines()[1], "the new steps")
        assert process.poll() is None
        for run in built:
            run.finished()
        text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "running" in text and "again in 0.2 s" in text and text.count("finished") >= 2
    assert "refresh" not in page.read_text()


@pytest.mark.parametrize("event", ["cancelled", "budget_reached"])
def test_a_run_that_was_called_off_has_ended(tmp_path: Path, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a [red] sweep"
    run = RunBuilder(folder, 1, 1, ()).attempt()
    run.steps(1, [1.0] * 12)
    run.event(event)
    here, sleep = threading.get_ident(), time.sleep  # other tests may have left threads that sleep

    def fail_here(seconds: float) -> None:
        if threading.get_ident() == here:
            pytest.fail("waits for a run that has ended")
        sleep(seconds)

    monkeypatch.setattr("time.sleep", fail_here)
    text = call(main, folder, "--watch", "0.2", "--files", "md")
    assert f"wrote summary.md in {folder}" in " ".join(text.splitlines())


@pytest.mark.parametrize("typed", ["0", "-1", "soon", "inf"])
def test_an_interval_that_is_none_is_refused(tmp_path: Path, typed: str) -> None:
    told = call(main, tmp_path, f"--watch={typed}", status=2).splitlines()
    assert f"'{typed}', and not seconds above 0" in told[0]
    assert [line.split(":")[0] for line in told] == ["found", "expected", "type next"]
