"""TensorBoard event files: the names of the curves, and a writer of scalars, texts, images and chart layouts.

A table maps the fields of a step record to tags, so that all runs show the same curves under the same names. The
event files are a view of the step records. The writer and the messages are tensorboard's own, because torch's
SummaryWriter loads torch, and tensorboard's functions for texts, layouts and settings load TensorFlow.
"""

from __future__ import annotations

import os
import struct
import time as clock
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from launch.runs.records import UNITS, StepRecord

GROUPS = {
    "train": "loss loss_variance lr grad_norm loss_scale skipped_steps expert_imbalance",
    "gradients": "grad_mean grad_std",
    "eval": "val_loss val_bits_per_byte",
    "speed": (
        "tokens_per_s step_time_s data_wait_s forward_backward_s bubble_s optimizer_s comm_s comm_dp_s comm_fsdp_s "
        "comm_tp_s comm_pp_s comm_cp_s comm_ep_s own_min_s own_max_s slowest_rank compile_s val_compile_s restore_s "
        "checkpoint_s"
    ),
    "breakdown": "breakdown_compute_s breakdown_comm_s breakdown_exposed_s breakdown_copies_s breakdown_idle_s",
    "efficiency": "tflops_per_s mfu_palm mfu_bf16 mfu_causal hfu",
    "memory": "memory_allocated_gib memory_peak_gib memory_reserved_gib",
}
"""Group of curves in TensorBoard -> names of the fields of step records that it shows, separated by blanks."""
PREFIXES = {"gradients": "grad_", "eval": "val_", "breakdown": "breakdown_", "memory": "memory_"}
"""Group of TensorBoard -> prefix of its field names, which the tags leave out."""
TAGS = {
    name: f"{group}/{name.removeprefix(PREFIXES.get(group, ''))}"
    for group, names in GROUPS.items()
    for name in names.split()
}
"""Field of a step record -> tag of its curve in TensorBoard."""

STRAGGLERS_TAG = "stragglers"
"""Tag of the texts that name slow ranks."""
LAYER_TAG = "gradients/norm/"
"""Prefix of the tag of a layer's gradient norm."""

FLUSH_S = 10
"""Longest time until an event is on disk, seconds."""


class Curve(NamedTuple):
    """Tag of a curve in a chart of TensorBoard's Custom Scalars tab, and the tags of the band around the curve.

    ``lower`` and ``upper`` are None for a curve without a band.
    """

    value: str
    lower: str | None = None
    upper: str | None = None


OF_THE_STEP = frozenset({"step", "attempt", "time", *UNITS, "work"})
"""Fields of a step record that are not curves: number, time and amount of work of the step."""


def record_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a step record for TensorBoard: tag of the curve -> value.

    The program's own numbers, such as ``accuracy``, are in the group ``train``, and its rates in ``speed``.
    """
    scalars = {tag: float(record[name]) for name, tag in TAGS.items() if record.get(name) is not None}
    for name in record.keys() - TAGS.keys() - OF_THE_STEP:
        if isinstance(record[name], int | float):
            scalars[f"{'speed' if name.endswith('_per_s') else 'train'}/{name}"] = float(record[name])
    scalars |= {f"eval/{name}": value for name, value in (record.get("tasks") or {}).items()}
    return scalars | {LAYER_TAG + layer: norm for layer, norm in (record.get("layer_grad_norms") or {}).items()}


class EventWriter:
    """Writer of an event file in ``folder``. TensorBoard reads all files of a folder as one run, in time order.

    Args:
        folder: folder of the file, which TensorBoard shows as a run.
        purge_step: first step of this file, if the run resumes. TensorBoard drops the points that earlier files of the
            folder have from this step on, because these steps were lost in a crash and are made again. With None,
            TensorBoard drops all points of the earlier files.
        suffix: end of the file's name.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        purge_step: int | None = None,
        suffix: str = "",
    ) -> None:
        self._writer = EventFileWriter(str(Path(folder)), flush_secs=FLUSH_S, filename_suffix=suffix)
        # Every file begins with this message. TensorBoard begins a run at the first such message, and drops points at
        # each later one.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(wall_time=clock.time(), step=purge_step or 0, session_log=start))

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scalar(self, tag: str, value: float, step: int, time: float | None = None) -> None:
        """Add one point to the curve ``tag``. ``time`` is Unix seconds, now by default."""
        self._add([summary_pb2.Summary.Value(tag=tag, simple_value=value)], step, time)

    def write(self, record: StepRecord) -> None:
        """Add one point to each curve of a step record, and its text about slow ranks."""
        scalars = record_scalars(record.as_dict()).items()
        values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars]
        # One event for all: each event wakes tensorboard's thread, which competes with the training for Python's lock.
        self._add(values, record.step, record.time)
        if record.straggler is not None:
            self.text(STRAGGLERS_TAG, record.straggler, record.step)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Add a text in Markdown under the name ``tag``."""
        metadata = text_metadata.create_summary_metadata(display_name=None, description=None)
        self._add([_string_value(tag, markdown.encode(), metadata)], step)

    def image(self, tag: str, png: bytes, step: int = 0) -> None:
        """Add a picture under the name ``tag``. ``png`` is the content of a PNG file."""
        width, height = struct.unpack(">II", png[16:24])  # in the first chunk (PNG specification, 11.2.1)
        image = summary_pb2.Summary.Image(height=height, width=width, encoded_image_string=png)
        self._add([summary_pb2.Summary.Value(tag=tag, image=image)], step)

    def layout(self, categories: Mapping[str, Mapping[str, Curve]]) -> None:
        """Set the charts of the Custom Scalars tab. ``categories`` is category -> title of a chart -> curve.

        All charts are margin charts: TensorBoard smooths line charts by default, which falsifies curves of a few
        points. Each chart has only one curve. If a chart had two curves, TensorBoard would print an error for every
        run that lacks these curves.
        """
        layout = layout_pb2.Layout()
        for title, charts in categories.items():
            category = layout.category.add(title=title)
            for name, curve in reversed(list(charts.items())):  # TensorBoard (2.21) shows charts in reverse order
                series = category.chart.add(title=name).margin.series.add(value=curve.value)
                series.lower, series.upper = curve.lower or curve.value, curve.upper or curve.value
        metadata = custom_scalar_metadata.create_summary_metadata()
        tag = custom_scalar_metadata.CONFIG_SUMMARY_TAG
        self._add([_string_value(tag, layout.SerializeToString(), metadata)], step=0)

    def close(self) -> None:
        """Flush and close the file. May be called several times."""
        self._writer.close()

    def _add(self, values: Sequence[summary_pb2.Summary.Value], step: int, time: float | None = None) -> None:
        event = event_pb2.Event(wall_time=clock.time() if time is None else time, step=step)
        event.summary.value.extend(values)
        self._writer.add_event(event)


def _string_value(tag: str, text: bytes, metadata: summary_pb2.SummaryMetadata) -> summary_pb2.Summary.Value:
    """Return a summary with one string, the format that TensorBoard's plugins for texts and layouts read.

    ``metadata`` names the plugin.
    """
    shape = tensor_shape_pb2.TensorShapeProto()
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text], tensor_shape=shape)
    return summary_pb2.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
