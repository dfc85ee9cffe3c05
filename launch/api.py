"""The launcher from Python: submit programs and functions, follow their runs, and read results and tables.

    import launch

    job = launch.submit("train.py", args=["--lr", "3e-4"], nodes=2)     # any program
    job = launch.submit(train, lr=3e-4, nodes=2, gpus_per_node=8)       # any function: every rank calls it
    job.wait(); job.result(); job.status; job.logs(rank=3); job.cancel()
    sweep = launch.sweep("train.py", nodes=[1, 2, 4], lr=[1e-3, 3e-4])
    sweep.table()
    for job in launch.jobs("outputs"): ...

Plans, refusals and run folders are those of ``python -m launch``.
"""

from __future__ import annotations

import concurrent.futures
import csv
import inspect
import io
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.config.compose import compose_launch, schema_of, target_of
from launch.errors import CommandParser, ConfigError, closest, refusing, schema_keys
from launch.plan.plan import Plan, unfinished
from launch.runs.compose import flatten
from launch.runs.environment import digest
from launch.runs.find import find_runs, plain_console
from launch.runs.folder import RunFolder, deny_others_writing, make_folder
from launch.script import hydra_text
from launch.slurm.jobs import LocalQueueEntry, start_launcher
from launch.slurm.resolve import plan_sweep
from launch.slurm.status import OVER, RunStatus, explain_end, find_run_status, poll
from launch.slurm.submit import show_plans
from launch.worker import call as calls
from launch.workload import load_workload

POLL_S = 0.5
GROUPS = ("cluster", "script", "resilience", "launch")
"""Groups of keys that a keyword may leave out: ``partition`` means ``cluster.partition``."""
SHORT_TEXT = 40
"""Largest number of characters of a text argument that is used unchanged in the name of the run."""


class JobFailedError(RuntimeError):
    """Raised if a run did not finish. The message has the reason and, if there is one, the log with more details."""


# From keyword arguments to overrides.


def overrides_of(key: str, value: Any, raw_keys: Sequence[str] = ()) -> list[str]:
    """Return the overrides that set ``key`` to a Python value. A mapping sets the keys of a group.

    For a key in ``raw_keys``, a text is used as it is. For other keys, a text gets quotes where Hydra needs them.
    """
    if isinstance(value, Mapping):
        return [text for name, inner in flatten({key: dict(value)}).items() for text in overrides_of(name, inner)]
    if key in raw_keys and isinstance(value, str):
        return [f"{key}={value}"]
    if isinstance(value, tuple):
        value = list(value)
    return [f"{key}={hydra_text(str(value) if isinstance(value, Path) else value)}"]


def workload_of_program(program: Any) -> list[str]:
    """Return the overrides that choose the workload for ``program``, an argument of ``submit``; empty for None."""
    if program is None:
        return []
    if callable(program):
        return ["workload=function", f"name={calls.name_of(program)}"]
    if isinstance(program, list | tuple):
        return ["workload=script", *overrides_of("script.command", [str(word) for word in program])]
    text = str(program)
    is_module = not isinstance(program, Path) and "/" not in text and not text.endswith(".py")
    return ["workload=script", *overrides_of("script.module" if is_module else "script.path", text)]


Point = tuple[list[str], calls.Call | None]
"""One run before its submission: its overrides, and the function call that ranks make; None for a program."""


def point_of(program: Any, args: Sequence[Any], keys: Mapping[str, Any]) -> Point:
    """Return the run that the arguments of ``submit`` describe.

    A keyword in ``keys`` sets the key of the launcher with this name; the name of a group in ``GROUPS`` may be left
    out. If the launcher has no such key, the keyword is an argument of the function, or an option of the program.
    ``args`` are the arguments without names.

    Raises:
        ConfigError: a keyword is a key of the launcher and an argument of the function, or the call cannot work.
    """
    words = workload_of_program(program)
    target = target_of([*words, f"workload={keys['workload']}"] if "workload" in keys else words)
    schema, raw_keys = schema_of(target), load_workload(target).raw_keys
    known, own, given = schema_keys(schema), arguments_of(program), dict[str, Any]()
    for name, value in keys.items():
        key = next((key for key in (name, *(f"{group}.{name}" for group in GROUPS)) if key in known), None)
        if key is not None and name in own:
            raise ConfigError(
                f"{name}, an argument of {calls.name_of(program)} and the key {key} of the launcher",
                "a name with one meaning",
                f"functools.partial({calls.name_of(program)}, {name}=...), or **{{'{key}': ...}} for the launcher",
            )
        if key is not None:
            words += overrides_of(key, value, raw_keys)
        elif callable(program):
            given[name] = value
        else:
            words += overrides_of(name if program is None else f"script.options.{name}", value)
    if callable(program):
        refuse_wrong_arguments(program, args, given, schema)
        named = {**{f"arg{index}": value for index, value in enumerate(args)}, **given}
        words += [f"call.args.{name}={text_of_argument(value)}" for name, value in named.items()]
        words += ["script.resumes=true"] * hasattr(program, "checkpoint")
        return words, calls.Call(program, tuple(args), given)
    if args:
        words += overrides_of("script.args", [str(arg) for arg in args])
    return words, None


def arguments_of(program: Any) -> Sequence[str]:
    """Return the names of a function's arguments; empty for a program.

    Also empty for some built-in functions, whose arguments Python does not know.
    """
    try:
        return tuple(inspect.signature(program).parameters)
    except (TypeError, ValueError):
        return ()


def refuse_wrong_arguments(
    function: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any], schema: type
) -> None:
    """Raise ConfigError if ``function`` cannot be called with the arguments ``args`` and the named arguments ``given``.

    The message also proposes keys of the launcher, from ``schema``.
    """
    try:
        inspect.signature(function).bind(*args, **given)
    except TypeError as error:
        known = arguments_of(function)
        unknown = next((name for name in given if name not in known), "")
        likely = [*closest(unknown, [*known, *schema_keys(schema)]), *known]
        raise ConfigError(
            f"a call of {calls.name_of(function)} that fails: {error}",
            f"the arguments {', '.join(known) or 'none'}, and keys of the launcher",
            f"{likely[0]}=VALUE" if likely else "no argument",
        ) from error
    except ValueError:  # Python does not know the arguments of some built-in functions.
        return


def text_of_argument(value: Any) -> str:
    """Return an argument as text for the name of the run: unchanged if short, else its type and its pickle's hash."""
    is_short = isinstance(value, str) and len(value) <= SHORT_TEXT and "$" not in value
    if is_short or isinstance(value, int | float | None):
        return hydra_text(value)
    kind = type(value).__name__
    return f"{kind}-{digest(calls.pickled(value, f'a {kind} as an argument'))[:8]}"


# Runs.


class Job:
    """A run: state, result, logs and events, read from its folder. Another process may have submitted the run.

    Args:
        run_dir: the run folder.
        launcher: background process that runs the runs of the command (``start_in_background``); None if there is none.
        known_events: number of events before the submission by this process. While the event log has no more events,
            the run is ``pending``: the end of an earlier submission does not count.
    """

    def __init__(
        self, run_dir: str | Path, launcher: subprocess.Popen[bytes] | None = None, known_events: int = 0
    ) -> None:
        self.run_dir = Path(run_dir).absolute()
        self._folder = RunFolder(self.run_dir)
        self._launcher = launcher
        self._known_events = known_events

    def __repr__(self) -> str:
        return f"Job({str(self.run_dir)!r})"

    def _status(self) -> RunStatus:
        point = find_run_status(self._folder)
        problem = poll([point], trust_log=True)
        if problem is not None:
            raise problem
        return point

    @property
    def status(self) -> str:
        """State of the run: pending, running, finished, failed, stopped, cancelled, or another state of
        ``launch.status``.

        Raises:
            SlurmError: Slurm does not answer.
        """
        point = self._status()
        # While the launcher works, the events may be those of an earlier submission.
        has_events = len(self._folder.read_events()) > self._known_events
        has_started = self._launcher is None or has_events or self._launcher.poll() is not None
        return point.state if has_started else "pending"

    def done(self) -> bool:
        """Return whether the run has ended and will not start again."""
        return self.status in OVER

    def running(self) -> bool:
        """Return whether the ranks run."""
        return self.status == "running"

    def cancelled(self) -> bool:
        """Return whether the run was cancelled."""
        return self.status == "cancelled"

    def wait(self, timeout: float | None = None) -> str:
        """Wait until the run ends, at most ``timeout`` seconds (None: no limit), and return its state.

        The state is one of ``launch.slurm.status.OVER``, such as ``finished``, ``failed`` and ``cancelled``. A failed
        run raises nothing here.

        Raises:
            TimeoutError: the run has not ended in time.
            JobFailedError: the process that starts the ranks ended before it could start them.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (state := self.status) not in OVER:
            if self._launcher is not None and self._launcher.poll() is not None and state in ("not started", "unknown"):
                raise JobFailedError(
                    f"{self.run_dir}: the launcher ended before the run; its output: {log_of(self.run_dir)}"
                )
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{self.run_dir} is {state} after {timeout:g} s")
            time.sleep(POLL_S)
        return state

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait until the run ends, and return the exception of the rank that failed first; None for a finished run.

        The exception of a function has the traceback of the rank as a note. A cancelled run gives
        concurrent.futures.CancelledError. Any other end gives a JobFailedError. ``timeout`` is in seconds; None: no
        limit.

        Raises:
            TimeoutError: the run has not ended in time.
            JobFailedError: the process that starts the ranks ended before it could start them.
        """
        state = self.wait(timeout)
        if state == "finished":
            return None
        point = self._status()
        why = explain_end(point)
        if state == "cancelled":
            return concurrent.futures.CancelledError(why)
        failure = point.failure() or {}
        result = None if failure.get("rank") is None else calls.read_result(self.run_dir, int(failure["rank"]))
        if result is None or result.error is None or result.attempt != failure.get("attempt"):
            return JobFailedError(why)
        result.error.add_note(f"on rank {failure['rank']} of {self.run_dir}:\n{result.trace}")
        return result.error

    def result(self, timeout: float | None = None, *, ranks: bool = False) -> Any:
        """Wait until the run ends, and return the value that the function returned on rank 0; None for a program.

        Args:
            timeout: longest wait in seconds; None for no limit.
            ranks: True to return a list with the values of all ranks, in the order of the ranks. Empty for a program.

        Raises:
            TimeoutError: the run has not ended in time.
            Exception: the exception of the function, or another exception that ``exception`` returns.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        values = [result.value for result in calls.read_results(self.run_dir)]
        return values if ranks else values[0] if values else None

    def add_done_callback(self, callback: Callable[[Job], Any]) -> None:
        """Call ``callback`` with this job, in a new thread, when the run has ended.

        If the run has already ended, the call is made soon.
        """

        def follow() -> None:
            self.wait()
            callback(self)

        threading.Thread(target=follow, name="job-callback", daemon=True).start()

    def cancel(self, *, now: bool = False) -> bool:
        """Request the run to save a checkpoint and leave, and wait for its end. Returns whether the run is over.

        With ``now``, the ranks end at once, without time to save.
        """
        from launch.cancel import cancel

        return cancel([self.run_dir], plain_console(), now=now)

    def logs(self, rank: int = 0) -> str:
        """Return everything that a rank printed in the newest attempt; "" if there is no log yet."""
        attempts = self._folder.attempts()
        path = self._folder.log(attempts[-1], rank) if attempts else None
        return path.read_text(errors="replace") if path is not None and path.exists() else ""

    def events(self) -> list[dict[str, Any]]:
        """Return the event log, oldest first: dictionaries with ``event``, ``time`` (Unix seconds) and other fields."""
        return self._folder.read_events()


class Sweep(list[Job]):
    """The runs of one sweep, in the order of its points, and their scaling table."""

    @property
    def folder(self) -> Path:
        """Folder with the run folders and the report."""
        return self[0].run_dir.parent

    def wait(self, timeout: float | None = None) -> list[str]:
        """Wait until all runs have ended, at most ``timeout`` seconds in all (None: no limit). Returns their states."""
        deadline = None if timeout is None else time.monotonic() + timeout
        return [job.wait(None if deadline is None else max(0.0, deadline - time.monotonic())) for job in self]

    def table(self) -> list[dict[str, str]]:
        """Return the scaling table: one dictionary for each point, with the columns of ``scaling.csv`` as text.

        Raises ConfigError if points of one series differ in a condition, such as the hardware or the model.
        """
        from launch.report import csv_text

        return list(csv.DictReader(io.StringIO(csv_text(self._tabulated()))))

    def report(self) -> Path:
        """Write the report of these runs into their folder, and return the path of its HTML page.

        Raises ConfigError if points of one series differ in a condition, such as the hardware or the model.
        """
        from launch.report import write

        return next(path for path in write(self._tabulated()) if path.suffix == ".html")

    def _tabulated(self) -> Any:
        """Return the ScalingTable of the newest sweep in ``folder``; the table of the run if it is the only one."""
        from launch.report import select, tabulate_selection

        return tabulate_selection(select(self[0].run_dir if len(self) == 1 else self.folder))


@dataclass(frozen=True)
class DryRun:
    """Plans of a command that submitted nothing."""

    run_dirs: list[str]
    text: str
    """The plans as text, with the batch scripts for Slurm."""

    def __str__(self) -> str:
        return self.text


def submit(program: Any, *, args: Sequence[Any] = (), dry_run: bool = False, **keys: Any) -> Any:
    """Plan and submit one run. Returns a Job, or with ``dry_run`` a DryRun.

        job = launch.submit(train, lr=3e-4, nodes=2, gpus_per_node=8)
        job.result()

    On a machine without Slurm, a process in the background starts the ranks; it continues when this process ends.

    Args:
        program: a script (``train.py``), a module (``package.train``), a command (a list), a function that every rank
            calls, or None for the GPT of this project.
        args: arguments of the program or the function, without names.
        dry_run: True to plan only.
        keys: keys of the launcher (``nodes``, ``partition``, ``cluster={...}``, ``**{"resilience.requeue": False}``),
            arguments of the function, and options of the program (``lr=3e-4`` for ``--lr=0.0003``).

    Raises:
        ConfigError: the run cannot work. It has ``found``, ``expected`` and ``fix``; nothing was submitted.
    """
    found = start([point_of(program, args, keys)], dry_run)
    return found if isinstance(found, DryRun) else found[0]


def sweep(program: Any, *, args: Sequence[Any] = (), dry_run: bool = False, **keys: Any) -> Any:
    """Plan and submit a run for each combination of the values in lists. Returns a Sweep, or with ``dry_run`` a DryRun.

        launch.sweep("train.py", nodes=[1, 2, 4], lr=[1e-3, 3e-4]).table()

    The arguments are those of ``submit``. A value that is a list itself is written ``[[1, 2]]``.
    """
    values = [value if isinstance(value, list) else [value] for value in keys.values()]
    points = [point_of(program, args, dict(zip(keys, one, strict=True))) for one in itertools.product(*values)]
    found = start(points, dry_run)
    return found if isinstance(found, DryRun) else Sweep(found)


def jobs(path: str | Path = "outputs") -> list[Job]:
    """Return the runs in the folder ``path`` and below it, whichever process has submitted them.

    Raises:
        ConfigError: the folder contains no run.
    """
    return [Job(folder.path) for folder in find_runs([Path(path)])]


# The start of runs, and the process in the background that follows local ones.


def start(points: Sequence[Point], dry_run: bool) -> list[Job] | DryRun:
    """Plan runs and submit them. Returns the runs; with ``dry_run``, submits nothing and returns the plans.

    If all runs are for Slurm, this process submits their jobs. If not, a background process runs all runs.
    """
    output = io.StringIO()
    typed, plans = prepare_points(points, plain_console(file=output), dry_run)
    if dry_run:
        return DryRun([plan.run_dir for plan in plans], output.getvalue())
    known = [len(RunFolder(plan.run_dir).read_events()) for plan in plans]
    launcher = None
    if unfinished(plans):
        if all(plan.cluster == "slurm" for plan in plans):
            from launch.runner import run_sweep

            with redirect_stdout(sys.stderr):
                run_sweep([(compose_launch([*words, "launch.detach=true"]), words) for words in typed])
        else:
            launcher = start_in_background(plans, typed)
    return [Job(plan.run_dir, launcher, count) for plan, count in zip(plans, known, strict=True)]


def start_and_wait(points: Sequence[Point]) -> list[Job]:
    """Plan and submit runs, follow them on the terminal until they end, and report their scaling. Returns the runs.

    A run that fails raises nothing; ``Job.exception`` returns its error.
    """
    from launch.runner import run_sweep

    typed, _ = prepare_points(points, plain_console(file=io.StringIO()))
    documents = [(compose_launch(words), words) for words in typed]
    results = run_sweep(documents, tolerates_failures=True, with_report=len(points) > 1)
    return [Job(result.run_dir) for result in results]


def prepare_points(
    points: Sequence[Point], console: Console, dry_run: bool = False
) -> tuple[list[list[str]], list[Plan]]:
    """Return two lists: the overrides of each run, and the plan of each run.

    Writes a file for each function call. With ``dry_run``, prints the plans on ``console`` and writes nothing.

    Raises:
        ConfigError: a run cannot work; nothing was written.
    """
    deny_others_writing()
    typed: list[list[str]] = []
    files: dict[Path, bytes] = {}
    for words, call in points:
        if call is not None:
            content = calls.dumped(call)
            folder = Path(compose_launch([*words, "call.file=x"]).output_dir).absolute()
            path = folder / ".calls" / f"{digest(content)[:20]}.pkl"  # equal calls have the same file
            files[path] = content
            words = [*words, *overrides_of("call.file", str(path))]
        typed.append(words)
    documents = [compose_launch([*words, f"dry_run={str(dry_run).lower()}"]) for words in typed]
    plans, configs = plan_sweep(documents, typed, console)
    if dry_run:
        show_plans(plans, configs, console)
        return typed, plans
    for path, content in files.items():
        if not path.exists():
            calls.write_call(path, content)
    return typed, plans


def log_of(run_dir: Path) -> Path:
    """Return the path of the log of the background process that runs the point of ``run_dir``.

    All points in the same parent folder have the same log.
    """
    return run_dir.parent / ".launch" / "launcher.log"


def start_in_background(plans: Sequence[Plan], typed: Sequence[Sequence[str]]) -> subprocess.Popen[bytes]:
    """Start a background process that runs the points. Wait until it has queued or started each unfinished point.

    Returns the background process.

    Args:
        plans: plan of each point.
        typed: overrides of each point.

    Raises:
        JobFailedError: the background process ended before it had queued or started each point. The message has the
            output of that process.
    """
    log = log_of(Path(plans[0].run_dir))
    make_folder(log.parent)
    points = log.with_name("points.json")
    points.write_text(json.dumps([list(words) for words in typed]))
    known = {plan.run_dir: len(RunFolder(plan.run_dir).read_events()) for plan in unfinished(plans)}
    log.unlink(missing_ok=True)
    process = start_launcher(["launch.api", str(points)], log)
    for run_dir, count in known.items():
        folder = RunFolder(run_dir)
        while LocalQueueEntry(folder).events_before() is None and len(folder.read_events()) <= count:
            if process.poll() is not None:
                printed = log.read_text(errors="replace")
                raise JobFailedError(f"the launcher ended with {process.returncode}:\n{printed}")
            time.sleep(POLL_S / 10)
    return process


@refusing
def main() -> int:
    """Run the points that ``start_in_background`` has written into the file that the first argument names.

    Returns the exit status: 0 all points finished, 1 a point failed, 2 refused.
    """
    from launch.runner import run_sweep

    parser = CommandParser(prog="launch.api", description="Run the points that launch.submit has planned.")
    parser.add_argument("points", type=Path, metavar="FILE", help="JSON list with the overrides of each point")
    typed = json.loads(parser.parse_args().points.read_text())
    deny_others_writing()
    run_sweep([(compose_launch(words), words) for words in typed])
    return 0


if __name__ == "__main__":
    sys.exit(main())
