"""``launch.project --fit``: goals as they are typed, models of a size, time and cost by hand, and refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gpt.accounting import count, training_flops_per_token
from gpt.config import ModelConfig, TrainConfig
from gpt.workload import ASPECT, sized_model
from launch.project.__main__ import Goal, Offer, as_offer, compose_goal, main, offers, parse_goal
from launch.runs.measured import LinkFit, Network, network_document
from launch.workload import SetUp, TrainingGoal
from tests.support.commands import call
from tests.support.planning import config_of, refused


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("7e9 params, 1e12 tokens, 30 days", Goal(TrainingGoal(7e9, 1e12), 30)),
        ("7B parameters,1.5T tokens, 2 weeks", Goal(TrainingGoal(7e9, 1.5e12), 14)),
        ("12 hours, 124m params, 300 b tokens", Goal(TrainingGoal(124e6, 3e11), 0.5)),
        ("7e9 params, 1e12 tokens, 1 month", Goal(TrainingGoal(7e9, 1e12), 30)),
    ],
)
def test_goals_are_read_as_they_are_typed(text: str, goal: Goal) -> None:
    assert parse_goal(text) == goal


NO_GOALS = (
    *("", "7e9 params", "7e9 params, 1e12 tokens, 0 days", "7e9, 1e12, 30", "a, b, c"),
    *("1e999 params, 1e12 tokens, 30 days", "7e9 params, 70e9 params, 1e12 tokens, 30 days"),
)


@pytest.mark.parametrize("text", NO_GOALS)
def test_what_is_no_goal_is_refused(text: str) -> None:
    refused(parse_goal, text, fix='--fit "7e9 params')


@pytest.fixture(scope="module", params=["llama_1p36b", "gpt2_124m"])
def family(request: pytest.FixtureRequest) -> ModelConfig:
    """Each family of models, composed once."""
    config = config_of(f"model={request.param}")
    assert isinstance(config, TrainConfig)
    return config.model


@pytest.mark.parametrize("wanted", [3e8, 7e9, 400e9])
def test_a_model_of_a_size_has_a_usual_shape(family: ModelConfig, wanted: float) -> None:
    model = sized_model(family, wanted)
    assert count(model).total == pytest.approx(wanted, rel=0.03)
    assert model.n_embd == 128 * model.n_head
    assert 0.4 < model.n_embd / model.n_layer / ASPECT < 2.5
    assert model.n_embd % model.n_head == 0 and model.n_head % model.kv_heads == 0


def test_time_and_cost_of_an_offer_by_hand() -> None:
    config, _ = compose_goal(["cluster.price_per_gpu_hour=2.5", "cluster.gpus_per_node=4"], "h100", None)
    set_up = SetUp("fsdp", 2, step_s=1.5, work_per_step=4e6, memory_bytes=2**30, mfu=0.4, command="")
    found = as_offer(Goal(TrainingGoal(7e9, 1e12), 30), replace(config, nodes=16), set_up)
    hours = 1e12 / 4e6 * 1.5 / 3600
    assert (found.gpus, found.days) == (64, pytest.approx(hours / 24))
    assert (found.gpu_hours, found.cost) == (pytest.approx(64 * hours), pytest.approx(64 * hours * 2.5))


def test_the_cheapest_come_first_and_make_it() -> None:
    goal = parse_goal("1.3e9 params, 1e12 tokens, 30 days")
    config, words = compose_goal([*DATA_PARALLEL, "cluster.gpus_per_node=8"], "h100", None)
    found = offers(goal, config, words, [1, 2, 4])
    assert found and all(one.days <= 30 for one in found)
    assert [one.gpu_hours for one in found] == sorted(one.gpu_hours for one in found)
    assert {one.nodes for one in found} == {1, 2, 4} - {n for n in (1, 2, 4) if n < ideal_nodes(goal, found[0])}
    for one in found:
        check_against_flops(one, goal)
        assert one.set_up.memory_bytes < 80e9


DATA_PARALLEL = ("parallel.tp=1", "parallel.pp=1", "parallel.cp=1", "parallel.ep=1")
"""Keys that leave few layouts to look at."""


def ideal_nodes(goal: Goal, one: Offer) -> float:
    """Nodes that would make it at the speed of one offer."""
    return one.nodes * one.days / goal.days


def check_against_flops(one: Offer, goal: Goal) -> None:
    """MFU from the time of the whole run: FLOPs of all tokens over peak and GPU-hours."""
    widths = {key: int(value) for key, value in re.findall(r"model\.(n_\w+)=(\d+)", one.set_up.command)}
    config = config_of(*(word for word in one.set_up.command.split() if word.startswith("model")))
    assert isinstance(config, TrainConfig)
    model = config.model
    assert widths["n_layer"] == model.n_layer
    flops = training_flops_per_token(model).palm * goal.training.work
    assert one.set_up.mfu == pytest.approx(flops / (989e12 * 3600 * one.gpu_hours), rel=1e-9)


def test_the_command_shows_a_table_and_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = {name: LinkFit(1e-3, 1e9) for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")}
    network = tmp_path / "network.json"
    network.write_text(json.dumps(network_document(Network(8, {"inter_node": slow}), {})))
    goal = ["--fit", "1.3e9 params, 1e11 tokens, 60 days", "--gpu", "h100", "--nodes", "2", "cluster.gpus_per_node=8"]
    goal += DATA_PARALLEL
    days = []
    for links in ([], ["--network", str(network)]):
        assert main([*goal, *links, "cluster.price_per_gpu_hour=2"]) == 0
        text, told = capsys.readouterr()
        assert re.fullmatch(r"2 nodes: [\d.]+ days\n", told), "a line on each size that was tried"
        assert "estimated figures, none was measured" in text and "the cheapest: python -m launch nodes=2" in text
        row = next(line.split() for line in text.splitlines() if re.match(r"\s+2\s+16\s", line))
        days.append(float(row[-3]))
        assert float(row[-1].replace(",", "")) == pytest.approx(2 * float(row[-2].replace(",", "")), rel=0.01)
    assert days[1] > 1.02 * days[0]  # measured links are slower than those that are assumed


FITTING = ("--fit", "7e9 params, 1e12 tokens, 30 days", "--gpu", "h100", "--nodes", "1")
FEW = (*DATA_PARALLEL, "optim.max_micro_batch=1", "parallel.cpu_offload=false", "parallel.reshard_after_forward=true")


def test_what_nothing_makes_is_refused() -> None:
    goal = "7e9 params, 1e12 tokens, 30 days"
    for words, said in {
        (*FEW, "--fit", "1e9 params, 1e15 tokens, 1 day", "--gpu", "h100", "--nodes", "1,2"): "the nearest is 2 nodes",
        (*FEW, "--fit", "4e11 params, 1e12 tokens, 30 days", "--gpu", "h100", "--nodes", "1"): "GiB",
        ("--fit", goal): "without the name of the GPUs",
        ("--fit", goal, "--gpu", "h100", "somewhere"): "--fit with somewhere",
        ("--fit", "100 params, 1e12 tokens, 30 days", "--gpu", "h100"): "100 params",
        ("--fit", "7 params", "--gpu", "h100"): '--fit "7 params"',
        ("--fit", "1e16 params, 1e12 tokens, 30 days", "--gpu", "h100", "--nodes", "1"): "1e+16 params",
        (*FITTING, "--mtbf-hours", "0"): "--fit with --mtbf-hours",
        (*FITTING, "--sweep", "0"): "--fit with --sweep",
        (*FITTING, "--network", "nowhere.json"): "--network nowhere.json",
        (*FITTING, "cluster.price_per_gpu_hour=-2"): "cluster.price_per_gpu_hour=-2",
        (): "no arguments",
    }.items():
        refusal = call(main, *words, status=2)
        assert said in refusal and "type next: " in refusal, refusal
