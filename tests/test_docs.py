"""What docs/ shows works: every command is run, planned or composed here, or says in its fence why not.

A fence ``bash`` holds commands that are tried; ``bash not-run: REASON`` others. Of the features' table each row is.
The README's commands do what they say: its two set-up lines run whole in ``.ci/run``; here is every other one.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from gpt.config import TrainConfig, compose_train
from launch.config import ClusterKind
from launch.config.compose import compose_launch, prepare_overrides, typed_config
from launch.plan.plan import make_plan
from launch.runs.measured import COLLECTIVES, LinkFit, Network, network_document, rates_document
from tests.support.commands import ROOT, TINY, environment, run, start, wait_for
from tests.support.composing import OPENWEBTEXT, config_from, without_openwebtext
from tests.support.planning import refused

PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^( *)```bash(?P<info>[^\n]*)\n(?P<text>.*?)^\1```", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text()
TYPED = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
FEATURES = (ROOT / "docs" / "features.md").read_text()
ROWS = re.findall(r"^\| .*? \| `((?:python|sbatch|tensorboard)[^`]*)` \| (\S+) \|$", FEATURES, re.MULTILINE)
NEEDS_MORE = (
    "data=tinystories",
    "data=tokens",
    "examples/",
    "benchmarks.",
    "package.norms",
    "hf:weights",
    "--fit",
    "pip wheel",
)
"""Parts of commands that need a network, files of others, or much time. Tests in other files run those commands."""


def shown(page: Path) -> Iterator[str]:
    """Commands of a page that are tried, one a line."""
    for fence in FENCE.finditer(page.read_text()):
        if not fence["info"].strip():
            lines = fence["text"].replace("\\\n", " ").splitlines()
            yield from (shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip())


COMMANDS = dict.fromkeys([command for page in PAGES for command in shown(page)])
COMMANDS |= dict.fromkeys(shlex.join(shlex.split(command)) for command, _ in ROWS)
TRIED = [c for c in COMMANDS if not any(word in c for word in NEEDS_MORE)]
ON_RUNS = (
    *(f"launch.{name}" for name in ("status", "why", "logs", "verify", "report", "project", "fleet", "trace")),
    *(f"gpt.{name}" for name in ("generate", "evaluate", "compare", "export")),
)
ELSEWHERE = {
    "gpt.smoke": "tools/test_tools.py",
    "gpt.bench_matmul": "planning/test_cost.py",
    "launch.bench_network": "launch/test_bench_network.py",
    "launch.doctor": "launch/test_doctor.py",
    "launch.attach": "launch/test_sweep.py",
    "launch.storm": "launch/test_storm.py",
    "gpt.prepare": "data/test_prepare.py",
    "gpt.rehearse": "rehearsal/test_rehearsal.py",
}
"""Commands whose own tests take these arguments apart; composed here, not run."""


def module_of(command: str) -> str:
    """The module that a command starts, or its first word."""
    words = shlex.split(command)
    return words[words.index("-m") + 1] if "-m" in words and words[0] in ("python", "torchrun") else words[0]


def of(*modules: str) -> list[str]:
    return [command for command in TRIED if module_of(command) in modules]


def words_of(command: str) -> list[str]:
    """Arguments of a command, without the program."""
    words = shlex.split(command)
    return words[words.index("-m", 1) + 2 :] if words[0] in ("python", "torchrun") else words[1:]


def test_commands_that_are_not_run_say_why() -> None:
    fences = [(page.name, fence["info"]) for page in PAGES for fence in FENCE.finditer(page.read_text())]
    assert [f for f in fences if not re.fullmatch(r"| not-run: \S.{8,}", f[1])] == []
    kinds = {"launch", "gpt.train", "sbatch", "tensorboard", *ON_RUNS, *ELSEWHERE}
    assert len(TRIED) > 60
    assert {module_of(command) for command in TRIED} <= kinds


def write_measurements(folder: Path) -> None:
    """Write links and rates of products as they might have been measured."""
    links = {name: LinkFit(20e-6, 10e9, 0.01) for name in COLLECTIVES}
    network = Network(8, {"intra_node": links, "inter_node": links})
    (folder / "network.json").write_text(json.dumps(network_document(network, {"nodes": 2})))
    sample = {"precision": "fp32", "m": 64, "n": 64, "k": 64, "seconds": 1e-5}
    (folder / "matmul.json").write_text(json.dumps(rates_document("CPU", [sample], {})))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    write_measurements(tmp_path)
    (tmp_path / "FILE").write_text("all work and no play makes jack a dull boy\n" * 400)
    for name in ("train.py", "mypackage/train.py", "counter/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    blocks = re.findall(
        r"```python\n# (counter/__init__\.py)\n(.*?)```", (ROOT / "docs" / "workloads.md").read_text(), re.S
    )
    (tmp_path / blocks[0][0]).write_text(blocks[0][1])
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("command", of("launch", "sbatch"))
def test_what_is_launched_is_planned(command: str, folder: Path) -> None:
    typed = [word for word in words_of(command) if word not in ("-m", "slurm/multi_node.sh")]
    # Of a sweep its first point.
    several = re.compile(r"^(nodes=\d+|parallel=\w+|optim\.lr=[\de-]+|script\.options\.seed=\d+),.*")
    words = prepare_overrides([several.sub(r"\1", word) for word in without_openwebtext(typed, folder)])
    kind = ClusterKind.slurm if "cluster=slurm" in typed or command.startswith("sbatch") else ClusterKind.local
    if "model.activation=relu" in words:  # the row that shows a refusal
        refused(make_plan, typed_config(compose_launch(words)), words, kind)
    else:
        assert make_plan(typed_config(compose_launch(words)), words, kind).nodes > 0


@pytest.mark.parametrize("command", of("gpt.train", *ELSEWHERE))
def test_what_is_trained_or_prepared_composes(command: str, folder: Path) -> None:
    words = [word for word in words_of(command) if "=" in word and not word.startswith(("-", "outputs/"))]
    if any(word.startswith("eval.tasks") for word in words):
        pytest.importorskip("lm_eval")
    if module_of(command) in ("launch.bench_network", "launch.doctor", "launch.storm"):
        typed_config(compose_launch(prepare_overrides(words))).validate()
    else:
        config = OmegaConf.to_object(compose_train(words))
        assert isinstance(config, TrainConfig)
        config.validate()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sweeps that the pages look at, of which one is a copy of the other."""
    folder = tmp_path_factory.mktemp("docs")
    run("launch -m nodes=1,2 optim.max_steps=12 launch.report_files=[csv]", *TINY, cwd=folder)
    shutil.copytree(folder / "outputs" / "quick_test", folder / "outputs" / "other", symlinks=True)
    write_measurements(folder)
    return folder


def on_runs() -> list[str]:
    """Commands that look at runs, each once whatever its page calls the folder; of a report its table alone."""
    of_readme = [shlex.join(shlex.split(command)) for command in TYPED if module_of(command) in ON_RUNS]
    assert len(of_readme) == 8
    typed = (command.replace("outputs/scaling", "outputs/quick_test") for command in (*of(*ON_RUNS), *of_readme))
    once = dict.fromkeys(typed)
    return [f"{command} --files md" if module_of(command) == "launch.report" else command for command in once]


@pytest.mark.parametrize("command", on_runs())
def test_what_looks_at_runs_does(command: str, trained: Path) -> None:
    plans = trained.glob("outputs/quick_test/*/plan.json")
    points = {json.loads(path.read_text())["nodes"]: str(path.parent) for path in plans}
    at = re.compile(r"^outputs/quick_test/nodes=(\d)$")
    words = [at.sub(lambda found: points[min(int(found[1]), 2)], word) for word in words_of(command)]
    if (trained / "exported").is_dir():  # several pages export to one place
        shutil.rmtree(trained / "exported")
    assert run(module_of(command), *words, cwd=trained)


def test_every_row_of_the_features_has_a_command_and_a_test() -> None:
    tables = FEATURES.split("## Left out on purpose")[0]
    rows = [line for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| feature")]
    assert len(rows) == len(ROWS) > 45
    assert [test for _, test in ROWS if not (ROOT / test).is_file()] == []


def test_the_site_has_every_page() -> None:
    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text())
    nav = yaml.safe_load(text)["nav"]
    named = {uri for section in nav for pages in section.values() for page in pages for uri in page.values()}
    assert {page.name for page in PAGES} == {uri for uri in named if "/" not in uri}
    assert all((ROOT / uri.removeprefix("checkout/")).is_file() for uri in named if "/" in uri)


# The README


SMALL = [*TINY, "optim.max_steps=12"]
UNDRAWN = ["launch.report_files=[md,csv]"]
TOOLS = ("prepare", "compare", "generate", "evaluate", "export")


def commands(start_word: str) -> list[str]:
    found = [command for command in TYPED if command.startswith(start_word)]
    assert found, start_word
    return found


def test_every_command_is_tested_here() -> None:
    known = ("python3 -m venv", "python -m launch ", "python -m gpt.train", "torchrun", "tensorboard", "sbatch")
    modules = tuple(f"python -m launch.{name}" for name in ("report", "doctor", "status", "logs", "cancel", "verify"))
    modules += tuple(f"python -m gpt.{name}" for name in TOOLS)
    assert [c for c in TYPED if not c.startswith((*known, *modules))] == []


def named_commands(*paths: Path) -> set[str]:
    """Modules of ours that texts name behind ``python -m``."""
    texts = "\n".join(path.read_text() for path in paths)
    return set(re.findall(r"python -m ((?:launch|gpt|slurm)(?:\.[a-z]\w*)?)\b", texts))


def test_every_module_that_is_named_as_a_command_is_started_by_a_test() -> None:
    rooms = (path for room in ("docs", "examples", "launch", "gpt", "slurm") for path in (ROOT / room).rglob("*"))
    texts = [path for path in rooms if path.suffix in (".md", ".py", ".sh")]
    commands = named_commands(ROOT / "README.md", ROOT / "configs" / "config.yaml", *texts)
    assert len(commands) > 12
    words = {f"gpt.{tool}" for tool in TOOLS}
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name != "test_structure.py":  # which names modules for another reason
            constants = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
            words |= {str(constant.value).partition(" ")[0] for constant in constants}
    scripts = [path for path in (ROOT / "slurm").glob("*.sh") if f"slurm/{path.name}" in words]
    assert commands - words - named_commands(*scripts) == set()


def test_every_script_that_is_submitted_is_started_by_a_test() -> None:
    scripts = {f"slurm/{path.name}" for path in (ROOT / "slurm").glob("*.sh")} - {"slurm/env.sh"}  # which they source
    texts = "\n".join(path.read_text() for path in (ROOT / "tests" / "slurm").glob("*.py"))
    assert scripts == {script for script in scripts if script.removeprefix("slurm/") in texts} != set()


def test_the_loss_that_is_shown_is_said_to_be_of_one_corpus() -> None:
    ((shown,),) = [re.findall(r"nodes=1 .* (\d\.\d{4})$", README, re.MULTILINE)]
    beside = README[: README.index(shown)].rsplit("```", 1)[0].rsplit("```", 1)[1]
    assert re.search(r"of\s+3\.\d+\.\d+; another version\s+has another text, and another loss", beside)


def test_the_installed_command_is_the_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((module, name),) = re.findall(r"^    gpt-launch = (\S+):(\w+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["gpt-launch", "--version"])
    assert getattr(import_module(module), name)() == 0
    assert capsys.readouterr().out.startswith("gpt-launch ")


def test_the_two_set_up_lines_pin_and_end_in_the_main_job_and_the_tests() -> None:
    first, second = commands("python3 -m venv .venv && ")
    assert first.endswith("&& .venv/bin/python -m launch -m nodes=1,2,4")
    assert second.endswith("&& .venv/bin/python -m pytest")
    assert all("-c constraints.txt -e" in command for command in (first, second))
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / path).exists(), f"README links to {path}"


def test_the_tour_has_six_files_and_the_architecture_every_folder_and_ten_words() -> None:
    tour = re.findall(r"^\d\. \[(\S+\.py)\]\(\1\) ", README, re.MULTILINE)
    assert len(tour) == 6 and [path for path in tour if not (ROOT / path).is_file()] == []
    architecture = (ROOT / "docs" / "architecture.md").read_text() + "\n"
    folders = set(re.findall(r"^\| `(\w+)/` \|", architecture, re.MULTILINE))
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    every = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"hydra_plugins", "docs", "containers"}
    assert every - folders == set()
    (words,) = re.findall(r"\| word \| meaning \|\n.*?\n(?!\|)", architecture, re.DOTALL)
    assert words.count("\n") == 2 + 10


@pytest.mark.parametrize("command", [c for c in commands("python -m launch ") if "slurm" in c])
def test_what_is_for_a_cluster_is_planned(command: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(command)[3:] if word != "dry_run=true"]
    if OPENWEBTEXT in words:
        text = run("launch dry_run=true", *words, cwd=tmp_path, status=2)
        assert f"type next: python -m gpt.prepare {OPENWEBTEXT}" in text
        assert [c for c in commands("python -m gpt.prepare") if c.startswith(f"python -m gpt.prepare {OPENWEBTEXT}")]
        words = without_openwebtext(words, tmp_path)
    text = run("launch dry_run=true", *words, cwd=tmp_path)
    assert "#SBATCH --nodes=4" in text and "on slurm" in text


def test_what_trains_for_long_on_a_cluster_has_more_than_the_default_corpus() -> None:
    planned = [c for c in (*commands("python -m launch "), *commands("sbatch")) if "optim=gpt2" in c]
    assert len(planned) >= 3 and {c for c in planned if OPENWEBTEXT not in c} == {
        c for c in planned if "dry_run=true" in c
    }
    config = config_from(["model=gpt2_124m", "optim=gpt2"])
    tokens = config.optim.max_steps * config.optim.global_batch * config.model.block_size
    assert tokens < 2 * 9e9, "of which OpenWebText has so many"


@pytest.mark.parametrize(
    "command", [c for c in commands("python -m launch ") if not {"cluster=slurm", "workload=script"} & {*c.split()}]
)
def test_what_is_for_this_machine_runs(command: str, tmp_path: Path) -> None:
    text = run("launch", *shlex.split(command)[3:], *SMALL, *UNDRAWN, cwd=tmp_path)
    assert "finished  step 12/12" in text


def test_a_script_is_launched(tmp_path: Path) -> None:
    (command,) = (c for c in commands("python -m launch ") if "workload=script" in c)
    text = run(f"launch output_dir={tmp_path}", *shlex.split(command)[3:], *UNDRAWN, cwd=ROOT)
    assert text.count(" finished ") >= 2 and "Strong scaling of ddp_with_worker" in text


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's torchrun line and its line for a text of one's own were typed."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "FILE").write_text("all work and no play makes jack a dull boy\n" * 2000)
    for command in [*commands("torchrun"), *commands("python -m gpt.train")]:
        words = shlex.split(command)
        module = ["torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words[2:]
        run(*module, *SMALL, cwd=folder)
    return folder


def test_the_report_is_made_of_what_was_trained(used: Path) -> None:
    for command in commands("python -m launch.report"):
        text = run(*shlex.split(command)[2:], cwd=used)
        assert "fsdp" in text and "finished" in text
    assert (used / "outputs" / "quick_test" / "scaling.png").is_file()
    for command in commands("python -m launch.cancel"):
        assert "nothing to cancel, finished" in run(*shlex.split(command)[2:], cwd=used)


def test_files_become_a_corpus(used: Path) -> None:
    """OpenWebText is read in test_a_dataset_is_read_at_its_revision."""
    lines = [json.dumps({"text": path.read_text()}) for path in sorted((ROOT / "gpt").rglob("*.py"))]
    (used / "FOLDER").mkdir()
    (used / "FOLDER" / "a.jsonl").write_text("\n".join(lines))
    for command in commands("python -m gpt.prepare data=files"):
        text = run(*shlex.split(command)[2:], cwd=used)
        assert "val: " in text and "sentencepiece" in text


def test_the_doctor_says_that_there_is_no_slurm(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for command in commands("python -m launch.doctor"):
        text = run(*shlex.split(command)[2:], cwd=tmp_path, status=1, PATH=str(tmp_path / "bin"))
        assert "sbatch" in text


def test_tensorboard_opens_the_outputs(used: Path, tmp_path: Path) -> None:
    (command,) = commands("tensorboard")
    log = tmp_path / "log"
    process = start("tensorboard.main", *shlex.split(command)[1:], "--port", "0", cwd=used, log=log)
    try:
        wait_for(lambda: "http://" in log.read_text() or process.poll() is not None, "TensorBoard's address")
        assert "http://" in log.read_text(), log.read_text()
    finally:
        process.kill()  # a SIGTERM is lost where it comes while a request is served
        process.wait()


@pytest.mark.parametrize("command", commands("sbatch"))
def test_the_batch_script_plans_for_the_nodes_of_its_job(command: str, tmp_path: Path) -> None:
    words = without_openwebtext(shlex.split(command), tmp_path)
    assert (ROOT / words[1]).is_file()
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}
    command = [sys.executable, "-m", "launch.batch", *words[2:]]
    done = subprocess.run(command, cwd=tmp_path, env=environment(**job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 x 8 = 16 ranks on slurm" in done.stderr
    assert (Path(done.stdout.strip()) / "plan.json").is_file()
