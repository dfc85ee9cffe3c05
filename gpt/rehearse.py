"""Find hangs, waits and lack of memory of a large run before it starts, without GPUs: some ranks make a training step.

    python -m gpt.rehearse --ranks 64 model=llama_1p36b optim=gpt2 parallel=fsdp
    python -m launch nodes=8 cluster=slurm cluster.gpus_per_node=8 parallel=fsdp dry_run=deep

A rehearsal takes some minutes on one machine. Some ranks, such as the first and the last of each axis of the mesh,
build their model, engine and optimizer, and make two steps. Each rank has a process of its own, and fake tensors, which
have shapes and no values. Memory in the second step is compared with the plan, and the collectives of the ranks are
compared with each other.

The exit status is 0. It is 2 if ranks would wait for each other forever, if the host would wait for its GPU during a
step, or if a rank would need more memory than its GPU has.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, zip_longest
from pathlib import Path
from typing import cast

import torch

from gpt.accounting import GIB, expand, memory_bytes, peak_flops
from gpt.config import CompileMode, Precision, Strategy, TrainConfig
from gpt.planning import Machine, gpus
from gpt.planning.auto import choose_parallelism, choose_precision
from gpt.planning.cost import estimate
from gpt.planning.memory import RankMemory, rank_memory
from gpt.rehearsal import PARTS, Collective, RankGroup, RankRehearsal
from gpt.rehearsal.rank import rehearse_rank
from gpt.topology import Batch, ParallelDims, settle_steps, split_batch
from gpt.topology.check_dims import check_parallel_dims
from gpt.training.run import parse_request
from launch.errors import CommandParser, ConfigError, counted, duration_text, refusing
from launch.runs.folder import RunFolder

# Comparison of the collectives that ranks issue, to find where a group would hang.


SEND, RECEIVE = "send", "recv"

Issued = Mapping[int, Sequence[Collective]]
"""Rank -> the collectives and transfers that it issues, in order."""


def find_hangs(issued: Issued, groups: Mapping[str, RankGroup]) -> list[str]:
    """Return one line of text for each group, or pair of ranks, that would wait forever; empty if there is none.

    Args:
        issued: collectives of the rehearsed ranks.
        groups: name of a group -> the group, for all groups that some rank has used.
    """
    found: list[str] = []
    for name, group in groups.items():
        ranks = frozenset(group.ranks)
        of_group = {rank: [one for one in own if one.group == name] for rank, own in issued.items() if rank in ranks}
        found += unequal_collectives(group, of_group)
        found += lost_transfers(group, of_group)
        found += unjoined_batches(group, of_group)
    return found or [*crossed_orders(issued, groups)]


def unequal_collectives(group: RankGroup, of_group: Issued) -> Iterator[str]:
    """Yield one line of text on the first collective in which the ranks of a group differ. Yield nothing if they do not
    differ.

    ``of_group`` has the collectives and transfers in this group.
    """
    ranks = list(of_group)
    own = [[one for one in calls if one.peer is None] for calls in of_group.values()]
    for number, calls in enumerate(zip_longest(*own), start=1):
        contents = [None if call is None else call.content for call in calls]
        [(common, _)] = Counter(contents).most_common(1)
        differs = [content != common for content in contents]
        if not any(differs):
            continue
        odd, other = differs.index(True), differs.index(False)
        yield (
            f"group {group.label} of {len(group.ranks)} ranks, collective {number}: rank {ranks[odd]} issues "
            f"{calls[odd] or 'none'}, and rank {ranks[other]} {calls[other] or 'none'}"
        )
        return


def crossed_orders(issued: Issued, groups: Mapping[str, RankGroup]) -> Iterator[str]:
    """Yield one line of text if ranks wait for each other in different groups.

    Call this only if all ranks of each group issue the same collectives in it (see ``unequal_collectives``). A rank
    waits in each collective until the other rehearsed ranks of the group have reached this collective.
    """
    left = {rank: deque(one for one in own if one.peer is None) for rank, own in issued.items()}
    waiting = [rank for rank in left if left[rank]]
    while waiting:
        for rank in waiting:
            name = left[rank][0].group
            members = [other for other in groups[name].ranks if other in left]
            if all(left[other][0].group == name for other in members):
                for other in members:
                    left[other].popleft()
                break
        else:
            first = min(waiting, key=lambda rank: len(groups[left[rank][0].group].ranks))
            group = groups[left[first][0].group]
            second = next(o for o in group.ranks if o in left and groups[left[o][0].group] is not group)
            yield (
                f"collectives in another order: rank {first} waits in group {group.label} with {left[first][0]}, and "
                f"rank {second} in {groups[left[second][0].group].label} with {left[second][0]}"
            )
            return
        waiting = [rank for rank in left if left[rank]]


def lost_transfers(group: RankGroup, of_group: Issued) -> Iterator[str]:
    """Yield one line of text for each pair (sender, receiver) whose transfers do not match. The line is on the first
    transfer that only one of the two ranks issues, or that has another size or dtype on the other rank.

    ``of_group`` has the collectives and transfers in this group.
    """
    for source, target in permutations(of_group, 2):
        sent = [one for one in of_group[source] if one.operation == SEND and one.peer == target]
        received = [one for one in of_group[target] if one.operation == RECEIVE and one.peer == source]
        for number, (give, take) in enumerate(zip_longest(sent, received), start=1):
            if give is None or take is None or give.content[1:] != take.content[1:]:
                yield (
                    f"group {group.label}, transfer {number} from rank {source} to rank {target}: "
                    f"{give or 'nothing sent'}, and {take or 'nothing received'}"
                )
                break


def unjoined_batches(group: RankGroup, of_group: Issued) -> Iterator[str]:
    """Yield one line of text if a batch of transfers (``batch_isend_irecv``) waits forever for a rank of its group.

    NCCL makes the communicator of a group when all ranks of the group have issued a collective or a batch. So a batch
    waits forever for a rank that issues neither; single transfers of that rank use other communicators.
    ``of_group`` as in ``lost_transfers``.
    """
    first = next((one for calls in of_group.values() for one in calls if one.batched), None)
    if first is None:
        return
    for rank, calls in of_group.items():
        if not any(one.batched or one.peer is None for one in calls):
            yield (
                f"group {group.label} of {len(group.ranks)} ranks: the batch of transfers at {first.place} waits for "
                f"rank {rank}, which issues no collective and no batch in this group"
            )
            return


# Choice of the ranks to rehearse, and the faults that a rehearsal finds.


AGREES = 0.05
"""Largest relative difference of planned from rehearsed memory that is not reported."""
LINES = 3
"""Number of lines of code that are named if planned and rehearsed memory differ: those that have allocated the most."""
UNSEEN = (
    "not seen: workspaces of kernels, fragments of the allocator, buffers of NCCL, graphs of torch.compile; CPU kernels"
    " of norms may save more than those of a GPU; ranks between the first and the last of an axis"
)


@dataclass(frozen=True)
class Rehearsal:
    """Result of a rehearsal: the findings about its ranks, and comparisons with the plan."""

    config: TrainConfig
    dims: ParallelDims
    batch: Batch
    ranks: Sequence[RankRehearsal]
    """Findings about each rehearsed rank."""
    gpu_bytes: int | None = None
    """Memory of one GPU in bytes; None if unknown."""
    step_s: float | None = None
    """Estimated seconds of a step; None if the GPU is unknown."""

    def planned(self, rank: int) -> RankMemory:
        """Return the planned memory of the rank with this number."""
        of_a_stage = self.dims.data_ranks * self.dims.cp * self.dims.tp
        return rank_memory(self.config, self.dims, self.batch, rank // of_a_stage)

    def difference(self, rank: RankRehearsal) -> float:
        """Return (planned memory of a rank) / (rehearsed peak) - 1."""
        return self.planned(rank.rank).total / rank.peak - 1 if rank.peak else 0.0

    def hangs(self) -> list[str]:
        """Return one line of text for each group, or pair of ranks, that would wait forever."""
        groups: dict[str, RankGroup] = {}
        for rank in self.ranks:
            groups |= rank.groups
        return find_hangs({rank.rank: rank.collectives for rank in self.ranks}, groups)

    def doubts(self) -> list[str]:
        """Return one line of text for each of the ``doubts`` of the ranks, with the first rank that has it."""
        first = {doubt: rank.rank for rank in reversed(self.ranks) for doubt in rank.doubts}
        return [f"rank {rank}: {doubt}" for doubt, rank in first.items()]

    def waits(self) -> dict[str, int]:
        """Return line of code where the host waits for the device in a step -> largest number of such waits on one
        rank."""
        found: Counter[str] = Counter()
        for rank in self.ranks:
            found |= Counter(rank.waits)
        return dict(found)

    def refuse_faults(self) -> None:
        """Raise ConfigError in three cases: ranks would wait for each other forever; the host would wait for its device
        during a step; or the peak of a rank exceeds ``gpu_bytes``."""
        hangs, waits = self.hangs(), [f"the host waits at {place}" for place in self.waits()]
        largest = max(self.ranks, key=lambda rank: rank.peak)
        found = [*(f"would hang here: {hang}" for hang in hangs), *waits]
        fixes = ["the lines that are named, then the same command"] if found else []
        if self.gpu_bytes is not None and largest.peak > self.gpu_bytes:
            has = self.gpu_bytes / GIB
            found.append(f"rank {largest.rank} needs {largest.peak / GIB:.1f} GiB, and a GPU has {has:.1f} GiB")
            fixes.append(f"optim.max_micro_batch={max(1, self.batch.micro // 2)}, recompute=full or parallel=fsdp")
        if found:
            raise ConfigError(
                "\n  ".join(found),
                "equal collectives on the ranks of a group, no wait of the host in a step, and tensors that fit",
                "; ".join(fixes),
            )


def kinds_of_ranks(dims: ParallelDims) -> dict[int, str]:
    """Return the ranks to rehearse: number of a rank -> text on its place in the mesh.

    These are the first rank of each pipeline stage, the last rank along each axis of the mesh, and the last rank of the
    run. Ranks between the first and the last along an axis are left out, because they have the same shapes and code.
    """
    sizes = dims.sizes
    ends = {name: size - 1 for name, size in sizes.items() if name != "pp" and size > 1}
    places = [({"pp": stage}, f"pp {stage}" if dims.pp > 1 else "first") for stage in range(dims.pp)]
    places += [({name: end}, f"{name} {end}") for name, end in ends.items()]
    if dims.ep > 1:
        axis = "dp_shard" if dims.is_sharded else "dp_replicate"
        places.append(({axis: dims.ep - 1}, f"ep {dims.ep - 1}"))
    places.append(({name: size - 1 for name, size in sizes.items()}, "last"))
    found: dict[int, str] = {}
    for place, kind in places:
        rank = 0
        for name, size in sizes.items():
            rank = rank * size + place.get(name, 0)
        found.setdefault(rank, kind)
    return found


# Text.


def rehearsal_lines(rehearsal: Rehearsal) -> Iterator[str]:
    """Yield the result of a rehearsal as lines of text: memory, collectives, dtypes, waits, time, hangs, and what a
    rehearsal cannot find."""
    dims, batch, config = rehearsal.dims, rehearsal.batch, rehearsal.config
    size = dims.data_ranks * dims.model_ranks
    yield (
        f"rehearsal of {counted(size, 'rank')} ({len(rehearsal.ranks)} of them taken), {dims}, {config.model.name} in "
        f"{config.precision.name}, {batch.accumulation} x {batch.micro} sequences a rank; tensors without values"
    )
    yield from memory_lines(rehearsal)
    first = rehearsal.ranks[0]
    yield f"  collectives of a step of rank {first.rank}, in order by group; bytes that the rank gives or receives"
    yield from collective_lines(first)
    for part, found in first.dtypes.items():
        yield f"  dtypes  {part}: {', '.join(f'{dtype} {size_text(size)}' for dtype, size in found.items())}"
    yield from reduction_lines(first)
    waits = [f"{place} ({times} times)" for place, times in rehearsal.waits().items()]
    yield f"  waits of the host for the device: {', '.join(waits) or 'none'}"
    for place, times in first.expected_waits.items():
        yield f"    expected: {place}, {times} times a step"
    step = "unknown, as the GPU is" if rehearsal.step_s is None else duration_text(rehearsal.step_s)
    yield f"  step by the cost model: {step}"
    yield f"  would hang: {'; '.join(rehearsal.hangs()) or 'nowhere'}"
    yield f"  to check: {'; '.join(rehearsal.doubts()) or 'nothing'}"
    yield f"  {UNSEEN}"


def memory_lines(rehearsal: Rehearsal) -> Iterator[str]:
    """Yield a line of text for each rank with its peak memory by ``PARTS``, and its planned memory. If planned and
    rehearsed memory of a rank differ by more than ``AGREES``, also yield two lines on the first such rank: the parts of
    its planned memory, and the lines of code that have allocated the most."""
    for rank in rehearsal.ranks:
        said, off = rehearsal.planned(rank.rank).total, rehearsal.difference(rank)
        shown = ", ".join(f"{part} {size_text(rank.memory.get(part, 0))}" for part in PARTS)
        planned = f"plan {size_text(said)}, {off:+.1%}"
        yield f"  rank {rank.rank} ({rank.kind}): peak {size_text(rank.peak)} ({planned}): {shown}"
    apart = [rank for rank in rehearsal.ranks if abs(rehearsal.difference(rank)) > AGREES]
    if apart:
        of_plan = vars(rehearsal.planned(apart[0].rank))
        told = ", ".join(f"{part} {size_text(size)}" for part, size in of_plan.items() if size)
        yield f"  differs by more than {AGREES:.0%}; the plan of rank {apart[0].rank} is {told}"
        lines = Counter(apart[0].largest).most_common(LINES)
        shown = ", ".join(f"{size_text(size)} at {place}" for place, size in lines)
        yield f"    most activations and rest of rank {apart[0].rank}: {shown}"


def collective_lines(rank: RankRehearsal) -> Iterator[str]:
    """Yield a line of text for each group of a rank, with the collectives of a step in their order. Repetitions are
    written as ``N x``."""
    by_group: dict[str, list[str]] = {}
    for one in rank.collectives[rank.in_step :]:
        peer = "" if one.peer is None else f" {'to' if one.operation == SEND else 'from'} {one.peer}"
        by_group.setdefault(one.group, []).append(f"{one.operation}{peer} {one.dtype} {size_text(one.bytes)}")
    for name, calls in by_group.items():
        group = rank.groups[name]
        shown = [f"{times} x {text}" if times > 1 else text for times, text in in_runs(calls)]
        yield f"    {group.label} of {len(group.ranks)}: {', '.join(shown)}"


def in_runs(items: Sequence[str], longest: int = 8) -> list[tuple[int, str]]:
    """Join repetitions in ``items``. Return pairs (number, text), in order: the text names up to ``longest``
    consecutive items, and the number says how many times these items follow one another."""
    found, at = list[tuple[int, str]](), 0
    while at < len(items):
        best = (1, 1)
        for length in range(1, longest + 1):
            run, times = items[at : at + length], 1
            while items[at + times * length : at + (times + 1) * length] == run:
                times += 1
            if times > 1 and times * length > best[0] * best[1]:
                best = times, length
        times, length = best
        run = items[at : at + length]
        text = ", ".join(run)
        found.append((times, f"({text})" if length > 1 else text))
        at += times * length
    return found


def reduction_lines(rank: RankRehearsal) -> Iterator[str]:
    """Yield a line of text for each combination of operation, group and dtype among the collectives of a step, with the
    sum of their bytes. The lines show, for example, that gradients are reduced in fp32 where bf16 was intended."""
    sums: Counter[tuple[str, str, str]] = Counter()
    for one in rank.collectives[rank.in_step :]:
        sums[rank.groups[one.group].label, one.operation, one.dtype] += one.bytes
    for (label, operation, dtype), size in sorted(sums.items()):
        yield f"  dtypes  {operation} in {label}: {dtype} {size_text(size)}"


def size_text(size: float) -> str:
    """Return a number of bytes as text with a unit, such as ``3.2 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3f} GiB"


# The command.


def rehearse(config: TrainConfig, ranks: int, processes: int = 1) -> Rehearsal:
    """Run two training steps on fake tensors, for some ranks of a run (``kinds_of_ranks``). Return the findings.

    Each rank runs in a process of its own. No GPU is needed, and nothing is compiled.

    Args:
        config: config of the run; precision and parallelism are not ``auto``.
        ranks: number of ranks of the whole run.
        processes: number of processes that run at the same time.

    Raises:
        ConfigError: the config does not fit the ranks, or cannot be rehearsed.
    """
    refuse_unknown_engines(config)
    # Compiled code is not rehearsed: without values nothing can run that code.
    config = replace(config, compile=CompileMode["none"])
    dims = check_parallel_dims(config, ranks)
    batch = split_batch(config.optim, dims.data_ranks)
    config = settle_steps(config, batch)
    work = [(config, dims, batch, rank, kind) for rank, kind in kinds_of_ranks(dims).items()]
    # Forked, since a fresh process would need seconds for its imports. Each process rehearses one rank.
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        found: list[RankRehearsal] = pool.starmap(rehearse_rank, work, chunksize=1)
    return Rehearsal(config, dims, batch, found)


def refuse_unknown_engines(config: TrainConfig) -> None:
    """Raise ConfigError if the run cannot be rehearsed: with DeepSpeed, CPU offload, float8, or another optimizer than
    AdamW."""
    reasons = {
        "parallel.strategy=deepspeed": config.parallel.strategy is Strategy.deepspeed,
        "parallel.cpu_offload=true": config.parallel.cpu_offload,
        f"float8={config.float8.name}": config.float8.name != "none",
        f"optim.optimizer={config.optim.optimizer}": config.optim.optimizer != "adamw",
    }
    for found, applies in reasons.items():
        if applies:
            raise ConfigError(
                f"{found}, which cannot be rehearsed",
                "ddp, zero1, fsdp, tp, pp, cp or ep with AdamW, in fp32, bf16 or fp16",
                "dry_run=true, which plans without a rehearsal",
            )


def parse_words(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line.

    Raises:
        ConfigError: an unknown option, or no number of ranks.
    """
    parser = CommandParser(prog="python -m gpt.rehearse", description="Rehearse a training step without GPUs.")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks of the run, 1 to 4096")
    parser.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="for the time of a step (8)")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help="GPU of the ranks (H100); empty if unknown")
    parser.add_argument("--gpu-gib", type=float, metavar="X", help="memory of the GPU; by default that of its table")
    parser.add_argument("--run", metavar="FOLDER", help="take the config from a run folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of configs/train.yaml")
    return parser.parse_args(argv)


def settle(words: argparse.Namespace) -> tuple[TrainConfig, Machine | None]:
    """Return the config of the command line, and the hardware of the GPUs that ``--gpu`` names. In the config, a
    precision or a parallelism of ``auto`` is replaced by the choice for these GPUs.

    If ``--gpu`` is empty, the hardware is None.

    Raises:
        ConfigError: the config is invalid, the GPU is not known, or ``--gpu`` is empty with ``parallel=auto``.
    """
    config, folder = parse_request(words).config, RunFolder(Path("rehearsal"))
    known = expand(words.gpu) if words.gpu else []
    if not known and (words.gpu or config.parallel.strategy is Strategy.auto):
        raise ConfigError(f"--gpu {words.gpu or None}", "a GPU of gpt/accounting/accelerators.csv", "--gpu H100")
    name = min(known, key=lambda one: memory_bytes(one) or 0, default="")
    precision = choose_precision(config, folder, False, name)
    config = replace(config, precision=Precision.bf16 if precision is Precision.auto else precision)
    machine = gpus(name, peak_flops(name, config.precision), words.ranks_per_node)
    choice = choose_parallelism(config, words.overrides, folder, words.ranks, lambda: cast(Machine, machine))
    return choice.apply(config), machine


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 if it was refused or the rehearsal has found a fault."""
    words = parse_words(sys.argv[1:] if argv is None else argv)
    config, machine = settle(words)
    torch.set_num_threads(1)
    found = rehearse(config, words.ranks, len(os.sched_getaffinity(0)))
    gpu_bytes, step_s = None, None
    if machine is not None:
        gpu_bytes = memory_bytes(machine.device)
        step_s = estimate(found.config, found.dims, found.batch, machine).step_s
    if words.gpu_gib is not None:
        gpu_bytes = int(words.gpu_gib * GIB)
    found = replace(found, gpu_bytes=gpu_bytes, step_s=step_s)
    print("\n".join(rehearsal_lines(found)), flush=True)
    found.refuse_faults()
    return 0


if __name__ == "__main__":
    sys.exit(main())
