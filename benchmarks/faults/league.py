"""One training program under several engines, with the same faults on a Slurm sandbox: who survives, and how fast.

    python -m benchmarks.faults.league                                    # each engine and each fault, once
    python -m benchmarks.faults.league --engines ours,torchrun --only node --seeds 2
    python -m benchmarks.faults.league --python ENV/bin/python --write    # a Python that has all packages

Each case is one run of `benchmarks/faults/league_program.py` on two nodes with one rank each, in a sandbox of four
nodes (SlurmdTimeout=20, KillWait=5, GraceTime=10). The seed decides the moment of the fault, 1 to 4 seconds after the
first checkpoint, and is the same for every engine. A collective fails after 30 s. A case counts as survived if the run
ends without help from a person, within 300 s of the fault, with the weights of an undisturbed run: then each sample
counts once. Seconds count from the fault to the first step that the run had not done before. Steps done again are those
between the last checkpoint and the fault. "Out of memory" is a real one: the kernel kills a rank that allocates more
than the memory cgroup of the rank allows. The engines, with the settings that their documentation recommends:
- ours: `nodes=2 spare_nodes=1 resilience.node_timeout_s=5 resilience.heartbeat_timeout_s=10
  resilience.hang_timeout_s=30 resilience.engine=fork:torch`.
- torchrun: a batch script with `--requeue`, `torchrun --max-restarts=3` on each node with the c10d rendezvous, and
  `scontrol requeue` after a failure.
- ft_launcher (nvidia-resiliency-ext): three nodes with `--no-kill`, so that the third is a hot spare; heartbeats with
  a timeout of 30 s; `scontrol requeue` after a failure.
- torchft: three jobs of one node, each with `torchrun --max-restarts=10` and `scontrol requeue` after a failure. The
  third replica is a spare (`FIXED_WITH_SPARES`, two replicas at least). The lighthouse runs on the host of slurmctld,
  which no fault touches. Ranks that stay alive keep their processes and weights, and a new one gets the weights from
  them. "Head node" is the node of the first replica. The program is changed for torchft's Manager.
- submitit: a function with a `checkpoint` method, which submitit requeues when Slurm preempts the job or ends its time.
- Lightning: a Trainer with `SLURMEnvironment(auto_requeue=True)`, `--signal=SIGUSR1@90`, and the last checkpoint.

With `--write`, each case is kept in `league.csv`, in the place of an older one of the same engine, fault and seed, and
the page shows all cases of the file. The exit status is 1 if a run of ours does not survive.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import queue
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.league_program import TIMEOUT_S
from benchmarks.faults.storm import slurm_version
from benchmarks.page import chosen, commit, cores, keep, stamp
from launch.runs.folder import read_json_lines
from slurm.sandbox.cluster import Cluster, cut_link, heal, power_cut, preempt
from slurm.sandbox.nodes import free_port
from slurm.sandbox.state import SandboxError, require_state
from tests.support.commands import ROOT, end_servers, environment, wait_for

PROGRAM = ROOT / "benchmarks" / "faults" / "league_program.py"
OTHERS = ROOT / "benchmarks" / "faults" / "league_others.py"
LIMIT_S = 300.0
"""Time limit in seconds from the fault to the end of a run that survives."""
DEAD_S = 30.0
"""A run has failed if none of its jobs has been in the queue for this number of seconds."""
DEAD = {"FAILED", "COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
"""States in which a job of Slurm does not continue."""
RESULTS = Path(__file__).with_suffix(".csv")
MEMORY = next(path for path in map(Path, ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")) if path.is_dir())
"""Root of the memory cgroups: of version 1 if the machine has it, else of version 2."""

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
TORCHFT = """#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=1 --exclusive --requeue --open-mode=append --time=60
export REPLICA_GROUP_ID={replica} NUM_REPLICA_GROUPS=3 TORCHFT_LIGHTHOUSE=http://{lighthouse}
srun --kill-on-bad-exit=1 {python} -m torch.distributed.run --standalone --nproc-per-node=1 --max-restarts=10 \\
    {others} torchft --folder {folder} || scontrol requeue "$SLURM_JOB_ID"
"""
SCRIPTS = {"torchrun": TORCHRUN, "ft_launcher": FT_LAUNCHER, "torchft": TORCHFT, "lightning": LIGHTNING}
ENGINES = ("ours", *SCRIPTS, "submitit")
AGENTS = {
    "ours": "launch.agent",
    "torchrun": "torch.distributed.run",
    "ft_launcher": "fault_tolerance.launcher",
    "torchft": "torch.distributed.run",
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
        self.cgroup = MEMORY / folder.name
        self.helper: subprocess.Popen[bytes] | None = None
        """Process that ends with the run: our command, which waits for the job, or the lighthouse of torchft. None with
        other engines."""
        self._jobs: list[str] = []
        """Slurm's ids of the jobs: one, or one for each replica of torchft. Empty for the launcher of this project, see
        ``job``."""
        known = {"python": python, "program": shlex.quote(str(PROGRAM)), "others": shlex.quote(str(OTHERS))}
        known |= {"folder": shlex.quote(str(folder)), "timeout": str(TIMEOUT_S)}
        if engine == "torchft":
            host = require_state(sandbox.directory).controller
            lighthouse = f"{host}:{free_port(host)}"
            words = [str(Path(python).with_name("torchft_lighthouse")), "--min_replicas=2", "--quorum_tick_ms=100"]
            self.helper = self._start([*words, "--join_timeout_ms=10000", f"--bind={lighthouse}"])
            for replica in range(3):
                self._submit(TORCHFT.format(**known, lighthouse=lighthouse, replica=replica))
        elif engine in SCRIPTS:
            self._submit(SCRIPTS[engine].format(**known))
        elif engine == "submitit":
            self._jobs = self._run(python, str(OTHERS), "submitit", "--folder", str(folder)).split()[-1:]
        else:
            words = ["nodes=2", "spare_nodes=1", "cluster=slurm", "workload=script", f"script.path={PROGRAM}"]
            words += [f"script.options.folder={folder}", "script.resumes=true", "launch.poll_s=1"]
            words += [r"script.progress=step (?P<step>\d+): loss (?P<loss>[\d.]+)", "launch.report_files=[md,csv]"]
            words += [f"run_dir={folder / 'run'}", "resilience.node_timeout_s=5", "resilience.heartbeat_timeout_s=10"]
            words += [f"resilience.hang_timeout_s={TIMEOUT_S}", "resilience.engine=fork:torch"]
            self.helper = self._start([sys.executable, "-m", "gpt_launch", *words])

    def _start(self, words: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "helper.log").open("wb") as log:
            return subprocess.Popen(words, env=self.env, cwd=self.folder, stdout=log, stderr=log)

    def _submit(self, script: str) -> None:
        path = self.folder / f"job_{len(self._jobs)}.sh"
        path.write_text(script)
        output = path.with_suffix(".log")
        self._jobs.append(self._run("sbatch", "--parsable", f"--output={output}", str(path)).strip())

    def _run(self, *words: str) -> str:
        done = subprocess.run(words, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def jobs(self) -> list[str]:
        """Return Slurm's ids of all jobs of the run: one, or one for each replica of torchft."""
        if self._jobs:
            return self._jobs
        events = read_json_lines(self.folder / "run" / "events.jsonl")
        return [str(event["job_id"]) for event in events if event["event"] == "submitted"][-1:]

    def job(self, rank: int) -> str:
        """Return Slurm's id of the job of a rank."""
        return self.jobs()[rank if self.engine == "torchft" else 0]

    def steps(self) -> list[dict[str, Any]]:
        """Return the step records so far, in the order in which the ranks have written them."""
        return list(read_json_lines(self.folder / "steps.jsonl"))

    def new_steps(self, moment: float) -> list[dict[str, Any]]:
        """Return the records of new steps after ``moment``, a Unix time. A step is new if no process that started
        before ``moment`` has made it. With torchft, a process starts anew when the group of the replicas changes.
        """
        steps = self.steps()
        before = max((r["step"] for r in steps if r["start"] < moment), default=0)
        return [r for r in steps if r["step"] > before and r["start"] > moment]

    def field(self, name: str, job: str) -> str:
        """Return the value of a field in ``scontrol show job``; empty if Slurm does not print the field."""
        text = self.sandbox.slurm("scontrol", "show", "job", "-o", job)
        return next((word.partition("=")[2] for word in text.split() if word.startswith(f"{name}=")), "")

    def states(self) -> str:
        """Return the states of the jobs, and Slurm's reasons for them, as text."""
        try:
            return ", ".join(f"{self.field('JobState', job)} ({self.field('Reason', job)})" for job in self.jobs())
        except SandboxError:
            return "no answer of slurmctld"

    def is_dead(self) -> bool:
        """Return True if no job of the run waits in the queue, runs, or is about to end."""
        with suppress(SandboxError):
            return all(self.field("JobState", job) in DEAD for job in self.jobs())
        return False

    def head(self) -> str:
        """Return the first node of the job of rank 0. It runs the batch script."""
        return self.sandbox.slurm("scontrol", "show", "hostnames", self.field("NodeList", self.job(0))).split()[0]

    def wait_for_step(self, moment: float) -> None:
        """Wait for a new step after ``moment``. Raises AssertionError if there is none within ``LIMIT_S`` seconds, or
        if the jobs are dead for ``DEAD_S`` seconds.
        """
        alive = time.monotonic()
        while not self.new_steps(moment):
            assert time.time() < moment + LIMIT_S, f"no new step in {LIMIT_S:g} s"
            if not self.is_dead():
                alive = time.monotonic()
            assert time.monotonic() < alive + DEAD_S, "the job ended, and nothing started it again"
            time.sleep(0.5)

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank: the youngest process of the program with this rank in its environment."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ", "create_time"]):
            known: Mapping[str, str] = process.info["environ"] or {}
            words = " ".join(process.info["cmdline"] or ())
            names = ("REPLICA_GROUP_ID", "RANK", "SLURM_PROCID")
            is_rank = next((known[name] for name in names if name in known), None) == str(number)
            if is_rank and str(self.folder) in words and ("league_" in words or "submitit" in words):
                found.append(process)
        return max(found, key=lambda process: process.info["create_time"])

    def agent(self, number: int) -> psutil.Process:
        """Return the process of the engine on the node of a rank; for an engine without such a process, the process of
        the rank.
        """
        rank = self.rank(number)
        word = AGENTS[self.engine]
        return next((p for p in rank.parents() if word in " ".join(p.cmdline())), rank)

    def host_of(self, number: int) -> str:
        """Return the node on which a rank runs."""
        return str(self.rank(number).environ()["SLURMD_NODENAME"])

    def end(self) -> None:
        """Cancel the jobs, and end the helper."""
        self.sandbox.slurm("scancel", *self.jobs())
        if self.helper is not None:
            self.helper.send_signal(signal.SIGTERM)
            try:
                self.helper.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.helper.kill()
        if self.cgroup.is_dir():
            wait_for(lambda: not (self.cgroup / "cgroup.procs").read_text(), "an empty cgroup")
            self.cgroup.rmdir()


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
    job = run.job(1)
    run.sandbox.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    wait_for(lambda: run.field("JobState", job) != "RUNNING", "the time limit", timeout_s=180)
    with suppress(SandboxError):  # nothing has requeued the job
        run.sandbox.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def exhaust(run: LeagueRun) -> None:
    """Let rank 1 allocate more memory than its cgroup allows. The kernel kills the rank."""
    run.cgroup.mkdir()
    limit = next(name for name in ("memory.limit_in_bytes", "memory.max") if (run.cgroup / name).exists())
    (run.cgroup / limit).write_text(str(256 * 2**20))
    (run.cgroup / "cgroup.procs").write_text(str(run.rank(1).pid))
    (run.folder / "hog").touch()


FAULTS: dict[str, Callable[[LeagueRun], Any]] = {
    "rank killed": lambda run: run.rank(1).kill(),
    "rank frozen": lambda run: run.rank(1).suspend(),
    "rank out of memory": exhaust,
    "agent killed": lambda run: run.agent(1).kill(),
    "node without power": lambda run: power_cut(run.sandbox, run.host_of(1)),
    "node rebooted": reboot,
    "node without network": lambda run: cut_link(run.sandbox, run.host_of(1)),
    "head node without power": lambda run: power_cut(run.sandbox, run.head()),
    "preemption": lambda run: preempt(run.sandbox, run.job(1)),
    "time limit": shorten,
}


@dataclass(frozen=True)
class Result:
    """Result of one case, a row of the file of results."""

    engine: str
    fault: str
    seed: int
    seconds: float | None
    """Seconds from the fault to the first new step; None: there was no new step."""
    again: int
    """Number of steps that were made more than once."""
    end: str
    """``survived``, or the state in which the run ended."""
    load: float
    """Load average of the machine at the end of the case, over one minute."""
    commit: str
    """Date and commit of the measurement."""


def take(sandbox: Cluster, engine: str, fault: str, seed: int, python: str, whole: str) -> Result:
    """Run one case and return its result.

    Args:
        sandbox: running cluster.
        engine: name of the engine.
        fault: name of the fault.
        seed: seed of the moment of the fault.
        python: interpreter that has the packages of the engine.
        whole: hash of the final weights of an undisturbed run.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"league-{engine}-"))
    wait_s = random.Random(f"{seed} {fault}").uniform(1, 4)  # the same for every engine
    run = LeagueRun(sandbox, engine, folder, python)
    seconds = None
    try:
        wait_for(lambda: any(folder.glob("newest.[pc]*t")), "the first checkpoint", timeout_s=120)
        time.sleep(wait_s)
        moment = time.time()
        FAULTS[fault](run)
        run.wait_for_step(moment)
        seconds = round(run.new_steps(moment)[0]["time"] - moment, 2)
        (folder / "hurry").touch()
        wait_for((folder / "end.json").exists, "the end", max(60.0, moment + LIMIT_S - time.time()))
        same = json.loads((folder / "end.json").read_text())["sum"] == whole
        end = "survived" if same else "other weights"
    except (AssertionError, SandboxError, ValueError) as error:
        end = f"{str(error)[:80]}; {run.states()}"
    steps = [record["step"] for record in run.steps()]
    run.end()
    for name in sandbox.nodes:
        heal(sandbox, name)
    sandbox.wait_idle(timeout_s=240)
    return Result(engine, fault, seed, seconds, len(steps) - len({*steps}), end, round(os.getloadavg()[0], 1), commit())


def undisturbed(python: str) -> str:
    """Run two ranks without faults on this machine, and return the hash of the final weights."""
    folder = Path(tempfile.mkdtemp(prefix="league-whole-"))
    (folder / "hurry").touch()
    words = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(PROGRAM)]
    subprocess.run(
        [*words, "--folder", str(folder)], env=environment(PYTHONPATH=str(ROOT)), check=True, stdout=subprocess.DEVNULL
    )
    return str(json.loads((folder / "end.json").read_text())["sum"])


def take_all(cases: Sequence[tuple[int, str, str]], at_once: int, python: str, write: bool) -> list[Result]:
    """Run all cases, each (seed, fault, engine), on ``at_once`` sandboxes side by side. Return the results, in the
    order in which the cases end. If ``write`` is True, each result is also written into the file of results as soon as
    its case ends."""
    whole, results, lock = undisturbed(python), list[Result](), threading.Lock()
    waiting: queue.SimpleQueue[tuple[int, str, str]] = queue.SimpleQueue()
    for case in cases:
        waiting.put(case)

    def serve(_: int) -> None:
        with Cluster(Path(tempfile.mkdtemp(prefix="sandbox-"))) as sandbox:
            sandbox.up(timeout_s=180)
            with suppress(queue.Empty):
                while True:
                    seed, fault, engine = waiting.get_nowait()
                    result = take(sandbox, engine, fault, seed, python, whole)
                    with lock:
                        print(json.dumps(asdict(result)), flush=True)
                        results.append(result)
                        if write:
                            keep_results([result])

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(serve, range(at_once)))
    return results


def kept_results() -> list[Result]:
    """Return the results in the file of results; empty without the file."""
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="") as file:
        return [
            Result(
                row["engine"],
                row["fault"],
                int(row["seed"]),
                float(row["seconds"]) if row["seconds"] else None,
                int(row["again"]),
                row["end"],
                float(row["load"]),
                row["commit"],
            )
            for row in csv.DictReader(file)
        ]


def keep_results(new: Sequence[Result]) -> None:
    """Write results into the file of results, in the place of older ones of the same engine, fault and seed."""
    known = {(result.engine, result.fault, result.seed): result for result in (*kept_results(), *new)}
    order = (list(ENGINES), list(FAULTS))
    rows = sorted(known.values(), key=lambda r: (order[0].index(r.engine), order[1].index(r.fault), r.seed))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def medians(results: Sequence[Result]) -> dict[tuple[str, str], float]:
    """Return (engine, fault) -> median seconds of the cases that survived. A pair without such a case is absent."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for result in results:
        if result.end == "survived" and result.seconds is not None:
            seconds.setdefault((result.engine, result.fault), []).append(result.seconds)
    return {pair: statistics.median(values) for pair, values in seconds.items()}


def table(results: list[Result]) -> str:
    """Return the two Markdown tables of the page: a summary of each engine, and one row for each fault."""
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
    found = medians(results)
    for fault in dict.fromkeys(result.fault for result in results):
        cells = []
        for engine in engines:
            ends = [result.end for result in results if (result.engine, result.fault) == (engine, fault)]
            survived = ends.count("survived")
            share = "not run" if not ends else "" if survived == len(ends) else f"{survived} of {len(ends)}"
            text = f"{found[engine, fault]:.1f} s" if survived else ""
            cells.append(f"{text} {share}".strip())
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page_text(results: list[Result], machine: str) -> str:
    """Return the results as the text of the page. ``machine`` describes the machine of the newest ones."""
    loads, found = [result.load for result in results], medians(results)
    ours = {fault: seconds for (engine, fault), seconds in found.items() if engine == "ours"}
    faster = [
        f"{engine}, {fault}: {seconds:.1f} s, ours {ours[fault]:.1f} s"
        for (engine, fault), seconds in found.items()
        if seconds < ours.get(fault, 0.0)
    ]
    lines = [
        "What others do better, in median seconds to a new step:",
        "",
        *(f"- {text}" for text in faster or ["nothing"]),
    ]
    lines += ["", stamp(machine), ""]
    for engine, own in itertools.groupby(results, key=lambda result: result.engine):
        cases = list(own)
        lines.append(f"- {engine}: {len(cases)} cases; {'; '.join(sorted({case.commit for case in cases}))}.")
    lines += [
        "",
        f"Load average {min(loads):.0f} to {max(loads):.0f} at the ends of the cases, on two cores: the seconds",
    ]
    lines += [
        "are those of a busy machine, for all engines alike.",
        "",
        table(results),
        "",
        "What did not survive:",
        "",
    ]
    ends = [(r.engine, r.fault, r.end) for r in results if r.end != "survived"]
    for engine, fault in dict.fromkeys((engine, fault) for engine, fault, _ in ends):
        own_ends = [end for *key, end in ends if key == [engine, fault]]
        lines.append(f"- {engine}, {fault}, cases: {len(own_ends)}; {own_ends[0]}")
    return "\n".join(lines)


def main() -> int:
    """Run the cases. Returns the exit status: 1 if a run of this project did not survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engines", default="", metavar="NAMES", help=f"NAME,NAME of {', '.join(ENGINES)} (all)")
    parser.add_argument("--only", default="", metavar="WORD", help="the faults with this word in their names")
    parser.add_argument("--seeds", type=int, default=1, help="times that each fault is taken (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="first seed (%(default)s)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="cases side by side, each on a sandbox")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the packages of the other engines")
    parser.add_argument("--write", action="store_true", help="keep the results, and write the page into benchmarks/")
    args = parser.parse_args()
    engines = chosen(args.engines, ENGINES)
    faults = [fault for fault in FAULTS if args.only in fault]
    seeds = range(args.first, args.first + args.seeds)
    results = take_all(list(itertools.product(seeds, faults, engines)), args.at_once, args.python, args.write)
    end_servers()
    if args.write:
        machine = f"{cores()}, {args.at_once} cases side by side, Slurm {slurm_version()} in network namespaces"
        words = f"--seeds {args.seeds} --at-once {args.at_once} --write"
        keep(Path(__file__), "A league of engines", __doc__, page_text(kept_results(), machine), words)
    return int(any(result.engine == "ours" and result.end != "survived" for result in results))


if __name__ == "__main__":
    sys.exit(main())
