"""Comparison of training steps in turns: each contestant has its own process, and makes steps when the referee asks.

The referee is the program that compares. A contestant prints a line of JSON when it is warm, then answers each line
that it gets. So a comparison has both sides in one run on one machine, and other load of the machine affects both.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
WARM = 4
"""Number of steps before the first turn. In these steps kernels are chosen and graphs are compiled."""


@dataclass
class Contestant:
    """One of the processes that are compared. It makes training steps when the referee, the program that compares, asks
    for them."""

    name: str
    process: subprocess.Popen[str]
    told: dict[str, Any] = field(default_factory=dict)
    """Properties that the process has reported after its warm-up."""
    failure: str = ""
    """Reason why the process failed; empty: it has not failed."""
    wall: list[float] = field(default_factory=list)
    """Wall time of a step in seconds, one value for each round."""
    cpu: list[float] = field(default_factory=list)
    """Processor time of a step in seconds, one value for each round."""

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Return the next answer of the process; an empty dict if the process fails or does not answer within
        ``limit_s`` seconds.
        """
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], max(0.0, limit_s))[0]:
            told: dict[str, Any] = json.loads(self.process.stdout.readline() or '{"failure": "ended without a word"}')
        else:
            told = {"failure": f"no answer within {limit_s:.0f} s"}
        self.failure = told.get("failure", "")
        return {} if self.failure else told

    def ask(self, word: str, limit_s: float) -> dict[str, Any]:
        """Send the line ``word`` to the process and return the answer, as ``answer`` does."""
        assert self.process.stdin is not None
        try:
            print(word, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self.failure = "ended without a word"
            return {}
        return self.answer(limit_s)

    def turn(self, steps: int, limit_s: float) -> None:
        """Let the process make ``steps`` steps. Append the mean wall time and the mean processor time of one of these
        steps to ``wall`` and ``cpu``. ``limit_s`` is the time limit in seconds."""
        told = self.ask(str(steps), limit_s)
        if told:
            self.wall.append(told["wall"])
            self.cpu.append(told["cpu"])


@contextlib.contextmanager
def opened(
    name: str, command: Sequence[str], environment: Mapping[str, str], *, log: Path | None = None, verbose: bool = False
) -> Iterator[Contestant]:
    """Start the process of a contestant, yield the contestant, and kill the process at the end.

    Args:
        name: name of the contestant.
        command: command line to run in the folder of this checkout.
        environment: environment variables in addition to those of this process.
        log: file for standard error; None: ``verbose`` decides.
        verbose: without ``log``: True prints standard error, False drops it.
    """
    with contextlib.ExitStack() as stack:
        stderr: Any = None if verbose else subprocess.DEVNULL
        if log is not None:
            stderr = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [*command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": python_path(), **environment},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        try:
            yield Contestant(name, process)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()


def python_path() -> str:
    """Return PYTHONPATH for a contestant: this checkout, then the PYTHONPATH of this process."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def take_turns(
    contestants: Sequence[Contestant], rounds: int, steps: Callable[[Contestant], int], left_s: Callable[[], float]
) -> None:
    """Let each contestant make steps in each round, in another order each time, until the rounds or the time are over.
    A contestant is a process that makes training steps.

    Args:
        contestants: contestants after their warm-up. A contestant that fails takes no further turn.
        rounds: number of rounds.
        steps: function that returns the number of steps in a turn of a contestant.
        left_s: function that returns the seconds until the deadline. They are the time limit of a turn, and no round
            begins if none are left.
    """
    there = [one for one in contestants if not one.failure]
    for number in range(rounds):
        if left_s() <= 0:
            break
        shift = number % max(1, len(there))
        for one in [*there[shift:], *there[:shift]]:
            one.turn(steps(one), left_s())
        there = [one for one in there if not one.failure]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median over the rounds of the time ``theirs`` divided by the time ``ours``."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=False))


@dataclass
class Served:
    """The training step that a contestant's process runs, and the requests that it answers."""

    step: Callable[[], object]
    told: dict[str, Any]
    """Properties that the process reports after its warm-up."""
    device: str
    commands: Mapping[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)
    """Request of the referee -> function that returns the answer. ``serve`` itself handles a number of steps, the other
    kind of request."""
    hear: Callable[[], str] = sys.stdin.readline
    """Returns the next line of the referee. With several ranks, every rank gets the same line."""


def serve(build: Callable[[], Served]) -> None:
    """Call ``build``, and make ``WARM`` steps. Then answer each line of the referee: a number of steps to make, or a
    request in ``Served.commands``. Only rank 0 prints answers.

    The caller ends the process by ``os._exit``, because this function ends neither the process group nor the threads of
    a run.
    """
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not part of the conversation
    answers = int(os.environ.get("RANK", "0")) == 0

    def say(told: Mapping[str, Any]) -> None:
        if answers:
            print(json.dumps(told), file=talk, flush=True)

    try:
        served = build()
        for _ in range(WARM - 1):
            served.step()
        wall, _ = timed(served, 1)
        say({**served.told, "step_s": wall})
        while line := served.hear().strip():
            if line.isdigit():
                wall, cpu = timed(served, int(line))
                say({"wall": wall, "cpu": cpu})
            else:
                say(served.commands[line]())
    except Exception as error:
        traceback.print_exc()
        say({"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def timed(served: Served, steps: int) -> tuple[float, float]:
    """Make ``steps`` steps, and return the mean wall time and processor time of one step, in seconds. The clock stops
    after the device has finished.
    """
    if served.device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        served.step()
    if served.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps
