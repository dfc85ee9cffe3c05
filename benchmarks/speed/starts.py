"""Seconds from a fault to the next new step, and seconds for a start of the ranks.

    python -m benchmarks.speed.starts --roads                      # each kind of restart, as root
    python -m benchmarks.speed.starts --roads --only disk --write  # one drill, its rows into starts.md
    python -m benchmarks.speed.starts                              # prints starts of ranks, executed and forked

`--roads` measures the seconds from a fault to the first step that the run had not made before, and their parts. The
kinds of restart are: in place, on a spare node, through the queue, on fewer nodes, and with the state that nodes keep
in memory. It uses drills of `launch.storm` on a Slurm sandbox of four nodes whose SlurmdTimeout is 20 s. The run is a
GPT of 0.1 million parameters on two nodes of one rank, with a checkpoint every 25 steps. The faults kill a rank
(`sigkill_rank`), cut the power of a node (`power_cut`), kill an agent (`sigkill_agent`), or requeue the job
(`requeue`). `until noticed` ends with the end of the attempt in the event log. For a node without power it includes
`resilience.node_timeout_s`, 5 s here, after which a silent node counts as lost. The demand: 2.5 s in place, and 5 s on
a spare node after the loss of a node is noticed.

Without `--roads`: the script measures starts of a local run of two ranks, and restarts in place after `kill -9` of a
rank, in turn with and without `resilience.engine=fork`. Then it counts, with strace, the files that a node of one rank
and a node of eight ranks open.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.storm import SPARE, drill, gpt_words, slurm_version
from benchmarks.page import chosen, commit, cores, keep, merged, stamp
from launch.runs.folder import RunFolder, read_json
from launch.runs.records import read_records
from launch.storm.__main__ import make_schedule
from tests.support.commands import ROOT, TINY, descendants, environment, kill_all, ranks_of, start, wait_for

LONG = (*TINY, "cluster=local", "nodes=1", "optim.max_steps=1000000", "eval.interval=0", "checkpoint.interval=10")


def first_record(folder: RunFolder, attempt: int) -> dict[str, Any]:
    """Wait for the first step of an attempt, and return its record."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = [record for record in read_records(folder.metrics(0)) if record["attempt"] == attempt][:1]
        return bool(found)

    wait_for(look, f"the first step of attempt {attempt}")
    return found[0]


def processor_seconds(pids: list[int]) -> float:
    """Return the processor time that processes have used so far, in seconds."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(forked: bool) -> dict[str, float]:
    """Return name -> seconds for one start and one restart in place: the wall time, and the processor time of the two
    ranks. The ranks are forked if ``forked`` is True, else executed."""
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "run")
        words = [
            *LONG,
            "ranks_per_node=2",
            f"resilience.engine={'fork' if forked else 'exec'}",
            f"run_dir={folder.path}",
        ]
        began = time.time()
        process = start("launch", *words, cwd=Path(name), log=Path(name) / "log")
        try:
            told = {"start": first_record(folder, 1)["time"] - began}
            told["start, ranks' processors"] = processor_seconds(list(ranks_of(descendants(process.pid)).values()))
            wait_for(lambda: len(read_records(folder.metrics(0))) > 11, "a checkpoint")
            killed = time.time()
            os.kill(ranks_of(descendants(process.pid))[1], signal.SIGKILL)
            told["restart"] = first_record(folder, 2)["time"] - killed
            told["restart, ranks' processors"] = processor_seconds(list(ranks_of(descendants(process.pid)).values()))
        finally:
            kill_all(process)
    return told


def opened(ranks: int, forked: bool) -> int:
    """Return the number of files that the processes of one node open or try to open in a run of two steps with
    ``ranks`` ranks. The ranks are forked if ``forked`` is True, else executed."""
    with tempfile.TemporaryDirectory() as name:
        words = [*TINY, "cluster=local", "nodes=1", f"ranks_per_node={ranks}", "optim.max_steps=2", "eval.interval=0"]
        words += [f"resilience.engine={'fork' if forked else 'exec'}", f"run_dir={name}/run", "optim.max_micro_batch=1"]
        trace = ["strace", "-f", "-qq", "-e", "trace=openat", "-e", "signal=none", "-o", f"{name}/trace"]
        command = [*trace, sys.executable, "-m", "launch", *words]
        subprocess.run(command, cwd=name, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, check=True)
        return len(re.findall(r"openat\(", (Path(name) / "trace").read_text()))


ROADS = {
    "disk": ((*SPARE,), ("sigkill_rank", "sigkill_agent", "power_cut", "requeue")),
    "memory": ((*SPARE, "checkpoint.memory_interval=10"), ("sigkill_rank", "sigkill_agent")),
    "fewer": (("resilience.min_nodes=1", "resilience.node_timeout_s=5"), ("sigkill_agent",)),
}
"""Drill -> overrides in addition to those of a run, and kinds of faults."""
CUT_S = 14.0
"""Longest power cut of a drill, in seconds. ``seed_of`` avoids shorter ones: after them the node is back before it
counts as lost, and Slurm ends the job step.
"""
MOST_STEPS = 20
"""Largest number of steps between a save and a fault, as in ``launch.storm``."""
PARTS = {
    "total_s": "to a new step",
    "noticed_s": "until noticed",
    "started_s": "until the ranks started",
    "first_step_s": "to their first step",
    "again_s": "steps done again",
}
TITLES = ("road, state from", "faults", *PARTS.values(), "measured")


def seed_of(kinds: Sequence[str], count: int) -> int:
    """Return the first seed for ``make_schedule`` whose faults all hit rank 1, and whose power cuts all last ``CUT_S``.

    The schedule has ``count`` faults of the given kinds. Rank 1 is not on the head node, whose loss
    ``benchmarks.faults.heads`` measures.
    """

    def fits(seed: int) -> bool:
        faults = make_schedule(seed, count, kinds, 2, MOST_STEPS)
        return all(one.rank == 1 and (one.kind != "power_cut" or one.seconds == CUT_S) for one in faults)

    return next(filter(fits, itertools.count(1)))


def roads(names: list[str], runs: int, writes: bool) -> int:
    """Make the drills ``names`` (keys of ``ROADS``), with ``runs`` faults of each kind, and print the recovery times
    for each kind of restart. With ``writes``, also write them into the page. Returns the exit status: 1 if a drill
    fails."""
    good, rows = True, []
    for name in names:
        words, kinds = ROADS[name]
        folder, count = Path(tempfile.mkdtemp(prefix="starts_")), runs * len(kinds)
        drill(folder, (*gpt_words(count), *words), count, seed_of(kinds, count), ",".join(kinds))
        verdict = read_json(folder / "drill" / "verdict.json")
        print(f"{name}: {folder}, {verdict['wrong'] or 'passed'}", file=sys.stderr)
        # Sums in another order end in other bits: with fewer nodes the end is not compared.
        good &= len(verdict["faults"]) == count and (verdict["passed"] or name == "fewer")
        found: dict[str, list[dict[str, float]]] = {}
        for cost in verdict["recoveries"]:
            found.setdefault(f"{cost['road']} ({cost['kind']})", []).append(cost)
        for road, costs in found.items():
            cells = [[cost[part] for cost in costs] for part in PARTS]
            figures = [f"{statistics.median(each):.2f} ({max(each):.2f})" for each in cells]
            rows.append([f"{road}, {'memory' if name == 'memory' else 'disk'}", str(len(costs)), *figures, commit()])
    table = merged(Path(__file__), TITLES, rows)
    print(table)
    if writes:
        machine = stamp(f"{cores()}, Slurm {slurm_version()} in network namespaces")
        text = f"{machine}\n\nSeconds, median (slowest).\n\n{table}"
        keep(Path(__file__), "Seconds from a fault to the next new step", __doc__, text, "--roads --write")
    return 0 if good else 1


def main() -> int:
    """Measure and print. Returns the exit status: 1 if a drill fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("runs", nargs="?", type=int, help="of each kind (2 faults of each road, 5 starts)")
    parser.add_argument("--roads", action="store_true", help="faults, by the road on which a run goes on")
    parser.add_argument("--only", default="", help="drills: " + ",".join(ROADS))
    parser.add_argument("--write", action="store_true", help="keep the roads in starts.md")
    given = parser.parse_args()
    if given.roads:
        return roads(chosen(given.only, list(ROADS)), given.runs or 2, given.write)
    starts(given.runs or 5)
    return 0


def starts(runs: int) -> None:
    """Measure starts of ranks without and with forking, in turns, and print the medians."""
    times: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(runs):
        for forked in times:
            times[forked].append(measure(forked))
    print("| seconds, median (slowest) | executed | forked |\n|---|---|---|")
    for what in times[True][0]:
        cells = [[told[what] for told in times[forked]] for forked in (False, True)]
        print(f"| {what} | " + " | ".join(f"{statistics.median(each):.2f} ({max(each):.2f})" for each in cells) + " |")
    print("\n| files opened by a whole command | executed | forked |\n|---|---|---|", flush=True)
    for ranks in (1, 8):
        print(
            f"| ranks_per_node={ranks} | " + " | ".join(f"{opened(ranks, f):,}" for f in (False, True)) + " |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
