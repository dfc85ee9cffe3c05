"""The structure holds: who may import whom, and every YAML under configs/ composes."""

from __future__ import annotations

import ast
import itertools
from functools import cache
from pathlib import Path

import pytest
import yaml

from launch.config.compose import compose_launch, typed_config
from tests.support.commands import ROOT

PACKAGES = ("gpt", "launch", "slurm", "hydra_plugins", "configs")


def modules() -> dict[str, Path]:
    """All modules of the project by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path, top_level_only: bool = False) -> frozenset[str]:
    """Dotted names that a module imports, at its top or anywhere; names that are submodules are completed."""
    tree = ast.parse(path.read_text())
    blocks = [statement.body for statement in tree.body if isinstance(statement, ast.With)]
    nodes = [*tree.body, *itertools.chain(*blocks)] if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def starts(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


RULES = [
    ("gpt", ["launch.agent", "launch.config", "launch.jobs", "launch.plan", "launch.scheduler", "slurm", "submitit"]),
    ("gpt.model", ["torch.distributed", "gpt.parallel", "gpt.train", "gpt.data"]),
    ("gpt.accounting", ["torch", "gpt.model", "gpt.parallel"]),
    ("gpt.planning", ["torch", "gpt.model", "gpt.parallel", "gpt.train"]),
    ("gpt.config", ["torch", "gpt.model", "launch.runs.compose"]),
    ("gpt.data", ["gpt.model", "gpt.parallel", "gpt.train"]),
    ("gpt.checkpoint", ["gpt.model", "gpt.parallel", "gpt.train", "gpt.data"]),
    ("gpt.conversion", ["torch.distributed", "gpt.parallel", "gpt.train", "transformers"]),
    ("gpt.parallel", ["gpt.train", "gpt.data", "gpt.metrics"]),
    ("launch.report", ["torch", "submitit", "launch.jobs.submit", "launch.plan", "hydra"]),
    ("slurm", ["launch.agent", "launch.jobs", "launch.plan", "torch", "gpt.train", "gpt.model"]),
]


@pytest.mark.parametrize(("package", "forbidden"), RULES, ids=[package for package, _ in RULES])
def test_dependencies_point_one_way(package: str, forbidden: list[str]) -> None:
    checked = [name for name in modules() if starts(name, package)]
    assert checked
    wrong = [(m, i) for m in checked for i in imports(modules()[m]) if starts(i, *forbidden)]
    assert not wrong


def test_metrics_and_checkpoints_know_no_slurm() -> None:
    for name, path in modules().items():
        if starts(name, "gpt"):
            code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith(("#", '"')))
            assert "SLURM_" not in code and "scontrol" not in code, name


ON_THE_NODES = ("launch.agent.workers", "launch.agent.rendezvous", "launch.agent.heartbeat", "launch.doctor.links")


def test_the_login_node_loads_no_torch() -> None:
    """Nothing that the launcher's commands import, however far down, imports torch at its top level."""
    every = modules()
    seen, waiting = (
        set(),
        [name for name in every if starts(name, "launch", "hydra_plugins") and name not in ON_THE_NODES],
    )
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        wanted = imports(every[name], top_level_only=True)
        assert not [i for i in wanted if starts(i, "torch", "deepspeed", "transformers")], name
        waiting += [i for i in wanted if i in every]
    assert {"launch.sweep", "gpt.planning.memory", "gpt.data.corpus"} <= seen


def test_no_module_is_a_dead_end() -> None:
    """Every module is imported by another one or can be started."""
    every = modules()
    used = {i for path in every.values() for i in imports(path)}
    packages = {name for name, path in every.items() if path.name == "__init__.py"}
    started = {name for name, path in every.items() if "__main__" in path.read_text()}
    named = {"hydra_plugins.launch_plugin.launcher"}  # in configs/hydra/launcher/per_point.yaml
    assert set(every) - used - packages - started - named == set()


YAML = sorted(path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", YAML, ids=str)
def test_every_yaml_composes(path: Path, tmp_path: Path) -> None:
    assert isinstance(yaml.safe_load((ROOT / "configs" / path).read_text()), dict)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 1000)
    group, option = "/".join(path.parts[:-1]), path.stem
    words = {
        "": [],
        "experiment": [f"+experiment={option}"],
    }.get(group, [f"{group}={option}"])
    if group == "data" and option in ("text", "files", "tokens"):
        words.append(f"data.path={text}")
    composed = compose_launch(words)
    config = typed_config(composed)
    config.validate()
    if group == "model":
        assert config.name == config.model.name == option


def test_every_preset_says_what_it_is() -> None:
    for path in YAML:
        assert (ROOT / "configs" / path).read_text().startswith("#"), f"{path} opens with a comment"
