"""Show that two checkouts behave alike: plans, refusals, figures of reports, and losses of short runs.

    git worktree add ../before COMMIT
    python -m benchmarks.equivalence.same_results ../before .                        # all of it
    python -m benchmarks.equivalence.same_results ../before . --only plans,refusals  # about a minute

Use it after a refactoring, with the checkout from before and the one from after. A checkout that has a ``.venv`` uses
the interpreter of that environment; a checkout without one uses the interpreter of this script. The command lines are
in ``cases.py``, the written run folders in ``recorded_runs.py``.

Prints a line for each comparison, "the same" or "DIFFERS" with a diff. The exit status is 1 if anything differs.

- plans: exit status and text of dry runs, byte for byte. Paths of checkouts, folders and interpreters are replaced.
- refusals: exit status, the three parts of the message (found, expected, type next), and the key and the value that
  each refusal must name. The texts may differ; ``--texts`` shows how.
- figures: output and files of the report, the projection and the status of six runs or sweeps. Values of CSV and JSON
  files are compared by name to the last digit. Names that only the first checkout has are listed as gone; with
  ``--strict`` they count as differences.
- losses: step records of 2-rank training runs, bit for bit, without the fields that depend on the clock.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.equivalence.cases import (
    FILES,
    GONE,
    LOSSES,
    ON_A_CLUSTER,
    OTHERS_OF_SLURM,
    PLANS,
    READERS,
    RECORDED,
    REFUSALS,
    RENAMED,
    SCONTROL,
    TINY,
    Refusal,
)
from benchmarks.equivalence.recorded_runs import WRITTEN

DRIVER = Path(__file__).with_name("driver.py")
PROGRAMS = ("git", "sh", "cat", "printf", "seq", "sleep")
"""Programs of this machine that a command line may use. The Slurm commands of this machine are not among them."""
FIELDS = ("step", "attempt", "loss", "grad_norm", "lr", "val_loss", "tokens", "samples")
"""Fields of a step record that do not depend on the clock."""
LONGEST = 60
"""Largest number of lines that are printed for one comparison."""
REFUSED = "exit status 2"


@dataclass(frozen=True)
class Line:
    """A command line to run in a checkout: ``python -m`` followed by ``words``."""

    words: tuple[str, ...]
    on_a_cluster: bool = False
    """True to put scripts that imitate Slurm's commands on the PATH of the command line: they describe a small cluster.
    With False, the command line finds no Slurm."""
    runs: Path | None = None
    """Folder that is copied to ``runs`` before the command starts; None: no such folder."""


@dataclass(frozen=True)
class Golden:
    """Result of one comparison between two checkouts."""

    name: str
    differences: Sequence[str] = ()
    """Lines that describe the differences; empty: the results are equal."""
    notes: Sequence[str] = ()
    """Lines to print that are not differences."""
    size: str = ""


@dataclass(frozen=True)
class Side:
    """A checkout, and the folder in which its command lines run."""

    checkout: Path
    folder: Path

    @property
    def python(self) -> str:
        """Return the interpreter of the checkout's virtual environment, or that of this script if there is none."""
        own = self.checkout / ".venv" / "bin" / "python"
        return str(own if own.exists() else sys.executable)

    def environment(self) -> dict[str, str]:
        """Return the environment variables for the commands of this side: those of a user, without variables of a
        job."""
        job = ("SLURM", "SBATCH", "SUBMITIT", "LAUNCH_", "GPT_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "HYDRA_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith((*job, "TORCHELASTIC"))}
        fixed = {"PYTHONPATH": str(self.checkout), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return {**kept, **fixed, "TZ": "UTC", "HOME": str(self.folder), "GIT_CEILING_DIRECTORIES": str(self.folder)}

    def plain(self, text: str) -> str:
        """Return ``text`` with fixed words instead of the paths of this side, which differ between the sides."""
        for path, name in ((self.python, "PYTHON"), (self.folder, "FOLDER"), (self.checkout, "CHECKOUT")):
            text = text.replace(str(path), name)
        for former, name in RENAMED.items():
            text = text.replace(former, name)
        return text


Sides = tuple[Side, Side]
T = TypeVar("T")


def make_programs(folder: Path) -> None:
    """Make two folders of programs for the PATH: ``bin``, and ``slurm`` with replacements of Slurm's commands."""
    for name in ("bin", "slurm"):
        (folder / name).mkdir(parents=True)
    for name in PROGRAMS:
        found = next((Path(at, name) for at in ("/usr/bin", "/bin") if Path(at, name).exists()), None)
        if found is not None:
            (folder / "bin" / name).symlink_to(found)
    for name, text in {"scontrol": SCONTROL, **dict.fromkeys(OTHERS_OF_SLURM, "#!/bin/sh\nexit 0\n")}.items():
        (folder / "slurm" / name).write_text(text)
        (folder / "slurm" / name).chmod(0o755)


def drop_gone_keys(runs: Path) -> None:
    """Remove the lines in ``GONE`` from the configs of the run folders."""
    for config in runs.rglob(".hydra/config.yaml"):
        lines = config.read_text().splitlines(keepends=True)
        gone = [number for number, line in enumerate(lines) if line.strip() in GONE]
        # The four keys below links have no value either.
        inside = {number + k for number in gone if lines[number].strip() == "links:" for k in range(1, 5)}
        config.write_text("".join(line for number, line in enumerate(lines) if number not in {*gone, *inside}))


def run_lines(sides: Sequence[Side], lines: Sequence[Line], seconds: int = 120) -> list[list[str]]:
    """Run command lines in both checkouts at the same time.

    Args:
        sides: the checkouts.
        lines: the command lines. Each runs in a folder that contains only ``FILES``.
        seconds: time limit of a command line in seconds.

    Returns:
        For each side one text for each line: the output, the exit status, and the files that the command has written.
    """
    if not lines:
        return [[] for _ in sides]
    drivers = []
    for side in sides:
        make_programs(side.folder)
        jobs = []
        for number, line in enumerate(lines):
            cwd = side.folder / f"{number:03d}"
            for name, content in FILES.items():
                (cwd / name).parent.mkdir(parents=True, exist_ok=True)
                (cwd / name).write_text(content)
            if line.runs is not None:
                shutil.copytree(line.runs, cwd / "runs", symlinks=True)
                drop_gone_keys(cwd / "runs")
            folders = [side.folder / name for name in (("slurm",) if line.on_a_cluster else ()) + ("bin",)]
            job = {"module": line.words[0], "args": line.words[1:], "cwd": str(cwd), "seconds": seconds}
            jobs.append({**job, "path": os.pathsep.join(map(str, folders)), "output": f"{cwd}.txt"})
        path = side.folder / "jobs.json"
        path.write_text(json.dumps(jobs))
        command = [side.python, str(DRIVER), str(path)]
        drivers.append(subprocess.Popen(command, env=side.environment(), cwd=side.folder))
    statuses = [driver.wait() for driver in drivers]
    for side, status in zip(sides, statuses, strict=True):
        if status:
            raise SystemExit(f"{DRIVER.name} ended with status {status} in {side.checkout}; what it printed is above")
    return [[collected(side, number) for number in range(len(lines))] for side in sides]


def collected(side: Side, number: int) -> str:
    """Return what command line ``number`` did, as one text: its output, then the line ``exit status N``, then a line
    ``left behind: PATH`` for each file that it has written."""
    cwd = side.folder / f"{number:03d}"
    left = sorted(str(path.relative_to(cwd)) for path in cwd.rglob("*") if path.is_file())
    left = [name for name in left if name not in FILES and not name.startswith("runs/")]
    text = Path(f"{cwd}.txt").read_text(errors="replace")
    return side.plain(text + "".join(f"left behind: {name}\n" for name in left))


def matching(cases: Mapping[str, T], args: argparse.Namespace) -> dict[str, T]:
    """Return the cases whose names match the regular expression ``--match`` (``re.search``)."""
    return {name: case for name, case in cases.items() if re.search(args.match, name)}


def differences(before: str, after: str) -> list[str]:
    """Return the unified diff of two texts; an empty list if they are equal."""
    return list(difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=1))


def compare_plans(lines: Mapping[str, str], before: Sequence[str], after: Sequence[str]) -> Iterator[Golden]:
    """Compare the texts of dry runs byte for byte."""
    for name, one, other in zip(lines, before, after, strict=True):
        yield Golden(f"plan: {name}", differences(one, other), size=f"{len(one.splitlines())} lines, {status_of(one)}")


def status_of(text: str) -> str:
    """Return the line ``exit status N`` from ``text``, a result of ``collected`` for one command line. If ``text`` has
    no such line, return ``no exit status``."""
    return next((line for line in text.splitlines()[::-1] if line.startswith("exit status ")), "no exit status")


def names(message: str, word: str) -> bool:
    """Return True if ``message`` contains ``word`` as a whole word or number."""
    return re.search(rf"(?<![\w-]){re.escape(word)}(?!\w)", message) is not None


def unnamed(case: Refusal, text: str) -> list[str]:
    """Return a line of text for each defect of the refusal ``text``: a word that the refusal must contain and does not,
    or a part that is missing of "found", "expected" and "type next". Empty if there is no defect."""
    message = text.rpartition("exit status ")[0]
    words = [f"it does not name {word}" for word in (case.key, case.value) if word and not names(message, word)]
    parts = ("found: ", "expected: ", "type next: ") if case.parts else ()
    lines = message.splitlines()
    return words + [f"it has no line '{part}'" for part in parts if not any(line.startswith(part) for line in lines)]


def compare_refusals(
    cases: Sequence[Refusal], before: Sequence[str], after: Sequence[str], texts: bool = False
) -> Iterator[Golden]:
    """Compare the exit statuses of wrong command lines, and check the words of the messages.

    Args:
        cases: the command lines.
        before: texts of ``collected`` from the first checkout, one for each command line.
        after: the same from the second checkout.
        texts: True also shows the differences between the texts.
    """
    for case, one, other in zip(cases, before, after, strict=True):
        found = [f"before: {lack}" for lack in unnamed(case, one)] + [f"after: {lack}" for lack in unnamed(case, other)]
        if status_of(one) == "exit status 0":
            found.insert(0, "before: it is not refused")
        if status_of(one) != status_of(other):
            found.insert(0, f"before: {status_of(one)}, after: {status_of(other)}")
        if found:
            found += ["after it printed:", *other.splitlines()[-8:]]
        shown = differences(one, other) if texts else ()
        yield Golden(f"refusal: {case.line}", found, shown, size=status_of(one))


def plans_and_refusals(sides: Sides, parts: set[str], args: argparse.Namespace) -> Iterator[Golden]:
    """Run dry runs and wrong command lines in both checkouts, and yield the comparisons. ``parts`` chooses: ``plans``,
    ``refusals``, or both. ``args`` is the parsed command line."""
    plans = matching({**PLANS, **ON_A_CLUSTER}, args) if "plans" in parts else {}
    cases = {case.line: case for case in REFUSALS} if "refusals" in parts else {}
    refusals = list(matching(cases, args).values())
    lines = [
        Line(("launch", *shlex.split(words), "dry_run=true"), name in ON_A_CLUSTER) for name, words in plans.items()
    ]
    lines += [Line(tuple(shlex.split(case.line)), case.on_a_cluster) for case in refusals]
    before, after = run_lines(sides, lines, args.seconds)
    yield from compare_plans(plans, before[: len(plans)], after[: len(plans)])
    yield from compare_refusals(refusals, before[len(plans) :], after[len(plans) :], args.texts)


def make_runs(checkout: Path, folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Write the run folders of ``WRITTEN``, and run the sweeps of ``RECORDED``. The checkout ``checkout`` runs these
    sweeps, and composes the configs of the written runs. Return name -> folder that contains the runs of this name.

    Raises:
        SystemExit: a command line fails.
    """
    found, configs = {}, {}
    for name, (write, words) in matching(WRITTEN, args).items():
        found[name] = folder / "written" / name
        write(found[name])
        for run in sorted(found[name].iterdir()):
            configs[run] = ("launch", run.name, *shlex.split(words), "--cfg", "job")
    side, recorded = Side(checkout, folder / "recorded"), matching(RECORDED, args)
    lines = [*configs.values(), *(tuple(shlex.split(line)) for line in recorded.values())]
    (texts,) = run_lines([side], [Line(words) for words in lines], args.seconds)
    for line, text in zip(lines, texts, strict=True):
        if status_of(text) != "exit status 0":
            raise SystemExit(f"{shlex.join(line)} failed in {checkout}:\n{text}")
    for run, text in zip(configs, texts):
        (run / ".hydra" / "config.yaml").write_text(text.rpartition("exit status ")[0])
    for number, name in enumerate(recorded, start=len(configs)):
        found[name] = side.folder / f"{number:03d}" / "outputs" / "swept"
        for report in found[name].rglob("scaling.*"):
            report.unlink()
    return found


def written(side: Side, number: int, runs: Path) -> dict[str, str]:
    """Return path in the run folders -> text, for the CSV, JSON and Markdown files that command line ``number`` has
    changed or written in its copy of ``runs``."""
    copy = side.folder / f"{number:03d}" / "runs"
    found = {}
    for path in sorted(path for path in copy.rglob("*") if path.suffix in (".csv", ".json", ".md")):
        original = runs / path.relative_to(copy)
        text = path.read_text()
        if not original.exists() or original.read_text() != text:
            found[str(path.relative_to(copy))] = side.plain(text)
    return found


def values(name: str, text: str) -> dict[str, str]:
    """Return name -> value of a CSV or JSON file. A name consists of row, column and key names; a value is the text in
    the file.
    """

    def flat(value: Any, at: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from flat(item, f"{at}.{key}" if at else key)
        elif isinstance(value, list):
            yield f"{at}[]", f"{len(value)} items"
            for index, item in enumerate(value):
                yield from flat(item, f"{at}[{index}]")
        else:
            yield at, json.dumps(value)

    if name.endswith(".json"):
        return dict(flat(json.loads(text, parse_float=str, parse_int=str), ""))
    rows = list(csv.DictReader(io.StringIO(text)))
    return dict(flat(rows, ""))


def named(keys: Iterable[str]) -> list[str]:
    """Return the names of ``values`` without row and item numbers, each once: ``[3].loss`` becomes ``loss``."""
    return list(dict.fromkeys(re.sub(r"\[\d*\]", "", key).lstrip(".") for key in keys))


def compare_values(name: str, before: str, after: str, strict: bool = False) -> Golden:
    """Compare two CSV or JSON files value by value. The order of the values does not count.

    Args:
        name: name of the comparison, which ends with the file's suffix.
        before: text of the file in the first checkout.
        after: text of the file in the second checkout; empty: there is no such file.
        strict: True counts missing names as differences.
    """
    if not after:
        return Golden(name, ["after: there is no such file"])
    one, other = values(name, before), values(name, after)
    changed = [f"{key}: {one[key]}, and now {other[key]}" for key in one if key in other and one[key] != other[key]]
    gone = [f"gone: {key}" for key in named(key for key in one if key not in other)]
    new = [f"new: {key}" for key in named(key for key in other if key not in one)]
    failures, notes = (changed + gone, new) if strict else (changed, gone + new)
    return Golden(name, failures, notes, f"{len(one)} values")


def compare_figures(sides: Sides, parts: set[str], args: argparse.Namespace) -> Iterator[Golden]:
    """Report the same runs with both checkouts, and yield comparisons of the output and the written files. ``parts`` is
    not used; ``args`` is the parsed command line."""
    runs = make_runs(sides[0].checkout, sides[0].folder.parent / "runs", args)
    cases = [(name, folder, reader) for name, folder in runs.items() for reader in READERS]
    lines = [Line(tuple(shlex.split(READERS[reader])), on_a_cluster=True, runs=folder) for _, folder, reader in cases]
    for number, texts in enumerate(zip(*run_lines(sides, lines, args.seconds), strict=True)):
        name, folder, reader = cases[number]
        one, other = (status_of(text) if status_of(text) == REFUSED else text for text in texts)
        yield Golden(f"figures: {name}: {reader}", differences(one, other), size=status_of(one))
        before, after = (written(side, number, folder) for side in sides)
        for file, text in before.items():
            title = f"figures: {name}: {file}"
            if file.endswith(".md"):
                yield Golden(title, differences(text, after.get(file, "")), size=f"{len(text.splitlines())} lines")
            else:
                yield compare_values(title, text, after.get(file, ""), args.strict)


def losses(side: Side, layout: str) -> subprocess.Popen[str]:
    """Start a training run of two ranks with the layout ``layout``, and return its process without waiting."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "gpt.train", "run_dir=run"]
    folder = side.folder / layout
    folder.mkdir(parents=True)
    return subprocess.Popen(
        [side.python, *words, *shlex.split(LOSSES[layout]), *shlex.split(TINY)],
        cwd=folder,
        env=side.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def step_records(side: Side, layout: str, printed: str) -> str:
    """Return the step records of a run without fields that depend on the clock. If the run fails, return its output."""
    files = sorted((side.folder / layout / "run" / "metrics").glob("rank_*.jsonl"))
    if len(files) != 2:
        return side.plain(printed)
    records = [(file.name, json.loads(line)) for file in files for line in file.read_text().splitlines()]
    return "\n".join(f"{name} {json.dumps({key: one.get(key) for key in FIELDS})}" for name, one in records)


def compare_losses(sides: Sides, parts: set[str], args: argparse.Namespace) -> Iterator[Golden]:
    """Train with every layout in both checkouts at the same time, and yield comparisons of the step records. ``parts``
    is not used; ``args`` is the parsed command line."""
    for layout in matching(LOSSES, args):
        runs = [losses(side, layout) for side in sides]
        printed = [run.communicate()[0] for run in runs]
        one, other = (step_records(side, layout, text) for side, text in zip(sides, printed, strict=True))
        failed = [f"exit status {run.returncode}" for run in runs if run.returncode]
        found = differences(one, other) + failed
        yield Golden(f"losses: {layout}", found, size=f"{len(one.splitlines())} records")


PARTS: dict[str, Callable[[Sides, set[str], argparse.Namespace], Iterator[Golden]]] = {
    "plans": plans_and_refusals,
    "refusals": plans_and_refusals,
    "figures": compare_figures,
    "losses": compare_losses,
}


def show(golden: Golden) -> None:
    """Print the line of a comparison, followed by the differences."""
    size = f" ({golden.size})" if golden.size else ""
    print(f"{golden.name}: {'DIFFERS' if golden.differences else 'the same'}{size}", flush=True)
    for lines in (golden.differences, golden.notes):
        for line in lines[:LONGEST]:
            print(f"    {line}")
        if len(lines) > LONGEST:
            print(f"    ... and {len(lines) - LONGEST} lines more")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparisons. Returns the exit status: 0 if all results are equal, else 1."""
    parser = argparse.ArgumentParser(description="Show that two checkouts behave alike.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--match", default="", metavar="REGEX", help="only what has a name in which this is found")
    parser.add_argument("--texts", action="store_true", help="show how the texts of refusals differ")
    parser.add_argument("--strict", action="store_true", help="columns of reports that are gone count as a difference")
    parser.add_argument("--seconds", type=int, default=120, help="kill a command line after so long (default: 120)")
    args = parser.parse_args(arguments)
    chosen = set(args.only.split(","))
    if unknown := chosen - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    count = differing = 0
    for run in dict.fromkeys(PARTS[part] for part in PARTS if part in chosen):
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="same_") as folder:
            checkouts = (args.before.resolve(), args.after.resolve())
            one, two = (Side(at, Path(folder, name)) for at, name in zip(checkouts, ("one", "two"), strict=True))
            for golden in run((one, two), chosen, args):
                show(golden)
                count += 1
                differing += bool(golden.differences)
        names = " and ".join(part for part in PARTS if PARTS[part] is run and part in chosen)
        print(f"-- {names}: {time.monotonic() - began:.0f} s")
    print(f"{count} comparisons, {differing} differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
