"""Training on a text of one's own. Set GPT_TEST_TEXT to a text file to try a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import TINY, run


def test_a_text_file_is_learned(tmp_path: Path) -> None:
    text = os.environ.get("GPT_TEST_TEXT")
    if not text:
        pytest.skip("GPT_TEST_TEXT names no text file")
    words = [*TINY, "data=text", f"data.path={text}", "optim.max_steps=40", "eval.interval=40"]
    run("launch", "nodes=2", *words, "launch.report_files=[]", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    records = read_records(RunFolder(tmp_path / "run").metrics(0))
    assert records[-1]["val_loss"] < 0.75 * records[0]["loss"]
