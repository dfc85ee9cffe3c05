"""``python -m launch.storm KEY=VALUE...``: a chaos drill. A run under seeded faults must end as an undisturbed run.

The arguments are those of ``python -m launch``, or the folder of a finished run, which is then the undisturbed one.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import gpt_launch.own_names  # noqa: F401
from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.errors import CommandParser, ConfigError, refusing
from launch.report.goodput import PARTS
from launch.runs.events import is_finished
from launch.runs.files import deny_others_writing, read_json_lines, write_json
from launch.runs.find import is_run
from launch.runs.folder import RunFolder
from launch.runs.overrides import read_overrides
from launch.runs.records import is_record
from launch.slurm import client as scheduler
from launch.slurm.jobs import SlurmJob, ask_queue
from launch.storm import verdict
from launch.storm.drill import Drill, StuckError, run_quiet
from launch.storm.faults import (
    DISK,
    SANDBOX,
    SLURM,
    SPARES,
    PlannedFault,
    Site,
    choose_kinds,
    make_schedule,
    require_own,
)
from launch.storm.processes import of_run

GONE_S = 60.0
"""Time that what is left of a run has to go after its launcher has ended."""


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 the run came through, 1 it did not, 2 the drill was refused."""
    args = _parser().parse_args(arguments)
    deny_others_writing()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends its run and its disk, too
    console = Console(soft_wrap=True, highlight=False, markup=False)
    words, quiet = _words_and_quiet(args.words, args.quiet)
    if args.sandbox is not None:
        conf = require_own(args.sandbox.absolute() / "etc" / "slurm.conf", "a sandbox")
        os.environ["SLURM_CONF"] = str(conf)
    config = typed_config(compose_launch(words))
    config.validate()
    kind = config.cluster.kind
    is_slurm = kind is ClusterKind.slurm or (kind is ClusterKind.auto and scheduler.controller_answers())
    on_sandbox = is_slurm and args.sandbox is not None
    has = [SLURM] * is_slurm + [SANDBOX] * on_sandbox + [SPARES] * (on_sandbox and config.spare_nodes > 0)
    has += [DISK] * bool(args.disk or args.disk_mib)
    refuse_disk(args.disk, args.disk_mib, is_slurm=is_slurm)
    kinds = choose_kinds(args.kinds, has)
    schedule = make_schedule(args.seed, args.faults, kinds, config.world_size, args.most_steps)
    if args.dry_run:
        _show(schedule, console)
        return 0
    out = _new_folder(args.output)
    with _disk(out, args.disk, args.disk_mib) as disk:
        run = RunFolder((disk or out) / "stormy")
        site = Site(run, is_slurm, args.sandbox and args.sandbox.absolute(), disk)
        if quiet is None:
            quiet = RunFolder(out / "quiet")
            console.print(f"the quiet run: {quiet.path}")
            if not run_quiet(words, quiet, out / "quiet.log"):
                raise ConfigError("a quiet run that does not finish", "a run that works", f"cat {out / 'quiet.log'}")
        console.print(f"the stormy run: {run.path}, {len(schedule)} faults of {len(kinds)} kinds, seed {args.seed}")
        drill = Drill(words, site, out, args.patience_s, console.print)
        stuck = ""
        try:
            complete = drill.weather(schedule)
        except StuckError as error:
            complete, stuck = False, str(error)
        found = _judge(quiet, site, drill, len(schedule), complete, stuck)
        found["run"] = str(out / "stormy")  # of a run on a disk of its own, the copy that stays
        write_json(out / "verdict.json", found)
        _tell(found, console)
    console.print(f"wrote {out / 'verdict.json'}")
    return 0 if found["passed"] else 1


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m launch.storm",
        description="A chaos drill: one run under seeded faults, which must end bit for bit as a quiet one.",
    )
    parser.add_argument(
        "words", nargs="+", metavar="WORD", help="as after python -m launch; or a finished run's folder"
    )
    parser.add_argument("--faults", type=int, default=10, metavar="N", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed plans the same faults (%(default)s)")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=[], metavar="KIND,...", help="(all)")
    parser.add_argument(
        "--most-steps", type=int, default=20, metavar="N", help="between a save and a fault (%(default)s)"
    )
    parser.add_argument("--quiet", type=Path, metavar="FOLDER", help="a finished run to compare with; else one is made")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="a new folder (outputs/storm/TIME)")
    parser.add_argument("--sandbox", type=Path, metavar="DIR", help="the sandbox that the run is submitted to")
    parser.add_argument("--disk-mib", type=int, metavar="N", help="run on a tmpfs of this size, to fill it (as root)")
    parser.add_argument("--disk", type=Path, metavar="FOLDER", help="run on this small filesystem, to fill it")
    parser.add_argument("--patience-s", type=float, default=900.0, help="without any event it is stuck (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list the faults, and touch nothing")
    return parser


def _words_and_quiet(words: Sequence[str], quiet: Path | None) -> tuple[list[str], RunFolder | None]:
    """The overrides of the drill, and the quiet run if there is one already."""
    if len(words) == 1 and is_run(Path(words[0])):
        quiet, words = Path(words[0]), read_overrides(RunFolder(Path(words[0]).absolute()))
    words = [word for word in words if not word.startswith("run_dir=")]
    if quiet is None:
        return words, None
    folder = RunFolder(quiet.absolute())
    if not is_finished(folder.read_events()):
        fix = f"python -m launch.status {quiet}, or no --quiet: the drill makes one"
        raise ConfigError(f"{quiet}, which has not finished", "a finished run to compare with", fix)
    return words, folder


def _new_folder(output: Path | None) -> Path:
    """Make the folder of a drill, which nothing else lies in."""
    out = (output or Path("outputs") / "storm" / time.strftime("%Y-%m-%d_%H-%M-%S")).absolute()
    if out.exists() and any(out.iterdir()):
        raise ConfigError(
            f"{out}, which holds files", "a new folder, as a drill changes no other run", "--output FOLDER"
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def refuse_disk(disk: Path | None, mib: int | None, *, is_slurm: bool) -> None:
    """Refuse to fill a filesystem that is not there for it alone.

    Raises:
        ConfigError: the run could not be there on all nodes, or the filesystem holds anything else.
    """
    if mib and (is_slurm or disk):
        found = f"--disk-mib {mib} of a run on Slurm" if is_slurm else f"--disk-mib {mib} and --disk {disk}"
        expected = "a small filesystem that all nodes mount: a tmpfs that is mounted now is this machine's alone"
        fix = "--disk FOLDER; on a sandbox: mount -t tmpfs -o size=64m tmpfs FOLDER, before slurm.sandbox up"
        raise ConfigError(found, expected, fix)
    if disk is None:
        return
    require_own(disk, "a filesystem")
    if not disk.is_mount() or any(entry.name != "lost+found" for entry in disk.iterdir()):
        why = "holds files" if disk.is_mount() else "is no filesystem of its own"
        fix = f"mount -t tmpfs -o size=64m tmpfs {disk}, for a sandbox before it is started"
        raise ConfigError(f"--disk {disk}, which {why}", "an empty filesystem, as a drill fills it", fix)


@contextmanager
def _disk(out: Path, disk: Path | None, mib: int | None) -> Iterator[Path | None]:
    """Give the stormy run a small filesystem; what it holds at the end is copied beside it."""
    if not mib and disk is None:
        yield None
        return
    place = out / "disk" if disk is None else disk.absolute()
    if disk is None:
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"--disk-mib {mib}: {done.stderr.strip()}", "the right to mount a tmpfs", "no --disk-mib")
    try:
        yield place
    finally:
        if (place / "stormy").exists():
            shutil.copytree(place / "stormy", out / "stormy", symlinks=True)
        if disk is None:
            subprocess.run(["umount", "--lazy", str(place)], check=False)
        else:
            for folder in (place / "stormy", place / ".submitit"):
                shutil.rmtree(folder, ignore_errors=True)


def _judge(quiet: RunFolder, site: Site, drill: Drill, planned: int, complete: bool, stuck: str) -> dict[str, Any]:
    """All that is to be said of a drill, for ``verdict.json``."""
    run = site.folder
    wrong = [stuck] if stuck else []
    if not complete and not stuck:
        wrong.append(f"{len(drill.faults)} of {planned} faults came before the run was done: it needs more steps")
    wrong += verdict.differing_state(quiet, run) if is_finished(run.read_events()) else ["the run has not finished"]
    wrong += verdict.differing_steps(quiet, run)
    wrong += _remains(site)
    records = [record for record in read_json_lines(run.metrics(0)) if is_record(record) and "time" in record]
    costs = verdict.recoveries(drill.faults, run.read_events(), records)
    measured = verdict.measure(run, drill.faults)
    return {
        "passed": not wrong,
        "wrong": wrong,
        "faults": drill.faults,
        "typed": drill.typed,
        "attempts": len(run.attempts()),
        "recoveries": [asdict(cost) for cost in costs],
        **(asdict(measured) if measured else {"goodput": None, "predicted": None}),
        "quiet": str(quiet.path),
    }


def _remains(site: Site) -> list[str]:
    """List what the run has left on this host, or in the queue."""
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline and of_run(site.folder.path):
        time.sleep(0.2)
    wrong = [f"process {pid} is left: {' '.join(told[0])[:100]}" for pid, told in of_run(site.folder.path).items()]
    if site.is_slurm:
        job = SlurmJob(site.job)
        while time.monotonic() < deadline and job.status(ask_queue([job])).phase != "over":
            time.sleep(1.0)
        state = job.status(ask_queue([job])).phase
        wrong += [f"job {site.job} is {state}"] if state != "over" else []
    return wrong


def _show(schedule: Sequence[PlannedFault], console: Console) -> None:
    for fault in schedule:
        steps = f"{fault.after_steps} steps after the run has saved again"
        console.print(f"{fault.number}. {fault.kind}: {fault.text}; {steps}")


def _tell(found: dict[str, Any], console: Console) -> None:
    """Print the verdict, and what the faults cost by kind."""
    table = Table(box=None, pad_edge=False)
    titles = ("kind", "road", "faults", "seconds to a new step", "noticed", "started", "first step", "again")
    for title in titles:
        table.add_column(title, justify="left" if title in titles[:2] else "right")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cost in found["recoveries"]:
        groups[cost["kind"], cost["road"]].append(cost)
    for (kind, road), costs in sorted(groups.items()):
        parts = ("total_s", "noticed_s", "started_s", "first_step_s", "again_s")
        medians = [f"{statistics.median(cost[part] for cost in costs):.2f}" for part in parts]
        table.add_row(kind, road, str(len(costs)), *medians)
    console.print(table)
    if found["goodput"] is not None:
        told = found["predicted"]
        console.print(
            f"goodput {found['goodput']:.1%}, and {found['after_start']:.1%} without the first start; "
            f"Young/Daly {told['goodput']:.1%} for a save of {told['save_s']:.2f} s each {told['interval_s']:.1f} s, "
            f"a restart of {told['restart_s']:.1f} s and a fault each {told['between_faults_s']:.0f} s; "
            f"best would be a save each {told['best_interval_s']:.1f} s"
        )
        longest = sorted(found["seconds"].items(), key=lambda part: -part[1])
        console.print("seconds: " + ", ".join(f"{PARTS[part]} {seconds:.1f}" for part, seconds in longest))
    console.print(f"{len(found['faults'])} faults, {found['attempts']} attempts, typed {found['typed']} times")
    for line in found["wrong"]:
        console.print(f"wrong: {line}")
    console.print("passed: as the quiet run, bit for bit" if found["passed"] else "not passed")


if __name__ == "__main__":
    sys.exit(main())
