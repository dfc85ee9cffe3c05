"""The choice of a layout: only what is possible and fits, the fastest first, and a refusal that says what would fit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gpt.accounting import GIB, peak_flops
from gpt.config import ParallelConfig, Strategy, TrainConfig, compose_train, settle_parallel
from gpt.planning import Machine, cpus, gpus
from gpt.planning.auto import NO_DIFFERENCE, LayoutChoice, ParallelChoice, choose_parallelism, rank_layouts, typed_keys
from gpt.planning.memory import per_rank
from gpt.planning.search import candidates, table
from gpt.topology import split_batch
from gpt.topology.check_dims import check_parallel_dims
from launch.errors import ConfigError
from launch.runs.compose import to_schema, write_config
from launch.runs.folder import RunFolder
from tests.support.composing import config_from
from tests.support.planning import refused

WORDS = [
    "parallel=auto",
    "model=gpt2_124m",
    "model.vocab_multiple=128",
    "precision=bf16",
    "data=synthetic",
    "optim.global_batch=64",
]


@cache  # composing takes longer than choosing
def config_of(*words: str) -> TrainConfig:
    return config_from([*WORDS, *words])


def machine(gib: float = 72.0, **changes: Any) -> Machine:
    found = gpus("NVIDIA H100 80GB HBM3", peak_flops("NVIDIA H100 80GB HBM3", config_of().precision), 8)
    return replace(found, room=int(gib * GIB), **changes)


@pytest.mark.parametrize(
    "words",
    [[], ["optim.max_micro_batch=2"], ["model=moe_200m", "optim.max_micro_batch=2"], ["model.dropout=0.1"]],
    ids=["dense", "with pipelines", "experts", "dropout"],
)
def test_everything_proposed_is_possible(words: list[str]) -> None:
    config = config_of(*words)
    seen = set()
    for one in candidates(config, 16, 8):
        chosen = replace(config, parallel=one.parallel)
        chosen.parallel.validate()
        assert check_parallel_dims(chosen, 16) == one.dims
        assert split_batch(config.optim, one.dims.data_ranks) == one.batch
        assert one.dims.tp <= 8
        seen.add(str(one.parallel))
    assert len(seen) == len(list(candidates(config, 16, 8))) > 5


def test_every_dimension_is_proposed() -> None:
    found = list(candidates(config_of("optim.max_micro_batch=1"), 16, 8))
    for name in ("tp", "pp", "dp_shard", "dp_replicate"):
        assert any(getattr(one.dims, name) > 1 for one in found), name
    assert {one.parallel.strategy for one in found} == {Strategy.ddp, Strategy.zero1, Strategy.fsdp}
    experts = list(candidates(config_of("model=moe_200m", "optim.max_micro_batch=1"), 16, 8))
    assert any(one.dims.ep > 1 for one in experts)


def test_the_fastest_of_those_that_fit_comes_first() -> None:
    config = config_of()
    for gib in (72.0, 8.0, 4.0):
        found = rank_layouts(config, 16, machine(gib)).choices
        assert all(choice.memory.total <= gib * GIB for choice in found)
        fastest = min(choice.estimate.step_s for choice in found)
        assert found[0].estimate.step_s <= NO_DIFFERENCE * fastest
        later = [choice.estimate.step_s for choice in found if choice.estimate.step_s > NO_DIFFERENCE * fastest]
        assert later == sorted(later)
        assert found == rank_layouts(config, 16, machine(gib)).choices


def test_a_small_model_is_copied_and_a_large_one_cut() -> None:
    small = rank_layouts(config_of("optim.global_batch=512"), 16, machine()).choices[0]
    assert str(small.dims) == "ddp dp_replicate=16 dp_shard=1"
    large = rank_layouts(config_of("model=llama_1p3b", "optim.max_micro_batch=1"), 16, machine(12.0)).choices[0]
    assert large.memory.total <= 12 * GIB
    assert large.dims.is_sharded or large.dims.model_ranks > 1


def test_micro_batches_are_as_small_as_a_plain_layout_needs() -> None:
    config = config_of("optim.max_micro_batch=16", "optim.global_batch=512")
    free = rank_layouts(config, 16, machine(8.0)).choices
    largest = next(one for one in free if one.batch.micro == 16)
    assert free[0].dims.model_ranks == 1 < largest.dims.model_ranks
    assert free[0].batch.micro < 16 and free[0].estimate.step_s <= NO_DIFFERENCE * largest.estimate.step_s
    optim = replace(config.optim, max_micro_batch=2 * free[0].batch.micro)
    larger = replace(config, optim=optim, parallel=free[0].parallel)
    cut_so = split_batch(larger.optim, free[0].dims.data_ranks)
    assert per_rank(larger, free[0].dims, cut_so).total > 8.0 * GIB


def test_what_was_typed_is_kept() -> None:
    words = ["parallel.pp=2", "parallel.strategy=auto", "optim.lr=1", "+parallel.ep=1", "parallel=auto"]
    assert typed_keys(words) == {"ep", "pp"}
    config = config_of("parallel.pp=2", "parallel.ep=1", "optim.max_micro_batch=1")
    found = rank_layouts(config, 16, machine(), typed_keys(words)).choices
    assert {(choice.dims.pp, choice.dims.ep) for choice in found} == {(2, 1)}
    offloaded = chosen(72.0, "parallel.cpu_offload=true", *DATA_ALONE).choices
    assert all(offloads(one) and one.parallel.strategy is Strategy.fsdp for one in offloaded)
    refused(chosen, 1.3, "parallel.cpu_offload=false", *DATA_ALONE)
    assert all(offloads(one) for one in chosen(1.3, *DATA_ALONE).choices)
    alone = config_of("model=llama_1p3b", "optim.max_micro_batch=1")
    found = rank_layouts(alone, 1, machine(14.0)).choices
    assert {one.parallel.strategy for one in found} == {Strategy.fsdp} and all(map(offloads, found))


@pytest.mark.parametrize("share", [0.95, 0.8])
@pytest.mark.parametrize("words", [[], ["recompute=full", "model=llama_1p3b"]], ids=["small", "large"])
def test_a_refusal_says_what_would_fit(share: float, words: list[str]) -> None:
    words, fixed = ["optim.max_micro_batch=8", "optim.global_batch=256", *words], ("pp", "cp")
    config = config_of(*words)
    least = min(
        per_rank(replace(changed, parallel=one.parallel), one.dims, one.batch).total
        for changed in (config_of(*words, f"optim.max_micro_batch={size}") for size in (8, 4, 2, 1))
        for offload in (False, True)
        for one in candidates(changed, 8, 8, fixed, offload)
    )
    small = machine(share * least / GIB)
    refusal = refused(rank_layouts, config, 8, small, fixed, found=f"{least / GIB:.3g} of ")
    assert f"at most {small.room / GIB:.2f} GiB" in refusal.expected
    typed = refusal.fix.split()
    assert typed and all("=" in word for word in typed), refusal.fix
    nodes = next((int(word.removeprefix("nodes=")) for word in typed if word.startswith("nodes=")), 1)
    changed = config_of(*words, *(word for word in typed if not word.startswith("nodes=")))
    assert rank_layouts(changed, 8 * nodes, small, fixed)


def test_where_nothing_helps_the_refusal_says_so() -> None:
    refused(rank_layouts, config_of(), 8, machine(0.001), ("pp", "cp"), fix="a smaller model")


def test_a_batch_that_cannot_be_dealt_out_is_refused_as_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"optim\.global_batch=7"):
        rank_layouts(
            config_of("optim.global_batch=7", "model.n_head=5", "model.n_embd=95", "model.block_size=1001"),
            16,
            machine(),
        )


def test_a_run_keeps_its_first_choice(tmp_path: Path) -> None:
    composed = compose_train(WORDS)
    config, folder = to_schema(composed, TrainConfig), RunFolder(tmp_path)
    first = choose_parallelism(config, WORDS, folder, 16, machine)
    assert first.parallel == first.best[0].parallel and "layouts that fit" in first.why
    settle_parallel(composed, {**vars(first.parallel), "strategy": "fsdp", "pp": 2}, first.micro_batch)
    write_config(folder, composed, WORDS)

    def never() -> Machine:
        raise AssertionError("a run that began chooses nothing")

    kept = choose_parallelism(config, WORDS, folder, 16, never)
    assert (kept.parallel.strategy, kept.parallel.pp, kept.best) == (Strategy.fsdp, 2, ())
    # Not where it cannot go on so: 7 ranks have no pairs, 3 keys no use for what was chosen.
    assert choose_parallelism(
        replace(config, optim=replace(config.optim, global_batch=21)), WORDS, folder, 7, machine
    ).best
    assert (
        choose_parallelism(config_of("parallel.pp=1"), [*WORDS, "parallel.pp=1"], folder, 16, machine).parallel.pp == 1
    )
    given = replace(config, parallel=ParallelConfig(Strategy.ddp, pp=3))
    assert choose_parallelism(given, WORDS, folder, 16, never).parallel == given.parallel


def test_the_table_names_layout_memory_and_speed() -> None:
    found = rank_layouts(config_of("optim.max_micro_batch=1"), 16, machine(6.0)).choices[:5]
    lines = list(table([choice.as_dict() for choice in found]))
    for choice, line in zip(found, lines, strict=True):
        assert str(choice.dims) in line
        assert f"{choice.estimate.tokens_per_s:,.0f} tokens/s" in line
        assert f"{choice.memory.total_gib:.3g} GiB" in line


BATCH = ["optim.max_micro_batch=8", "optim.global_batch=256"]
DATA_ALONE = ["parallel.tp=1", "parallel.pp=1", "parallel.cp=1", *BATCH]


def chosen(gib: float, *words: str, host_gib: float | None = None) -> ParallelChoice:
    there = machine(gib)
    room = None if host_gib is None else int(host_gib * GIB)
    config = config_of(*words)
    found = rank_layouts(config, 8, replace(there, host=replace(there.host, room=room)), typed_keys(words))
    for one in found.choices:
        check_promise(one, config, int(gib * GIB))
    return found


def check_promise(one: LayoutChoice, config: TrainConfig, room: int) -> None:
    """The global batch stays, and what is promised fits is what such a run needs."""
    assert one.batch.global_batch == config.optim.global_batch
    assert one.batch.micro * one.batch.accumulation * one.dims.data_ranks == config.optim.global_batch
    optim = replace(config.optim, max_micro_batch=one.batch.micro)
    run = replace(config, optim=optim, parallel=one.parallel)
    run.parallel.validate()
    assert per_rank(run, one.dims, one.batch) == one.memory
    assert one.memory.total <= room


def offloads(one: LayoutChoice) -> bool:
    return one.parallel.cpu_offload


def test_less_memory_takes_smaller_micro_batches_and_then_offload() -> None:
    seen = []
    for gib in (40.0, 8.0, 4.0, 1.9, 1.3):
        try:
            found = chosen(gib, *DATA_ALONE)
        except ConfigError:
            break
        smaller = {one.batch.micro < 8 for one in found.choices}
        host = {offloads(one) for one in found.choices}
        assert len(host) == 1
        text = "\n".join(found.left_out)
        assert ("CPU offload, which is slow: on the devices alone nothing fits" in text) == host.pop()
        assert (f"optim.max_micro_batch={found.micro_batch} instead of 8" in found.why) == (found.micro_batch < 8)
        seen.append((offloads(found.choices[0]), any(smaller)))
    assert seen == sorted(seen)
    assert {(False, False), (False, True), (True, True)} <= set(seen)


def test_a_host_that_is_full_takes_nothing() -> None:
    words = ["model=llama_1p3b", *DATA_ALONE]
    found = chosen(12.0, *words)
    assert all(offloads(one) for one in found.choices)
    needed = min(one.memory.host for one in found.choices) / GIB
    assert all(one.memory.host <= 1.5 * needed * GIB for one in chosen(12.0, *words, host_gib=1.5 * needed).choices)
    refusal = refused(lambda: chosen(12.0, *words, host_gib=0.9 * needed))
    assert "of host memory" in refusal.expected
    line = next(table([found.choices[0].as_dict()]))
    assert f"and {found.choices[0].memory.host / GIB:.3g} GiB of host memory" in line and "cpu_offload=true" in line


def test_cpus_have_no_other_memory() -> None:
    words = ["precision=fp32", "parallel.tp=1", "parallel.cp=1", *BATCH]
    for gib in (16.0, 6.0, 4.0):
        found = rank_layouts(config_of(*words), 4, replace(cpus(1, 4), room=int(gib * GIB)))
        assert not any(map(offloads, found.choices))
        assert not any("offload" in line for line in found.left_out)


def test_what_does_not_fit_is_counted() -> None:
    words = ["optim.max_micro_batch=1", "optim.global_batch=256"]
    found, config = chosen(3.0, *words), config_of(*words)
    valid = list(candidates(config, 8, 8))
    totals = [per_rank(replace(config, parallel=one.parallel), one.dims, one.batch).total for one in valid]
    large = [total for total in totals if total > 3 * GIB]
    text = "\n".join(found.left_out)
    assert len(found.choices) == len(totals) - len(large)
    assert f"left out: {len(large)} that do not fit" in text
    assert f"{min(large) / GIB:.3g} of 3 GiB" in text


def test_recomputation_that_would_do_is_named() -> None:
    without = chosen(1.3, *DATA_ALONE)
    line = next(line for line in without.left_out if line.endswith("would fit without that"))
    found = chosen(1.3, *DATA_ALONE, line.split()[0])
    assert all(map(offloads, without.choices)) and not any(map(offloads, found.choices))


def test_smaller_micro_batches_are_kept_with_the_run(tmp_path: Path) -> None:
    words = [*WORDS, *DATA_ALONE]
    composed = compose_train(words)
    config, folder = to_schema(composed, TrainConfig), RunFolder(tmp_path)
    first = choose_parallelism(config, words, folder, 8, lambda: machine(3.0))
    assert first.micro_batch < 8 and f"optim.max_micro_batch={first.micro_batch} instead of 8" in first.why
    settled = first.apply(config)
    assert (settled.optim.max_micro_batch, settled.parallel) == (first.micro_batch, first.parallel)
    settle_parallel(composed, vars(first.parallel), first.micro_batch)
    write_config(folder, composed, words)
    again = choose_parallelism(config, words, folder, 8, lambda: machine(72.0))
    assert (again.micro_batch, again.parallel, again.best) == (first.micro_batch, first.parallel, ())
    # Another wish is another choice.
    typed = [*words, "optim.max_micro_batch=4"]
    other = choose_parallelism(to_schema(compose_train(typed), TrainConfig), typed, folder, 8, lambda: machine(72.0))
    assert other.best and other.micro_batch == 4
    given = replace(config, parallel=ParallelConfig(Strategy.ddp))
    assert choose_parallelism(given, words, folder, 8, lambda: machine()).apply(given) == given
