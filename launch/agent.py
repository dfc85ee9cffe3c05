"""The agent: one process on each node, which starts the ranks of a run, watches them, and says how they ended.

    python -m launch.agent RUN_DIR          what srun starts on every node; submitit calls ``run(RUN_DIR)``

Owns signals and the verdict of a node. The ranks themselves are torch elastic's, in ``launch.ranks``. Importing this
module loads no torch: the login node submits ``run`` by name.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from gpt.compose import read_config
from gpt.errors import ConfigError
from gpt.failure import first_failure
from gpt.run_folder import RunFolder
from launch.config import Config
from launch.node import Node

TOKEN = "LAUNCH_TOKEN"
OWNER = "LAUNCH_OWNER_PID"
"""Process of the launcher that started a local run; without it the run stops too."""


class RunFailedError(RuntimeError):
    """A run whose ranks did not all finish."""


class StopRequest:
    """SIGTERM or SIGUSR2 ask the ranks to save and leave; a second one ends them at once."""

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.since = 0.0
        self.interruptible = False
        """Whether to break out of a wait in which there are no ranks to ask."""

    def install(self) -> None:
        """Replace submitit's handlers, which would requeue from inside the handler and on rank 0 only."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        if self.interruptible:
            raise InterruptedError(f"{self.name} before the ranks had started")

    def ask(self, name: str) -> None:
        """Note that the run should stop, and why."""
        self.count += 1
        if self.count == 1:
            self.name, self.since = name, time.monotonic()


def run(run_dir: str) -> None:
    """Take this node's part in the run of ``run_dir``, to its end.

    Raises:
        RunFailedError: a rank failed, here or on another node.
    """
    stop = StopRequest()
    stop.install()
    folder = RunFolder(run_dir)
    config = read_config(folder, Config)
    node = Node.from_env(os.environ.get(TOKEN))
    from launch import ranks  # torch, from here on

    stop.interruptible = True
    try:
        meeting = ranks.meet(folder, node, config)
        verdict = ranks.run_ranks(folder, node, config, meeting, stop)
    except InterruptedError as error:
        folder.record_event("agent_stopped", node=node.index, cause=str(error))
        return
    finally:
        stop.interruptible = False
    finish(folder, node, meeting.attempt, verdict, stop)


def finish(folder: RunFolder, node: Node, attempt: int, verdict: str | None, stop: StopRequest) -> None:
    """Compare what the ranks wrote into the ledger with how they exited; ``verdict`` is None where all left with 0."""
    events = folder.read_events()
    mine = [e for e in events if e.get("attempt") == attempt]
    done = {e["event"] for e in mine}
    if verdict is None and done & {"finished", "stopped"}:
        return
    if stop.count and first_failure(events, attempt) is None:
        if node.index == 0:
            folder.record_event(
                "stopped", attempt=attempt, step=None, signal=stop.name, cause="ended before it could save"
            )
        return
    failure = first_failure(folder.read_events(), attempt)
    raise RunFailedError(failure_text(failure) if failure else verdict or "the ranks left without finishing")


def failure_text(failure: dict[str, Any]) -> str:
    """The first failure of a run, for people: who, where, why, and where to read on."""
    step = f" after step {failure['step']}" if failure.get("step") is not None else ""
    head = f"rank {failure['rank']} on {failure['host']} failed first{step}: {failure['cause']}"
    trace = str(failure.get("traceback") or "").rstrip()
    return "\n".join(part for part in (head, trace, f"log: {failure['log']}") if part)


def main() -> int:
    """Run the agent of this node. Exit status 1 where the run failed, 2 where there is no run."""
    parser = argparse.ArgumentParser(prog="python -m launch.agent", description="Run this node's ranks of a run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder of the run, on a filesystem all nodes share")
    try:
        run(str(Path(parser.parse_args().run_dir).absolute()))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except RunFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
