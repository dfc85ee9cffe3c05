"""benchmarks/gpu.py without a GPU: says so, and rehearses its list on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.commands import ROOT, TIMEOUT_S, environment


def gpu_script(*words: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    assert gpu_script(status=2).count("\n") == 1


def test_the_list_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    told = gpu_script("--device", "cpu", "--only", "fp32,hsdp", "--ranks", "2", "--to", str(tmp_path))
    results = json.loads(next(tmp_path.glob("cpu_*.json")).read_text())
    names = [result["entry"]["name"] for result in results]
    assert names == ["plain dense", "fp32", "hsdp fp32", "hsdp bf16"]
    assert {result["outcome"] for result in results} == {"ok"}
    assert 0 < results[1]["error"] < 1e-5 < results[3]["error"] < 1e-2
    page = next(tmp_path.glob("cpu_*.md")).read_text()
    assert all(f"| {name} |" in page and f"| {name} |" in told for name in names)
    assert torch.__version__ in page
