"""Health of this node before a start of the ranks: GPUs, links, room on its disks, and a command of the site's own.

Owns the checks and what each finds, for the agents before every start and for the doctor's job. A node is compared with
itself at its first check. Must not know what follows from a sick node. Torch-free.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.agent.gpu_health import GpuError, GpuMonitor, GpuReading, describe_faults
from launch.config import HealthCheckConfig

SYS = Path("/sys/class")
MIB = 2**20
LONGEST = 200
"""Characters of the last line of the site's command that are kept."""
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
        """Tell whether it would be found on any other node too."""
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
        """Check this node; returns what is wrong with it. Takes at most twice ``timeout_s``."""
        if not self._limits.enabled:
            return []
        found: list[Fault] = []
        parts: dict[str, Callable[[], Iterator[str]]] = {
            RUN_FOLDER: lambda: full_disks([self._run_dir], self._limits.min_free_mib),
            "disk": lambda: full_disks(own_folders(), self._limits.min_free_mib),
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
        thread.join(self._limits.timeout_s)
        if thread.is_alive():
            found.append(Fault(at, f"{at}: no answer in {self._limits.timeout_s:g} s"))
        if self._limits.words:
            found += [Fault("command", text) for text in run_command(self._limits.words, self._limits.timeout_s)]
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
        readings = self._monitor.read(self._limits.timeout_s)
        if self._first is None:
            self._first = readings
        if readings:
            yield from describe_faults(readings, self._first, self._gpus)


def own_folders() -> list[Path]:
    """Folders in which ranks write on this node's own disks and memory."""
    return [path for path in (Path(tempfile.gettempdir()), Path("/dev/shm")) if path.is_dir()]


def full_disks(folders: Iterable[Path], min_free_mib: float) -> Iterator[str]:
    """Yield what keeps files from being written into folders.

    Raises:
        OSError: a folder is not there, or its filesystem does not answer.
    """
    for folder in folders:
        told = os.statvfs(folder)
        free = told.f_bavail * told.f_frsize / MIB
        if told.f_flag & os.ST_RDONLY:
            yield f"{folder} is mounted read-only"
        elif free < min_free_mib:
            yield f"{folder} has {free:.1f} MiB free, less than resilience.health_check.min_free_mib={min_free_mib:g}"
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
    """Tell whether an interface, a port (``mlx5_0/1``) or any port of an adapter (``mlx5_0``) is up."""
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
        if process.poll() is None:  # too late, or this agent was told to stop meanwhile
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0:
        return []
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    how = f"status {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
    return [f"{name} left with {how}{f': {lines[-1][:LONGEST]}' if lines else ''}"]
