"""``python -m launch.storm KEY=VALUE...``: a chaos drill. A run with seeded faults must end like an undisturbed run.

The arguments are those of ``python -m launch``, or the folder of a finished run, which the drill repeats with faults.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.errors import CommandParser, ConfigError, refusing
from launch.runs.events import is_finished
from launch.runs.find import is_run, plain_console, print_table
from launch.runs.folder import RunFolder, deny_others_writing, read_json_lines, write_json
from launch.runs.overrides import read_overrides
from launch.runs.records import is_record
from launch.slurm import client as scheduler
from launch.slurm.jobs import SlurmJob, ask_queue
from launch.storm.drill import (
    Drill,
    StuckError,
    choose_kinds,
    differing_state,
    differing_steps,
    make_schedule,
    recoveries,
    start_launcher,
)
from launch.storm.injection import SANDBOX, SLURM, Site, of_run

GONE_S = 60.0
"""Seconds that processes and jobs of a run have to end after its launcher has ended."""


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Make a drill. Returns the exit status: 0 the run survived, 1 it did not, 2 the drill was refused."""
    args = _parser().parse_args(arguments)
    deny_others_writing()
    # Also ends the drill's run.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = plain_console()
    words, quiet = _words_and_quiet(args.words, args.quiet)
    if args.sandbox is not None:
        conf = args.sandbox.absolute() / "etc" / "slurm.conf"
        if not conf.exists() or conf.stat().st_uid != os.getuid():
            why = "another user's" if conf.exists() else "not there"
            found, expected = f"{conf}, which is {why}", "a sandbox of your own: a drill changes nothing else"
            raise ConfigError(found, expected, f"ls -ld {args.sandbox}")
        os.environ["SLURM_CONF"] = str(conf)
    config = typed_config(compose_launch(words))
    config.validate()
    kind = config.cluster.kind
    is_slurm = kind is ClusterKind.slurm or (kind is ClusterKind.auto and scheduler.controller_problem() is None)
    has = [] if not is_slurm else [SLURM] if args.sandbox is None else [SLURM, SANDBOX]
    kinds = choose_kinds(args.kinds, has)
    schedule = make_schedule(args.seed, args.faults, kinds, config.world_size, args.most_steps)
    if args.dry_run:
        for fault in schedule:
            steps = f"{fault.after_steps} steps after the run has saved again"
            console.print(f"{fault.number}. {fault.kind}: {fault.text}; {steps}")
        return 0
    out = (args.output or Path("outputs") / "storm" / time.strftime("%Y-%m-%d_%H-%M-%S")).absolute()
    if out.exists() and any(out.iterdir()):
        expected = "a new folder, as a drill changes no other run"
        raise ConfigError(f"{out}, which holds files", expected, "--output FOLDER")
    out.mkdir(parents=True, exist_ok=True)
    site = Site(RunFolder(out / "stormy"), is_slurm, args.sandbox and args.sandbox.absolute())
    if quiet is None:
        quiet, log = RunFolder(out / "quiet"), out / "quiet.log"
        console.print(f"the quiet run: {quiet.path}")
        start_launcher([*words, f"run_dir={quiet.path}"], log).wait()
        if not is_finished(quiet.read_events()):
            raise ConfigError("a quiet run that does not finish", "a run that works", f"cat {log}")
    console.print(f"the stormy run: {site.folder.path}, {len(schedule)} faults of {len(kinds)} kinds, seed {args.seed}")
    drill = Drill(words, site, out, args.patience_s, console.print)
    wrong = []
    try:
        if not drill.run(schedule):
            count = f"{len(drill.faults)} of {len(schedule)} faults"
            wrong.append(f"{count} came before the run was done: it needs more steps")
    except StuckError as error:
        wrong.append(str(error))
    verdict = _judge(quiet, site, drill, wrong)
    write_json(out / "verdict.json", verdict)
    _show(verdict, console)
    console.print(f"wrote {out / 'verdict.json'}")
    return 0 if verdict["passed"] else 1


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m launch.storm",
        description="A chaos drill: one run under seeded faults, which must end bit for bit as a quiet one.",
    )
    add = parser.add_argument
    add("words", nargs="+", metavar="WORD", help="as after python -m launch; or a finished run's folder")
    add("--faults", type=int, default=10, metavar="N", help="number of faults (%(default)s)")
    add("--seed", type=int, default=0, help="the same seed plans the same faults (%(default)s)")
    add("--kinds", type=lambda text: text.split(","), default=[], metavar="KIND,...", help="kinds of faults (all)")
    add("--most-steps", type=int, default=20, metavar="N", help="between a save and a fault (%(default)s)")
    add("--quiet", type=Path, metavar="FOLDER", help="a finished run to compare with; else the drill makes one")
    add("--output", type=Path, metavar="FOLDER", help="a new folder (outputs/storm/TIME)")
    add("--sandbox", type=Path, metavar="DIR", help="the sandbox that the run is submitted to")
    add(
        "--patience-s",
        type=float,
        default=900.0,
        help="seconds without an event after which the run is stuck (%(default)s)",
    )
    add("--dry-run", action="store_true", help="list the faults, and change nothing")
    return parser


def _words_and_quiet(words: Sequence[str], quiet: Path | None) -> tuple[list[str], RunFolder | None]:
    """Return the overrides of the drill, and the finished undisturbed run if one is given; else None."""
    if len(words) == 1 and is_run(Path(words[0])):
        quiet, words = Path(words[0]), read_overrides(RunFolder(Path(words[0]).absolute()))
    words = [word for word in words if not word.startswith("run_dir=")]
    folder = None if quiet is None else RunFolder(quiet.absolute())
    if folder and not is_finished(folder.read_events()):
        fix = f"python -m launch.status {quiet}, or no --quiet: the drill makes one"
        raise ConfigError(f"{quiet}, which has not finished", "a finished run to compare with", fix)
    return words, folder


def _judge(quiet: RunFolder, site: Site, drill: Drill, wrong: list[str]) -> dict[str, Any]:
    """Return the content of ``verdict.json``. ``quiet`` is the undisturbed run; ``wrong`` has errors of the drill."""
    run, events = site.folder, site.folder.read_events()
    wrong = [*wrong, *(differing_state(quiet, run) if is_finished(events) else ["the run has not finished"])]
    wrong += [*differing_steps(quiet, run), *_remains(site)]
    records = [record for record in read_json_lines(run.metrics(0)) if is_record(record) and "time" in record]
    return {
        "passed": not wrong,
        "wrong": wrong,
        "faults": drill.faults,
        "typed": drill.typed,
        "attempts": len(run.attempts()),
        "recoveries": [asdict(cost) for cost in recoveries(drill.faults, events, records)],
        "quiet": str(quiet.path),
        "run": str(run.path),
    }


def _remains(site: Site) -> list[str]:
    """Return a line for each process that the run has left on this host, and for a job that has not ended."""
    deadline = time.monotonic() + GONE_S
    while (left := of_run(site.folder.path)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.2)
    wrong = [f"process {process.pid} is left: {' '.join(process.info['cmdline'])[:100]}" for process in left]
    if site.is_slurm:
        job = SlurmJob(site.job)
        while (status := job.status(ask_queue([job]))).phase != "over" and time.monotonic() < deadline:
            time.sleep(1.0)
        wrong += [f"job {site.job} is {status.state}"] if status.phase != "over" else []
    return wrong


def _show(verdict: dict[str, Any], console: Console) -> None:
    """Print the verdict, and the median cost of the faults by kind and by the way in which the run continued."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for cost in verdict["recoveries"]:
        groups[cost["kind"], cost["road"]].append(cost["total_s"])
    rows = [[*of, str(len(took)), f"{statistics.median(took):.2f}"] for of, took in sorted(groups.items())]
    print_table(console, ("kind", "road", "faults", "seconds to a new step"), rows, left=("kind", "road"))
    console.print(f"{len(verdict['faults'])} faults, {verdict['attempts']} attempts, typed {verdict['typed']} times")
    for line in verdict["wrong"]:
        console.print(f"wrong: {line}")
    console.print("passed: as the quiet run, bit for bit" if verdict["passed"] else "not passed")


if __name__ == "__main__":
    sys.exit(main())
