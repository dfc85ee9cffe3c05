"""A run for the tools to work on: trained by two ranks that shared the model, saved in shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import TINY, run

WORDS = (*TINY, "optim.max_steps=12", "checkpoint.interval=4", "eval.interval=6", "parallel=fsdp")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with the checkpoints of steps 8 and 12. Tests that write take a copy."""
    folder = tmp_path_factory.mktemp("tools")
    run(f"launch nodes=2 launch.report_files=[] run_dir={folder / 'sharded'}", *WORDS, cwd=folder)
    return folder / "sharded"
