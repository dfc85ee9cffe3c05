"""What docs/ shows works: every command is run, planned or composed here, or says in its fence why not.

A fence ``bash`` holds commands that are tried; ``bash not-run: REASON`` others. Of the features' table each row is.
What a command of README.md does is tested with the README.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from gpt.config import TrainConfig, compose_train
from launch.config import ClusterKind
from launch.config.compose import compose_launch, prepare_overrides, typed_config
from launch.plan.plan import make_plan
from launch.runs.measured import COLLECTIVES, LinkFit, Network, network_document, rates_document
from tests.support.commands import ROOT, TINY, run
from tests.support.composing import without_openwebtext
from tests.support.planning import refused

PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^( *)```bash(?P<info>[^\n]*)\n(?P<text>.*?)^\1```", re.MULTILINE | re.DOTALL)
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
"""What needs a network, files of others, or long. Tests of it are in its row of the features, or in test_goal.py."""


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
    "launch.attach": "launch/test_local_points.py",
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
    once = dict.fromkeys(command.replace("outputs/scaling", "outputs/quick_test") for command in of(*ON_RUNS))
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
