"""Collectives that succeed or fail on all ranks alike: a failure of one rank is raised on every rank, and none waits.

Owns the two collectives that the checkpoint store is made of. Must not know what the ranks do.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from gpt.checkpoint import messages

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A save or a load failed on some rank; raised on every rank with the failure of the lowest."""


def run_on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Run ``action`` on every rank; every rank gets the results of all, by rank.

    Args:
        action: what it returns is sent, as ``gpt.checkpoint.messages`` can.
        group: gloo group of the ranks; None means the default group.

    Raises:
        CheckpointError: it raised on some rank; raised on every rank.
    """
    cause: BaseException | None = None
    try:
        outcome = messages.encode((action(), None))
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is a BaseException
        outcome, cause = messages.encode((None, explain(error))), error
    outcomes = [messages.decode(message) for message in messages.gather_bytes(outcome, group)]
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise CheckpointError(f"rank {rank}: {failure}") from cause
    return [result for result, _ in outcomes]


def run_on_first_rank(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run ``action`` on rank 0 only; every rank gets its result, or CheckpointError."""
    first = dist.get_rank(group) == 0
    results: list[T | None] = run_on_all_ranks(lambda: action() if first else None, group)
    return results[0]  # type: ignore[return-value]


def explain(error: BaseException) -> str:
    """Format an error as one line, with its traceback below."""
    cause = error
    # DCP wraps the errors of all ranks; the first one's own line says more than the wrapper's.
    if isinstance(error, CheckpointException) and error.failures:
        cause = error.failures[min(error.failures)][0]
    line = "".join(traceback.format_exception_only(type(cause), cause)).strip()
    return f"{line}\n\n{''.join(traceback.format_exception(error))}"
