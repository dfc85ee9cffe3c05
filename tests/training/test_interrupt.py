"""A signal that comes while a process ends, after all was saved, does not make a failure of it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

ENDING = """
import os, signal
from gpt.training.stop import StopFlag

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.Signals({number})):
        kill(pid, number)  # by now Python has given the signals their default back

stop = StopFlag()
stop.install()
kept = Last()
{retire}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize(("retire", "status"), [("stop.retire()", 0), ("", -1)])
def test_the_end_of_a_process_cannot_be_interrupted(number: signal.Signals, retire: str, status: int) -> None:
    script = ENDING.format(number=number.value, retire=retire)
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == status * number.value
