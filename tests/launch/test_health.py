"""Health checks of a node before a start, and its GPU telemetry."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from launch.agent import health
from launch.agent.health import (
    GpuError,
    GpuReading,
    HealthCheck,
    Nvml,
    describe_faults,
    fault_of_program,
    full_disks,
    gpus_of_run,
    links_up,
    sampling,
)
from launch.agent.ranks import bind_ranks, cpus_of_ranks
from launch.config import Config, ResilienceConfig
from launch.doctor import findings
from launch.runs.environment import Gpu, GpuSample, append_samples, read_samples
from launch.runs.events import select_events
from launch.runs.folder import RunFolder
from tests.support.commands import run
from tests.support.planning import refused
from tests.support.runs import LOCAL, causes, write_script

A, B, C = "0000:3b:00.0", "0000:d8:00.0", "0000:e1:00.0"


SLOW = f"GPU {B}: its clocks are lowered (hardware slowdown, too hot)"
FEW = "1 GPUs answer, and cluster.gpus_per_node=2"


@pytest.mark.parametrize(
    ("now", "expected", "found"),
    [
        ([GpuReading(A, 5), GpuReading(B, 0)], 2, []),
        ([GpuReading(A, 7), GpuReading(B)], None, [f"GPU {A}: 2 uncorrected memory errors since the first start"]),
        ([GpuReading(A, 5, 0x05 | 0x20), GpuReading(B, 0, 0x48)], 2, [SLOW]),
        ([GpuReading(A, 5, xids=(79,)), GpuReading(B)], 2, [f"GPU {A}: Xid 79 since the first start"]),
        ([GpuReading(A, problem="lost"), GpuReading(B)], 2, [f"GPU {A}: lost", FEW]),
    ],
)
def test_gpus_are_compared_with_their_state_at_the_first_start(
    now: list[GpuReading], expected: int | None, found: list[str]
) -> None:
    assert list(describe_faults(now, [GpuReading(A, 5), GpuReading(B, 0)], expected)) == found


def test_links_are_physical_interfaces_and_active_ports(tmp_path: Path) -> None:
    for name, carrier, physical in (("eth0", "1", True), ("ib0", "0", True), ("docker0", "1", False)):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "carrier").write_text(f"{carrier}\n")
        if physical:
            (tmp_path / "net" / name / "device").mkdir()
    for port, state in (("1", "4: ACTIVE"), ("2", "1: DOWN")):
        (tmp_path / "infiniband" / "mlx5_0" / "ports" / port).mkdir(parents=True)
        (tmp_path / "infiniband" / "mlx5_0" / "ports" / port / "state").write_text(f"{state}\n")
    assert links_up(tmp_path) == {"eth0", "mlx5_0/1"}


def test_a_link_that_was_up_at_the_first_start_has_to_stay_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up = {"eth0", "ib0"}
    monkeypatch.setattr("launch.agent.health.links_up", lambda: set(up))
    check = HealthCheck(tmp_path, ResilienceConfig(), None)
    assert check.examine() == []
    up.remove("ib0")
    assert [fault.found for fault in check.examine()] == ["link ib0 is down, and was up at the first start"]
    up.add("ib0")
    assert check.examine() == []


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("exit 0", ""),
        ("echo fan 3 is dead; echo; exit 4", "sh left with status 4: fan 3 is dead"),
        ("kill -9 $$", "sh left with signal 9"),
        ("sleep 1000 & wait", "sh gave no answer in 0.5 s"),
    ],
)
def test_the_command_of_the_site_reports_a_fault_with_its_last_line(script: str, found: str) -> None:
    assert fault_of_program(["sh", "-c", script], 0.5 if "sleep" in script else 60) == found


def test_each_part_that_fails_is_a_fault_unless_the_check_is_off(tmp_path: Path) -> None:
    (fault,) = HealthCheck(tmp_path / "gone", ResilienceConfig(), None).examine()
    assert fault.part == "run folder" and "No such file" in fault.found
    limits = ResilienceConfig(health_check="no-such-program-here --quick")
    (fault,) = HealthCheck(tmp_path, limits, 8).examine()  # without a driver there are no GPUs to miss
    assert fault.part == "command" and "cannot be run: No such file" in fault.found
    limits.health_check = False
    assert HealthCheck(tmp_path / "gone", limits, None).examine() == []


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"f_bavail": 1}, "has 1.0 MiB free, less than 4"),
        ({"f_flag": os.ST_RDONLY}, "is mounted read-only"),
        ({"f_favail": 0}, "has no free inode"),
        ({"f_files": 0, "f_favail": 0}, None),  # a filesystem that does not count them
        ({}, None),
    ],
)
def test_a_full_or_read_only_filesystem_is_a_fault(
    told: dict[str, int], found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = {"f_bavail": 9, "f_frsize": 2**20, "f_flag": 0, "f_files": 9, "f_favail": 9}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**{**sound, **told}))
    assert list(full_disks([tmp_path])) == ([] if found is None else [f"{tmp_path} {found}"])


@pytest.mark.parametrize("command", ["check 'it", [], ""])
def test_a_malformed_check_command_is_refused(command: object) -> None:
    config = Config(resilience=ResilienceConfig(health_check=command))
    assert "a program" in refused(config.validate, found="resilience.health_check=").expected
    assert ResilienceConfig(health_check="a 'b c'").health_command == ["a", "b c"]


def test_the_doctor_names_sick_nodes() -> None:
    sound = {"python": "3.11.7", "torch": "2.13.0", "open_files": 65536}
    nodes = [{"host": "n1", "faults": [], **sound}, {"host": "n2", "faults": ["the fan is dead"], **sound}]
    (finding,) = findings.check_node_records({"nodes": nodes})
    assert finding.found == "n2: the fan is dead" and finding.fix == "cluster.exclude=n2"


def test_a_node_that_becomes_sick_between_two_starts_is_named_and_refused(tmp_path: Path) -> None:
    """The rank breaks its node and dies; there is neither a spare nor a queue here."""
    mark = tmp_path / "fan is dead"
    script = write_script(tmp_path, f"import os, pathlib\npathlib.Path({str(mark)!r}).touch()\nos._exit(1)\n")
    checking = f"import os, sys\nsys.exit('the fan is dead' if os.path.exists({str(mark)!r}) else 0)\n"
    check = write_script(tmp_path, checking, "check.py")
    words = [*LOCAL, "nodes=1", f"script.path={script}", "script.resumes=true", f"run_dir={tmp_path / 'run'}"]
    command = f"resilience.health_check=[{sys.executable},{check}]"
    text = run("launch", *words, command, cwd=tmp_path, status=1)
    folder = RunFolder(tmp_path / "run")
    assert causes(folder) == ["crashed", "node_failed"]
    (told,) = select_events(folder.read_events(), "node_sick")
    assert told["cause"] == f"{sys.executable} left with status 1: the fan is dead"
    for part in ("is sick: ", "expected: 1 healthy nodes", "type next: resilience.health_check=false"):
        assert part in text
    status = run(f"launch.status {tmp_path / 'run'}", cwd=tmp_path)
    assert "is sick and was left out" in status and "the fan is dead" in status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """nvidia-ml-py with three GPUs, one of them another job's."""
    fake = importlib.reload(importlib.import_module("tests.support.programs.fake_pynvml"))
    monkeypatch.setattr(fake, "LISTED", 3)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    yield fake


def test_gauges_have_si_units_and_unknown_gauges_are_absent(driver: ModuleType) -> None:
    nvml = Nvml()
    assert nvml.buses() == [A, B], "the third is another job's"
    found = nvml.read_gauges([A, B])
    counter = found[A].pop("energy_j")
    clocks = {"sm_clock_mhz": 1755, "memory_clock_mhz": 2619}
    assert found[A] == {"power_w": 250.0, **clocks, "temperature_c": 61, "throttle_reasons": 4}
    assert found[B] == {"power_w": 300.5, **clocks, "throttle_reasons": 1}
    assert nvml.read_gauges([A])[A]["energy_j"] >= counter and nvml.read_gauges([A]).keys() == {A}


def test_nvml_gives_memory_errors_throttling_and_xid_errors(driver: ModuleType) -> None:
    nvml = Nvml()
    expected = [GpuReading(A, 7, 4, xids=(79,), used=2**29), GpuReading(B, None, 1)]
    assert nvml.read_health() == expected and nvml.read_health() == expected, "Xid 43 is an application's"


def test_ranks_start_again_when_the_gpus_have_given_back_their_memory(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU keeps the memory of a killed process for seconds; of one that hangs in the driver, for ever."""
    monkeypatch.setattr(health, "DRIVER", tmp_path)
    monkeypatch.setattr(health, "visible_gpus", lambda: [])
    monkeypatch.setattr(health, "MEMORY_POLL_S", 0.001)
    driver.xids.clear()
    check = HealthCheck(tmp_path, ResilienceConfig(), None)
    assert check.examine() == []
    driver.used[:] = [40 * 2**30, 40 * 2**30, 2**30]
    assert check.examine() == [] and driver.used == [2**30]
    monkeypatch.setattr(health, "MEMORY_WAIT_S", 0.05)
    driver.used[:] = [40 * 2**30]
    driver.users[:] = [4711]
    (fault,) = check.examine()
    assert fault.found == f"GPU {A}: 40.0 GiB are in use 0.05 s after the ranks have ended, by process 4711"


def test_a_driver_that_does_not_answer_is_an_error(driver: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_only_gpus_that_certainly_belong_to_the_run_are_sampled(
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


def test_samples_are_taken_at_the_start_every_interval_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "GPU_SAMPLE_S", 0.001)
    reader, found = Reader(wanted=3), list[health.Sample]()
    with sampling(reader, lambda there: there, found.extend):
        assert reader.enough.wait(240)
    powers = [gauges[A]["power_w"] for _, gauges in found]
    assert powers[:2] == [100.0, 300.0], "at the second time it did not answer, and nothing is made up"
    assert powers[-1] == 100.0 * reader.asked, "the last one is at the end"


def test_a_hung_driver_does_not_delay_the_end_of_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LAST_SAMPLE_S", 0.01)
    release, written = threading.Event(), list[health.Sample]()
    with sampling(Reader(block=release), lambda there: there, written.extend):
        pass
    assert not written
    release.set()


def test_samples_are_read_as_written_and_other_lines_are_skipped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    gauges = {A: {"power_w": 412.3, "energy_j": 3000.125, "throttle_reasons": 4}, B: {"power_w": 71.0}}
    sample = GpuSample(1e9, 1, "n3", gauges)
    append_samples(folder, 0, [sample])
    with folder.telemetry(0).open("a") as file:
        file.write('{"time": 1, "attempt": 1, "host": "n3"}\n{"bus": [], "time": "x"}\n{"time": 2, "att')
    append_samples(folder, 0, [sample])
    assert list(read_samples(folder, 0)) == [sample, sample]
    assert '"temperature_c"' not in folder.telemetry(0).read_text()


# CPUs of the ranks.


NEAR = {"0000:01:00.0": "0-3,8-11", "0000:02:00.0": "0-3,8-11", "0000:81:00.0": "4-7,12-15\n"}
"""Machine of two sockets with 8 CPUs each: PCI address of a GPU -> CPUs near it, as Linux lists them."""


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    for bus, cpus in NEAR.items():
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "local_cpulist").write_text(cpus)
    return tmp_path


def gpus(*buses: str | None) -> list[Gpu]:
    return [Gpu(str(index), "H100", None, bus) for index, bus in enumerate(buses)]


FIRST_GPU, SECOND_GPU, THIRD_GPU = NEAR
FIRST, SECOND = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("buses", "ranks", "allowed", "expected"),
    [
        ((FIRST_GPU, SECOND_GPU, THIRD_GPU), 3, range(16), [FIRST, FIRST, SECOND]),
        ((FIRST_GPU, SECOND_GPU, THIRD_GPU), 2, range(16), [FIRST, FIRST]),
        ((FIRST_GPU, THIRD_GPU), 2, range(6), [[0, 1, 2, 3], [4, 5]]),  # those of the job alone
        ((FIRST_GPU, SECOND_GPU, THIRD_GPU), 3, range(5), [[0, 1, 2, 3], [0, 1, 2, 3], [4]]),
        ((FIRST_GPU, SECOND_GPU, THIRD_GPU), 3, [0, 4, 5], None),  # one CPU near two GPUs
        ((FIRST_GPU, SECOND_GPU, THIRD_GPU), 3, range(4), None),  # none near the third
        ((FIRST_GPU, SECOND_GPU), 2, FIRST, None),  # all are near
        ((FIRST_GPU, None, THIRD_GPU), 3, range(16), None),  # Slurm hides which it is
        ((FIRST_GPU, "0000:ff:00.0"), 2, range(16), None),
        ((FIRST_GPU,), 2, range(16), None),
        ((), 1, range(16), None),
    ],
)
def test_each_rank_is_bound_to_the_cpus_near_its_gpu(
    devices: Path, buses: tuple[str | None, ...], ranks: int, allowed: list[int], expected: list[list[int]] | None
) -> None:
    found = cpus_of_ranks(ranks, gpus(*buses), allowed, devices)
    assert (None if found is None else [sorted(cpus) for cpus in found]) == expected


def test_a_started_rank_is_moved_to_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    last = max(os.sched_getaffinity(0))
    monkeypatch.setattr("launch.agent.ranks.cpus_of_ranks", lambda ranks, gpus, allowed: [frozenset([last])])
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as rank:
        bind_ranks({0: rank.pid})
        assert os.sched_getaffinity(rank.pid) == {last}
        rank.communicate()
