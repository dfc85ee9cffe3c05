"""GPUs of this node through NVIDIA's management library, and the thread that samples them."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from launch.agent.node import Node
from launch.config import Config
from launch.config.compose import workload_of
from launch.runs.environment import DRIVER, Gpu, GpuSample, append_samples, visible_gpus
from launch.runs.files import say
from launch.runs.folder import RunFolder

# NVIDIA's management library (NVML): health and telemetry of the GPUs of this machine, through nvidia-ml-py.


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
        """Read the gauges of GPUs: address -> gauge of ``launch.runs.environment`` -> value.

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


# GPU telemetry of a node: its agent samples the GPUs of the run while the ranks run, in a thread of its own.


WRITE_S = 30.0
"""Seconds for which samples are kept in memory: what a killed agent loses, and what spares a shared filesystem."""
LAST_SAMPLE_S = 10.0
"""Seconds for which the end of an attempt waits for the last sample."""


class GaugeReader(Protocol):
    """Source of gauges, such as ``Nvml``."""

    def buses(self) -> Sequence[str]:
        """Addresses of the GPUs that this process may open."""

    def read_gauges(self, buses: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
        """Gauges of GPUs, by address."""


def choose_gpus(there: Sequence[str], visible: Sequence[Gpu], ranks: int, is_slurm: bool) -> list[str]:
    """Choose the GPUs whose telemetry is the run's; none where they cannot be told from those of others.

    Args:
        there: addresses of the GPUs that this process may open.
        visible: GPUs that the ranks may use.
        ranks: number of ranks on this node. Outside of Slurm nobody has given the run more GPUs than they take.
        is_slurm: Slurm has given all visible GPUs to the job.
    """
    if not visible:  # the driver lists none, as in a container: those that can be opened, unless they are more
        return list(there) if len(there) <= ranks else []
    own = list(visible) if is_slurm else list(visible)[:ranks]
    if any(gpu.uuid is not None and gpu.uuid.startswith("MIG-") for gpu in own):
        return []  # a slice: power and clocks are those of the whole GPU
    named = [gpu.bus for gpu in own]
    if None not in named:
        return [bus for bus in there if bus in named]
    # Where Slurm hides the GPUs of other jobs, those that can be opened are this job's.
    return list(there) if len(there) == len(own) else []


class Sampler:
    """Thread that takes samples of some GPUs, one every ``interval_s`` seconds, one at the start and one at the end."""

    def __init__(
        self, reader: GaugeReader, choose: Callable[[Sequence[str]], Sequence[str]],
        write: Callable[[list[GpuSample]], None], attempt: int, interval_s: float,
    ) -> None:  # fmt: skip
        """Start sampling.

        Args:
            reader: of the gauges.
            choose: of the GPUs that can be opened, those that are sampled.
            write: writes samples down.
            attempt: which is running.
            interval_s: seconds between two samples.
        """
        self._reader = reader
        self._choose = choose
        self._write = write
        self._attempt = attempt
        self._interval_s = interval_s
        self._host = socket.gethostname()
        self._over = threading.Event()
        self._waiting: list[GpuSample] = []
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take the last sample and write all down; a driver that does not answer is left with its thread."""
        self._over.set()
        self._thread.join(LAST_SAMPLE_S)

    def _run(self) -> None:
        try:
            buses = self._choose(self._reader.buses())
            if buses:
                self._sample_until_over(buses)
        except GpuError as error:
            if DRIVER.is_dir():  # else there is no GPU that could tell anything
                say(f"launch: no GPU telemetry: {error}")
        except OSError as error:
            say(f"launch: GPU telemetry cannot be written: {error}")

    def _sample_until_over(self, buses: Sequence[str]) -> None:
        written = time.monotonic()
        while True:
            is_last = self._over.is_set()
            gauges = self._reader.read_gauges(buses)
            if any(gauges.values()):
                self._waiting.append(GpuSample(time.time(), self._attempt, self._host, gauges))
            if self._waiting and (is_last or time.monotonic() - written >= WRITE_S):
                self._write(self._waiting)
                self._waiting, written = [], time.monotonic()
            if is_last:
                return
            self._over.wait(self._interval_s)


@contextlib.contextmanager
def gpu_telemetry(folder: RunFolder, node: Node, config: Config, attempt: int) -> Iterator[None]:
    """Sample the GPUs of this node in a ``with`` block, as ``launch.gpu_sample_s`` asks; nothing if there are none.

    To be opened when the environment of the ranks is set, which says what GPUs are theirs.
    """
    interval_s = config.launch.gpu_sample_s
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not interval_s or hidden or workload_of(config).computes_on_cpus(config):
        yield
        return
    try:
        reader = Nvml()
    except ImportError:
        if DRIVER.is_dir():
            print("launch: no GPU telemetry: nvidia-ml-py is not installed; pip install '.[gpu]'", file=sys.stderr)
        yield
        return
    visible = visible_gpus(environ=dict(os.environ))
    sampler = Sampler(
        reader,
        lambda there: choose_gpus(there, visible, config.ranks_on_node, node.is_slurm),
        lambda samples: append_samples(folder, node.index, samples),
        attempt,
        interval_s,
    )
    try:
        yield
    finally:
        sampler.close()
