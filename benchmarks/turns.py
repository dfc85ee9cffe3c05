"""Contestants that step in turn: each has its own process, and a referee starts each turn.

A contestant prints a line of JSON when it is warm, then answers each line that it gets. So a comparison has both
sides in one run on one machine, and other load of the machine affects both.
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
"""Steps before the first turn: kernels are chosen, graphs compiled, buckets settled."""


@dataclass
class Contestant:
    """One process that steps when it is told to."""

    name: str
    process: subprocess.Popen[str]
    told: dict[str, Any] = field(default_factory=dict)
    """What it said of itself when it was warm."""
    failure: str = ""
    wall: list[float] = field(default_factory=list)
    """Seconds of a step, by round."""
    cpu: list[float] = field(default_factory=list)
    """Processor seconds of a step, by round."""

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Read its next answer; none where it has failed, or takes longer than ``limit_s`` seconds."""
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], max(0.0, limit_s))[0]:
            told: dict[str, Any] = json.loads(self.process.stdout.readline() or '{"failure": "ended without a word"}')
        else:
            told = {"failure": f"no answer within {limit_s:.0f} s"}
        self.failure = told.get("failure", "")
        return {} if self.failure else told

    def ask(self, word: str, limit_s: float) -> dict[str, Any]:
        """Send it a line, and read its answer."""
        assert self.process.stdin is not None
        try:
            print(word, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self.failure = "ended without a word"
            return {}
        return self.answer(limit_s)

    def turn(self, steps: int, limit_s: float) -> None:
        """Have it step ``steps`` times, and keep wall and processor seconds of one step."""
        told = self.ask(str(steps), limit_s)
        if told:
            self.wall.append(told["wall"])
            self.cpu.append(told["cpu"])


@contextlib.contextmanager
def opened(
    name: str, command: Sequence[str], environment: Mapping[str, str], *, log: Path | None = None, verbose: bool = False
) -> Iterator[Contestant]:
    """Start a contestant by a command of this checkout, and end it in the end.

    Args:
        name: of the contestant.
        command: to start.
        environment: beside that of this process.
        log: file for what the contestant and its libraries print; None drops it, with ``verbose`` it is shown.
        verbose: see ``log``.
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
    """The module path of a contestant: this checkout first, then what this process was given."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def take_turns(
    contestants: Sequence[Contestant], rounds: int, steps: Callable[[Contestant], int], left_s: Callable[[], float]
) -> None:
    """Let the contestants take turns, in another order in each round, for as long as there is time.

    Args:
        contestants: those that are warm; one that fails stays away from then on.
        rounds: in each of which everybody has one turn.
        steps: of a contestant's turn.
        left_s: seconds that are left for all.
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
    """Median over the rounds of their time over ours."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=False))


@dataclass
class Served:
    """What a contestant's process has built."""

    step: Callable[[], object]
    told: dict[str, Any]
    """What the referee is to know of it."""
    device: str
    commands: Mapping[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)
    """Other lines than a number of steps, and what answers them."""
    hear: Callable[[], str] = sys.stdin.readline
    """Next line of the referee; with several ranks all must hear the same."""


def serve(build: Callable[[], Served]) -> None:
    """Build the contestant, step ``WARM`` times, then step as often as each line says. Only rank 0 answers.

    The process had better leave by ``os._exit`` afterwards: process group and threads of a run are given up.
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
    """Wall and processor seconds of a step, of so many that are done on the device before the clock is read."""
    if served.device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        served.step()
    if served.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps
