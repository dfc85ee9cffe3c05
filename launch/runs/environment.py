"""Environment of an attempt: machine, environment variables, code, libraries and samples of the GPUs."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launch.errors import ConfigError, ranges
from launch.runs.folder import RunFolder, append_lines, numbers_in, read_json, read_json_lines

# Machine of a rank for ``environment.json``: host, processor, GPUs and cores, read without torch.


DRIVER = Path("/proc/driver/nvidia")


def describe_rank(rank: int, local_rank: int, node: int) -> dict[str, Any]:
    """Return the entry of a rank in ``environment.json``: its host, CPUs, device and number of OpenMP threads.

    A rank of the GPT library writes its entry itself. For other programs, the agent on the node of the rank calls this
    function. The device is the visible GPU with index ``local_rank``, or the CPU if no GPU is visible. ``device_uuid``
    is absent if the UUID of the GPU is not certain. ``node`` is the number of the node.
    """
    entry = describe_place(rank, local_rank, node)
    gpus = visible_gpus()
    if gpus:
        gpu = gpus[local_rank % len(gpus)]
        entry |= {"device": f"cuda:{gpu.index}", "device_name": gpu.name}
        entry |= {"device_uuid": gpu.uuid.removeprefix("GPU-")} if gpu.uuid else {}  # as torch writes it
    else:
        entry |= {"device": "cpu", "device_name": cpu_name()}
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # its later numbers are of nested regions
    return entry | {"threads": int(first) if first.isdigit() and int(first) else entry["cores"]}


def describe_place(rank: int, local_rank: int, node: int) -> dict[str, Any]:
    """Return host, node and CPUs of a rank. ``machine`` is the boot ID, which all host names of one machine share."""
    return {
        "rank": rank,
        "local_rank": local_rank,
        "node": node,
        "host": socket.gethostname(),
        "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        **describe_cpus(os.sched_getaffinity(0)),
    }


def describe_cpus(cpus: Iterable[int]) -> dict[str, Any]:
    """Return the number of CPUs that a rank may use (``cores``), and their numbers as Linux writes them (``0-3,8``)."""
    numbers = sorted(cpus)
    return {"cores": len(numbers), "cpus": ranges(numbers).replace(" ", "")}


def cpu_name() -> str:
    """Return the name of the processor in /proc/cpuinfo; the name of the architecture if the file has none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver of this machine; None if no driver is loaded."""
    try:
        found = re.search(r"Kernel Module\b.*?\s(\d+\.[\d.]+)\s", (DRIVER / "version").read_text())
    except OSError:
        return None
    return found.group(1) if found else None


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine. ``index`` is CUDA's number of the GPU; ``uuid`` and ``bus`` are None if not certain."""

    index: str
    name: str
    uuid: str | None
    bus: str | None = None
    """Address on the PCI bus in the notation of Linux, such as 0000:3b:00.0."""


def missing_for_compiling() -> list[str]:
    """Return the parts that this node lacks to build Triton's kernels: a C compiler, the headers of Python, or both."""
    programs = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    found = [] if any(map(shutil.which, programs)) else ["no C compiler"]
    return found if header.is_file() else [*found, f"no {header}"]


DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA -> the oldest driver that runs its programs (NVIDIA, CUDA Compatibility)."""


def driver_problem(driver: str | None, cuda: str | None) -> str:
    """Return why a driver is too old for the CUDA version of torch; "" if the driver is new enough, or if either is
    None.

    Args:
        driver: version of the driver, such as ``550.54.15``.
        cuda: version of CUDA for which torch was built, such as ``13.0``.
    """
    oldest = None if driver is None or cuda is None else DRIVER_OF_CUDA.get(int(cuda.partition(".")[0]))
    if oldest is None or driver is None or int(driver.partition(".")[0]) >= oldest:
        return ""
    return f"driver {driver}, and a torch for CUDA {cuda}, which needs driver {oldest} or newer"


def visible_gpus(
    folder: Path = DRIVER / "gpus", environ: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> list[Gpu]:
    """Return the GPUs that this process may use, in CUDA's order. CUDA_VISIBLE_DEVICES limits them.

    Args:
        folder: folder in which the NVIDIA driver describes each GPU.
        environ: environment variables.
        devices: folder of device files.
    """
    there = [_read_gpu(str(index), path) for index, path in enumerate(sorted(folder.glob("*/information")))]
    if not there:  # gVisor has device files alone, and WSL2 (/dev/dxg) does not say how many GPUs there are
        count = sum(path.name[6:].isdigit() for path in devices.glob("nvidia*")) or (devices / "dxg").exists()
        there = [Gpu(str(index), "GPU", None) for index in range(count)]
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        names = [gpu.index for gpu in there]
    else:  # CUDA ignores the first entry that names no GPU, and all that follow
        names = list(itertools.takewhile(lambda name: name not in ("", "-1"), map(str.strip, named.split(","))))
    # Slurm may hide GPUs of other jobs by cgroups; CUDA then counts only visible GPUs, while /proc shows all. If models
    # differ, CUDA lists the fastest first, unless CUDA_DEVICE_ORDER=PCI_BUS_ID.
    hidden = "SLURM_JOB_ID" in environ and len(names) < len(there)
    alike = len({gpu.name for gpu in there}) == 1 or environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    as_listed = alike and not hidden
    return [_find_gpu(name, index, there, as_listed) for index, name in enumerate(names)]


def _read_gpu(index: str, path: Path) -> Gpu:
    """Return the GPU that the driver's file ``path`` in /proc describes.

    ``index`` is the number of the GPU in the order of the PCI bus.
    """
    fields = dict(re.findall(r"^([^:\n]+):[ \t]*(.*?)[ \t]*$", path.read_text(), re.MULTILINE))
    uuid = fields.get("GPU UUID", "")
    # The driver writes question marks until the GPU is first used.
    known = uuid if uuid.startswith("GPU-") and "?" not in uuid else None
    return Gpu(index, fields.get("Model", "GPU"), known, path.parent.name.lower())


def _find_gpu(name: str, index: int, there: list[Gpu], as_listed: bool) -> Gpu:
    """Return the GPU that one entry of CUDA_VISIBLE_DEVICES names.

    Args:
        name: the entry: a number, or the beginning of a UUID.
        index: position of the entry in the variable, from 0.
        there: the GPUs that the driver lists.
        as_listed: True if CUDA numbers the GPUs in the order of ``there``.
    """
    models = " or ".join(sorted({gpu.name for gpu in there})) or "GPU"
    if name.isdigit():
        return there[int(name)] if as_listed and int(name) < len(there) else Gpu(name, models, None)
    found = [gpu for gpu in there if gpu.uuid is not None and gpu.uuid.startswith(name)]
    # A slice of a GPU (MIG-...) is a device of its own, which the driver does not list.
    return found[0] if len(found) == 1 else Gpu(str(index), models, name)


# Environment variables of the ranks: defaults that the agent sets, and their record.


DEFAULTS = (
    # Without this, a gloo group connects all pairs of P ranks at once: P (P - 1) connections and requests of the store.
    (("TORCH_GLOO_LAZY_INIT",), "1"),
    # Segments that grow leave no gaps, which would make a GPU run out of memory although some is free.
    (("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"), "expandable_segments:True"),
    # NCCL's flight recorder: the last collectives of a rank, written to a file when one of them times out.
    (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "20000"),
    (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
    # Matrix products that are queued before a collective do not delay its kernel.
    (("TORCH_NCCL_HIGH_PRIORITY",), "1"),
)
"""Environment variables of the ranks, which are set before torch is imported.

Each entry has a tuple of names, a variable and its aliases, and a value. The first name is set to the value, unless the
user has set one of the names.
"""

DUMP_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Variable for the path prefix of the files of NCCL's flight recorder, and its alias."""
DUMP_PREFIX = "nccl_trace_rank_"
"""Beginning of the names of the flight recorder's files in an attempt's folder. torch appends the rank."""

COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Variable for the cache folder of torch's compiler."""

RECORDED = (
    *(name for names, _ in DEFAULTS for name in names),
    *DUMP_VARIABLES,
    *("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", COMPILE_CACHE, "TRITON_CACHE_DIR"),
)
"""Environment variables that ``environment.json`` records."""
MOST_FILES = 1 << 20
"""Highest soft limit of open files that ``raise_open_files`` sets.

The limit is not higher, because some programs close every possible file descriptor, which takes long for 10^9.
"""


def set_defaults(environment: MutableMapping[str, str] = os.environ, typed: Collection[str] = ()) -> None:
    """Set the environment variables of ``DEFAULTS``, unless the user has set them.

    Args:
        environment: variables of the ranks, changed in place.
        typed: names that the config sets for the ranks. A default for an alias of such a name is removed, because
            torch would read both.
    """
    for names, value in DEFAULTS:
        if not {*names} & {*typed}:
            if not {*names} & environment.keys():
                environment[names[0]] = value
        elif environment.get(names[0]) == value:
            del environment[names[0]]


def set_dump_file(
    run: Path, attempt: Path, environment: MutableMapping[str, str] = os.environ, typed: Collection[str] = ()
) -> None:
    """Make NCCL's flight recorders write into the folder of the attempt, unless the user has set ``DUMP_VARIABLES``.

    Args:
        run: folder of the run. If a variable of ``environment`` has a path in this folder, an earlier attempt has set
            the variable, and this function replaces the path.
        attempt: folder of the attempt.
        environment: variables of the ranks, changed in place.
        typed: names that the config sets for the ranks.
    """
    named = [environment[name] for name in DUMP_VARIABLES if name in environment]
    if all(name.startswith(f"{run}/") for name in named) and not {*DUMP_VARIABLES} & {*typed}:
        environment[DUMP_VARIABLES[0]] = str(attempt / DUMP_PREFIX)


def dumped_ranks(attempt: Path) -> list[int]:
    """Return the ranks whose flight recorder has written into the folder of an attempt."""
    return numbers_in(attempt, DUMP_PREFIX)


def describe_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str | int]:
    """Return the environment variables for communication and memory, and the limit of open files (``open_files``)."""
    known: dict[str, str | int] = {name: environment[name] for name in RECORDED if name in environment}
    return known | {"open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}


def raise_open_files() -> int:
    """Raise the soft limit of open files of this process, and return the limit. Children inherit the limit.

    The new limit is the hard limit, at most ``MOST_FILES``. A higher soft limit stays. Each connection, data file and
    log of a rank is an open file, and the usual soft limit is 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = reachable_files(hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft


def reachable_files(hard: int) -> int:
    """Return the number of open files to which a process raises its soft limit: ``hard``, at most ``MOST_FILES``.

    ``hard`` is the hard limit of the process; -1 if it has none.
    """
    return MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)


# Code and libraries of an attempt, and their changes since the attempt before.


ROOT = Path(__file__).absolute().parents[2]
"""Folder that contains this project's packages as this process imports them: a checkout, site-packages or a copy."""

PACKAGES = ("gpt", "launch", "slurm", "hydra_plugins", "configs", "gpt_launch")
SUFFIXES = (".py", ".yaml", ".sh", ".csv", ".j2")
ORIGIN = "code.json"
"""File in a copy of the code that records the folder and the git state of the original."""

LIBRARIES = ("torch", "numpy", "hydra-core", "omegaconf", "submitit", "deepspeed")
GIT_TIMEOUT_S = 10
NAMED = 5


def source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name relative to ``root``, path) for each source file of this project, in the order of the names.

    Files that git does not track are included.
    """
    paths = [path for package in PACKAGES for path in (root / package).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted(paths):
        if path.is_file():
            yield str(path.relative_to(root)), path


def describe_code(
    root: Path = ROOT, files_of: Callable[[Path], Iterable[tuple[str, Path]]] = source_files
) -> dict[str, Any]:
    """Return a description of the code: its folder and the digests of its files.

    The keys are ``root``, the folder; ``is_snapshot``, True for a copy of the code; ``sha256``, a digest of all files;
    and ``files``, name -> digest of the file.

    Args:
        root: folder of the code, or of a copy.
        files_of: function that yields (name relative to a root, path); by default ``source_files``.
    """
    files = {name: digest(path.read_bytes()) for name, path in files_of(root)}
    whole = digest("".join(f"{name} {files[name]}\n" for name in files).encode())
    return {"root": str(root), "is_snapshot": (root / ORIGIN).is_file(), "sha256": whole, "files": files}


def digest(content: bytes) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of ``content``."""
    return hashlib.sha256(content).hexdigest()[:32]


def install_command(extra: str, root: Path = ROOT) -> str:
    """Return the command that installs an optional extra of this project.

    Args:
        extra: name of the extra in pyproject.toml.
        root: folder that contains the packages: a checkout, or site-packages.
    """
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'gpt-launch[{extra}]'"
    place = "." if root == Path.cwd() else str(root)
    return f"pip install -e {shlex.quote(f'{place}[{extra}]')}"


def code_state(root: Path = ROOT) -> dict[str, str]:
    """Return ``commit`` and ``diff_sha256``, a hash of the uncommitted changes, of the git checkout that contains
    ``root``.

    Empty outside a git checkout. A copy of the code has the state of its original.
    """
    origin = root / ORIGIN
    if origin.is_file():
        state = json.loads(origin.read_text())["git"]
        assert isinstance(state, dict)
        return state
    commit = git(root, "rev-parse", "HEAD")
    diff = git(root, "diff", "HEAD")
    if commit is None or diff is None:
        return {}
    return {"commit": commit.decode().strip(), "diff_sha256": hashlib.sha256(diff).hexdigest()}


def git(folder: Path, *args: str) -> bytes | None:
    """Run git in ``folder`` and return its standard output; None if git fails, for example outside a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def library_versions() -> dict[str, str]:
    """Return name -> version for Python and for the installed libraries that affect results."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences between two ``environment.json`` as texts for people: changed code files, changed
    libraries.

    Empty if nothing changed. CUDA and NCCL are compared only if both records have their versions, which only nodes
    know. The driver is not compared, because a requeued job may get other nodes.
    """
    found = []
    old, new = ((known.get("code") or {}).get("files") or {} for known in (before, now))
    touched = [
        f"{name} {'added' if name not in old else 'removed' if name not in new else 'changed'}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if old and new and touched:
        more = f" and {len(touched) - NAMED} more" if len(touched) > NAMED else ""
        commits = [str((known.get("git") or {}).get("commit", "none"))[:12] for known in (before, now)]
        moved = f" (commit {commits[0]} -> {commits[1]})" if commits[0] != commits[1] else ""
        found.append(", ".join(touched[:NAMED]) + more + moved)
    was, is_now = before.get("software") or {}, now.get("software") or {}
    for name in sorted({*was, *is_now} & {"python", *LIBRARIES} | {"cuda", "nccl"} & {*was} & {*is_now}):
        if was.get(name) != is_now.get(name):
            found.append(f"{name} {was.get(name, 'not installed')} -> {is_now.get(name, 'not installed')}")
    return found


def changed_since(folder: RunFolder, now: dict[str, Any], attempt: int | None = None) -> tuple[int, str] | None:
    """Return the number of the last recorded attempt, and a text on the changes of code and libraries since then.

    None if nothing changed, or no attempt is recorded. With ``attempt``, only earlier attempts are considered. ``now``
    is the present environment.
    """
    for number in reversed(folder.attempts()):
        before = read_json(folder.environment(number))
        if before and (attempt is None or number < attempt):
            texts = changes(before, now)
            return (number, "; ".join(texts)) if texts else None
    return None


def refuse_change(folder: RunFolder, since: int, what: str) -> None:
    """Always raise ConfigError: ``require_same_code=true`` forbids the changes since attempt ``since``.

    ``what`` is the text on the changes.
    """
    commit = (read_json(folder.environment(since)).get("git") or {}).get("commit")
    back = f"git checkout {commit[:12]}, " if commit else ""
    raise ConfigError(
        f"since attempt {since} of {folder.path}: {what}",
        "the code and the libraries of that attempt, as require_same_code=true demands",
        f"{back}require_same_code=false to continue with what has changed, or fresh=true for a new folder",
    )


# Samples of the GPUs of a node: a file for each node in the run folder.


GAUGES = {
    "power_w": 1,
    "energy_j": 3,
    "sm_clock_mhz": 0,
    "memory_clock_mhz": 0,
    "temperature_c": 0,
    "throttle_reasons": 0,
}
"""Gauge, a quantity that is measured on each GPU -> number of decimals with which its values are written.

Energy is a counter in joules since the driver was loaded, and only its small differences are used. Throttle reasons are
the bits of NVML's clocks event reasons.
"""
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "driver's thermal limit",
    0x40: "too hot",
    0x80: "power brake",
}
"""Bit of NVML's clocks event reasons -> reason for which clocks are lower than requested (nvml.h).

Idle clocks (0x01) and clocks set by an administrator (0x02, 0x10, 0x100) are no faults and are left out.
"""


@dataclass(frozen=True)
class GpuSample:
    """Values of all ``GAUGES`` at one time, for the GPUs that the run uses on one node."""

    time: float
    """Unix time, seconds."""
    attempt: int
    host: str
    gauges: Mapping[str, Mapping[str, float]]
    """PCI address of a GPU -> gauge (key of ``GAUGES``, which names the unit) -> value; unknown values are absent."""

    def as_dict(self) -> dict[str, Any]:
        """Return the sample as the JSON object of one line in ``telemetry/node_*.jsonl``."""
        line: dict[str, Any] = {"time": round(self.time, 3), "attempt": self.attempt, "host": self.host}
        line["bus"] = list(self.gauges)
        for name, decimals in GAUGES.items():
            values = [of_gpu.get(name) for of_gpu in self.gauges.values()]
            if any(value is not None for value in values):
                line[name] = [None if v is None else round(v, decimals) if decimals else int(v) for v in values]
        return line


def append_samples(folder: RunFolder, node: int, samples: Iterable[GpuSample]) -> None:
    """Append samples to the telemetry file of node number ``node``."""
    append_lines(folder.telemetry(node), [sample.as_dict() for sample in samples])


def telemetry_nodes(folder: RunFolder) -> list[int]:
    """Return the numbers of the nodes that have samples, ascending."""
    return numbers_in(folder.path / "telemetry", "node_", ".jsonl")


def read_samples(folder: RunFolder, node: int) -> Iterator[GpuSample]:
    """Yield the samples of a node in order. Lines that are not samples are skipped."""
    for line in read_json_lines(folder.telemetry(node)):
        with suppress(KeyError, TypeError, ValueError, IndexError):
            gauges = {
                str(bus): {name: line[name][at] for name in GAUGES if name in line and line[name][at] is not None}
                for at, bus in enumerate(line["bus"])
            }
            yield GpuSample(float(line["time"]), int(line["attempt"]), str(line["host"]), gauges)
