"""Pipeline parallelism: schedules, and stages of a model."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from gpt.accounting import training_flops
from gpt.config import ParallelConfig, Recompute, Schedule, Strategy, TrainConfig
from gpt.topology.check_dims import check_parallel_dims
from gpt.topology.schedules import bubble_fraction, local_stages, partition, split_layers, stage_indices
from gpt.training.checkpoints import save
from launch.errors import ConfigError
from tests.support.commands import ROOT
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import MODELS, assert_same, evaluated, learn, start, step

Words = list[str]
BASE = {
    **{name: [*words, "model.n_layer=4"] for name, words in MODELS.items()},
    "biased experts": [
        *(*MODELS["experts"], "model.n_layer=4", "model.expert_balance=bias"),
        "model.balance_bias_rate=0.05",
    ],
    # its output matrix costs more than a block, so that the last of four stages has nothing else
    "large vocabulary": [*MODELS["experts"], "model.n_layer=4", "model.vocab_size=2048"],
    "a block a stage": MODELS["tied"],
}
EVAL = ["eval.sequences=7"]


def pipeline(schedule: str, *words: str, pp: int = 2, micro: int = 4) -> Words:
    return [f"parallel.pp={pp}", f"parallel.schedule={schedule}", f"optim.max_micro_batch={micro}", *words]


FSDP = ("parallel=fsdp", "optim.max_micro_batch=2")
KEPT = (*FSDP, "parallel.reshard_after_forward=false")
V_SHAPED = ("zbv", "dualpipev")
ON_2: list[tuple[str, Words]] = [
    *(("tied", pipeline(schedule)) for schedule in ("gpipe", "interleaved", *V_SHAPED)),
    ("untied, grouped queries", pipeline("zbv")),
    ("tied", pipeline("1f1b", micro=2)),
    ("biased experts", pipeline("zbv")),
    ("biased experts", pipeline("1f1b", "recompute=full")),
    ("biased experts", pipeline("interleaved", "recompute=selective")),
]
ON_4: list[tuple[str, Words]] = [
    ("tied", pipeline("1f1b", micro=2)),
    ("large vocabulary", pipeline("1f1b", pp=4)),
    ("untied, grouped queries", pipeline("interleaved", *FSDP)),
    ("tied", pipeline("zbv", *KEPT)),
    ("tied", pipeline("zbv", "parallel=tp")),
    ("biased experts", pipeline("interleaved", "parallel=tp", "recompute=full")),
    ("biased experts", pipeline("dualpipev", *KEPT, "parallel.ep=2")),
]
ON_8: list[tuple[str, Words]] = [("a block a stage", ["parallel=3d", "optim.max_micro_batch=4"])]
"""Four micro-batches a step; eight in one case, and two on eight ranks."""
TABLES = {2: ON_2, 4: ON_4, 8: ON_8}


def learn_table(rank: int, size: int, folder: Path, table: list[tuple[str, Words]]) -> list[dict[str, Any]]:
    found = []
    for i, (model, words) in enumerate(table):
        run = start(rank, size, folder / str(i), *EVAL, *BASE[model], *words)
        mine = learn(run)
        mine["evaluated"] = evaluated(run)
        if i == 0:
            assert evaluated(run) == mine["evaluated"]
        mine["after"] = step(run)  # not disturbed by that
        found.append(mine)
    return found if rank == 0 else []


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    table = [(model, ["parallel=ddp", "optim.max_micro_batch=16"]) for model in BASE]
    found = run_distributed(learn_table, 1, tmp_path_factory.mktemp("alone") / "runs", table)[0]
    return dict(zip(BASE, found, strict=True))


@pytest.fixture(scope="module", params=list(TABLES))
def parallelized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, Words, Any]]:
    table = TABLES[request.param]
    folder = tmp_path_factory.mktemp(f"on_{request.param}") / "runs"
    found = run_distributed(learn_table, request.param, folder, table, timeout_s=400)[0]
    return [(model, words, each) for (model, words), each in zip(table, found, strict=True)]


def test_a_pipeline_learns_what_one_process_learns(
    parallelized: list[tuple[str, Words, Any]], reference: dict[str, dict[str, Any]]
) -> None:
    wrong = []
    for model, words, found in parallelized:
        expected = reference[model]
        try:
            assert_same(found, expected)
            assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-6)
            assert found["after"] == pytest.approx(expected["after"], rel=2e-5)
        except AssertionError as error:
            wrong.append(f"{model} {' '.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


CROSSED: dict[str, Words] = {
    "fsdp": ["parallel=fsdp"],
    "pp": pipeline("1f1b", pp=4),
    "interleaved": pipeline("interleaved"),
    "zbv, fsdp": pipeline("zbv", *KEPT),
    "interleaved, tp": pipeline("interleaved", "parallel=tp"),
}


CROSSINGS = {
    **{"pp": "zbv, fsdp", "zbv, fsdp": "fsdp"},
    **{"fsdp": "interleaved, tp", "interleaved, tp": "pp"},
}
"""Each saved once, and gone on under once."""


def cross(rank: int, size: int, folder: Path) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Save under each, go on under another: the losses of the steps after, and those that were to come."""
    found = {}
    words = BASE["tied"]
    for saved, resumed in CROSSINGS.items():
        there = folder / saved.replace(", ", "_")
        run = start(rank, size, there, *CROSSED[saved], *words)
        step(run)
        save(run)
        to_come = [step(run)[0] for _ in range(2)]
        again = start(rank, size, there, *CROSSED[resumed], *words)
        assert again.step == 1
        found[saved, resumed] = ([step(again)[0] for _ in range(2)], to_come)
    return found


def test_a_checkpoint_goes_from_each_pipeline_to_another_and_to_none_and_back(tmp_path: Path) -> None:
    found = run_distributed(cross, 4, tmp_path / "runs", timeout_s=300)[0]
    assert {saved for saved, _ in found} == {resumed for _, resumed in found} == set(CROSSINGS)
    for pair, (losses, to_come) in found.items():
        assert losses == pytest.approx(to_come, rel=1e-6), pair


def noisy(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """With dropout: a resumed run against the uninterrupted one. In bf16: what is learned. And the signs of life."""
    words = [*BASE["tied"], "model.dropout=0.2"]
    found: dict[str, Any] = {}
    for name in ("pp", "interleaved", "zbv, fsdp"):
        there = folder / name.replace(", ", "_")
        run = start(rank, size, there, *CROSSED[name], *words)
        step(run)
        save(run)
        to_come = [step(run) for _ in range(2)]
        again = start(rank, size, there, *CROSSED[name], *words)
        found[name] = (to_come, [step(again) for _ in range(2)])
    for name, spread_so in {"ddp": ["parallel=ddp"], "pp": CROSSED["pp"], "fsdp": CROSSED["zbv, fsdp"]}.items():
        run = start(rank, size, folder / f"bf16{name}", *spread_so, *words, "model.dropout=0", "precision=bf16")
        found[f"bf16 {name}"] = [step(run)[0] for _ in range(2)]
    calls: list[None] = []
    batch = run.samples.batch("train", list(range(run.batch.per_rank)))
    run.engine.backward(*batch, lambda: calls.append(None))
    return {**found, "calls": len(calls)}


def test_dropout_bf16_and_signs_of_life(tmp_path: Path) -> None:
    for found in run_distributed(noisy, 4, tmp_path / "runs", timeout_s=300):
        for name in ("pp", "interleaved", "zbv, fsdp"):
            assert found[name][0] == found[name][1], f"{name}: bit for bit"
        for name in ("pp", "fsdp"):
            assert found[f"bf16 {name}"] == pytest.approx(found["bf16 ddp"], rel=5e-3)
        assert found["calls"] == 2 * 4  # two stages, four micro-batches


# The split of layers into stages, the bubble of schedules, and refusals; against brute force and torch.


COSTS = st.lists(st.integers(1, 30), min_size=1, max_size=9)


@settings(deadline=None)
@given(COSTS, st.data())
def test_no_other_split_has_a_faster_slowest_stage(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    found = partition(tuple(costs), parts)
    assert [i for part in found for i in part] == list(range(len(costs)))
    assert len(found) == parts and all(found)

    def sums(cuts: tuple[int, ...]) -> list[int]:
        edges = [0, *cuts, len(costs)]
        return [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]

    every = [sums(cuts) for cuts in itertools.combinations(range(1, len(costs)), parts - 1)]
    best = min((max(s), sum(c**2 for c in s)) for s in every)
    mine = [sum(costs[i] for i in part) for part in found]
    assert (max(mine), sum(c**2 for c in mine)) == best


def config_of(*words: str) -> TrainConfig:
    config = config_from(words)
    config.validate()
    return config


def test_the_output_matrix_counts_as_layers() -> None:
    """GPT-2 124M in four: its output matrix costs as much as four and a half blocks, so it stands alone."""
    model = config_of("model=gpt2_124m").model
    flops = training_flops(model, 1)
    assert 4 < flops.logits / ((flops.palm - flops.logits) / 12) < 5
    assert [len(part.blocks) for part in split_layers(model, 4)] == [4, 4, 4, 0]
    assert [(part.first, part.last) for part in split_layers(model, 4)] == [
        (True, False),
        (False,) * 2,
        (False,) * 2,
        (False, True),
    ]
    # recomputing makes blocks dearer, not the output matrix
    assert [len(part.blocks) for part in split_layers(model, 2)] == [8, 4]
    assert [len(part.blocks) for part in split_layers(model, 2, Recompute.full)] == [8, 4]


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_every_stage_is_held_once_and_where_torch_expects_it(schedule: Schedule, pp: int) -> None:
    parallel = ParallelConfig(strategy=Strategy.ddp, pp=pp, schedule=schedule)
    held = {rank: stage_indices(parallel, rank) for rank in range(pp)}
    count = pp * local_stages(parallel)
    assert sorted(stage for stages in held.values() for stage in stages) == list(range(count))
    style = "v" if schedule in (Schedule.zbv, Schedule.dualpipev) else "loop"
    theirs = torch_schedules.generate_stage_to_rank_mapping(pp, count, style=style)
    assert {stage: rank for rank, stages in held.items() for stage in stages} == theirs


Action = tuple[str, int, int]
"""F forward, B backward, I and W its halves; of which stage; for which micro-batch."""


def orders(schedule: Schedule, pp: int, micro_batches: int, held: int) -> dict[int, list[Action]]:
    """Actions of each rank, in order, as torch plans them."""
    if schedule is Schedule["1f1b"]:  # torch describes that of the last rank one off what it does
        found = {}
        for rank in range(pp):
            ahead = min(pp - 1 - rank, micro_batches)
            turns = [a for i in range(micro_batches - ahead) for a in (("F", rank, ahead + i), ("B", rank, i))]
            first = [("F", rank, i) for i in range(ahead)]
            found[rank] = [*first, *turns, *(("B", rank, i) for i in range(micro_batches - ahead, micro_batches))]
        return found
    kinds = {
        Schedule.gpipe: torch_schedules.ScheduleGPipe,
        Schedule.interleaved: torch_schedules.ScheduleInterleaved1F1B,
        Schedule.zbv: torch_schedules.ScheduleZBVZeroBubble,
        Schedule.dualpipev: torch_schedules.ScheduleDualPipeV,
    }
    stages: list[Any] = [
        SimpleNamespace(stage_index=i, num_stages=pp * held, group_size=pp, group_rank=0, submod=None)
        for i in range(held)
    ]
    plan = kinds[schedule](stages if schedule is not Schedule.gpipe else stages[0], micro_batches, lambda *_: None)
    flat = {
        rank: [part for a in row if a for part in a.sub_actions or [a]] for rank, row in plan.pipeline_order.items()
    }
    return {
        rank: [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in row if a.is_compute_op]
        for rank, row in flat.items()
    }


def play(plan: dict[int, list[Action]], stages: int, forward: int) -> dict[Action, tuple[int, int]]:
    """Begin and end of every action where each half of a backward pass takes as long as the forward pass."""
    took = {"F": forward, "I": forward, "W": forward, "B": 2 * forward}
    times: dict[Action, tuple[int, int]] = {}
    clock, done = dict.fromkeys(plan, 0), dict.fromkeys(plan, 0)
    while any(done[rank] < len(plan[rank]) for rank in plan):
        moved = False
        for rank, row in plan.items():
            while done[rank] < len(row):
                kind, stage, batch = action = row[done[rank]]
                if kind == "F":
                    needs = [{("F", stage - 1, batch)}] if stage else []
                elif kind == "W":
                    needs = [{("I", stage, batch)}]
                else:
                    above = {("I", stage + 1, batch), ("B", stage + 1, batch)}
                    needs = [{("F", stage, batch)}, *([above] if stage < stages - 1 else [])]
                ready = [times[a][1] for need in needs for a in need if a in times]
                if len(ready) < len(needs):
                    break
                begin = max([clock[rank], *ready])
                clock[rank] = begin + took[kind]
                times[action] = (begin, clock[rank])
                done[rank] += 1
                moved = True
        assert moved, "a schedule that waits for itself"
    return times


BUBBLES = [
    (schedule, pp, micro_batches, held)
    for schedule, helds in [
        (Schedule.gpipe, [1]),
        (Schedule["1f1b"], [1]),
        (Schedule.interleaved, [2, 3]),
        (Schedule.zbv, [2]),
        (Schedule.dualpipev, [2]),
    ]
    for held in helds
    for pp in (2, 4, 8)
    for micro_batches in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
]


@pytest.mark.parametrize(("schedule", "pp", "micro_batches", "held"), BUBBLES)
def test_the_bubble_is_that_of_torchs_schedule(schedule: Schedule, pp: int, micro_batches: int, held: int) -> None:
    from gpt.topology.schedules import accepts_micro_batches

    parallel = ParallelConfig(strategy=Strategy.ddp, pp=pp, schedule=schedule, stages_per_rank=held)
    if not accepts_micro_batches(parallel, micro_batches):
        if schedule is not Schedule["1f1b"]:
            with pytest.raises(ValueError, match="microbatches"):
                orders(schedule, pp, micro_batches, held)
        return
    times = play(orders(schedule, pp, micro_batches, held), pp * held, 1)
    span = max(end for _, end in times.values())
    assert bubble_fraction(schedule, pp, micro_batches, held) == pytest.approx(1 - 3 * held * micro_batches / span)


def picture(schedule: Schedule, pp: int = 2, micro_batches: int = 4) -> str:
    """A row for each stage: 0123 forward, ABCD backward or its first half, abcd its second half, dots nothing."""
    parallel = ParallelConfig(strategy=Strategy.ddp, pp=pp, schedule=schedule)
    held = local_stages(parallel)
    times = play(orders(schedule, pp, micro_batches, held), pp * held, 2 // held)
    span = max(end for _, end in times.values())
    rows = []
    for rank in range(pp):
        for stage in stage_indices(parallel, rank):
            row = ["."] * span
            for (kind, of, batch), (begin, end) in times.items():
                if of == stage:
                    mark = {"F": "0123", "B": "ABCD", "I": "ABCD", "W": "abcd"}[kind][batch]
                    row[begin:end] = mark * (end - begin)
            name = schedule.name if not rows else ""
            rows.append(f"{name:<12}rank {rank}  stage {stage}  {''.join(row)}")
    return "\n".join(rows)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_the_picture_in_the_documentation_is_true(schedule: Schedule) -> None:
    assert picture(schedule) in (ROOT / "docs" / "parallel.md").read_text()


SMALL = ("model.n_layer=4", "optim.global_batch=16", "optim.max_micro_batch=4", "parallel.pp=2")
REFUSED = [
    (2, ("parallel.pp=8",), "parallel.pp=8 with 2 ranks", "parallel.pp=2"),
    (8, ("parallel.pp=8", "optim.max_micro_batch=1"), "parallel.pp=8, and model.n_layer=4", "parallel.pp=4"),
    (
        4,
        ("parallel.pp=4", "parallel.schedule=interleaved"),
        "parallel.pp=4 with 2 stages on each rank",
        "parallel.pp=2",
    ),
    (2, ("optim.max_micro_batch=16",), "1 micro-batch (", "optim.max_micro_batch=8"),
    (2, ("optim.max_micro_batch=16", "optim.weak_scaling=true"), "1 micro-batch (", "optim.max_micro_batch=8"),
    (4, ("optim.global_batch=2",), "1 micro-batch (", "optim.global_batch=4 optim.max_micro_batch=1"),
    (
        *(4, ("optim.global_batch=1", "optim.weak_scaling=true"), "1 micro-batch ("),
        "optim.global_batch=2 optim.max_micro_batch=1",
    ),
    (
        *(2, ("parallel.schedule=interleaved", "optim.global_batch=20"), "5 micro-batches"),
        "optim.max_micro_batch=2",
    ),
    (
        *(2, ("parallel.schedule=interleaved", "optim.global_batch=7", "optim.max_micro_batch=1"), "7 micro-batches"),
        "optim.global_batch=8 optim.max_micro_batch=1",
    ),
    (4, ("parallel.schedule=dualpipev",), "2 micro-batches", "optim.max_micro_batch=2"),
    (2, ("parallel.schedule=zbv", "recompute=full"), "recompute=full", "parallel.schedule=interleaved"),
    (2, ("parallel.schedule=dualpipev", "compile=default"), "compile=default", "parallel.schedule=interleaved"),
    (
        *(4, ("parallel.schedule=zbv", "parallel=fsdp"), "parallel.reshard_after_forward=true"),
        "parallel.reshard_after_forward=false",
    ),
    (2, ("parallel.stages_per_rank=2",), "parallel.stages_per_rank=2 with", "parallel.stages_per_rank=1"),
    (
        *(2, ("parallel.schedule=zbv", "parallel.stages_per_rank=1"), "parallel.stages_per_rank=1 with"),
        "parallel.stages_per_rank=2",
    ),
    (2, ("parallel=zero1",), "parallel.strategy=zero1 with parallel.pp=2", "parallel.strategy=fsdp"),
]


@pytest.mark.parametrize(("ranks", "words", "found", "fix"), REFUSED, ids=[" ".join(case[1]) for case in REFUSED])
def test_what_cannot_run_is_refused_with_what_can(ranks: int, words: tuple[str, ...], found: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_parallel_dims(config_of(*SMALL, *words), ranks)
    assert found in refusal.value.found and refusal.value.fix.startswith(fix)
    typed = refusal.value.fix.split(",")[0].split()
    check_parallel_dims(config_of(*SMALL, *words, *typed), ranks)
