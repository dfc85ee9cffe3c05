"""NVIDIA's management library (NVML): health and telemetry of the GPUs of this machine, through nvidia-ml-py.

Owns every call of that library, its error classes and its units. Names of functions that changed are tried one after
another, as the driver of a machine and the package need not be of one age. Must not know what follows from a reading.
Torch-free.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

OF_APPLICATIONS = frozenset({13, 31, 43, 45, 68, 109})
"""Xid errors that a faulty program, or the kill of one, brings about; NVIDIA's own device plugin passes them over."""
REASONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
"""Function that tells why clocks are lowered, and its name until driver 535."""
TEMPERATURE = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature")
"""Function that tells the temperature, and its name until driver 570."""


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


def short_bus(text: str) -> str:
    """Address on the PCI bus as Linux writes it: NVML has eight digits for the domain."""
    domain, _, rest = text.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


class Nvml:
    """One connection to the library. Not for several threads at once."""

    def __init__(self) -> None:
        """Load nvidia-ml-py, and ask nothing yet.

        Raises:
            ImportError: it is not installed.
        """
        self._nvml: Any = importlib.import_module("pynvml")
        self._handles: dict[str, Any] = {}
        self._is_open = False
        self._events: Any = None
        self._xids: dict[str, list[int]] = defaultdict(list)

    def read_health(self) -> list[GpuReading]:
        """Read the state of all GPUs that this process may open. Xid errors are those since the first call.

        Raises:
            GpuError: the driver does not answer.
        """
        handles = self._open_or_fail()
        try:
            if self._events is None:
                self._listen(handles)
            self._collect_xids()
        except self._nvml.NVMLError as error:
            raise GpuError(f"the NVIDIA driver does not answer: {error}") from error
        return [self._reading(bus, handle) for bus, handle in handles.items()]

    def buses(self) -> list[str]:
        """Addresses of the GPUs that this process may open.

        Raises:
            GpuError: the driver does not answer.
        """
        return list(self._open_or_fail())

    def read_gauges(self, buses: Collection[str]) -> dict[str, dict[str, float]]:
        """Read the gauges of GPUs: address -> gauge of ``launch.runs.telemetry`` -> value.

        A gauge that a GPU does not have, or that does not answer now, is absent.

        Raises:
            GpuError: the driver does not answer.
        """
        nvml, handles = self._nvml, {bus: handle for bus, handle in self._open_or_fail().items() if bus in buses}
        found = {}
        for bus, handle in handles.items():
            told = {
                "power_w": _scaled(self._ask(("nvmlDeviceGetPowerUsage",), handle), 1e3),  # milliwatts
                # Millijoules since the driver was loaded; from Volta on.
                "energy_j": _scaled(self._ask(("nvmlDeviceGetTotalEnergyConsumption",), handle), 1e3),
                "sm_clock_mhz": self._ask(("nvmlDeviceGetClockInfo",), handle, nvml.NVML_CLOCK_SM),
                "memory_clock_mhz": self._ask(("nvmlDeviceGetClockInfo",), handle, nvml.NVML_CLOCK_MEM),
                "temperature_c": self._ask(TEMPERATURE, handle, nvml.NVML_TEMPERATURE_GPU),
                "throttle_reasons": self._ask(REASONS, handle),
            }
            found[bus] = {name: value for name, value in told.items() if value is not None}
        return found

    def _open_or_fail(self) -> Mapping[str, Any]:
        try:
            return self._open()
        except self._nvml.NVMLError as error:
            raise GpuError(f"the NVIDIA driver does not answer: {error}") from error

    def _open(self) -> Mapping[str, Any]:
        """Return the GPUs that this process may open, address -> handle."""
        nvml = self._nvml
        if not self._is_open:
            nvml.nvmlInit()
            for index in range(nvml.nvmlDeviceGetCount()):
                try:
                    handle = nvml.nvmlDeviceGetHandleByIndex(index)
                except nvml.NVMLError_NoPermission:  # of another job
                    continue
                self._handles[self._bus(handle)] = handle
            self._is_open = True
        return self._handles

    def _bus(self, handle: Any) -> str:
        bus = self._nvml.nvmlDeviceGetPciInfo(handle).busId
        return short_bus(bus.decode() if isinstance(bus, bytes) else bus)

    def _listen(self, handles: Mapping[str, Any]) -> None:
        """Have the driver keep Xid errors for this process."""
        nvml = self._nvml
        events = nvml.nvmlEventSetCreate()
        for handle in handles.values():
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
            if int(event.eventData) not in OF_APPLICATIONS:
                self._xids[self._bus(event.device)].append(int(event.eventData))

    def _reading(self, bus: str, handle: Any) -> GpuReading:
        nvml = self._nvml
        kinds = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        xids = tuple(self._xids[bus])
        try:
            errors = self._first(("nvmlDeviceGetTotalEccErrors",), handle, *kinds)  # None: a GPU without ECC memory
            lowered = self._first(REASONS, handle)
        except nvml.NVMLError as error:
            return GpuReading(bus, xids=xids, problem=f"does not answer: {error}")
        return GpuReading(bus, errors, lowered or 0, xids)

    def _ask(self, names: tuple[str, ...], *args: Any) -> int | None:
        """As ``_first``; None too where the GPU answers with an error now."""
        try:
            return self._first(names, *args)
        except self._nvml.NVMLError:
            return None

    def _first(self, names: tuple[str, ...], *args: Any) -> int | None:
        """Call the first of several functions that package and driver know; None where the GPU has no such thing."""
        nvml = self._nvml
        for name in names:
            function = getattr(nvml, name, None)
            if function is None:
                continue
            try:
                return int(function(*args))
            except nvml.NVMLError_FunctionNotFound:  # of a newer driver
                continue
            except nvml.NVMLError_NotSupported:
                return None
        return None


def _scaled(value: int | None, by: float) -> float | None:
    return None if value is None else value / by
