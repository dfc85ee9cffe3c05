"""A function call that every rank of a run makes: the file of the call, the program of a rank, and the stored results.

    python -m gpt_launch.launch.worker.call FILE      run by each rank: call the function of FILE, store the result

The login node writes FILE by cloudpickle, as submitit does. So functions of a notebook and lambdas work as well. Does
not import torch.
"""

# Relative imports: a rank loads this module as gpt_launch.launch.worker.call, because the user may have a launch.py.

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle

from ..errors import ConfigError
from ..runs.folder import is_own, numbers_in, write_atomically

REQUEUE_EXIT = 75
"""Exit status with which a rank requests a requeue after it has saved (EX_TEMPFAIL of sysexits.h)."""
RESULTS = "results"
"""Name of the folder in the run folder with the results of the ranks, and with the call that a requeued run makes."""
NEXT_CALL = "next_call.pkl"


@dataclass(frozen=True)
class Call:
    """A function and the arguments with which every rank calls it."""

    function: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    path: Sequence[str] = ()
    """Folders in which the submitting process searched for modules. A rank searches them last."""


@dataclass(frozen=True)
class Result:
    """Return value or exception of a call on one rank."""

    attempt: int
    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    """Traceback of ``error`` as text."""


def dumped(call: Call) -> bytes:
    """Return a call as bytes. The bytes name no class of this module, since the module has another name in a rank.

    Raises:
        ConfigError: the function or an argument cannot be pickled.
    """
    content = {**vars(call), "path": [folder for folder in sys.path if folder]}
    return pickled(content, f"a call of {name_of(call.function)}")


def pickled(value: Any, what: str) -> bytes:
    """Return ``value`` as bytes of cloudpickle.

    Raises ConfigError, with ``what`` as the name, if this is not possible.
    """
    try:
        content: bytes = cloudpickle.dumps(value)
    except Exception as error:  # A user's class can raise any exception.
        raise ConfigError(
            f"{what} that cannot be pickled: {error}",
            "a function and arguments that pickle or cloudpickle can write",
            "open files, locks, sockets and generators inside the function",
        ) from error
    return content


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, or of the class of a callable object, with characters of identifiers only."""
    name = getattr(function, "__name__", type(function).__name__)
    return "".join(letter for letter in name if letter.isalnum() or letter in "_-") or "function"


def write_call(path: Path, content: bytes) -> None:
    """Write the file of a call. Only this user can read it."""
    write_atomically(path, content, 0o600)


def load(path: Path) -> Any:
    """Return the content of a pickle that this user has written.

    Raises:
        ConfigError: another user owns the file or may write into it; a pickle is code.
    """
    with path.open("rb") as file:
        if not is_own(file):
            raise ConfigError(
                f"{path}, which others can change or own", "a file of this user alone", f"chmod go-w {path}"
            )
        return pickle.load(file)


def read_result(run_dir: Path, rank: int) -> Result | None:
    """Return the result of a rank; None if the rank has stored none.

    Raises:
        ConfigError: another user owns the file of the result, or may write into it.
    """
    path = run_dir / RESULTS / f"rank_{rank:05d}.pkl"
    return Result(**load(path)) if path.exists() else None


def read_results(run_dir: Path) -> list[Result]:
    """Return the results of all ranks that have one, in the order of the ranks.

    Raises:
        ConfigError: another user owns a file of a result, or may write into it.
    """
    ranks = numbers_in(run_dir / RESULTS, "rank_", ".pkl")
    return [result for rank in ranks if (result := read_result(run_dir, rank))]


def store_result(run_dir: Path, rank: int, result: Result) -> None:
    """Write the result of a rank. An exception that cannot be pickled is replaced by a RuntimeError with its text."""
    try:
        content = cloudpickle.dumps(vars(result))
        pickle.loads(content)  # Some exceptions can be written, and not read.
    except Exception as error:
        if result.error is None:
            raise TypeError(f"the return value of rank {rank} cannot be pickled: {error}") from error
        text = f"{type(result.error).__name__}: {result.error}"
        content = cloudpickle.dumps({**vars(result), "error": RuntimeError(text)})
    write_atomically(run_dir / RESULTS / f"rank_{rank:05d}.pkl", content, 0o600)


def requeue_by_checkpoint(call: Call, run_dir: Path, rank: int) -> None:
    """Install a handler of SIGTERM and SIGUSR2 that lets a rank request a requeue with a new call.

    The handler calls ``call.function.checkpoint`` with the arguments of ``call``. If the method returns a
    ``DelayedSubmission``, rank 0 stores this new call in the run folder, and the rank ends with the status
    ``REQUEUE_EXIT``. The requeued run makes the stored call. If the method returns None, the rank ends without a
    requeue. This is submitit's protocol: the function is an object with ``__call__`` and ``checkpoint``, which take the
    same arguments.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        following = call.function.checkpoint(*call.args, **call.kwargs)  # type: ignore[attr-defined]
        if following is None:
            raise SystemExit(128 + number)
        if rank == 0:
            later = Call(following.function, following.args, following.kwargs)
            write_call(run_dir / RESULTS / NEXT_CALL, dumped(later))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(REQUEUE_EXIT)  # An exception could end in an ``except`` of the function.

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, leave)


def main() -> int:
    """Run one rank: make the call of ``launch.api.submit``, and store its result in the run folder.

    A requeued run makes the call that was stored before. Returns the exit status, 0. An exception of the function is
    stored, too, and then ends the process.
    """
    run_dir, rank = Path(os.environ["LAUNCH_RUN_DIR"]), int(os.environ["RANK"])
    attempt = int(os.environ["LAUNCH_ATTEMPT"])
    requeued = run_dir / RESULTS / NEXT_CALL
    call = Call(**load(requeued if requeued.exists() else Path(sys.argv[1])))
    sys.path.extend(folder for folder in call.path if folder not in sys.path)
    if hasattr(call.function, "checkpoint"):
        requeue_by_checkpoint(call, run_dir, rank)
    try:
        value = call.function(*call.args, **call.kwargs)
    except Exception as error:
        store_result(run_dir, rank, Result(attempt, error=error, trace=traceback.format_exc()))
        raise
    store_result(run_dir, rank, Result(attempt, value))
    return 0


if __name__ == "__main__":
    sys.exit(main())
