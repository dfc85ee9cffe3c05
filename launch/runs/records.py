"""Step records: one line per step and rank in ``metrics/rank_*.jsonl``, and the objective that a sweeper minimises."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import ConfigError, closest
from .files import append_lines, append_whole, open_to_append, read_json_lines, say
from .folder import RunFolder

# Step records: one line per step and rank in ``metrics/rank_*.jsonl``. They are the truth; every other view follows.


TAIL_BYTES = 16384
RECENT = 20
"""Number of last steps from which the time of the next steps is estimated."""


@dataclass
class StepRecord:
    """Record of one rank about one optimizer step. What is not known is None and absent from the file, never zero."""

    step: int
    """Steps are counted from 1: record s describes the update that made the weights of step s."""
    attempt: int
    loss: float | None
    """Mean cross-entropy over the global batch, nats per token; the same on every rank. None if it is not finite,
    and the step was skipped."""
    lr: float
    grad_norm: float | None
    """Global gradient norm before clipping; None where the gradients were not finite, and the step was skipped."""
    tokens: int
    """This rank's share of the tokens of this step: over all ranks each counts once, also where several work on it."""
    samples: tuple[int, int]
    """First and last sample index this rank used in this step; ranks that work on the same ones each name them."""
    step_time_s: float
    """Wall time from the end of the previous step (or evaluation, or checkpoint) to the end of this one."""
    loss_variance: float | None = None
    """Variance of the loss over the last 100 steps of the attempt; absent before there are as many."""
    grad_mean: float | None = None
    """Mean over all elements of the gradient before clipping; with the next two only at logging.gradients_interval."""
    grad_std: float | None = None
    layer_grad_norms: dict[str, float] | None = None
    """Gradient norm by layer: ``blocks.0`` and so on, and the parameters outside the blocks."""
    loss_scale: float | None = None
    """Factor of the loss in the backward pass of this step; in fp16 only."""
    skipped_steps: int | None = None
    """Steps up to this one that changed no weights, since loss or gradients were not finite; with a loss scale always,
    else from the first one on."""
    data_wait_s: float | None = None
    """Time the step waited for its samples."""
    forward_backward_s: float | None = None
    """Time of the forward and backward passes, without ``comm_s`` where that is known. This and the next two are by
    the clock of the device where it is a GPU."""
    comm_s: float | None = None
    """Time in which the rank waited for others and nothing was computed: exposed communication."""
    comm_dp_s: float | None = None
    """Its part in the reduction of gradients over replicas, and the like for the next ones; absent for groups that the
    run has not. What is in no group are the waits for all ranks."""
    comm_fsdp_s: float | None = None
    """All-gathers and reduce-scatters of FSDP, with the copies into and out of their buffers."""
    comm_tp_s: float | None = None
    comm_pp_s: float | None = None
    """Sends of a pipeline stage; a receive waits for another stage, which is ``bubble_s``."""
    comm_cp_s: float | None = None
    comm_ep_s: float | None = None
    bubble_s: float | None = None
    """Time in which no stage of this rank had anything to work on: waits for other stages of the pipeline."""
    optimizer_s: float | None = None
    """Time of clipping and of the optimizer."""
    expert_imbalance: float | None = None
    """Load of the busiest expert of any layer above an even share, in even shares; 0 is even; with experts only."""
    breakdown_compute_s: float | None = None
    """Time of this step in which the device computed; this and the next four only at logging.breakdown_interval."""
    breakdown_comm_s: float | None = None
    """Time in which the rank communicated, whether computing hides it or not."""
    breakdown_exposed_s: float | None = None
    """Its part while nothing was computed or copied."""
    breakdown_copies_s: float | None = None
    """Copies of a GPU while nothing was computed."""
    breakdown_idle_s: float | None = None
    """Time in which the device did nothing. With compute, exposed communication and copies it makes the whole step."""
    own_min_s: float | None = None
    """Shortest own time of any rank in a step shortly before: its step time without its waits for others."""
    own_max_s: float | None = None
    slowest_rank: int | None = None
    """Rank that took ``own_max_s``."""
    straggler: str | None = None
    """Ranks that have become slow over some steps, or are so no longer, for people. The event log keeps it."""
    compile_s: float | None = None
    """Time in which torch compiled for this step, a part of its step time; absent where it compiled nothing."""
    val_compile_s: float | None = None
    """Time in which torch compiled in the evaluation after this step."""
    restore_s: float | None = None
    """Time that loading a checkpoint took before this step; only in the first step after it."""
    checkpoint_s: float | None = None
    """Time for which the checkpoint of this step blocked training; only if one was written."""
    val_loss: float | None = None
    """Mean cross-entropy on the validation sequences after this step; only where it was evaluated."""
    val_bits_per_byte: float | None = None
    """Loss in bits per byte of text, which compares tokenizers; only where the text is known."""
    tokens_per_s: float | None = None
    """Throughput of the whole run: tokens of the global batch over step_time_s."""
    tflops_per_s: float | None = None
    """Model TFLOP/s of this rank by the PaLM convention."""
    mfu_palm: float | None = None
    """Share of the device's peak in the precision of the run, by the PaLM convention."""
    mfu_bf16: float | None = None
    """Share of the peak in bf16, whatever the precision, so that runs in two precisions compare."""
    mfu_causal: float | None = None
    hfu: float | None = None
    memory_allocated_gib: float | None = None
    """In tensors on the GPU when the step was queued."""
    memory_peak_gib: float | None = None
    """Peak memory of this attempt: tensors on the GPU, or RAM of the process."""
    memory_reserved_gib: float | None = None
    """Held by torch's allocator on the GPU."""
    time: float = field(default_factory=time.time)
    """Unix time, seconds."""

    def as_dict(self) -> dict[str, Any]:
        """The known fields that are kept in files."""
        # dataclasses.asdict copies each value in depth, and takes ten times as long, in every step for every view.
        return {name: value for name, value in vars(self).items() if value is not None and name != TOLD_ONCE}

    def own(self) -> dict[str, Any]:
        """The known fields that differ between ranks: the record of a rank above 0, half as long as that of rank 0."""
        return {name: value for name, value in self.as_dict().items() if name not in OF_THE_RUN}


TOLD_ONCE = "straggler"
"""Field that is for those who watch the run, and in no file of records: these hold numbers."""
OF_THE_RUN = frozenset(
    {
        *("loss", "loss_variance", "lr", "grad_norm", "grad_mean", "grad_std", "layer_grad_norms", "expert_imbalance"),
        *("val_loss", "val_bits_per_byte", "tokens_per_s", "tflops_per_s", "mfu_causal", "hfu"),
        *("memory_allocated_gib", "memory_reserved_gib", "own_min_s", "own_max_s", "slowest_rank"),
    }
)
"""Fields that only rank 0 writes: figures of the whole run, figures that follow from ``step_time_s``, and memory beside
its peak. With a thousand ranks, every other byte of the records would repeat them."""


UNITS = ("tokens", "samples", "images")
"""Units that throughput may count: a field of this name is a rank's own number in the step."""
FIRST_S = 0.25
"""Until the first record is written; each wait is twice as long as the one before."""
FOLLOWED_S = 5.0
"""Longest wait on rank 0, whose records the launcher shows; so much of them a killed rank loses at most."""
LONGEST_S = 8.0
"""Longest wait on the other ranks, of which there may be thousands on one filesystem."""
KEPT_LINES = 10_000
"""Records that wait for a filesystem that refuses them; older ones are dropped."""


class RecordWriter:
    """Appends the records of one rank to its file, in a thread of its own: a slow filesystem holds up no step.

    The file is opened once. It is not locked: a rank is its only writer, and not every filesystem has locks.

    Args:
        path: the rank's file.
        longest_s: longest time for which records are gathered before they are written together; what a killed process
            loses. The first records come sooner: a run that has just begun is looked at.
    """

    def __init__(self, path: Path, longest_s: float = FOLLOWED_S) -> None:
        self._path = path
        self._longest_s = longest_s
        self._queue: deque[dict[str, Any]] = deque()
        self._lines: deque[bytes] = deque(maxlen=KEPT_LINES)
        self._filled = threading.Event()
        self._writing = threading.Lock()
        self._file = -1
        self._is_told = False
        threading.Thread(target=self._write_on, name="step-records", daemon=True).start()

    def put(self, record: dict[str, Any]) -> None:
        """Queue a record: plain values that belong to the writer from now on."""
        self._queue.append(record)
        if not self._filled.is_set():
            self._filled.set()

    def flush(self) -> None:
        """Write the queued records before this returns."""
        with self._writing:
            while self._queue:
                self._lines.append(json.dumps(self._queue.popleft()).encode() + b"\n")
            try:
                self._write_lines()
            except OSError as error:
                self._give_back()
                if not self._is_told:
                    self._is_told = True
                    say(f"step records of {self._path} are kept in memory, as they cannot be written: {error}")

    def _write_on(self) -> None:
        wait_s = FIRST_S
        while True:
            self._filled.wait()
            time.sleep(min(wait_s, self._longest_s))  # what comes meanwhile goes along
            wait_s = min(2 * wait_s, self._longest_s)
            self._filled.clear()  # before the queue is emptied: a record that comes now wakes this thread again
            self.flush()

    def _write_lines(self) -> None:
        if not self._lines:
            return
        if self._file < 0:
            self._file = open_to_append(self._path)
        append_whole(self._file, b"".join(self._lines))
        if self._is_told:
            self._is_told = False
            say(f"step records of {self._path} are written again, {len(self._lines)} at once")
        self._lines.clear()

    def _give_back(self) -> None:
        """Open the file anew next time, which closes a line that was written in part."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def throughput(record: Mapping[str, Any]) -> tuple[float, str] | None:
    """Units per second of the whole run that a step record tells, and which units; None if it tells none."""
    known = (unit for unit in UNITS if record.get(f"{unit}_per_s") is not None)
    unit = next(known, None)
    return None if unit is None else (float(record[f"{unit}_per_s"]), unit)


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records that hold ``step``, ``attempt``, ``time`` and what else is known to a rank's file, in one go."""
    append_lines(path, records)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of one rank in step order.

    A step that was lost with a crash and done again has two lines; the one of the later attempt counts.
    """
    latest: dict[int, dict[str, Any]] = {}
    for record in read_json_lines(path):
        if not is_record(record):
            continue
        if record["attempt"] >= latest.get(record["step"], record)["attempt"]:
            latest[record["step"]] = record
    return [latest[step] for step in sorted(latest)]


def is_record(value: Mapping[str, Any]) -> bool:
    """Tell a step record from other lines: it names its step and its attempt."""
    return all(isinstance(value.get(name), int) for name in ("step", "attempt"))


def recent_records(path: Path) -> list[dict[str, Any]]:
    """Read the last step records of a rank, without reading the whole file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the first line may be cut, the last one may be half written
            continue
        if isinstance(record, dict) and is_record(record):
            records.append(record)
    return records[-RECENT:]


# The objective of a run: one figure of its step records, by which a sweeper that searches chooses the next points.


class ObjectiveOf(Enum):
    """Value of a run that is its objective: the smallest, the largest or the last."""

    minimum = "minimum"
    maximum = "maximum"
    last = "last"


def objective_value(folder: RunFolder, name: str, of: ObjectiveOf) -> float | None:
    """Return the objective of a run by the step records of its first rank that has them.

    Args:
        folder: of the run.
        name: figure of the records, such as val_loss.
        of: which of its values.

    Returns:
        The value; None where no record has the figure, or none that is finite.
    """
    for rank in folder.metric_ranks():
        found = [record[name] for record in read_records(folder.metrics(rank)) if is_number(record.get(name))]
        if found:
            values = {ObjectiveOf.minimum: min(found), ObjectiveOf.maximum: max(found), ObjectiveOf.last: found[-1]}
            return float(values[of])
    return None


def step_figures() -> tuple[str, ...]:
    """Names of the figures in the step records of a GPT that are one number each."""
    hints = get_type_hints(StepRecord)
    kinds = {name: set(get_args(hint)) or {hint} for name, hint in hints.items()}
    return tuple(
        name for name, found in kinds.items() if found & {float, int} and name not in ("step", "attempt", "samples")
    )


def refuse_unknown_figure(name: str | None, figures: Sequence[str] | None) -> None:
    """Raise ConfigError for an objective that no step will record, before a run is trained for it.

    Args:
        name: figure that was requested; None for none.
        figures: those that the program records; None where only the program knows.
    """
    if name is None or figures is None or name in figures:
        return
    likely = [*closest(name, figures), *(figure for figure in ("val_loss",) if figure in figures)]
    raise ConfigError(
        f"objective={name}, which no step record has",
        f"one figure of the step records: {', '.join(figures)}",
        f"objective={likely[0] if likely else figures[0]}",
    )


def refuse_absent(folder: RunFolder, name: str) -> ConfigError:
    """Return the refusal of an objective that the records of a finished run do not have."""
    there = {
        figure
        for rank in folder.metric_ranks()
        for record in read_records(folder.metrics(rank))
        for figure, value in record.items()
        if is_number(value) and figure not in ("step", "attempt")
    }
    return ConfigError(
        f"objective={name}, and no step record in {folder.path / 'metrics'} has a finite {name}",
        f"one of the figures that the run recorded: {', '.join(sorted(there)) or 'none'}",
        f"objective={(closest(name, there) or sorted(there))[0]}" if there else "the same without objective",
    )


def is_number(value: object) -> bool:
    """Tell a finite number from what else a record may hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
