"""Stand-in for nvidia-ml-py on a machine without a driver: the functions that the agent calls, with their signatures.

It is copied as ``pynvml.py`` to where a run finds it, and imports nothing of this project. GPU 0 tells everything, and
uses 250 W by its counter and by its gauge; GPU 1 is of an older kind; GPU 2 belongs to another job.
"""

# ruff: noqa: N801, N816, N818  (names of the library)
import time
from types import SimpleNamespace

NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
nvmlEventTypeXidCriticalError = 8
BUSES = ("00000000:3B:00.0", "00000000:D8:00.0", "00000000:E1:00.0")
LISTED = 1
"""GPUs that the driver counts."""
WATTS = 250
xids = [79, 43]
"""Xid errors that GPU 0 has to tell; 43 is an application's."""

used = [2**29]
"""Bytes in use on GPU 0, one for each reading; the last one stays."""
users: list[int] = []
"""Processes that compute on it."""


class NVMLError(Exception): ...


class NVMLError_NotSupported(NVMLError): ...


class NVMLError_NoPermission(NVMLError): ...


class NVMLError_FunctionNotFound(NVMLError): ...


class NVMLError_Timeout(NVMLError): ...


class NVMLError_GpuIsLost(NVMLError): ...


def nvmlInit() -> None: ...


def nvmlDeviceGetCount() -> int:
    return LISTED


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    if index == 2:
        raise NVMLError_NoPermission
    return index


def nvmlDeviceGetPciInfo(handle: int) -> SimpleNamespace:
    return SimpleNamespace(busId=BUSES[handle].encode() if handle else BUSES[handle])


def nvmlDeviceGetPowerUsage(handle: int) -> int:
    return 1000 * WATTS if handle == 0 else 300_500


def nvmlDeviceGetTotalEnergyConsumption(handle: int) -> int:
    if handle == 1:  # before Volta
        raise NVMLError_NotSupported
    return int(1000 * WATTS * time.time())


def nvmlDeviceGetClockInfo(handle: int, type: int) -> int:
    return {NVML_CLOCK_SM: 1755, NVML_CLOCK_MEM: 2619}[type]


def nvmlDeviceGetTemperature(handle: int, sensor: int) -> int:
    if handle == 1:
        raise NVMLError_GpuIsLost
    return 61


def nvmlDeviceGetCurrentClocksThrottleReasons(handle: int) -> int:
    return 0x4 if handle == 0 else 0x1


def nvmlDeviceGetTotalEccErrors(handle: int, errorType: int, counterType: int) -> int:
    if handle == 1:
        raise NVMLError_NotSupported
    return 7


def nvmlDeviceGetPersistenceMode(handle: int) -> int:
    return 1


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:
    if handle == 1:
        raise NVMLError_NotSupported
    return SimpleNamespace(used=used.pop(0) if len(used) > 1 else used[0])


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in users]


def nvmlEventSetCreate() -> str:
    return "events"


def nvmlDeviceRegisterEvents(handle: int, eventTypes: int, eventSet: str) -> None:
    if handle == 1:
        raise NVMLError_NotSupported


def nvmlEventSetWait_v2(eventSet: str, timeoutms: int) -> SimpleNamespace:
    if not xids:
        raise NVMLError_Timeout
    return SimpleNamespace(device=0, eventData=xids.pop(0))
