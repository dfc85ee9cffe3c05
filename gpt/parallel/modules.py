"""Functions that change a model in place: float8, recomputation, torch.compile, DTensors, and values of parameters."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gpt.config import Float8, Recompute, TrainConfig
from gpt.model.gpt import GPT, Weights
from gpt.model.layers import cross_entropy, loss_and_gradient
from gpt.parallel.distributed import World
from gpt.topology import BUCKET_BYTES

# Matrix products of the blocks in 8-bit floating point (arXiv 2209.05433), by torchao.
#
# Applied to the model from outside, before it is compiled and parallelized. Parameters keep their names, shapes and
# fp32 values, so checkpoints are the same as in any other precision. torchao is imported only for a run with float8.


def convert_linears(model: GPT, config: TrainConfig) -> None:
    """Make the linear layers of the blocks compute in float8, forward and backward, in place; do nothing if
    ``config.float8`` is ``none``.

    Each product scales its two factors to the range of float8, by the largest magnitude of the whole tensor or of each
    row. Embedding, norms, attention scores, output matrix, router and experts do not change. Logits and the choices of
    the router need more precision; experts compute in grouped products.
    """
    if config.float8 is Float8.none:
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = Float8LinearConfig.from_recipe_name(config.float8.name)
    recipe = replace(recipe, emulate=config.float8_emulate)
    convert_to_float8_training(
        model.blocks,
        config=recipe,
        module_filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.split(".")[-1] != "router",
    )


# Activation checkpointing (recomputation) and torch.compile of each block, and of the modules after the blocks.
#
# Applied to the model from outside, before it is parallelized. Both replace ``forward`` of each block. So parameters
# keep their names, and hooks of FSDP or DDP stay outside of the replaced function.


aten = torch.ops.aten
MATRIX_PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._grouped_mm.default,
        aten._scaled_mm.default,
        torch.ops.gpt.onednn_linear.default,
    }
)
ALL_TO_ALLS = frozenset({torch.ops._c10d_functional.all_to_all_single.default})
"""Operations of torch that send rows to experts on other ranks, and the results back. Selective recomputation keeps
the results of these operations, because it costs less to keep them than to send them again."""
ATTENTION_KERNELS = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
)


def prepare_blocks(model: GPT, config: TrainConfig) -> None:
    """Apply activation checkpointing and torch.compile to the blocks of ``model``, in place, as ``config`` requests.

    The last norm and the output matrix are compiled, too, if tensor parallelism does not split them. Of a chunked loss
    only the work on the logits of a chunk is compiled.
    """
    # Compilation is outside the recomputation, so that the compiler plans the backward pass around it. The compiler
    # must then see the whole block. With collectives in the block (expert dispatch, context parallelism) it is
    # inside.
    parallel = config.parallel
    asks = parallel.ep > 1 or parallel.cp > 1
    # With tp and recompute=full too, compilation is inside: torch 2.13 fails to keep the parts of its DTensors.
    inside = asks or (parallel.tp > 1 and config.recompute is Recompute.full)
    ways = (compile_block, recompute_block) if inside else (recompute_block, compile_block)
    for block in model.blocks:
        for way in ways:
            way(block, config)
    if parallel.tp == 1:  # torch 2.13 finds no backward pass for an output matrix whose rows are on several ranks
        for module in (model.norm, *([] if config.chunked_loss else [model.head])):
            compile_block(module, config)
    if config.chunked_loss and config.compiles:
        model.chunk_loss = torch.compile(loss_and_gradient, dynamic=False, fullgraph=config.compile_fullgraph)


def recompute_block(block: nn.Module, config: TrainConfig) -> None:
    """Apply activation checkpointing to a block, in place, as ``config.recompute`` requests. The recomputation draws
    the same dropout noise as the forward pass."""
    if config.recompute is Recompute.none:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if config.recompute is not Recompute.full:
        kept = MATRIX_PRODUCTS | ALL_TO_ALLS | (frozenset() if config.model.dropout else ATTENTION_KERNELS)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(save_policy, kept))
    replace_forward(block, partial(checkpoint, block.forward, **options))


def compile_block(block: nn.Module, config: TrainConfig) -> None:
    """Compile the forward method of a block or another module, in place, if ``config.compile`` requests it."""
    if config.compiles:
        # Shapes are fixed: by default torch would switch to slower dynamic kernels after the first evaluation.
        mode = None if config.compile.name == "default" else config.compile.name
        whole = config.compile_fullgraph
        replace_forward(block, torch.compile(block.forward, mode=mode, dynamic=False, fullgraph=whole))


def compile_loss(config: TrainConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that takes logits (B, T, V) and targets (B, T), and returns their summed cross-entropy, (). The
    function is compiled if ``config.compile`` requests it."""
    vocab_size = config.model.vocab_size
    if not config.compiles:
        return partial(cross_entropy, vocab_size=vocab_size)
    whole = partial(plain_cross_entropy, vocab_size=vocab_size)
    return torch.compile(whole, dynamic=False, fullgraph=config.compile_fullgraph)


def plain_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, vocab_size: int) -> Tensor:
    """Return the same value as ``gpt.model.layers.cross_entropy``: the summed cross-entropy, (). This version uses only
    functions of torch, so that torch.compile can compile it."""
    logits_NV = logits_BTV.float().flatten(0, 1)
    if vocab_size < logits_NV.size(1):
        padding_V = torch.arange(logits_NV.size(1), device=logits_NV.device) >= vocab_size
        logits_NV = logits_NV.masked_fill(padding_V, -torch.inf)
    targets_N = targets_BT.flatten().clamp(min=-1)
    return F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=-1)


def replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward method of a module by ``forward``. The hooks of the module still run."""
    block.forward = forward


def save_policy(kept: frozenset[Any], _context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Return the policy for ``operation`` in selective recomputation. The result of an operation in ``kept`` is saved.
    Other results are recomputed.

    ``kept`` has matrix products, all-to-alls, and attention without dropout. Korthikanti et al. (arXiv 2205.05198,
    section 5) recompute attention, because without a fused kernel it needs much memory and little arithmetic. With
    dropout, this project recomputes attention, too. If its result were saved, attention would draw no random numbers in
    the recomputation, and all later dropout would differ from that of the forward pass.
    """
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE


# DTensors: local shards, replicas, bucketed all-reduce, and modules that compute with their shards.


def split_into_buckets(tensors: Sequence[Tensor], size: int) -> list[list[int]]:
    """Split tensors, in their order, into buckets of one dtype and at most ``size`` bytes. Return the indices of the
    tensors of each bucket. A tensor of more than ``size`` bytes has a bucket of its own."""
    buckets: list[list[int]] = [[]]
    held = 0
    for index, (tensor, following) in enumerate(zip_longest(tensors, tensors[1:])):
        buckets[-1].append(index)
        held += tensor.nbytes
        if following is not None and (following.dtype != tensor.dtype or held + following.nbytes > size):
            buckets.append([])
            held = 0
    return [bucket for bucket in buckets if bucket]


def all_reduce_in_buckets(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce (sum) tensors over a process group, in place, in buckets of ``BUCKET_BYTES``."""
    for indices in split_into_buckets(tensors, BUCKET_BYTES):
        bucket = [tensors[index] for index in indices]
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat, group=group)
        for part, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            part.copy_(values.view_as(part))


def inverse_replicas(grad: Tensor, ranks: int) -> float:
    """Return 1 / (number of ranks that have the same shard of ``grad`` as this rank).

    A sum over all ranks counts each shard once, if each rank multiplies its part by this number. ``ranks`` is the
    number of all ranks that have ``grad`` or a shard of it.
    """
    if not isinstance(grad, DTensor):
        return 1 / ranks
    placements = list(enumerate(grad.placements))
    assert not any(placement.is_partial() for _, placement in placements), "a partial sum has no replicas"
    # FSDP2 shards an already sharded parameter into _StridedShard, which is_shard() does not count.
    return math.prod(grad.device_mesh.size(i) for i, placement in placements if not placement.is_replicate()) / ranks


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, as a plain tensor; return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute(module: nn.Module, mesh: DeviceMesh, shardings: Mapping[str, Placement]) -> None:
    """Replace the parameters of a module by DTensors over ``mesh``, in place. ``shardings`` has the placements of
    parameters by name; other parameters are replicated.

    All ranks must have equal parameters. A parameter that is already sharded over another mesh is sharded over both.
    """
    for name, parameter in list(module.named_parameters()):
        placement = shardings.get(name, Replicate())
        sharded = distribute_tensor(local_tensor(parameter.detach()), mesh, [placement], src_data_rank=None)
        if isinstance(parameter, DTensor):
            combined = DeviceMesh._concatenate([parameter.device_mesh, mesh])
            sharded = DTensor.from_local(
                sharded.to_local(), combined, [*parameter.placements, placement], run_check=False
            )
        set_tensor(module, name, nn.Parameter(sharded))


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer ``name`` of a module by ``tensor``."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)


def compute_on_shards(module: nn.Module, replicated_gradient: Placement) -> None:
    """Replace the forward method of a module whose parameters are DTensors. The new method computes with plain tensors:
    this rank's shards of the parameters.

    ``replicated_gradient`` is the placement of the gradients of replicated parameters. It is ``Partial()`` if the
    gradient is the sum of what the ranks compute, and ``Replicate()`` if each rank computes the whole gradient.
    """
    caller = nn.Module()
    caller.module, caller.forward = module, module.forward

    def forward(*inputs: Any) -> Any:
        parts = {}
        for name, parameter in module.named_parameters():
            assert isinstance(parameter, DTensor)
            placements = [replicated_gradient if p.is_replicate() else p for p in parameter.placements]
            parts[f"module.{name}"] = parameter.to_local(grad_placements=placements)  # differentiable
        return functional_call(caller, parts, inputs)

    replace_forward(module, forward)


def reduce_partial(part: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """Sum ``part`` over the ranks of ``mesh``. Return the whole sum, or this rank's shard, as ``placement`` requests.
    Collective."""
    return DTensor.from_local(part, mesh, [Partial()]).redistribute(placements=[placement]).to_local()


# Values for a model that was constructed and parallelized on the meta device, where tensors have only shapes.
#
# So a rank never has more of the model than its shards and one whole parameter. So a model may be larger than a
# device, or than the memory of a node.


@torch.no_grad()
def materialize(parts: Sequence[GPT], weights: Weights, device: torch.device, home: torch.device | None = None) -> None:
    """Allocate memory for a model that is on the meta device, and set the values of its parameters. Not collective.

    Parameters are set one after another: ``weights`` returns the whole parameter, and this rank's shard is copied.

    Args:
        parts: the model, or its pipeline stages, which may share modules.
        weights: returns the values of a whole parameter, from its name and shape; the same values on all ranks.
        device: device that computes with the parameters.
        home: device that stores the parameters between steps: the CPU with CPU offload. None means ``device``.
    """
    for part in parts:
        part.to_empty(device=home or device)
        if home is not None and home != device:
            for name, buffer in list(part.named_buffers()):
                set_tensor(part, name, buffer.to(device))
    for part in parts:  # after all have memory: a shared module would lose its values if it got memory again
        for name, tensor in part.state_dict(keep_vars=True).items():
            copy_shard(tensor, weights(name, tensor.shape))  # a call, so that no two whole tensors are in memory
        part.reset_buffers()


def copy_shard(tensor: Tensor, whole: Tensor) -> None:
    """Copy ``whole`` into ``tensor``; into a DTensor only this rank's shard of it."""
    own = local_tensor(tensor)
    if isinstance(tensor, DTensor) and own.numel():
        (chunk,) = tensor.__create_chunk_list__()  # the function that checkpoints use
        for dimension, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            whole = whole.narrow(dimension, start, length)
    if own.numel():
        own.copy_(whole)


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of an element in bytes -> integer type of this size."""

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Drift:
    """Finding of a ``ReplicaCheck``: the ranks whose parameters differ from those of other ranks with the same
    shards."""

    ranks: Ranks
    """Numbers of the ranks that differ, ascending."""
    is_certain: bool
    """True if the ranks differ from a majority of the replicas; False if the replicas only differ from each other."""


class ReplicaCheck:
    """Compares the parameters of a module between ranks that have the same shards (replicas). All ranks create it
    together."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self._module, self._world = module, world
        found: dict[str, Ranks] = defaultdict(tuple)
        for rank, keys in enumerate(world.gather([shard_key(n, p) for n, p in module.named_parameters()])):
            for key in keys:
                found[key] += (rank,)
        self._ranks_of = found
        """Name of a shard -> ranks that have it."""
        self._groups = sorted({ranks for ranks in found.values() if len(ranks) > 1})
        """Groups of ranks that have the same shards, in an order that is the same on all ranks."""

    def find_drift(self) -> Drift | None:
        """Compare the parameters of all replicas, bit by bit. Return the ranks that differ; None if all are equal.

        Collective. Waits for the device.
        """
        if not self._groups:  # every parameter is on one rank only
            return None
        place = {ranks: number for number, ranks in enumerate(self._groups)}
        sums_RG = torch.zeros(self._world.size, len(place), dtype=torch.int64, device=self._world.device)
        for name, parameter in self._module.named_parameters():
            ranks = self._ranks_of[shard_key(name, parameter)]
            if ranks in place:
                # The sum of the bits, each element taken as an integer, is exact in any order, since it wraps around.
                # A single element that differs, by however little, changes it.
                flat = local_tensor(parameter).detach().reshape(-1)
                bits = flat.view(INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
                sums_RG[self._world.rank, place[ranks]] += bits.to(sums_RG.device)
        # Each rank has filled only its own row, so the sum has the rows of all ranks.
        return find_odd(self._groups, self._world.all_reduce(sums_RG).tolist())


def shard_key(name: str, parameter: Tensor) -> str:
    """Return a name of this rank's shard of the parameter ``name``. Ranks with the same shard get the same name."""
    if not isinstance(parameter, DTensor):
        return name
    mesh, place = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert place is not None, "a rank outside of the mesh of its parameter"
    sharded = [
        f"{placement} {place[axis]}/{mesh.size(axis)}"
        for axis, placement in enumerate(parameter.placements)
        if not placement.is_replicate()
    ]
    return "; ".join([name, *sharded])


def find_odd(groups: Sequence[Ranks], sums_RG: Sequence[Sequence[int]]) -> Drift | None:
    """Return the ranks whose checksums differ from those of other ranks with the same shards; None if there are none.

    If the checksums of a group differ, the most frequent checksum is taken as right. The result then has the ranks
    with other checksums. If at most half of the ranks agree, the result has all ranks of the group.

    Args:
        groups: for each group, the ranks that have the same shards.
        sums_RG: ``sums_RG[rank][g]`` is the checksum of a rank in group g. It is ignored if the rank is not in the
            group.
    """
    odd: set[int] = set()
    is_certain = True
    for number, ranks in enumerate(groups):
        sums = {rank: sums_RG[rank][number] for rank in ranks}
        (common, votes), *others = Counter(sums.values()).most_common()
        if not others:
            continue
        has_majority = 2 * votes > len(ranks)
        is_certain = is_certain and has_majority
        odd |= {rank for rank, value in sums.items() if value != common or not has_majority}
    return Drift(tuple(sorted(odd)), is_certain) if odd else None
