"""FSDP: groups, offload, models made on the meta device, and the memory that each strategy needs."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt.accounting import BF16, FP32
from gpt.config import ModelConfig, ParallelConfig, Precision, Strategy, TrainConfig
from gpt.model import gpt
from gpt.model.gpt import GPT
from gpt.parallel.modules import local_tensor, materialize
from gpt.parallel.nd import apply_fsdp, prefetch_forward
from gpt.planning.memory import parallel_factors, per_rank
from gpt.planning.rank_shards import activation_bytes, cast_elements, parameter_shards
from gpt.topology import fsdp_units, split_batch
from gpt.topology.check_dims import check_parallel_dims
from gpt.training import run as run_module
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import (
    MODELS,
    TINY,
    Operations,
    compose,
    living_bytes,
    save,
    start_composed,
    step,
    tensors_of,
    whole,
)
from tests.support.small_models import LLAMA, random_tokens, small

RANKS, BLOCKS = 8, 5
UNTIED = small(**LLAMA, n_layer=BLOCKS)
LEARNED = small(n_layer=BLOCKS, tie_embeddings=False)
TIED = small(n_layer=BLOCKS)
PARAMETERS = sum(p.numel() for p in GPT(UNTIED).blocks[0].parameters())
"""Of a block."""


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def sharded(model: ModelConfig, mesh: DeviceMesh, **keys: Any) -> GPT:
    gpt = GPT(model)
    parallel = ParallelConfig(Strategy.fsdp, **keys)
    apply_fsdp(gpt, mesh, TrainConfig(model=model, parallel=parallel, precision=Precision.bf16))
    return gpt


def gathers(gpt: GPT) -> tuple[list[int], list[int]]:
    """Elements of each all-gather of the second forward pass, and of its backward pass."""
    found: list[int] = []

    def is_gather(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if "allgather_base" in name or "all_gather_into_tensor" in name:
            found.append(args[0].numel())
        return False

    tokens_BT = random_tokens(gpt.config, 2)
    for _ in range(2):
        found.clear()
        with Operations(is_gather):
            logits_BTV = gpt(tokens_BT)
            forward = list(found)
            logits_BTV.float().square().mean().backward()
    return forward, found[len(forward) :]


def elements(*modules: torch.nn.Module) -> int:
    """Elements of some modules of a whole model, each parameter padded to a multiple of the ranks."""
    return sum(-(-len(p) // RANKS) * RANKS * p[0].numel() for m in modules for p in m.parameters())


GATHERED: list[tuple[ModelConfig, dict[str, Any], list[int], list[int]]] = [
    (UNTIED, {}, [1] * 5, [1] * 4),
    (LEARNED, {}, [1] * 5, [1] * 4),
    (TIED, {}, [1] * 5, [1] * 4),
    (UNTIED, {"reshard_after_forward": False}, [1] * 5, []),
    (TIED, {"reshard_after_forward": False}, [1] * 5, []),
    (UNTIED, {"fsdp_min_num_params": 1}, [1] * 5, [1] * 4),
    (UNTIED, {"fsdp_min_num_params": PARAMETERS}, [1] * 5, [1] * 4),
    (UNTIED, {"fsdp_min_num_params": PARAMETERS + 1}, [2, 3], [2]),
    (UNTIED, {"fsdp_min_num_params": 4 * PARAMETERS}, [5], []),
]
"""Model, settings, and the blocks of each gather of a forward pass and of its backward pass."""


@pytest.mark.parametrize(("model", "keys", "forward", "backward"), GATHERED)
def test_embedding_units_and_end_are_gathered_once_each(
    model: ModelConfig, keys: dict[str, Any], forward: list[int], backward: list[int], mesh: DeviceMesh
) -> None:
    whole = GPT(model)
    block, entry = elements(whole.blocks[0]), [m for m in (whole.token_embedding, whole.position) if m is not None]
    blocks = [count * block for count in forward]
    expected = (
        [elements(*entry, whole.norm), *blocks]  # a tied matrix is gathered with what begins a pass
        if model.tie_embeddings
        else [elements(*entry), *blocks, elements(whole.norm, whole.head)]
    )
    assert gathers(sharded(model, mesh, **keys)) == (expected, [count * block for count in backward])


def test_a_stage_with_too_few_parameters_is_one_unit_and_one_without_blocks_none() -> None:
    parallel = ParallelConfig(Strategy.fsdp, fsdp_min_num_params=4 * PARAMETERS)
    config = TrainConfig(model=UNTIED, parallel=parallel)
    assert [fsdp_units(config, layers) for layers in (0, 3, 4, 7, 8)] == [[], [3], [4], [7], [4, 4]]


def test_blocks_that_wait_for_the_device_gather_the_next_one_before(mesh: DeviceMesh) -> None:
    gpt = sharded(UNTIED, mesh)
    prefetch_forward([[block] for block in gpt.blocks])
    started: list[str] = []
    for number, block in enumerate(gpt.blocks):
        block.attention.register_forward_pre_hook(lambda *_, number=number: started.append(f"block {number}"))

    def is_gather(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if "allgather_base" in name:
            started.append("gather")
        return False

    with torch.no_grad(), Operations(is_gather):
        gpt(random_tokens(UNTIED, 2))
    ahead = [event for number in range(1, BLOCKS) for event in (f"block {number - 1}", "gather")]
    assert started == ["gather", "gather", "gather", *ahead[:-1], f"block {BLOCKS - 1}", "gather"]


def composed(*words: str) -> TrainConfig:
    config = config_from([*TINY, *words])
    config.validate()
    return config


def test_what_is_on_the_host_is_not_planned_on_the_device() -> None:
    plain, host = (
        per_rank(config, dims := check_parallel_dims(config, 2), split_batch(config.optim, dims.data_ranks))
        for config in (composed("parallel=fsdp"), composed("parallel=fsdp_offload"))
    )
    assert plain.host == 0
    assert host.host == plain.parameters + plain.gradients + plain.optimizer > 0
    assert host.total + host.host == plain.total - plain.not_at_once


# A model sharded on the meta device gets the values of one drawn whole, a shard and one parameter at a time.


WORDS_OF_MATERIALIZE = ["optim.max_micro_batch=2", "model.vocab_multiple=8"]
UNTIED_OF_MATERIALIZE = MODELS["untied, grouped queries"]


def reduced(rank: int, size: int, folder: Path) -> dict[str, tuple[dict[str, Tensor], set[torch.dtype]]]:
    """Gradients of a first step, and the dtypes of its reduce-scatters, by ``parallel.reduce_dtype``."""
    found = {}
    words = ("parallel=hsdp", "parallel.dp_shard=2", "optim.max_micro_batch=2", "optim.grad_clip=0")
    for dtype in ("fp32", "bf16"):
        run = start_composed(rank, size, folder / dtype, compose(*words, f"parallel.reduce_dtype={dtype}"))
        dtypes: set[torch.dtype] = set()

        def note(name: str, inputs: Sequence[Any], _: Any, dtypes: set[torch.dtype] = dtypes) -> bool:
            dtypes.update(x.dtype for x in tensors_of(inputs) if "reduce_scatter" in name)
            return False

        with Operations(note):
            step(run)
        grads = {name: p.grad for name, p in run.engine.trained.named_parameters() if p.grad is not None}
        found[dtype] = whole(run, grads), dtypes
    return found


def test_gradients_may_be_reduced_in_bf16(tmp_path: Path) -> None:
    for found in run_distributed(reduced, 4, tmp_path / "runs"):
        (exact, in_fp32), (rounded, in_bf16) = found["fp32"], found["bf16"]
        assert in_fp32 == {torch.float32} and in_bf16 == {torch.bfloat16}
        for name, grad in exact.items():
            assert rounded[name].dtype == torch.float32
            assert 0 < (rounded[name] - grad).norm() <= 2**-7 * grad.norm(), name


def watch(rank: int, size: int, folder: Path) -> tuple[list[int], int, int]:
    """Whole tensors alive when the next is drawn; bytes that a rank then holds; draws of a run that goes on."""
    config = compose(*WORDS_OF_MATERIALIZE, "parallel=fsdp", *UNTIED_OF_MATERIALIZE)
    alive: list[int] = []
    drawn: list[weakref.ref[Tensor]] = []
    draw = gpt.initial_value

    def counted(*args: object, **kwargs: object) -> Tensor:
        alive.append(sum(reference() is not None for reference in drawn))
        value = draw(*args, **kwargs)  # type: ignore[arg-type]
        drawn.append(weakref.ref(value))
        return value

    gpt.initial_value = counted  # type: ignore[assignment]
    run = start_composed(rank, size, folder, config)
    held = sum(local_tensor(p).untyped_storage().nbytes() for p in run.engine.module.parameters())
    run.step = 1
    save(run)
    before = len(drawn)
    start_composed(rank, size, folder, config)
    return alive, held, len(drawn) - before


def test_a_rank_holds_its_shards_and_one_whole_tensor_and_draws_nothing_where_it_resumes(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = GPT(compose(*WORDS_OF_MATERIALIZE, "parallel=fsdp", *UNTIED_OF_MATERIALIZE).model)
    total = sum(p.nbytes for p in model.parameters())
    for alive, held, again in run_distributed(watch, 4, tmp_path / "runs"):
        assert len(alive) == len(model.state_dict()) and not any(alive)
        assert held < total / 4 + 64 * len(alive), "rows that do not divide are padded"
        assert again == 0


def test_what_a_checkpoint_is_about_to_fill_takes_no_memory() -> None:
    shape = torch.Size((1 << 30, 1 << 10))
    assert run_module.zeros("head.weight", shape).shape == shape
    config = compose("parallel=ddp", *UNTIED_OF_MATERIALIZE).model
    with torch.device("meta"):
        model = GPT(config)
    materialize([model], run_module.zeros, torch.device("cpu"))
    assert not any(parameter.any() for parameter in model.parameters())


# Activations that a rank keeps for its backward pass are what the plan says.


WORDS_OF_MEMORY = ["model.n_head=4"]
LONG = ["model.n_embd=64", "model.block_size=64"]
"""For recomputation, which leaves so little that what torch keeps once for each micro-batch shows."""
DENSE = "untied, grouped queries"
Cases = dict[tuple[str, ...], TrainConfig]
WAYS = {
    "tp": "parallel=tp",
    "whole stream": "parallel=tp parallel.sequence_parallel=false",
    "cp": "parallel=cp",
    "ring": "parallel=cp parallel.cp_method=ring",
}
PRECISIONS = {
    "tp": ("bf16", "fp32"),
    "whole stream": ("fp32", "bf16"),
    "cp": ("bf16", "fp32"),
    "ring": ("fp32", "bf16"),
}
"""Of the dense model and of the one with experts: each way and each model in both."""
COPIES = {"ddp": "parallel=ddp", "ep": "parallel=ep parallel.ep=2 model.capacity_factor=1"}
"""With as many rows for every expert: else how many are sent to a rank depends on the tokens."""
ACTIVATIONS = {
    **{
        (way, model, precision): [f"precision={precision}", *WAYS[way].split(), *MODELS[model]]
        for (way, (dense, mixture)), model in itertools.product(PRECISIONS.items(), MODELS)
        for precision in ({"tied": "fp32", DENSE: dense, "experts": mixture}[model],)
    },
    **{
        (way, "experts", "selective"): ["recompute=selective", *words.split(), *MODELS["experts"], *LONG]
        for way, words in {**WAYS, **COPIES}.items()
    },
}


def keep(rank: int, size: int, folder: Path, cases: Cases) -> dict[tuple[str, ...], int]:
    each = enumerate(cases.items())
    return {case: living_bytes(start_composed(rank, size, folder / str(i), config)) for i, (case, config) in each}


def test_activations_of_a_rank_are_what_the_plan_says(tmp_path: Path) -> None:
    cases: Cases = {
        case: compose(*WORDS_OF_MEMORY, "optim.max_micro_batch=2", *words) for case, words in ACTIVATIONS.items()
    }
    found = run_distributed(keep, 2, tmp_path / "runs", cases, timeout_s=300)
    for case, config in cases.items():
        dims, width = check_parallel_dims(config, 2), BF16 if config.precision is Precision.bf16 else FP32
        micro = split_batch(config.optim, dims.data_ranks).micro
        said = activation_bytes(config.model, micro, config.precision, config.recompute, parallel_factors(config, dims))
        casts = BF16 * cast_elements(parameter_shards(config.model, dims)) if width == BF16 else 0
        tokens, columns = micro * config.model.block_size // dims.cp, config.model.padded_vocab // dims.tp
        total = said.embedding + config.model.n_layer * said.recomputed + said.final + casts + width * tokens * columns
        assert total == pytest.approx(max(rank[case] for rank in found), rel=0.01), case
