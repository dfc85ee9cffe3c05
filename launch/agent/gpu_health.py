"""Health of this node's NVIDIA GPUs: whether they answer, uncorrected memory errors, Xid errors, and throttled clocks.

Owns what counts as a fault, and nvidia-smi, which is asked where nvidia-ml-py is not installed and tells no Xid.
Where there is no driver there is nothing to say. Must not know what follows from a sick GPU. Torch-free.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.agent.nvml import GpuError, GpuReading, Nvml, short_bus
from launch.runs.hosts import DRIVER, visible_gpus
from launch.runs.telemetry import THROTTLE_REASONS

THROTTLED = {bit: THROTTLE_REASONS[bit] for bit in (0x08, 0x40, 0x80)}
"""Bits of NVML's clocks event reasons that mean a fault. Idle clocks, a power cap and the driver's own care for a warm
GPU (0x01, 0x04, 0x20) are usual after an attempt."""
SMI = ("pci.bus_id", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.active")
"""Fields of nvidia-smi; newer drivers still know the former name of the last."""


def describe_faults(readings: Sequence[GpuReading], first: Sequence[GpuReading], expected: int | None) -> Iterator[str]:
    """Yield what is wrong with the GPUs of this node.

    Args:
        readings: what they say now.
        first: what they said before the first start of the job here; errors that are older are not the run's.
        expected: how many there should be; None: not known.
    """
    before = {reading.bus: reading.uncorrected or 0 for reading in first}
    answering = [reading for reading in readings if not reading.problem]
    for reading in readings:
        name = f"GPU {reading.bus}"
        if reading.problem:
            yield f"{name}: {reading.problem}"
        if reading.xids:
            yield f"{name}: Xid {', '.join(map(str, reading.xids))} since the first start"
        new = (reading.uncorrected or 0) - before.get(reading.bus, 0)
        if new > 0:
            yield f"{name}: {new} uncorrected memory errors since the first start"
        slow = [text for bit, text in THROTTLED.items() if reading.throttled & bit]
        if slow:
            yield f"{name}: its clocks are lowered ({', '.join(slow)})"
    if expected is not None and len(answering) < expected:
        yield f"{len(answering)} GPUs answer, and cluster.gpus_per_node={expected}"


def own_buses() -> Collection[str]:
    """Addresses of the GPUs of this job; empty where they cannot be told from those of others."""
    known = [gpu.bus for gpu in visible_gpus()]
    return [] if None in known else [bus for bus in known if bus is not None]


@dataclass
class GpuMonitor:
    """Connection to the driver for the life of an agent: Xid errors are only told to who listens meanwhile."""

    driver: Path = DRIVER
    _nvml: Nvml | None = None

    def read(self, timeout_s: float) -> list[GpuReading]:
        """Read the GPUs of this job; none where this machine has no NVIDIA driver, or nothing to ask it with.

        Raises:
            GpuError: there is one, and it does not answer.
        """
        if not self.driver.is_dir():
            return []
        with contextlib.suppress(ImportError):
            self._nvml = self._nvml or Nvml()
        readings = self._nvml.read_health() if self._nvml is not None else read_by_smi(timeout_s)
        own = own_buses()
        return [reading for reading in readings if not own or reading.bus in own]


def read_by_smi(timeout_s: float) -> list[GpuReading]:
    """Read the GPUs through nvidia-smi; none where it is not installed.

    Raises:
        GpuError: it fails, or gives no answer in time.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise GpuError(f"nvidia-smi gave no answer in {timeout_s:g} s") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise GpuError(f"nvidia-smi left with status {done.returncode}: {said[-1] if said else 'no word'}")
    return [_parse_smi(line) for line in done.stdout.splitlines() if line.strip()]


def _parse_smi(line: str) -> GpuReading:
    """One line of nvidia-smi; what a GPU does not have it writes as [N/A]."""
    bus, errors, reasons = (part.strip() for part in line.split(","))
    lost = [part for part in (errors, reasons) if "lost" in part.lower() or "error" in part.lower()]
    if lost:
        return GpuReading(short_bus(bus), problem=f"does not answer: {lost[0]}")
    return GpuReading(
        short_bus(bus),
        uncorrected=int(errors) if errors.isdigit() else None,
        throttled=int(reasons, 16) if reasons.startswith("0x") else 0,
    )
