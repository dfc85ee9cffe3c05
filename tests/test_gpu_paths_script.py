"""benchmarks/gpu_paths.py without a GPU: says so, and rehearses its list on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.commands import ROOT, run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    assert run("benchmarks.gpu_paths", cwd=ROOT, status=2).count("\n") == 1


def test_the_list_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    told = run(
        "benchmarks.gpu_paths",
        "--device",
        "cpu",
        "--only",
        "fp32,hsdp",
        "--ranks",
        "2",
        "--to",
        str(tmp_path),
        cwd=ROOT,
    )
    results = json.loads(next(tmp_path.glob("cpu_*.json")).read_text())
    names = [result["entry"]["name"] for result in results]
    assert names == ["plain dense", "fp32", "hsdp fp32", "hsdp bf16"]
    assert {result["outcome"] for result in results} == {"ok"}
    assert 0 < results[1]["error"] < 1e-5 < results[3]["error"] < 1e-2
    page = next(tmp_path.glob("cpu_*.md")).read_text()
    assert all(f"| {name} |" in page and f"| {name} |" in told for name in names)
    assert torch.__version__ in page
