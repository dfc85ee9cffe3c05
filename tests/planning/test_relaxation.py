"""The planner changes settings so that a run fits only where nothing fits otherwise, and says so."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gpt.accounting import GIB
from gpt.config import ParallelConfig, Strategy, TrainConfig
from gpt.config.train import compose_train, settle_parallel
from gpt.planning.auto import LayoutChoice, ParallelChoice, choose_parallelism, rank_layouts, typed_keys
from gpt.planning.hardware import MachineOverrides, cpus
from gpt.planning.memory import per_rank
from gpt.planning.search import candidates, table
from launch.errors import ConfigError
from launch.runs.compose import to_schema, write_config
from launch.runs.folder import RunFolder
from tests.planning.test_choice import WORDS, config_of, machine

BATCH = ["optim.max_micro_batch=8", "optim.global_batch=256"]
ZERO = ["parallel.engine=deepspeed", *BATCH]


def chosen(gib: float, *words: str, host_gib: float | None = None) -> ParallelChoice:
    there = machine(gib)
    assert there.host is not None
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
    optim = replace(config.optim, max_micro_batch=one.micro_batch)
    run = replace(config, optim=optim, parallel=one.parallel)
    run.parallel.validate()
    assert per_rank(run, one.dims, one.batch) == one.memory
    assert one.memory.total <= room


def offloads(one: LayoutChoice) -> bool:
    parallel = one.parallel
    return parallel.cpu_offload or parallel.offload_optimizer or parallel.offload_parameters


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_less_memory_takes_smaller_micro_batches_and_then_offload(engine: str) -> None:
    words = [f"parallel.engine={engine}", "parallel.tp=1", "parallel.pp=1", "parallel.cp=1", *BATCH]
    seen = []
    for gib in (40.0, 8.0, 4.0, 1.9, 1.35):
        try:
            found = chosen(gib, *words)
        except ConfigError:
            break
        smaller = {one.micro_batch < 8 for one in found.choices}
        host = {offloads(one) for one in found.choices}
        assert len(host) == 1
        text = "\n".join(found.left_out)
        assert ("CPU offload, which is slow: on the devices alone nothing fits" in text) == host.pop()
        assert ("smaller micro-batches, and more of them" in text) == any(smaller)
        seen.append((offloads(found.choices[0]), any(smaller)))
    assert seen == sorted(seen)
    assert {(False, False), (False, True), (True, True)} <= set(seen)


def test_a_host_that_is_full_takes_nothing() -> None:
    words = ["model=llama_1p3b", "parallel.tp=1", "parallel.pp=1", "parallel.cp=1", *BATCH]
    found = chosen(12.0, *words)
    assert all(offloads(one) for one in found.choices)
    needed = min(one.memory.host for one in found.choices) / GIB
    assert all(one.memory.host <= 1.5 * needed * GIB for one in chosen(12.0, *words, host_gib=1.5 * needed).choices)
    with pytest.raises(ConfigError) as refusal:
        chosen(12.0, *words, host_gib=0.9 * needed)
    assert "of host memory" in refusal.value.expected
    line = next(table([found.choices[0].as_dict()]))
    assert f"and {found.choices[0].memory.host / GIB:.3g} GiB of host memory" in line and "cpu_offload=true" in line


def test_what_was_typed_of_offload_is_kept() -> None:
    alone = ["parallel.tp=1", "parallel.pp=1", "parallel.cp=1", *BATCH]
    found = chosen(72.0, "parallel.cpu_offload=true", *alone)
    assert all(one.parallel.cpu_offload and one.parallel.strategy is Strategy.fsdp for one in found.choices)
    with pytest.raises(ConfigError):
        chosen(1.35, "parallel.cpu_offload=false", *alone)
    assert all(offloads(one) for one in chosen(1.35, *alone).choices)


def test_one_device_alone_can_offload() -> None:
    words = ["model=llama_1p3b", "optim.max_micro_batch=1"]
    found = rank_layouts(config_of(*words), 1, machine(14.0), typed_keys(words)).choices
    assert {one.parallel.strategy for one in found} == {Strategy.fsdp} and all(map(offloads, found))


def test_cpus_have_no_other_memory() -> None:
    words = ["precision=fp32", "parallel.tp=1", "parallel.cp=1", *BATCH]
    for gib in (16.0, 6.0, 4.0):
        found = rank_layouts(config_of(*words), 4, replace(cpus(1, 4, MachineOverrides()), room=int(gib * GIB)))
        assert not any(map(offloads, found.choices))
        assert not any("offload" in line for line in found.left_out)


def test_deepspeed_is_chosen_from_only_where_it_was_asked_for() -> None:
    native, zero = chosen(72.0, *BATCH), chosen(72.0, *ZERO)
    assert Strategy.deepspeed not in {one.parallel.strategy for one in native.choices}
    assert any(
        "not considered: DeepSpeed's ZeRO stages (parallel.engine=deepspeed)" in line for line in native.left_out
    )
    assert {one.parallel.strategy for one in zero.choices} == {Strategy.deepspeed}
    assert {one.parallel.zero_stage for one in zero.choices} == {0, 1, 2, 3}
    assert {one.parallel.zero_stage for one in chosen(72.0, *ZERO, "parallel.zero_stage=2").choices} == {2}
    assert any("DeepSpeed's pipeline (parallel.pp=2)" in line for line in zero.left_out)
    assert {one.parallel.zero_stage for one in chosen(72.0, *ZERO, "parallel.pp=2").choices} == {0, 1}
    with pytest.raises(ConfigError, match="data and pipeline parallelism only"):
        chosen(72.0, *ZERO, "parallel.tp=2")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["parallel.zero_stage=2"], "parallel.zero_stage=2 with parallel.strategy=auto"),
        (["parallel.engine=deepspeed", "parallel.zero_stage=4"], "parallel.zero_stage=4"),
        (["parallel=ddp", "parallel.engine=deepspeed"], "parallel.engine=deepspeed with parallel.strategy=ddp"),
        (["parallel=zero2", "parallel.engine=native"], "parallel.engine=native with parallel.strategy=deepspeed"),
        (["parallel.engine=deepspeed", "parallel.zero_stage=1", "parallel.offload_parameters=true"], "offload_par"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_keys_of_another_engine_are_refused(words: list[str], found: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_of(*words).parallel.validate()
    assert found in refusal.value.found


def test_what_does_not_fit_is_counted() -> None:
    found = chosen(6.0, *BATCH)
    config = config_of(*BATCH)
    refused: list[ConfigError] = []
    valid = list(candidates(config, 8, 8, refused=refused))
    totals = [per_rank(replace(config, parallel=one.parallel), one.dims, one.batch).total for one in valid]
    large = [total for total in totals if total > 6 * GIB]
    text = "\n".join(found.left_out)
    assert len(found.choices) == len(totals) - len(large)
    assert f"left out: {len(large)} that do not fit" in text
    assert f"{min(large) / GIB:.3g} of 6 GiB" in text
    assert f"refused: {len(refused)} invalid layouts" in text
    shown = [int(line.split()[0]) for line in found.left_out if re.match(r" +\d+ like", line)]
    assert shown and sum(shown) <= len(refused)


@pytest.mark.parametrize("gib", [4.5, 1.35])
def test_recomputation_that_would_do_is_named(gib: float) -> None:
    alone = ["parallel.tp=1", "parallel.pp=1", "parallel.cp=1", *BATCH]
    without = chosen(gib, *alone)
    line = next(line for line in without.left_out if line.endswith("would fit without that"))
    found = chosen(gib, *alone, line.split()[0])
    before, after = (
        [any(map(offloads, c.choices)), any(one.micro_batch < 8 for one in c.choices)] for c in (without, found)
    )
    assert after < before


def test_smaller_micro_batches_are_kept_with_the_run(tmp_path: Path) -> None:
    words = [*WORDS, *BATCH, "parallel.tp=1", "parallel.pp=1", "parallel.cp=1"]
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
