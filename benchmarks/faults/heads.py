"""Seconds until ranks run again after the head node of a job has lost power, on a Slurm sandbox.

    python -m benchmarks.faults.heads --times 10            # prints a line for each power cut
    python -m benchmarks.faults.heads --times 10 --write    # and writes the page
    python -m benchmarks.faults.heads --times 10 --two      # the head node and another node at once

Each run has two nodes and one spare node, `resilience.node_timeout_s=5`, and a program that only adds up a sum. A step
of the program takes 50 ms, and it saves every 20 steps. At a random moment of 0 to 3 seconds after the first save, the
script cuts the power of the head node. Notice is the first moment at which an agent shows that it has lost the head
node. The script measures the seconds from the notice to the event `started` of the next attempt, and from the cut to
the first new step. A run has survived the loss of its head node if it ends in the same job with the sum of all steps,
without a requeue. The exit status is 1 if a run does not survive.

With `--two`, a small GPT trains with dropout on four nodes with two spare nodes. The head node and another node of the
run, drawn at random, lose power together. Such a run has survived if also the weights of the last step equal those of
an undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.storm import slurm_version
from benchmarks.page import cores, keep, stamp
from launch.runs.events import select_events
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster, heal, power_cut
from slurm.sandbox.state import Settings
from tests.support.checkpoints import differing, read_weights
from tests.support.commands import TINY, end_servers, run
from tests.support.runs import COUNTING, StormyRun, checkpoint, options, paced

STEPS = 4000
WORDS = ("resilience.node_timeout_s=5",)
GPT_STEPS = 200
GPT = (*TINY, f"optim.max_steps={GPT_STEPS}", "eval.interval=0", "checkpoint.interval=20", "model.dropout=0.1")


@dataclass(frozen=True)
class Loss:
    """Times of one loss of the head node, in seconds."""

    to_notice: float
    """Time from the power cut to the notice."""
    to_ranks: float
    """Time from the notice to the start of the ranks."""
    to_step: float
    """Time from the power cut to the first new step."""


def train_whole(folder: Path) -> Path:
    """Train the GPT of ``--two`` on this machine without a fault. Returns the run folder."""
    run("launch", *GPT, "nodes=4", "cluster=local", f"run_dir={folder / 'whole'}", cwd=folder)
    return folder / "whole"


def start_run(sandbox: Cluster, folder: Path, two: bool) -> tuple[StormyRun, Path]:
    """Start a run: the GPT of ``--two`` if ``two`` is True, else the program that adds up a sum. Return the run, and
    the path of a file. When this file exists, the run no longer pauses between steps."""
    if two:
        slowly, hurry = paced(folder)
        return StormyRun(sandbox, folder, *GPT, *slowly, *WORDS, "spare_nodes=2", nodes=4), hurry
    hurry = folder / "hurry"
    counting = [*COUNTING, *options(save_every=20, steps=STEPS, hurry=hurry)]
    return StormyRun(sandbox, folder, *counting, *WORDS, "spare_nodes=1"), hurry


def lose_head(sandbox: Cluster, folder: Path, wait_s: float, other: int = 0, whole: Path | None = None) -> Loss:
    """Start a run, cut the power of its head node, and wait for the end of the run. Return the measured times.

    Args:
        sandbox: cluster of the run.
        folder: folder for the run and its log.
        wait_s: seconds from the first save to the cut.
        other: index of a second node of the run that loses power together with the head node; 0: none.
        whole: run folder of an undisturbed run whose final weights must be equal; None runs the program that adds up a
            sum.
    """
    run, hurry = start_run(sandbox, folder, two=whole is not None)
    run.wait(lambda: run.of("saved"), "a checkpoint")
    time.sleep(wait_s)
    hosts, cut = run.rank_hosts(1), time.time()
    gone = [hosts[0], hosts[other]] if other else hosts[:1]
    for host in gone:
        power_cut(sandbox, host)
    run.wait_for_steps(attempt=2, count=1)
    hurry.touch()
    assert run.process.wait(timeout=300) == 0, run.log.read_text()
    events = run.folder.read_events()
    causes = [event["cause"] for event in select_events(events, "attempt_ended")]
    assert causes == ["node_failed", "finished"] and not select_events(events, "requeued"), causes
    if whole is None:
        assert checkpoint(run.folder)["step"] == STEPS
    else:
        weights = [read_weights(path, GPT_STEPS, folder) for path in (whole, run.folder.path)]
        assert differing(*weights) == []
    noticed = min(file.stat().st_mtime for file in (run.folder.path / ".launch").glob("*.without-0.*"))
    (started,) = select_events(events, "started", attempt=2)
    first = min(record["time"] for record in read_records(run.folder.metrics(0)) if record["attempt"] == 2)
    for host in gone:
        heal(sandbox, host)
    sandbox.wait_idle(timeout_s=180)
    return Loss(noticed - cut, started["time"] - noticed, first - cut)


def main() -> int:
    """Make all runs, each with a power cut, and print the times. Returns the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=10, metavar="N", help="losses (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (%(default)s)")
    parser.add_argument("--two", action="store_true", help="cut another node of the run together with the head node")
    parser.add_argument("--write", action="store_true", help="write the page into benchmarks/")
    args = parser.parse_args()
    if args.two and args.write:
        parser.error("--write keeps the page of single losses, without --two")
    draw, losses, failed = random.Random(args.seed), [], 0
    whole = train_whole(Path(tempfile.mkdtemp(prefix="whole-"))) if args.two else None
    with Cluster(Path(tempfile.mkdtemp(prefix="sandbox-"))) as sandbox:
        sandbox.up(Settings(nodes=6 if args.two else 4), timeout_s=180)
        for number in range(1, args.times + 1):
            folder = Path(tempfile.mkdtemp(prefix="heads-"))
            try:
                other = draw.randint(1, 3) if args.two else 0
                losses.append(lose_head(sandbox, folder, draw.uniform(0, 3), other, whole))
                print(f"{number}: {json.dumps(vars(losses[-1]))}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{number}: did not survive, {folder}: {str(error)[:500]}", flush=True)
                break
    end_servers()
    if args.write and losses:
        lines = [f"Losses: {len(losses)}, of which all were survived." if not failed else f"{failed} not survived.", ""]
        lines += ["| seconds | median | worst |", "|---|---|---|"]
        for name, text in (
            ("to_notice", "from the cut to the notice"),
            ("to_ranks", "from the notice to the start of the ranks"),
            ("to_step", "from the cut to the first new step"),
        ):
            values = [getattr(loss, name) for loss in losses]
            lines.append(f"| {text} | {statistics.median(values):.2f} | {max(values):.2f} |")
        machine = f"{cores()}, Slurm {slurm_version()} in network namespaces"
        text = f"{stamp(machine)}\n\n" + "\n".join(lines)
        keep(Path(__file__), "A lost head node", __doc__, text, f"--times {args.times} --write")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
