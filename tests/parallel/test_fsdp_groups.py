"""Collectives of FSDP, in number and order: counted on ranks of which only one is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt.config import ModelConfig, ParallelConfig, Precision, Strategy, TrainConfig
from gpt.model.gpt import GPT
from gpt.parallel.nd import apply_fsdp, prefetch_forward
from gpt.topology import fsdp_units
from launch.errors import ConfigError
from tests.support.learning import Operations
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


@pytest.mark.parametrize("model", [UNTIED, LEARNED], ids=["rotary", "learned positions"])
def test_the_embedding_alone_is_gathered_first_and_what_ends_a_pass_once(model: ModelConfig, mesh: DeviceMesh) -> None:
    whole = GPT(model)
    entry = [m for m in (whole.token_embedding, whole.position) if m is not None]
    block, end = elements(whole.blocks[0]), elements(whole.norm, whole.head)
    forward, backward = gathers(sharded(model, mesh))
    assert forward == [elements(*entry), *[block] * BLOCKS, end]
    assert backward == [block] * (BLOCKS - 1)


def test_a_tied_matrix_is_gathered_once(mesh: DeviceMesh) -> None:
    whole = GPT(TIED)
    assert whole.position is not None
    forward, backward = gathers(sharded(TIED, mesh))
    block = elements(whole.blocks[0])
    assert forward == [elements(whole.token_embedding, whole.position, whole.norm), *[block] * BLOCKS]
    assert backward == [block] * (BLOCKS - 1)


@pytest.mark.parametrize("model", [UNTIED, TIED], ids=["untied", "tied"])
def test_nothing_is_gathered_again_without_resharding(model: ModelConfig, mesh: DeviceMesh) -> None:
    assert gathers(sharded(model, mesh, reshard_after_forward=False))[1] == []


@pytest.mark.parametrize(
    ("least", "units"), [(1, [1] * 5), (PARAMETERS, [1] * 5), (PARAMETERS + 1, [2, 3]), (4 * PARAMETERS, [5])]
)
def test_units_have_as_many_parameters_as_is_asked_for(least: int, units: list[int], mesh: DeviceMesh) -> None:
    forward, backward = gathers(sharded(UNTIED, mesh, fsdp_min_num_params=least))
    block = elements(GPT(UNTIED).blocks[0])
    assert forward[1:-1] == [count * block for count in units]
    assert backward == [count * block for count in reversed(units[:-1])]


def test_a_stage_with_too_few_parameters_is_one_unit_and_one_without_blocks_none() -> None:
    parallel = ParallelConfig(Strategy.fsdp, fsdp_min_num_params=4 * PARAMETERS)
    config = TrainConfig(model=UNTIED, parallel=parallel)
    assert [fsdp_units(config, layers) for layers in (0, 3, 4, 7, 8)] == [[], [3], [4], [7], [4, 4]]


@pytest.mark.parametrize(
    ("keys", "fix"),
    [
        ({"strategy": Strategy.ddp}, "parallel=fsdp"),
        ({"strategy": Strategy.fsdp, "ep": 2}, "parallel.fsdp_min_num_params=null"),
        ({"strategy": Strategy.fsdp, "fsdp_min_num_params": 0}, "parallel.fsdp_min_num_params=1"),
    ],
)
def test_units_where_there_are_none_are_refused(keys: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError, match="fsdp_min_num_params=") as refused:
        ParallelConfig(**{"fsdp_min_num_params": 10**6, **keys}).validate()
    assert fix in str(refused.value)


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


@pytest.mark.parametrize(
    ("keys", "fix"),
    [
        ({"strategy": Strategy.ddp}, "parallel=fsdp"),
        ({"strategy": Strategy.fsdp, "pp": 2}, "parallel.reduce_each_micro_batch=false"),
    ],
)
def test_gradients_that_no_micro_batch_reduces_are_refused(keys: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError, match="reduce_each_micro_batch=true") as refused:
        ParallelConfig(**keys, reduce_each_micro_batch=True).validate()
    assert fix in str(refused.value)
