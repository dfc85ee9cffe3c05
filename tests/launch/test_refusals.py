"""Refusals of the login node: in three parts, without torch, leaving nothing behind; and missing libraries."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import NOT_IN_POINT, RESUMABLE, OptimConfig, TrainConfig, compose_train
from gpt.topology import split_batch
from launch.config import ClusterKind, Config
from launch.config.compose import compose_launch
from launch.errors import ConfigError
from launch.plan.plan import make_plan
from launch.runs import compose
from launch.runs.compose import RunConfig, choose_folder, refuse_other_run, to_schema
from launch.runs.overrides import LAUNCHER_KEYS
from tests.support.commands import ROOT, TINY, python, run
from tests.support.planning import config_of, refused
from tests.support.runs import write_program

REFUSED: list[tuple[str | list[str], str, str]] = [
    ("model.n_layr=3", "unknown key model.n_layr", "model.n_layer=3"),
    ("+foo=1", "unknown key foo", "the same without foo=1"),
    ("node=2", "unknown key node", "nodes=2"),
    ("model=gpt5", "model=gpt5", "model=gpt2_124m"),
    ("optim.max_steps=many", "optim.max_steps=many", "optim.max_steps=NUMBER"),
    ("precision=fp8", "precision=fp8", "precision=auto"),
    ("nodes", "nodes, which is no override", "nodes=VALUE"),
    ("=2", "=2, which is no override", "the same without =2"),
    ("outputs/x", "outputs/x, which is no override", "output_dir=VALUE"),
    ("train.py", "train.py, which is no override", "workload=script script.path=train.py"),
    (
        "workload=script script.path=x.py script.option.lr=3",
        "unknown key script.option",
        "script.options.lr=3",
    ),
    (
        ["workload=script", "script.path=x.py", "script.args='--n ${node}'"],
        "${node} in script.args",
        r"${nodes} in its place, or \${node} for these signs themselves",
    ),
    (
        "workload=script script.path=x.py script.options.n=[${world_sise}]",
        "${world_sise} in script.options",
        r"${world_size} in its place, or \${world_sise} for these signs themselves",
    ),
    ("workload=script script.path=x.py script.args={a:1}", "script.args={'a': 1}", "script.args="),
    (
        "workload=script script.path=x.py model.n_layer=2",
        "model.n_layer=2, of the workload gpt, with workload=script",
        "the same without model.n_layer=2; options of your program are script.options.NAME=VALUE",
    ),
    (
        "workload=script script.path=x.py experiment=weak_scaling",
        "experiment=weak_scaling, of the workload gpt",
        "the same without experiment=weak_scaling",
    ),
    ("parallel=[ddp,fsdp]", "parallel=[ddp,fsdp], a list of options", "python -m launch -m parallel=ddp,fsdp"),
    ("~model", "~model, which removes it", "the same without ~model"),
    ("resilience.max_restart.crashed=1", "unknown key resilience.max_restart", "resilience.max_restarts.crashed=1"),
    ("nodes==2", "nodes==2, which cannot be read", "nodes=NUMBER"),
    (["cluster.gpu=NVIDIA H100"], "unknown key cluster.gpu", "'cluster.gpu_name=NVIDIA H100'"),
    ("workload=script script.path=x.py batch_size=4", "unknown key batch_size", "script.options.batch_size=4"),
    ("cluster.time=1:30:00", "unknown key cluster.time", "cluster.timeout_min=MINUTES"),
    (
        "optim.global_batch=null",
        "optim.global_batch=null",
        "optim.global_batch=NUMBER; python -m launch.keys optim.global_batch has its meaning",
    ),
    (
        "dry_run=shallow",
        "dry_run=shallow",
        "dry_run=deep",
    ),
    (
        "launch.sequential=true resilience.requeue=chain",
        "launch.sequential=true with resilience.requeue=chain",
        "launch.sequential=false, or resilience.requeue=true",
    ),
    (["cluster.placement=[{partition gpu}]"], "cannot be read", "cluster.placement='[{partition: VALUE}]'"),
    (["placement=[{partition gpu}]"], "unknown key placement", "cluster.placement='[{partition: VALUE}]'"),
    (
        ["cluster.placement=[{partitio: a}]"],
        "cluster.placement=[{partitio: a}]",
        "cluster.placement='[{partition: VALUE}]'",
    ),
    ("nodes=2,3", "nodes=2,3, several values", "python -m launch -m nodes=2,3"),
    ("launch=3", "launch=3", "launch.check_limits=VALUE"),
    ("cluster.exclude=n[3-4]", "cluster.exclude=n[3-4], which cannot be read", "'cluster.exclude=\"n[3-4]\"'"),
    (["cluster.setup=[a b,c=d]"], "which cannot be read", """'cluster.setup=["a b","c=d"]'"""),
    ("nodes=0", "nodes=0", "nodes=1"),
    ("model@x=gpt2_124m", "unknown key model@x", "model=gpt2_124m"),
    (
        "nodes=3",
        "nodes=3 x 1 ranks = 3 ranks, but optim.global_batch=16 is not a multiple of 3",
        "optim.global_batch=18",
    ),
    ("model.n_head=3", "model.n_head=3 does not divide model.n_embd=128", "model.n_head=2"),
    ("model.n_kv_head=3", "model.n_kv_head=3 does not divide model.n_head=4", "model.n_kv_head="),
    ("model.position=rope model.n_embd=20", "rope with heads 5 wide", "model.position=learned"),
    ("data=text", "data=text without data.path", "data.path=FILE"),
    ("data=text data.path=/nowhere.txt", "/nowhere.txt", "data.path="),
    ("data.max_bytes=1000", "validation tokens", "model.block_size="),
    ("model.vocab_size=100", "model.vocab_size=100", "model.vocab_size=256"),
    ("optim.min_lr=1", "optim.min_lr=1", "optim.min_lr="),
    (
        ["optim.optimizer=muon", "optim.options={momentun: 0.9}"],
        "optim.options={'momentun': 0.9} with optim.optimizer=muon",
        "'optim.options={momentum: 0.95}'",
    ),
    ("optim.optimizer=moun", "optim.optimizer=moun", "optim.optimizer=muon"),
    (
        "optim.decay_from=0.8",
        "optim.decay_from=0.8 with optim.schedule=cosine",
        "optim.schedule=wsd optim.decay_from=0.8",
    ),
    ("optim.schedule=wsd optim.decay_from=70", "after step 70 in a run of 60 steps", "optim.decay_from=54"),
    ("optim.schedule=wsd optim.max_steps=10", "10 of them warm-up", "optim.warmup_steps=1"),
    ("optim.schedule=wsd optim.max_tokens=1e5 optim.decay_from=90", "in a run of 49 steps", "optim.decay_from=44"),
    ("cluster.gpus_per_node=2 ranks_per_node=4", "ranks_per_node=4 on nodes with cluster.gpus_per_node=2", "=2"),
    ("device=cuda nodes=64 optim.global_batch=64", "64 ranks on a machine with", "device=cpu"),
    (
        # 16 replicas are far above what machines for tests have, and their shards far below.
        "model.n_layer=24 model.n_embd=1024 model.n_head=16 nodes=16 device=cpu",
        "16 ranks x ",
        "parallel=fsdp",
    ),
    (["name='a\nrm -rf b'"], r"name='a\nrm -rf b'", "name='a_rm -rf b'"),
    ("name=../../escape", "name='../../escape'", "name=escape"),
    ("name='--wrap'", "name='--wrap'", "name=wrap"),
    ("name='a\\b'", r"name='a\\b'", "name=a_b"),
    ("name=..", "name='..'", "name=run"),
    ("output_dir=/proc/x", "cannot be created in /proc", "output_dir=FOLDER"),
    ("output_dir='o%A'", "'%' in the run's path", "output_dir=FOLDER"),
    (["cluster.account='a\nrm -rf b'"], r"cluster.account='a\nrm -rf b'", "cluster.account='a rm -rf b'"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0", "checkpoint.keep_last=1, or null to keep all"),
    ("copy_code=true output_dir='a:b'", "with a : in it", "output_dir=FOLDER without :"),
    (
        "cluster.timeout_min=1 resilience.grace_period_s=50",
        "grace_period_s=50 with",
        "resilience.grace_period_s=40",
    ),
]


@pytest.mark.parametrize(("typed", "found", "fix"), REFUSED, ids=[str(typed) for typed, _, _ in REFUSED])
def test_refused_in_three_parts(typed: str | list[str], found: str, fix: str) -> None:
    words = typed.split() if isinstance(typed, str) else typed
    refused(lambda: make_plan(config_of(*words), words, ClusterKind.local), found=found, fix=fix)


@pytest.mark.parametrize(
    ("group", "text", "found"),
    [
        ("cluster", "kind: [local\ntimeout_min: 3\n", '/cluster/mine.yaml", line 2'),
        (
            "cluster",
            "defaults: [local]\ngpus_per_node: four\n",
            "In 'cluster/mine': cluster.gpus_per_node: Value 'four' of type 'str' could not be converted to Integer",
        ),
        ("workload", "workload: [\n", '/workload/mine.yaml", line 2'),
        ("workload", "nodes: 2\n", "/workload/mine.yaml without workload._target_"),
    ],
)
def test_a_file_of_a_site_that_cannot_be_read_is_named(group: str, text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text(text)
    refused(compose_launch, [f"{group}=mine"], tmp_path, found=found)


def test_several_experiments_compose() -> None:
    composed = compose_launch(["experiment=[synthetic,weak_scaling]"])
    assert composed.optim.weak_scaling and composed.data == compose_launch(["experiment=synthetic"]).data


def test_a_sweep_is_refused_with_status_2_and_advice_for_all_its_points(tmp_path: Path) -> None:
    words = ["-m", "nodes=2,3,5", "cluster=local", "device=cpu", "dry_run=true"]
    text = run("launch optim.global_batch=8", *words, cwd=tmp_path, status=2)
    assert text.splitlines()[-3:] == [
        "found: nodes=3 x 1 ranks = 3 ranks, but optim.global_batch=8 is not a multiple of 3",
        "expected: the same number of sequences for every rank of every point",
        "type next: optim.global_batch=30, or 2 ranks in all",
    ]
    assert "Traceback" not in text and list(tmp_path.iterdir()) == []
    run("launch optim.global_batch=30", *words, cwd=tmp_path)


@pytest.mark.parametrize(
    ("printed", "lines"),
    [
        (
            "sbatch: error: invalid partition specified: hih\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified",
            [
                "found: point nodes=2, and sbatch refuses its job: invalid partition specified: hih; "
                "Batch job submission failed: Invalid partition name specified",
                "expected: resources that this cluster gives to you",
                "type next: python -m launch.doctor, with the same arguments: it compares them with what the cluster "
                "has",
            ],
        ),
        (
            "sbatch: unrecognized option '--foo-bar=1'\nTry \"sbatch --help\" for more information",
            [
                "found: point nodes=2, and sbatch refuses its job: unrecognized option '--foo-bar=1'",
                "expected: options of this cluster's sbatch (sbatch --help)",
                "type next: the same without foo-bar in cluster.additional_parameters",
            ],
        ),
    ],
    ids=["partition", "option"],
)
def test_what_sbatch_refuses_is_said_once_and_in_three_parts(printed: str, lines: list[str], tmp_path: Path) -> None:
    # As Slurm 22.05 prints it, by a controller that does not tell its limits.
    answers = '#!/bin/sh\n[ "$1" = ping ]\n'
    # submitit looks whether srun is there; here it may be the only one.
    refuses = f"#!/bin/sh\ncat >&2 <<'END'\n{printed}\nEND\nexit 1\n"
    for name, text in {"sbatch": refuses, "scontrol": answers, "srun": "#!/bin/sh\n"}.items():
        write_program(tmp_path / "bin" / name, text)
    words = ["cluster=slurm", "cluster.partition=hih", "nodes=2"]
    text = run("launch", *words, cwd=tmp_path, status=1, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert text.splitlines()[-3:] == lines
    assert text.count(printed.splitlines()[0].removeprefix("sbatch: ").removeprefix("error: ")) == 1
    assert not [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()], "no run that never started"


def test_points_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    text = run("launch -m resilience.grace_period_s=10,20", cwd=tmp_path, status=2)
    assert "two points of the sweep with the folder" in text


LOADS_NO_TORCH = """
import os, sys
import launch.__main__
for line in sys.argv[1:]:
    if os.fork() == 0:
        sys.argv[1:] = line.split()
        try:
            launch.__main__.main()
        except SystemExit:
            pass
        print("loaded:", {"torch", "deepspeed", "matplotlib", "tensorboard"} & {*sys.modules}, flush=True)
        os._exit(0)
    os.wait()
"""


def test_help_dry_run_and_refusal_load_no_torch(tmp_path: Path) -> None:
    script = f"workload=script script.path={ROOT}/examples/plain_ddp.py script.progress=(?P<step>.) dry_run=true"
    lines = ("--help", "-m nodes=1,2 parallel=auto dry_run=true", "nodes=3", script)
    text = python(LOADS_NO_TORCH, *lines, cwd=tmp_path)
    assert text.count("loaded: set()") == len(lines), text
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_the_same_keys(tmp_path: Path) -> None:
    text = run("gpt.train optim.lrr=1", cwd=tmp_path, status=2)
    assert "type next: optim.lr=1\n" in text
    text = run("gpt.train parallel.tp=3", cwd=tmp_path, status=2)
    assert "type next: parallel.tp=1, or 3 ranks in all" in text and list(tmp_path.iterdir()) == []


def test_train_sends_the_keys_of_the_launcher_to_the_launcher() -> None:
    refusal = refused(compose_train, ["seed=1", "cluster.partition=x"], found="a key of the launcher")
    assert refusal.fix == "python -m launch cluster.partition=x"
    refusal = refused(compose_train, ["script.path=a b.py"])
    assert refusal.fix == "python -m launch workload=script 'script.path=a b.py'"
    own, every = ({field.name for field in dataclasses.fields(kind)} for kind in (Config, RunConfig))
    assert own - every == {*LAUNCHER_KEYS}


def test_half_an_environment_of_ranks_is_refused(tmp_path: Path) -> None:
    text = run("gpt.train", cwd=tmp_path, status=2, RANK="0")
    assert "RANK in the environment, but not WORLD_SIZE" in text


@given(
    global_batch=st.integers(1, 4096),
    micro_batch=st.integers(1, 64),
    ranks=st.integers(1, 64),
    weak=st.booleans(),
)
def test_a_batch_is_cut_without_rest_or_refused(global_batch: int, micro_batch: int, ranks: int, weak: bool) -> None:
    optim = OptimConfig(global_batch=global_batch, max_micro_batch=micro_batch, weak_scaling=weak)
    try:
        batch = split_batch(optim, ranks)
    except ConfigError:
        assert not weak and global_batch % ranks != 0
        return
    assert batch.global_batch == global_batch * (ranks if weak else 1)
    assert batch.micro * batch.accumulation * ranks == batch.global_batch
    assert batch.micro <= micro_batch


def test_another_config_is_refused_in_the_folder_of_a_run(tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path / 'run'}"]
    composed = compose_train(words)
    config = to_schema(composed, TrainConfig)
    folder = choose_folder(config, words, NOT_IN_POINT)
    compose.write_config(folder, composed, words)
    refuse_other_run(folder, config, TrainConfig, RESUMABLE)
    config.optim.lr = 0.5
    refused(refuse_other_run, folder, config, TrainConfig, RESUMABLE, found="optim.lr=0.002, and now optim.lr=0.5")


# Libraries that not every run needs may be missing where they are not needed: on a login node, and under DDP.


WITHOUT = """
import importlib.abc, os, runpy, sys
import hydra_plugins

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
# Hydra looks for its plugins in the folders of this package, whatever the importers say.
hydra_plugins.__path__ = [folder for folder in hydra_plugins.__path__ if "site-packages" not in folder]
import gpt.generate, gpt.train, launch.__main__, launch.report.__main__, launch.status

for line in sys.argv[1:]:
    print(f"$ {line}", flush=True)
    if (pid := os.fork()) == 0:
        status, sys.argv = 1, line.split()
        try:
            sys.argv[0] = sys.argv[0].removesuffix(".__main__")
            status = sys.modules[line.split()[0]].main()
        finally:
            sys.stdout.flush()
            os._exit(status)
    print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
TRAIN = f"gpt.train {' '.join(TINY)} optim.max_steps=2"
LINES = {
    "launch.__main__ -m nodes=1,2 dry_run=true": "2 x 1 = 2 ranks on",
    "launch.__main__ parallel=zero2 cluster=slurm dry_run=true": "ds_zero2",
    TRAIN: "step 2/2",
    "launch.status outputs": "finished",
    "launch.report.__main__ outputs/quick_test": "finished",
    "launch.__main__ parallel=zero2 cluster=local": "no package deepspeed",
    f"{TRAIN} parallel=zero2": "type next: pip install -c constraints.txt deepspeed, or parallel=fsdp",
    "gpt.generate zero -p x": "type next: pip install -c constraints.txt deepspeed, and the same command again",
    "launch.__main__ hydra/launcher=submitit_slurm": "type next: pip install hydra-submitit-launcher",
}
"""Commands in the order in which they are typed, and what they say."""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Output of each of the commands, forked from one process without those libraries."""
    cwd = tmp_path_factory.mktemp("without")
    run("gpt.train optim.max_steps=2 run_dir=zero parallel=zero2", *TINY, cwd=cwd)  # with DeepSpeed
    printed = python(f"import os; os.dup2(1, 2)\n{WITHOUT}", *LINES, cwd=cwd)
    blocks = [block.partition("\n") for block in printed.split("$ ")[1:]]
    return {line: text for line, _, text in blocks}


@pytest.mark.parametrize("line", [*LINES])
def test_what_needs_neither_works_without_and_the_rest_is_refused(line: str, said: dict[str, str]) -> None:
    assert LINES[line] in said[line], said
    assert f"status {2 if 'type next' in said[line] else 0}\n" in said[line]
    assert "Traceback" not in said[line]
