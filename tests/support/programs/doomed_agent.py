"""An agent whose ranks die: rank 1 of the first attempt, and the whole node of rank 1 in the second.

``python -m tests.support.programs.doomed_agent RUN_DIR``. Each dies once the event log of its attempt has two
checkpoints in memory that are newer than the last one on the disk. The stores have heard of the agreement on the older
of the two then: a rank tells them before it sends its part of the next. No rank steps on while its part of a checkpoint
is on its way, so the steps that this takes do not depend on the load of the machine.
"""

from __future__ import annotations

import os
import signal
import sys

import gpt.training.step
from gpt.checkpoint.writer import ProcessWriter, Result
from launch.agent.__main__ import main
from launch.runs.folder import RunFolder

lr_at = gpt.training.step.lr_at
poll = ProcessWriter.poll


def doomed(config: object, step: int) -> float:
    """The learning rate of a step, if this rank gets so far."""
    attempt = int(os.environ["LAUNCH_ATTEMPT"])
    if attempt < 3 and os.environ["RANK"] == "1":
        events = [e for e in RunFolder(os.environ["LAUNCH_RUN_DIR"]).read_events() if e.get("attempt") == attempt]
        saved = {kind: [e["step"] for e in events if e["event"] == kind] for kind in ("saved", "saved_in_memory")}
        if saved["saved"] and sum(step > max(saved["saved"]) for step in saved["saved_in_memory"]) > 1:
            os.kill(os.getpid() if attempt == 1 else int(os.environ["LAUNCH_AGENT_PID"]), signal.SIGKILL)
    return lr_at(config, step)  # type: ignore[arg-type]


def poll_after_waiting(writer: ProcessWriter) -> Result | None:
    """The result of the last job, once there is one."""
    while writer._result is None:
        writer._receive()
    return poll(writer)


if __name__ == "__main__":
    gpt.training.step.lr_at = doomed
    ProcessWriter.poll = poll_after_waiting  # type: ignore[method-assign]
    sys.exit(main())
