"""Execution of the ranks: engine, precision, compilation, determinism and timeouts."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import shutil
import socket
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from gpt.config import CompileMode, Float8, ParallelConfig, Precision, TrainConfig, check_chunked_loss
from gpt.metrics import read_startup
from gpt.parallel.distributed import World, set_timeouts
from gpt.planning.auto import choose_compile, choose_tf32, float8_refusal, refuse_float8, refuse_tf32, tf32_refusal
from launch.errors import ConfigError, counted
from launch.runs.environment import COMPILE_CACHE, missing_for_compiling
from launch.runs.folder import RunFolder
from launch.runs.process import hash_seed

log = logging.getLogger(__name__)

# Precision, TF32 and compilation of the ranks, if the config leaves them to the devices.
#
# The rule itself is in gpt/planning/auto.py.


def settle_execution(config: TrainConfig, folder: RunFolder, world: World) -> TrainConfig:
    """Return the config with ``precision``, ``tf32`` and ``compile`` chosen for the devices of all ranks. Collective.

    Raises:
        ConfigError: an earlier attempt had bf16, and some device does not support it. Also if the config requests TF32,
            float8 or compilation, and some device or node does not support it.
    """
    precision = config.precision
    if precision is Precision.auto:
        precision = settle_precision(folder, world)
    on_cpus = world.device.type != "cuda"
    config = replace(config, precision=precision)
    check_chunked_loss(config)
    refuse_tf32(config, None)
    tf32 = choose_tf32(config, on_cpus) and all(world.gather(has_tf32(world.device)))
    if config.tf32 and not tf32:
        raise tf32_refusal(torch.cuda.get_device_name(world.device))
    refuse_float8(config, on_cpus, None)
    if config.float8 is not Float8.none and not config.float8_emulate:
        lacking = world.gather(not has_float8(world.device)).count(True)
        if lacking:
            raise float8_refusal(config, f"{world.size} ranks, of which {lacking} have GPUs that do not compute in it")
    compiled = choose_compile(config, world.size, on_cpus)
    if not on_cpus and compiled is not CompileMode["none"]:
        compiled = settle_compile(config, compiled, world.gather(not missing_for_compiling()).count(False))
    return replace(config, tf32=tf32, compile=compiled)


def settle_compile(config: TrainConfig, chosen: CompileMode, lacking: int) -> CompileMode:
    """Return the compilation mode ``chosen``. If some nodes have no C compiler and ``config.compile`` is ``auto``,
    return ``none``, and print a warning.

    Args:
        config: config of the run.
        chosen: compilation mode for the devices of the run.
        lacking: number of ranks on nodes without a C compiler.

    Raises:
        ConfigError: the config requests compilation, and some nodes have no C compiler.
    """
    if not lacking:
        return chosen
    found = f"{counted(lacking, 'rank')} on nodes without a C compiler or Python.h"
    if config.compile is not CompileMode["auto"]:
        fix = "apt-get install gcc python3-dev on the nodes or in the image; or compile=none"
        raise ConfigError(f"compile={config.compile.name} with {found}", "both, which Triton needs", fix)
    log.warning("%s: nothing is compiled (compile=none); gcc and python3-dev make steps faster", found)
    return CompileMode["none"]


def settle_precision(folder: RunFolder, world: World) -> Precision:
    """Return the precision of the last attempt. If there is no earlier attempt, return the fastest precision that the
    devices of all ranks support. Collective.

    Raises:
        ConfigError: the last attempt had bf16, and some GPU does not support it.
    """
    before = world.on_first(lambda: (read_startup(folder) or {}).get("precision"))
    best = world.gather(best_precision(world.device).name)
    if before is None:
        return next(p for p in (Precision.fp32, Precision.fp16, Precision.bf16) if p.name in best)
    lacking = [name for name in best if name != Precision.bf16.name]
    if before == Precision.bf16.name and lacking and world.device.type == "cuda":
        raise ConfigError(
            f"a run begun in bf16, and {len(lacking)} of {world.size} ranks on GPUs that do not compute in it",
            "GPUs like those that it began on",
            "GPUs of compute capability 8.0 or more, or precision=fp32 fresh=true to start over",
        )
    return Precision[before]


class CompileCache:
    """Cache of torch's compiler: a folder on each node, and a copy on the shared filesystem for later attempts.

    The ranks of a node use the folder of this node. So the ranks of many nodes do not write, lock and load the same
    files over a network.

    Args:
        shared: folder on the shared filesystem.
        local: folder of this node.
    """

    def __init__(self, shared: Path, local: Path) -> None:
        self.shared, self.local = shared, local
        self._known: set[Path] = set()
        """Paths of files in the folder of this node that the shared folder has already."""

    def fetch(self) -> None:
        """Copy the files of the shared folder to this node."""
        copy_files(compiled_files(self.shared), self.shared, self.local)
        self._known = compiled_files(self.local)

    def share(self) -> None:
        """Copy new files of this node to the shared folder, in a thread. Call this while no rank compiles."""
        new = compiled_files(self.local) - self._known
        self._known |= new
        if new:
            threading.Thread(target=copy_files, args=(new, self.local, self.shared)).start()


def compiled_files(folder: Path) -> set[Path]:
    """Return the files in a cache of torch's compiler, without locks and incomplete files."""
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".tmp")}


def copy_files(files: Collection[Path], source: Path, target: Path) -> None:
    """Copy files from the folder ``source`` to the folder ``target``. Files that ``target`` already has are not copied.
    Other processes never see an incomplete file. A failure is logged, not raised."""
    try:
        for file in files:
            copy = target / file.relative_to(source)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                part = copy.with_name(f"{copy.name}.{socket.gethostname()}.{os.getpid()}.tmp")
                shutil.copy2(file, part)
                part.replace(copy)
    except OSError as error:
        log.warning("compiled code was not copied from %s to %s: %s", source, target, error)


def keep_compiled(config: TrainConfig, world: World) -> CompileCache | None:
    """Make torch's compiler use a cache on the shared filesystem, for later attempts and other runs. Collective.

    Returns:
        On the first rank of each node the cache whose new files this rank has to share; None on other ranks. None on
        all ranks if the run has a single node or compiles nothing, if the user has set a folder for the cache, or if
        the shared folder cannot be used.
    """
    if not config.compiles:
        return None
    folder = world.on_first(partial(open_compile_cache, Path(config.output_dir) / ".cache" / "compiled"))
    if folder is None or names_compile_cache():
        return None
    if world.local_size == world.size:
        os.environ[COMPILE_CACHE] = folder
        return None
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import

    cache = CompileCache(Path(folder), Path(default_cache_dir(), hashlib.sha256(folder.encode()).hexdigest()[:16]))
    os.environ[COMPILE_CACHE] = str(cache.local)
    if world.local_rank == 0:
        cache.fetch()
    world.gather(None)  # no rank compiles before the files of its node are copied
    return cache if world.local_rank == 0 else None


def names_compile_cache() -> bool:
    """Return True if the user has set a folder for the cache of torch's compiler in the environment."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import

    return os.environ.get(COMPILE_CACHE, default_cache_dir()) != default_cache_dir()


def open_compile_cache(folder: Path) -> str | None:
    """Create a folder for the cache of torch's compiler, and return its path.

    Return None if the user has set another folder, or if the folder cannot be created, or its files cannot be locked,
    as the compiler needs.
    """
    if names_compile_cache():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return None
    return str(folder.absolute())


VOLTA = (7, 0)
"""Compute capability from which GPUs have matrix units, first for fp16 only (V100, T4)."""
AMPERE = (8, 0)
"""Compute capability from which GPUs compute in bf16 and TF32."""
ADA = (8, 9)
"""Compute capability from which GPUs multiply 8-bit floating point numbers."""
GFX_OF_FLOAT8 = ("gfx94", "gfx95", "gfx12")
"""Beginnings of the architecture names of AMD's GPUs with 8-bit floating point: MI300, MI350, Navi 4 (as in torchao,
``utils``)."""


def best_precision(device: torch.device) -> Precision:
    """Return the precision in which a device computes fastest; for CPUs fp32, since few are faster in bf16."""
    if device.type != "cuda":
        return Precision.fp32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision.bf16
    return Precision.fp16 if torch.cuda.get_device_capability(device) >= VOLTA else Precision.fp32


def has_tf32(device: torch.device) -> bool:
    """Return True if a device supports TF32."""
    on_cuda = device.type == "cuda" and torch.version.hip is None
    return on_cuda and torch.cuda.get_device_capability(device) >= AMPERE


def has_float8(device: torch.device) -> bool:
    """Return True if a GPU multiplies 8-bit floating point numbers."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(GFX_OF_FLOAT8)
    return torch.cuda.get_device_capability(device) >= ADA


# Reproducibility of a run: seeds, and torch's deterministic mode.
#
# The weights and the order of the samples follow from ``seed`` alone (gpt/model/gpt.py, gpt/data/order.py). The seeds
# set here serve dropout, and libraries that draw random numbers of their own.


CUBLAS = ":4096:8"
"""Value of the environment variable CUBLAS_WORKSPACE_CONFIG that makes cuBLAS deterministic (cuBLAS manual, section
2.1.4)."""


def fix_hash_seed(config: TrainConfig) -> None:
    """If ``deterministic`` is true and the environment variable PYTHONHASHSEED is not set, set it, and execute this
    process again. Python reads the variable only at its start.

    No code of this project depends on the order of sets of strings, but a user's class may. The launcher sets the
    variable for its ranks.
    """
    if config.deterministic and "PYTHONHASHSEED" not in os.environ:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONHASHSEED": hash_seed(config.seed)})


def seed_all(seed: int, rank: int) -> None:
    """Seed the random generators of Python, numpy and torch, differently on each rank, so that dropout differs."""
    own = (seed * 1000 + rank) % 2**63
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def set_determinism(config: TrainConfig) -> None:
    """With ``deterministic``, make torch refuse operations that are not deterministic. Call this before the first use
    of a GPU.

    Compiled code then draws the same random numbers as eager code, so that dropout is the same.
    """
    if not config.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if config.compiles or (config.compile is CompileMode["auto"] and torch.cuda.device_count()):
        from torch._inductor import config as inductor  # slow to import

        inductor.fallback_random = True


def set_matmul_precision(config: TrainConfig) -> None:
    """Make torch round the factors of fp32 products to TF32 if ``config.tf32`` is true. Otherwise make torch compute
    these products in fp32. Call this before anything is compiled.

    Of torch's two interfaces this is the older one, which torch 2.11 to 2.13 have, and which their compiler reads.
    """
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")


def state() -> dict[str, str | bool | None]:
    """Return the settings of this process on which the reproducibility of its results depends: name -> value. The value
    is None for an environment variable that is not set."""
    return {
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED"),
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


# Timeouts of the collectives of training, derived from the time that a step takes.
#
# The first steps load, compile and connect, which takes minutes with many ranks. Later steps are alike, so a collective
# that takes many times as long is stuck. On NCCL the timeout makes it dump the flight recorder.


FIRST = 2
"""Number of first steps whose times are not used for the timeout, because they compile and fill caches."""
MEASURED = 3
"""Number of steps after the first ``FIRST`` steps. The timeout follows from the times of these steps."""
FACTOR = 20
"""The timeout of collectives is the longest time of the ``MEASURED`` steps, times this factor."""
LEAST_S = 100.0
"""Shortest timeout in seconds, as in torchtitan: ranks may wait for one that writes a profile or waits for files."""


class StepTimeouts:
    """Shortens the timeout of the process groups once, after the first steps of an attempt.

    The process group ``World.control`` keeps its timeout. Ranks exchange messages in it, and wait in it for files that
    one rank writes.
    """

    def __init__(self, world: World, config: ParallelConfig) -> None:
        self._world = world
        self._config = config
        self._times: list[float] = []
        self._cut_s: float | None = None
        """Timeout in seconds after the first steps; None before."""
        self._has_evaluated = False

    def after(self, step_time_s: float) -> None:
        """Add the time of a step, in seconds. After ``FIRST + MEASURED`` steps, set the timeout."""
        if self._cut_s is not None:
            return
        self._times.append(step_time_s)
        if len(self._times) == FIRST + MEASURED:
            self._cut_s = step_timeout(self._config, max(self._times[FIRST:]))
            self._set(self._cut_s)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Return a context for an evaluation. During the first evaluation of the attempt, which compiles, collectives
        have the long timeout of the first steps."""
        lifts = self._cut_s is not None and not self._has_evaluated
        if lifts:
            self._set(self._config.timeout_s)
        yield
        self._has_evaluated = True
        if lifts and self._cut_s is not None:
            self._set(self._cut_s)

    def _set(self, seconds: float) -> None:
        set_timeouts(seconds, without=[self._world.control])


def step_timeout(config: ParallelConfig, step_time_s: float) -> float:
    """Return the timeout of collectives, in seconds, for the steps after the first ones: ``parallel.step_timeout_s`` if
    it is set, otherwise computed from ``step_time_s``, the longest time of a measured step in seconds."""
    if config.step_timeout_s is not None:
        return config.step_timeout_s
    return min(config.timeout_s, max(LEAST_S, FACTOR * step_time_s))
