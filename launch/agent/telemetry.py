"""GPU telemetry of a node: its agent samples the GPUs of the run while the ranks run, in a thread of its own.

Owns when samples are taken and written, and which GPUs are the run's. A driver that hangs holds up neither the ranks
nor the agent: the thread is left behind. Must not know what is made of the samples. Torch-free.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from launch.agent.node import Node
from launch.agent.nvml import GpuError, Nvml
from launch.config import Config
from launch.config.compose import computes_on_cpus
from launch.runs.folder import RunFolder
from launch.runs.hosts import DRIVER, Gpu, visible_gpus
from launch.runs.telemetry import GpuSample, append_samples
from launch.runs.unwritten import say

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
    """Sample the GPUs of this node in a ``with`` block, as ``launch.gpu_sample_s`` asks; nothing where there are none.

    To be opened when the environment of the ranks is set, which says what GPUs are theirs.
    """
    interval_s = config.launch.gpu_sample_s
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not interval_s or hidden or computes_on_cpus(config):
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
