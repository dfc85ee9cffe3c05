"""Schema of parallelism. Imports no torch. The values are in ``configs/parallel``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from gpt.config.rules import check_numbers
from launch.errors import ConfigError

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


class Strategy(Enum):
    """Data parallelism: ``ddp`` (every rank keeps the whole state), ``zero1`` (gradients are reduced to shards, moments
    are sharded), ``fsdp`` (parameters, gradients and moments are sharded: FSDP2), or ``deepspeed`` (DeepSpeed's engine,
    which shards by ``zero_stage``)."""

    ddp = "ddp"
    zero1 = "zero1"
    fsdp = "fsdp"
    deepspeed = "deepspeed"
    auto = "auto"
    """The planner (gpt/planning) chooses one of the other strategies, before the run folder is made."""


Schedule = Enum("Schedule", ["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"])
"""Order in which the stages of a pipeline work on the micro-batches.

``gpipe``: all forward passes, then all backward passes (arXiv 1811.06965). ``1f1b``: forward and backward passes in
turn, which keeps fewer activations (arXiv 2006.09503). ``interleaved``: 1f1b with several stages on each rank, which
idles less and sends more (arXiv 2104.04473). ``zbv`` (zero bubble): the backward pass is split, and its second half
fills the gaps (arXiv 2401.10241). ``dualpipev``: DualPipe (arXiv 2412.19437) cut in half, so that each stage is on one
rank instead of two.
"""


class CpMethod(Enum):
    """Method by which ranks that share a sequence attend to the tokens of all these ranks.

    ``allgather`` brings the keys and values of the whole sequence to every rank, layer by layer, and keeps them for the
    backward pass. With few key-value heads this needs little memory (arXiv 2407.21783, section 3.3.2). ``ring`` passes
    keys and values from rank to rank and keeps only the keys and values of this rank (arXiv 2310.01889).
    """

    allgather = "allgather"
    ring = "ring"


class ReduceDtype(Enum):
    """Dtype in which gradients are summed over the ranks: ``fp32``, or ``bf16`` in half the bytes."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class ParallelConfig:
    """Parallelism of a run. No key but ``reduce_dtype`` changes the losses of the run."""

    strategy: Strategy = MISSING
    dp_shard: Optional[int] = None
    """fsdp only: number of ranks that shard one replica of the model; null means all ranks. A smaller number makes
    several replicas, whose gradients are averaged (HSDP). With the number of GPUs of a node, all-gathers stay inside
    the node."""
    reshard_after_forward: bool = True
    """fsdp only: free the gathered parameters of a block after its forward pass (less memory, one more all-gather). The
    last block, norm and output matrix are kept, since the backward pass begins with them."""
    fsdp_min_num_params: Optional[int] = None
    """fsdp only, without ep: least number of parameters of a unit, which one collective gathers or reduces. Consecutive
    blocks are joined to a unit until it has this many parameters. null makes each block a unit. Larger units mean fewer
    and larger collectives, and need more memory, because about two units are gathered at a time."""
    reduce_each_micro_batch: bool = False
    """fsdp only, without pp: reduce-scatter gradients after each micro-batch, not only after the last one of a step. A
    rank then keeps only its shard of the gradients, not all of them in fp32. This saves up to 4 bytes a parameter, and
    costs one reduce-scatter per micro-batch."""
    reduce_dtype: ReduceDtype = ReduceDtype.fp32
    """fsdp only: dtype of reduce-scattered gradients, and of the all-reduce between replicas. ``bf16`` sends half the
    bytes, and keeps the gradients of several micro-batches in half the memory. Sums then have 8 bits of precision, so
    this key does change the loss curve."""
    cpu_offload: bool = False
    """fsdp, and deepspeed from stage 1: keep state in host memory, and compute the optimizer step there. The state of
    fsdp is parameters, gradients and moments. That of deepspeed is moments and master weights, and in stage 3 also the
    parameters. This is slow: every step copies gradients, and every forward and backward pass copies parameters that
    are in host memory. On CPUs nothing changes with fsdp."""
    tp: int = 1
    """Tensor parallelism: number of ranks that share each matrix, and the heads of attention."""
    sequence_parallel: bool = True
    """tp > 1 only: each of the tp ranks computes norms, dropout and the residual stream on a slice of the sequence.
    This needs less memory for activations and sends as many bytes as with false. Dropout with tp needs this key."""
    pp: int = 1
    """Pipeline parallelism: number of ranks that the layers are split over. The micro-batches of a step, which a rank
    would otherwise accumulate, pass through the pipeline."""
    schedule: Schedule = Schedule["1f1b"]
    """pp > 1 only: order in which the stages compute the micro-batches."""
    stages_per_rank: Optional[int] = None
    """pp > 1 only: number of pipeline stages on each rank. The schedule decides: interleaved allows 2 or more, zbv and
    dualpipev have 2, gpipe and 1f1b have 1. null takes the smallest number that the schedule allows."""
    cp: int = 1
    """Context parallelism: number of ranks that share each sequence. 2 x cp divides model.block_size."""
    cp_method: CpMethod = CpMethod.allgather
    """cp > 1 only: method by which a rank attends to the tokens of the other cp ranks."""
    ep: int = 1
    """Expert parallelism (arXiv 2006.16668): number of ranks over which the experts are sharded. These ranks train on
    different samples, and all other parameters are parallelized as without ep. ep divides model.n_expert. It also
    divides the number of data-parallel ranks; with fsdp, the number of those that shard one replica."""
    zero_stage: Optional[int] = None
    """deepspeed only: state that is sharded over the data ranks (arXiv 1910.02054): 0 none, 1 the optimizer's moments
    and master weights, 2 the gradients too, 3 the parameters too. null with other strategies."""
    deepspeed_config: Optional[str] = None
    """deepspeed only: JSON file with additional settings of DeepSpeed (bucket sizes, overlap, ...). A setting that
    contradicts another key of the run is refused. null adds no settings."""
    timeout_s: int = 600
    """Seconds after which an incomplete collective fails the run, during the set-up and the first steps, which load,
    compile and connect."""
    step_timeout_s: Optional[int] = None
    """Seconds after which an incomplete collective fails the run, in the steps after the first ones. null means 20
    times the slowest of the first steps, at least 100 and at most timeout_s. Messages of saves and evaluations keep
    timeout_s."""

    @property
    def offloads_optimizer(self) -> bool:
        """True if DeepSpeed keeps moments and master weights in host memory."""
        return self.cpu_offload and self.strategy is Strategy.deepspeed

    @property
    def offloads_parameters(self) -> bool:
        """True if DeepSpeed also keeps the parameters in host memory, and copies them to the device for each use."""
        return self.offloads_optimizer and self.zero_stage == 3

    def validate(self) -> None:
        """Raise ConfigError if a number is out of its range, or a key does not belong to the strategy."""
        for key, (strategies, expected, fix) in STRATEGIES_OF_KEY.items():
            value = getattr(self, key)
            if value not in (None, False, ReduceDtype.fp32) and self.strategy not in strategies:
                text = str(value).lower() if value is True else getattr(value, "name", value)
                found = f"parallel.{key}={text} with parallel.strategy={self.strategy.name}"
                raise ConfigError(found, expected, fix.format(value=value))
        positive = ("tp", "pp", "cp", "ep", "timeout_s", "dp_shard", "fsdp_min_num_params")
        check_numbers("parallel.", self, positive, step_timeout_s=(1, self.timeout_s))
        if self.strategy is Strategy.deepspeed:
            self._check_zero()
        self._check_stages()
        if self.reduce_each_micro_batch and self.pp > 1:
            raise ConfigError(
                f"parallel.reduce_each_micro_batch=true with parallel.pp={self.pp}",
                "no pipeline, whose schedule reduces the gradients of a stage when it has worked on all micro-batches",
                "parallel.reduce_each_micro_batch=false",
            )
        if self.fsdp_min_num_params is not None and self.ep > 1:
            raise ConfigError(
                f"parallel.fsdp_min_num_params={self.fsdp_min_num_params} with parallel.ep={self.ep}",
                "one unit a block: those of experts stand between the blocks",
                "parallel.fsdp_min_num_params=null",
            )

    def _check_stages(self) -> None:
        if self.stages_per_rank is None:
            return
        several = {Schedule.interleaved: "2 or more", Schedule.zbv: "2", Schedule.dualpipev: "2"}
        expected = several.get(self.schedule, "1")
        if str(self.stages_per_rank) == expected or (expected == "2 or more" and self.stages_per_rank >= 2):
            return
        can = self.strategy is not Strategy.deepspeed and self.stages_per_rank > 1
        other = ", or parallel.schedule=interleaved" if expected == "1" and can else ""
        raise ConfigError(
            f"parallel.stages_per_rank={self.stages_per_rank} with parallel.schedule={self.schedule.name}",
            f"{expected} stage{'' if expected == '1' else 's'} on each rank",
            f"parallel.stages_per_rank={expected[0]}{other}",
        )

    def _check_zero(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(
                f"parallel.zero_stage={'null' if self.zero_stage is None else self.zero_stage} with "
                f"parallel.strategy={self.strategy.name}",
                "0, 1, 2 or 3",
                "parallel.zero_stage=2",
            )
        if self.cpu_offload and not self.zero_stage:
            raise ConfigError(
                "parallel.cpu_offload=true with parallel.zero_stage=0",
                "at least parallel.zero_stage=1: only what is sharded can be kept elsewhere",
                "parallel.zero_stage=1, or parallel.cpu_offload=false",
            )


FSDP = (Strategy.fsdp, Strategy.auto)
"""Strategies with which the keys of FSDP may be set; auto may choose fsdp."""
STRATEGIES_OF_KEY = {
    "cpu_offload": (
        (*FSDP, Strategy.deepspeed),
        "a strategy that gathers the model part by part as it computes",
        "parallel=fsdp_offload, or parallel.cpu_offload=false",
    ),
    "reduce_each_micro_batch": (
        FSDP,
        "a strategy that shards the gradients",
        "parallel=fsdp, or parallel.reduce_each_micro_batch=false",
    ),
    "reduce_dtype": (
        FSDP,
        "a strategy that casts gradients before it reduces them",
        "parallel=fsdp, or parallel.reduce_dtype=fp32",
    ),
    "fsdp_min_num_params": (
        FSDP,
        "a strategy that gathers the model unit by unit",
        "parallel=fsdp, or parallel.fsdp_min_num_params=null",
    ),
    "dp_shard": (
        FSDP,
        "a strategy that shards the model",
        "parallel=hsdp parallel.dp_shard={value}, or no parallel.dp_shard",
    ),
    **{
        key: ((Strategy.deepspeed,), "DeepSpeed, whose key it is", f"{words}, or no parallel.{key}")
        for key, words in (
            ("zero_stage", "parallel.strategy=deepspeed"),
            ("deepspeed_config", "parallel=zero2"),
        )
    },
}
"""Key of ``parallel`` -> the strategies that use the key, and two texts of the ConfigError that is raised if another
strategy is chosen: ``expected`` and ``fix`` (the text to type)."""
