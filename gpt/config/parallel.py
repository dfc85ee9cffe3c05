"""The schema of parallelism. Torch-free; its values are in ``configs/parallel``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from launch.errors import ConfigError, require_positive, require_range

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


class Strategy(Enum):
    """Data parallelism: ``ddp`` (every rank holds all), ``zero1`` (reduced gradients and moments sharded),
    ``fsdp`` (parameters, gradients and moments sharded: FSDP2), or ``deepspeed`` (DeepSpeed's engine, which shards by
    ``zero_stage``)."""

    ddp = "ddp"
    zero1 = "zero1"
    fsdp = "fsdp"
    deepspeed = "deepspeed"
    auto = "auto"
    """Choice of the planner (gpt/planning), which puts one of the others in its place before a run folder is made."""


class EngineKind(Enum):
    """Engines that ``auto`` chooses from: those of torch (``ddp``, ``zero1``, ``fsdp``), or DeepSpeed's stages."""

    native = "native"
    deepspeed = "deepspeed"


Schedule = Enum("Schedule", ["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"])
"""Order in which the stages of a pipeline work on the micro-batches: ``gpipe`` (all forward passes, then all backward
ones; arXiv 1811.06965), ``1f1b`` (in turn, which keeps fewer activations; arXiv 2006.09503), ``interleaved`` (1F1B with
several stages on each rank, which idles less and sends more; arXiv 2104.04473), ``zbv`` (zero bubble: the backward pass
is split, and its second half fills the gaps; arXiv 2401.10241) or ``dualpipev`` (arXiv 2412.19437, cut in half)."""


class CpMethod(Enum):
    """Method by which ranks that share a sequence attend to each other's tokens.

    ``allgather`` brings the keys and values of the whole sequence to every rank, layer by layer, and keeps them for the
    backward pass: little with few key-value heads (arXiv 2407.21783, section 3.3.2). ``ring`` passes them round and
    keeps this rank's only (arXiv 2310.01889).
    """

    allgather = "allgather"
    ring = "ring"


@dataclass
class ParallelConfig:
    """Parallelism of a run. Its keys do not change the loss curve."""

    strategy: Strategy = MISSING
    engine: Optional[EngineKind] = None
    """With ``strategy=auto``: engines to choose from; null is native. Beside another strategy it has to be its own."""
    dp_shard: Optional[int] = None
    """fsdp only: ranks that shard one replica of the model; null shards it over all ranks. With fewer there are several
    replicas, whose gradients are averaged (HSDP): all-gathers stay inside a node where this is the number of its
    GPUs."""
    reshard_after_forward: bool = True
    """fsdp only: free the gathered parameters of a block after its forward pass (less memory, one more all-gather). The
    last block, norm and output matrix are kept, since the backward pass begins with them."""
    fsdp_min_num_params: Optional[int] = None
    """fsdp only, without ep: fewest parameters of a unit, which is all-gathered and reduce-scattered at once: blocks
    that follow each other are one unit until they have as many. null makes each block a unit. Larger units are fewer
    and larger collectives, and more memory: about two units are gathered at a time."""
    reduce_each_micro_batch: bool = False
    """fsdp only, without pp: reduce-scatter gradients after each micro-batch, not after the last one of a step only. A
    rank then holds its shard of them, not all of them in fp32: 4 bytes a parameter less, for as many reduce-scatters as
    micro-batches."""
    cpu_offload: bool = False
    """fsdp only: keep parameters, gradients and moments in the memory of the host, and step there; a GPU holds what it
    computes with. Slow: parameters are copied there in every forward and backward pass, and gradients back in every
    step. Where the device is the CPU, nothing changes."""
    tp: int = 1
    """Tensor parallelism: ranks that share each matrix, and the heads of attention."""
    sequence_parallel: bool = True
    """tp > 1 only: norms, dropout and the residual stream work on a slice of the sequence on each of the tp ranks. Less
    memory for activations, as many bytes sent. Needed for dropout."""
    loss_parallel: bool = True
    """tp > 1 only: logits stay sharded by the vocabulary, and ranks exchange sums for each token instead of logits."""
    async_tp: bool = False
    """tp > 1 with sequence_parallel, on GPUs, compiled: overlap all-gathers and reduce-scatters of tp with the matrix
    products beside them, in pieces, by torch's symmetric memory. It has not been run on GPUs."""
    pp: int = 1
    """Pipeline parallelism: ranks that the layers are split over. ``batch.accumulation`` micro-batches go through."""
    schedule: Schedule = Schedule["1f1b"]
    """With ``pp``: order in which the stages work."""
    stages_per_rank: Optional[int] = None
    """With ``pp``: stages that each rank holds. null is what the schedule has: 1, or 2 where it is interleaved (which
    may have more) or V-shaped (which has 2)."""
    cp: int = 1
    """Context parallelism: ranks that share each sequence. 2 x cp divides model.block_size."""
    cp_method: CpMethod = CpMethod.allgather
    """With cp above 1: method by which the ranks attend to each other's tokens."""
    ep: int = 1
    """Expert parallelism (arXiv 2006.16668): ranks that see different samples and shard the experts among themselves;
    the rest of the model is parallelized as without. Divides model.n_expert, and the number of ranks that see different
    samples (with fsdp, of those that shard one replica of the model)."""
    zero_stage: Optional[int] = None
    """deepspeed only: state that is sharded over the data ranks (arXiv 1910.02054): 0 none, 1 the optimizer's moments
    and master weights, 2 the gradients too, 3 the parameters too."""
    offload_optimizer: bool = False
    """deepspeed only, from stage 1: keep moments and master weights in the memory of the host, and step there."""
    offload_parameters: bool = False
    """deepspeed only, stage 3: keep the parameters in the memory of the host until they are computed with."""
    deepspeed_config: Optional[str] = None
    """deepspeed only: a JSON file of DeepSpeed's own settings to add (bucket sizes, overlap, ...). One that contradicts
    this configuration is refused."""
    timeout_s: int = 600
    """Seconds after which a collective that does not complete fails the run, until the first steps are made: those
    load, compile and connect."""
    step_timeout_s: Optional[int] = None
    """Seconds after which a collective of training fails once the first steps are made. null: 20 times the slowest of
    them, at least 100 and at most timeout_s. Messages between saves and evaluations keep timeout_s."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range, or belongs to another strategy."""
        check_engine(self)
        check_zero(self)
        for key in ("tp", "pp", "cp", "ep", "timeout_s"):
            require_positive(f"parallel.{key}", getattr(self, key))
        if self.step_timeout_s is not None:
            require_range("parallel.step_timeout_s", self.step_timeout_s, 1, self.timeout_s)
        self._check_stages()
        if self.cpu_offload:
            self._require_fsdp(
                "parallel.cpu_offload=true",
                "a strategy that gathers the model part by part as it computes",
                "parallel=fsdp_offload, or parallel.cpu_offload=false",
            )
        self._check_reduction()
        self._check_units()
        if self.dp_shard is None:
            return
        require_positive("parallel.dp_shard", self.dp_shard)
        self._require_fsdp(
            f"parallel.dp_shard={self.dp_shard}",
            "a strategy that shards the model",
            f"parallel=hsdp parallel.dp_shard={self.dp_shard}, or no parallel.dp_shard",
        )

    def _require_fsdp(self, given: str, expected: str, fix: str) -> None:
        """Refuse what only FSDP has under any other strategy; parallel=auto may yet choose it."""
        if self.strategy not in (Strategy.fsdp, Strategy.auto):
            raise ConfigError(f"{given} with parallel.strategy={self.strategy.name}", expected, fix)

    def _check_reduction(self) -> None:
        if not self.reduce_each_micro_batch:
            return
        self._require_fsdp(
            "parallel.reduce_each_micro_batch=true",
            "a strategy that shards the gradients",
            "parallel=fsdp, or parallel.reduce_each_micro_batch=false",
        )
        if self.pp > 1:
            raise ConfigError(
                f"parallel.reduce_each_micro_batch=true with parallel.pp={self.pp}",
                "no pipeline, whose schedule reduces the gradients of a stage when it has worked on all micro-batches",
                "parallel.reduce_each_micro_batch=false",
            )

    def _check_units(self) -> None:
        if self.fsdp_min_num_params is None:
            return
        require_positive("parallel.fsdp_min_num_params", self.fsdp_min_num_params)
        self._require_fsdp(
            f"parallel.fsdp_min_num_params={self.fsdp_min_num_params}",
            "a strategy that gathers the model unit by unit",
            "parallel=fsdp, or parallel.fsdp_min_num_params=null",
        )
        if self.ep > 1:
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


def check_engine(parallel: ParallelConfig) -> None:
    """Raise ConfigError where the engine is not that of the strategy."""
    if parallel.engine is None or parallel.strategy is Strategy.auto:
        return
    own = EngineKind.deepspeed if parallel.strategy is Strategy.deepspeed else EngineKind.native
    if parallel.engine is not own:
        raise ConfigError(
            f"parallel.engine={parallel.engine.name} with parallel.strategy={parallel.strategy.name}",
            f"parallel.engine={own.name}, or a strategy that is left open",
            f"parallel=auto parallel.engine={parallel.engine.name}, or no parallel.engine",
        )


def check_zero(parallel: ParallelConfig) -> None:
    """Raise ConfigError where the keys of DeepSpeed do not go together, or with the strategy."""
    stage, keys = parallel.zero_stage, ("zero_stage", "offload_optimizer", "offload_parameters", "deepspeed_config")
    left_open = parallel.strategy is Strategy.auto
    if parallel.strategy is not Strategy.deepspeed and not (left_open and parallel.engine is EngineKind.deepspeed):
        for key in keys:
            value = getattr(parallel, key)
            if value not in (None, False):
                raise ConfigError(
                    f"parallel.{key}={value} with parallel.strategy={parallel.strategy.name}",
                    "DeepSpeed, whose key it is",
                    f"parallel={'auto parallel.engine=deepspeed' if left_open else zero_preset(value)}, "
                    f"or no parallel.{key}",
                )
        return
    if left_open and stage is None:
        return
    if stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"parallel.zero_stage={'null' if stage is None else stage} with parallel.strategy={parallel.strategy.name}",
            "0, 1, 2 or 3",
            "parallel.zero_stage=2",
        )
    for key, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
        if getattr(parallel, key) and stage < least:
            raise ConfigError(
                f"parallel.{key}=true with parallel.zero_stage={stage}",
                f"at least parallel.zero_stage={least}: only what is sharded can be kept elsewhere",
                f"parallel.zero_stage={least}, or parallel.{key}=false",
            )


def zero_preset(value: object) -> str:
    """Preset of ``configs/parallel`` to propose for this value of a key of DeepSpeed."""
    return f"zero{value if value in (2, 3) else 2}"
