"""Health of this node's NVIDIA GPUs: whether they answer, uncorrected memory errors, Xid errors, and throttled clocks.

Owns talking to the driver: through nvidia-ml-py where it is installed, else through nvidia-smi, which tells no Xid.
Where there is no driver there is nothing to say. Must not know what follows from a sick GPU. Torch-free.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.runs.hosts import DRIVER, visible_gpus

OF_APPLICATIONS = frozenset({13, 31, 43, 45, 68, 109})
"""Xid errors that a faulty program, or the kill of one, brings about; NVIDIA's own device plugin passes them over."""
THROTTLED = {0x08: "hardware slowdown", 0x40: "too hot", 0x80: "power brake"}
"""Bits of NVML's clocks event reasons that mean a fault. Idle clocks, a power cap and the driver's own care for a warm
GPU (0x01, 0x04, 0x20) are usual after an attempt."""
SMI = ("pci.bus_id", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.active")
"""Fields of nvidia-smi; newer drivers still know the former name of the last."""


class GpuError(RuntimeError):
    """The driver, or a GPU, does not answer."""


@dataclass(frozen=True)
class GpuReading:
    """State of one GPU; None is what it does not tell."""

    bus: str
    """Address on the PCI bus as Linux writes it, such as 0000:3b:00.0."""
    uncorrected: int | None = None
    """Uncorrected memory errors since the driver was loaded."""
    throttled: int = 0
    """Bits of the reasons for which its clocks are lowered."""
    xids: tuple[int, ...] = ()
    """Xid errors since the first reading, those of applications left out."""
    problem: str = ""
    """Error with which it answered instead."""


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


def short_bus(text: str) -> str:
    """Address on the PCI bus as Linux writes it: NVML has eight digits for the domain."""
    domain, _, rest = text.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def own_buses() -> Collection[str]:
    """Addresses of the GPUs of this job; empty where they cannot be told from those of others."""
    known = [gpu.bus for gpu in visible_gpus()]
    return [] if None in known else [bus for bus in known if bus is not None]


@dataclass
class GpuMonitor:
    """Connection to the driver for the life of an agent: Xid errors are only told to who listens meanwhile."""

    driver: Path = DRIVER
    _nvml: Any = None
    _events: Any = None
    _handles: dict[str, Any] = field(default_factory=dict)
    _xids: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def read(self, timeout_s: float) -> list[GpuReading]:
        """Read the GPUs of this job; none where this machine has no NVIDIA driver, or nothing to ask it with.

        Raises:
            GpuError: there is one, and it does not answer.
        """
        if not self.driver.is_dir():
            return []
        with contextlib.suppress(ImportError):
            self._nvml = self._nvml or importlib.import_module("pynvml")
        readings = self._read_by_nvml() if self._nvml is not None else read_by_smi(timeout_s)
        own = own_buses()
        return [reading for reading in readings if not own or reading.bus in own]

    def _read_by_nvml(self) -> list[GpuReading]:
        nvml = self._nvml
        try:
            if self._events is None:
                self._open()
            self._collect_xids()
        except nvml.NVMLError as error:
            raise GpuError(f"the NVIDIA driver does not answer: {error}") from error
        return [self._reading(bus, handle) for bus, handle in self._handles.items()]

    def _open(self) -> None:
        nvml = self._nvml
        nvml.nvmlInit()
        events = nvml.nvmlEventSetCreate()
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
            except nvml.NVMLError_NoPermission:  # of another job
                continue
            bus = nvml.nvmlDeviceGetPciInfo(handle).busId
            self._handles[short_bus(bus.decode() if isinstance(bus, bytes) else bus)] = handle
            with contextlib.suppress(nvml.NVMLError_NotSupported):
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        self._events = events

    def _collect_xids(self) -> None:
        nvml = self._nvml
        while True:
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError_Timeout:  # nothing more has happened
                return
            bus = nvml.nvmlDeviceGetPciInfo(event.device).busId
            if int(event.eventData) not in OF_APPLICATIONS:
                self._xids[short_bus(bus.decode() if isinstance(bus, bytes) else bus)].append(int(event.eventData))

    def _reading(self, bus: str, handle: Any) -> GpuReading:
        nvml = self._nvml
        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons  # its name until driver 535
        errors: int | None = None
        try:
            with contextlib.suppress(nvml.NVMLError_NotSupported):  # a GPU without ECC memory
                uncorrected, volatile = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                errors = int(nvml.nvmlDeviceGetTotalEccErrors(handle, uncorrected, volatile))
            lowered = 0
            with contextlib.suppress(nvml.NVMLError_NotSupported):
                lowered = int(reasons(handle))
        except nvml.NVMLError as error:
            return GpuReading(bus, xids=tuple(self._xids[bus]), problem=f"does not answer: {error}")
        return GpuReading(bus, errors, lowered, tuple(self._xids[bus]))


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
