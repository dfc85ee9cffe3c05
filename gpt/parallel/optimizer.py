"""Optimizers of the engines: AdamW, schedule-free AdamW, Muon, or a class of the user; parameters may be sharded."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import _muon

from gpt.components import build_custom_optimizer
from gpt.config import OptimConfig
from gpt.config.optim import ADAMW, MUON, SCHEDULE_FREE, muon_options
from gpt.parallel.distributed import WORLD, World, waiting
from gpt.parallel.modules import local_tensor

# AdamW (arXiv 1711.05101) and its skipped steps.


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which computes its step on the local shards of DTensors. Its state consists of DTensors.

    Local shards suffice, since the step is elementwise and gradients are sharded like their parameters. On DTensors,
    torch would derive a sharding for each parameter: 2 to 3 ms of host time per parameter in the first step. It would
    also hash all parameters in each step, and refuse a list that mixes DTensors and plain tensors.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        has_complex = super()._init_group(group, *lists)  # fills the lists: parameters, gradients, state
        lists[1][:] = map(sharded_alike, *lists[:2])
        for tensors in lists:
            tensors[:] = [local_tensor(tensor) for tensor in tensors]
        return has_complex


def sharded_alike(p: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient ``grad`` of ``p`` with the placements of ``p``. If ``grad`` is a partial sum, reduce it over
    the ranks."""
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        return grad.redistribute(placements=p.placements)
    return grad


@contextmanager
def skipping(optimizer: torch.optim.Optimizer, skip: Tensor) -> Iterator[None]:
    """Return a context in which a step of ``optimizer`` changes nothing if ``skip``, a bool tensor (), is true.

    AdamW and Muon read ``skip`` on the device. With schedule-free AdamW, or an optimizer of the user, the host waits
    for ``skip`` before the step. With CPU offload the host waits for ``skip`` at the begin of the context: ``skip`` is
    then copied to the host, and torch would read it before the copy is complete.
    """
    optimizer.found_inf = skip.float().to(optimizer.param_groups[0]["params"][0].device)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


# Muon (https://kellerjordan.github.io/posts/muon; arXiv 2502.16982): the momentum of each hidden matrix, orthogonalized
# by Newton-Schulz iterations.
#
# The momentum is sharded as its matrix. The iterations need the whole matrix. So for each sharded matrix one of the
# ranks with a shard is the owner: it receives the parts, orthogonalizes, and returns to each rank its part of the
# result. All matrices of a step travel in one all-to-all there and one back, in the bf16 in which the iterations begin.
# A rank receives 4 bytes for each element that it stores. With an all-gather it would receive 2 bytes for each element
# of the model, and every rank would do all iterations.
#
# Shapes: R rows and C columns of a matrix, or of a part of one; E experts.


class Matrix(NamedTuple):
    """Identity of a matrix of the model."""

    parameter: str
    """Name of the parameter that is, or contains, the matrix."""
    expert: int
    """Index in a parameter of stacked experts; 0 for other parameters."""


class Part(NamedTuple):
    """The part of a matrix that a rank stores."""

    matrix: Matrix
    whole: tuple[int, int]
    """Numbers of rows and columns of the matrix."""
    place: tuple[slice, slice]
    """Range of rows and range of columns of the part in the matrix."""
    shape: tuple[int, int]
    """Numbers of rows and columns of the part."""
    rank: int
    """Rank that stores the part."""
    owner: int
    """Rank that receives all parts of the matrix and orthogonalizes the matrix."""

    @property
    def elements(self) -> int:
        """Number of elements of the part."""
        return self.shape[0] * self.shape[1]


Chunk = tuple[str, Sequence[int], Sequence[int], Sequence[int]]
"""Shard of a parameter on one rank: name and shape of the parameter, offsets and sizes of the shard."""


def share_out(chunks_of_ranks: Sequence[Sequence[Chunk]]) -> list[Part]:
    """Choose for each sharded matrix the rank that orthogonalizes it. Return the parts of all matrices on all ranks.

    ``chunks_of_ranks[rank]`` has the shards of a rank. The result is the same on every rank. If several replicas have a
    matrix, each replica orthogonalizes its own copy. The matrices are assigned one after another. Each is assigned to
    that rank with a part of it to which the fewest elements were assigned before.
    """
    holders: dict[tuple[Matrix, tuple[int, ...]], dict[tuple[int, ...], list[int]]]
    holders = defaultdict(lambda: defaultdict(list))
    for rank, chunks in enumerate(chunks_of_ranks):
        for name, shape, offsets, sizes in chunks:
            for expert in range(offsets[0], offsets[0] + sizes[0]) if len(shape) > 2 else (0,):
                holders[Matrix(name, expert), tuple(shape[-2:])][*offsets[-2:], *sizes[-2:]].append(rank)
    load: dict[int, int] = defaultdict(int)
    parts = []
    for (matrix, (height, width)), ranks_of in sorted(holders.items()):
        for team in zip(*ranks_of.values(), strict=True):
            owner = min(team, key=lambda rank: (load[rank], rank))
            load[owner] += height * width
            for rank, (row, column, rows, columns) in zip(team, ranks_of, strict=True):
                place = slice(row, row + rows), slice(column, column + columns)
                parts.append(Part(matrix, (height, width), place, (rows, columns), rank, owner))
    return parts


class Exchange:
    """Orthogonalizes sharded matrices. The owner of a matrix receives all its parts from other ranks, orthogonalizes
    the matrix, and sends the parts back. ``parts`` is a result of ``share_out``. A call is collective."""

    def __init__(self, parts: Sequence[Part], world: World) -> None:
        self._sent = sorted((p for p in parts if p.rank == world.rank), key=lambda p: p.owner)
        self._received = sorted((p for p in parts if p.owner == world.rank), key=lambda p: p.rank)
        ranks = range(world.size)
        self._there = [sum(p.elements for p in self._sent if p.owner == rank) for rank in ranks]
        self._back = [sum(p.elements for p in self._received if p.rank == rank) for rank in ranks]
        self._nothing = torch.empty(0, dtype=torch.bfloat16, device=world.device)

    def __call__(self, updates: dict[Matrix, Tensor], newton_schulz: Callable[[Tensor], Tensor]) -> None:
        """Orthogonalize the matrices of which this rank has parts, in place.

        Args:
            updates: matrix -> this rank's part of it, (R, C) bf16. The entries of sharded matrices are removed.
            newton_schulz: returns a whole matrix orthogonalized.
        """
        sent = [updates.pop(part.matrix) for part in self._sent]
        wholes = {part.matrix: self._nothing.new_empty(part.whole) for part in self._received}
        received = [wholes[part.matrix][part.place] for part in self._received]
        self._send(sent, received, self._there, self._back)
        for whole in wholes.values():
            whole.copy_(newton_schulz(whole))
        self._send(received, sent, self._back, self._there)

    def _send(self, given: Sequence[Tensor], taken: Sequence[Tensor], there: list[int], back: list[int]) -> None:
        """Send the tensors ``given`` to other ranks, and fill the tensors ``taken`` with those that arrive. Collective.

        Args:
            given: tensors to send, in the order of the ranks that receive them.
            taken: tensors to fill, in the order of the ranks that send them.
            there: number of elements that this rank sends to each rank.
            back: number of elements that this rank receives from each rank.
        """
        collectives, group = torch.ops._c10d_functional, dist.group.WORLD
        assert group is not None
        flat = torch.cat([self._nothing, *(tensor.reshape(-1) for tensor in given)])
        with waiting(WORLD):
            flat = collectives.wait_tensor(collectives.all_to_all_single(flat, back, there, group.group_name))
        for tensor, values in zip(taken, flat.split([tensor.numel() for tensor in taken]), strict=True):
            tensor.copy_(values.view_as(tensor))


class Muon(AdamW):
    """Optimizer Muon for the matrices of the blocks, and AdamW for all other parameters.

    A step has the same result as a step of ``torch.optim.Muon`` on whole matrices. Stacked experts, (E, R, C), are
    orthogonalized one by one.

    Args:
        groups: parameter groups of torch. A group with the key ``muon`` is updated by Muon, any other group by AdamW.
        names: each parameter that Muon updates -> its name, the same on all ranks.
        config: config of the optimizer.
        world: all ranks, which construct the optimizer and make its steps together.
        adamw: arguments of torch's AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: Mapping[nn.Parameter, str],
        config: OptimConfig,
        world: World,
        **adamw: Any,
    ) -> None:
        super().__init__(groups, **adamw)
        self._options = muon_options(config)
        self._first = {p: Matrix(name, 0) for p, name in names.items()}
        """Parameter -> the first of its matrices on this rank. Of a parameter of stacked experts, the rank may have
        only some experts."""
        chunks: list[Chunk] = []
        for p, name in names.items():
            # A shard of whole matrices, or of none, needs no exchange.
            if isinstance(p, DTensor) and p.to_local().numel() and p.to_local().shape[-2:] != p.shape[-2:]:
                (chunk,) = p.__create_chunk_list__()  # the function that checkpoints use
                chunks.append((name, list(p.shape), list(chunk.offsets), list(chunk.sizes)))
                if p.dim() > 2:
                    self._first[p] = Matrix(name, chunk.offsets[0])
        parts = share_out(world.gather(chunks))
        self._exchange = Exchange(parts, world) if parts else None
        # A hook, since a step of the superclass inside of another step would call the hooks of a step twice.
        self.register_step_pre_hook(lambda *_: self._step_matrices())

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        return False if "muon" in group else super()._init_group(group, *lists)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW expects a count of steps in the state of each parameter; the states of matrices have none.
        counted = {p: values for p, values in state["state"].items() if "step" in values}
        super().__setstate__(state | {"state": counted})
        self.state = state["state"]

    @torch.no_grad()
    def _step_matrices(self) -> None:
        found = getattr(self, "found_inf", None)
        if found is None:
            found = local_tensor(self.param_groups[0]["params"][0]).new_zeros(())
        skip = found.bool()
        moved = [
            (p, self._momentum(p, skip), group)
            for group in self.param_groups
            for p in (group["params"] if "muon" in group else ())
        ]
        updates: dict[Matrix, Tensor] = {}
        for p, update, _ in moved:
            name, first = self._first[p]
            matrices = update.unbind() if update.dim() > 2 else [update]
            updates |= {Matrix(name, first + number): matrix for number, matrix in enumerate(matrices)}
        if self._exchange is not None:  # also on ranks that have no matrices
            self._exchange(updates, self._newton_schulz)
        for matrix in updates.values():
            matrix.copy_(self._newton_schulz(matrix))
        for p, direction, group in moved:
            self._apply(p, direction, group, skip)

    def _momentum(self, p: nn.Parameter, skip: Tensor) -> Tensor:
        """Update the momentum of this rank's shard of ``p``, unless ``skip`` is true. Return the direction of the
        update before it is orthogonalized, in bf16."""
        state, options = self.state[p], self._options
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = local_tensor(state["momentum_buffer"])
        # A parameter that took no part in the step counts as zeros: other ranks may wait for its part.
        grad = torch.zeros_like(momentum) if p.grad is None else local_tensor(sharded_alike(p, p.grad))
        following = momentum.lerp(grad, 1 - options["momentum"])
        update = grad.lerp(following, options["momentum"]) if options["nesterov"] else following
        momentum.copy_(torch.where(skip, momentum, following))
        return update.bfloat16()

    def _newton_schulz(self, matrix: Tensor) -> Tensor:
        """Return a whole matrix, (R, C) bf16, orthogonalized by Newton-Schulz iterations. ``matrix`` is overwritten."""
        coefficients, steps = self._options["ns_coefficients"], self._options["ns_steps"]
        return _muon._zeropower_via_newtonschulz(matrix, coefficients, steps, _muon.EPS)

    def _apply(self, p: nn.Parameter, direction: Tensor, group: dict[str, Any], skip: Tensor) -> None:
        """Update this rank's shard of ``p`` by weight decay and the orthogonalized ``direction``, unless ``skip`` is
        true. ``group`` is the parameter group of ``p``."""
        weight, lr = local_tensor(p), group["lr"]
        rate = _muon._adjust_lr(lr, self._options["adjust_lr_fn"], p.shape[-2:])
        stepped = weight.mul(1 - lr * group["weight_decay"]).add_(direction, alpha=-rate)
        weight.copy_(torch.where(skip, weight, stepped))


# Schedule-free AdamW (arXiv 2405.15682), by the package schedulefree. Its parameters are the weights at which gradients
# are computed, or, after ``eval()``, the averaged weights.


@contextmanager
def on_shards(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Return a context in which the parameters, gradients and states of ``optimizer`` are plain tensors: this rank's
    shards of DTensors.

    State is created for parameters that have none. Changes of the parameter groups, such as counts, are kept.
    """
    groups, states = optimizer.param_groups, optimizer.state
    shards: dict[Tensor, Tensor] = {}
    for p in (p for group in groups for p in group["params"]):
        if not states[p]:
            states[p] = {"z": p.detach().clone(), "exp_avg_sq": torch.zeros_like(p)}
        shards[p] = local_tensor(p.detach())
        shards[p].grad = None if p.grad is None else local_tensor(sharded_alike(p, p.grad))
    optimizer.param_groups = [{**group, "params": [shards[p] for p in group["params"]]} for group in groups]
    local = {shards[p]: {key: local_tensor(tensor) for key, tensor in states[p].items()} for p in shards}
    optimizer.state = defaultdict(dict, local)
    try:
        yield
    finally:
        for group, stepped in zip(groups, optimizer.param_groups, strict=True):
            group.update({key: value for key, value in stepped.items() if key != "params"})
        optimizer.param_groups, optimizer.state = groups, states


def build_schedule_free(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer schedule-free AdamW (package ``schedulefree``) over parameter groups of torch. The parameters
    may be DTensors. The caller sets the learning rate of each step, so the warm-up of the package is not used."""
    from schedulefree import AdamWScheduleFree  # type: ignore[import-untyped, unused-ignore]

    # Without the hooks of a step, which the step around it calls.
    step_all = inspect.unwrap(AdamWScheduleFree.step)

    class ScheduleFreeAdamW(AdamWScheduleFree):  # type: ignore[misc]
        def step(self, closure: Any = None) -> None:
            skip = getattr(self, "found_inf", None)
            if skip is None or not skip.item():
                with torch.no_grad(), on_shards(self):
                    step_all(self, closure)

        def eval(self) -> None:
            with on_shards(self):
                super().eval()

        def train(self) -> None:
            with on_shards(self):
                super().train()

    return ScheduleFreeAdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


# The optimizer that a config names.


def build_optimizer(
    module: nn.Module,
    config: OptimConfig,
    kind: type[torch.optim.AdamW] = AdamW,
    fused: bool = False,
    world: World | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer that ``config`` names over the trained parameters of ``module``. Collective with Muon.

    Only matrices have weight decay, not biases and norms.

    Args:
        module: the module whose parameters the optimizer updates.
        config: config of the optimizer.
        kind: class of the optimizer if ``config`` names AdamW; not used otherwise.
        fused: True to use a fused step also on devices for which it is not the default.
        world: all ranks; needed by Muon only, else None.
    """
    named = {p: name for name, p in module.named_parameters() if p.requires_grad}
    is_muon = config.optimizer == MUON
    hidden = {p: name for p, name in named.items() if is_muon and "blocks." in name and p.dim() in (2, 3)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in named if p.dim() >= 2 and p not in hidden], "weight_decay": config.weight_decay},
        {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0},
        {"params": [*hidden], "weight_decay": config.weight_decay, "muon": True},
    ]
    groups = [group for group in groups if group["params"]]
    fused = fused or all(p.device.type in ("cuda", "cpu") for p in named)
    adamw: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": fused}
    if is_muon:
        assert world is not None
        return Muon(groups, hidden, config, world, **adamw)
    if config.optimizer == SCHEDULE_FREE:
        return build_schedule_free(groups, config)
    if config.optimizer != ADAMW:
        return build_custom_optimizer(config, groups)
    return kind(groups, **adamw)
