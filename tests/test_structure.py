"""The structure holds: who may import whom, and every YAML under configs/ composes."""

from __future__ import annotations

import ast
import io
import itertools
import tokenize
from functools import cache
from pathlib import Path

import pytest
import yaml

from launch.config.compose import compose_launch, typed_config
from tests.support.commands import ROOT

PACKAGES = ("gpt", "launch", "slurm", "hydra_plugins", "configs", "gpt_launch")
COMMANDS = ("train", "prepare", "generate", "evaluate", "export", "compare", "smoke", "bench_matmul", "rehearse")


@cache
def modules() -> dict[str, Path]:
    """All modules of the project by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a module's syntax tree; the first is the module."""
    return tuple(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path, only: str = "") -> frozenset[str]:
    """Full dotted names that a module imports; ``only`` those of its "run time" or of its "top level"."""
    nodes = nodes_of(path)
    if only == "top level":
        body = nodes[0].body  # type: ignore[attr-defined]
        nodes = (*body, *(inner for statement in body if isinstance(statement, ast.With) for inner in statement.body))
    elif only == "run time":
        blocks = [n for n in nodes if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        typed = {inner for block in blocks for inner in ast.walk(block)}
        nodes = tuple(node for node in nodes if node not in typed)
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def targets(path: Path, only: str = "") -> set[str]:
    """Modules of the project that a module imports."""
    return {name if name in modules() else name.rpartition(".")[0] for name in imports(path, only)} & {*modules()}


def starts(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


ROOMS = {
    "gpt_launch": (),
    "gpt_launch.own_names": ("gpt_launch",),
    "gpt_launch.agent": ("launch.agent", "gpt_launch.own_names"),
    "gpt_launch.worker": ("launch.worker", "gpt_launch"),
    "gpt_launch.__main__": ("launch.__main__",),
    "launch.errors": ("gpt_launch.own_names",),
    "launch.runs": ("launch.errors",),
    "launch.worker": ("launch.runs",),
    "launch.slurm.client": ("launch.worker",),
    "launch.slurm.limits": ("launch.slurm.client",),
    "launch.workload": ("launch.worker",),
    "launch.config": ("launch.workload", "configs"),
    "launch.plan": ("launch.config", "launch.slurm.limits"),
    "launch.why": ("launch.runs",),
    "launch.why.__main__": ("launch.attach",),
    "launch.agent": ("launch.plan", "launch.why"),
    "launch.slurm": ("gpt_launch.agent",),
    "launch.script": ("launch.slurm",),
    "launch.report": ("launch.slurm",),
    "launch.project": ("launch.report",),
    "launch.storm": ("launch.slurm",),
    "launch.fleet": ("launch.report",),
    "launch.trace": ("launch.report", "launch.logs"),
    "launch.runner": ("launch.report",),
    "launch.bench_network": ("launch.runner",),
    "launch.api": ("launch.runner", "launch.script", "launch.cancel"),
    **dict.fromkeys(
        (f"launch.{name}" for name in ("batch", "move", "status", "logs", "cancel", "keys")), ("launch.slurm",)
    ),
    "launch.verify": ("launch.slurm",),
    "launch.attach": ("launch.logs", "launch.storm"),
    "launch.doctor": ("launch.bench_network",),
    "launch.__main__": ("launch.runner", "launch.batch"),
    "hydra_plugins": ("launch.api",),
    "gpt.config": ("launch.worker",),
    "gpt.components": ("gpt.config",),
    "gpt.accounting": ("gpt.components",),
    "gpt.model": ("gpt.components",),
    "gpt.checkpoint": ("gpt.config",),
    "gpt.topology": ("gpt.accounting",),
    "gpt.planning": ("gpt.topology",),
    "gpt.data.tokenizers": ("gpt.config",),
    "gpt.data": ("gpt.data.tokenizers", "gpt.topology"),
    "gpt.parallel": ("gpt.model", "gpt.checkpoint", "gpt.topology"),
    "gpt.conversion": ("gpt.accounting", "gpt.model", "gpt.checkpoint", "gpt.data.tokenizers"),
    "gpt.metrics": ("gpt.accounting", "gpt.parallel"),
    "gpt.training": ("gpt.planning", "gpt.data", "gpt.parallel", "gpt.conversion", "gpt.metrics"),
    "gpt.workload": ("gpt.training", "launch.workload"),
    **dict.fromkeys((f"gpt.{command}" for command in COMMANDS), ("gpt.training",)),
    "gpt.smoke": ("gpt.train",),
    "gpt.rehearsal": ("gpt.train",),
    "gpt.rehearse": ("gpt.rehearsal",),
    "slurm": ("launch.runs",),
    "configs": (),
}
"""Room -> the rooms right below it. A module imports from its own room and from those below, however far down."""

ROOTS = {
    "gpt": {"__init__", *COMMANDS},
    "launch": {
        *("__init__", "__main__", "status", "logs", "cancel", "verify", "move", "batch", "runner", "workload"),
        *("api", "errors", "keys", "script"),
    },
}
"""Files of the two packages that lie in no room."""


def room_of(module: str) -> str | None:
    """The innermost room that a module belongs to."""
    return max((room for room in ROOMS if starts(module, room)), key=len, default=None)


def below(room: str) -> frozenset[str]:
    """All rooms that a room may import from."""
    return frozenset(itertools.chain.from_iterable({lower, *below(lower)} for lower in ROOMS[room]))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_the_rooms(room: str) -> None:
    allowed = {room, *below(room)}
    checked = [name for name in modules() if room_of(name) == room]
    assert checked
    wrong = [
        f"{module} imports {target}"
        for module in checked
        for target in targets(modules()[module], "run time")
        if room_of(target) is not None and room_of(target) not in allowed
    ]
    assert not wrong


def test_every_module_is_in_a_room_or_named_at_the_root() -> None:
    for package, names in ROOTS.items():
        there = {path.stem for path in (ROOT / package).glob("*.py")}
        assert there == names, package
    assert not [name for name in modules() if room_of(name) is None and name not in ("gpt", "launch")]


def test_the_launcher_does_not_know_what_it_launches() -> None:
    for module, path in modules().items():
        if starts(module, "launch", "slurm", "hydra_plugins"):
            assert not [name for name in imports(path) if starts(name, "gpt")], module


def test_no_files_import_each_other_in_a_circle() -> None:
    every = {name: targets(path, "run time") - {name} for name, path in modules().items()}
    while free := {name for name, wanted in every.items() if not wanted & set(every)}:
        every = {name: wanted for name, wanted in every.items() if name not in free}
    assert not every, f"in a circle, or above one: {sorted(every)}"


FORBIDDEN = [
    ("gpt.model", ["torch.distributed"]),
    ("gpt.accounting", ["torch"]),
    ("gpt.topology", ["torch"]),
    ("gpt.planning", ["torch"]),
    ("gpt.config", ["torch"]),
    ("gpt.workload", ["torch"]),
    ("gpt.conversion", ["transformers"]),
    ("launch.runs", ["torch", "deepspeed", "submitit"]),
    ("launch.worker", ["torch", "numpy", "yaml", "omegaconf", "hydra"]),
    ("launch.report", ["torch", "submitit", "hydra"]),
    ("gpt", ["submitit", "slurm"]),
    ("slurm", ["torch"]),
]


@pytest.mark.parametrize(("package", "forbidden"), FORBIDDEN, ids=[package for package, _ in FORBIDDEN])
def test_libraries_that_a_room_does_without(package: str, forbidden: list[str]) -> None:
    checked = [name for name in modules() if starts(name, package)]
    assert checked
    assert not [(m, i) for m in checked for i in imports(modules()[m]) if starts(i, *forbidden)]


def test_metrics_and_checkpoints_know_no_slurm() -> None:
    for name, path in modules().items():
        if starts(name, "gpt"):
            code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith(("#", '"')))
            assert "SLURM_" not in code and "scontrol" not in code, name


ON_THE_NODES = tuple(
    f"launch.{name}"
    for name in (
        "agent.ranks",
        "agent.rendezvous",
        "agent.watch",
        "agent.exchange",
        "bench_network.measure",
    )
)


def test_the_login_node_loads_no_torch() -> None:
    """Nothing that the launcher's commands import, however far down, imports torch at its top level."""
    every = modules()
    ours = [name for name in every if starts(name, "launch", "hydra_plugins", "gpt.workload")]
    seen, waiting = set(), [name for name in ours if name not in ON_THE_NODES]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        wanted = imports(every[name], "top level")
        assert not [i for i in wanted if starts(i, "torch", "deepspeed", "transformers")], name
        waiting += {i.rsplit(".", above)[0] for i in wanted for above in range(i.count(".") + 1)} & {*every}
    assert {"launch.runner", "gpt.planning.memory", "gpt.data.corpus"} <= seen


UNPICKLING = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list"),
    *("recv_object_list", "loads", "Unpickler"),
}
"""Torch's collectives of objects, for which gpt.checkpoint.messages has ours, and what else unpickles."""
RUNS_CODE = {
    ("gpt.checkpoint.part", "pickle.Unpickler"): "its class",
    ("gpt.checkpoint.part", "_Unpickler"): "memory without a name, shared with the process that the rank has forked",
    ("gpt.checkpoint.formats", "torch.load"): "optimizer states in a folder that only the user writes",
    ("gpt.parallel.zero", "torch.load"): "the same, each checked against the manifest's sums before",
    ("launch.slurm.jobs", "DelayedSubmission.load"): "submitit's pickle, where it is this user's and nobody else's",
    ("launch.why.facts", "pickle.Unpickler"): "numbers, texts and containers alone: it finds no class",
    ("launch.worker.call", "pickle.load"): "calls and results in folders of this user, where nobody else can write",
    ("launch.worker.call", "pickle.loads"): "what this process has pickled, to see whether it can be read",
    ("launch.agent.after_step", "DelayedSubmission.load"): "the pickle that the job itself is made of",
    ("launch.agent.fork_server", "exec"): "the script of the user, which Python would run otherwise",
}
"""Where something is loaded in a way that could run code of who wrote it, and why that is nobody else."""


def loads_code(node: ast.AST) -> str | None:
    """Return what loads something that may run code: pickle and its like, yaml and torch without their safe loaders."""
    if isinstance(node, ast.Attribute) and node.attr in UNPICKLING and ast.unparse(node.value) != "json":
        return ast.unparse(node)
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func)
    module, _, last = name.rpartition(".")
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    loads = (
        (name.endswith("Unpickler") or name in ("eval", "exec", "shelve.open", "DelayedSubmission.load"))
        or (module in ("pickle", "cloudpickle", "dill", "marshal", "joblib") and last == "load")
        or (
            module == "yaml"
            and last in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")
        )
        or (name == "torch.load" and given.get("weights_only") != "True")
        or (module in ("np", "numpy") and last == "load" and given.get("allow_pickle", "False") != "False")
    )
    return name if loads else None


def test_nothing_is_loaded_that_could_run_code_of_others() -> None:
    every = modules().items()
    assert {(name, loads_code(node)) for name, path in every for node in nodes_of(path) if loads_code(node)} == set(
        RUNS_CODE
    )
    for text, expected in (
        ("yaml.load(file, Loader=yaml.Loader)", True), ("yaml.safe_load(text)", False), ("torch.load(path)", True),
        ("torch.load(path, weights_only=True)", False), ("torch.load(path, weights_only=flag)", True),
        ("pickle.loads(data)", True), ("json.loads(data)", False), ("np.load(path)", False),
        ("np.load(path, allow_pickle=True)", True), ("dist.gather_object(value)", True),
    ):  # fmt: skip
        assert any(map(loads_code, ast.walk(ast.parse(text)))) is expected, text


def test_no_module_is_a_dead_end() -> None:
    """Every module is imported by another one or can be started."""
    every = modules()
    used = {target for path in every.values() for target in targets(path)}
    packages = {name for name, path in every.items() if path.name == "__init__.py"}
    started = {name for name, path in every.items() if "__main__" in path.read_text()}
    # in configs/hydra/launcher/per_point.yaml and configs/workload/
    named = {
        "hydra_plugins.launch_plugin",
        "hydra_plugins.launch_plugin.multinode",
        "gpt.workload",
        "launch.script",
        "gpt_launch.worker",  # imported by scripts
    }
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
        "like": ["workload=script", "script.module=train", f"like={option}"],
    }.get(group, [f"{group}={option}"])
    if group == "data" and option in ("text", "files", "tokens"):
        words.append(f"data.path={text}")
    if (group, option) == ("data", "chat"):
        words += [f"data.path={text}", "data.tokenizer_path=tokenizer.json"]
    if (group, option) == ("data", "custom"):
        words.append("data.source=package.module:function")
    # What these two leave to be said.
    named = {
        "workload/script.yaml": ["script.module=train"],
        "workload/function.yaml": ["call.file=call.pkl"],
        "workload/custom.yaml": [
            "workload._target_=launch.script.ScriptWorkload", "++script.module=train", "++name=train",
        ],
    }  # fmt: skip
    words += named.get(path.as_posix(), [])
    composed = compose_launch(words)
    config = typed_config(composed)
    config.validate()
    if group == "model":
        assert config.name == config.model.name == option


def test_every_preset_says_what_it_is() -> None:
    for path in YAML:
        assert (ROOT / "configs" / path).read_text().startswith("#"), f"{path} opens with a comment"


TOKENS = {
    "gpt": 164_960,
    "gpt/components": 2_120,
    "gpt/conversion": 7_660,
    "gpt/data": 21_170,
    "gpt/metrics": 4_750,
    "gpt_launch": 740,
    "hydra_plugins": 2_500,
    "launch/agent": 33_150,
    "launch/bench_network": 3_710,
    "launch/config": 4_310,
    "launch/doctor": 7_090,
    "launch/fleet": 2_710,
    "launch/plan": 9_080,
    "launch/project": 6_840,
    "launch/report": 29_530,
    "launch/runs": 25_300,
    "launch/slurm": 22_000,
    "launch/storm": 6_450,
    "launch/trace": 1_360,
    "launch/why": 4_020,
    "launch/worker": 6_300,
    "slurm": 7_200,
}
"""Folder -> the most code tokens that it may have: what Python's tokenizer yields, without comments and docstrings.

A larger number here is a decision that its commit explains.
"""
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def code_tokens(path: Path) -> int:
    """Count the tokens of a file without comments, docstrings, line ends and indentation."""
    docstrings = {
        node.lineno
        for node in nodes_of(path)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return sum(
        token.type not in NO_CODE and not (token.type == tokenize.STRING and token.start[0] in docstrings)
        for token in tokens
    )


@pytest.mark.parametrize("folder", TOKENS)
def test_no_folder_grows_unnoticed(folder: str) -> None:
    counted = sum(map(code_tokens, (ROOT / folder).rglob("*.py")))
    assert 0 < counted <= TOKENS[folder], f"{folder} has {counted:,} code tokens; make something smaller first"


def test_no_folder_has_more_than_fifteen_files() -> None:
    folders = {
        path.parent
        for package in ("launch", "gpt_launch", "hydra_plugins", "slurm")
        for path in (ROOT / package).rglob("*.py")
    }
    assert {folder.name: count for folder in folders if (count := len([*folder.glob("*.py")])) > 15} == {}
