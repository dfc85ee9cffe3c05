"""Flags, keys and their ranges, and names of points as users type them; and the commands that a refusal proposes."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gpt.config import TrainConfig, compose_train
from gpt.training.run import parse_arguments
from gpt.workload import GptWorkload
from gpt_launch import COMMANDS
from launch import keys, status
from launch.__main__ import prepare, refuse_command, split_flags
from launch.config import ClusterKind, Config
from launch.config.compose import compose_launch, not_in_point, typed_config
from launch.errors import check_ranges, key
from launch.plan.preflight import worst_case_text
from launch.runs.compose import RunConfig, choose_folder
from launch.runs.environment import ROOT as OF_THE_CODE
from launch.runs.environment import install_command
from launch.runs.find import find_runs, point_labels, suggestion
from launch.runs.folder import RunFolder
from launch.runs.overrides import MOST_NAMES, NOT_IN_POINT, point_name
from launch.script import ScriptOptions, require_program
from tests.support.commands import ROOT, call, run
from tests.support.planning import config_of, plan, refused


def test_an_extra_is_installed_from_where_the_project_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shlex.split(install_command("data", tmp_path)) == ["pip", "install", "gpt-launch[data]"]  # from a wheel
    monkeypatch.chdir(OF_THE_CODE)
    assert install_command("data") == "pip install -e '.[data]'"
    monkeypatch.chdir(tmp_path)
    assert shlex.split(install_command("data"))[-1] == f"{OF_THE_CODE}[data]"


def test_another_command_typed_behind_this_one_is_named_whole() -> None:
    for command in COMMANDS:
        assert (ROOT / "launch" / f"{command}.py").is_file() or (ROOT / "launch" / command).is_dir()
        refusal = refused(refuse_command, [command, "-f", "outputs/a b"])
        assert refusal.fix == f"python -m launch.{command} -f 'outputs/a b'"
        refuse_command([f"{command}=1"])


def test_a_point_typed_twice_is_refused(tmp_path: Path) -> None:
    text = run("launch -m nodes=1,1,2 seed=3,3 dry_run=true", cwd=tmp_path, status=2)
    assert "found: the point nodes=1 " in text and "more than once in the sweep" in text
    assert "type next: each value once, or seed=0,1 for runs that differ in their seed alone\n" in text
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag_of_a_training_is_answered_with_the_one_that_was_meant() -> None:
    assert refused(parse_arguments, ["--rum", "x"]).fix == "--run"


@pytest.mark.parametrize("words", [["run_dir=taken"], ["run_dir=taken/run"], ["output_dir=taken"]], ids=str)
def test_a_file_in_place_of_a_run_folder_is_refused_by_a_dry_run_as_by_a_start(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    local = partial(plan, *words, kind=ClusterKind.local)
    assert refused(local, found=str(tmp_path / "taken")).fix.endswith("run_dir=FOLDER")
    if words == ["run_dir=taken"]:  # beside it there is room
        assert local("fresh=true").run_dir.endswith("taken~2")


def test_a_mistyped_key_has_its_likeness_first_and_a_dozen_names_at_most() -> None:
    refusal = refused(compose_launch, ["cluster.gpus_per_nod=8"])
    assert refusal.fix == "cluster.gpus_per_node=8"
    listed = refusal.expected.partition(" (")[0].removeprefix("a key such as ").split(", ")
    assert listed[0] == "cluster.gpus_per_node" and len(listed) == MOST_NAMES
    assert refusal.expected.endswith(" (python -m launch.keys lists all)")


def test_a_key_of_a_script_is_sent_to_its_workload() -> None:
    refusal = refused(compose_launch, ["script.path=setup.cfg", "script.options.lr=3"])
    assert refusal.fix == "workload=script script.path=setup.cfg script.options.lr=3"
    assert compose_launch(shlex.split(refusal.fix)).script.options.lr == 3


@pytest.mark.parametrize(
    ("typed", "expected", "fix"),
    [
        ("script.command=hostname -f", "a list", "'script.command=[hostname,-f]'"),
        ("cluster.exclude=[a,b]", "one text", "'cluster.exclude=\"a,b\"'"),
        ("script.env=FOO", "keys of your own below script.env, each with its value", "script.env.NAME=VALUE"),
        ("fresh=nope", "true or false", "fresh=true"),
        ("name=null", "one text", "name=TEXT"),
        ("name=ünï", "KEY=VALUE, quoted", "'name=\"ünï\"'"),
        ("nodes=[1,2]", "a whole number", "nodes=NUMBER"),
        ("optim.lr=high", "a number", "optim.lr=NUMBER"),
        ("precision=BF16", "one of auto, ", "precision=bf16"),
        ("cluster.srun_args=--mpi=pmix", "KEY=VALUE, quoted", """'cluster.srun_args=["--mpi=pmix"]'"""),
        ("launch.report_files=[md,pngg]", "a list of md, csv, ", "'launch.report_files=[md,png]'"),
        ("script.options=lr=3,seed=4", "KEY=VALUE, quoted", "script.options.NAME=VALUE"),
        ("script.env.FOO", "KEY=VALUE", "script.env.FOO=VALUE"),
    ],
)
def test_a_value_that_does_not_fit_is_answered_with_one_that_does(typed: str, expected: str, fix: str) -> None:
    workload = ["workload=script"] if typed.startswith("script.") else []
    refusal = refused(compose_launch, [*workload, typed])
    assert refusal.found.partition(", which ")[0] == typed, "whole, not cut at a blank"
    assert refusal.expected.startswith(expected) and refusal.fix == fix
    if not any(word in fix for word in ("VALUE", "NUMBER", "TEXT")):
        compose_launch([*workload, *shlex.split(fix)])


def test_a_mistyped_program_and_a_mistyped_folder_are_answered_with_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{tmp_path / 'gone'}")
    (tmp_path / "simulate").touch(mode=0o755)
    (tmp_path / "plain").touch(mode=0o644)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.py").touch()
    here = str(tmp_path)
    for options, found, fix in (
        (ScriptOptions(command=["simulat", "--n=2"]), "simulat", """'script.command=[PROGRAM,"--n=2"]'"""),
        (ScriptOptions(command=["./plain"], workdir=here), "is not executable", f"chmod +x {here}/plain"),
        (ScriptOptions(command=["./folder"], workdir=here), "no program ./folder", None),
        (ScriptOptions(path=f"{here}/folder"), "which is no file", f"script.path={here}/folder/train.py"),
    ):
        assert refused(require_program, options, found=found).fix == fix or fix is None
    for name in ("nodes=1", "nodes=2"):
        RunFolder(tmp_path / "outputs" / "a sweep" / name).create_attempt()
        RunFolder(tmp_path / "outputs" / "another" / name).create_attempt()
    monkeypatch.chdir(tmp_path)
    several = refused(find_runs, [Path("nodes=2")], found="nodes=2, as several runs are called")
    assert several.fix == f"{tmp_path}/outputs/another/nodes=2 in place of nodes=2"
    assert suggestion(Path("outputs/a sweep/node=2")) == "'outputs/a sweep/nodes=2', which is there"
    assert suggestion(Path("outputs/a swep")) == "'outputs/a sweep', which is there"
    refused(find_runs, [Path("simulate")], found="simulate, a file")


def test_a_learning_rate_out_of_its_range_is_not_answered_with_one_at_which_nothing_learns() -> None:
    assert refused(config_of("optim.lr=nan").validate).fix == "optim.lr=0.001"


def test_a_plus_before_a_key_is_not_in_the_name_of_a_run(tmp_path: Path) -> None:
    words = ["+experiment=weak_scaling", "nodes=2", "++script.options.lr=3"]
    assert point_name(words, NOT_IN_POINT) == "experiment=weak_scaling,nodes=2,script.options.lr=3"
    runs = [(tmp_path / "a", ["+experiment=weak_scaling"]), (tmp_path / "b", [])]
    assert point_labels(runs) == ["experiment=weak_scaling", "default"]
    config = RunConfig(output_dir=str(tmp_path), name="sweep")
    assert choose_folder(config, words[:1], NOT_IN_POINT).path == tmp_path / "sweep" / "experiment=weak_scaling"


def test_a_plan_of_finished_points_has_no_worst_case() -> None:
    config = config_of("cluster=slurm")
    done = replace(plan(), finished=True)
    assert worst_case_text([done, done], [config, config]) == "nothing is left to run"
    assert "1 node-hour" in worst_case_text([done, replace(done, finished=False)], [config, config])


def test_a_mapping_of_keys_of_the_users_choice_is_taken_as_it_is_typed() -> None:
    config = compose_launch(["workload=script", "script.options={lr:3}", "script.env={A:b}", "script.options.n=2"])
    assert config.script.options == {"lr": 3, "n": 2} and config.script.env == {"A": "b"}
    for typed in (".hint=nomultithread", "={hint:nomultithread}"):
        cluster = compose_launch([f"cluster.additional_parameters{typed}"]).cluster
        assert cluster.additional_parameters == {"hint": "nomultithread"}


def test_a_comma_that_makes_points_of_one_text_is_answered_with_the_text(tmp_path: Path) -> None:
    (tmp_path / "t.py").touch()
    words = ["workload=script", "script.path=t.py", "cluster=local", "dry_run=true"]
    said = run("launch script.env.CUDA_VISIBLE_DEVICES=0,1", *words, cwd=tmp_path, status=2)
    assert "which differ in script.env.CUDA_VISIBLE_DEVICES" in said
    assert """type next: 'script.env.CUDA_VISIBLE_DEVICES="A,B"' for one text with a comma;""" in said
    run("launch", *words, 'script.env.CUDA_VISIBLE_DEVICES="0,1"', cwd=tmp_path)


def test_a_variable_of_the_shell_that_is_not_set_is_refused() -> None:
    for name in ("partition", "account", "exclude"):
        refusal = refused(config_of(f"cluster.{name}=").validate, found=f"cluster.{name}= without a value")
        config_of(refusal.fix.split(", or ")[1]).validate()


def test_a_path_that_nothing_reads_is_refused() -> None:
    refusal = refused(config_of("data.path=/tmp/x").validate, found="data.path=/tmp/x with data=stdlib")
    for fix in refusal.fix.split(", or "):
        config_of(*fix.split()).validate()


def test_the_name_of_a_config_that_is_not_there_is_refused(tmp_path: Path) -> None:
    said = run("launch --config-name foo", cwd=tmp_path, status=2)
    assert "found: no config foo\n" in said and "type next: the same without --config-name\n" in said


def test_options_may_stand_between_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        RunFolder(tmp_path / name).create_attempt()
    told = json.loads(call(status.main, tmp_path / "a", "--json", tmp_path / "b"))
    assert [row["label"] for row in told] == ["a", "b"]


# Flags of the commands: those of Hydra that ``python -m launch`` takes, and what it says of others.


MODULES = ("gpt.train", "gpt.prepare", "gpt.generate", "gpt.evaluate", "gpt.export", "gpt.compare")
MODULES += ("launch.status", "launch.logs", "launch.cancel", "launch.move", "launch.batch", "launch.agent.__main__")
MODULES += ("launch.__main__", "launch.doctor.__main__", "launch.report.__main__", "slurm.sandbox.__main__")


@pytest.mark.parametrize("module", MODULES)
def test_every_command_helps_and_refuses_a_flag_that_it_does_not_have(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = importlib.import_module(module)
    needed = {"gpt.generate": ["x", "-p", "y"], "slurm.sandbox.__main__": ["status"]}.get(module, ["x"])
    monkeypatch.setattr(sys, "argv", [module, *needed, "--xyz"])
    assert command.main() == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in said] == ["found", "expected", "type next"]
    assert "--xyz" in said[0] and "python -m" in said[2]
    if module != "launch.__main__":  # which Hydra helps
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            command.main()
        assert "usage: python -m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--nodes=4"], "nodes=4"),
        (["--nodes", "4"], "nodes=4"),
        (["--gpus-per-node", "nodes=2"], "cluster.gpus_per_node=NUMBER"),
        (["--max-steps", "3"], "optim.max_steps=3"),
        (["--dry-run"], "dry_run=true"),
        (["workload=script", "--max-steps=3"], "script.max_steps=3"),
        (["workload=of_a_folder", "--nodes=3"], "nodes=3"),
        (["--multrun", "nodes=1"], "--multirun"),
        (["--foo"], "python -m launch --help"),
        (["nodes=1", "--config-dir"], "python -m launch --help"),
        (["nodes=1", "--info=x"], "python -m launch --help"),
        (["-m", "nodes=2,4", "--cfg", "job"], "the same without -m, and with one value for each key"),
        (["--help", "nodes=2,4", "-m"], "the same without -m, and with one value for each key"),
    ],
    ids=str,
)
def test_a_flag_is_refused_with_the_key_that_was_meant(words: list[str], fix: str) -> None:
    assert refused(split_flags, words).fix == fix


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        # The flags of a program with exchangeable parts of the model.
        (["--position_encoding=rope"], "model.position=rope"),
        (["--normalization=rmsnorm"], "model.norm=rmsnorm"),
        (["--ffn_type", "swiglu"], "model.ffn=swiglu"),
        (["--norm_position=post"], "model.norm_position=post"),
        (["--weight_tying=false"], "model.tie_embeddings=false"),
        (["--use_zero1"], "parallel=zero1"),
        (["--use_fsdp=true"], "parallel=fsdp"),
        (["--arch_preset=llama"], "model=llama_124m"),
        (["--arch_preset=gpt2"], "model=gpt2_124m"),
        (["--wandb_project=mine"], "logging.wandb=true, with WANDB_PROJECT=mine before the command"),
        # Those of nanoGPT: its batch is the micro-batch of one GPU.
        (["--batch_size=12"], "optim.max_micro_batch=12"),
        (["--max_iters=600000"], "optim.max_steps=600000"),
        (["--block_size=1024"], "model.block_size=1024"),
        (["--learning_rate=6e-4"], "optim.lr=6e-4"),
        (["--eval_interval=500"], "eval.interval=500"),
        (["--dataset=openwebtext"], "data=openwebtext"),
        (["--dtype=bfloat16"], "precision=bf16"),
        (["--compile=False"], "compile=none"),
    ],
    ids=str,
)
def test_a_flag_of_another_trainer_is_answered_by_both_commands(words: list[str], fix: str) -> None:
    for read in (split_flags, parse_arguments):
        assert refused(read, [*words, "seed=3"]).fix == fix
    compose_train([fix.partition(",")[0]])


def test_flags_stand_anywhere() -> None:
    words = ["nodes=1", "--config-dir=x", "seed=2", "-i", "defaults", "all=1"]
    flags, given = split_flags(words)
    assert flags == ["--config-dir=x", "-i", "defaults"] and given.overrides == ["nodes=1", "seed=2", "all=1"]
    assert split_flags(["nodes=1,2", "-m"])[0] == ["-m"]
    assert prepare(["-sc", "query=bash"]) == ["-sc", "query=bash"], "no override of a run"


# The folder of a point follows from what was typed, and from nothing else.


NOT_IN_NAME = not_in_point(GptWorkload())
WORDS = st.lists(
    st.tuples(st.sampled_from(["nodes", "model", "optim.lr", "data.path", "seed"]), st.text(min_size=1, max_size=300)),
    max_size=5,
    unique_by=lambda pair: pair[0],
).map(lambda pairs: [f"{key}={value}" for key, value in pairs])


@given(words=WORDS, data=st.data())
def test_order_does_not_matter_and_the_name_is_a_folder(words: list[str], data: st.DataObject) -> None:
    name = point_name(words, NOT_IN_NAME)
    assert point_name(data.draw(st.permutations(words)), NOT_IN_NAME) == name
    assert "/" not in name and "\0" not in name and name not in (".", "..")
    assert len(name.encode()) <= 255


@given(one=WORDS, other=WORDS)
def test_other_words_give_another_name(one: list[str], other: list[str]) -> None:
    same = sorted(one) == sorted(other)
    assert (point_name(one, NOT_IN_NAME) == point_name(other, NOT_IN_NAME)) == same


def test_where_and_how_a_run_is_submitted_does_not_name_it() -> None:
    words = ["cluster=slurm", "cluster.partition=gpu", "name=x", "output_dir=/y", "fresh=true", "nodes=2"]
    assert point_name(words, NOT_IN_NAME) == "nodes=2"
    assert point_name([], NOT_IN_NAME) == "default"


def test_fresh_makes_a_new_folder_and_the_same_command_then_goes_on_in_it(tmp_path: Path) -> None:
    config = TrainConfig(name="n", output_dir=str(tmp_path))

    def choose(fresh: bool) -> str:
        config.fresh = fresh
        folder = choose_folder(config, ["nodes=2"], NOT_IN_NAME)
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder.point

    chosen = " ".join(choose(f) for f in (False, False, True, False, True, False))
    assert chosen == "nodes=2 nodes=2 nodes=2~2 nodes=2~2 nodes=2~3 nodes=2~3"


# Keys: every key says what it means, docs/keys.md is the list of the schema, and a number has a range.


def test_the_page_of_keys_is_the_list_of_the_schema() -> None:
    assert (ROOT / "docs" / "keys.md").read_text() == keys.keys_page(), (
        "python -m launch.keys --markdown > docs/keys.md"
    )


@pytest.mark.parametrize("workload", ["gpt", "script"])
def test_every_key_has_a_meaning(workload: str) -> None:
    found = keys.keys_of_workload(workload)
    assert [one.name for one in found if not one.meaning] == []
    assert len({one.name for one in found}) == len(found)


def test_keys_are_found_by_a_word(tmp_path: Path) -> None:
    printed = run("launch.keys", "time limit", cwd=tmp_path)
    assert "cluster.timeout_min=60    (above 0 min)" in printed and "script." not in printed
    printed = run("launch.keys prgress --workload script", cwd=tmp_path, status=2)
    assert "type next: python -m launch.keys progress" in printed


NUMBERS = [
    (f"{prefix}{field.name}", field.metadata)
    for schema, prefix in (
        *((Config, ""), (ScriptOptions, "script.")),
        *((field.default_factory, f"{field.name}.") for field in dataclasses.fields(Config)),
    )
    if isinstance(schema, type) and dataclasses.is_dataclass(schema)
    for field in dataclasses.fields(schema)
    if {field.metadata.get("least"), field.metadata.get("above")} != {None}
]


def test_a_number_below_its_range_is_refused() -> None:
    composed = compose_launch(["workload=script", "script.path=train.py"])
    assert len(NUMBERS) > 20
    for name, metadata in NUMBERS:
        document = copy.deepcopy(composed)
        bound = metadata["above"] if metadata["least"] is None else metadata["least"] - 1
        OmegaConf.update(document, name, int(bound) if bound % 1 == 0 else bound)
        assert refused(typed_config(document).validate, found=name).fix.startswith(f"{name}=")


@dataclasses.dataclass
class Numbers:
    share: float = key(0.5, "A share.", least=0, most=1)
    any_number: float = key(0.0, "A number.")


def test_a_range_is_said() -> None:
    for typed, expected in (
        (Numbers(share=1.5), "0 to 1"),
        (Numbers(share=-0.1), "0 to 1"),
        (Numbers(share=math.nan), "0 to 1"),
        (Numbers(any_number=math.inf), "a finite number"),
    ):
        refusal = refused(check_ranges, typed, "numbers.", found="numbers.")
        assert refusal.expected == expected
    check_ranges(Numbers(share=1, any_number=-3))
