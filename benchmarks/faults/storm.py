"""Drills in which one run survives many faults of all kinds: `launch.storm` on a Slurm sandbox or on your own cluster.

    python -m benchmarks.faults.storm --faults 50 --seeds 4         # one drill of 50 faults: most of an hour
    python -m benchmarks.faults.storm --faults 10 --seeds 11,12,13  # one drill for each seed, one after another
    python -m benchmarks.faults.storm --here SHARED --seeds 1,2,3   # on the Slurm of this machine; needs no root
    python -m benchmarks.faults.storm --write FOLDER...             # make the page from finished drills

A drill is one run of two nodes and one spare node, with many faults. The seed decides the order of the faults, their
ranks, steps and seconds; each kind of fault occurs equally often. On the sandbox, all kinds of faults occur. It has
four nodes and no accounting (SlurmdTimeout=20, KillWait=5). On your own cluster, the drill neither cuts power nor stops
Slurm's controller. The cluster needs one shared folder, on which the nodes can read the checkout and its Python. The
program of the run is a chain of hashes. Each rank saves its hash every 25 steps, in files of a few hundred bytes, and
sleeps in its steps until all faults have occurred. A drill passes if three things hold. The final files of both ranks
equal those of an undisturbed run of the same command, byte by byte. The step records have every step of both ranks
once, with the same loss and samples. Nothing of the run remains on the host or in the queue. Goodput is the share of
the allocated time, without the first start, that steps take which count at the end. The predicted goodput is that of
Young and Daly's model, for the save time, the interval and the cost of a restart of this run. Load is the highest
one-minute load average. The exit status is 1 if a drill fails.
"""

from __future__ import annotations

import argparse
import getpass
import itertools
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.page import cores, keep, stamp
from launch.report.goodput import measure_goodput
from launch.runs.events import expected_goodput
from launch.runs.folder import RunFolder, read_json, read_json_lines, write_json
from launch.runs.records import read_records
from launch.slurm.limits import read_limits
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ON_SLURM, ROOT, TINY, environment

SPARE = ("spare_nodes=1", "resilience.node_timeout_s=5")
PROGRAM = ROOT / "tests" / "support" / "programs" / "checkpointing.py"
STEPS_PER_FAULT = 600
"""Number of steps for each fault. They sleep for half a minute in all, so that the run lasts until all faults have
occurred.
"""
STEP_S = 0.05
SAVE_EVERY = 25


def gpt_words(faults: int) -> tuple[str, ...]:
    """Return overrides of a GPT run, one core for each rank, that lasts long enough for ``faults`` faults."""
    words = (*TINY, "ranks_per_node=1", f"optim.max_steps={200 * faults}", "eval.interval=0", "model.dropout=0.1")
    return (*words, "checkpoint.interval=25", "checkpoint.keep_last=4")


def chain_words(faults: int, calm: Path) -> tuple[str, ...]:
    """Return overrides of a run of ``PROGRAM`` that lasts long enough for ``faults`` faults. Each step sleeps for
    ``STEP_S`` seconds until the file ``calm`` exists."""
    arguments = f"{STEPS_PER_FAULT * faults} {SAVE_EVERY} {STEP_S} {calm}"
    script = ("workload=script", "ranks_per_node=1", f"script.path={PROGRAM}", f"script.args='{arguments}'")
    return (*script, "script.resumes=true", f"script.env.PYTHONPATH={ROOT}")


def drill(
    scratch: Path, words: Sequence[str], faults: int, seed: int, kinds: str = "", quiet: Path | None = None
) -> int:
    """Make one drill on a new sandbox. Return the exit status of ``launch.storm``.

    Args:
        scratch: folder for the folder of the drill and the logs of Slurm's daemons.
        words: overrides of the run.
        faults: number of faults.
        seed: seed of the faults.
        kinds: names of the kinds of faults, with commas; empty means all kinds.
        quiet: run folder of an undisturbed run; None means that ``launch.storm`` makes this run.
    """
    with Cluster(scratch / "sandbox") as sandbox:
        sandbox.up(timeout_s=300.0)
        options = ["--sandbox", str(sandbox.directory), *(["--kinds", kinds] if kinds else [])]
        status = storm(scratch, options, words, faults, seed, quiet)
        shutil.copytree(sandbox.directory / "log", scratch / "slurm_logs")  # the sandbox takes its own along
    return status


def storm(
    scratch: Path, options: Sequence[str], words: Sequence[str], faults: int, seed: int, quiet: Path | None
) -> int:
    """Run ``launch.storm`` with ``options`` and the overrides ``words``. Return its exit status. ``launch.storm``
    writes into ``scratch/drill``. ``quiet`` as in ``drill``."""
    words = [*ON_SLURM, "nodes=2", "resilience.heartbeat_timeout_s=10", *words]
    compared = ["--quiet", str(quiet)] if quiet else []
    options = ["--faults", str(faults), "--seed", str(seed), "--output", str(scratch / "drill"), *options, *compared]
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    command = [sys.executable, "-m", "launch.storm", *options, *words]
    env = environment(PYTHONPATH=str(ROOT), **kept)
    return subprocess.run(command, env=env, cwd=scratch, check=False).returncode


def chain_drill(scratch: Path, faults: int, seed: int, *, here: bool = False) -> bool:
    """Make one drill of the chain of hashes, and write the file ``told.json`` for the page. Return True if the drill
    passes. ``here`` uses the Slurm of this machine instead of a sandbox.
    """
    calm, quiet = scratch / "calm", scratch / "quiet"
    words = chain_words(faults, calm)
    calm.touch()
    place = ["cluster=local", "nodes=2", f"run_dir={quiet}"]
    command = [sys.executable, "-m", "launch", *words, *place]
    subprocess.run(command, env=environment(PYTHONPATH=str(ROOT)), cwd=scratch, check=True, capture_output=True)
    calm.unlink()
    site = cluster_in_words() if here else f"Slurm {slurm_version()} in network namespaces"
    machine = f"{cores()}, {site}"
    told: dict[str, Any] = {"seed": seed, "planned": faults, "stamp": stamp(machine), "load": [os.getloadavg()[0]]}
    done = threading.Event()

    def look() -> None:
        while not done.wait(1.0):
            told["load"].append(os.getloadavg()[0])
            if sum(1 for _ in read_json_lines(scratch / "drill" / "faults.jsonl")) == faults:
                calm.touch()

    watch = threading.Thread(target=look)
    watch.start()
    began = time.monotonic()
    try:
        words = (*SPARE, *words)
        if here:
            status = storm(scratch, [], words, faults, seed, quiet)
        else:
            status = drill(scratch, words, faults, seed, quiet=quiet)
    finally:
        done.set()
        watch.join()
    told |= {"seconds": time.monotonic() - began, "load": max(told["load"]), "status": status}
    write_json(scratch / "told.json", told)
    return status == 0


def slurm_version() -> str:
    """Return the version of the installed Slurm."""
    return subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]


def cluster_in_words() -> str:
    """Return the version of this machine's Slurm cluster and the settings that affect a drill, as text."""
    limits = read_limits()
    names = ("SelectType", "SelectTypeParameters", "ProctrackType", "SlurmdTimeout", "KillWait", "MinJobAge")
    told = [limits.config.get(name, "unknown").rpartition("/")[2] for name in names]
    accounts = "with" if limits.has_accounting else "without"
    return (
        f"Slurm {limits.config.get('SLURM_VERSION', 'unknown')}, no sandbox: {len(limits.nodes)} nodes, {told[0]} "
        f"({told[1]}), {told[2]}, SlurmdTimeout {told[3]}, KillWait {told[4]}, MinJobAge {told[5]}, "
        f"{accounts} accounting, user {getpass.getuser()}"
    )


def page(folders: Sequence[Path]) -> str:
    """Return the result of the drills as Markdown: a row for each drill, and the faults by kind."""
    drills = [(read_json(folder / "told.json"), read_json(folder / "drill" / "verdict.json")) for folder in folders]
    passed = sum(found["passed"] for _, found in drills)
    count = sum(len(found["faults"]) for _, found in drills)
    lines = [f"Drills: {len(drills)}, of which {passed} passed, with {count} faults in all.", ""]
    for text, group in itertools.groupby(drills, key=lambda one: one[0]["stamp"]):
        seeds = ", ".join(str(told["seed"]) for told, _ in group)
        lines += [f"Seed {seeds}: {text}", ""]
    titles = ("Slurm", "seed", "faults", "kinds", "attempts", "typed", "identical", "goodput", "Young/Daly", "minutes")
    lines += [f"| {' | '.join(titles)} | load |", "|---" * len(titles) + "|---|"]
    lines += [_row(folder, *drill) for folder, drill in zip(folders, drills, strict=True)]
    # After a drill was inspected by hand, ``note`` in its told.json has the finding.
    said = [(told["seed"], [*found["wrong"], *filter(None, [told.get("note")])]) for told, found in drills]
    wrong = [f"- Seed {seed}: {'; '.join(words)}." for seed, words in said if words]
    kinds = Counter(fault["kind"] for _, found in drills for fault in found["faults"])
    lines += [
        "",
        *wrong,
        *[""] * bool(wrong),
        "| fault | times | seconds to a new step, median (slowest), by the road |",
    ]
    lines += ["|---|---|---|"]
    costs = [cost for _, found in drills for cost in found["recoveries"]]
    lines += [f"| {kind} | {number} | {_roads(kind, costs)} |" for kind, number in sorted(kinds.items())]
    return "\n".join(lines)


def _roads(kind: str, costs: Sequence[dict[str, Any]]) -> str:
    """Return the recovery times of the faults of one kind as text: for each kind of restart the median, and in brackets
    the largest time, in seconds."""
    roads: dict[str, list[float]] = {}
    for cost in costs:
        if cost["kind"] == kind:
            roads.setdefault(cost["road"], []).append(cost["total_s"])
    return "; ".join(f"{road} {statistics.median(took):.1f} ({max(took):.1f})" for road, took in sorted(roads.items()))


def _row(folder: Path, told: dict[str, Any], found: dict[str, Any]) -> str:
    kinds = len({fault["kind"] for fault in found["faults"]})
    measured = goodput_figures(RunFolder(folder / "drill" / "stormy"), found["faults"])
    version = re.findall(r"Slurm ([\d.]+)", told["stamp"])[-1]
    came = f"{len(found['faults'])} of {told['planned']}"
    cells = [version, told["seed"], came, kinds, found["attempts"], found["typed"]]
    cells.append("yes" if found["passed"] else "no")
    cells += ["", ""] if measured is None else [f"{share:.1%}" for share in measured]
    cells += [f"{told['seconds'] / 60:.0f}", f"{told['load']:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def goodput_figures(stormy: RunFolder, faults: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return two shares, 0 to 1: the measured goodput without the first start, and the goodput that Young and Daly's
    model predicts. None if the run has too few saves, steps or faults for them.

    The model gets the saves and steps until the last fault. After this fault the run may continue at another speed.
    """
    events = stormy.read_events()
    goodput = measure_goodput(stormy, events)
    until = max((fault["time"] for fault in faults), default=0.0)
    saved = [event for event in events if event["event"] == "saved" and event["time"] <= until]
    records = [record for record in read_records(stormy.metrics(0)) if record.get("time", math.inf) <= until]
    times = [record["step_time_s"] for record in records if "step_time_s" in record]
    if goodput is None or not times or len(saved) < 2 or not faults:
        return None
    seconds = defaultdict(float, goodput.seconds)
    allocated = sum(seconds.values()) - seconds["waiting"]
    save_s = statistics.mean(float(event.get("seconds", 0.0)) for event in saved)
    steps = sorted({int(event["step"]) for event in saved})
    apart = statistics.median([b - a for a, b in itertools.pairwise(steps)] or [steps[-1]])
    interval_s, between_s = apart * statistics.median(times), allocated / len(faults)
    restart_s = (seconds["restarts"] + seconds["restore"] + seconds["shutdown"]) / len(faults)
    after_start = seconds["steps"] / (allocated - seconds["start"])
    return after_start, expected_goodput(save_s, interval_s, restart_s, between_s)


def main() -> int:
    """Run the drills. Returns the exit status: 1 if a drill does not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="of each drill (%(default)s)")
    parser.add_argument("--seeds", default="1", metavar="N,...", help="one drill for each (%(default)s)")
    parser.add_argument("--write", nargs="+", type=Path, metavar="FOLDER", help="write the page of finished drills")
    parser.add_argument("--here", type=Path, metavar="SHARED", help="folder on the nodes of this machine's own cluster")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="drills that go on at once (%(default)s)")
    args = parser.parse_args()
    if args.write:
        keep(Path(__file__), "A storm of faults of all kinds in one run", __doc__, page(args.write))
        return 0

    def one(seed: int) -> bool:
        scratch = Path(tempfile.mkdtemp(dir=args.here))
        good = chain_drill(scratch, args.faults, seed, here=args.here is not None)
        print(f"seed {seed}: verdict, event logs, and what Slurm's daemons logged are in {scratch}", flush=True)
        return good

    with ThreadPoolExecutor(args.at_once) as pool:
        return 0 if all(list(pool.map(one, map(int, args.seeds.split(","))))) else 1


if __name__ == "__main__":
    sys.exit(main())
