"""Rates of matrix products by size: between the measured ones by hand, in the estimate, from a real measurement."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt.bench_matmul import main
from gpt.config import Device, Precision
from gpt.planning.cost import RankStep
from gpt.topology import parallel_dims, split_batch
from gpt.workload.plan import estimated_step, requested_machine
from launch.config.cluster import ClusterConfig, ClusterKind
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.measured import MatmulRates, rates_document, read_matmul_rates
from launch.workload import PlanRequest
from tests.planning.test_cost import BLOCK, MACHINE, D, T, config_of

GRID = (2, 8, 32)
RATES = MatmulRates((GRID,) * 3, {(m, n, k): 1e6 * m * n * n * k for m in GRID for n in GRID for k in GRID})


def test_between_sizes_rates_are_a_power_law() -> None:
    """So is this one, m n^2 k: linear in logarithms, it is met everywhere inside, and exactly where it was measured."""
    for shape, rate in RATES.flops_per_s.items():
        assert RATES.rate(*shape) == pytest.approx(rate, rel=1e-12)
    for m, n, k in ((4, 4, 4), (2, 16, 5), (31, 2.5, 32)):
        assert RATES.rate(m, n, k) == pytest.approx(1e6 * m * n * n * k, rel=1e-12)
    one = MatmulRates(((4, 16), (1,), (1,)), {(4, 1, 1): 1e9, (16, 1, 1): 4e9})
    assert one.rate(8, 1, 1) == pytest.approx(2e9)  # half way in logarithms, by hand
    assert (one.rate(1, 7, 7), one.rate(64, 7, 7)) == (pytest.approx(1e9), pytest.approx(4e9))
    rising = [RATES.rate(size, 3, 3) for size in range(1, 50)]
    assert rising == sorted(rising)
    assert RATES.times(3).best == 3 * RATES.best


def test_the_estimate_follows_the_rates() -> None:
    """With one rate everywhere it is as without a file; small products alone slow it down by what they take."""
    config = config_of()
    dims = parallel_dims(config.parallel, 1)
    batch = split_batch(config.optim, 1)
    even = MatmulRates(((1,),) * 3, {(1, 1, 1): MACHINE.flops_per_s})
    plain = RankStep(config, dims, batch, MACHINE).compute_s
    assert RankStep(config, dims, batch, replace(MACHINE, matmul=even)).compute_s == pytest.approx(plain)
    # A quarter of the rate where a size is 16 or less: keys and values have so many columns, and no other product.
    slow = {(m, n, k): 1e9 / (4 if 16 in (m, n, k) else 1) for m in (16, 17) for n in (16, 17) for k in (16, 17)}
    slower = replace(MACHINE, matmul=MatmulRates(((16, 17),) * 3, slow))
    found = RankStep(config, dims, batch, slower).compute_s
    of_keys = 3 * 2 * T * 4 * 2 * D * 16  # FLOPs forward and backward, of two such products in four blocks
    assert BLOCK == 9280 and found - plain == pytest.approx(3 * of_keys / 1e9)
    tensor = config_of(tp=2)
    steeper = replace(MACHINE, matmul=RATES)
    halves = [
        RankStep(one, parallel_dims(one.parallel, one.parallel.tp), batch, steeper).compute_s
        for one in (config, tensor)
    ]
    assert halves[1] > halves[0] / 2  # half of each product, and each is slower than a whole one


def write(path: Path, device: str = "CPU", precision: str = "fp32", seconds: float = 2e-9) -> Path:
    sample = {"precision": precision, "m": 1, "n": 1, "k": 1, "seconds": seconds}
    path.write_text(json.dumps(rates_document(device, [sample], {})))
    return path


def request(path: Path, **cluster: Any) -> PlanRequest:
    nodes = ClusterConfig(kind=ClusterKind.slurm, timeout_min=60, signal_delay_s=60, mem_gb=8, matmul_rates=str(path))
    return PlanRequest((), RunFolder(path.parent), False, 1, 1, replace(nodes, **cluster), 0)


def test_a_plan_takes_the_rates_of_the_file(tmp_path: Path) -> None:
    config = replace(config_of(), device=Device.cpu, precision=Precision.fp32)
    asked = request(write(tmp_path / "rates.json"))
    assert requested_machine(config, asked).flops_per_s == pytest.approx(1e9)
    dims, batch = parallel_dims(config.parallel, 1), split_batch(config.optim, 1)
    usual, faster = (estimated_step(config, dims, batch, one) for one in (asked, replace(asked, rate_factor=2.0)))
    assert usual is not None and faster is not None
    assert usual.compute_s == pytest.approx(2 * faster.compute_s)
    write(tmp_path / "rates.json", seconds=4e-9)
    slower = estimated_step(config, dims, batch, asked)
    assert slower is not None and slower.compute_s == pytest.approx(2 * usual.compute_s)
    for file, said in (
        (write(tmp_path / "h100.json", device="NVIDIA H100 80GB HBM3"), "measured on NVIDIA H100 80GB HBM3"),
        (write(tmp_path / "half.json", precision="bf16"), "with rates in bf16"),
    ):
        with pytest.raises(ConfigError, match=said) as refusal:
            estimated_step(config, dims, batch, request(file))
        assert "type next: python -m gpt.bench_matmul" in str(refusal.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "JSONDecodeError: .*: line 1 column 2"),
        ('{"format": 9}', "format 9"),
        ('{"format": 1, "device": "CPU", "samples": []}', "no samples"),
        (
            '{"format": 1, "device": "CPU", "samples": [{"precision": "fp32", "m": 1, "n": 1, "k": 1}]}',
            "KeyError: 'seconds'",
        ),
        ("[1]", "TypeError: "),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        request(path).cluster.validate()
    with pytest.raises(ConfigError, match="No such file"):
        read_matmul_rates(tmp_path / "none.json")


def test_rates_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "matmul.json"
    words = ["--device", "cpu", "--sizes", "8,32", "--precisions", "fp32,bf16", "--budget-s", "0.001"]
    assert main(["--output", str(path), *words]) == 0
    assert "over 8 sizes" in capsys.readouterr().out
    found = read_matmul_rates(path)
    assert found.device == "CPU" and set(found.precisions) == {"fp32", "bf16"}
    sample = json.loads(path.read_text())["samples"][3]
    shape = sample["m"], sample["n"], sample["k"]
    expected = 2 * math.prod(shape) / sample["seconds"]
    assert found.precisions["fp32"].rate(*shape) == pytest.approx(expected)
    assert json.loads(path.read_text())["measured"].keys() >= {"host", "torch", "date", "threads"}
    for wrong in (["--sizes", "0"], ["--precisions", "fp7"], ["--budget-s", "0"], ["--output", str(tmp_path)]):
        assert main(["--output", str(path), *wrong]) == 2
        assert "type next: " in capsys.readouterr().err
