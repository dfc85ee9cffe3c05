"""Errors of a projection: runs on four nodes of a Slurm sandbox with slow links, predicted from smaller runs.

    python -m benchmarks.scale.projection                                     # all: ten minutes, as root
    python -m benchmarks.scale.projection --only links --network FILE         # measure the links only
    python -m benchmarks.scale.projection --only fsdp --network FILE --write  # one parallelism; writes its row
    python -m benchmarks.scale.projection --keep FOLDER                       # and keep the runs and the links
    python -m benchmarks.scale.projection --again FOLDER --network FILE       # predict kept runs with today's model
    python -m benchmarks.scale.projection --cables 40,5                       # other cables: Mbit/s, ms each way

The cables of the nodes are limited in bandwidth and latency, so that tiny models wait for them most of the time.
`launch.bench_network` measures the links over all four nodes. Then each parallelism runs on fewer nodes and on four.
The cost model gets the measured links and the steps on fewer nodes, and predicts the step time on four. The column
"interval" has the error against the third and against the first quartile of the measured step times. The nodes of a
sandbox share the cores of one machine: a rank that computes slows the other ranks, which no model of separate nodes
includes. The column "blind" says yes if the page had no row of this parallelism with these cables before: then the cost
model cannot have been fitted to this row.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.page import chosen, commit, cores, keep, merged, stamp
from launch.config.compose import read_point as read_config
from launch.project.models import HeldOut, SweepPoints, as_measured, hold_out, with_devices
from launch.report.points import read_point
from launch.report.selection import select
from launch.report.series import label_points, split
from launch.runs.folder import RunFolder
from slurm.sandbox.cluster import Cluster, link
from slurm.sandbox.state import Settings
from tests.support.commands import run

NODES = 4
STEPS = 14
LINKS = "links"
"""Value of ``--only`` that measures the links and runs no training."""
BUDGET_S = "2"
"""Time in seconds for each size of a collective. It is long, because a shaped link lets a burst of 64 KiB pass at once
after each pause; in a run, messages follow one another.
"""
DEMANDED = 0.10
"""Largest relative error of a predicted point that is accepted on limited links."""
ON_SANDBOX = ("cluster=slurm", "launch.poll_s=1", "launch.sequential=true", "ranks_per_node=1", "device=cpu")
MODEL = (
    *("model.n_layer=2", "model.n_embd=192", "model.n_head=4", "model.block_size=32", "data=synthetic"),
    *(f"optim.max_steps={STEPS}", "eval.interval=0", f"checkpoint.interval={STEPS}", "precision=fp32"),
)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ddp": ("1,2,3,4", ("parallel=ddp", "optim.global_batch=12", "optim.max_micro_batch=12")),
    "fsdp": ("1,2,3,4", ("parallel=fsdp", "optim.global_batch=12", "optim.max_micro_batch=12")),
    "pp": ("2,4", ("parallel=pp", "parallel.pp=2", "optim.global_batch=32", "optim.max_micro_batch=4")),
    "tp": ("2,4", ("parallel=tp", "parallel.tp=2", "optim.global_batch=32", "optim.max_micro_batch=16")),
}
"""Parallelism -> numbers of nodes, and overrides. With pp and tp the smallest run has two nodes; four nodes are two
such pairs.
"""


@dataclass(frozen=True)
class Cables:
    """Bandwidth and latency of the cables of all nodes."""

    bandwidth_mbit: float = 20.0
    latency_ms: float = 2.0
    """Latency in each direction, in milliseconds."""

    def __str__(self) -> str:
        return f"{self.bandwidth_mbit:g} Mbit/s, {self.latency_ms:g} ms"


@dataclass(frozen=True)
class Result:
    """The predicted and the measured step of one parallelism on four nodes."""

    name: str
    cables: Cables
    is_blind: bool
    held_out: HeldOut
    link_share: float
    """Share of the predicted step in which ranks wait for the links, 0 to 1."""

    @property
    def cells(self) -> list[str]:
        """Return the cells of the table's row."""
        point, predicted = self.held_out.point, self.held_out.predicted_s
        low, high = (100 * (predicted / measured - 1) for measured in (point.high_s, point.low_s))
        return [
            *(f"{self.name} at {self.cables}", ", ".join(map(str, self.held_out.fitted_to)), str(point.nodes)),
            *(f"{point.step_s:.3f} s", f"{predicted:.3f} s", f"{100 * self.held_out.error:+.1f} %"),
            *(f"{low:+.1f} to {high:+.1f} %", f"{100 * self.link_share:.0f} %"),
            "yes" if abs(self.held_out.error) <= DEMANDED else "no",
            "yes" if self.is_blind else "no",
            commit(),
        ]


TITLES = (
    "parallelism, cables",
    "fitted to nodes",
    "held out",
    "measured",
    "predicted",
    "error",
    "interval",
    "links",
    "<= 10 %",
    "blind",
    "measured on",
)


def main() -> int:
    """Measure, predict and print. Returns the exit status: 1 if an error exceeds ``DEMANDED``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", default="", help=f"{LINKS}, and parallelisms: " + ",".join(CASES))
    parser.add_argument(
        "--network", type=Path, metavar="FILE", help="measured links; measured now where it is not there"
    )
    parser.add_argument("--cables", type=read_cables, default=Cables(), metavar="MBIT,MS", help="limits of the cables")
    parser.add_argument("--write", action="store_true", help="keep the rows in projection.md")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs, in a new folder")
    parser.add_argument("--again", type=Path, metavar="FOLDER", help="predict kept runs again, with --network")
    given = parser.parse_args()
    names = chosen(given.only, [LINKS, *CASES])
    if given.again is None:
        results = measure_cases(names, given.cables, given.network, given.keep)
    else:
        kept = {name: given.again / name for name in names if name in CASES}
        results = [predict(name, folder, given.network, given.cables) for name, folder in kept.items()]
        print(*("  ".join(result.cells) for result in results), sep="\n")
    if given.write:
        table = merged(Path(__file__), TITLES, [result.cells for result in results])
        keep(Path(__file__), "Held-out points on limited links", __doc__, f"{stamp(cores())}\n\n{table}")
    return 0 if all(abs(result.held_out.error) <= DEMANDED for result in results) else 1


def read_cables(text: str) -> Cables:
    """Return the limits of the cables in text such as 40,5 (Mbit/s and ms)."""
    bandwidth_mbit, latency_ms = map(float, text.split(","))
    return Cables(bandwidth_mbit, latency_ms)


def has_row(name: str, cables: Cables) -> bool:
    """Return True if the page has a row of this parallelism on these cables."""
    page = Path(__file__).with_suffix(".md")
    return page.is_file() and f"| {name} at {cables} |" in page.read_text()


def measure_cases(names: list[str], cables: Cables, known: Path | None, kept: Path | None) -> list[Result]:
    """Measure the links and the given parallelisms, and return the results.

    Args:
        names: parallelisms.
        cables: limits of the cables.
        known: file with measured links; None: measure the links.
        kept: folder that keeps the runs; None: delete the runs.
    """
    scratch = Path(tempfile.mkdtemp(prefix="projection-"))
    results = []
    with Cluster(scratch / "sandbox") as sandbox:
        state = sandbox.up(Settings(nodes=NODES, gpus_per_node=0), timeout_s=300.0)
        environment: dict[str, Any] = {"SLURM_CONF": str(state.slurm_conf)}
        for node in state.nodes:
            link(sandbox, node, bandwidth_mbit=cables.bandwidth_mbit, loss_percent=None, latency_ms=cables.latency_ms)
        network = (known or scratch / "network.json").absolute()
        if not network.is_file():
            words = (f"nodes={NODES}", *ON_SANDBOX[:2], "ranks_per_node=1", f"output_dir={scratch}")
            options = ("--output", str(network), "--max-mib", "2", "--budget-s", BUDGET_S)
            print(run("launch.bench_network", *words, *options, cwd=scratch, **environment), flush=True)
        for name in filter(CASES.__contains__, names):
            nodes, overrides = CASES[name]
            folder = ("name=" + name, f"output_dir={scratch}")
            run("launch", "-m", f"nodes={nodes}", *ON_SANDBOX, *MODEL, *overrides, *folder, cwd=scratch, **environment)
            results.append(predict(name, scratch / name, network, cables, is_blind=not has_row(name, cables)))
            print("  ".join(results[-1].cells), flush=True)
    if kept is None:
        shutil.rmtree(scratch)
    else:
        shutil.move(scratch, kept)
    return results


def predict(
    name: str, folder: Path, network: Path | None, cables: Cables = Cables(), *, is_blind: bool = False
) -> Result:
    """Predict the largest point of the sweep in ``folder`` from the smaller points. The cost model takes no account of
    nodes that share cores.

    Args:
        name: name of the parallelism, which is copied into the result.
        folder: folder of the sweep.
        network: file with the measured links; None uses the file that the runs name.
        cables: limits of the cables, which are copied into the result.
        is_blind: True if the page had no row of this parallelism with these cables before; copied into the result.
    """
    points = label_points([*map(read_point, select(folder).runs)])
    (series,) = split(points)
    members = tuple(one for one in series.members if one.figures is not None)
    config = read_config(RunFolder(members[-1].path))
    if network is not None:
        config = replace(config, cluster=replace(config.cluster, network=str(network.absolute())))
    config = with_devices(config, members[-1])
    measured = tuple(map(as_measured, members))
    sweep = SweepPoints(series, members[-1], config, measured)
    found = hold_out(sweep)
    parts = sweep.fit(sweep.measured[:-1]).at(found.point.nodes).by_cause
    waits = sum(seconds for cause, seconds in parts.items() if cause.startswith("communication"))
    return Result(name, cables, is_blind, found, waits / found.predicted_s)


if __name__ == "__main__":
    sys.exit(main())
