"""The estimate of a step: its terms by hand on a made-up machine, and laws that hold on any."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.accounting import count, peak_flops, recomputed_flops_per_token, training_flops
from gpt.bench_matmul import main
from gpt.config import (
    AttentionBackend,
    CpMethod,
    Device,
    ParallelConfig,
    Precision,
    Recompute,
    Schedule,
    Strategy,
    TrainConfig,
)
from gpt.planning import Group, Host, Link, Machine, cpus, gpus, group, strided_group
from gpt.planning.cost import Estimate, RankStep, estimate
from gpt.topology import ParallelDims, parallel_dims, split_batch
from gpt.workload.plan import estimated_step, requested_machine
from launch.config.cluster import ClusterConfig, ClusterKind
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.measured import MatmulRates, rates_document, read_matmul_rates
from launch.workload import PlanRequest
from tests.support.small_models import LLAMA, MOE, optim, small

FAST, SLOW = Link(0.0, 8e9), Link(0.0, 1e9)
MACHINE = Machine("made up", 1e9, 10**9, 4, FAST, SLOW)
AT_ONCE = replace(MACHINE, flops_per_s=1e30)
"""Computes in no time, so that all communication is exposed."""
ENDLESS = replace(MACHINE, intra_node=Link(0.0, 1e30), inter_node=Link(0.0, 1e30))
MODEL = small(**{**LLAMA, "n_layer": 4, "n_kv_head": 2, "ffn_hidden": 64, "block_size": 16, "vocab_size": 64})
T, D, BLOCK, AROUND = 2 * 16, 32, 9280, 2 * 2048 + 32
"""Tokens of a micro-batch, width, and parameters."""


def config_of(accumulation: int = 1, data_ranks: int = 1, model: Any = MODEL, **parallel: Any) -> TrainConfig:
    step = optim(global_batch=2 * data_ranks * accumulation, max_micro_batch=2)
    return TrainConfig(model=model, optim=step, parallel=ParallelConfig(**{"strategy": Strategy.ddp, **parallel}))


def cost(config: TrainConfig, ranks: int, machine: Machine = MACHINE) -> Estimate:
    dims = parallel_dims(config.parallel, ranks)
    return estimate(config, dims, split_batch(config.optim, dims.data_ranks), machine)


def test_a_ring_of_four() -> None:
    ring = Group(4, Link(0.5, 1000.0))
    assert ring.all_gather(4000) == 3 * (0.5 + 1)
    assert ring.all_reduce(4000) == 9
    assert Group(1, SLOW).all_reduce(1e9) == 0


def test_links_of_a_group() -> None:
    dims = ParallelDims("hsdp", dp_replicate=2, dp_shard=2, pp=2, tp=2)  # 16 ranks on four nodes of four
    assert group(dims, MACHINE, ["tp"]).link == FAST
    assert group(dims, MACHINE, ["dp_shard"]).link == FAST
    assert group(dims, MACHINE, ["dp_replicate"]) == Group(2, SLOW)
    # Two ranks of each node are in this ring, and send through the node's adapters at once.
    assert group(dims, MACHINE, ["dp_replicate", "dp_shard"]) == Group(4, Link(0.0, 2e9))
    assert strided_group(MACHINE, 8, 1).link.bytes_per_s == 4e9
    assert strided_group(replace(MACHINE, intra_node=Link(0.0, 2e9)), 8, 1).link.bytes_per_s == 2e9


def test_computing_is_the_models_arithmetic() -> None:
    for backend, part in ((AttentionBackend.manual, "palm"), (AttentionBackend.sdpa, "causal")):
        config = config_of(accumulation=3, model=replace(MODEL, attention=backend))
        found = cost(config, 1)
        assert found.compute_s == pytest.approx(getattr(training_flops(config.model, 6), part) / 1e9)
        assert (found.bubble_s, found.step_s) == (0, found.compute_s)
        assert found.tokens_per_s == pytest.approx(6 * 16 / found.step_s)
    again = cost(replace(config_of(), recompute=Recompute.full), 1).compute_s - cost(config_of(), 1).compute_s
    assert again == pytest.approx(T * recomputed_flops_per_token(MODEL, Recompute.full) / 1e9)


@pytest.mark.parametrize("keys", [{"tp": 4}, {"cp": 4}, {"pp": 2, "tp": 2}], ids=str)
def test_ranks_share_the_arithmetic(keys: dict[str, int]) -> None:
    alone, shared = (cost(config_of(4, **k), n, ENDLESS) for k, n in (({}, 1), (keys, 4)))
    # Two of five unequal layers are at most somewhat more than half.
    assert alone.compute_s / 4 <= shared.compute_s * 1.0001 < alone.compute_s / 4 * 1.15


def test_a_pipeline_waits_for_its_ends() -> None:
    for schedule in ("gpipe", "1f1b"):
        found = cost(config_of(8, pp=4, schedule=Schedule[schedule]), 4, ENDLESS)
        assert found.bubble_s / found.step_s == pytest.approx(3 / 11)  # (p - 1) / (m + p - 1)
    less = cost(config_of(8, pp=2, schedule=Schedule.interleaved), 2, ENDLESS)
    assert less.bubble_s / less.step_s == pytest.approx(1 / 17)  # (p - 1) / (v m + p - 1)


def test_gradients_of_copies_by_hand() -> None:
    parameters = count(MODEL).total
    assert cost(config_of(data_ranks=4), 4, AT_ONCE).communication_s["dp"] == pytest.approx(
        2 * 3 / 4 * 4 * parameters / 8e9
    )
    # After the last micro-batch, exposed, however long the backward pass.
    slow = replace(MACHINE, flops_per_s=1.0)
    shared = cost(config_of(data_ranks=2, tp=2), 4, slow).communication_s["dp"]
    assert shared == pytest.approx(2 * 1 / 2 * 4 * (4 * (4608 + 64) + 2 * 1024 + 32) / 8e9)
    # zero1 sends as many bytes, but can hide only the half that are gradients; of those all but the last bucket.
    sharded = config_of(data_ranks=4, strategy=Strategy.zero1)
    half = 3 / 4 * 4 * parameters / 8e9
    assert cost(sharded, 4, AT_ONCE).communication_s["dp"] == pytest.approx(2 * half)
    with mock.patch("gpt.planning.cost.BUCKET_BYTES", 4096):
        assert cost(sharded, 4, slow).communication_s["dp"] == pytest.approx(half + 3 / 4 * 4096 / 8e9)


def test_gathered_parameters_by_hand() -> None:
    parameters = count(MODEL).total
    each = 3 / 4 * 4 / 8e9
    # Three micro-batches; the last of four blocks, norm and output matrix are not resharded, the embedding not needed.
    for reshard, again in ((True, 3 * 3 * BLOCK), (False, 0)):
        keys = {"strategy": Strategy.fsdp, "reshard_after_forward": reshard}
        found = cost(config_of(3, data_ranks=4, **keys), 4, AT_ONCE).communication_s["dp"]
        assert found == pytest.approx(each * (4 * parameters + again))
    # Each of four blocks, embedding and head is a group of its own, with messages of its own; three are gathered again.
    one = replace(AT_ONCE, inter_node=Link(1.0, 1e30), intra_node=Link(1.0, 1e30))
    found = cost(config_of(data_ranks=4, strategy=Strategy.fsdp), 4, one).communication_s["dp"]
    assert found == pytest.approx((6 + 3 + 6) * (4 - 1))
    # Each group costs what messages of its own size do: here those of a block take twice as long as others.
    keys = {"data_ranks": 4, "strategy": Strategy.fsdp, "reshard_after_forward": False}
    costs = []
    for curves in ({}, {"all_gather": ((BLOCK / 2, 1.0), (BLOCK - 1, 2.0))}):
        link = Link(0.0, 8e9, curves=curves)
        bent = replace(AT_ONCE, inter_node=link, intra_node=link)
        costs.append(cost(config_of(**keys), 4, bent).communication_s["dp"])
    assert costs[1] - costs[0] == pytest.approx(each * 4 * BLOCK)
    # The first gather and the last reduce-scatter: the first block, and the embedding, tied with all that is around.
    slow = replace(MACHINE, flops_per_s=1e6)
    for model, ends in ((MODEL, 2048), (replace(MODEL, tie_embeddings=True), AROUND - 2048)):
        hidden = cost(config_of(data_ranks=4, model=model, strategy=Strategy.fsdp), 4, slow)
        assert hidden.communication_s["dp"] == pytest.approx(each * 2 * (BLOCK + ends))


def test_units_of_several_blocks_by_hand() -> None:
    slow, parameters = replace(MACHINE, flops_per_s=1e6), count(MODEL).total
    each, keys = 3 / 4 * 4 / 8e9, {"strategy": Strategy.fsdp, "fsdp_min_num_params": BLOCK + 1}
    # Units of two and two blocks: the second is not resharded, the first and the embedding overlap with nothing.
    found = cost(config_of(3, data_ranks=4, **keys), 4, AT_ONCE).communication_s["dp"]
    assert found == pytest.approx(each * (4 * parameters + 3 * 2 * BLOCK))
    hidden = cost(config_of(data_ranks=4, **keys), 4, slow).communication_s["dp"]
    assert hidden == pytest.approx(each * 2 * (2 * BLOCK + 2048))


def test_tensor_parallelism_by_hand() -> None:
    gather = 1 / 2 * 4 * T * D / 8e9
    with_stream = cost(config_of(tp=2), 2).communication_s["tp"]
    assert with_stream == pytest.approx((4 * 8 + 2 * 2) * gather)  # as many bytes with sequence parallelism as without
    assert cost(config_of(tp=2, sequence_parallel=False), 2).communication_s["tp"] == pytest.approx(with_stream)


@pytest.mark.parametrize(
    ("stage", "sums", "gathers"), [(0, 2, 0), (1, 1, 1), (2, 3, 1), (3, 3, 6)], ids=lambda value: str(value)
)
def test_stages_of_deepspeed_by_hand(stage: int, sums: int, gathers: int) -> None:
    # Three micro-batches: stage 1 reduces once, 2 and 3 after each; 3 all-gathers for both directions of each.
    each = 3 / 4 * count(MODEL).total / 8e9
    keys = {"strategy": Strategy.deepspeed, "zero_stage": stage}
    config = replace(config_of(3, data_ranks=4, **keys), precision=Precision.bf16)
    found = cost(config, 4, AT_ONCE).communication_s["dp"]
    assert found == pytest.approx((4 * sums + 2 * gathers) * each)


HOST = Host(link_bytes_per_s=1e9, bytes_per_s=5e8, room=None)


def test_offloading_by_hand() -> None:
    parameters, slow = count(MODEL).total, replace(AT_ONCE, host=HOST)
    part = 4 * BLOCK / 4 + (2 * 2048 + 32) / 4
    keys = {"strategy": Strategy.fsdp, "cpu_offload": True}
    stepping = part * (4 / 1e9 + 28 / 5e8)  # gradients copied; weight, gradient, moments read, all but one written
    found = cost(config_of(3, data_ranks=4, **keys), 4, slow).communication_s
    assert found["host"] == pytest.approx(3 * 2 * 4 * part / 1e9 + stepping)
    kept = cost(config_of(3, data_ranks=4, reshard_after_forward=False, **keys), 4, slow).communication_s
    assert kept["host"] == pytest.approx(3 * 4 * part / 1e9 + stepping)
    hidden = cost(config_of(3, data_ranks=4, **keys), 4, replace(slow, flops_per_s=1e6)).communication_s
    assert hidden["host"] == pytest.approx(stepping)
    keys = {"strategy": Strategy.deepspeed, "zero_stage": 2, "cpu_offload": True}
    config = replace(config_of(3, data_ranks=4, **keys), precision=Precision.bf16)
    shard = parameters / 4
    assert cost(config, 4, slow).communication_s["host"] == pytest.approx(
        shard * (3 * 4 / 1e9 + 28 / 5e8 + 2 / 1e9), rel=1e-3
    )
    assert "host" not in cost(config, 4).communication_s


def test_context_parallelism_by_hand() -> None:
    gather = 1 / 2 * 4 * T * 2 * (2 * 8) / 8e9
    assert cost(config_of(cp=2), 2).communication_s["cp"] == pytest.approx(4 * 2 * gather)
    slow = replace(MACHINE, flops_per_s=1.0)
    assert cost(config_of(cp=2, cp_method=CpMethod.ring), 2, slow).communication_s["cp"] == 0


def test_expert_parallelism_by_hand() -> None:
    config = config_of(data_ranks=2, model=small(**MOE), ep=2)
    rows = 2 * 12 * 2
    assert cost(config, 2).communication_s["ep"] == pytest.approx(2 * 4 * 1 / 2 * 4 * rows * 32 / 8e9)


def test_a_stage_hands_the_stream_on() -> None:
    send, tied = 4 * T * D / 8e9, 4 * 64 * D / 8e9
    for schedule, pp, sends in (("1f1b", 2, 1), ("1f1b", 4, 2), ("gpipe", 2, 2), ("interleaved", 2, 4)):
        config = config_of(4, pp=pp, schedule=Schedule[schedule])
        # With 1F1B a link takes both directions at once. All stages of pp=2 are at an end, and of pp=4 two are not.
        assert cost(config, pp, AT_ONCE).communication_s["pp"] == pytest.approx(4 * sends * send)
    shared = config_of(4, pp=2, model=replace(MODEL, tie_embeddings=True))
    assert cost(shared, 2, AT_ONCE).communication_s["pp"] == pytest.approx(4 * send + tied)
    slices = cost(config_of(4, pp=2, tp=2, sequence_parallel=True), 4, AT_ONCE)
    assert slices.communication_s["pp"] == pytest.approx(4 * send / 2)


def test_all_ranks_sum_a_few_numbers() -> None:
    far = replace(MACHINE, inter_node=Link(1.0, 1e30), ranks_per_node=1)
    measured = replace(far, inter_node=Link(1.0, 1e30, {"all_reduce": (0.5, 1e30)}))
    # Figures; and the norm of gradients of which each rank has a part. Over trees of three levels, or as measured.
    for strategy, sums in ((Strategy.ddp, 1), (Strategy.fsdp, 2), (Strategy.zero1, 2)):
        config = config_of(data_ranks=8, strategy=strategy)
        assert cost(config, 8, far).communication_s["world"] == sums * 2 * 3
        assert cost(config, 8, measured).communication_s["world"] == pytest.approx(sums * 2 * 7 * 0.5)
    assert cost(config_of(tp=2), 2, far).communication_s["world"] == 2 * 2
    assert "world" not in cost(config_of(), 1, far).communication_s


def test_both_directions_of_a_pipeline_pass_at_once() -> None:
    """Micro-batch i of two stages is sent when its forward pass is, and the link and the gradient two before are."""
    count, send = 6, 4 * T * D / 8e9
    found = cost(config_of(count, pp=2), 2, AT_ONCE)
    arrived = [send, 2 * send]  # stage 0 sends two micro-batches ahead
    for number in range(2, count):
        returned = arrived[number - 2] + send
        arrived.append(max(returned, arrived[number - 1]) + send)
    assert found.step_s == pytest.approx(arrived[-1] + send)


@settings(max_examples=60)
@given(
    keys=st.sampled_from(
        [{}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"strategy": Strategy.fsdp}, {"strategy": Strategy.zero1}]
    ),
    accumulation=st.sampled_from([2, 4]),
    rate=st.floats(1e6, 1e12),
    slower=st.floats(1, 100),
)
def test_a_slower_machine_is_never_faster(keys: dict[str, Any], accumulation: int, rate: float, slower: float) -> None:
    config = config_of(accumulation, data_ranks=8, **keys)
    usual = replace(MACHINE, intra_node=Link(1e-5, rate))
    step_s = cost(config, 8, usual).step_s
    for worse in (
        replace(usual, intra_node=Link(1e-5, rate / slower)),
        replace(usual, inter_node=Link(1e-5, 1e9 / slower)),
        replace(usual, intra_node=Link(1e-5 * slower, rate)),
        replace(usual, flops_per_s=1e9 / slower),
    ):
        assert cost(config, 8, worse).step_s >= step_s * (1 - 1e-9)


def test_what_is_assumed_of_a_device() -> None:
    known = gpus("NVIDIA H100 80GB HBM3", peak_flops("NVIDIA H100 80GB HBM3", Precision.bf16), 8)
    assert known.flops_per_s == 989e12 / 2
    assert (known.intra_node.bytes_per_s, known.inter_node.bytes_per_s) == (450e9, 50e9)
    assert known.room == int(0.9 * 80e9)
    for name in ("NVIDIA H100 80GB HBM3", "something new"):
        told = gpus(name, 100e12, 4, memory=10**10)
        assert (told.flops_per_s, told.room) == (50e12, 9 * 10**9)
    assert gpus("something new", peak_flops("something new", Precision.bf16), 8) is None
    assert gpus("Tesla V100-SXM2-32GB", peak_flops("Tesla V100-SXM2-32GB", Precision.bf16), 8) is None  # has no bf16
    plain = gpus("NVIDIA L40S", peak_flops("NVIDIA L40S", Precision.bf16), 4)
    assert plain is not None and plain.inter_node.bytes_per_s == pytest.approx(12.5e9 / 4)
    assert cpus(1000, 2).room == 900


GRID = (2, 8, 32)
RATES = MatmulRates((GRID,) * 3, {(m, n, k): 1e6 * m * n * n * k for m in GRID for n in GRID for k in GRID})


def test_between_sizes_rates_are_a_power_law() -> None:
    """So is this one, m n^2 k: linear in logarithms, it is met everywhere inside, and exactly where it was measured."""
    for shape, rate in RATES.flops_per_s.items():
        assert RATES.rate(*shape) == pytest.approx(rate, rel=1e-12)
    for m, n, k in ((4, 4, 4), (2, 16, 5), (31, 2.5, 32)):
        assert RATES.rate(m, n, k) == pytest.approx(1e6 * m * n * n * k, rel=1e-12)
    one = MatmulRates(((4, 16), (1,), (1,)), {(4, 1, 1): 1e9, (16, 1, 1): 4e9})
    assert one.rate(8, 1, 1) == pytest.approx(2e9)  # half way in logarithms, by hand
    assert (one.rate(1, 7, 7), one.rate(64, 7, 7)) == (pytest.approx(1e9), pytest.approx(4e9))
    rising = [RATES.rate(size, 3, 3) for size in range(1, 50)]
    assert rising == sorted(rising)
    assert RATES.times(3).best == 3 * RATES.best


def test_the_estimate_follows_the_rates() -> None:
    """With one rate everywhere it is as without a file; small products alone slow it down by what they take."""
    config = config_of()
    dims = parallel_dims(config.parallel, 1)
    batch = split_batch(config.optim, 1)
    even = MatmulRates(((1,),) * 3, {(1, 1, 1): MACHINE.flops_per_s})
    plain = RankStep(config, dims, batch, MACHINE).compute_s
    assert RankStep(config, dims, batch, replace(MACHINE, matmul=even)).compute_s == pytest.approx(plain)
    # A quarter of the rate where a size is 16 or less: keys and values have so many columns, and no other product.
    slow = {(m, n, k): 1e9 / (4 if 16 in (m, n, k) else 1) for m in (16, 17) for n in (16, 17) for k in (16, 17)}
    slower = replace(MACHINE, matmul=MatmulRates(((16, 17),) * 3, slow))
    found = RankStep(config, dims, batch, slower).compute_s
    of_keys = 3 * 2 * T * 4 * 2 * D * 16  # FLOPs forward and backward, of two such products in four blocks
    assert BLOCK == 9280 and found - plain == pytest.approx(3 * of_keys / 1e9)
    tensor = config_of(tp=2)
    steeper = replace(MACHINE, matmul=RATES)
    halves = [
        RankStep(one, parallel_dims(one.parallel, one.parallel.tp), batch, steeper).compute_s
        for one in (config, tensor)
    ]
    assert halves[1] > halves[0] / 2  # half of each product, and each is slower than a whole one


def write(path: Path, device: str = "CPU", precision: str = "fp32", seconds: float = 2e-9) -> Path:
    sample = {"precision": precision, "m": 1, "n": 1, "k": 1, "seconds": seconds}
    path.write_text(json.dumps(rates_document(device, [sample], {})))
    return path


def request(path: Path, **cluster: Any) -> PlanRequest:
    nodes = ClusterConfig(kind=ClusterKind.slurm, timeout_min=60, mem_gb=8, matmul_rates=str(path))
    return PlanRequest((), RunFolder(path.parent), False, 1, 1, replace(nodes, **cluster), 0)


def test_a_plan_takes_the_rates_of_the_file(tmp_path: Path) -> None:
    config = replace(config_of(), device=Device.cpu, precision=Precision.fp32)
    asked = request(write(tmp_path / "rates.json"))
    assert requested_machine(config, asked).flops_per_s == pytest.approx(1e9)
    dims, batch = parallel_dims(config.parallel, 1), split_batch(config.optim, 1)
    usual, faster = (estimated_step(config, dims, batch, one) for one in (asked, replace(asked, rate_factor=2.0)))
    assert usual.compute_s == pytest.approx(2 * faster.compute_s)
    write(tmp_path / "rates.json", seconds=4e-9)
    slower = estimated_step(config, dims, batch, asked)
    assert slower.compute_s == pytest.approx(2 * usual.compute_s)
    for file, said in (
        (write(tmp_path / "h100.json", device="NVIDIA H100 80GB HBM3"), "measured on NVIDIA H100 80GB HBM3"),
        (write(tmp_path / "half.json", precision="bf16"), "with rates in bf16"),
    ):
        with pytest.raises(ConfigError, match=said) as refusal:
            estimated_step(config, dims, batch, request(file))
        assert "type next: python -m gpt.bench_matmul" in str(refusal.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "JSONDecodeError: .*: line 1 column 2"),
        ('{"format": 9}', "format 9"),
        ('{"format": 1, "device": "CPU", "samples": []}', "no samples"),
        (
            '{"format": 1, "device": "CPU", "samples": [{"precision": "fp32", "m": 1, "n": 1, "k": 1}]}',
            "KeyError: 'seconds'",
        ),
        ("[1]", "TypeError: "),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        request(path).cluster.validate()
    with pytest.raises(ConfigError, match="No such file"):
        read_matmul_rates(tmp_path / "none.json")


def test_rates_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "matmul.json"
    words = ["--device", "cpu", "--sizes", "8,32", "--budget-s", "0.001"]
    assert main(["--output", str(path), *words]) == 0
    assert "over 8 sizes" in capsys.readouterr().out
    found = read_matmul_rates(path)
    assert found.device == "CPU" and set(found.precisions) == {"fp32"}
    sample = json.loads(path.read_text())["samples"][3]
    shape = sample["m"], sample["n"], sample["k"]
    expected = 2 * math.prod(shape) / sample["seconds"]
    assert found.precisions["fp32"].rate(*shape) == pytest.approx(expected)
    assert json.loads(path.read_text())["measured"].keys() >= {"host", "torch", "date", "threads"}
    for wrong in (["--sizes", "0"], ["--budget-s", "0"], ["--output", str(tmp_path)]):
        assert main(["--output", str(path), *wrong]) == 2
        assert "type next: " in capsys.readouterr().err
