"""Secrets of the environment are written nowhere, and the token of a job only where its agents read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import TINY, run
from tests.support.scripts import LOCAL, write_script

SECRET = "hunter2-0b5e9c"
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT", "NCCL_SECRET", "OMP_PASSWORD")
"""Some begin as variables do that are recorded."""
FAILING = "from launch import worker\nrun = worker.attach()\nrun.record(1, loss=1.0)\nraise RuntimeError('broken')\n"


@pytest.mark.parametrize("workload", ["gpt", "script"])
def test_no_secret_of_the_environment_is_written(workload: str, tmp_path: Path) -> None:
    """A run that finishes, with checkpoints, and one that fails, with a traceback in its event log."""
    secrets = {name: f"{SECRET}-{name}" for name in NAMES}
    words = [*TINY, "cluster=local", "nodes=1", "optim.max_steps=2", "eval.interval=0", "logging.tensorboard=true"]
    if workload == "script":
        words = [*LOCAL, "nodes=1", f"script.path={write_script(tmp_path, FAILING)}"]
    out = tmp_path / "out"
    status = int(workload == "script")
    text = run("launch", *words, f"run_dir={out / 'run'}", cwd=tmp_path, status=status, **secrets)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in out.glob("*") if path.name.startswith(("scaling", "Scaling", "summary", "sweep"))]
    written = {path: path.read_bytes() for path in files}
    assert {"environment.json", "events.jsonl", "plan.json"} <= {path.name for path in files}
    assert [path for path in files if ".submitit" in path.parts], "submitit's pickles are looked through too"
    assert [str(path) for path, content in written.items() if SECRET.encode() in content] == []
    assert SECRET not in text
    (endpoint,) = (out / "run" / ".launch").glob("*.json")
    token = json.loads(endpoint.read_text())["token"].encode()
    assert [path for path, content in written.items() if token in content] == [endpoint]
