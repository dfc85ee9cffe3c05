"""Seconds until ranks run again after the head node of a job has lost power, on a Slurm sandbox.

    python -m benchmarks.faults.heads --times 10            # prints a line for each loss
    python -m benchmarks.faults.heads --times 10 --write    # and writes the page

Each run counts on two nodes with one spare node, `resilience.node_timeout_s=5`, and saves every 20 steps of 50 ms. At a
random moment of 0 to 3 seconds after its first save, the power of the head node is cut. Notice is the first moment
at which an agent shows that it has lost the head node. The seconds count from there to the event `started` of the next
attempt, and from the cut to the first new step. A loss counts as survived if the run ends in the same job with the sum
of all steps, without a requeue. The exit status is 1 if one does not.
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
from tests.support.commands import end_servers
from tests.support.runs import COUNTING, StormyRun, checkpoint, options

STEPS = 4000
WORDS = ("spare_nodes=1", "resilience.node_timeout_s=5")


@dataclass(frozen=True)
class Loss:
    """Seconds of one loss of the head node."""

    to_notice: float
    """From the cut to the notice."""
    to_ranks: float
    """From the notice to the start of the ranks."""
    to_step: float
    """From the cut to the first new step."""


def lose_head(sandbox: Cluster, folder: Path, wait_s: float) -> Loss:
    """Make one run, cut the power of its head node ``wait_s`` seconds after its first save, and measure."""
    hurry = folder / "hurry"
    run = StormyRun(sandbox, folder, *COUNTING, *options(save_every=20, steps=STEPS, hurry=hurry), *WORDS)
    run.wait(lambda: run.of("saved"), "a checkpoint")
    time.sleep(wait_s)
    head, cut = run.hosts()[0], time.time()
    power_cut(sandbox, head)
    run.wait_for_steps(attempt=2, count=1)
    hurry.touch()
    assert run.process.wait(timeout=300) == 0, run.log.read_text()
    events = run.folder.read_events()
    causes = [event["cause"] for event in select_events(events, "attempt_ended")]
    assert causes == ["node_failed", "finished"] and not select_events(events, "requeued"), causes
    assert checkpoint(run.folder)["step"] == STEPS
    noticed = min(file.stat().st_mtime for file in (run.folder.path / ".launch").glob("*.without-0.*"))
    (started,) = select_events(events, "started", attempt=2)
    first = min(record["time"] for record in read_records(run.folder.metrics(0)) if record["attempt"] == 2)
    heal(sandbox, head)
    sandbox.wait_idle(timeout_s=180)
    return Loss(noticed - cut, started["time"] - noticed, first - cut)


def main() -> int:
    """Return the exit status: 1 if a run did not survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=10, metavar="N", help="losses (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (%(default)s)")
    parser.add_argument("--write", action="store_true", help="write the page into benchmarks/")
    args = parser.parse_args()
    draw, losses, failed = random.Random(args.seed), [], 0
    with Cluster(Path(tempfile.mkdtemp(prefix="sandbox-"))) as sandbox:
        sandbox.up(timeout_s=180)
        for number in range(1, args.times + 1):
            folder = Path(tempfile.mkdtemp(prefix="heads-"))
            try:
                losses.append(lose_head(sandbox, folder, draw.uniform(0, 3)))
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
