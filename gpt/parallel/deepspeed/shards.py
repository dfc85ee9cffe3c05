"""What this rank holds of each parameter under ZeRO: gradients read from it, weights and moments put into it.

Owns the places. DeepSpeed lays the parameters of a group end to end and gives each rank a piece of that (stages 1 and
2), or a piece of each parameter (stage 3), padded at the end; fp32 masters and moments lie flat beside them. In stage 0
everything is where torch has it. Reaches into DeepSpeed where its own functions for this
(``deepspeed.utils.safe_set_*``) stop: they know no moments before the first step, and no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The keys of AdamW's state that are as large as the parameter."""


class Shards:
    """The training state of an engine of DeepSpeed, by the parameters' names in the whole model."""

    def __init__(self, ds: Any, parameters: dict[str, nn.Parameter]) -> None:
        self.ds, self.parameters = ds, parameters
        self.optimizer = ds.optimizer
        self.stage = ds.zero_optimization_stage()

    def holds(self, name: str) -> bool:
        """Whether this rank has a piece of the parameter's state."""
        return self.stage in (0, 3) or self.parameters[name]._hp_mapping is not None  # type: ignore[attr-defined]

    @torch.no_grad()
    def set_masters(self, whole: Callable[[str], Tensor]) -> None:
        """Take the weights from ``whole``, which gives a parameter by its name: fp32, all of it.

        Computed with is what they were until ``update_from_masters``.
        """
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # all parameters back into their pieces
        for name, parameter in self.parameters.items():
            if self.holds(name):
                self._set(parameter, whole(name), None)

    @torch.no_grad()
    def set_moments(self, whole: Callable[[str, str], Tensor], steps: int) -> None:
        """Take AdamW's moments from ``whole``, which gives one by the parameter's name and its key, after ``steps``."""
        self.create_moments(steps)
        for name, parameter in self.parameters.items():
            if self.holds(name):
                for key in MOMENTS:
                    self._set(parameter, whole(name, key), key)

    def create_moments(self, steps: int) -> None:
        """Make the moments as AdamW does in its first step, all of them zero."""
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
        """Put this rank's piece of ``whole`` into the masters, or into the moment ``key``."""
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
        """Compute with what the masters now are. Collective."""
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
    """This rank's piece of the gradient of the mean loss, between backward pass and step; None where it has none."""
    if hasattr(parameter, "ds_id"):
        return parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter)
    if not hasattr(parameter, "_hp_mapping"):
        return parameter.grad
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    piece = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    address = mapping.lp_fragment_address
    if piece.numel() == parameter.numel():  # the bf16 optimizer sums whole gradients, of which a part counts here
        piece = piece[address.start : address.start + address.numel]
    return piece
