"""Health checks of a node before its ranks start (GPUs, links, disks, a command of the site), and GPU telemetry."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from launch.agent.node import RunContext
from launch.config import ResilienceConfig
from launch.config.compose import workload_of
from launch.runs.environment import DRIVER, THROTTLE_REASONS, Gpu, GpuSample, append_samples, visible_gpus
from launch.runs.folder import say

# NVIDIA GPUs of this machine, through NVIDIA's management library (NVML, in the package nvidia-ml-py).


OF_APPLICATIONS = frozenset({13, 31, 43, 45, 68, 109})
"""Xid errors that a faulty or killed program causes. NVIDIA's own device plugin ignores them too."""
GAUGES: Mapping[str, tuple[str, float, Sequence[str]]] = {
    "power_w": ("nvmlDeviceGetPowerUsage", 1e3, []),  # milliwatts
    "energy_j": ("nvmlDeviceGetTotalEnergyConsumption", 1e3, []),  # since the driver was loaded; from Volta on
    "sm_clock_mhz": ("nvmlDeviceGetClockInfo", 1, ["NVML_CLOCK_SM"]),
    "memory_clock_mhz": ("nvmlDeviceGetClockInfo", 1, ["NVML_CLOCK_MEM"]),
    "temperature_c": ("nvmlDeviceGetTemperature", 1, ["NVML_TEMPERATURE_GPU"]),
    "throttle_reasons": ("nvmlDeviceGetCurrentClocksThrottleReasons", 1, []),
}
"""Gauge of ``launch.runs.environment`` -> function of NVML, divisor, and names of NVML's constants.

The constants are arguments of the function. The divisor gives the unit in the gauge's name. Drivers from 535 on have
these functions, and newer drivers keep the names.
"""


class GpuError(RuntimeError):
    """Raised if the driver or a GPU does not answer."""


@dataclass(frozen=True)
class GpuReading:
    """State of one GPU. None means that the GPU does not report the value."""

    bus: str
    """Address on the PCI bus in the notation of Linux, such as 0000:3b:00.0."""
    uncorrected: int | None = None
    """Number of uncorrected memory errors since the driver was loaded."""
    throttled: int = 0
    """Bit mask of the reasons for which the GPU's clocks are lowered."""
    xids: tuple[int, ...] = ()
    """Numbers of the Xid errors since the first reading, without the errors in ``OF_APPLICATIONS``."""
    problem: str = ""
    """Error that the GPU returned instead of its state; empty if there was none."""
    used: int = 0
    """Memory in use, bytes, of all processes together; 0 if the GPU does not report it."""
    users: tuple[int, ...] = ()
    """Ids of the processes that compute on the GPU. In a container, the ids are those of the host, or the tuple is
    empty.
    """
    is_persistent: bool = True
    """False if the driver unloads its state whenever no process uses the GPU."""


class Nvml:
    """One connection to NVML, for one thread. Raises ImportError if nvidia-ml-py is not installed."""

    def __init__(self) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._gpus: dict[str, Any] | None = None
        self._events: Any = None
        self._xids: dict[str, list[int]] = defaultdict(list)

    def read_health(self) -> list[GpuReading]:
        """Read the state of all GPUs that this process may open. The Xid errors are those since the first call.

        Raises:
            GpuError: the driver does not answer.
        """
        with self._answering() as gpus:
            self._collect_xids(gpus)
            return [self._read(bus, handle) for bus, handle in gpus.items()]

    def buses(self) -> list[str]:
        """Return the PCI addresses of the GPUs that this process may open.

        Raises:
            GpuError: the driver does not answer.
        """
        with self._answering() as gpus:
            return list(gpus)

    def read_gauges(self, buses: Collection[str]) -> dict[str, dict[str, float]]:
        """Return the current gauges of the GPUs with the PCI addresses ``buses``: PCI address -> gauge -> value.

        A gauge without a value is absent, and so is a GPU that this process may not open.

        The name of a gauge ends with its unit, such as ``power_w`` in watts. ``throttle_reasons`` is a bit mask.

        Raises:
            GpuError: the driver does not answer.
        """
        found: dict[str, dict[str, float]] = {}
        with self._answering() as gpus:
            for bus in [bus for bus in gpus if bus in buses]:
                found[bus] = {}
                for gauge, (function, divisor, constants) in GAUGES.items():
                    with suppress(self._nvml.NVMLError):
                        value = self._call(function, gpus[bus], *constants)
                        if value is not None:
                            found[bus][gauge] = value / divisor
        return found

    @contextmanager
    def _answering(self) -> Iterator[Mapping[str, Any]]:
        """Yield the GPUs that this process may open: PCI address -> handle of NVML.

        Turns an error of the driver into GpuError.
        """
        nvml = self._nvml
        try:
            if self._gpus is None:
                nvml.nvmlInit()
                gpus = {}
                for index in range(nvml.nvmlDeviceGetCount()):
                    with suppress(nvml.NVMLError_NoPermission):  # This GPU belongs to another job.
                        handle = nvml.nvmlDeviceGetHandleByIndex(index)
                        gpus[self._bus(handle)] = handle
                self._gpus = gpus
            yield self._gpus
        except nvml.NVMLError as error:
            raise GpuError(f"the NVIDIA driver does not answer: {error}") from error

    def _bus(self, handle: Any) -> str:
        """Return the PCI address of a GPU in the notation of Linux, such as ``0000:3b:00.0``.

        NVML writes the domain with eight digits, Linux with four.
        """
        bus = self._nvml.nvmlDeviceGetPciInfo(handle).busId
        domain, _, rest = (bus.decode() if isinstance(bus, bytes) else bus).lower().partition(":")
        return f"{domain[-4:]}:{rest}"

    def _collect_xids(self, gpus: Mapping[str, Any]) -> None:
        """Collect the Xid errors that the driver has kept for this process since the first call."""
        nvml = self._nvml
        if self._events is None:
            self._events = nvml.nvmlEventSetCreate()
            for handle in gpus.values():
                with suppress(nvml.NVMLError_NotSupported):
                    nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, self._events)
        with suppress(nvml.NVMLError_Timeout):  # The driver has no further error.
            while True:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
                if int(event.eventData) not in OF_APPLICATIONS:
                    self._xids[self._bus(event.device)].append(int(event.eventData))

    def _read(self, bus: str, handle: Any) -> GpuReading:
        xids = tuple(self._xids[bus])
        kind = "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_VOLATILE_ECC"
        try:
            # None: a GPU without ECC memory.
            errors = self._call("nvmlDeviceGetTotalEccErrors", handle, *kind)
            throttled = self._call(GAUGES["throttle_reasons"][0], handle)
        except self._nvml.NVMLError as error:
            return GpuReading(bus, xids=xids, problem=f"does not answer: {error}")
        used, users, persistent = 0, tuple[int, ...](), True
        with suppress(self._nvml.NVMLError):
            persistent = bool(self._nvml.nvmlDeviceGetPersistenceMode(handle))
            used = int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
            users = tuple(int(one.pid) for one in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return GpuReading(bus, errors, throttled or 0, xids, "", used, users, persistent)

    def _call(self, function: str, handle: Any, *constants: str) -> int | None:
        """Return the value of a function of NVML for a GPU; None if the GPU or the driver does not have the value.

        ``handle`` is NVML's handle of the GPU. ``constants`` are names of NVML's constants, which follow as arguments.
        """
        nvml = self._nvml
        try:
            return int(getattr(nvml, function)(handle, *(getattr(nvml, name) for name in constants)))
        except (nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NotSupported):
            return None


THROTTLED = {bit: THROTTLE_REASONS[bit] for bit in (0x08, 0x40, 0x80)}
"""Bits of NVML's clocks event reasons that mean a fault -> text for people.

Three reasons are normal after an attempt: idle clocks, a power cap, and the driver's protection of a warm GPU (0x01,
0x04, 0x20).
"""


def describe_faults(readings: Sequence[GpuReading], first: Sequence[GpuReading], expected: int | None) -> Iterator[str]:
    """Yield a sentence for each fault of the GPUs of this node.

    Faults are errors, lowered clocks, memory that is not freed, and too few GPUs.

    Args:
        readings: state of each GPU now.
        first: state of each GPU before the first start of the job on this node. Older errors do not count.
        expected: number of GPUs of a node; None if not known.
    """
    before = {reading.bus: reading.uncorrected or 0 for reading in first}
    kept = {reading.bus: reading for reading in keeping_memory(readings, first)}
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
        if reading.bus in kept:
            held = f"{reading.used / GIB:.1f} GiB are in use {MEMORY_WAIT_S:g} s after the ranks have ended"
            yield f"{name}: {held}, by {', '.join(f'process {pid}' for pid in reading.users) or 'no known process'}"
    answering = sum(not reading.problem for reading in readings)
    if expected is not None and answering < expected:
        yield f"{answering} GPUs answer, and cluster.gpus_per_node={expected}"


def keeping_memory(readings: Sequence[GpuReading], first: Sequence[GpuReading]) -> list[GpuReading]:
    """Return the readings of the GPUs whose memory is not free again after the ranks have ended.

    Such a GPU has more than ``SLACK`` bytes more in use than in ``first``, its reading before the first start.
    """
    before = {reading.bus: reading.used for reading in first}
    return [one for one in readings if one.used > before.get(one.bus, one.used) + SLACK]


# The health check of a node.


SYS = Path("/sys/class")
MIB, GIB = 2**20, 2**30
SLACK = GIB
"""Bytes by which the memory in use on a GPU may grow between two starts without a fault.

Other programs may use this much.
"""
MEMORY_WAIT_S, MEMORY_POLL_S = 50.0, 0.2
"""Longest wait until GPUs have freed the memory of ended ranks, and the time between two readings, in seconds."""
LONGEST = 200
"""Maximum number of characters that are kept of the last output line of the site's command."""
CHECK_TIMEOUT_S = 60.0
"""Seconds after which a check without an answer means a sick node. The site's own command has the same limit."""
MIN_FREE_MIB = 4.0
"""Free space in MiB below which a filesystem counts as full."""
RUN_FOLDER = "run folder"
"""Name of the check of the run folder. All nodes share this folder, so all nodes have the same fault."""


class Fault(msgspec.Struct, frozen=True):
    """One fault of this node that a health check has found."""

    part: str
    """Part that was checked: gpu, link, disk, run folder or command."""
    found: str


class HealthCheck:
    """The health checks of one node, as one object for the life of the agent.

    The object keeps the state of the node at the first check, and compares the later states with it.

    Args:
        run_dir: folder of the run, whose filesystem needs free space.
        limits: the config ``resilience``.
        gpus: number of GPUs that a node of the run should have; None if not known.
    """

    def __init__(self, run_dir: Path, limits: ResilienceConfig, gpus: int | None) -> None:
        self._limits = limits
        self._gpus = gpus
        self._nvml: Nvml | None = None
        self.first: list[GpuReading] | None = None
        """State of this job's GPUs at the first check; None before the first check, or without an NVIDIA driver."""
        self._first_up: set[str] | None = None
        own = [path for path in (Path(tempfile.gettempdir()), Path("/dev/shm")) if path.is_dir()]
        self._checks: Mapping[str, Callable[[], Iterator[str]]] = {
            RUN_FOLDER: lambda: full_disks([run_dir]),
            "disk": lambda: full_disks(own),
            "link": self._links_down,
            "gpu": self._gpu_faults,
        }

    def examine(self) -> list[Fault]:
        """Return the faults of this node; empty if there are none, or if checks are off.

        Takes at most twice ``CHECK_TIMEOUT_S`` seconds.
        """
        if self._limits.health_check is False:
            return []
        found: list[Fault] = []
        at = RUN_FOLDER

        def run_checks() -> None:
            nonlocal at
            for at, check in self._checks.items():
                try:
                    found.extend([Fault(at, text) for text in check()])
                except (OSError, GpuError) as error:
                    found.append(Fault(at, f"{at}: {error}"))

        # A mount or a driver that hangs cannot be interrupted, so the check's thread is left behind.
        thread = threading.Thread(target=run_checks, name="health", daemon=True)
        thread.start()
        thread.join(CHECK_TIMEOUT_S)
        if thread.is_alive():
            found.append(Fault(at, f"{at}: no answer in {CHECK_TIMEOUT_S:g} s"))
        if self._limits.health_command:
            fault = fault_of_program(self._limits.health_command, CHECK_TIMEOUT_S)
            found += [Fault("command", fault)] if fault else []
        return found

    def _links_down(self) -> Iterator[str]:
        now = links_up()
        if self._first_up is None:
            self._first_up = now
        for name in sorted(self._first_up - now):
            yield f"link {name} is down, and was up at the first start"

    def _gpu_faults(self) -> Iterator[str]:
        """Yield faults of this job's GPUs, compared with their state at the first start.

        Waits until the GPUs have freed the memory of ended ranks, because ranks that start earlier would run out of
        memory. Yields nothing without an NVIDIA driver, or without nvidia-ml-py.
        """
        if not DRIVER.is_dir():
            return
        try:
            # Stays open: the driver keeps Xid errors only for a process that has registered.
            self._nvml = self._nvml or Nvml()
        except ImportError:
            return
        readings = self._read_own_gpus(self._nvml)
        if self.first is None:
            self.first = readings
        deadline = time.monotonic() + MEMORY_WAIT_S
        while keeping_memory(readings, self.first) and time.monotonic() < deadline:
            time.sleep(MEMORY_POLL_S)
            readings = self._read_own_gpus(self._nvml)
        if readings:
            yield from describe_faults(readings, self.first, self._gpus)

    def _read_own_gpus(self, nvml: Nvml) -> list[GpuReading]:
        own = [gpu.bus for gpu in visible_gpus()]
        return [one for one in nvml.read_health() if not own or None in own or one.bus in own]


def full_disks(folders: Iterable[Path]) -> Iterator[str]:
    """Yield a sentence for each folder whose filesystem is read-only or full, or has no free inode.

    Raises:
        OSError: a folder does not exist, or its filesystem does not answer.
    """
    for folder in folders:
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize / MIB
        if status.f_flag & os.ST_RDONLY:
            yield f"{folder} is mounted read-only"
        elif free < MIN_FREE_MIB:
            yield f"{folder} has {free:.1f} MiB free, less than {MIN_FREE_MIB:g}"
        elif status.f_files and not status.f_favail:
            yield f"{folder} has no free inode"


def links_up(root: Path = SYS) -> set[str]:
    """Return the names of the physical network interfaces and InfiniBand ports of this machine that are up.

    Interfaces without a device, such as bridges and container interfaces, are left out, because they come and go.
    ``root`` is the folder /sys/class.
    """
    states = {path.name: (path / "carrier", "1") for path in (root / "net").glob("*") if (path / "device").exists()}
    for path in (root / "infiniband").glob("*/ports/*"):
        states[f"{path.parts[-3]}/{path.name}"] = path / "state", "ACTIVE"
    up = set()
    for name, (file, state) in states.items():
        with suppress(OSError):  # EINVAL: the interface was switched off.
            if state in file.read_text():
                up.add(name)
    return up


def fault_of_program(words: Sequence[str], timeout_s: float) -> str:
    """Run the site's check program for at most ``timeout_s`` seconds. Returns the fault as a sentence.

    The sentence is empty if the program exits with status 0. A program that cannot be run, or does not end in time, is
    a fault. ``words`` are the program and its arguments.
    """
    name = words[0]
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return f"{name} cannot be run: {error.strerror or error}"
    try:
        output = process.communicate(timeout=timeout_s)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        return f"{name} gave no answer in {timeout_s:g} s"
    finally:
        if process.poll() is None:  # The program took too long, or this agent was requested to stop meanwhile.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0:
        return ""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    how = f"status {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
    return f"{name} left with {how}{f': {lines[-1][:LONGEST]}' if lines else ''}"


# GPU telemetry of a node: a thread of its agent samples the GPUs of the run while the ranks run.


WRITE_S = 30.0
"""Seconds between two writes of the samples.

A killed agent loses unwritten samples; rare writes spare the filesystem.
"""
LAST_SAMPLE_S = 10.0
"""Longest wait in seconds for the last sample at the end of an attempt."""
GPU_SAMPLE_S = 5.0
"""Seconds between two samples of power, energy, clocks and temperature."""
Sample: TypeAlias = tuple[float, Mapping[str, Mapping[str, float]]]
"""Unix time in seconds, and the values at that time: PCI address of a GPU -> gauge -> value."""


def gpus_of_run(there: Sequence[str], visible: Sequence[Gpu], ranks: int, is_slurm: bool) -> list[str]:
    """Return the PCI addresses of the GPUs to sample.

    Empty if other jobs may use some of these GPUs, or if the run has slices of GPUs (MIG).

    Args:
        there: PCI addresses of the GPUs that this process may open.
        visible: GPUs that the ranks may use.
        ranks: number of ranks on this node. Outside of Slurm the run has only as many GPUs as ranks.
        is_slurm: True if Slurm has given all visible GPUs to the job.
    """
    # The driver lists no GPU, as in a container: take the GPUs that can be opened, unless there are too many.
    if not visible:
        return list(there) if len(there) <= ranks else []
    own = list(visible) if is_slurm else list(visible)[:ranks]
    if any(gpu.uuid is not None and gpu.uuid.startswith("MIG-") for gpu in own):
        return []  # This is a slice of a GPU: its power and clocks would be values of the whole GPU.
    named = [gpu.bus for gpu in own]
    if None not in named:
        return [bus for bus in there if bus in named]
    # Where Slurm hides the GPUs of other jobs, this job owns every GPU that can be opened.
    return list(there) if len(there) == len(own) else []


@contextmanager
def sampling(
    nvml: Nvml, choose: Callable[[Sequence[str]], Sequence[str]], write: Callable[[list[Sample]], None]
) -> Iterator[None]:
    """Sample GPUs in a thread during a ``with`` block: at its start, every ``GPU_SAMPLE_S`` seconds, and at its end.

    If the driver hangs, the thread continues after the block.

    Args:
        nvml: connection that reads the gauges.
        choose: function that receives the PCI addresses of the GPUs that can be opened, and returns those to sample.
        write: function that writes samples.
    """
    over = threading.Event()

    def sample() -> None:
        buses = choose(nvml.buses())
        waiting: list[Sample] = []
        written, is_last = time.monotonic(), not buses
        while not is_last:
            is_last = over.is_set()
            gauges = nvml.read_gauges(buses)
            if any(gauges.values()):
                waiting.append((time.time(), gauges))
            if waiting and (is_last or time.monotonic() - written >= WRITE_S):
                write(waiting)
                waiting, written = [], time.monotonic()
            over.wait(GPU_SAMPLE_S)

    def sample_and_report() -> None:
        try:
            sample()
        except GpuError as error:
            if DRIVER.is_dir():  # Without this folder there is no NVIDIA GPU.
                say(f"launch: no GPU telemetry: {error}")
        except OSError as error:
            say(f"launch: GPU telemetry cannot be written: {error}")

    thread = threading.Thread(target=sample_and_report, name="telemetry", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LAST_SAMPLE_S)


@contextmanager
def gpu_telemetry(context: RunContext, attempt: int) -> Iterator[None]:
    """Sample the GPUs of this node during a ``with`` block, every ``GPU_SAMPLE_S`` seconds. Does nothing without a GPU.

    Open the block after the environment of the ranks is set, because that environment names their GPUs.
    """
    config, node = context.config, context.node
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    nvml = None
    if not hidden and not workload_of(config).computes_on_cpus(config):
        try:
            nvml = Nvml()
        except ImportError:
            if DRIVER.is_dir():
                print(
                    "launch: GPUs are not checked or sampled: nvidia-ml-py is not installed; pip install '.[gpu]'",
                    file=sys.stderr,
                )
    if nvml is None:
        yield
        return
    visible, host = visible_gpus(), socket.gethostname()
    with sampling(
        nvml,
        lambda there: gpus_of_run(there, visible, config.ranks_on_node, node.is_slurm),
        lambda samples: append_samples(
            context.folder, node.index, [GpuSample(when, attempt, host, gauges) for when, gauges in samples]
        ),
    ):
        yield
