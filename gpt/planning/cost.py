"""Estimate of the time of a step: compute, pipeline bubble, and exposed communication by mesh axis. Imports no torch.

The estimate ranks layouts. It does not model kernels and stragglers. Its assumptions:

- compute: FLOPs over the attained rate of a rank, for any shapes; or the measured rates of products of these shapes, if
  available. The slowest pipeline stage sets the pace.
- overlap: DDP's all-reduce and the reduce-scatter of ZeRO-1 and FSDP overlap with the last backward pass. FSDP's
  all-gathers overlap with their pass, and the transfers of ring attention with attention. All other communication is
  exposed: that of tensor, context and expert parallelism inside a layer, sends between pipeline stages, and the
  all-reduce of gradients after the last micro-batch.

gpt/planning/__init__.py has the cost of a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from gpt.accounting import (
    BF16,
    FP32,
    expert_rows,
    forward_flops,
    recomputed_flops_per_token,
    training_flops_per_token,
)
from gpt.config import AttentionBackend, CpMethod, Ffn, Recompute, Schedule, Strategy, TrainConfig
from gpt.planning import Group, Host, Machine, group, strided_group
from gpt.planning.memory import reduced_width
from gpt.planning.rank_shards import ParameterShards, elements, parameter_shards
from gpt.topology import BUCKET_BYTES, Batch, ParallelDims, fsdp_units
from gpt.topology.schedules import StageLayers, bubble_fraction, local_stages, rank_stages
from launch.runs.measured import MatmulRates

BACKWARD = 2 / 3
"""Share of the time of computing that the backward pass takes, 0 to 1: it has two matrix products for each one of the
forward pass."""
DDP_BUCKET_BYTES = 25 * 2**20
"""Size of DDP's gradient buckets in bytes. The reduction of the last bucket does not overlap with the backward pass."""
STEP_BYTES = 7 * FP32
"""Bytes that AdamW reads and writes for each element in a step: it reads weight, gradient and two moments, and writes
all but the gradient."""


@dataclass(frozen=True)
class Estimate:
    """Estimated time of one step, by cause."""

    compute_s: float
    """Seconds of computing of the slowest pipeline rank, with recomputation."""
    bubble_s: float
    """Seconds for which the slowest pipeline rank waits for the stages of other ranks."""
    communication_s: dict[str, float]
    """Axis of the mesh -> seconds of communication that no computing overlaps. ``world`` is for sums of a few numbers
    over all ranks, ``host`` for copies from and to host memory."""
    tokens: int
    """Number of tokens of the global batch."""

    @property
    def step_s(self) -> float:
        """Seconds of the whole step: the sum of all causes."""
        return self.compute_s + self.bubble_s + sum(self.communication_s.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all ranks."""
        return self.tokens / self.step_s


def estimate(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine) -> Estimate:
    """Return the estimated time of a step on ``machine``. It is the estimate of the pipeline rank with the longest
    step."""
    different: dict[object, RankStep] = {}
    for rank in range(dims.pp):  # inner stages with equally many blocks take equally long
        step = RankStep(config, dims, batch, machine, rank)
        different.setdefault(tuple((len(one.blocks), one.first, one.last) for one in step.stages), step)
    return max((step.estimate() for step in different.values()), key=lambda found: found.step_s)


@dataclass(frozen=True)
class RankStep:
    """Estimate of the step of one pipeline rank. The methods on communication return the seconds that no computing
    overlaps ("exposed")."""

    config: TrainConfig
    dims: ParallelDims
    batch: Batch
    machine: Machine
    rank: int = 0

    @cached_property
    def stages(self) -> tuple[StageLayers, ...]:
        """Pipeline stages of the rank."""
        return rank_stages(self.config, self.rank)

    @cached_property
    def shards(self) -> ParameterShards:
        """Parameter shards of the rank."""
        return parameter_shards(self.config.model, self.dims, self.stages)

    @property
    def layers(self) -> int:
        """Number of blocks of the rank."""
        return sum(len(stage.blocks) for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.batch.micro * self.config.model.block_size // self.dims.cp

    @property
    def width(self) -> int:
        """Number of bytes of an element of the result of a matrix product."""
        return BF16 if self.config.precision.is_half else FP32

    @property
    def hidden_width(self) -> int:
        """Number of bytes of an element of hidden states.

        With FSDP, which uses no autocast, it is ``width``. With every other strategy, hidden states are fp32: 4 bytes.
        """
        return self.width if self.config.parallel.strategy is Strategy.fsdp else FP32

    @property
    def forwards(self) -> int:
        """Number of forward passes of a block for each micro-batch: 2 with recomputation, which repeats the forward
        pass, else 1."""
        return 1 if self.config.recompute is Recompute.none else 2

    def ring(self, *names: str) -> Group:
        """Return the group of ranks along the neighboring mesh axes ``names``."""
        return group(self.dims, self.machine, names)

    def estimate(self) -> Estimate:
        """Return the estimated time of the step on this rank."""
        dims, count = self.dims, self.batch.accumulation
        after = self.per_step()
        inside = {name: count * seconds for name, seconds in self.per_micro_batch().items()}
        busy_s = count * self.compute_s + sum(inside.values())
        bubble, parallel = 0.0, self.config.parallel
        if dims.pp > 1:
            bubble = bubble_fraction(parallel.schedule, dims.pp, count, local_stages(parallel))
            inside["pp"] += self.tied_embedding()
        return Estimate(
            compute_s=count * self.compute_s,
            bubble_s=busy_s * bubble / (1 - bubble),
            communication_s={**after, **inside},
            tokens=self.batch.global_batch * self.config.model.block_size,
        )

    # Compute of one micro-batch, forward and backward.

    @cached_property
    def compute_s(self) -> float:
        """Seconds of computing of one micro-batch, forward and backward, in all stages of the rank."""
        model, flops = self.config.model, training_flops_per_token(self.config.model)
        of_blocks = (
            (flops.palm if model.attention is AttentionBackend.manual else flops.causal)
            - flops.logits
            + recomputed_flops_per_token(model, self.config.recompute)
        )
        logits = flops.logits if any(stage.last for stage in self.stages) else 0
        block_rate, logits_rate = self.product_rates()
        per_token = self.layers / model.n_layer * of_blocks / block_rate + logits / logits_rate
        return self.batch.micro * model.block_size * per_token / (self.dims.tp * self.dims.cp)

    def product_rates(self) -> tuple[float, float]:
        """Return two rates of computing in FLOP/s: that of a block, and that of the output matrix.

        The rate of a block is the harmonic mean over its matrix products, forward and backward, weighted by their
        FLOPs. The highest measured rate is assumed for three kinds of products: inside of attention, in the router, and
        in classes of the user. If no rates were measured, both rates are ``Machine.flops_per_s``.
        """
        rates, model, tp = self.machine.matmul, self.config.model, self.dims.tp
        if rates is None:
            return self.machine.flops_per_s, self.machine.flops_per_s
        flops, rows = forward_flops(model, 1), self.batch.micro * model.block_size / self.dims.cp
        logits_s = seconds_per_flop(rates, rows, model.padded_vocab / tp, model.n_embd)
        heads, keys = model.n_head * model.head_dim, model.kv_heads * model.head_dim
        widths = [heads, keys, keys, heads]
        projected = sum(width * seconds_per_flop(rates, rows, width / tp, model.n_embd) for width in widths)
        if model.ffn is Ffn.moe:  # the ranks of ep exchange the tokens of their experts
            rows *= self.dims.ep * model.n_expert_per_token / model.n_expert
        fed = seconds_per_flop(rates, rows, model.ffn_width / tp, model.n_embd)
        dense = fed if isinstance(model.ffn, Enum) else 1 / rates.best
        whole = (flops.palm if model.attention is AttentionBackend.manual else flops.causal) - flops.logits
        rest = (whole - flops.projections - flops.ffn) / rates.best
        return whole / (flops.projections * (projected / sum(widths)) + flops.ffn * dense + rest), 1 / logits_s

    # Per step: gradients and parameters, over data ranks and with the host.

    def per_step(self) -> dict[str, float]:
        """Return the exposed seconds per step of communication of gradients and parameters: ``dp`` over the
        data-parallel ranks, ``world`` over all ranks, ``host`` for copies from and to host memory."""
        parallel = self.config.parallel
        everyone = strided_group(self.machine, self.dims.data_ranks * self.dims.model_ranks, 1)
        is_whole = parallel.strategy is Strategy.ddp and self.dims.model_ranks * self.dims.ep == 1
        # All ranks sum a few numbers: metrics, and the norm of sharded gradients.
        agreeing = (1 if is_whole else 2) * everyone.agree()
        waits = {"dp": self.deepspeed() if parallel.strategy is Strategy.deepspeed else self.data_parallel()}
        if agreeing > 0:
            waits["world"] = agreeing
        if self.machine.host is not None and parallel.cpu_offload:
            waits["host"] = self.offload(self.machine.host)
        return waits

    @cached_property
    def trained(self) -> ParameterShards:
        """Shards of the parameters that are trained."""
        return self.shards.trained(self.config.model)

    def groups(self, *names: str, shards: ParameterShards | None = None) -> list[tuple[int, Group]]:
        """Return pairs (number of parameter elements, group of ranks). The ranks of the group shard these elements, or
        reduce their gradients. The group extends along the mesh axes ``names``.

        With expert parallelism there is a second pair for the experts, whose group is smaller. Only the parameters in
        ``shards`` count; None means all parameters of this rank.
        """
        found = self.shards if shards is None else shards
        dims, experts = self.dims, found.expert_elements if self.dims.ep > 1 else 0
        made = [(found.elements - experts, self.ring(*names))]
        if experts:
            ranks = (dims.data_ranks if "dp_replicate" in names else dims.dp_shard) * dims.cp // dims.ep
            made.append((experts, strided_group(self.machine, ranks, dims.ep * dims.tp)))
        return made

    def data_parallel(self) -> float:
        """Return the exposed seconds per step of communication of gradients and parameters, with ddp, zero1 or fsdp.

        ZeRO-1 (arXiv 1910.02054, section 7.2.1): gradients are reduce-scattered in the last backward pass; the last
        bucket overlaps with nothing. The parameters are all-gathered after the optimizer's step. A tensor is padded if
        the number of its rows is not a multiple of the number of ranks.
        """
        if self.dims.is_sharded:
            return self.fsdp()
        axes = ("dp_replicate", "dp_shard", "cp")
        ring = self.ring(*axes)
        if self.config.parallel.strategy is Strategy.zero1:
            size = FP32 * ring.ranks * self.trained.stored(ring.ranks)
            last = ring.reduce_scatter(min(BUCKET_BYTES, size))
            return max(last, ring.reduce_scatter(size) - BACKWARD * self.compute_s) + ring.all_gather(size)
        sums = sum(replicas.all_reduce(FP32 * count) for count, replicas in self.groups(*axes, shards=self.trained))
        if self.dims.pp > 1:
            return sums  # after the schedule, which runs the backward passes in an order of its own
        bucket = BUCKET_BYTES if self.dims.model_ranks * self.dims.ep > 1 else DDP_BUCKET_BYTES
        last = ring.all_reduce(min(bucket, FP32 * self.trained.elements))
        return max(last, sums - BACKWARD * self.compute_s)

    def fsdp(self) -> float:
        """Return the exposed seconds per step of FSDP's communication (arXiv 2304.11277, section 3).

        Parameters are all-gathered for every forward pass. With resharding, all units of blocks except the last are
        gathered again for the backward pass. Gradients are reduce-scattered in the last backward pass of a step, or
        with ``reduce_each_micro_batch`` in every backward pass. If there are several replicas, they all-reduce the
        gradients in the last backward pass.

        Two collectives overlap with no computation: the first all-gather of a forward pass, and the last reduction of a
        backward pass. Both transfer the embedding and the first unit of blocks. If the embedding is tied, they transfer
        the last norm, too (gpt/parallel/nd.py).
        """
        reduced = reduced_width(self.config)
        config, shards, width, count = self.config, self.shards, self.width, self.batch.accumulation
        rings, replicas = self.groups("dp_shard", "cp"), self.ring("dp_replicate")
        ring, units = rings[0][1], fsdp_units(config, shards.layers) or [1]
        # Each unit of blocks is one group of parameters. The parameters around the blocks are one group if tied,
        # otherwise two. The experts of each block are a group of their own.
        (blocks, outside), of_trained = (
            (
                [unit * elements(found.block) for unit in units],
                [elements(found.around)]
                if config.model.tie_embeddings
                else [elements(found.entry), elements(found.around) - elements(found.entry)],
            )
            for found in (shards, self.trained)
        )
        parts = [[*blocks, *outside], [1] * shards.layers]
        gathers = sum(in_pieces(r.all_gather, width * size, of) for (size, r), of in zip(rings, parts, strict=False))
        parts[0] = [*of_trained[0], *of_trained[1]]
        scatters = sum(
            in_pieces(r.reduce_scatter, reduced * size, of)
            for (size, r), of in zip(self.groups("dp_shard", "cp", shards=self.trained), parts, strict=False)
        )
        sums = scatters + replicas.all_reduce(reduced * self.trained.stored())
        ends = [blocks[0], outside[0]]
        first = in_pieces(ring.all_gather, width * sum(ends), ends)
        ends = [of_trained[0][0], of_trained[1][0]]
        last = in_pieces(ring.reduce_scatter, reduced * sum(ends), ends)
        again = 0.0
        freed = replace(shards, layers=max(0, shards.layers - units[-1]), around=())
        if config.parallel.reshard_after_forward and freed.layers:
            rings = self.groups("dp_shard", "cp", shards=freed)
            pieces = list(zip(rings, (blocks[:-1], [1] * freed.layers), strict=False))
            again = sum(in_pieces(r.all_gather, width * size, parts) for (size, r), parts in pieces)
        hidden = BACKWARD * self.compute_s
        forward = max(first, gathers - (1 - BACKWARD) * self.compute_s)
        backward = max(0.0, again - hidden)
        if config.parallel.reduce_each_micro_batch:
            backward = max(last, again + scatters - hidden)
        return count * forward + (count - 1) * backward + max(last, again + sums - hidden)

    def deepspeed(self) -> float:
        """Return the exposed seconds per step of communication of gradients and parameters with DeepSpeed's ZeRO."""
        stage, shards, width, count = self.config.parallel.zero_stage, self.shards, self.width, self.batch.accumulation
        ring = self.ring("dp_replicate", "dp_shard", "cp")
        sums, gathers = ring.reduce_scatter(FP32 * shards.elements), ring.all_gather(width * shards.elements)
        if stage == 0:
            return ring.all_reduce(FP32 * shards.elements)
        if stage in (1, 2):
            return (count if stage == 2 else 1) * sums + gathers
        block = elements(shards.block)
        first, last = ring.all_gather(width * (elements(shards.around) + block)), ring.reduce_scatter(FP32 * block)
        forward = max(first, gathers - (1 - BACKWARD) * self.compute_s)
        return count * (forward + max(last, gathers + sums - BACKWARD * self.compute_s))

    def offload(self, host: Host) -> float:
        """Return the exposed seconds per step of CPU offload, with the memory of ``host``.

        Weights are copied to the device for each forward pass, and with resharding again for the backward pass; both
        copies overlap with computing. Copies of gradients to the host, and AdamW there, overlap with nothing. If
        DeepSpeed keeps weights on the devices, the updated weights are copied back. In ZeRO-2 and 3, gradients are
        copied after every micro-batch.
        """
        parallel, count = self.config.parallel, self.batch.accumulation
        fsdp = not parallel.offloads_optimizer
        part = self.shards.stored() if fsdp else -(-self.shards.elements // self.dims.data_ranks)
        # fsdp copies fp32 weights and casts them on the device; DeepSpeed has bf16 weights next to the masters.
        brought = (FP32 if fsdp else self.width) * part / host.link_bytes_per_s
        waits = 0.0
        if fsdp or parallel.offloads_parameters:
            again = brought if parallel.reshard_after_forward else 0.0
            forward = max(0.0, brought - (1 - BACKWARD) * self.compute_s)
            waits += count * (forward + max(0.0, again - BACKWARD * self.compute_s))
        else:
            waits += brought
        often = count if (parallel.zero_stage or 0) >= 2 else 1
        stepped = self.trained.stored() if fsdp else part
        return waits + often * FP32 * stepped / host.link_bytes_per_s + STEP_BYTES * stepped / host.bytes_per_s

    def tied_embedding(self) -> float:
        """Return the seconds per step in which the first and the last stage exchange the gradients of a tied embedding;
        0 without one."""
        ends = [stage for stage in self.stages if stage.first != stage.last]
        if not self.config.model.tie_embeddings or len(ends) != 1:
            return 0.0
        tied = next(p for p in self.shards.around if p.name.startswith("token_embedding."))
        return self.stage_group.send(FP32 * tied.stored(tied.ranks))

    # Per micro-batch: collectives inside the layers, and sends between stages.

    def per_micro_batch(self) -> dict[str, float]:
        """Return axis of the mesh -> exposed seconds per micro-batch of its communication, for axes with several
        ranks."""
        found: dict[str, float] = {}
        if self.dims.tp > 1:
            found["tp"] = self.tensor_parallel()
        if self.dims.cp > 1:
            found["cp"] = self.layers * self.context_parallel()
        if self.dims.ep > 1:
            found["ep"] = self.layers * self.expert_parallel()
        if self.dims.pp > 1:
            found["pp"] = self.pipeline()
        return found

    def tensor_parallel(self) -> float:
        """Return the seconds per micro-batch of the collectives of tensor parallelism.

        A block has two all-reduces in each direction (arXiv 1909.08053, section 3). With sequence parallelism it has
        two all-gathers and two reduce-scatters (arXiv 2205.05198, section 4.2.2). The embedding and the output matrix
        have one each.
        """
        ring, parallel, model = self.ring("tp"), self.config.parallel, self.config.model
        hidden, product = (width * self.tokens * model.n_embd for width in (self.hidden_width, self.width))
        if parallel.sequence_parallel:
            forward = 2 * (ring.all_gather(hidden) + ring.reduce_scatter(product))
            backward = 2 * (ring.reduce_scatter(hidden) + ring.all_gather(product))
            ends = ring.all_gather(hidden) + ring.reduce_scatter(hidden)
        else:
            forward, backward, ends = 2 * ring.all_reduce(product), 2 * ring.all_reduce(hidden), ring.all_reduce(hidden)
        around = sum(stage.first + stage.last for stage in self.stages)
        return self.layers * (self.forwards * forward + backward) + around * ends

    def context_parallel(self) -> float:
        """Return the exposed seconds of context parallelism for one layer and micro-batch.

        With ``allgather`` these are an all-gather of keys and values, and a reduce-scatter of their gradients. With
        ``ring`` they are the transfers of ring attention, which overlap with attention.
        """
        model, ring, forwards = self.config.model, self.ring("cp"), self.forwards
        keys = 2 * self.width * self.batch.micro * model.block_size * model.kv_heads * model.head_dim / self.dims.tp
        if self.config.parallel.cp_method is CpMethod.allgather:
            return forwards * ring.all_gather(keys) + ring.reduce_scatter(keys)
        sends = ring.ranks - 1
        seconds = (forwards + 1) * sends * ring.send(keys / ring.ranks)
        # In the backward pass the keys circulate again, together with their gradients, which are accumulated in fp32.
        attention = forward_flops(model, self.batch.micro).attention
        products = attention / 2 / model.n_layer / (self.dims.cp * self.dims.tp)
        computing = (forwards + 2) * products / self.machine.flops_per_s
        gradients = sends * ring.send(keys * FP32 / self.width / ring.ranks)
        return max(0.0, seconds + gradients - computing)

    def expert_parallel(self) -> float:
        """Return the seconds of expert parallelism for one layer and micro-batch: all-to-alls of rows to their experts
        and back, forward and backward (arXiv 2006.16668, section 3.2)."""
        model, dims = self.config.model, self.dims
        rows = self.batch.micro * expert_rows(model) / dims.cp
        again = self.config.recompute is Recompute.full  # selective recomputation keeps received rows
        ring = strided_group(self.machine, dims.ep, dims.cp * dims.tp)
        return 2 * (2 + again) * ring.all_to_all(self.width * rows * model.n_embd)

    def pipeline(self) -> float:
        """Return the seconds per micro-batch of sending hidden states to the next stage, and gradients back.

        In 1F1B, hidden states to a neighbor and gradients from that neighbor are sent at the same time, because a link
        has two directions (the paired sends of torch's Schedule1F1B). An inner stage has two such exchanges, the first
        and the last stage one.
        """
        parallel = self.config.parallel
        size = self.hidden_width * self.tokens * self.config.model.n_embd
        size //= self.dims.tp if parallel.sequence_parallel else 1
        sends = 2 * len(self.stages)
        if parallel.schedule is Schedule["1f1b"]:
            sends -= sum(stage.first + stage.last for stage in self.stages)
        return sends * self.stage_group.send(size)

    @property
    def stage_group(self) -> Group:
        """Group of two neighboring pipeline ranks. Its link is the one inside of a node if all ranks of the run are on
        one node, else the one between nodes."""
        machine, dims = self.machine, self.dims
        is_inside = dims.pp * dims.data_ranks * dims.cp * dims.tp <= machine.ranks_per_node
        return Group(2, machine.intra_node if is_inside else machine.inter_node)


def in_pieces(collective: Callable[[float], float], size: float, parts: Sequence[int]) -> float:
    """Return the seconds of a transfer of ``size`` bytes in several collectives, one after another.

    Args:
        collective: returns the seconds of a collective with a number of bytes.
        size: number of bytes of all collectives together.
        parts: relative sizes of the collectives, in any unit.
    """
    whole = sum(parts)
    return sum(collective(size * part / whole if whole else 0.0) for part in parts)


def seconds_per_flop(rates: MatmulRates, rows: float, sharded: float, width: float) -> float:
    """Return the mean seconds per FLOP of three matrix products: Y = X W, and those for the gradients of X and W.

    X is (``rows``, ``width``), and W is (``width``, ``sharded``). If ``width`` and ``sharded`` are exchanged, the
    result is the same. ``rates`` has the measured rates of products.
    """
    shapes = [(rows, sharded, width), (rows, width, sharded), (width, sharded, rows)]
    return sum(1 / rates.rate(*shape) for shape in shapes) / len(shapes)
