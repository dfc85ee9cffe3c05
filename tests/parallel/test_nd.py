"""Pipeline, tensor and expert parallelism: schedules, stages, overlapped collectives, and exchanges of rows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from gpt.accounting import training_flops
from gpt.config import ParallelConfig, Recompute, Schedule, Strategy, TrainConfig
from gpt.model.gpt import GPT
from gpt.model.layers import cross_entropy
from gpt.parallel.distributed import build_mesh
from gpt.parallel.pipeline import PipelineEngine
from gpt.parallel.tensor import apply_tensor_parallel, vocabulary_loss
from gpt.topology import ParallelDims
from gpt.topology.schedules import bubble_fraction, local_stages, partition, split_layers, stage_indices
from tests.support.commands import ROOT
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import MODELS, Operations, start, step
from tests.support.small_models import LLAMA, random_tokens, small

# The split of layers into stages, the bubble of schedules, and refusals; against brute force and torch.


COSTS = st.lists(st.integers(1, 30), min_size=1, max_size=9)


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


def reduced_over_the_pipeline(rank: int, size: int, folder: Path) -> list[bool]:
    """Return whether the ranks of a pipeline have met in a collective when it is built, and transfers before that."""
    order = list[str]()

    def note(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            order.append(f"{name} {id(kwargs.get('group'))}")
            return function(*args, **kwargs)

        return call

    words = ("parallel=pp", f"parallel.pp={size}", "parallel.schedule=gpipe", "model.n_layer=3", *MODELS["tied"])
    with (
        mock.patch.object(dist, "all_reduce", note("met", dist.all_reduce)),
        mock.patch.object(dist, "batch_isend_irecv", note("sent", dist.batch_isend_irecv)),
    ):
        run = start(rank, size, folder, *words, "optim.max_micro_batch=2")
        engine = run.engine
        assert isinstance(engine, PipelineEngine)
        met = f"met {id(engine.group)}" in order and not any(each.startswith("sent") for each in order)
        step(run)
    return [met, any(each.startswith("sent") for each in order)]


def test_all_ranks_of_a_pipeline_meet_before_two_of_them_exchange_a_tied_gradient(tmp_path: Path) -> None:
    """On NCCL a first batched transfer between two ranks alone would wait for the others for ever."""
    found = run_distributed(reduced_over_the_pipeline, 3, tmp_path / "run")
    assert found == [[True, True], [True, False], [True, True]]


# Tensor parallelism, and the overlap of its collectives with matrix products.


def cut_model(rank: int, size: int) -> dict[str, Any]:
    """Memory and traffic of a rank for a model without padding, in one forward and backward pass."""
    config = small(**LLAMA, n_kv_head=2, n_layer=3, vocab_size=48, ffn_hidden=36)
    mesh = build_mesh(ParallelDims("ddp", 1, 1, tp=size), "cpu")["tp"]
    model = GPT(config)
    apply_tensor_parallel(model, mesh, ParallelConfig())
    shapes: dict[str, tuple[int, ...]] = {}
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: shapes.update(stream=tuple(inputs[0].shape)))
    tokens_BT = random_tokens(config, 5)
    counts = []
    with Operations(is_collective) as seen:
        logits_BTV = model(tokens_BT)
        counts.append(Counter(name.split(".")[1] for name in seen.found))
        logits_BTV.sum().backward()
        counts.append(Counter(name.split(".")[1] for name in seen.found))
    held = {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}
    grads = {name: tuple(p.grad.to_local().shape) for name, p in model.named_parameters()}
    return {"shapes": {**shapes, "logits": tuple(logits_BTV.shape)}, "counts": counts, "held": held, "grads": grads}


def is_collective(name: str, *_: Any) -> bool:
    space, kind, _ = name.split(".")
    return "c10d" in space and kind != "wait_tensor" and not kind.startswith("_")


def test_a_rank_holds_its_part_and_sends_no_more_than_it_must() -> None:
    """Korthikanti et al. (arXiv 2205.05198, section 4.2.2): two gathers and two reduce-scatters for each block and
    pass; one more each for embedding and output matrix. No gradient is larger than what it belongs to."""
    size, layers = 2, 3
    for rank in run_distributed(cut_model, size):
        assert rank["shapes"] == {"stream": (5, 12 // size, 32), "logits": (5, 12, 48 // size)}
        for passes, counts in enumerate(rank["counts"], start=1):
            each = passes * (2 * layers + 1)
            assert counts == {"all_gather_into_tensor": each, "reduce_scatter_tensor": each}
        assert rank["grads"] == rank["held"]
        cut = {name: shape for name, shape in rank["held"].items() if "norm" not in name}
        assert cut["token_embedding.weight"] == cut["head.weight"] == (24, 32)
        assert cut["blocks.0.attention.query.weight"] == cut["blocks.0.attention.output.weight"][::-1] == (16, 32)
        assert cut["blocks.0.attention.key.weight"] == cut["blocks.0.attention.value.weight"] == (8, 32)
        assert cut["blocks.0.ffn.up.weight"] == cut["blocks.0.ffn.down.weight"][::-1] == (18, 32)


def losses_of_cut_logits(rank: int, size: int) -> list[tuple[float, float, torch.Tensor, torch.Tensor]]:
    """Value and gradient beside those of whole logits, for vocabularies that end in the last part, before it, or in the
    first one."""
    mesh = build_mesh(ParallelDims("ddp", 1, 1, tp=size), "cpu")["tp"]
    found = []
    for vocab_size, columns in ((12, 4), (11, 4), (7, 4), (2, 4)):
        torch.manual_seed(vocab_size)
        whole = (30 * torch.randn(3, 5, size * columns)).requires_grad_()
        targets = torch.randint(vocab_size, (3, 5))
        expected = cross_entropy(whole[..., :vocab_size], targets)
        (gradient,) = torch.autograd.grad(7 * expected, whole)
        mine = slice(rank * columns, (rank + 1) * columns)
        part = whole[..., mine].detach().requires_grad_()
        loss = vocabulary_loss(mesh, columns, vocab_size)(part[..., :vocab_size], targets)
        (found_gradient,) = torch.autograd.grad(7 * loss, part)
        found.append((loss.item(), expected.item(), found_gradient, gradient[..., mine]))
    return found


def test_the_loss_of_cut_logits_is_that_of_whole_ones() -> None:
    for rank in run_distributed(losses_of_cut_logits, 3):
        for loss, expected, gradient, expected_gradient in rank:
            assert loss == pytest.approx(expected, rel=1e-6)
            torch.testing.assert_close(gradient, expected_gradient)


# Experts sharded over ranks: exchanges of rows, recomputed or not.


WAYS = {
    "experts": ["parallel=fsdp_ep", "parallel.ep=2", *MODELS["experts"]],
    "all-gathered keys": ["parallel=cp", "model.n_kv_head=2"],
    "ring": ["parallel=fsdp_cp", "parallel.cp_method=ring", "model.n_kv_head=2"],
}


def is_exchange(name: str, *_: Any) -> bool:
    return name == "_c10d_functional.all_to_all_single.default"


def recomputed(rank: int, size: int, folder: Path) -> dict[str, list[tuple[tuple[float, ...], int]]]:
    """Losses of two steps, and exchanges of the first, of each way without recomputation, with some, and with all."""
    found: dict[str, list[tuple[tuple[float, ...], int]]] = {}
    for name, words in WAYS.items():
        for recompute in ("none", "selective", "full"):
            kind = [*words, "optim.max_micro_batch=8", f"recompute={recompute}"]
            run = start(rank, size, folder / f"{name} {recompute}", *kind)
            with Operations(is_exchange) as exchanges:
                first = step(run)[0]
            found.setdefault(name, []).append(((first, step(run)[0]), len(exchanges.found)))
    return found


def test_recomputation_repeats_exchanges_only_where_nothing_is_kept(tmp_path: Path) -> None:
    found = run_distributed(recomputed, 2, tmp_path / "runs")[0]
    for name, ways in found.items():
        losses, exchanges = zip(*ways, strict=True)
        assert losses[0] == losses[1] == losses[2], f"{name}: bit for bit"
        if name == "experts":
            layers, forward, backward = 2, 3, 2  # how many rows, the rows, and back; only rows have gradients
            assert exchanges[:2] == (layers * (forward + backward),) * 2
            assert exchanges[2] == layers * (2 * forward + backward)
