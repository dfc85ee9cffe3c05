"""Cost of ranks until they train, executed and forked: `python benchmarks/starts.py [RUNS]`. Prints Markdown tables.

`python benchmarks/starts.py --roads [RUNS]` (as root) prints what a fault costs, from it to the first step that had not
been made before, in place, on a spare node, through the queue, on fewer nodes, and with the state in the memory of
another node, and what that time is made of; on a Slurm sandbox of four nodes whose SlurmdTimeout is 20 s, by drills of
``launch.storm`` with a checkpoint each 25 steps.

Starts of a local run of two ranks, and restarts in place after `kill -9` of a rank, by turns with and without
`resilience.fork_ranks`; then, with strace, the files that are opened on a node of one rank and of eight.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.storm import SPARE, drill, gpt_words
from launch.runs.files import read_json
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import ROOT, TINY, descendants, environment, kill_all, ranks_of, start, wait_for

LONG = (*TINY, "cluster=local", "nodes=1", "optim.max_steps=1000000", "eval.interval=0", "checkpoint.interval=10")


def first_record(folder: RunFolder, attempt: int) -> dict[str, Any]:
    """Wait for the first step of an attempt."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = [record for record in read_records(folder.metrics(0)) if record["attempt"] == attempt][:1]
        return bool(found)

    wait_for(look, f"the first step of attempt {attempt}")
    return found[0]


def processor_seconds(pids: list[int]) -> float:
    """Processor time of processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(forked: bool) -> dict[str, float]:
    """Seconds of one start and one restart in place: on the clock, and of the two ranks' processors."""
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "run")
        words = [*LONG, "ranks_per_node=2", f"resilience.fork_ranks={str(forked).lower()}", f"run_dir={folder.path}"]
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
    """Files that the processes of one node open, or look for, in a run of two steps."""
    with tempfile.TemporaryDirectory() as name:
        words = [*TINY, "cluster=local", "nodes=1", f"ranks_per_node={ranks}", "optim.max_steps=2", "eval.interval=0"]
        words += [f"resilience.fork_ranks={str(forked).lower()}", f"run_dir={name}/run", "optim.max_micro_batch=1"]
        trace = ["strace", "-f", "-qq", "-e", "trace=openat", "-e", "signal=none", "-o", f"{name}/trace"]
        command = [*trace, sys.executable, "-m", "launch", *words]
        subprocess.run(command, cwd=name, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, check=True)
        return len(re.findall(r"openat\(", (Path(name) / "trace").read_text()))


ROADS = {
    "": ((*SPARE,), "sigkill_rank,power_cut,requeue", ("in place", "spare", "requeue")),
    "with the state in memory, ": ((*SPARE, "checkpoint.in_memory=true"), "sigkill_rank", ("in place", "spare")),
    "on ": (("resilience.min_nodes=1", "resilience.node_timeout_s=5"), "sigkill_agent", ("fewer nodes",)),
}
"""Words that a drill adds to those of a run, its kinds of faults, and the roads that the page tells of it."""
PARTS = {
    "total_s": "to a new step",
    "noticed_s": "until noticed",
    "started_s": "until the ranks started",
    "first_step_s": "to their first step",
    "again_s": "steps done again",
}


def roads(runs: int) -> int:
    """Print what a fault costs by the road on which the run goes on; exit status 1 where it did not come through."""
    print(f"| seconds, median (slowest) | faults | {' | '.join(PARTS.values())} |\n|{'---|' * (len(PARTS) + 2)}")
    good = True
    for prefix, (words, kinds, names) in ROADS.items():
        folder, count = Path(tempfile.mkdtemp()), runs * len(names)
        drill(folder, (*gpt_words(count), *words), count, seed=1, kinds=kinds)
        verdict = read_json(folder / "drill" / "verdict.json")
        print(f"{prefix or 'all'}: {folder}, {verdict['wrong'] or 'passed'}", file=sys.stderr)
        # Sums in another order end in other bits: with fewer nodes the end is not compared.
        good &= len(verdict["faults"]) == count and (verdict["passed"] or "fewer nodes" in names)
        for road in names:
            costs = [cost for cost in verdict["recoveries"] if cost["road"] == road]
            cells = [[cost[part] for cost in costs] for part in PARTS]
            if costs:
                told = " | ".join(f"{statistics.median(each):.2f} ({max(each):.2f})" for each in cells)
                print(f"| {prefix}{road} | {len(costs)} | {told} |", flush=True)
    return 0 if good else 1


def main() -> None:
    """Measure both sides by turns, and print the medians."""
    if "--roads" in sys.argv:
        sys.argv.remove("--roads")
        sys.exit(roads(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
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
    main()
