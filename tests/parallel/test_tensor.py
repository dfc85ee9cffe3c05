"""Tensor parallelism, and the overlap of its collectives with matrix products."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.config import ParallelConfig, Strategy
from gpt.conversion.state_dict import find_checkpoint, read_weights
from gpt.model.gpt import GPT
from gpt.model.layers import cross_entropy
from gpt.parallel.compile import replace_forward
from gpt.parallel.distributed import World, build_mesh
from gpt.parallel.tensor import apply_tensor_parallel, vocabulary_loss
from gpt.planning.auto import choose_compile
from gpt.topology import ParallelDims
from gpt.topology.check_dims import check_parallel_dims
from gpt.training.checkpoints import save
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import (
    STEPS,
    TINY,
    Case,
    assert_all_same,
    learn_alone,
    learn_cases,
    start,
    step,
)
from tests.support.small_models import LLAMA, random_tokens, small

PADDED = ["model.vocab_size=259", "model.vocab_multiple=16"]
ONE = "model.n_layer=1"
"""Enough for a kind of layer; units of FSDP and blocks that prefetch each other are in the other models."""
LAYERS = {
    "tied": ["model.tie_embeddings=true", "model.position=learned", "model.norm=layernorm"],
    "grouped queries": [
        *("model.tie_embeddings=false", "model.n_kv_head=2", "model.qk_norm=true", "model.norm=rmsnorm", ONE)
    ],
    "post": ["model.norm_position=post", "model.ffn=swiglu", "model.ffn_hidden=36", "model.position=none", ONE],
    "parallel": ["model.parallel_residual=true", "model.ffn=geglu", "model.ffn_hidden=44", "model.n_kv_head=2", ONE],
    "experts": ["model.ffn=moe", "model.n_expert=4", "model.ffn_hidden=32", "model.n_shared_expert=1"],
    "few places": [
        *("model.ffn=moe", "model.n_expert=4", "model.ffn_hidden=12", "model.expert_matmul=loop"),
        *("model.expert_ffn=standard", "model.capacity_factor=1.0", "model.expert_balance=bias", ONE),
    ],
    "even rows": ["model.ffn=moe", "model.n_expert=4", "model.ffn_hidden=32", "model.capacity_factor=1.0", ONE],
}
MODELS = {name: [*words, *PADDED] for name, words in LAYERS.items()}
TP = "parallel=tp"
WHOLE = "parallel.sequence_parallel=false parallel.loss_parallel=false"
CASES = {
    2: [
        *(Case(TP, model, count) for model, count in zip(MODELS, (2, 1, 1, 1, 2, 1, 2), strict=True)),
        *(Case(f"{TP} {WHOLE}", model, 1) for model in ("tied", "experts")),
        Case(f"{TP} recompute=full compile=default", "grouped queries", 1),
    ],
    4: [
        Case(f"{TP} parallel.tp=4", "tied", 1),
        Case(TP, "grouped queries", 1),
        Case("parallel=fsdp_tp", "tied"),
        Case("parallel=fsdp_tp parallel.reshard_after_forward=false recompute=selective", "parallel", 1),
        Case("parallel=fsdp_tp parallel.dp_shard=1", "experts"),
        Case("parallel=ep parallel.ep=2 parallel.tp=2", "few places", 1),
        Case("parallel=fsdp_ep parallel.ep=2 parallel.tp=2 recompute=full", "experts", 1),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_everything_is_as_in_one_process(ranks: int, alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    cases = CASES[ranks]
    found = run_distributed(learn_cases, ranks, tmp_path / "runs", cases, MODELS, timeout_s=300)[0]
    assert_all_same(cases, found, alone)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_distributed(learn_alone, 1, tmp_path_factory.mktemp("alone") / "runs", MODELS)[0]


CROSSED = {"ddp": ["parallel=ddp"], "fsdp": ["parallel=fsdp"], "tp": [TP], "fsdp_tp": ["parallel=fsdp_tp"]}
UNEVEN = ["model.ffn=swiglu", "model.ffn_hidden=42", ONE, "optim.max_micro_batch=8", *PADDED]
"""Halves of 21 rows, which two ranks cut into 11 and 10."""


CROSSINGS = [
    *(("tp", "tp"), ("tp", "ddp"), ("fsdp", "tp"), ("ddp", "fsdp_tp")),
    *(("fsdp_tp", "fsdp_tp"), ("fsdp_tp", "fsdp")),
]


def cross(rank: int, size: int, folder: Path) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Save under one, go on under another: the losses of the steps after, and those that were to come."""
    found = {}
    for saved, saving in CROSSED.items():
        run = start(rank, size, folder / saved, *saving, *UNEVEN)
        step(run)
        save(run)
        to_come = [step(run)[0] for _ in range(2)]
        for resumed in [to for way, to in CROSSINGS if way == saved]:
            again = start(rank, size, folder / saved, *CROSSED[resumed], *UNEVEN)
            assert again.step == 1
            found[saved, resumed] = ([step(again)[0] for _ in range(2)], to_come)
    return found


def test_checkpoints_cross_and_are_read_by_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    found = run_distributed(cross, 4, folder, timeout_s=200)[0]
    assert found.keys() == set(CROSSINGS)
    for pair, (losses, to_come) in found.items():
        assert losses == pytest.approx(to_come, rel=1e-6), pair
        if pair[0] == pair[1]:
            assert losses == to_come, f"{pair[0]}: bit for bit"
    weights = [dict(checkpointed(folder / saved, saving).named_parameters()) for saved, saving in CROSSED.items()]
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def checkpointed(folder: Path, words: list[str]) -> GPT:
    """The model of a run's checkpoint, as generation and export read it."""
    config = config_from([*TINY, *words, *UNEVEN])
    return read_weights(config, find_checkpoint(RunFolder(folder)))


def other_ways(rank: int, size: int, folder: Path) -> dict[str, list[float]]:
    """Losses of bf16 cut and whole; of dropout before and after a restart."""
    found = {}
    words = [*MODELS["grouped queries"], "optim.max_micro_batch=8"]
    for name, more in {"bf16": [TP, "precision=bf16"], "bf16, fsdp": ["parallel=fsdp_tp", "precision=bf16"]}.items():
        found[name] = [step(run)[0] for run in [start(rank, size, folder / name, *words, *more)] for _ in range(STEPS)]
    words = [*words, TP, "model.dropout=0.3"]
    run = start(rank, size, folder / "dropout", *words)
    step(run)
    save(run)
    found["dropout"] = [step(run)[0] for _ in range(2)]
    again = start(rank, size, folder / "dropout", *words)
    found["restarted"] = [step(again)[0] for _ in range(2)]
    return found


def test_bf16_agrees_and_dropout_goes_on_where_it_was(alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = run_distributed(other_ways, 2, tmp_path / "runs")[0]
    whole = alone["grouped queries"]["losses"]
    assert found["bf16"] == pytest.approx(whole, rel=2e-3) and found["bf16"] != list(whole)
    assert found["bf16, fsdp"] == pytest.approx(whole, rel=2e-3)
    assert found["restarted"] == found["dropout"]


def cut_model(rank: int, size: int) -> dict[str, Any]:
    """Memory and traffic of a rank for a model without padding, in one forward and backward pass."""
    config = small(**LLAMA, n_kv_head=2, n_layer=3, vocab_size=48, ffn_hidden=36)
    world = World(rank, size, rank, size, 0, torch.device("cpu"), dist.new_group(backend="gloo"))
    mesh = build_mesh(ParallelDims("ddp", 1, 1, tp=size), world, 60)["tp"]
    model = GPT(config)
    apply_tensor_parallel(model, mesh, ParallelConfig())
    shapes: dict[str, tuple[int, ...]] = {}
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: shapes.update(stream=tuple(inputs[0].shape)))
    tokens_BT = random_tokens(config, 5)
    counts = []
    with Collectives() as seen:
        logits_BTV = model(tokens_BT)
        counts.append(dict(seen.counts))
        logits_BTV.sum().backward()
        counts.append(dict(seen.counts))
    held = {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}
    grads = {name: tuple(p.grad.to_local().shape) for name, p in model.named_parameters()}
    return {"shapes": {**shapes, "logits": tuple(logits_BTV.shape)}, "counts": counts, "held": held, "grads": grads}


class Collectives(TorchDispatchMode):
    """Counts the collectives that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if "c10d" in func.namespace and name != "wait_tensor" and not name.startswith("_"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


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
    world = World(rank, size, rank, size, 0, torch.device("cpu"), dist.new_group(backend="gloo"))
    mesh = build_mesh(ParallelDims("ddp", 1, 1, tp=size), world, 60)["tp"]
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


REFUSED = [
    (["model.n_head=6", "model.n_embd=48", "parallel.tp=4"], "model.n_head=6"),
    (["model.n_kv_head=1"], "1 key and value heads"),
    (["model.ffn_hidden=33"], "33 wide"),
    (["model.ffn=moe", "model.n_expert=2", "model.ffn_hidden=24", "parallel.tp=2"], "12 on each rank"),
    (["model.ffn=moe", "model.n_expert=2", "model.ffn_hidden=24", "parallel.tp=4", "model.n_head=8"], "6 on each rank"),
    (["model.vocab_size=257"], "257 rows"),
    (["model.vocab_size=257", "model.vocab_multiple=6", "parallel.tp=4"], "258 rows"),
    (["model.block_size=15"], "model.block_size=15"),
    (["model.block_size=15", "model.dropout=0.1"], "model.block_size=15"),
    (["model.dropout=0.1", "parallel.sequence_parallel=false"], "model.dropout=0.1"),
    (["model.dropout=0.1", "parallel.sequence_parallel=false", "model.block_size=15"], "model.dropout=0.1"),
    (["parallel.strategy=zero1"], "parallel.strategy=zero1"),
]


@pytest.mark.parametrize(("words", "found"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_cannot_be_cut_is_refused_with_what_can(words: list[str], found: str) -> None:
    given = [*TINY, TP, *words]
    with pytest.raises(ConfigError) as refusal:
        check_parallel_dims(config_from(given), 4)
    assert found in refusal.value.found
    for fix in refusal.value.fix.split(", or "):
        config = config_from([*given, *fix.split()])
        config.validate()
        check_parallel_dims(config, 4)


# ``parallel.async_tp``: torch's compiler splits the collectives of a block, and what could not work is refused.
#
# There is no GPU here: Inductor rewrites the graphs of a block, and the operations that it puts in are not run.
# Inductor takes seconds to import, so each function imports what it uses.


FUSED = ("symm_mem.fused_all_gather_matmul.default", "symm_mem.fused_matmul_reduce_scatter.default")
PLAIN = ("_c10d_functional.all_gather_into_tensor.default", "_c10d_functional.reduce_scatter_tensor.default")


def operations(module: torch.fx.GraphModule, is_inference: bool) -> Counter[str]:
    """Operations of a graph after those rewrites of the compiler that know no device, counted by name."""
    from torch._guards import detect_fake_mode
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.virtualized import V

    graph = deepcopy(module)
    view_to_reshape(graph)
    # The pass leaves graphs alone where torch has no NCCL.
    has_nccl = mock.patch.object(torch.distributed, "is_nccl_available", lambda: True)
    with has_nccl, V.set_fake_mode(detect_fake_mode([node.meta.get("val") for node in graph.graph.nodes])):
        post_grad_passes(graph, is_inference)
    return Counter(str(node.target) for node in graph.graph.nodes)


def graphs_of_a_block() -> list[tuple[Counter[str], Counter[str]]]:
    """Operations of a block's forward and backward graph on the first of two ranks, with the setting and without."""
    from functorch.compile import make_boxed_func
    from torch._inductor import config as inductor
    from torch._inductor.compile_fx import compile_fx

    found: list[tuple[Counter[str], Counter[str]]] = []
    torch._dynamo.reset()  # another test of this process may have compiled the same code for other shapes

    def compile_graph(module: torch.fx.GraphModule, _: Any, is_inference: bool = False, **__: Any) -> Any:
        with_it = operations(module, is_inference)
        with inductor.patch(_micro_pipeline_tp=False):
            found.append((with_it, operations(module, is_inference)))
        return make_boxed_func(module.forward)

    model = GPT(small(**LLAMA, n_layer=1))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        apply_tensor_parallel(model, mesh, ParallelConfig(Strategy.ddp, tp=2, async_tp=True))
        block = model.blocks[0]
        backend = partial(compile_fx, inner_compile=compile_graph)
        replace_forward(block, torch.compile(block.forward, backend=backend))
        model(torch.zeros(2, model.config.block_size, dtype=torch.long)).sum().backward()
    finally:
        dist.destroy_process_group()
    return found


def test_collectives_of_a_block_go_in_pieces_with_the_products_beside_them() -> None:
    from torch._inductor import config as inductor

    with inductor.patch(_micro_pipeline_tp=False):  # puts back what the engine sets for the process
        (forward, plain_forward), (backward, plain_backward) = graphs_of_a_block()
    for plain in (plain_forward, plain_backward):
        assert [plain[name] for name in (*FUSED, *PLAIN)] == [0, 0, 2, 2], "of attention and of the ffn"
    assert [forward[name] for name in (*FUSED, *PLAIN)] == [2, 2, 0, 0]
    # A gradient that is reduce-scattered is the sum of several products, which the compiler leaves whole.
    assert [backward[name] for name in (*FUSED, *PLAIN)] == [2, 0, 0, 2]


ASKED = ["parallel=tp", "parallel.async_tp=true"]


@pytest.mark.parametrize(
    ("words", "found", "typed"),
    [
        (["parallel.tp=1"], "async_tp=true with parallel.tp=1", "parallel.tp=2"),
        (["parallel.sequence_parallel=false"], "with parallel.sequence_parallel=false", "sequence_parallel=true"),
    ],
)
def test_what_has_nothing_to_overlap_is_refused(words: list[str], found: str, typed: str) -> None:
    with pytest.raises(ConfigError, match=found) as refused:
        check_parallel_dims(config_from([*ASKED, *words]), 2)
    assert typed in str(refused.value) and "parallel.async_tp=false" in str(refused.value)


@pytest.mark.parametrize(
    ("words", "on_cpus", "found", "typed"),
    [
        ([], True, "on CPUs", "device=cuda"),
        (["compile=default"], True, "on CPUs", "device=cuda"),
        (["compile=none"], False, "with compile=none", "compile=default"),
    ],
)
def test_it_needs_gpus_and_the_compiler(words: list[str], on_cpus: bool, found: str, typed: str) -> None:
    with pytest.raises(ConfigError, match=found) as refused:
        choose_compile(config_from([*ASKED, *words]), 2, on_cpus)
    assert typed in str(refused.value)
    assert choose_compile(config_from(ASKED), 2, on_cpus=False).name == "default"
    assert choose_compile(config_from(["parallel=tp"]), 2, on_cpus=True).name == "none"
