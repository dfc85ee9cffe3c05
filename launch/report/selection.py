"""Selection of the runs of a report: one run, one sweep, all runs of a folder, or several of these to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from tempfile import TemporaryFile

from launch.errors import ConfigError
from launch.runs.find import (
    ARCHIVE,
    CURRENT,
    OUTPUTS,
    Sweep,
    current_sweep,
    is_run,
    read_sweeps,
    runs_inside,
    runs_labelled,
)

REPORT = "python -m launch.report"


@dataclass(frozen=True)
class Selection:
    """Runs of a report. ``folder`` is the folder of a sweep's points, or of one run."""

    folder: Path
    runs: tuple[Path, ...]
    sweep: Sweep | None = None
    is_current: bool = True
    """True for the newest sweep of the folder, and for the runs of a folder without sweeps.

    False for an earlier sweep, and for all runs of a folder that has sweeps.
    """
    parts: tuple[Selection, ...] = ()
    """In a comparison, the selections to compare, in the order of the command; else empty."""
    out: Path | None = None
    """Folder for the files of the report; None for the folder of the run or sweep."""

    @property
    def stem(self) -> str:
        """Name of the report's files without their extensions."""
        if self.parts:
            return "comparison"
        if len(self.runs) == 1:
            return "summary"
        return "scaling" if self.is_current or self.sweep is not None else "all_runs"

    @property
    def folders(self) -> list[Path]:
        """Folders into which the report is written.

        The newest sweep has two: the folder of its points, and its record.
        """
        if self.out is not None:
            return [self.out]
        if self.parts:
            return [self.folder]
        if len(self.runs) == 1:
            return [self.runs[0]]
        kept = None if self.sweep is None else self.sweep.folder(self.folder)
        if kept is None:
            return [self.folder]
        return [self.folder, kept] if self.is_current else [kept]

    @property
    def dashboard(self) -> Path | None:
        """Folder into which the report is written for TensorBoard, as a run named Scaling or Summary.

        None if this report has no such run.
        """
        if self.out is not None or self.parts:
            return None
        if len(self.runs) == 1:
            return self.runs[0]
        return self.folder if self.is_current else None

    @property
    def shown(self) -> Path:
        """Path with which a command selects the same runs again: the folder, or the record of an earlier sweep."""
        kept = None if self.sweep is None or self.is_current else self.sweep.folder(self.folder)
        return kept or self.folder

    @property
    def text(self) -> str:
        """Sentence that names the sweep, the runs of a folder or the compared runs of this report.

        Empty if the heading of the report already names them.
        """
        if self.parts:
            return f"Compared are: {'; '.join(part.text.rstrip('.') or str(part.folder) for part in self.parts)}."
        if self.sweep is not None:
            shown = self.sweep.summary(read_sweeps(self.folder))
            return f"{shown[:1].upper()}{shown[1:]} of {self.folder}."
        return "" if self.is_current else f"All {len(self.runs)} runs of {self.folder}."

    def others(self) -> list[str]:
        """Return lines with the commands for the other reports of the folder: of its other sweeps, and of all its runs.

        Empty if there are no others.
        """
        if is_run(self.folder) or self.parts:
            return []
        command = f"{REPORT} {quote(str(self.folder))}"
        every_sweep = read_sweeps(self.folder)
        sweeps = [one for one in reversed(every_sweep) if self.sweep is None or one != self.sweep]
        lines = [f"{one.summary(every_sweep)}: {command} --sweep {one.number}" for one in sweeps]
        every = len(set(runs_inside(self.folder, depth=1)) | set(self.runs))
        if every > len(self.runs):
            lines.append(f"all {every} runs of the folder: {command} --all")
        return ["also here:", *(f"  {line}" for line in lines)] if lines else []


def select(
    folder: Path, number: int | None = None, *, every: bool = False, command: str = f"{REPORT} {{}}"
) -> Selection:
    """Return the runs of a report about ``folder``, such as ``select(Path("outputs/quick_test"))``.

    A folder of one run selects this run. The record of a sweep, such as ``sweeps/0001``, selects its points. A folder
    with runs selects the newest sweep, the sweep with ``number``, or with ``every`` all runs. If the folder has no
    sweep, it selects all runs.

    Args:
        folder: folder of runs, or of one run; or the label of a run.
        number: number of an earlier sweep; None for the newest.
        every: True for all runs of the folder.
        command: command that error messages propose, with ``{}`` in place of the folder.

    Raises:
        ConfigError: there is no such run, or no such sweep.
    """
    folder = folder if folder.exists() else next(iter(runs_labelled(folder)), folder)
    if not folder.is_dir():
        lacking = f"{folder}, which is a file" if folder.exists() else f"no folder {folder}"
        raise ConfigError(lacking, "a folder with runs in it", _proposal(folder.parent, command))
    if is_run(folder) and number is None and not every:
        return Selection(folder, (folder,))
    if folder.parent.name == ARCHIVE and folder.name.isdigit() and (folder / CURRENT).is_file() and number is None:
        return select(folder.parent.parent, int(folder.name), command=command)
    current = current_sweep(folder)
    sweep = current if number is None else _sweep_numbered(folder, number, command)
    if sweep is not None and not every:
        points = tuple(folder / name for name in sweep.points)
        return Selection(folder, points, sweep, is_current=sweep == current)
    found = runs_inside(folder, depth=1)
    if not found:
        expected = "a run folder, or a folder with runs in it (each has metrics/, attempts/ or plan.json)"
        raise ConfigError(f"no run in {folder}", expected, _proposal(folder, command))
    return Selection(folder, tuple(found), is_current=current is None)


def _sweep_numbered(folder: Path, number: int, command: str) -> Sweep:
    known = read_sweeps(folder)
    for sweep in known:
        if sweep.number == number:
            return sweep
    if known:
        expected = "; ".join(sweep.summary(known) for sweep in known)
        again = command.format(f"{quote(str(folder))} --sweep {known[-1].number}")
    else:
        expected = f"the number of a sweep, of which none is recorded in {folder / CURRENT}"
        again = command.format(quote(str(folder))) if runs_inside(folder, depth=1) else _proposal(folder, command)
    raise ConfigError(f"no sweep {number} in {folder}", expected, again)


def _proposal(folder: Path, command: str) -> str:
    """Return the command that an error message proposes: ``command`` with the newest folder that has runs.

    If there is no such folder, return the command that starts a sweep.
    """
    near = [folder, *folder.iterdir(), *(OUTPUTS.iterdir() if OUTPUTS.is_dir() else ())] if folder.is_dir() else []
    fitting = [path for path in near if path.is_dir() and runs_inside(path, depth=1)]
    if not fitting:
        return "python -m launch -m nodes=1,2"
    newest = max(fitting, key=lambda path: path.stat().st_mtime)
    return command.format(quote(str(newest)))


def writing_to(selection: Selection, out: Path) -> Selection:
    """Return the selection with ``out`` as the folder of its report. Creates the folder.

    Raises:
        ConfigError: the path is not a folder, is a folder of runs (whose own report would be lost), or is not writable.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}, which is a file", "a folder", f"--out {quote(str(out.parent / 'comparison'))}")
    if not selection.parts and runs_inside(out, depth=1):
        better = quote(str(out.parent / "report"))
        raise ConfigError(f"--out {out}, with runs in it, and a report of its own", "another folder", f"--out {better}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):  # Checked before the report is computed, which may take minutes.
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {out}, which cannot be written: {error.strerror}",
            "a folder that this user may write into, on a filesystem with room",
            "the same without --out, which writes next to the runs",
        ) from error
    return replace(selection, out=out)


# Comparison of several sweeps and runs.


def compare_selections(parts: Sequence[Selection]) -> Selection:
    """Join selections into one report. Its files are ``comparison.*``, next to the runs of the first selection.

    Raises:
        ConfigError: a folder is selected twice, or a run together with its own sweep.
    """
    runs = [{run.resolve() for run in part.runs} for part in parts]
    for at, (part, own) in enumerate(zip(parts, runs, strict=True)):
        for other, there in zip(parts[:at], runs, strict=False):
            # Two sweeps of one folder may share runs.
            if own == there or (own & there and 1 in (len(own), len(there))):
                again = f"{REPORT} {' '.join(quote(str(one.shown)) for one in parts if one is not part)}"
                raise ConfigError(f"{part.shown} and {other.shown}, which share runs", "folders with other runs", again)
    return Selection(parts[0].folder, tuple(run for part in parts for run in part.runs), parts=tuple(parts))


def source_labels(parts: Sequence[Selection]) -> list[str]:
    """Return a label for each part of a comparison: the name of its folder, or the whole path if two folders share a
    name.

    Single runs of one folder share a label, as points of a sweep do. If two parts have the same folder, the number of
    the sweep, or ``all runs``, distinguishes the parts.
    """
    keys = []
    for part in parts:
        at = part.folder.resolve()
        which = "all runs" if part.sweep is None else f"sweep {part.sweep.number or ''}".strip()
        keys.append((at.parent, "runs") if is_run(part.folder) else (at, which))
    names = Counter(folder.name for folder in {folder for folder, _ in keys})
    several = Counter(folder for folder, _ in dict.fromkeys(keys))
    return [
        (folder.name if names[folder.name] == 1 else str(folder)) + (f" {which}" if several[folder] > 1 else "")
        for folder, which in keys
    ]
