"""Step records, one line for each step and rank in ``metrics/rank_*.jsonl``, and the objective for a sweeper."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import ConfigError, closest
from .folder import RunFolder, append_whole, open_to_append, parse_json_lines, read_json_lines, say

# Step records: one line per step and rank in ``metrics/rank_*.jsonl``. All other views are derived from them.


TAIL_BYTES = 16384
RECENT = 20
"""Number of last steps from which the time of the next steps is estimated."""


@dataclass
class StepRecord:
    """Record of a rank about an optimizer step. An unknown value is None and absent from the file, never zero.

    Fields that end in ``_s`` are times in seconds, unless they end in ``_per_s``.
    """

    step: int
    """Number of the step, from 1: record s describes the update that made the weights of step s."""
    attempt: int
    loss: float | None
    """Mean cross-entropy over the global batch, nats per token; equal on all ranks.

    None if the loss is not finite and the step was skipped.
    """
    lr: float
    """Learning rate of the step."""
    grad_norm: float | None
    """Global gradient norm before clipping; None if the gradients are not finite and the step was skipped."""
    tokens: int
    """This rank's share of the tokens of this step. The sum over ranks counts each token once."""
    samples: tuple[int, int]
    """Indices of this rank's first and last sample of the step, counted through the whole run.

    They are equal on ranks that work on the same samples.
    """
    step_time_s: float
    """Wall time from the end of the previous step (or evaluation, or checkpoint) to the end of this step."""
    loss_variance: float | None = None
    """Variance of the loss over the last 100 steps of the attempt; absent in the first 99 steps."""
    grad_mean: float | None = None
    """Mean over all elements of the gradient before clipping.

    This field and the next two exist only in steps at logging.gradients_interval.
    """
    grad_std: float | None = None
    """Standard deviation over all elements of the gradient."""
    layer_grad_norms: dict[str, float] | None = None
    """Gradient norm by layer: ``blocks.0`` and so on, and the parameters outside the blocks."""
    loss_scale: float | None = None
    """Factor of the loss in the backward pass of this step; in fp16 only."""
    skipped_steps: int | None = None
    """Number of steps so far that were skipped for a non-finite loss or gradient.

    Without a loss scale, None until the first skipped step.
    """
    data_wait_s: float | None = None
    """Time in which the step waited for its samples."""
    forward_backward_s: float | None = None
    """Time of the forward and backward passes, without ``comm_s`` if ``comm_s`` is known.

    A GPU measures the times of phases and communication by its own clock.
    """
    comm_s: float | None = None
    """Exposed communication: time in which the rank waited for other ranks and computed nothing."""
    comm_dp_s: float | None = None
    """Part of ``comm_s`` in the reduction of gradients over replicas.

    The next fields are for other groups of ranks. The field of a group that the run does not have is absent. Waits for
    all ranks of the run are a part of ``comm_s``, but not of these fields.
    """
    comm_fsdp_s: float | None = None
    """Part of ``comm_s`` in all-gathers and reduce-scatters of FSDP, with copies into and out of their buffers."""
    comm_tp_s: float | None = None
    """Part of ``comm_s`` in the groups of tensor parallelism."""
    comm_pp_s: float | None = None
    """Time of the sends of a pipeline stage.

    The time of its receives is in ``bubble_s``, because they wait for another stage.
    """
    comm_cp_s: float | None = None
    """Part of ``comm_s`` in the groups of context parallelism."""
    comm_ep_s: float | None = None
    """Part of ``comm_s`` in the groups of expert parallelism."""
    bubble_s: float | None = None
    """Time in which all stages of this rank waited for other stages of the pipeline."""
    optimizer_s: float | None = None
    """Time of clipping and of the optimizer."""
    expert_imbalance: float | None = None
    """Tokens of the busiest expert in any layer, divided by the mean over the experts of its layer, minus 1.

    0 means an even load. None for a model without experts.
    """
    breakdown_compute_s: float | None = None
    """Time of this step in which the device computed.

    This field and the next four exist only in steps at logging.breakdown_interval.
    """
    breakdown_comm_s: float | None = None
    """Time in which the rank communicated, also while the device computed."""
    breakdown_exposed_s: float | None = None
    """Time in which the rank communicated while the device computed and copied nothing."""
    breakdown_copies_s: float | None = None
    """Time in which a GPU copied data while it computed nothing."""
    breakdown_idle_s: float | None = None
    """Time in which the device was idle. Compute, exposed communication, copies and idle add up to the step time."""
    own_min_s: float | None = None
    """Shortest own time of all ranks in a recent step. The own time is the step time without waits for other ranks."""
    own_max_s: float | None = None
    """Longest own time of all ranks in the step of ``own_min_s``."""
    slowest_rank: int | None = None
    """Rank that took ``own_max_s``."""
    straggler: str | None = None
    """Text about ranks that became slow or are no longer slow. Files of records do not contain it."""
    compile_s: float | None = None
    """Time in which torch compiled for this step, a part of its step time; absent if torch compiled nothing."""
    val_compile_s: float | None = None
    """Time in which torch compiled in the evaluation after this step."""
    restore_s: float | None = None
    """Time of loading a checkpoint before this step; only in the first step after the load."""
    checkpoint_s: float | None = None
    """Time for which the checkpoint of this step blocked training; absent without a checkpoint."""
    val_loss: float | None = None
    """Mean cross-entropy on the validation sequences after this step; absent without an evaluation."""
    val_bits_per_byte: float | None = None
    """Validation loss in bits per byte of text, comparable between tokenizers; absent if the text is not known."""
    tasks: dict[str, float] | None = None
    """Results of ``eval.tasks`` after this step: ``task/metric`` -> value; absent without such an evaluation."""
    tokens_per_s: float | None = None
    """Throughput of the whole run: tokens of the global batch over step_time_s."""
    tflops_per_s: float | None = None
    """Model TFLOP/s of this rank by the PaLM convention."""
    mfu_palm: float | None = None
    """Model FLOPs utilization by the PaLM convention, as a share of the device's peak in the precision of the run."""
    mfu_bf16: float | None = None
    """Model FLOPs utilization as a share of the peak in bf16, whatever the precision of the run.

    Two runs in different precisions can be compared by it.
    """
    mfu_causal: float | None = None
    """Model FLOPs utilization that counts half the FLOPs of attention, because a causal mask makes the rest useless."""
    hfu: float | None = None
    """Hardware FLOPs utilization: recomputed operations count, too."""
    memory_allocated_gib: float | None = None
    """Memory of tensors on the GPU in GiB, when the step was queued; None on CPUs."""
    memory_peak_gib: float | None = None
    """Peak memory of this attempt in GiB: tensors on the GPU, or RAM of the process on CPUs. Set in every record."""
    memory_reserved_gib: float | None = None
    """Memory in GiB that torch's allocator has reserved on the GPU; None on CPUs."""
    time: float = field(default_factory=time.time)
    """Time of the record, Unix seconds."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are written to files of records: field -> value, without fields that are None."""
        # dataclasses.asdict makes deep copies, which takes ten times as long, in every step and for every view.
        return {name: value for name, value in vars(self).items() if value is not None and name != TOLD_ONCE}

    def own(self) -> dict[str, Any]:
        """Return the fields that differ between ranks and are not None: the record of a rank above 0.

        The record is half as long as that of rank 0.
        """
        return {name: value for name, value in self.as_dict().items() if name not in OF_THE_RUN}


TOLD_ONCE = "straggler"
"""Field of a StepRecord with a text, which is printed and shown in TensorBoard.

The files of step records contain only numbers, so this field is not written to them.
"""
OF_THE_RUN = frozenset(
    {
        *("loss", "loss_variance", "lr", "grad_norm", "grad_mean", "grad_std", "layer_grad_norms", "expert_imbalance"),
        *("val_loss", "val_bits_per_byte", "tasks", "tokens_per_s", "tflops_per_s", "mfu_causal", "hfu"),
        *("memory_allocated_gib", "memory_reserved_gib", "own_min_s", "own_max_s", "slowest_rank"),
    }
)
"""Fields that only rank 0 writes: values of the whole run, values derived from ``step_time_s``, and two of memory.

If every rank wrote these fields, the step records of the run would take twice the space.
"""


UNITS = ("tokens", "samples", "images")
"""Units of throughput. A field with such a name counts the units that this rank processed in the step."""
FIRST_S = 0.25
"""Seconds for which a rank collects step records before it writes them to its file for the first time.

Before each later write, it collects records for twice as long as before the last write, up to a longest time.
"""
FOLLOWED_S = 5.0
"""Longest time in seconds for which rank 0 collects records before it writes them.

The launcher shows the records of rank 0, so this time is shorter than that of the ranks above 0 (``LONGEST_S``). A
killed rank loses the records that it has not written.
"""
LONGEST_S = 8.0
"""Longest time in seconds for which a rank above 0 collects records before it writes them.

It is long because thousands of ranks may write to one filesystem.
"""
KEPT_LINES = 10_000
"""Largest number of records that are kept while they cannot be written; older records are dropped."""


class RecordWriter:
    """Writer of the records of a rank, in a thread, so that a slow filesystem delays no step.

    The file is opened once. It is not locked, because the rank is its only writer and some filesystems have no locks.

    Args:
        path: file of the rank.
        longest_s: longest time in seconds for which records are collected before they are written together. A killed
            process loses them. The first records are written sooner, because people watch the start of a run.
    """

    def __init__(self, path: Path, longest_s: float = FOLLOWED_S) -> None:
        self._path = path
        self._longest_s = longest_s
        self._queue: deque[dict[str, Any]] = deque()
        self._lines: deque[bytes] = deque(maxlen=KEPT_LINES)
        self._filled = threading.Event()
        self._writing = threading.Lock()
        self._file = -1
        self._is_failing = False
        threading.Thread(target=self._write_on, name="step-records", daemon=True).start()

    def put(self, record: dict[str, Any]) -> None:
        """Queue a record of values that JSON can hold. The caller must not change ``record`` later."""
        self._queue.append(record)
        if not self._filled.is_set():
            self._filled.set()

    def flush(self) -> None:
        """Write the queued records now. If they cannot be written, keep them in memory for the next time."""
        with self._writing:
            while self._queue:
                self._lines.append(json.dumps(self._queue.popleft()).encode() + b"\n")
            try:
                if self._lines:
                    if self._file < 0:
                        self._file = open_to_append(self._path)
                    append_whole(self._file, b"".join(self._lines))
                if self._is_failing:
                    self._is_failing = False
                    say(f"step records of {self._path} are written again, {len(self._lines)} at once")
                self._lines.clear()
            except OSError as error:
                if self._file >= 0:  # the next time the file is opened again, which ends a line that is partly written
                    os.close(self._file)
                    self._file = -1
                if not self._is_failing:
                    self._is_failing = True
                    say(f"step records of {self._path} are kept in memory, as they cannot be written: {error}")

    def _write_on(self) -> None:
        wait_s = FIRST_S
        while True:
            self._filled.wait()
            time.sleep(min(wait_s, self._longest_s))  # collects more records
            wait_s = min(2 * wait_s, self._longest_s)
            self._filled.clear()  # before the flush: a record that comes now wakes this thread again
            self.flush()


def throughput(record: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return (units per second of the whole run, unit) of a step record; None if the record has no throughput."""
    known = (unit for unit in UNITS if record.get(f"{unit}_per_s") is not None)
    unit = next(known, None)
    return None if unit is None else (float(record[f"{unit}_per_s"]), unit)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a rank in the order of steps.

    A step that was lost in a crash and made again has two lines. Only the line of the later attempt is returned. Of
    several lines of one attempt, the last is returned. Empty if the file ``path`` does not exist.
    """
    latest: dict[int, dict[str, Any]] = {}
    for record in read_json_lines(path):
        if not is_record(record):
            continue
        if record["attempt"] >= latest.get(record["step"], record)["attempt"]:
            latest[record["step"]] = record
    return [latest[step] for step in sorted(latest)]


def is_record(value: Mapping[str, Any]) -> bool:
    """Return whether the object in a line is a step record: it has a step and an attempt."""
    return all(isinstance(value.get(name), int) for name in ("step", "attempt"))


def recent_records(path: Path) -> list[dict[str, Any]]:
    """Return the last step records of a rank, at most ``RECENT``, without reading the whole file ``path``.

    Empty if the file does not exist.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Skips a first line that is cut, and a last line that is half written.
    return [record for record in parse_json_lines(lines) if is_record(record)][-RECENT:]


# Objective of a run: a figure of its step records, from which a sweeper that searches chooses the next points.


class ObjectiveOf(Enum):
    """Which value of a field of the step records is the objective: the smallest, largest or last of all steps."""

    minimum = "minimum"
    maximum = "maximum"
    last = "last"


def objective_value(folder: RunFolder, name: str, of: ObjectiveOf) -> float | None:
    """Return the objective of a run, from the step records of the lowest rank whose records have the field.

    Args:
        folder: folder of the run.
        name: field of the step records, such as ``val_loss``.
        of: which of the values of all steps is returned: the smallest, largest or last.

    Returns:
        The value; None if no record has a finite value.
    """
    for rank in folder.metric_ranks():
        found = [record[name] for record in read_records(folder.metrics(rank)) if is_number(record.get(name))]
        if found:
            values = {ObjectiveOf.minimum: min(found), ObjectiveOf.maximum: max(found), ObjectiveOf.last: found[-1]}
            return float(values[of])
    return None


def step_figures() -> tuple[str, ...]:
    """Return the names of the fields in step records of ``gpt`` that are single numbers: the possible objectives."""
    hints = get_type_hints(StepRecord)
    kinds = {name: set(get_args(hint)) or {hint} for name, hint in hints.items()}
    return tuple(
        name for name, found in kinds.items() if found & {float, int} and name not in ("step", "attempt", "samples")
    )


def refuse_unknown_figure(name: str | None, figures: Sequence[str] | None, typed: str = "objective={}") -> None:
    """Raise ConfigError, before the run is trained, if no step record will have the field ``name``.

    Args:
        name: requested field of the step records; None without an objective.
        figures: fields that the program records; None if only the program knows them.
        typed: override to show in the error message, with ``{}`` in place of the name.
    """
    if name is None or figures is None or name in figures:
        return
    raise ConfigError(
        f"{typed.format(name)}, which no step record has",
        f"one figure of the step records: {', '.join(figures)}",
        typed.format((closest(name, figures) or figures)[0]),
    )


def refuse_absent(folder: RunFolder, name: str) -> ConfigError:
    """Return the ConfigError for an objective that the records of a finished run do not have."""
    records = [record for rank in folder.metric_ranks() for record in read_records(folder.metrics(rank))]
    there = {name for record in records for name, value in record.items() if is_number(value)} - {"step", "attempt"}
    return ConfigError(
        f"objective={name}, and no step record in {folder.path / 'metrics'} has a finite {name}",
        f"one of the figures that the run recorded: {', '.join(sorted(there)) or 'none'}",
        "objective=FIGURE with one of these, or the same without objective",
    )


def is_number(value: object) -> bool:
    """Return whether a value of a record is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
