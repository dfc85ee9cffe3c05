"""Training runs with faults on a Slurm sandbox, which must end with the same weights as an undisturbed run.

    python -m benchmarks.faults.storm_on_sandbox                         # all cases: 40 minutes on two cores, as root
    python -m benchmarks.faults.storm_on_sandbox --only srun,controller  # cases with one of these words in their names
    python -m benchmarks.faults.storm_on_sandbox --write                 # and write the page

Every case is a training run of two nodes on a Slurm sandbox of four (SlurmdTimeout=20, KillWait=5, no accounting), with
the default limits of `resilience.max_restarts`. In a case "back after 3 s" a node has no power for 3 s. A case with
"spare" in its name has a third node, and `resilience.node_timeout_s=5` lets it replace a node that is back after 8 s.
In a case "controller away" the controller stops just before the agents receive SIGTERM, so that they cannot yet ask it
for the reason of the signal. The script compares weights and optimizer after the last step with those of the
undisturbed run, tensor by tensor. It prints a line for each case. The exit status is 1 if a run does not finish, or if
a bit differs.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from benchmarks.faults.storm import SPARE, slurm_version
from benchmarks.page import chosen, cores, keep, stamp
from slurm.sandbox.cluster import Cluster, heal, power_cut, preempt
from slurm.sandbox.state import SandboxError
from tests.support.checkpoints import differing, read_weights
from tests.support.commands import TINY, run
from tests.support.runs import StormyRun

STEPS = 250
WORDS = (f"optim.max_steps={STEPS}", "eval.interval=0", "checkpoint.interval=50", "model.dropout=0.1")
SLOW_START = ("resilience.engine=exec",)
"""Overrides that let ranks import for seconds, so that a preemption can come before their first step."""
END_S = 900.0


def reboot(storm: StormyRun, index: int, seconds: float) -> None:
    """Cut the power of node ``index`` of the job for ``seconds`` seconds."""
    storm.wait_for_steps(attempt=1)
    name = storm.hosts()[index]
    power_cut(storm.sandbox, name)
    time.sleep(seconds)
    heal(storm.sandbox, name)


def kill_srun(storm: StormyRun, *, alone: bool) -> None:
    """Kill the srun of the batch script while the ranks train. If ``alone`` is False, also kill the helper process of
    this srun."""
    storm.wait_for_steps(attempt=1)
    storm.kill_srun(alone=alone)


def stop_controller(storm: StormyRun, seconds: float) -> None:
    """Stop Slurm's controller, ask the agents to stop, and start the controller again after ``seconds`` seconds."""
    storm.wait_for_steps(attempt=1)
    storm.sandbox.stop_controller()
    try:
        storm.tell_agents_to_leave()
        storm.wait(lambda: storm.of("controller_away"), "the agents to notice")
        time.sleep(seconds)
    finally:
        storm.sandbox.start_controller()


def preempt_early(storm: StormyRun) -> None:
    """Preempt each of three attempts before its first step."""
    for attempt in (1, 2, 3):
        storm.wait_for_ranks(attempt)
        preempt(storm.sandbox, storm.job, seconds=1)


Case = tuple[tuple[str, ...], Callable[[StormyRun], None]]
CASES: dict[str, Case] = {
    **{f"member back after {s} s": ((), partial(reboot, index=1, seconds=s)) for s in (2, 3, 8, 14)},
    **{f"member back after {s} s, spare": (SPARE, partial(reboot, index=1, seconds=s)) for s in (2, 3, 8, 14)},
    **{f"idle spare back after {s} s": (SPARE, partial(reboot, index=2, seconds=s)) for s in (2, 3, 8, 14)},
    "head node back after 3 s": ((), partial(reboot, index=0, seconds=3)),
    "srun killed, which ends the step": ((), partial(kill_srun, alone=True)),
    "srun killed with its helper, and the step goes on": ((), partial(kill_srun, alone=False)),
    **{f"controller away for {s} s": ((), partial(stop_controller, seconds=s)) for s in (20, 75, 300)},
    "three preemptions before the first step": (SLOW_START, preempt_early),
}


Row = tuple[str, str, str, str, str]
"""Name of a case, outcome, restarts by cause, "yes" if the final weights are bit-identical, and seconds."""


def weather(folder: Path, name: str, whole: dict[str, torch.Tensor]) -> Row:
    """Run the case ``name`` on a new sandbox, and return its row. ``folder`` is the folder for the sandbox and the run,
    and ``whole`` has the weights of an undisturbed run."""
    words, fault = CASES[name]
    began, same, restarts = time.monotonic(), "no", "none"
    with Cluster(folder / "sandbox") as sandbox:
        sandbox.up(timeout_s=180.0)
        try:
            storm = StormyRun(sandbox, folder, *TINY, *WORDS, *words)
        except AssertionError as error:
            return name, f"not submitted: {str(error)[:300]}", restarts, same, f"{time.monotonic() - began:.0f}"
        try:
            fault(storm)
            status = storm.process.wait(timeout=END_S)
            outcome = "finished" if status == 0 else f"exit status {status}: {storm.log.read_text()[-300:]}"
        except (AssertionError, OSError, SandboxError, subprocess.TimeoutExpired) as error:
            outcome = f"failed: {str(error)[:300]}"
        finally:
            if storm.process.poll() is None:
                storm.process.send_signal(signal.SIGKILL)
            shutil.copytree(folder / "sandbox" / "log", folder / "slurm_logs")  # the sandbox takes its own along
    restarts = ", ".join(e["cause"] for e in storm.of("attempt_ended") if e["cause"] != "finished") or "none"
    if outcome == "finished" and not differing(whole, read_weights(storm.folder.path, STEPS, folder)):
        same = "yes"
    return name, outcome, restarts, same, f"{time.monotonic() - began:.0f}"


def main() -> int:
    """Run the cases. Returns the exit status: 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", metavar="WORDS", help="the cases with one of these words: WORD,WORD")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="cases side by side, each on its sandbox")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/")
    args = parser.parse_args()
    names = chosen_cases(args.only)
    scratch = tempfile.mkdtemp()
    with ThreadPoolExecutor(args.at_once) as pool:
        place = Path(scratch) / "whole"
        place.mkdir()
        run("launch", *TINY, "nodes=2", *WORDS, "cluster=local", f"run_dir={place / 'run'}", cwd=place)
        whole = read_weights(place / "run", STEPS, place)
        results = []
        for number, name in enumerate(names, start=1):
            folder = Path(scratch) / f"case{number}"
            folder.mkdir()
            results.append(pool.submit(weather, folder, name, whole))
        for number, result in enumerate(as_completed(results), start=1):
            name, outcome, restarts, same, seconds = result.result()
            text = f"{name}: {outcome}; restarts: {restarts}; bit-identical: {same}; {seconds} s"
            print(f"{number}/{len(names)}  {text}", flush=True)
    rows = [result.result() for result in results]
    if args.write:
        lines = ["| case | outcome | restarts, by cause | bit-identical | seconds |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        side = f"{args.at_once} cases side by side" if args.at_once > 1 else "one case after another"
        machine = f"{cores()}, {side}, Slurm {slurm_version()} in network namespaces"
        text = f"{stamp(machine)}\n\n" + "\n".join(lines)
        keep(Path(__file__), "A storm of faults, on a Slurm sandbox", __doc__, text)
    good = all(row[1] == "finished" and row[3] == "yes" for row in rows)
    if good:
        shutil.rmtree(scratch)
    else:
        print(f"event logs, and the logs of Slurm's daemons, are kept in {scratch}")
    return 0 if good else 1


def chosen_cases(words: str) -> list[str]:
    """Return the cases whose names contain one of the words in ``words``. Exits if there is no such case."""
    found = [name for name in CASES if any(word in name for word in words.split(","))]
    return found or chosen(words, list(CASES))


if __name__ == "__main__":
    sys.exit(main())
