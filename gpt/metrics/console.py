"""Console writer of rank 0: one line that is kept up to date on a terminal, one every few seconds in a log.

Owns the text of the line. Must not know where else records go.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from launch.runs.records import StepRecord

REFRESH_S = 0.1  # on a terminal; no eye follows faster
CLEAR_LINE = "\r\x1b[2K"


class Console:
    """Writer that prints the records of a run of ``max_steps`` steps, in a log at most every ``interval_s`` seconds."""

    def __init__(self, max_steps: int, interval_s: float, stream: TextIO | None = None) -> None:
        self._max_steps = max_steps
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty()
        self._interval_s = REFRESH_S if self._live else interval_s
        self._shown = 0.0
        self._open = False
        self._pace_s: float | None = None

    def write(self, record: StepRecord) -> None:
        """Print ``record`` where it is time, and always at an evaluation, a checkpoint or the last step."""
        # An average over some twenty steps, so that the time left does not jump about.
        self._pace_s = record.step_time_s if self._pace_s is None else 0.95 * self._pace_s + 0.05 * record.step_time_s
        lasting = record.val_loss is not None or record.checkpoint_s is not None or record.step == self._max_steps
        if not lasting and time.monotonic() - self._shown < self._interval_s:
            return
        self._shown = time.monotonic()
        line = console_line(record, self._max_steps, self._pace_s)
        if not self._live:
            print(line, file=self._stream, flush=True)
            return
        if not lasting:
            line = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be taken back
        self._stream.write(CLEAR_LINE + line + ("\n" if lasting else ""))
        self._stream.flush()
        self._open = not lasting

    def close(self) -> None:
        """End the line that is kept up to date."""
        if self._open:
            print(file=self._stream, flush=True)
        self._open = False


def console_line(record: StepRecord, max_steps: int, pace_s: float) -> str:
    """Format one record as a line of text; ``pace_s`` is the expected time of a step, seconds."""
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
    if record.step < max_steps:
        parts.append(f"{format_duration(pace_s * (max_steps - record.step))} left")
    if record.val_loss is not None:
        parts.append(f"val_loss {record.val_loss:.4f}")
    if record.val_bits_per_byte is not None:
        parts.append(f"{record.val_bits_per_byte:.4f} bits per byte")
    if record.checkpoint_s is not None:
        parts.append(f"saved in {record.checkpoint_s:.2f} s")
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Format seconds as 7 s, 7:05, 7:05:03, or days and hours."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60 % 60, whole // 3600
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
