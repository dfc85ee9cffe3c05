"""Environment of an attempt, and writers of step records during a run: the JSONL file of each rank; console,
TensorBoard, CSV, JSON and W&B of rank 0."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import logging
import os
import resource
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from gpt.accounting import GIB, peak_flops, recomputed_flops_per_token, training_flops_per_token, utilization
from gpt.config import Precision, TrainConfig
from gpt.metrics import RunJson
from gpt.parallel.distributed import World
from launch import worker
from launch.errors import duration_text
from launch.runs.compose import plain_config
from launch.runs.environment import cpu_name, describe_place, driver_version, library_versions
from launch.runs.event_files import EventWriter, record_scalars
from launch.runs.folder import RunFolder, say
from launch.runs.records import TOLD_ONCE, StepRecord, read_records

# Environment of one attempt: device and memory of each rank, and versions of the software.
#
# No environment variable is recorded, because some contain secrets (``launch.runs.environment`` lists the reported
# ones).


def describe_rank(world: World) -> dict[str, Any]:
    """Return the description of this rank for ``environment.json``, name -> value: host, process, threads, device, and
    for a GPU its UUID and its memory in GiB."""
    device = world.device
    record = describe_place(world.rank, world.local_rank, world.node) | {
        "pid": os.getpid(),
        "device": str(device),
        "device_name": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        record["device_uuid"] = str(torch.cuda.get_device_properties(device).uuid)
        record["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / GIB
    return record


def software() -> dict[str, str]:
    """Return the versions of Python, of libraries that affect results, and of CUDA, NCCL and the driver if the machine
    has them: name -> version."""
    versions = library_versions()
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        versions["nccl"] = ".".join(str(n) for n in torch.cuda.nccl.version())
    driver = driver_version()
    return versions | ({"nvidia-driver": driver} if driver else {})


def memory_gib(device: torch.device) -> tuple[float | None, float, float | None]:
    """Return three figures in GiB: allocated memory, peak of allocated memory, and reserved memory of ``device``.

    On a GPU these are the current tensors, the peak of the tensors in this attempt, and the memory that the allocator
    keeps. On a CPU the first and the last are None, and the peak is the RAM of the whole process with its libraries.
    """
    if device.type != "cuda":
        # Linux counts ru_maxrss in KiB (getrusage(2)).
        return None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, None
    known = torch.cuda.memory_stats(device)  # one call for all figures, because a call takes a tenth of a millisecond
    return (
        known["allocated_bytes.all.current"] / GIB,
        known["allocated_bytes.all.peak"] / GIB,
        known["reserved_bytes.all.current"] / GIB,
    )


# A view is a copy of a run's step records in another format. A filesystem failure may interrupt a view for a while, but
# never the training.


RETRY_S = 30.0
"""Seconds between two tries to open a ``View`` again after an error. Each try reads all step records of rank 0."""
KEPT_S = 60.0
"""Seconds for which a ``View`` keeps written records in memory. Within this time the records reach the disk, from which
the view can be written again."""

Records = Sequence[dict[str, Any]]


class MetricWriter(Protocol):
    """Interface of a destination of step records, such as a file or a service."""

    def write(self, record: StepRecord) -> None:
        """Write one record; records come in the order of their steps."""

    def close(self) -> None:
        """Finish after the last record."""


class View:
    """A copy of the step records of a run in another format, such as CSV. An inner writer writes the copy. If it raises
    an OSError, training continues: the inner writer is closed, and later opened again.

    Args:
        folder: the run folder.
        name: name of the view, for messages.
        open_writer: function that opens and returns the inner writer. Its arguments are the last step that is done, and
            the records of the steps up to this one, from which it can write a file again.
        step: step after which the attempt continues; 0 at the beginning.
        done: step records of rank 0 up to ``step``.
        retry_s: seconds between two tries to open the inner writer again.
    """

    def __init__(
        self,
        folder: RunFolder,
        name: str,
        open_writer: Callable[[int, Records], MetricWriter],
        step: int,
        done: Records,
        retry_s: float = RETRY_S,
    ) -> None:
        self._folder = folder
        self._name = name
        self._open = open_writer
        self._retry_s = retry_s
        self._writer: MetricWriter | None = None
        self._since = step
        """Last step whose record the view contains."""
        self._tried = 0.0
        self._recent: deque[tuple[float, StepRecord]] = deque()
        """Records of the last ``KEPT_S`` seconds, as pairs of the time at which a record came (time.monotonic, in
        seconds) and the record. While the inner writer is closed after an error, older records are kept, too."""
        try:
            self._writer = open_writer(step, done)
        except OSError as error:
            self._give_up(error)

    def write(self, record: StepRecord) -> None:
        """Write one record, and earlier records that the view lacks after an error. Do nothing if the view already has
        the record."""
        if record.step <= self._since:
            return
        self._recent.append((time.monotonic(), record))
        try:
            if self._writer is not None:
                self._writer.write(record)
                self._since = record.step
                while self._recent[0][0] < self._recent[-1][0] - KEPT_S:
                    self._recent.popleft()
            elif time.monotonic() - self._tried >= self._retry_s:
                self._make_again()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write records that the view lacks after an error, and close the inner writer. An OSError is not raised."""
        try:
            if self._writer is None:
                self._make_again()
            assert self._writer is not None
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _make_again(self) -> None:
        """Open the inner writer again, and write the records that the view lacks: those on the disk, and newer ones
        that are still in memory."""
        self._tried = time.monotonic()
        records = read_records(self._folder.metrics(0))
        last = records[-1]["step"] if records else 0
        records += [record.as_dict() for _, record in self._recent if record.step > last]
        self._writer = self._open(self._since, [record for record in records if record["step"] <= self._since])
        for missed in records:
            if missed["step"] > self._since:
                self._writer.write(StepRecord(**{"loss": None, "grad_norm": None} | missed))
                self._since = missed["step"]

    def _give_up(self, error: OSError) -> None:
        say(f"{self._name}: {error}; training continues, and this is written again from the step records")
        self._tried = time.monotonic()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None


# Console writer of rank 0: one updated line on a terminal, one line every few seconds in a log.


LOG_S = 5.0  # seconds between the lines in a log
REFRESH_S = 0.1  # seconds between updates on a terminal; faster ones cannot be read
CLEAR_LINE = "\r\x1b[2K"


class Console:
    """Writer that prints the records of a run of ``max_steps`` steps.

    On a terminal it updates one line; into a file it prints at most one line every ``LOG_S`` seconds. ``figures`` are
    names of further fields of the records to print. ``stream`` is where the lines are printed; None means standard
    output.
    """

    def __init__(self, max_steps: int, figures: Sequence[str] = (), stream: TextIO | None = None) -> None:
        self._max_steps, self._figures = max_steps, figures
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty()
        self._interval_s = REFRESH_S if self._live else LOG_S
        self._shown = 0.0
        self._open = False
        self._pace_s: float | None = None

    def write(self, record: StepRecord) -> None:
        """Print a record if at least ``REFRESH_S`` (terminal) or ``LOG_S`` (file) seconds have passed since the last
        printed record; always at an evaluation, a checkpoint or the last step."""
        # An average over some twenty steps keeps the remaining time steady.
        self._pace_s = record.step_time_s if self._pace_s is None else 0.95 * self._pace_s + 0.05 * record.step_time_s
        lasting = record.val_loss is not None or record.checkpoint_s is not None or record.step == self._max_steps
        if not lasting and time.monotonic() - self._shown < self._interval_s:
            return
        self._shown = time.monotonic()
        line = console_line(record, self._max_steps, self._pace_s, self._figures)
        if not self._live:
            print(line, file=self._stream, flush=True)
            return
        if not lasting:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be overwritten
        self._stream.write(CLEAR_LINE + line + ("\n" if lasting else ""))
        self._stream.flush()
        self._open = not lasting

    def close(self) -> None:
        """End the line on the terminal."""
        if self._open:
            print(file=self._stream, flush=True)
        self._open = False


def console_line(record: StepRecord, max_steps: int, pace_s: float, figures: Sequence[str] = ()) -> str:
    """Return one record as a line of text.

    Args:
        record: the record.
        max_steps: number of steps of the run.
        pace_s: expected seconds of a step, from which the line gives the remaining time of the run.
        figures: names of further fields to add, if they are known.
    """
    parts = [
        f"step {record.step}/{max_steps}",
        "loss not finite" if record.loss is None else f"loss {record.loss:.4f}",
        f"lr {record.lr:.2e}",
        "skipped" if record.grad_norm is None else f"grad_norm {record.grad_norm:.3f}",
        f"{record.step_time_s * 1000:.0f} ms",
        f"{record.tokens_per_s or 0:,.0f} tokens/s",
    ]
    if record.mfu_palm is not None:
        of_bf16 = "" if record.mfu_bf16 in (None, record.mfu_palm) else f" ({record.mfu_bf16:.1%} of the bf16 peak)"
        parts.append(f"MFU {record.mfu_palm:.1%}{of_bf16}")
    if record.memory_peak_gib is not None:
        parts.append(f"{record.memory_peak_gib:.2f} GiB")
    values = record.as_dict()
    parts += [f"{name} {values[name]:.4g}" for name in figures if name in values]
    if record.step < max_steps:
        parts.append(f"{duration_text(pace_s * (max_steps - record.step))} left")
    if record.val_loss is not None:
        parts.append(f"val_loss {record.val_loss:.4f}")
    if record.val_bits_per_byte is not None:
        parts.append(f"{record.val_bits_per_byte:.4f} bits per byte")
    parts += [f"{name} {value:.4g}" for name, value in (record.tasks or {}).items()]
    if record.checkpoint_s is not None:
        parts.append(f"saved in {record.checkpoint_s:.2f} s")
    return "  ".join(parts)


# File ``steps.csv``: rank 0's records as a table for spreadsheets, one row a step.
#
# Every start rewrites the file from the step records that still count. So a step that was lost in a crash and repeated
# has one row.


LAYER_NORM = "grad_norm/"
"""Beginning of the names of the columns of ``steps.csv`` with gradient norms. The name of the layer follows."""


class StepsCsv:
    """Writer of ``steps.csv``, one row for each step. The first rows are those of ``earlier``, the records of earlier
    attempts. ``layers`` are the names of the layers with gradient norms."""

    def __init__(self, path: Path, layers: Sequence[str], earlier: Iterable[dict[str, Any]]) -> None:
        left_out = ("samples", LAYERS, TOLD_ONCE, "tasks")
        whole = [field.name for field in dataclasses.fields(StepRecord) if field.name not in left_out]
        self._columns = [*whole, "first_sample", "last_sample", *(LAYER_NORM + name for name in layers)]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", buffering=1)  # line by line, so that a reader sees whole rows
        self._writer = csv.DictWriter(self._file, self._columns, extrasaction="ignore", lineterminator="\n")
        self._writer.writeheader()
        for record in earlier:
            self._writer.writerow(row(record))

    def write(self, record: StepRecord) -> None:
        """Write the row of a record. An unknown value is an empty cell."""
        self._writer.writerow(row(record.as_dict()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


LAYERS = "layer_grad_norms"


def row(record: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a record, given as name -> value, in ``steps.csv``: column -> value."""
    cells = {name: value for name, value in record.items() if name not in ("samples", LAYERS)}
    cells["first_sample"], cells["last_sample"] = record["samples"]
    return cells | {LAYER_NORM + name: norm for name, norm in record.get(LAYERS, {}).items()}


# Writer of rank 0's records to Weights & Biases, if the config requests it (the extra ``wandb``).
#
# A repeated step keeps its first values, since the service accepts each step once. Training never depends on the
# service.


log = logging.getLogger(__name__)


class WeightsAndBiases:
    """Writer that sends records to Weights & Biases, under the same names as in TensorBoard. If the service is not
    available, records are dropped with a warning."""

    def __init__(self, folder: RunFolder, config: dict[str, Any]) -> None:
        import wandb

        folder.path.mkdir(parents=True, exist_ok=True)
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "gpt"),
                group=folder.path.parent.name,
                name=folder.point,
                id=folder.tracker_id(),
                resume="allow",
                dir=str(folder.path),
                config=config,
            )
        except (wandb.Error, OSError) as error:
            # A compute node without network, or an unavailable service, must not end the run.
            log.warning("Weights & Biases: %s; training continues without it (WANDB_MODE=offline keeps it here)", error)

    def write(self, record: StepRecord) -> None:
        """Send one record."""
        if self._run is not None:
            self._run.log(record_scalars(record.as_dict()), step=record.step)

    def close(self) -> None:
        """Send the remaining records, and end the run at the service."""
        if self._run is not None:
            self._run.finish()


# All writers of a rank: every rank's JSONL file, and rank 0's views.


SHOWN_S = 0.5
"""Shortest time between two writes to the views, in seconds. Writing several records together needs less CPU time than
one by one, because the code stays in the CPU's caches."""


class MetricWriters:
    """Writes the step records of one rank into the file of this rank. On rank 0 it also writes them into views, such as
    TensorBoard's files. It adds the utilization of the device to each record.

    Args:
        folder: the run folder.
        world: all ranks.
        rank: the launcher's client on this rank, which appends records to the file.
        config: config of the run.
        step: step after which the attempt continues; 0 at the beginning.
        layers: names of the layers with gradient norms.
    """

    def __init__(
        self,
        folder: RunFolder,
        world: World,
        rank: worker.Run,
        config: TrainConfig,
        step: int,
        layers: Sequence[str],
    ) -> None:
        self._rank = rank
        self._world = world
        self._flops = training_flops_per_token(config.model)
        self._recomputed = recomputed_flops_per_token(config.model, config.recompute)
        device = describe_rank(world)["device_name"]
        self._peak = peak_flops(device, config.precision, bool(config.tf32))
        self._bf16_peak = peak_flops(device, Precision.bf16)
        self._folder, self._config, self._layers = folder, config, layers
        # A crash loses the records of steps after the checkpoint. These steps are repeated.
        earlier = read_records(folder.metrics(0)) if rank.attempt > 1 and world.is_first else []
        self._lost: dict[str, Any] | None = earlier[-1] if earlier else None
        self.writers = self._open(step, [r for r in earlier if r["step"] <= step])
        self._unshown: list[StepRecord] = []
        """Records that the file of this rank already has, and the views do not have yet."""
        self._shown = time.monotonic()

    def keep(self, record: StepRecord) -> None:
        """Write a record to disk before the checkpoint of its step is saved. After the save, the caller calls
        ``write``, which writes the record again, now with the time of the save.

        Without this call, the record would be lost if the process died between the save and ``write``: a later attempt
        does not repeat the step.
        """
        self._record(record)
        self._rank.flush()

    def write(self, record: StepRecord) -> None:
        """Add the utilization to a record, and write it into the file of this rank.

        On rank 0 also write the record into the views: at once if the step has an evaluation, otherwise within about
        ``SHOWN_S`` seconds.
        """
        self._record(record)
        if self._lost is not None and record.step > self._lost["step"]:
            down = record.time - self._lost["time"]  # from the last step before an interruption to the first new one
            self._folder.record_event(
                "recovered", attempt=record.attempt, step=record.step, seconds_since_last_step=down
            )
            self._lost = None
        # A step in a checkpoint is not repeated after a crash, so its record must not be lost.
        if record.checkpoint_s is not None:
            self._rank.flush()
        if self.writers:
            self._unshown.append(record)
            if record.val_loss is not None or time.monotonic() - self._shown >= SHOWN_S:
                self.show()

    def show(self) -> None:
        """Bring the views, such as TensorBoard's files, up to date with this rank's records. Only rank 0 has views."""
        unshown, self._unshown = self._unshown, []
        for record in unshown:
            for writer in self.writers:
                writer.write(record)
        self._shown = time.monotonic()

    def go_back(self, step: int) -> None:
        """Delete the records of steps after ``step`` from the views. Call it when the run has rolled back to the
        checkpoint of ``step``."""
        self.close()
        done = [r for r in read_records(self._folder.metrics(0)) if r["step"] <= step] if self.writers else []
        self.writers = self._open(step, done)

    def close(self) -> None:
        """Write all records that are not written yet, and close the views. Call it after the event for the end of the
        attempt."""
        self._rank.flush()
        self.show()
        for writer in self.writers:
            writer.close()

    def _record(self, record: StepRecord) -> None:
        assert record.tokens_per_s is not None
        tokens_per_s = record.tokens_per_s / self._world.size
        used = utilization(self._flops, tokens_per_s, self._peak, self._recomputed)
        record.tflops_per_s = used.tflops_per_s
        record.mfu_palm, record.mfu_causal, record.hfu = used.mfu_palm, used.mfu_causal, used.hfu
        record.mfu_bf16 = utilization(self._flops, tokens_per_s, self._bf16_peak).mfu_palm
        self._rank.record(**(record.as_dict() if self._world.is_first else record.own()))

    def _open(self, step: int, done: Records) -> list[MetricWriter]:
        """Return the views that the config requests, for a run that continues after ``step``; none on ranks other than
        0. ``done`` has the records up to ``step``."""
        if not self._world.is_first:
            return []
        folder, config, layers = self._folder, self._config, self._layers
        views: dict[str, tuple[bool, Callable[[int, Records], MetricWriter]]] = {
            "console": (True, lambda step, done: Console(config.optim.max_steps, config.logging.console)),
            "tensorboard": (
                config.logging.tensorboard,
                lambda step, done: EventWriter(folder.tensorboard, purge_step=step + 1 if step else None),
            ),
            "steps.csv": (True, lambda step, done: StepsCsv(folder.steps_csv, layers, done)),
            "run.json": (True, lambda step, done: RunJson(folder)),
            "wandb": (config.logging.wandb, lambda step, done: WeightsAndBiases(folder, plain_config(config))),
        }
        return [View(folder, name, opens, step, done) for name, (is_on, opens) in views.items() if is_on]
