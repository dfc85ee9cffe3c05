"""Failures of ranks in the event log, so that the first failure can be found among its echoes.

When one rank dies, the others fail too, a moment later, with errors about a lost connection. Torch-free.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.heartbeat import ENVIRONMENT as HEARTBEAT_DIR

ECHO = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|connect timeout|recv.*timed? ?out|DistBackendError|"
    r"NCCL|socket.*error|ProcessGroup.*(abort|timeout)|timed out waiting|connectFullMesh|DistNetworkError|"
    r"rank .* failed",
    re.IGNORECASE,
)


def record_failure(folder: RunFolder, attempt: int, rank: int, error: BaseException, step: int | None) -> None:
    """Write the failure of this rank into the event log, with its traceback where no rank of this node has written it.

    Thousands of ranks fail together, all but one about a lost peer, and every agent reads the whole log.
    """
    cause = f"{type(error).__name__}: {error}"
    # A refusal says it all by itself.
    trace = "" if isinstance(error, ConfigError) else "".join(traceback.format_exception(error))
    same = same_failure(rank, failure_kind(cause, places_of(error))) if trace else None
    if same is None:
        enter_failure(folder, attempt, rank, cause=cause, trace=trace, step=step)
    else:
        enter_failure(folder, attempt, rank, cause=cause, trace=same_text(same), step=step, same_as=same)


def places_of(error: BaseException) -> str:
    """Files and lines that an exception went through: the same for ranks that fail alike, whatever it says of each."""
    return "\n".join(f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__))


def failure_kind(cause: str, places: str) -> str:
    """Name failures that one traceback speaks for: errors about a lost peer, or those of the same places."""
    return "echo" if ECHO.search(cause) else f"{cause.partition(':')[0]}\n{places}"


def same_failure(rank: int, kind: str) -> int | None:
    """Return the rank of this node that has failed like this before, in this attempt; None where ``rank`` is the first.

    A file tells it, in the folder that the agent keeps for its ranks of one attempt; without an agent all are first.
    """
    folder = os.environ.get(HEARTBEAT_DIR)
    if folder is None:
        return None
    marker = Path(folder) / f"failure_{hashlib.sha256(kind.encode()).hexdigest()[:16]}"
    try:
        own = Path(f"{marker}.{rank}")
        own.write_text(str(rank))
        os.link(own, marker)  # whole from the moment that it is there
    except FileExistsError:
        return int(marker.read_text())
    except OSError:  # a full disk, or a folder that is gone
        return None
    return None


def same_text(rank: int) -> str:
    """Text in place of a traceback that another rank has written."""
    return f"as rank {rank} of this host, which has the traceback; this rank's is in its log"


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
    first = min(failures, key=lambda e: (bool(e.get("echo")), e.get("since", e["time"])), default=None)
    if first is None or "same_as" not in first:
        return first
    # The rank with the traceback may have been slower to write it.
    of_host = [e for e in failures if e["host"] == first["host"] and "same_as" not in e]
    return next((e for e in of_host if e["rank"] == first["same_as"]), first)


def failure_text(failure: dict[str, Any]) -> str:
    """The first failure of a run, for people: who, where, why, and where to read on."""
    step = f" after step {failure['step']}" if failure.get("step") is not None else ""
    head = f"rank {failure['rank']} on {failure['host']} failed first{step}: {failure['cause']}"
    trace = str(failure.get("traceback") or "").rstrip()
    return "\n".join(part for part in (head, trace, f"log: {failure['log']}") if part)
