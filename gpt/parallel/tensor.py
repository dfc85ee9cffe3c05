"""Tensor parallelism: the matrices of a model sharded over ranks that work on the same tokens.

After Megatron-LM (arXiv 1909.08053, section 3). Queries, keys, values and the first matrices of the feed-forward layer
are column-parallel: sharded by their outputs, that is by heads and by inner width. The matrices that write into the
residual stream are row-parallel: sharded by their inputs, their results summed over the ranks. Embedding and output
matrix are sharded by the vocabulary (gpt/parallel/vocab.py). Between these, hidden states are sharded along the
sequence (``parallel.sequence_parallel``, arXiv 2205.05198, section 4.2.2), or replicated.

Owns the sharding plan. It is applied to the model from outside, with torch's parallel styles for Linear layers;
activations between the modules of a block are plain tensors. All parameters become DTensors, also the replicated ones;
where a rank saw only a shard of the tokens or heads, their gradient is partial until it is reduced.

B batch, T time, D width, H heads, C head width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    parallelize_module,
)

from gpt.config import ParallelConfig
from gpt.model.ffn import GatedFfn, StandardFfn
from gpt.model.gpt import GPT
from gpt.model.moe import MixtureOfExperts
from gpt.parallel.compile import replace_forward
from gpt.parallel.dtensor import all_reduce_in_buckets, compute_on_shards, distribute, reduce_partial
from gpt.parallel.timeline import waiting
from gpt.parallel.vocab import ShardedEmbedding

REPLICATED, SEQUENCE, HEADS, VOCABULARY = Replicate(), Shard(1), Shard(2), Shard(-1)
"""Placements of activations: replicated, or sharded: (B, T, D) along T, (B, T, H, C) along H, (B, T, V) along V."""

MIXTURE_PLACEMENTS: dict[str, Placement] = {
    **{"experts.gate": Shard(1), "experts.up": Shard(1), "experts.down": Shard(2)},
    **{"shared.gate.weight": Shard(0), "shared.up.weight": Shard(0), "shared.down.weight": Shard(1)},
}
"""Shardings of the matrices of a mixture of experts, along their inner width."""


def apply_tensor_parallel(model: GPT, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Apply tensor parallelism over ``mesh`` to ``model``, or a pipeline stage of one, equal on all of its ranks.

    The model takes tokens as before. It returns this rank's columns of the logits (``loss_parallel``) or all of them;
    padding of the vocabulary may be among any rank's columns.
    """
    record_waits()
    if config.async_tp:
        overlap_collectives(mesh)
    hidden = SEQUENCE if config.sequence_parallel else REPLICATED
    apply_styles(model, mesh, outer_styles(model, hidden, VOCABULARY if config.loss_parallel else REPLICATED))
    for block in model.blocks:
        apply_styles(block, mesh, block_styles(block, hidden))


def overlap_collectives(mesh: DeviceMesh) -> None:
    """Have the compiler split all-gathers and reduce-scatters over ``mesh`` and the matrix products beside them, so
    that each piece is sent while another is computed (``parallel.async_tp``).

    For the process: the compiler takes the setting when a block is first called, and only for groups named to it.
    """
    # Not at the top: runs without a compiler do without its second of imports.
    from torch._inductor import config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    with warnings.catch_warnings():
        # torch 2.13 calls this needless, and still asks whether it was called before it fuses anything.
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)


def record_waits() -> None:
    """Have the timeline of a step see where DTensors wait: for the results of tensor-parallel collectives.

    torch's functional collectives start them and wait in one function of their module, which this replaces once for
    the process. Code that is compiled waits by itself, unseen.
    """
    wait = functional_collectives.wait_tensor
    if getattr(wait, "is_recorded", False):
        return

    def recorded_wait(tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return wait(tensor)  # type: ignore[no-any-return]
        with waiting("tp"):
            return wait(tensor)  # type: ignore[no-any-return]

    recorded_wait.is_recorded = True  # type: ignore[attr-defined]
    functional_collectives.wait_tensor = recorded_wait


def apply_styles(module: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> None:
    """Apply parallel styles to those submodules of the plan that this variant of the model has."""
    there = dict(module.named_modules())
    # No broadcast of values: every rank has them.
    parallelize_module(module, mesh, {name: plan[name] for name in plan if name in there}, src_data_rank=None)


def outer_styles(model: GPT, hidden: Placement, logits: Placement) -> dict[str, ParallelStyle]:
    """Return the styles of the modules before and after the blocks."""
    head: ParallelStyle = ColwiseParallel(input_layouts=hidden, output_layouts=logits)
    if model.config.tie_embeddings:
        head = PrepareModuleInputOutput(
            input_layouts=(hidden, None),
            desired_input_layouts=(REPLICATED, None),
            output_layouts=VOCABULARY,
            desired_output_layouts=logits,
        )
    return {
        "token_embedding": ShardedEmbedding(hidden),
        "position": Replicated(hidden, starts_at_slice=True),
        "norm": Replicated(hidden),  # also one of the user's, where it says that it takes tokens one by one
        "head": head,
    }


def block_styles(block: nn.Module, hidden: Placement) -> dict[str, ParallelStyle]:
    """Return the styles of a block: attention and feed-forward layer, each column-parallel and then row-parallel."""
    plan: dict[str, ParallelStyle] = {
        "attention_norm": Replicated(hidden),
        # One all-gather for queries, keys and values, and one reduce-scatter of the sum of their gradients.
        "attention": PrepareModuleInput(input_layouts=(hidden, None), desired_input_layouts=(REPLICATED, None)),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.query_norm": Replicated(HEADS),
        "attention.key_norm": Replicated(HEADS),
        "attention.output": RowwiseParallel(output_layouts=hidden),
        "ffn_norm": Replicated(hidden),
    }
    if not isinstance(block.ffn, MixtureOfExperts | StandardFfn | GatedFfn):
        return {**plan, "ffn": Replicated(hidden)}  # a layer of the user's, on this rank's tokens
    if isinstance(block.ffn, MixtureOfExperts):
        return {**plan, "ffn": ShardedMixture(hidden)}
    return {
        **plan,
        "ffn": PrepareModuleInput(input_layouts=(hidden,), desired_input_layouts=(REPLICATED,)),
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=hidden),
    }


class Replicated(ParallelStyle):
    """Style of a module with replicated parameters, whose input and output have one placement.

    Where that is a shard, the gradient of the parameters is partial. ``starts_at_slice``: the module also takes the
    position of its first token.
    """

    def __init__(self, placement: Placement, starts_at_slice: bool = False) -> None:
        super().__init__()
        self.placement, self.starts_at_slice = placement, starts_at_slice

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, {})
        if self.starts_at_slice and self.placement == SEQUENCE:
            replace_forward(module, partial(shift_positions, module.forward, device_mesh.get_local_rank()))
        compute_on_shards(module, REPLICATED if self.placement == REPLICATED else Partial())
        return module


def shift_positions(forward: Callable[[Tensor, int], Tensor], slices: int, x_BTD: Tensor, start: int = 0) -> Tensor:
    """Call ``forward`` with positions shifted by a number of sequence shards."""
    return forward(x_BTD, start + slices * x_BTD.size(1))


class ShardedMixture(ParallelStyle):
    """Style of a mixture of experts, each expert sharded by its inner width. Every rank routes all tokens alike.

    Inside, everything a rank computes is partial: the result, the gradient of the input, that of the router. So there
    is no collective before the end; and the routing losses, which every rank computes whole, are weighted by one over
    the number of ranks.
    """

    def __init__(self, hidden: Placement) -> None:
        super().__init__()
        self.hidden = hidden

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, MIXTURE_PLACEMENTS)
        compute_on_shards(module, Partial())
        replace_forward(module, partial(self._sum, device_mesh, module.forward))
        return module

    def _sum(self, mesh: DeviceMesh, forward: Callable[[Tensor], Tensor], x_BTD: Tensor) -> Tensor:
        whole_BTD = DTensor.from_local(x_BTD, mesh, [self.hidden]).redistribute(placements=[REPLICATED])
        return reduce_partial(forward(whole_BTD.to_local(grad_placements=[Partial()])), mesh, self.hidden)


def reduce_partial_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """All-reduce partial gradients over ``mesh`` after the last micro-batch. Under FSDP its reduce-scatter does so."""
    parts = []
    for parameter in module.parameters():
        grad = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
            parts.append(grad.to_local())
            parameter.grad = DTensor.from_local(parts[-1], mesh, parameter.placements)
    all_reduce_in_buckets(parts, mesh.get_group())
