"""One training program under several engines, with the same faults on a Slurm sandbox: who survives, and how fast.

    python -m benchmarks.faults.league                                    # each engine and each fault, once
    python -m benchmarks.faults.league --engines ours,torchrun --only node --seeds 2
    python -m benchmarks.faults.league --python ENV/bin/python --write    # a Python that has all packages

Each case is one run of `benchmarks/faults/league_program.py` on two nodes with one rank each, in a sandbox of four
nodes (SlurmdTimeout=20, KillWait=5, GraceTime=10). The seed decides the moment of the fault, 1 to 4 seconds after the
first checkpoint. A collective fails after 30 s. A case counts as survived if the run ends without help from a person,
within 300 s of the fault, with the weights of an undisturbed run. Seconds count from the fault to the first step that
the run had not done before. Steps done again are those between the last checkpoint and the fault. The engines are:
- ours: `nodes=2 spare_nodes=1 resilience.node_timeout_s=5 resilience.hang_timeout_s=30`.
- torchrun: a batch script with `--requeue`, `torchrun --max-restarts=3` on each node with the c10d rendezvous, and
  `scontrol requeue` after a failure.
- ft_launcher (nvidia-resiliency-ext): three nodes with `--no-kill`, so that the third is a hot spare; heartbeats with
  a timeout of 30 s; `scontrol requeue` after a failure.
- submitit: a function with a `checkpoint` method, which submitit requeues when Slurm preempts the job or ends its time.
- Lightning: a Trainer with `SLURMEnvironment(auto_requeue=True)`, `--signal=SIGUSR1@90`, and the last checkpoint.

The exit status is 1 if a run of ours does not survive.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.league_program import TIMEOUT_S
from benchmarks.faults.storm import slurm_version
from benchmarks.page import chosen, cores, keep, stamp
from launch.runs.folder import read_json_lines
from slurm.sandbox.cluster import Cluster, cut_link, heal, power_cut, preempt
from slurm.sandbox.state import SandboxError
from tests.support.commands import ROOT, end_servers, environment, wait_for

PROGRAM = ROOT / "benchmarks" / "faults" / "league_program.py"
OTHERS = ROOT / "benchmarks" / "faults" / "league_others.py"
LIMIT_S = 300.0
"""Time limit in seconds from the fault to the end of a run that survives."""

TORCHRUN = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --time=60
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 {python} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --max-restarts=3 \\
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" {program} --folder {folder} ||
    scontrol requeue "$SLURM_JOB_ID"
"""
FT_LAUNCHER = """#!/bin/bash
#SBATCH --nodes=3 --ntasks-per-node=1 --requeue --open-mode=append --time=60 --no-kill
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 --no-kill --wait=0 {python} -m nvidia_resiliency_ext.fault_tolerance.launcher \\
    --nnodes=2 --nproc-per-node=1 --max-restarts=3 --ignore-missing-fault-tol-cfg \\
    --ft-initial-rank-heartbeat-timeout=60 --ft-rank-heartbeat-timeout={timeout} \\
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \\
    {program} --folder {folder} --heartbeats || scontrol requeue "$SLURM_JOB_ID"
"""
LIGHTNING = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --time=60 --signal=SIGUSR1@90
srun {python} {others} lightning --folder {folder}
"""
SCRIPTS = {"torchrun": TORCHRUN, "ft_launcher": FT_LAUNCHER, "lightning": LIGHTNING}
ENGINES = ("ours", *SCRIPTS, "submitit")
AGENTS = {
    "ours": "launch.agent",
    "torchrun": "torch.distributed.run",
    "ft_launcher": "fault_tolerance.launcher",
    "lightning": "league_others",
    "submitit": "submitit",
}
"""Engine -> word in the command line of its process on each node."""


class LeagueRun:
    """A run of one engine on a sandbox."""

    def __init__(self, sandbox: Cluster, engine: str, folder: Path, python: str) -> None:
        """Submit the run. ``python`` is an interpreter that has the packages of the engine."""
        self.sandbox, self.engine, self.folder = sandbox, engine, folder
        self.env = environment(PYTHONPATH=str(ROOT), **sandbox.env)
        self.follower: subprocess.Popen[bytes] | None = None
        script = SCRIPTS.get(engine)
        if script:
            text = script.format(
                python=python,
                program=shlex.quote(str(PROGRAM)),
                others=shlex.quote(str(OTHERS)),
                folder=shlex.quote(str(folder)),
                timeout=TIMEOUT_S,
            )
            (folder / "job.sh").write_text(text)
            self._job = self._run("sbatch", "--parsable", f"--output={folder}/log", str(folder / "job.sh")).strip()
        elif engine == "submitit":
            self._job = self._run(python, str(OTHERS), "submitit", "--folder", str(folder)).strip().split()[-1]
        else:
            self._job = ""
            words = ["nodes=2", "spare_nodes=1", "cluster=slurm", "workload=script", f"script.path={PROGRAM}"]
            words += [f"script.options.folder={folder}", "script.resumes=true", "launch.poll_s=1"]
            words += [r"script.progress=step (?P<step>\d+): loss (?P<loss>[\d.]+)", "launch.report_files=[md,csv]"]
            words += [f"run_dir={folder / 'run'}", "resilience.node_timeout_s=5"]
            words += [f"resilience.hang_timeout_s={TIMEOUT_S}"]
            with (folder / "launcher.log").open("wb") as log:
                self.follower = subprocess.Popen(
                    [sys.executable, "-m", "gpt_launch", *words], env=self.env, cwd=folder, stdout=log, stderr=log
                )

    def _run(self, *words: str) -> str:
        done = subprocess.run(words, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def job(self) -> str:
        """Return Slurm's id of the job."""
        if self._job:
            return self._job
        submitted = [e for e in read_json_lines(self.folder / "run" / "events.jsonl") if e["event"] == "submitted"]
        return str(submitted[-1]["job_id"])

    def steps(self) -> list[dict[str, Any]]:
        """Return the step records so far, in the order in which the ranks have written them."""
        return list(read_json_lines(self.folder / "steps.jsonl"))

    def new_steps(self, moment: float) -> list[dict[str, Any]]:
        """Return the records of new steps after ``moment``, a Unix time. A step is new if no process that started
        before ``moment`` has made it.
        """
        steps = self.steps()
        before = max((r["step"] for r in steps if r["start"] < moment), default=0)
        return [r for r in steps if r["step"] > before and r["start"] > moment]

    def field(self, name: str) -> str:
        """Return the value of a field in ``scontrol show job``; empty if Slurm does not print the field."""
        text = self.sandbox.slurm("scontrol", "show", "job", "-o", self.job)
        return next((word.partition("=")[2] for word in text.split() if word.startswith(f"{name}=")), "")

    def hosts(self) -> list[str]:
        """Return the nodes of the job. The first one runs the batch script."""
        return self.sandbox.slurm("scontrol", "show", "hostnames", self.field("NodeList")).split()

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank: the youngest process of the program with this rank in its environment."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ", "create_time"]):
            known: Mapping[str, str] = process.info["environ"] or {}
            words = " ".join(process.info["cmdline"] or ())
            is_rank = known.get("RANK", known.get("SLURM_PROCID")) == str(number)
            if is_rank and str(self.folder) in words and ("league_" in words or "submitit" in words):
                found.append(process)
        return max(found, key=lambda process: process.info["create_time"])

    def agent(self, number: int) -> psutil.Process:
        """Return the process of the engine on the node of a rank. An engine without such a process: the process of the
        rank.
        """
        rank = self.rank(number)
        word = AGENTS[self.engine]
        return next((p for p in rank.parents() if word in " ".join(p.cmdline())), rank)

    def host_of(self, number: int) -> str:
        """Return the node on which a rank runs."""
        return str(self.rank(number).environ()["SLURMD_NODENAME"])

    def end(self) -> None:
        """Cancel the job, and end the process that shows its output."""
        self.sandbox.slurm("scancel", self.job)
        if self.follower is not None:
            self.follower.send_signal(signal.SIGTERM)
            try:
                self.follower.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.follower.kill()


def reboot(run: LeagueRun) -> None:
    """Cut the power of rank 1's node for 8 seconds."""
    host = run.host_of(1)
    power_cut(run.sandbox, host)
    time.sleep(8)
    heal(run.sandbox, host)


def shorten(run: LeagueRun) -> None:
    """Set the job's time limit to one minute, wait until Slurm ends the job, and set the limit to one hour for its next
    start.
    """
    job = run.job
    run.sandbox.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    wait_for(lambda: run.field("JobState") != "RUNNING", "the time limit", timeout_s=180)
    run.sandbox.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")


FAULTS: dict[str, Callable[[LeagueRun], Any]] = {
    "rank killed": lambda run: run.rank(1).kill(),
    "rank frozen": lambda run: run.rank(1).suspend(),
    "agent killed": lambda run: run.agent(1).kill(),
    "node without power": lambda run: power_cut(run.sandbox, run.host_of(1)),
    "node rebooted": reboot,
    "node without network": lambda run: cut_link(run.sandbox, run.host_of(1)),
    "head node without power": lambda run: power_cut(run.sandbox, run.hosts()[0]),
    "preemption": lambda run: preempt(run.sandbox, run.job),
    "time limit": shorten,
}


@dataclass(frozen=True)
class Result:
    """Result of one case."""

    engine: str
    fault: str
    seconds: float | None
    """Seconds from the fault to the first new step; None: there was no new step."""
    again: int
    """Number of steps that were made more than once."""
    end: str
    """``survived``, or the state in which the run ended."""


def take(sandbox: Cluster, engine: str, fault: str, wait_s: float, python: str, whole: str) -> Result:
    """Run one case and return its result. The fault comes ``wait_s`` seconds after the first checkpoint. ``python`` is
    an interpreter that has the packages of the engine, and ``whole`` the hash of the final weights of an undisturbed
    run."""
    folder = Path(tempfile.mkdtemp(prefix=f"league-{engine}-"))
    run = LeagueRun(sandbox, engine, folder, python)
    seconds = None
    try:
        wait_for(lambda: any(folder.glob("newest.[pc]*t")), "the first checkpoint", timeout_s=120)
        time.sleep(wait_s)
        moment = time.time()
        FAULTS[fault](run)
        wait_for(lambda: run.new_steps(moment), "a new step", moment + LIMIT_S - time.time())
        seconds = run.new_steps(moment)[0]["time"] - moment
        (folder / "hurry").touch()
        wait_for((folder / "end.json").exists, "the end", max(60.0, moment + LIMIT_S - time.time()))
        same = json.loads((folder / "end.json").read_text())["sum"] == whole
        end = "survived" if same else "other weights"
    except (AssertionError, SandboxError, ValueError) as error:
        try:
            state = f"{run.field('JobState')}, {run.field('Reason')}"
        except (AssertionError, SandboxError, IndexError):
            state = "no job"
        end = f"{str(error)[:80]}; job: {state}"
    steps = [record["step"] for record in run.steps()]
    run.end()
    for name in sandbox.nodes:
        heal(sandbox, name)
    sandbox.wait_idle(timeout_s=240)
    return Result(engine, fault, seconds, len(steps) - len({*steps}), end)


def undisturbed(python: str) -> str:
    """Run two ranks without faults on this machine, and return the hash of the final weights."""
    folder = Path(tempfile.mkdtemp(prefix="league-whole-"))
    (folder / "hurry").touch()
    words = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(PROGRAM)]
    subprocess.run(
        [*words, "--folder", str(folder)], env=environment(PYTHONPATH=str(ROOT)), check=True, stdout=subprocess.DEVNULL
    )
    return str(json.loads((folder / "end.json").read_text())["sum"])


def take_engine(engine: str, faults: list[str], seeds: int, python: str, whole: str) -> Iterator[Result]:
    """Yield the results of all cases of an engine, which run one after another on one sandbox."""
    with Cluster(Path(tempfile.mkdtemp(prefix="sandbox-"))) as sandbox:
        sandbox.up(timeout_s=180)
        for seed in range(seeds):
            for fault in faults:
                wait_s = random.Random(f"{seed} {fault}").uniform(1, 4)  # the same for every engine
                yield take(sandbox, engine, fault, wait_s, python, whole)


def table(results: list[Result]) -> str:
    """Return the two tables of the page: a summary of each engine, and one row for each fault."""
    engines = list(dict.fromkeys(result.engine for result in results))
    lines = ["| engine | survived | seconds to a new step, median | worst | steps done again, mean |"]
    lines += ["|---|---|---|---|---|"]
    for engine in engines:
        own = [result for result in results if result.engine == engine]
        lived = [result for result in own if result.end == "survived"]
        seconds = [result.seconds for result in lived if result.seconds is not None]
        times = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}" if seconds else "none | none"
        again = f"{statistics.mean(result.again for result in lived):.1f}" if lived else "none"
        lines.append(f"| {engine} | {len(lived)} of {len(own)} | {times} | {again} |")
    lines += ["", f"| fault | {' | '.join(engines)} |", f"|---|{'---|' * len(engines)}"]
    for fault in dict.fromkeys(result.fault for result in results):
        cells = []
        for engine in engines:
            own = [result for result in results if (result.engine, result.fault) == (engine, fault)]
            seconds = [r.seconds for r in own if r.end == "survived" and r.seconds is not None]
            text = f"{statistics.median(seconds):.1f} s" if seconds else ""
            cells.append(text if len(seconds) == len(own) else f"{text} {len(seconds)} of {len(own)}".strip())
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the cases. Returns the exit status: 1 if a run of this project did not survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engines", default="", metavar="NAMES", help=f"NAME,NAME of {', '.join(ENGINES)} (all)")
    parser.add_argument("--only", default="", metavar="WORD", help="the faults with this word in their names")
    parser.add_argument("--seeds", type=int, default=1, help="times that each fault is taken (%(default)s)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="engines side by side, each on a sandbox")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the packages of the other engines")
    parser.add_argument("--write", action="store_true", help="write the page into benchmarks/")
    args = parser.parse_args()
    engines = chosen(args.engines, ENGINES)
    faults = [fault for fault in FAULTS if args.only in fault]
    whole, results = undisturbed(args.python), []
    with ThreadPoolExecutor(args.at_once) as pool:

        def take_all(engine: str) -> None:
            for result in take_engine(engine, faults, args.seeds, args.python, whole):
                print(json.dumps(vars(result)), flush=True)
                results.append(result)

        for future in as_completed([pool.submit(take_all, engine) for engine in engines]):
            future.result()
    end_servers()
    results.sort(key=lambda result: engines.index(result.engine))
    if args.write:
        others = [r for r in results if r.end != "survived"]
        notes = [f"- {r.engine}, {r.fault}: {r.end}" for r in others]
        machine = f"{cores()}, {args.at_once} engines at a time, Slurm {slurm_version()} in network namespaces"
        text = "\n".join(
            [stamp(machine), "", table(results), "", "What did not survive:", "", *(notes or ["- nothing"])]
        )
        keep(Path(__file__), "A league of engines", __doc__, text, f"--seeds {args.seeds} --write")
    return int(any(result.engine == "ours" and result.end != "survived" for result in results))


if __name__ == "__main__":
    sys.exit(main())
