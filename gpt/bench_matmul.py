"""Measure the rate of matrix products by size on this machine's device, for the estimates of ``parallel=auto``.

    python -m gpt.bench_matmul --output matmul.json
    python -m launch parallel=auto cluster.matmul_rates=matmul.json nodes=8 dry_run=true

Run it on a node of the same kind as the training nodes, while nothing else uses the device.
"""

from __future__ import annotations

import itertools
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from gpt.training.execution import has_tf32
from launch.errors import CommandParser, ConfigError, refusing, require_positive
from launch.runs.folder import write_json
from launch.runs.measured import rates_document

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"cpu": "64,256,1024,2048", "cuda": "64,256,1024,4096,16384"}


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: measure the rates, and write them into the file ``--output``. Return the exit status: 0, or 2 if
    the arguments are refused."""
    parser = CommandParser(
        prog="python -m gpt.bench_matmul",
        description="Measure the rate of matrix products by size on this machine's GPU, or else on its CPUs.",
    )
    parser.add_argument("--output", type=Path, default=Path("matmul.json"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--sizes", metavar="LIST", help=f"of each of m, n and k (CPU {SIZES['cpu']}, GPU {SIZES['cuda']})"
    )
    parser.add_argument("--budget-s", type=float, default=0.05, metavar="S", help="time for each size (%(default)s)")
    typed = parser.parse_args(arguments)
    output: Path = typed.output.expanduser().absolute()
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"--output {output}", "a file in a folder that is there", "--output matmul.json")
    if typed.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda", "a GPU that torch can use", "--device cpu, or a node with GPUs")
    require_positive("--budget-s", typed.budget_s)
    device = torch.device(typed.device)
    words = (typed.sizes or SIZES[typed.device]).split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise ConfigError(f"--sizes {typed.sizes}", "whole numbers above 0 by commas", f"--sizes {SIZES['cpu']}")
    sizes = sorted({int(word) for word in words})
    precisions = ["fp32"]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precisions += [*(["tf32"] if has_tf32(device) else []), *(["bf16"] if has_bf16 else []), "fp16"]
    samples: list[dict[str, Any]] = []
    for precision in precisions:
        rates = []
        for m, n, k in itertools.product(sizes, repeat=3):
            seconds = product_s(m, n, k, precision, device, typed.budget_s)
            samples.append({"precision": precision, "m": m, "n": n, "k": k, "seconds": seconds})
            rates.append(2 * m * n * k / seconds / 1e12)
        print(f"{precision}: {min(rates):.3g} to {max(rates):.3g} TFLOP/s over {len(rates)} sizes", flush=True)
    # ``parallel=auto`` finds the rates of a device by this name.
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    write_json(output, rates_document(name, samples, circumstances()))
    print(f"wrote {output}; to use it:\n  python -m launch parallel=auto cluster.matmul_rates={output} ...")
    return 0


def product_s(m: int, n: int, k: int, precision: str, device: torch.device, budget_s: float) -> float:
    """Return the median seconds of a product of an (m, k) and a (k, n) matrix in ``precision``. The product is repeated
    for at least ``budget_s`` seconds."""
    left, right = (torch.randn(shape, device=device).to(DTYPES[precision]) for shape in ((m, k), (k, n)))
    given = {"mm": torch.mm, "left": left, "right": right, "result": left @ right}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:  # the timer warms up, and waits for the GPU
        timer = Timer("mm(left, right, out=result)", globals=given, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=budget_s).median
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def circumstances() -> dict[str, Any]:
    """Return a description of this measurement for its file, name -> value: host, versions, threads and date."""
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
