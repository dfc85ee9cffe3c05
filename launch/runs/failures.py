"""Failures of ranks in the event log, so that the first failure can be found among its echoes.

When one rank dies, the others fail too, a moment later, with errors about a lost connection. Torch-free.
"""

from __future__ import annotations

import re
import socket
import traceback
from collections.abc import Iterable
from typing import Any

from launch.errors import ConfigError
from launch.runs.folder import RunFolder

ECHO = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|recv.*timed? ?out|DistBackendError|NCCL|"
    r"socket.*error|ProcessGroup.*(abort|timeout)|timed out waiting|connectFullMesh|DistNetworkError|rank .* failed",
    re.IGNORECASE,
)


def record_failure(folder: RunFolder, attempt: int, rank: int, error: BaseException, step: int | None) -> None:
    """Write the failure of this rank into the event log, traceback included."""
    # A refusal says it all by itself.
    trace = "" if isinstance(error, ConfigError) else "".join(traceback.format_exception(error))
    enter_failure(folder, attempt, rank, cause=f"{type(error).__name__}: {error}", trace=trace, step=step)


def enter_failure(
    folder: RunFolder, attempt: int, rank: int, *, cause: str, trace: str, step: int | None, **more: Any
) -> None:
    """Write the failure of a rank of this host into the event log, whoever noticed it.

    ``more`` says of a rank that did not go on ``hung=True`` and ``since``, the Unix time of its last progress.
    """
    folder.record_event(
        "rank_failed",
        attempt=attempt,
        rank=rank,
        host=socket.gethostname(),
        step=step,
        cause=cause,
        traceback=trace,
        log=str(folder.log(attempt, rank)),
        echo=bool(ECHO.search(cause)),
        **more,
    )


def first_failure(events: Iterable[dict[str, Any]], attempt: int) -> dict[str, Any] | None:
    """The failure that came first in an attempt; an error about a lost peer counts only where there is no other.

    Of ranks that were stuck it is the one that went silent first: the others waited for it.
    """
    failures = [e for e in events if e["event"] == "rank_failed" and e.get("attempt") == attempt]
    return min(failures, key=lambda e: (bool(e.get("echo")), e.get("since", e["time"])), default=None)


def failure_text(failure: dict[str, Any]) -> str:
    """The first failure of a run, for people: who, where, why, and where to read on."""
    step = f" after step {failure['step']}" if failure.get("step") is not None else ""
    head = f"rank {failure['rank']} on {failure['host']} failed first{step}: {failure['cause']}"
    trace = str(failure.get("traceback") or "").rstrip()
    return "\n".join(part for part in (head, trace, f"log: {failure['log']}") if part)
