"""The notes by which the first node of a job tells the others where to meet, or that the run is given up.

Owns these small files in the run folder. Torch-free.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from gpt.run_folder import RunFolder, write_json
from launch.node import Node

POLL_S = 0.2


def note_path(folder: RunFolder, node: Node, start: int) -> Path:
    """The note of one start of the ranks; ``start`` counts them within a start of the job."""
    return folder.path / ".launch" / f"{node.job}-{start}.json"


def give_up(folder: RunFolder, node: Node, text: str) -> None:
    """On the first node: tell those that wait for the next start that there is none."""
    starts = len(list((folder.path / ".launch").glob(f"{node.job}-*.json")))
    write_json(note_path(folder, node, starts), {"give_up": text})


def wait_for_note(note: Path, timeout_s: float) -> dict[str, Any]:
    """Read the first node's note as soon as it is there.

    Raises:
        TimeoutError: it did not come.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            told = json.loads(note.read_text())
        except FileNotFoundError:
            # Listing the folder makes an NFS client look again instead of answering from its cache.
            list(note.parent.glob("*"))
            time.sleep(POLL_S)
            continue
        assert isinstance(told, dict)
        return told
    raise TimeoutError(f"the first node of this job did not write {note} in {timeout_s:g} s")
