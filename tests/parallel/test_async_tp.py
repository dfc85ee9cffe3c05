"""``parallel.async_tp``: torch's compiler splits the collectives of a block, and what could not work is refused.

There is no GPU here: Inductor rewrites the graphs of a block, and the operations that it puts in are not run. Inductor
takes seconds to import, so each function imports what it uses.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt.config import ParallelConfig, Strategy
from gpt.model.gpt import GPT
from gpt.parallel.compile import replace_forward
from gpt.parallel.tensor import apply_tensor_parallel
from gpt.planning.auto import choose_compile
from gpt.topology.rules import check_parallel_dims
from launch.errors import ConfigError
from tests.support.composing import config_from
from tests.support.small_models import LLAMA, small

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
