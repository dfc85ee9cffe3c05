"""Verdicts of `launch.why` on faults that are planted in real runs, and on runs without a fault.

    python -m benchmarks.faults.causes                      # 4 runs of each fault, 30 without one: half an hour
    python -m benchmarks.faults.causes --only deadlock,gil  # some faults, without the quiet runs
    python -m benchmarks.faults.causes --write              # make the page

A run is two processes over gloo, one node, 12 steps of a tiny model (`tests/support/programs/faulty.py`), and a limit
of 5 s for ranks without progress. A seed chooses rank and step of each fault. The verdict is that of the event log,
which the failed command also prints. A verdict is right if its kind is the expected one. Rank and place are counted
where the fault has one; the place is the line of the program. `full_disk` mounts a tmpfs and `oom_kill` makes a cgroup
of 1.2 GB, so both need root. A quiet run must end with status 0 and without a verdict.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page import chosen, cores, keep, line_of, stamp
from launch.runs.events import select_events
from launch.runs.folder import RunFolder
from launch.why.rules import find_verdict
from tests.support.commands import ROOT, environment

PROGRAM = ROOT / "tests" / "support" / "programs" / "faulty.py"
CGROUPS = Path("/sys/fs/cgroup/memory")
MEMORY_BYTES = 1200 << 20
STEPS = range(3, 10)


@dataclass(frozen=True)
class Fault:
    """A kind of fault: the verdict that is right, and what a right verdict names."""

    expected: str
    has_rank: bool = True
    """False if both ranks take part in the fault alike."""
    line: str = ""
    """Text of the line of the program where the fault is; empty if there is no such line."""


FAULTS = {
    "dead_worker": Fault("dead_loader_worker"),
    "slow_worker": Fault("data", line="yield from DataLoader("),
    "size": Fault("mismatched_collective", has_rank=False),
    "kind": Fault("mismatched_collective", has_rank=False),
    "leave": Fault("left_early"),
    "deadlock": Fault("deadlock", line="b_lock.acquire()"),
    "slow_disk": Fault("slow_disk", line="return file.read(1)"),
    "slow_cpu": Fault("slow_cpu", line="in range(1000)|total += number"),
    "gil": Fault("gil_held", line="ctypes.PyDLL"),
    "bit_flip": Fault("not_finite"),
    "nan_batch": Fault("not_finite"),
    "oom_kill": Fault("oom_kill"),
    "memory_error": Fault("memory_error", line="taken.append"),
    "lost_link": Fault("network", has_rank=False),
    "full_disk": Fault("full_disk", line="file.write(bytes("),
    "exit": Fault("exit_status"),
    "missing_file": Fault("missing_file", line="no_such_shard"),
    "segfault": Fault("crash", line="ctypes.string_at(0)"),
}


@dataclass(frozen=True)
class Trial:
    """One run: its fault (``none`` for a quiet run), and what the launcher said."""

    fault: str
    kind: str
    """Kind of the verdict; ``-`` without one."""
    status: int
    is_rank_right: bool = False
    is_place_right: bool = False
    is_printed: bool = False
    """True if the failed command printed the sentence in its last lines."""
    diagnose_s: float = 0.0
    """Seconds to find the verdict in the run folder once more."""


@contextmanager
def small_filesystem(folder: Path) -> Iterator[None]:
    """Mount a tmpfs of 16 MiB at ``folder``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def small_memory(folder: Path) -> Iterator[None]:
    """Make a cgroup (version 1) of ``MEMORY_BYTES``, named as ``folder``."""
    group = CGROUPS / folder.name
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(MEMORY_BYTES))
        yield
    finally:
        group.rmdir()


def try_fault(fault: str, rank: int, step: int) -> Trial:
    """Run the program with a fault, and return what the launcher said."""
    scratch = Path(tempfile.mkdtemp(prefix="causes-"))
    (files := scratch / "files").mkdir()
    place = {"full_disk": small_filesystem(files), "oom_kill": small_memory(scratch)}.get(fault, nullcontext())
    run = RunFolder(scratch / "run")
    words = [
        *("workload=script", f"script.path={PROGRAM}", f"script.args='{fault} {step} {rank} {files}'"),
        *("cluster=local", "nodes=1", "ranks_per_node=2", "resilience.hang_timeout_s=5"),
        *("resilience.heartbeat_timeout_s=5", "launch.report_files=[md]", "launch.poll_s=1", f"run_dir={run.path}"),
    ]
    command = [sys.executable, "-m", "launch", *words]
    if fault == "oom_kill":
        enter = f'echo $$ > {CGROUPS / scratch.name / "cgroup.procs"} && exec "$@"'
        command = ["sh", "-c", enter, "sh", *command]
    env = environment(PYTHONPATH=str(ROOT))
    with place:
        done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, timeout=300, check=False)
    told = select_events(run.read_events(), "verdict")
    began = time.perf_counter()
    verdict = find_verdict(run)
    took_s = time.perf_counter() - began
    if verdict is None or not told:
        return Trial(fault, "-" if verdict is None and not told else "differs", done.returncode)
    known = FAULTS.get(fault, Fault(""))
    lines = PROGRAM.read_text().splitlines()
    places = {f"{PROGRAM.name}:{i}" for i, text in enumerate(lines, 1) if any(p in text for p in known.line.split("|"))}
    is_printed = told[-1]["cause"] in "\n".join(done.stderr.splitlines()[-2:])
    kind = told[-1]["kind"]
    return Trial(fault, kind, done.returncode, verdict.rank == rank, verdict.place in places, is_printed, took_s)


def page(trials: Sequence[Trial]) -> str:
    """Return the results: one row of the confusion matrix for each fault, and a summary."""
    planted, quiet = [t for t in trials if t.fault != "none"], [t for t in trials if t.fault == "none"]
    rows = [line_of(("planted", "runs", "verdicts", "kind right", "rank right", "place right"))]
    rows.append(line_of(["---"] * 6))
    for name, fault in FAULTS.items():
        of_kind = [trial for trial in planted if trial.fault == name]
        if of_kind:
            verdicts = Counter(trial.kind for trial in of_kind).most_common()
            cells = [name, str(len(of_kind)), ", ".join(f"{kind} {number}" for kind, number in verdicts)]
            cells.append(str(sum(trial.kind == fault.expected for trial in of_kind)))
            cells.append(str(sum(trial.is_rank_right for trial in of_kind)) if fault.has_rank else "both")
            cells.append(str(sum(trial.is_place_right for trial in of_kind)) if fault.line else "none")
            rows.append(line_of(cells))
    right = sum(trial.kind == FAULTS[trial.fault].expected for trial in planted)
    unknown = sum(trial.kind in ("unknown", "-") for trial in planted)
    quiet_right = sum(trial.kind == "-" and trial.status == 0 for trial in quiet)
    slowest = max((trial.diagnose_s for trial in planted), default=0.0)
    summary = (
        f"Of {len(planted)} runs with a fault, {right} got the right kind, {unknown} none or `unknown`, and "
        f"{len(planted) - right - unknown} a wrong one. {sum(t.is_printed for t in planted)} failed commands printed "
        f"the sentence in their last two lines. Of {len(quiet)} runs without a fault, {quiet_right} ended with "
        f"status 0 and without a verdict. Finding a verdict in a run folder took {1000 * slowest:.0f} ms at most."
    )
    return "\n".join([stamp(cores()), "", summary, "", *rows])


def main() -> int:
    """Return the exit status: 1 if a quiet run has a verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=4, metavar="N", help="of each fault (%(default)s)")
    parser.add_argument("--quiet", type=int, default=30, metavar="N", help="runs without a fault (%(default)s)")
    parser.add_argument("--only", default="", metavar="FAULT,...", help=f"some of {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of ranks and steps (%(default)s)")
    parser.add_argument("--write", action="store_true", help="write the page")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    names = chosen(args.only, list(FAULTS)) * args.runs + ["none"] * (0 if args.only else args.quiet)
    trials = []
    for name in names:
        trial = try_fault(name, draw.randrange(2), draw.choice(STEPS))
        print(trial, flush=True)
        trials.append(trial)
    text = page(trials)
    print(text)
    if args.write:
        keep(Path(__file__), "Verdicts on planted faults", __doc__, f"{text}\n\n{FALLS_SHORT.rstrip()}")
    return int(any(trial.fault == "none" and trial.kind != "-" for trial in trials))


FALLS_SHORT = """The rules of all kinds were written before the program with the faults, by the same author, and were
not fitted to single faults. Two findings of the first trials changed what the agents record: the prefix `[rank0]: ` of
torch's tracebacks hid exceptions of scripts, and the message of an exception in C++ (`size`) was not part of the cause.
A third one changed the rule `network`: it overlooked ranks whose traceback equals that of another one (`lost_link`).
While these runs went on, reads of fields that an event log may lack were made tolerant; no rule changed.

What falls short:

- A rank that raises an exception, and then aborts in compiled code as it exits, gets `crash`: one `nan_batch` of four.
- A flipped bit and a batch that is not a number look the same from outside, `not_finite`. `bit_flip` is only said of
  replicas that were compared (`divergence.replica_check_interval`).
- `slow_disk` is a read of a pipe that never returns, and `slow_cpu` a loop without end. A disk or CPU that is only
  slow, so that no limit is reached, fails no run and gets no verdict.
- `lost_link` shuts the connections of one rank. A link between hosts that drops packets was not tried, nor were NCCL,
  GPUs, their dumps, and more than two ranks or one node.
- Where a lock is taken is read from the source line, so a lock with another word, or without a source file, is
  `elsewhere`.
"""

if __name__ == "__main__":
    sys.exit(main())
