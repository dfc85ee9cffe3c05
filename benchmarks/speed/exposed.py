"""Exposed communication in step records compared with the time of the collectives alone, over a slow link.

    python -m benchmarks.speed.exposed          # about two minutes on two quiet cores, as root
    python -m benchmarks.speed.exposed --write  # and write exposed.md

A tiny GPT takes ddp steps over two ranks, each on its own node of a Slurm sandbox: once with fast cables and once with
cables that add 25 ms in each direction. A step has two all-reduces, one after the other, which no computation hides:
that of its gradients, all in one bucket of DDP, and that of its figures. A separate loop without steps or records
measures by how much `comm_s`, summed over a step, must grow. It pauses as long as the computation of a step, then makes
two all-reduces of as many numbers. By arithmetic, the growth is 2 x 2 x 2 x 2 x 25 ms: two all-reduces of two messages,
each with two ways over two cables. A ring of two ranks all-reduces by two messages, one after the other. gloo sends a
message after the receiver has said that it waits for it, so each message takes two ways. A way passes the cables of
both nodes. The gradients are a few kilobytes, so each message fits the window with which TCP begins after a pause (ten
segments, RFC 6928). A larger message waits for one more round trip each time that the window doubles.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.page import cores, keep, stamp
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster, link
from slurm.sandbox.state import Settings
from tests.support.commands import run

QUICK_MS, SLOW_MS = 2.0, 27.0
ALL_REDUCES, MESSAGES, WAYS, CABLES = 2, 2, 2, 2
STEPS, WARMUP = 60, 10
DEMANDED = 0.10
ON_SANDBOX = ("nodes=2", "cluster=slurm", "launch.poll_s=1", "ranks_per_node=1")
MODEL = (
    *("model.n_layer=1", "model.n_embd=8", "model.n_head=2", "model.block_size=16", "data=synthetic", "parallel=ddp"),
    *("device=cpu", "precision=fp32", "optim.global_batch=4", f"optim.max_steps={STEPS}"),
    *("eval.interval=0", f"checkpoint.interval={STEPS}", "logging.gradients_interval=0"),
)
LOOP = f"""
import json, os, time
import torch, torch.distributed as dist, torch.distributed.nn

dist.init_process_group("gloo")
gradients, figures = torch.ones(3072), torch.ones(24, dtype=torch.float64)
seconds = []
for step in range({STEPS}):
    time.sleep(0.02)  # the computation of a step, in which the connection is idle
    begun = time.perf_counter()
    dist.all_reduce(gradients)
    dist.all_reduce(figures)
    seconds.append(time.perf_counter() - begun)
with open(f"{{os.environ['LAUNCH_RUN_DIR']}}/seconds_{{dist.get_rank()}}.json", "w") as file:
    json.dump(seconds, file)
dist.destroy_process_group()
"""


def main() -> int:
    """Measure and print. Returns the exit status: 1 if the growth of ``comm_s`` differs from the growth of the separate
    loop by more than ``DEMANDED``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--write", action="store_true", help="keep the result beside this program")
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="exposed-"))
    loop = scratch / "loop.py"
    loop.write_text(LOOP)
    waits, takes = {}, {}
    with Cluster(scratch / "sandbox") as sandbox:
        state = sandbox.up(Settings(nodes=2, gpus_per_node=0), timeout_s=300.0)
        slurm: dict[str, Any] = {"SLURM_CONF": str(state.slurm_conf)}
        for latency_ms in (QUICK_MS, SLOW_MS):
            for node in state.nodes:
                link(sandbox, node, latency_ms=latency_ms)
            alone, folder = scratch / f"loop_{latency_ms:g}", scratch / f"{latency_ms:g}"
            words = ("workload=script", f"script.path={loop}", f"run_dir={alone}")
            run("launch", *ON_SANDBOX, *words, cwd=scratch, **slurm)
            takes[latency_ms] = seconds_of([json.loads(path.read_text()) for path in alone.glob("seconds_*.json")])
            run("launch", *ON_SANDBOX, *MODEL, f"run_dir={folder}", cwd=scratch, **slurm)
            records = [read_records(RunFolder(folder).metrics(rank)) for rank in range(2)]
            waits[latency_ms] = seconds_of([[record["comm_s"] for record in of_rank] for of_rank in records])
    shutil.rmtree(scratch)
    text, error = table(takes, waits)
    print(text)
    if given.write:
        keep(Path(__file__), "Exposed communication over a slower link", __doc__, f"{stamp(cores())}\n\n{text}")
    return 0 if abs(error) <= DEMANDED else 1


def seconds_of(of_ranks: list[list[float]]) -> float:
    """Return the median over the steps of the shortest wait among the ranks, in seconds. ``of_ranks`` has a list for
    each rank, with its waits in seconds, one for each step. The longer wait includes the time for which a rank waits
    for the other rank."""
    return statistics.median(map(min, zip(*(seconds[WARMUP:] for seconds in of_ranks), strict=True)))


def table(takes: dict[float, float], waits: dict[float, float]) -> tuple[str, float]:
    """Return the result as Markdown, and the relative error of the growth of ``comm_s``.

    Args:
        takes: delay of a cable in milliseconds -> seconds of the two all-reduces in the separate loop.
        waits: delay of a cable in milliseconds -> seconds of exposed communication in a step.
    """
    alone, exposed = (1e3 * (measured[SLOW_MS] - measured[QUICK_MS]) for measured in (takes, waits))
    by_arithmetic = ALL_REDUCES * MESSAGES * WAYS * CABLES * (SLOW_MS - QUICK_MS)
    error = exposed / alone - 1
    rows = [f"| {at:g} ms | {1e3 * takes[at]:.1f} ms | {1e3 * waits[at]:.1f} ms |" for at in (QUICK_MS, SLOW_MS)]
    lines = [
        "| delay of a cable, each way | both all-reduces by themselves | comm_s of a step |",
        "|---|---|---|",
        *rows,
        f"| growth | {alone:.1f} ms | {exposed:.1f} ms, {100 * error:+.1f} % |",
        f"| growth by arithmetic | {by_arithmetic:.0f} ms | {by_arithmetic:.0f} ms |",
    ]
    return "\n".join(lines), error


if __name__ == "__main__":
    sys.exit(main())
