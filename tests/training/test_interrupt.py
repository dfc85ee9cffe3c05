"""A signal that comes while a process ends, after all was saved, does not make a failure of it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.support.commands import ROOT, environment

ENDING = """
import os, signal
from launch.worker import Run

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.Signals({number})):
        kill(pid, number)  # by now Python has given the signals their default back

run = Run()
run.install_handlers()
kept = Last()
{close}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize(("close", "status"), [("run.close()", 0), ("", -1)])
def test_the_end_of_a_process_cannot_be_interrupted(number: signal.Signals, close: str, status: int) -> None:
    script = ENDING.format(number=number.value, close=close)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), timeout=60, check=False)
    assert done.returncode == status * number.value
