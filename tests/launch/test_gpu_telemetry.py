"""GPU telemetry of a node: what the driver is asked, which GPUs are the run's, and when samples are written."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from launch.agent import health
from launch.agent.health import GpuError, GpuReading, Nvml, Sampler, gpus_of_run
from launch.config import LaunchConfig
from launch.errors import ConfigError
from launch.runs.environment import Gpu, GpuSample, append_samples, read_samples, telemetry_nodes
from launch.runs.folder import RunFolder
from launch.schema import check_ranges

A, B, C = "0000:3b:00.0", "0000:d8:00.0", "0000:e1:00.0"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """nvidia-ml-py with three GPUs, one of them another job's."""
    fake = importlib.reload(importlib.import_module("tests.support.fake_pynvml"))
    monkeypatch.setattr(fake, "LISTED", 3)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    yield fake


def test_gauges_are_in_units_of_people_and_what_a_gpu_does_not_tell_is_absent(driver: ModuleType) -> None:
    nvml = Nvml()
    assert nvml.buses() == [A, B], "the third is another job's"
    found = nvml.read_gauges([A, B])
    counter = found[A].pop("energy_j")
    clocks = {"sm_clock_mhz": 1755, "memory_clock_mhz": 2619}
    # By functions of an older driver than the package: the newer ones are not in it.
    assert found[A] == {"power_w": 250.0, **clocks, "temperature_c": 61, "throttle_reasons": 4}
    assert found[B] == {"power_w": 300.5, **clocks, "throttle_reasons": 1}
    assert nvml.read_gauges([A])[A]["energy_j"] >= counter and nvml.read_gauges([A]).keys() == {A}


def test_health_by_the_library(driver: ModuleType) -> None:
    nvml = Nvml()
    expected = [GpuReading(A, 7, 4, xids=(79,)), GpuReading(B, None, 1)]
    assert nvml.read_health() == expected and nvml.read_health() == expected, "Xid 43 is an application's"


def test_a_driver_that_does_not_answer_is_told(driver: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise driver.NVMLError("Driver Not Loaded")

    monkeypatch.setattr(driver, "nvmlInit", refuse)
    for ask in (Nvml().buses, Nvml().read_health):
        with pytest.raises(GpuError, match="does not answer: Driver Not Loaded"):
            ask()


def visible(*buses: str | None, uuid: str | None = None) -> list[Gpu]:
    return [Gpu(str(index), "H100", uuid, bus) for index, bus in enumerate(buses)]


@pytest.mark.parametrize(
    ("there", "seen", "ranks", "is_slurm", "chosen"),
    [
        ([A, B, C], visible(A, B), 1, True, [A, B]),  # all that Slurm has given to the job, used or not
        ([A, B, C], visible(A, B), 1, False, [A]),  # of a workstation those of the ranks
        ([A, B], visible(None, None), 2, True, [A, B]),  # the others are hidden by Slurm
        ([A, B, C], visible(None, None), 2, True, []),  # which two of the three is not known
        ([A], visible(None, uuid="MIG-1"), 1, True, []),  # a slice of a GPU has no power of its own
        ([A], [], 1, False, [A]),  # in a container
        ([A, B], [], 1, False, []),
    ],
)
def test_only_gpus_that_are_surely_the_runs_are_sampled(
    there: list[str], seen: list[Gpu], ranks: int, is_slurm: bool, chosen: list[str]
) -> None:
    assert gpus_of_run(there, seen, ranks, is_slurm) == chosen


class Reader(Nvml):
    """One GPU that tells how often it was asked; ``block`` keeps it from answering."""

    def __init__(self, wanted: int = 0, block: threading.Event | None = None) -> None:
        self.asked, self.enough, self._wanted, self._block = 0, threading.Event(), wanted, block

    def buses(self) -> list[str]:
        return [A]

    def read_gauges(self, buses: Collection[str]) -> dict[str, dict[str, float]]:
        if self._block is not None:
            self._block.wait()
        self.asked += 1
        if self.asked >= self._wanted:
            self.enough.set()
        return {A: {"power_w": 100.0 * self.asked}} if self.asked != 2 else {A: {}}


def test_samples_are_taken_at_the_start_every_interval_and_at_the_end(tmp_path: Path) -> None:
    folder, reader = RunFolder(tmp_path), Reader(wanted=3)
    sampler = Sampler(reader, lambda there: there, lambda samples: append_samples(folder, 7, samples), 2, 0.001)
    assert reader.enough.wait(240)
    sampler.close()
    found = list(read_samples(folder, 7))
    assert telemetry_nodes(folder) == [7] and {sample.attempt for sample in found} == {2}
    powers = [sample.gauges[A]["power_w"] for sample in found]
    assert powers[:2] == [100.0, 300.0], "at the second time it did not answer, and nothing is made up"
    assert powers[-1] == 100.0 * reader.asked, "the last one is at the end"


def test_a_driver_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LAST_SAMPLE_S", 0.01)
    release, written = threading.Event(), list[GpuSample]()
    sampler = Sampler(Reader(block=release), lambda there: there, written.extend, 1, 3600)
    sampler.close()
    assert not written
    release.set()
    sampler._thread.join(240)


def test_a_sample_is_read_as_it_was_written_and_other_lines_are_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    gauges = {A: {"power_w": 412.3, "energy_j": 3000.125, "throttle_reasons": 4}, B: {"power_w": 71.0}}
    sample = GpuSample(1e9, 1, "n3", gauges)
    append_samples(folder, 0, [sample])
    with folder.telemetry(0).open("a") as file:
        file.write('{"time": 1, "attempt": 1, "host": "n3"}\n{"bus": [], "time": "x"}\n{"time": 2, "att')
    append_samples(folder, 0, [sample])
    assert list(read_samples(folder, 0)) == [sample, sample]
    assert '"temperature_c"' not in folder.telemetry(0).read_text()


def test_an_interval_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="0, for no samples, or seconds from 1 to 3600"):
        LaunchConfig(poll_s=5, gpu_sample_s=0.2).validate()
    for seconds in (-1, 4000):
        with pytest.raises(ConfigError, match="0 to 3600"):
            check_ranges(LaunchConfig(poll_s=5, gpu_sample_s=seconds, report_files=[], detach=False, sequential=False))
    LaunchConfig(poll_s=5, gpu_sample_s=0).validate()
