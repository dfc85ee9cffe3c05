"""Launching scripts in tests: small ones that are written here, and the examples."""

from __future__ import annotations

import re
from pathlib import Path

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import ROOT, descendants

EXAMPLES = ROOT / "examples"
LOCAL = ("cluster=local", "ranks_per_node=1", "workload=script", "launch.poll_s=1", "launch.report_files=[md,csv]")
"""Nodes are agents on this machine, of one rank each, and no pictures are drawn."""
PROGRESS = r"script.progress=step (?P<step>\d+): loss (?P<loss>[\d.]+)"
"""Finds what plain_ddp.py prints."""


def write_script(folder: Path, text: str, name: str = "script.py") -> Path:
    """Write a program that a test launches."""
    path = folder / name
    path.write_text(text)
    return path


def printed(folder: RunFolder, attempt: int = 1, rank: int = 0) -> str:
    """The log of a rank; nothing where there is none."""
    log = folder.log(attempt, rank)
    return log.read_text() if log.exists() else ""


def last_loss(folder: RunFolder) -> tuple[int, float]:
    """Step and loss of the last record of rank 0."""
    record = read_records(folder.metrics(0))[-1]
    return record["step"], record["loss"]


def printed_loss(text: str, step: int) -> float:
    """Loss that plain_ddp.py has printed for a step."""
    (loss,) = re.findall(rf"^step {step}: loss ([\d.]+)$", text, re.MULTILINE)
    return float(loss)


def first_step(text: str) -> int:
    """The first step that plain_ddp.py has printed; torch may print warnings before."""
    found = re.search(r"^step (\d+):", text, re.MULTILINE)
    assert found, text
    return int(found[1])


def rank_of_script(pid: int, script: str, rank: int) -> int | None:
    """Process id of a rank that runs ``script`` below process ``pid``."""
    for found in descendants(pid):
        try:
            args = Path(f"/proc/{found}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{found}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        is_script = len(args) > 1 and args[1].endswith(script.encode())  # and not the shell that becomes it
        if is_script and f"RANK={rank}".encode() in variables:
            return found
    return None


def causes(folder: RunFolder) -> list[str]:
    """Outcomes of the attempts of a run."""
    return [str(e["cause"]) for e in folder.read_events() if e["event"] == "attempt_ended"]
