"""The note by which the first node of a job tells the others where it can be reached, and that the run is over.

Owns this small file in the run folder, one for each start of the job. Torch-free.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.agent.node import Node
from launch.runs.folder import RunFolder, write_json

POLL_S = 0.2


def note_path(folder: RunFolder, node: Node) -> Path:
    """The note of this start of the job; a requeued one has another."""
    return folder.path / ".launch" / f"{node.job}.json"


def write_note(folder: RunFolder, node: Node, **words: Any) -> None:
    """On the first node: add to the note."""
    write_json(note_path(folder, node), {**(read_note(folder, node) or {}), **words})


def read_note(folder: RunFolder, node: Node) -> dict[str, Any] | None:
    """What the first node has written so far; None where there is nothing yet."""
    note = note_path(folder, node)
    try:
        told = json.loads(note.read_text())
    except FileNotFoundError:
        # Listing the folder makes an NFS client look again instead of answering from its cache.
        list(note.parent.glob("*"))
        return None
    assert isinstance(told, dict)
    return told


def wait_for_note(
    folder: RunFolder, node: Node, timeout_s: float, wanted: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Read the first node's note as soon as it holds what is ``wanted``.

    Raises:
        TimeoutError: it did not come.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        told = read_note(folder, node)
        if told is not None and wanted(told):
            return told
        time.sleep(POLL_S)
    raise TimeoutError(f"the first node of this job did not write {note_path(folder, node)} in {timeout_s:g} s")
