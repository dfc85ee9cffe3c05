"""A rank's shards under ZeRO: gradients read from them, fp32 master weights and moments written into them.

Owns their location. DeepSpeed flattens the parameters of a group and shards that (stages 1 and 2), or shards each
parameter (stage 3), padded at the end; fp32 masters and moments are flat tensors beside them. In stage 0 everything is
where torch has it. Reaches into DeepSpeed where its own functions for this
(``deepspeed.utils.safe_set_*``) stop: they know no moments before the first step, and no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's state that have the size of the parameter."""


class Shards:
    """The sharded training state of a DeepSpeed engine, by parameter names in the whole model."""

    def __init__(self, ds: Any, parameters: dict[str, nn.Parameter]) -> None:
        self.ds, self.parameters = ds, parameters
        self.optimizer = ds.optimizer
        self.stage = ds.zero_optimization_stage()

    def holds(self, name: str) -> bool:
        """True where this rank has a shard of the parameter's state."""
        return self.stage in (0, 3) or self.parameters[name]._hp_mapping is not None  # type: ignore[attr-defined]

    @torch.no_grad()
    def set_masters(self, whole: Callable[[str], Tensor]) -> None:
        """Set the master weights from ``whole``, which returns a whole fp32 parameter by name.

        The weights that are computed with change only with ``update_from_masters``.
        """
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # re-partitions gathered parameters
        for name, parameter in self.parameters.items():
            if self.holds(name):
                self._set(parameter, whole(name), None)

    @torch.no_grad()
    def set_moments(self, whole: Callable[[str, str], Tensor], steps: int) -> None:
        """Set AdamW's moments after ``steps`` from ``whole``, which returns one by parameter name and key."""
        self.create_moments(steps)
        for name, parameter in self.parameters.items():
            if self.holds(name):
                for key in MOMENTS:
                    self._set(parameter, whole(name, key), key)

    def create_moments(self, steps: int) -> None:
        """Create zero moments, as AdamW does in its first step."""
        base = self.ds.basic_optimizer
        flat = self.optimizer.fp32_partitioned_groups_flat if self.stage == 3 else None
        for group in base.param_groups:
            counted_there = group.get("fused") or group.get("capturable")
            for tensor in group["params"] if flat is None else flat:
                where = tensor.device if counted_there else torch.device("cpu")
                count = torch.tensor(float(steps), dtype=torch.float32, device=where)
                base.state[tensor] = {"step": count} | {key: torch.zeros_like(tensor) for key in MOMENTS}
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, whole: Tensor, key: str | None) -> None:
        """Copy this rank's shard of ``whole`` into the masters, or into the moment ``key``."""
        if self.stage == 3:
            size, rank = parameter.ds_tensor.numel(), self.optimizer._get_param_partition_rank(parameter)
            piece = whole.flatten()[rank * size : (rank + 1) * size]
            piece = F.pad(piece, (0, size - piece.numel()))
            self.optimizer.set_local_hp_param(piece, parameter, key)
        elif self.stage:
            parameter.set_full_hp_param(whole, key)
        elif key is None:
            parameter.copy_(whole)
        else:
            self.ds.basic_optimizer.state[parameter][key].copy_(whole)

    @torch.no_grad()
    def update_from_masters(self) -> None:
        """Update the weights that are computed with from the masters. Collective."""
        if self.stage == 3:
            for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self.optimizer.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
            self.optimizer.checkpoint_event_epilogue()
        elif self.stage:
            self.optimizer.update_lp_params()


def local_gradient(parameter: Any) -> Tensor | None:
    """Return this rank's shard of a gradient, between backward pass and step; None where it has none."""
    if hasattr(parameter, "ds_id"):
        return parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter)
    if not hasattr(parameter, "_hp_mapping"):
        return parameter.grad
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    piece = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    address = mapping.lp_fragment_address
    if piece.numel() == parameter.numel():  # the bf16 optimizer keeps whole gradients
        piece = piece[address.start : address.start + address.numel]
    return piece
