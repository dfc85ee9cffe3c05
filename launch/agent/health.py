"""Health of this node before the ranks start, and the members of the agent group."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.agent.gpus import GpuError, GpuReading, Nvml, short_bus
from launch.config import HealthCheckConfig
from launch.runs.environment import DRIVER, THROTTLE_REASONS, visible_gpus
from launch.runs.folder import RunFolder

# Health of this node's NVIDIA GPUs: whether they answer, uncorrected memory errors, Xid errors, and throttled
# clocks.


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
    """Read the GPUs through nvidia-smi; none if it is not installed.

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


# Health of this node before a start of the ranks: GPUs, links, room on its disks, and a command of the site's own.


SYS = Path("/sys/class")
MIB = 2**20
LONGEST = 200
"""Characters of the last line of the site's command that are kept."""
CHECK_TIMEOUT_S = 60.0
"""Seconds after which a check without an answer means a sick node; the site's own command has as many."""
MIN_FREE_MIB = 4.0
"""Room below which a filesystem counts as full."""
RUN_FOLDER = "run folder"
"""Part that all nodes share: another node would be as sick."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with this node."""

    part: str
    """Part that was checked: gpu, link, disk, run folder or command."""
    found: str

    @property
    def is_shared(self) -> bool:
        """Return whether it would be found on any other node too."""
        return self.part == RUN_FOLDER

    def __str__(self) -> str:
        """The finding for people."""
        return self.found


def describe(faults: Iterable[Fault]) -> str:
    """All faults of a node, for the event log and for people."""
    return "; ".join(map(str, faults))


class HealthCheck:
    """The checks of one node, for the life of its agent."""

    def __init__(self, run_dir: Path, limits: HealthCheckConfig, gpus: int | None) -> None:
        """Check nothing yet.

        Args:
            run_dir: folder of the run, which needs room.
            limits: ``resilience.health_check``.
            gpus: how many GPUs a node of the run should have; None where that is not known.
        """
        self._run_dir = run_dir
        self._limits = limits
        self._gpus = gpus
        self._monitor = GpuMonitor()
        self._first: list[GpuReading] | None = None
        self._were_up: frozenset[str] | None = None

    def examine(self) -> list[Fault]:
        """Check this node; returns what is wrong with it. Takes at most twice ``CHECK_TIMEOUT_S``."""
        if not self._limits.enabled:
            return []
        found: list[Fault] = []
        parts: dict[str, Callable[[], Iterator[str]]] = {
            RUN_FOLDER: lambda: full_disks([self._run_dir]),
            "disk": lambda: full_disks(own_folders()),
            "link": self._links_down,
            "gpu": self._gpu_faults,
        }
        at = RUN_FOLDER

        def look() -> None:
            nonlocal at
            for part, check in parts.items():
                at = part
                try:
                    found.extend([Fault(part, text) for text in check()])
                except (OSError, GpuError) as error:
                    found.append(Fault(part, f"{part}: {error}"))

        # A mount or a driver that hangs cannot be interrupted: it is left behind with its thread.
        thread = threading.Thread(target=look, name="health", daemon=True)
        thread.start()
        thread.join(CHECK_TIMEOUT_S)
        if thread.is_alive():
            found.append(Fault(at, f"{at}: no answer in {CHECK_TIMEOUT_S:g} s"))
        if self._limits.command_words:
            found += [Fault("command", text) for text in run_command(self._limits.command_words, CHECK_TIMEOUT_S)]
        return found

    def _links_down(self) -> Iterator[str]:
        up = links()
        if self._were_up is None:
            self._were_up = frozenset(name for name, is_up in up.items() if is_up)
        for name in sorted(self._were_up):
            if not up.get(name, False):
                yield f"link {name} is down, and was up at the first start"
        for name in self._limits.links:
            if not is_link_up(name):
                yield f"link {name} is down, and resilience.health_check.links names it"

    def _gpu_faults(self) -> Iterator[str]:
        readings = self._monitor.read(CHECK_TIMEOUT_S)
        if self._first is None:
            self._first = readings
        if readings:
            yield from describe_faults(readings, self._first, self._gpus)


def own_folders() -> list[Path]:
    """Folders in which ranks write on this node's own disks and memory."""
    return [path for path in (Path(tempfile.gettempdir()), Path("/dev/shm")) if path.is_dir()]


def full_disks(folders: Iterable[Path]) -> Iterator[str]:
    """Yield what keeps files from being written into folders.

    Raises:
        OSError: a folder is not there, or its filesystem does not answer.
    """
    for folder in folders:
        told = os.statvfs(folder)
        free = told.f_bavail * told.f_frsize / MIB
        if told.f_flag & os.ST_RDONLY:
            yield f"{folder} is mounted read-only"
        elif free < MIN_FREE_MIB:
            yield f"{folder} has {free:.1f} MiB free, less than {MIN_FREE_MIB:g}"
        elif told.f_files and not told.f_favail:
            yield f"{folder} has no free inode"


def links(root: Path = SYS) -> dict[str, bool]:
    """Physical network interfaces and ports of InfiniBand adapters of this machine, and whether each is up.

    Interfaces without a device, such as bridges and those of containers, come and go.
    """
    names = [path.name for path in (root / "net").glob("*") if (path / "device").exists()]
    ports = {f"{port.parts[-3]}/{port.name}": port for port in (root / "infiniband").glob("*/ports/*")}
    return {name: _has_carrier(root, name) for name in names} | {name: _is_active(at) for name, at in ports.items()}


def is_link_up(name: str, root: Path = SYS) -> bool:
    """Return whether an interface, a port (``mlx5_0/1``) or any port of an adapter (``mlx5_0``) is up."""
    adapter, _, port = name.partition("/")
    if (root / "net" / adapter).exists():
        return _has_carrier(root, adapter)
    return any(_is_active(path) for path in (root / "infiniband" / adapter / "ports").glob(port or "*"))


def _has_carrier(root: Path, name: str) -> bool:
    with suppress(OSError):  # EINVAL of an interface that was switched off
        return (root / "net" / name / "carrier").read_text().strip() == "1"
    return False


def _is_active(port: Path) -> bool:
    with suppress(OSError):
        return "ACTIVE" in (port / "state").read_text()
    return False


def run_command(words: list[str], timeout_s: float) -> list[str]:
    """Run the site's own check; returns what is wrong, nothing where it left with 0."""
    name = words[0]
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return [f"{name} cannot be run: {error.strerror or error}"]
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return [f"{name} gave no answer in {timeout_s:g} s"]
    finally:
        if process.poll() is None:  # too late, or this agent was requested to stop meanwhile
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0:
        return []
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    how = f"status {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
    return [f"{name} left with {how}{f': {lines[-1][:LONGEST]}' if lines else ''}"]


# Members of the agent group: who takes part in a start of the ranks, and who is lost, sick or missing.


@dataclass(frozen=True)
class RendezvousRound:
    """One start of the ranks: its participants and its store, the same for every agent."""

    number: int
    attempt: int
    members: tuple[int, ...]
    """Indices of the nodes that take part; a node's place among them is its place among the ranks."""
    address: str
    port: int
    """Port of the ranks' store: a fresh one on the head node for each round."""

    def place(self, index: int) -> int:
        """Return the place of a node among the members."""
        return self.members.index(index)

    def ranks(self, index: int, on_node: int) -> range:
        """Return the ranks of a node, each node having ``on_node``."""
        return range(self.place(index) * on_node, (self.place(index) + 1) * on_node)


@dataclass(frozen=True)
class LostNode:
    """A node of which nothing is heard any more."""

    index: int
    host: str
    why: str


@dataclass(frozen=True)
class SickNode:
    """A node that does not take part in a start, with what was found on it."""

    index: int
    host: str
    faults: tuple[Fault, ...]


class NodesMissingError(RuntimeError):
    """There are not enough nodes left for a round."""


class SickNodesError(RuntimeError):
    """All nodes that are left are here, and too few of them are healthy, or the head node, which decides, is not."""

    def __init__(self, sick: tuple[SickNode, ...]) -> None:
        super().__init__("; ".join(f"{one.host}: {describe(one.faults)}" for one in sick))
        self.sick = sick


class HeadNodeLostError(RuntimeError):
    """The head node, which decides, does not answer; the message says since when."""


def record_lost_nodes(folder: RunFolder, attempt: int | None, lost: Iterable[LostNode]) -> None:
    """Write into the event log that nodes are lost, by name."""
    for one in lost:
        folder.record_event("node_lost", attempt=attempt, node=one.index, host=one.host, cause=one.why)


def record_sick_nodes(folder: RunFolder, attempt: int | None, sick: Iterable[SickNode]) -> None:
    """Write into the event log that nodes are sick, by name."""
    for one in sick:
        folder.record_event("node_sick", attempt=attempt, node=one.index, host=one.host, cause=describe(one.faults))


def lost_text(lost: Iterable[LostNode]) -> str:
    """The lost nodes, for people."""
    return "; ".join(f"node {one.host} is lost: {one.why}" for one in lost)
