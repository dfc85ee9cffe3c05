"""Time until a sweep is in Slurm's queue: ours and hydra-submitit-launcher's.

    python -m benchmarks.scale.submit  # prints the table, about two minutes, as root
    python -m benchmarks.scale.submit --rounds 9 --write

Our launcher submits 66 points in three shapes (one, two and four nodes, 22 seeds each) to a Slurm sandbox of four
nodes, by `python -m launch -m` with `launch.detach=true`. Hydra's launcher `submitit_slurm` submits 64 points there
from an app that does nothing. All these points have one shape, because that launcher has one shape for all points.
Seconds are from the start of the command to the end of its last sbatch; a script in front of the real sbatch records
them. The commands take turns, in reverse order in every second round. A job that uses all nodes keeps the jobs of the
sweeps in the queue; the benchmark cancels them after each command. Our launcher composes, plans and checks each point
against the limits of Slurm and the memory of a rank, and writes a run folder for each. The table also has a dry run of
100 points.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.storm import slurm_version
from benchmarks.page import cores, keep, stamp
from slurm.sandbox.cluster import Cluster
from tests.support.commands import environment, wait_for

OURS = ("-m", "nodes=1,2,4", "seed=range(1,23)", "cluster=slurm", "launch.detach=true")
STOCK = ("-m", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "seed=range(0,64)")
DRY_RUN = ("-m", "nodes=1,2", "seed=range(1,51)", "cluster=slurm", "dry_run=true")
APP = """
import hydra

@hydra.main(version_base=None, config_path=None)
def main(config):
    pass

main()
"""
SBATCH = """#!/bin/sh
{real} "$@"
status=$?
[ "$1" = --version ] || date +%s.%N >> {log}
exit $status
"""
"""Replacement of sbatch: it calls the real sbatch and writes a line when a submission has returned."""


class Submissions:
    """Measures commands that submit to a sandbox whose nodes are all busy.

    Args:
        folder: empty folder for the measurements.
        sandbox: running cluster.
    """

    def __init__(self, folder: Path, sandbox: Cluster) -> None:
        self.folder, self._sandbox, self._log = folder, sandbox, folder / "sbatch.log"
        real, script = shutil.which("sbatch"), folder / "bin" / "sbatch"
        assert real is not None, "the sandbox has found it"
        script.parent.mkdir()
        script.write_text(SBATCH.format(real=real, log=self._log))
        script.chmod(0o755)
        (folder / "app.py").write_text(APP)
        self._env = environment(PATH=f"{script.parent}:{os.environ['PATH']}", **sandbox.env)
        everything = ("--nodes=4", "--exclusive", "--time=60", "--output=/dev/null", "--wrap=sleep 3600")
        self._blocker = sandbox.slurm("sbatch", "--parsable", *everything).strip()

    def ended(self) -> list[float]:
        """Return the Unix times, in seconds, at which the sbatch calls of the current command returned."""
        return [float(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []

    def queued(self) -> list[str]:
        """Return Slurm's ids of the points in the queue."""
        lines = self._sandbox.slurm("squeue", "--noheader", "--array", "--format=%i").split()
        return [line for line in lines if line != self._blocker]

    def time(self, words: list[str], *, calls: int, points: int, ends: bool) -> float:
        """Return the seconds from the start of a command to the end of its last sbatch. Cancels the jobs of the command
        afterwards.

        Args:
            words: the command line.
            calls: number of sbatch calls that the command makes.
            points: number of points in the queue after the last call.
            ends: True if the command ends by itself. Otherwise it waits for the jobs, and this method kills it.
        """
        self._log.unlink(missing_ok=True)
        with (self.folder / "output").open("w+b") as output:
            began = time.time()
            process = subprocess.Popen(
                [sys.executable, *words], cwd=self.folder, env=self._env, stdout=output, stderr=output
            )
            try:
                wait_for(lambda: len(self.ended()) == calls or process.poll() is not None, "the last sbatch")
                if ends:
                    process.wait()
            finally:
                process.kill()
                process.wait()
        text = (self.folder / "output").read_text()
        assert len(self.ended()) == calls, (self.ended(), text)
        assert not ends or process.returncode == 0, text
        assert len(self.queued()) == points, (self.queued(), text)
        for job in {name.partition("_")[0] for name in self.queued()}:
            self._sandbox.slurm("scancel", job)
        wait_for(lambda: not self.queued(), "an empty queue")
        return self.ended()[-1] - began

    def ours(self, name: str) -> float:
        """Return the seconds until all 66 points of our sweep are in the queue. ``name`` names the runs."""
        return self.time(["-m", "launch", *OURS, f"name={name}"], calls=3, points=66, ends=True)

    def stock(self, name: str) -> float:
        """Return the seconds until all 64 points of the sweep by Hydra's submitit launcher are in the queue. ``name``
        names the folder of the sweep."""
        return self.time(
            ["app.py", *(STOCK[:-1]), f"hydra.sweep.dir={name}", f"+{STOCK[-1]}"], calls=1, points=64, ends=False
        )

    def dry_run(self, name: str) -> float:
        """Return the seconds of a dry run of 100 points, from start to end. ``name`` names the runs."""
        began = time.time()
        words = [sys.executable, "-m", "launch", *DRY_RUN, f"name={name}"]
        subprocess.run(words, cwd=self.folder, env=self._env, check=True, stdout=subprocess.DEVNULL)
        return time.time() - began


def measure(rounds: int) -> str:
    """Return a Markdown table with the times of all commands over ``rounds`` rounds. One round before them fills the
    caches and does not count."""
    # Not deeper: paths of Unix sockets are short.
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "sandbox") as sandbox:
        sandbox.up(timeout_s=180.0)
        place = Path(folder) / "commands"
        place.mkdir()
        commands = Submissions(place, sandbox)
        sides: dict[str, Callable[[str], float]] = {
            "ours": commands.ours,
            "stock": commands.stock,
            "dry": commands.dry_run,
        }
        spent: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(rounds + 1):
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                seconds = sides[side](f"{side}{turn}")
                if turn:
                    spent[side].append(seconds)
    ratio = [ours / stock for ours, stock in zip(spent["ours"], spent["stock"], strict=True)]
    titles = {
        "ours": "`python -m launch -m`, 66 points in 3 shapes, 3 calls of sbatch",
        "stock": "`submitit_slurm`, 64 points in 1 shape, 1 call of sbatch",
        "dry": "`python -m launch -m dry_run=true`, 100 points in 2 shapes",
    }
    lines = ["| command | median, s | best, s | slowest, s |", "|---|---|---|---|"]
    for side, title in titles.items():
        figures = [statistics.median(spent[side]), min(spent[side]), max(spent[side])]
        lines.append(f"| {title} | {' | '.join(f'{s:.2f}' for s in figures)} |")
    best = min(spent["ours"]) / min(spent["stock"])
    told = f"Ours over stock: {statistics.median(ratio):.2f} (median of {rounds} rounds), best over best {best:.2f}."
    return "\n".join([*lines, "", told])


def main() -> None:
    """Measure and print. With ``--write``, also write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write benchmarks/scale/submit.md")
    args = parser.parse_args()
    table = measure(args.rounds)
    machine = f"{cores()}, Slurm {slurm_version()}"
    text = f"{stamp(machine)}\n\n{table}"
    print(text)
    if args.write:
        keep(
            Path(__file__),
            "A sweep into the queue, beside the stock launcher",
            __doc__,
            text,
            f"--rounds {args.rounds} --write",
        )


if __name__ == "__main__":
    main()
