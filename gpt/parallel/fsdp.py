"""FSDP2 (``fully_shard``): parameters, gradients and optimizer state sharded over the ranks (arXiv 2304.11277).

With several replicas (HSDP), each one is sharded, and gradients are averaged between replicas.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from gpt.config import TrainConfig
from gpt.model.gpt import GPT
from gpt.model.loss import COMPUTE_DTYPES
from gpt.parallel.timeline import waiting
from gpt.topology.fsdp_units import fsdp_units


def apply_fsdp(model: GPT, mesh: DeviceMesh, config: TrainConfig) -> None:
    """Shard every parameter of ``model``, or a pipeline stage of one, over ``mesh``, in groups that are all-gathered
    together.

    After torchtitan (torchtitan/distributed/fsdp.py): the embedding, each block or several (``fsdp_units``), and norm
    with output matrix. The last unit of blocks, norm and output matrix stay gathered between forward and backward
    pass, which begins with them; the embedding needs no weight there. A tied matrix is used at both ends, so it
    stays gathered in between, in the group of the model, which holds what is in no other.
    """
    # torch 2.13 warns against writing into the logits, which are a view. The loss does not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    reshard = config.parallel.reshard_after_forward
    blocks = iter(model.blocks)
    units = [list(islice(blocks, count)) for count in fsdp_units(config, len(model.blocks))]
    tied = model.config.tie_embeddings
    if not tied and hasattr(model, "token_embedding"):
        entry = [module for module in (model.token_embedding, model.position) if module is not None]
        fsdp_shard_modules(entry, mesh, config, reshard)
        entry[0].set_unshard_in_backward(False)  # type: ignore[operator]
    for unit in units:
        fsdp_shard_modules(unit, mesh, config, reshard and unit is not units[-1])
    if not tied and hasattr(model, "head"):
        fsdp_shard_modules([model.norm, model.head], mesh, config, reshard=False)
    fsdp_shard_modules([model], mesh, config, reshard=False)


def fsdp_shard_modules(
    modules: Sequence[nn.Module], mesh: DeviceMesh, config: TrainConfig, reshard: bool, dimension: int = 0
) -> None:
    """Shard the parameters of modules that are not sharded yet along a dimension; they are all-gathered together.

    Args:
        modules: called one after another in a forward pass.
        mesh: the ranks to shard over.
        config: of the run.
        reshard: free them after the forward pass, and all-gather them again for the backward pass.
        dimension: along which to shard.
    """
    half = config.precision.is_half
    # Only copies from pinned memory overlap with computing on the GPU.
    host = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    fully_shard(
        list(modules) if len(modules) > 1 else modules[0],
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(COMPUTE_DTYPES[config.precision], torch.float32)
        if half
        else MixedPrecisionPolicy(),
        offload_policy=host if config.parallel.cpu_offload else OffloadPolicy(),
        reshard_after_forward=reshard,
        shard_placement_fn=lambda _: Shard(dimension),
    )
    record_waits(modules[0])


def reshard(module: nn.Module) -> None:
    """Free the parameters that FSDP all-gathered for a forward pass without a backward pass.

    Gathered ones stand in the place of the sharded ones until the next backward pass. Whoever walks over the parameters
    meanwhile, as a comparison of replicas does, would see tensors of other shapes, and without gradients.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


COLLECTIVE = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")
"""Methods of FSDP's groups of parameters that all-gather, reduce-scatter, or wait for one or the other."""


def record_waits(module: nn.Module) -> None:
    """Have the timeline of a step see where FSDP communicates, with the copies into and out of its buffers.

    A CPU waits in the collectives themselves. On a GPU they run beside what computes, and only the waits take time
    there.
    """
    assert isinstance(module, FSDPModule)
    state = module._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # its name until torch 2.11
    for group in found:
        for name in COLLECTIVE if group is not None else ():
            setattr(group, name, partial(call_waiting, getattr(group, name)))


def call_waiting(method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a method that waits for the ranks of FSDP."""
    with waiting("fsdp"):
        return method(*args, **options)


def prefetch_forward(groups: Sequence[Sequence[nn.Module]]) -> None:
    """Have each of the groups of sharded modules, in the order of the forward pass, all-gather the one after it.

    FSDP2 leaves that to the host, which runs ahead of the device; a host that waits inside a block does not.
    """
    for here, following in pairwise(groups):
        assert isinstance(here[0], FSDPModule)
        here[0].set_modules_to_forward_prefetch([module for module in following if isinstance(module, FSDPModule)])
