"""The programs of benchmarks/: pages, tables, peers, GPU paths without a GPU, and golden comparisons that can fail."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.equivalence import same_results
from benchmarks.equivalence.cases import REFUSALS
from benchmarks.faults import causes
from benchmarks.gpu import NEEDED
from benchmarks.page import keep, keep_parts, merged
from benchmarks.scale import growth
from benchmarks.scale.launcher import GPUS
from benchmarks.speed.peers import Setting, Shape, contestants, parse
from tests.support.commands import ROOT, run

TITLES = ("way", "seconds")


def test_a_row_that_was_measured_again_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    script = tmp_path / "saves.py"
    about = "First line.\n\n    commands\n\nWhat is measured.\n"
    keep(script, "Saves", about, merged(script, TITLES, [["waited for", "4"], ["late", "2"]]) + "\n\nA note.")
    again = merged(script, TITLES, [["late", "1"], ["beside", "0.3"]])
    assert again.splitlines() == [
        "| way | seconds |",
        "| --- | --- |",
        "| waited for | 4 |",
        "| late | 1 |",
        "| beside | 0.3 |",
    ]
    assert merged(script, ("way", "minutes"), [["late", "1"]]).splitlines()[2:] == ["| late | 1 |"]


def test_a_part_that_was_measured_again_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    script, about = tmp_path / "saves.py", "First line.\n\n    commands\n\nWhat is measured.\n"
    keep_parts(script, "Saves", about, {"One": "1\n", "Two": "2"})
    keep_parts(script, "Saves", about, {"Two": "3", "Three": "4"})
    page = script.with_suffix(".md").read_text()
    assert page.split("## ", 1)[1] == "One\n\n1\n\n## Two\n\n3\n\n## Three\n\n4\n"
    assert page.startswith("# Saves\n") and "What is measured." in page


ELSEWHERE = {10, 16, 17}


def test_every_measure_has_a_row() -> None:
    numbers = {int(name.split()[0].removeprefix("A")) for name in growth.ROWS}
    assert numbers == set(range(1, 20)) - ELSEWHERE


def test_a_row_that_fails_is_not_reached() -> None:
    found, reached = growth.measured("no such row")
    assert found.startswith("not measured: KeyError") and not reached


def test_the_command_for_gpus_stands_in_the_readme() -> None:
    words = " ".join(map(re.escape, GPUS))
    assert re.search(rf"python -m launch -m nodes=\S+ {words}", (ROOT / "README.md").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    assert run("benchmarks.gpu.paths", cwd=ROOT, status=2).count("\n") == 1


def test_the_list_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    told = run(
        f"benchmarks.gpu.paths --device cpu --only fp32,hsdp --ranks 2 --to {tmp_path}",
        cwd=ROOT,
    )
    results = json.loads(next(tmp_path.glob("cpu_*.json")).read_text())
    names = [result["entry"]["name"] for result in results]
    assert names == ["plain dense", "fp32", "hsdp fp32", "hsdp bf16"]
    assert {result["outcome"] for result in results} == {"ok"}
    assert 0 < results[1]["error"] < 1e-5 < results[3]["error"] < 1e-2
    page = next(tmp_path.glob("cpu_*.md")).read_text()
    assert all(f"| {name} |" in page and f"| {name} |" in told for name in names)
    assert torch.__version__ in page


TINY = ("--layers=1", "--width=32", "--heads=2", "--block=16", "--vocab=256", "--batch=2")


def test_the_programs_for_gpus_need_no_more_than_their_page_names() -> None:
    program = """
import importlib.util, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))  # cannot be imported
import benchmarks.gpu.__main__, benchmarks.gpu.contestant, benchmarks.gpu.paths
"""
    others = "submitit deepspeed matplotlib jinja2 scipy psutil cloudpickle transformers datasets torchao"
    subprocess.run([sys.executable, "-c", program, others], cwd=ROOT, check=True)
    page = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    assert all(package in page for package in NEEDED.values())
    lacking = "import sys; sys.modules['hydra'] = None; import benchmarks.gpu"
    done = subprocess.run([sys.executable, "-c", lacking], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("found: a Python without hydra-core\n")


def test_a_library_that_was_not_given_is_left_out() -> None:
    assert contestants("gpt2", parse([])) == ["ours", "transformers"]
    assert contestants("gpt2", parse(["--nanogpt", ".", "--litgpt", "."])) == ["ours", "nanoGPT", "transformers"]
    assert contestants("llama", parse(["--nanogpt", ".", "--litgpt", "."])) == ["ours", "transformers", "litgpt"]


def test_adamw_is_fused_where_a_peers_own_script_fuses_it_or_everywhere() -> None:
    setting = Setting(Shape("gpt2"), "eager", 1, fused=False, device="cpu")
    assert [setting.fuses(name) for name in ("nanoGPT", "transformers", "litgpt")] == [False, True, False]
    assert Setting(Shape("gpt2"), "eager", 1, fused=True, device="cpu").fuses("nanoGPT")
    assert Setting(Shape("gpt2"), "eager", 1, fused=False, device="cuda").fuses("litgpt")


def test_contestants_take_turns_and_the_table_says_who_was_missing() -> None:
    words = ("--shapes=llama", "--modes=eager", "--threads=1", "--rounds=2", *TINY)
    told = run("benchmarks.speed.peers", *words, cwd=ROOT)
    rows = [line.split(" | ") for line in told.splitlines() if line.startswith("| llama")]
    assert [row[3] for row in rows] == ["ours", "transformers, fused AdamW"]
    assert all(float(cell) > 0 for row in rows for cell in row[4:7])
    assert float(rows[1][7]) > 0 and float(rows[1][8].strip(" |")) > 0
    assert "nanoGPT was not given; litgpt was not given" in told
    assert re.search(r"layers 1, width 32.*load average", told)


HIDES_A_KEY = """import sys

class Printed:
    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.stream.write(text.replace("model.n_layr", "a key"))

    def __getattr__(self, name):
        return getattr(self.stream, name)

sys.stderr = Printed(sys.stderr)
"""
"""Python runs it before everything else where it is the ``sitecustomize`` of a checkout."""


def faulty_checkout(folder: Path) -> Path:
    """Make a checkout with two faults: a time limit of 61 minutes, and a refusal that hides the key that was typed."""
    folder.mkdir()
    for name in ("launch", "gpt", "gpt_launch", "hydra_plugins"):
        (folder / name).symlink_to(ROOT / name)
    for path in (ROOT / "configs").rglob("*"):
        if path.suffix in (".py", ".yaml"):
            copy = folder / "configs" / path.relative_to(ROOT / "configs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text().replace("timeout_min: 60", "timeout_min: 61"))
    (folder / "sitecustomize.py").write_text(HIDES_A_KEY)
    return folder


def test_a_changed_sbatch_line_and_a_key_that_is_not_named_are_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    after = faulty_checkout(tmp_path / "after")
    words = ["--only", "plans,refusals", "--match", "^nodes without GPUs$|n_layr|precision=fp23"]
    assert same_results.main([str(ROOT), str(after), *words]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in lines if not line.startswith("    ")] == [
        "plan: nodes without GPUs: DIFFERS",
        "refusal: launch model.n_layr=3: DIFFERS",
        "refusal: launch precision=fp23: the same",
        next(line for line in lines if line.startswith("-- plans and refusals")),
        "3 comparisons, 2 differ",
    ]
    assert "    -#SBATCH --time=60" in lines and "    +#SBATCH --time=61" in lines
    assert "    after: it does not name model.n_layr" in lines


def test_one_digit_of_a_figure_is_found_and_named_and_a_column_that_is_gone_is_listed() -> None:
    before = "point,speedup,mfu\nnodes=1,1.0,0.4100000000000001\n"
    after = "mfu,point,more\n0.4100000000000002,nodes=1,7\n"
    found = same_results.compare_values("scaling.csv", before, after)
    assert found.differences == ['[0].mfu: "0.4100000000000001", and now "0.4100000000000002"']
    assert found.notes == ["gone: speedup", "new: more"]
    strict = same_results.compare_values("scaling.csv", before, after, strict=True)
    assert "gone: speedup" in strict.differences
    one, other = '{"rows": [{"mfu": 0.1}], "notes": []}', '{"notes": [], "rows": [{"mfu": 0.10}]}'
    assert same_results.compare_values("scaling.json", one, one).differences == []
    assert same_results.compare_values("scaling.json", one, other).differences == ['rows[0].mfu: "0.1", and now "0.10"']
    assert same_results.compare_values("scaling.json", one, "").differences


def test_a_refusal_has_to_keep_its_status_and_to_name_the_value_as_a_word_of_its_own() -> None:
    case = next(case for case in REFUSALS if case.line == "launch nodes=-2")
    text = "found: nodes=-2\nexpected: a number\ntype next: nodes=1\nexit status 2\n"
    assert not same_results.unnamed(case, text)
    assert same_results.unnamed(case, text.replace("nodes=-2", "nodes=-25")) == ["it does not name -2"]
    assert same_results.unnamed(case, text.replace("type next", "fix")) == ["it has no line 'type next: '"]
    (golden,) = same_results.compare_refusals([case], [text], [text.replace("status 2", "status 1")])
    assert golden.differences[0] == "before: exit status 2, after: exit status 1"


PROGRAMS = ROOT / "tests" / "support" / "programs"
OTHERS = [*sorted(PROGRAMS.glob("held_out*.py")), PROGRAMS / "public.py"]


@pytest.mark.parametrize("program", [causes.PROGRAM, *OTHERS], ids=lambda path: path.stem)
def test_planted_faults_expect_kinds_of_the_page_and_have_the_lines_that_they_name(program: Path) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = page.partition("| kind | what it means |")[2].partition("\n\n")[0]
    known = {kind for row in table.splitlines() for kind in re.findall("`(\\w+)`", row.split("|")[1] if row else "")}
    assert {"deadlock", "crash", "left_early"} <= known
    for fault in causes.faults_of(program).values():
        assert set(fault.kinds) <= known
        assert bool(causes.places_of(fault, program)) == bool(fault.line)
        assert fault.needs in causes.PLACES


def test_a_kept_run_is_judged_again_by_what_was_planted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = causes.FAULTS["missing_file"]
    places = causes.places_of(fault, causes.PROGRAM)
    planted = causes.Planted(str(causes.PROGRAM), "missing_file", 2, 1, 2, ["missing_file"], True, places)
    causes.run_planted(planted, fault, tmp_path / "right", limit_s=200)
    shutil.copytree(tmp_path / "right", tmp_path / "wrong")
    told = tmp_path / "wrong" / causes.PLANTED
    told.write_text(json.dumps({**json.loads(told.read_text()), "kinds": ["crash"]}))
    assert causes.main(["--again", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Of 2 runs with a fault, 1 got the right kind, 0 none or `unknown`, and 1 a wrong one." in printed
    assert "The rank was right in 2 of 2, the line in 2 of 2. 2 failed commands printed" in printed
    assert "expected crash\n    exit status 1; rank 1" in printed and str(tmp_path / "wrong") in printed
