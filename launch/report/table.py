"""The scaling table: one row a point, and plainly what the figures do and do not say.

Owns what is in the rows, the claim of efficiency and where none is made. Must not know how a table is shown or drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.report import series as series_of
from launch.report.environment import GpuUse
from launch.report.goodput import Losses, saved_in_place
from launch.report.laws import Law, Repeats, SeriesFindings, find, law_notes
from launch.report.notes import notes
from launch.report.points import Point, neighbours, read_point
from launch.report.row import Row, RunDetail, detail
from launch.report.selection import Selection, select
from launch.report.series import (
    MeasuredPoint,
    Measurement,
    Series,
    comparison_notes,
    drop_warmup,
    label_selected,
    measure,
    ratios_to_first,
)
from launch.report.steps import UnreadLines, lost, phase_shares


@dataclass(frozen=True)
class ScalingTable:
    """A report: rows by series and size, what they have in common, and notes in plain language."""

    selection: Selection
    rows: tuple[Row, ...]
    batches: dict[str, str]
    """Kind of scaling -> what its points have in common, for people."""
    conditions: str
    notes: tuple[str, ...]
    is_gpt: bool = True
    """True where the GPT library made every point whose workload is known."""
    details: tuple[RunDetail, ...] = ()
    """Step times and ranks of the measured points, in the order of the rows."""
    laws: tuple[Law, ...] = ()
    repeats: tuple[Repeats, ...] = ()
    gpus: tuple[GpuUse | None, ...] = ()
    """Use of the GPUs of each point, in the order of the rows; None where they were not sampled."""
    unread: tuple[tuple[UnreadLines, ...], ...] = ()
    """Lines of the step records of each point that are no records, in the order of the rows."""
    typed: tuple[tuple[str, ...], ...] = ()
    """Overrides of each point, ``key=value``, in the order of the rows."""

    @property
    def name(self) -> str:
        """Title of the report."""
        if self.selection.parts:
            return " and ".join(dict.fromkeys(row.source for row in self.rows))
        return self.rows[0].label if len(self.rows) == 1 else self.selection.folder.resolve().name

    @property
    def title(self) -> str:
        """Title of the figure in texts."""
        kind = "Comparison" if self.selection.parts else "Summary" if len(self.rows) == 1 else "Scaling"
        return f"{kind} of {self.name}"

    @property
    def is_scaling(self) -> bool:
        """Tell whether some series has several sizes; a single point, or one of each kind, scales nothing."""
        return max(Counter((row.scaling, row.series) for row in self.rows).values(), default=0) > 1

    @property
    def compares_run_times(self) -> bool:
        """Tell whether run times are all there is to show: no program recorded how long its steps take."""
        has_steps = any(row.step_time_s is not None for row in self.rows)
        return not self.is_gpt and not has_steps and any(row.run_time_s is not None for row in self.rows)

    @property
    def unit(self) -> str:
        """Unit of the throughput: tokens, samples, images; work where points differ, or nothing says."""
        units = {row.unit for row in self.rows if row.throughput is not None}
        return (units.pop() if len(units) == 1 else None) or ("tokens" if self.is_gpt else "work")

    def sections(self) -> list[tuple[str, list[Row]]]:
        """Heading and rows for each kind of scaling."""
        kinds = list(dict.fromkeys(row.scaling for row in self.rows))
        return [(self._heading(kind), [row for row in self.rows if row.scaling == kind]) for kind in kinds]

    def _heading(self, kind: str | None) -> str:
        batch = self.batches.get(kind or "")
        with_batch = f" with {batch}" if batch else ""
        if len(self.rows) == 1:
            return f"Summary of {self.name}{with_batch}"
        if self.is_scaling and not (self.compares_run_times and all(row.speedup is None for row in self.rows)):
            kind_text = f"{kind.capitalize()} scaling" if kind else "Scaling"
            return f"{kind_text} of {self.name}{with_batch or ('' if kind else ', kind not known')}"
        return f"{'Run times' if self.compares_run_times else 'Points'} of {self.name}{with_batch}"


def build(folder: Path) -> ScalingTable:
    """Compute the report of ``folder``: see ``select``.

    Raises:
        ConfigError: there is no point, or points that belong together are not comparable.
    """
    return tabulate_selection(select(folder))


def tabulate_selection(selection: Selection) -> ScalingTable:
    """Compute the report of the runs that were selected.

    Raises:
        ConfigError: points that belong together are not comparable.
    """
    return tabulate(selection, [read_point(path) for path in selection.runs])


def tabulate(selection: Selection, points: Sequence[Point]) -> ScalingTable:
    """The scaling table of points that were read.

    Raises:
        ConfigError: points that belong together are not comparable.
    """
    points = label_selected(selection, points)
    beside = neighbours(points)
    members = [
        MeasuredPoint(point, measure(point.steps), tuple(near)) for point, near in zip(points, beside, strict=True)
    ]
    found = series_of.split(members)
    findings = [find(series) for series in found]
    ratios = ratios_to_first(members) if selection.parts else {}
    losses = {point.path: point.goodput.losses for point in points if point.goodput is not None}
    rows = tuple(
        _with_interval(
            replace(
                _row(series, member),
                ratio_to_first=ratios.get(member.point.title),
                **_loss_figures(member.point.path, losses),
            ),
            finding,
        )
        for series, finding in zip(found, findings, strict=True)
        for member in series.members
    )
    told = [law_notes(finding, series) for series, finding in zip(found, findings, strict=True)]
    shown = [member.point for series in found for member in series.members]
    return ScalingTable(
        selection=selection,
        rows=rows,
        batches=_batches(found),
        conditions=_conditions(found),
        notes=(*comparison_notes(members), *notes(found, rows), *(note for of_series in told for note in of_series)),
        details=tuple(one for series in found for member in series.members if (one := detail(member)) is not None),
        laws=tuple(finding.law for finding in findings if finding.law is not None),
        repeats=tuple(size for finding in findings for size in finding.repeats),
        gpus=tuple(point.gpu_use for point in shown),
        unread=tuple(point.unread for point in shown),
        typed=tuple(point.overrides for point in shown),
        is_gpt=all(point.is_gpt for point in points if point.environment is not None),
    )


def _with_interval(row: Row, finding: SeriesFindings) -> Row:
    low, high = finding.intervals.get(row.point, (None, None))
    return replace(row, efficiency_ci_low=low, efficiency_ci_high=high)


def _row(series: Series, member: MeasuredPoint) -> Row:
    point, environment = member.point, member.point.environment
    return Row(
        point=point.name,
        nodes=member.nodes,
        ranks=member.ranks,
        topology=None if environment is None else environment.topology,
        oversubscribed=member.crowded,
        state=str(point.state),
        series=series.label,
        scaling=series.scaling,
        loss=point.loss,
        last_step=point.last_step,
        unit=point.unit,
        run_time_s=point.run_time_s,
        attempts=point.attempts,
        label=point.title,
        source=point.source,
        unread_lines=sum(one.lines for one in point.unread),
        **_time_figures(point),
        **_gpu_figures(point),
        **(_run_time_figures(series, member) if member.figures is None else _figures(series, member, member.figures)),
    )


def _time_figures(point: Point) -> dict[str, Any]:
    """Columns of the time by part, and of what it cost."""
    found = point.goodput
    if found is None:
        return {}
    work = _whole_work(point)
    return {
        "goodput": found.goodput,
        "gpu_hours": found.gpu_hours,
        "cost": found.cost,
        "cost_per_billion": None if found.cost is None or not work else found.cost / (work / 1e9),
        **{f"{part}_s": value for part, value in found.seconds.items()},
    }


def _loss_figures(path: Path, losses: Mapping[Path, Losses]) -> dict[str, Any]:
    """Columns of what interruptions cost a run, and of what restarts in place spared it."""
    found = losses.get(path)
    if found is None:
        return {}
    spared = saved_in_place(found, [other for place, other in losses.items() if place != path])
    return {
        "hours_of": found.unit,
        "interruptions": sum(found.counts.values()),
        "interrupted_s": sum(found.seconds.values()) or None,
        "interrupted_h": sum(found.hours.values()) or None,
        **{f"interrupted_{cause}_h": hours for cause, hours in found.hours.items()},
        "restarts_in_place": len(found.in_place),
        "saved_in_place_h": None if spared is None else spared.hours,
        "saved_in_place_wait_s": None if spared is None else spared.wait_s,
        "saved_against": None if spared is None else spared.basis,
    }


def _whole_work(point: Point) -> float | None:
    """Work of the whole run; None where some steps do not tell theirs: half of the steps would make each unit dear."""
    works = [step.work for step in point.steps if step.work is not None]
    return sum(works) if works and len(works) == point.last_step else None


def _gpu_figures(point: Point) -> dict[str, Any]:
    """Columns of a row on its GPUs; a unit of work took its part of the energy of all attempts."""
    use = point.gpu_use
    if use is None:
        return {}
    work = _whole_work(point)
    return {
        "energy_kwh": None if use.energy_j is None else use.energy_j / 3.6e6,
        "joules_per_work": None if use.energy_j is None or not work else use.energy_j / work,
        "gpu_power_w": use.mean_power_w,
        "throttled": use.throttled,
    }


def _figures(series: Series, member: MeasuredPoint, figures: Measurement) -> dict[str, Any]:
    """The columns that need measured steps."""
    ratio = member.point.bf16_ratio
    columns: dict[str, Any] = {
        "step_time_s": figures.step_time_s,
        "step_time_s_low": figures.low_s,
        "step_time_s_high": figures.high_s,
        "step_time_s_spread": figures.high_s - figures.low_s,
        "mfu_palm": figures.mfu_palm,
        "mfu_bf16": None if figures.mfu_palm is None or ratio is None else figures.mfu_palm * ratio,
        "steps_measured": figures.steps,
    }
    if figures.throughput is not None:
        assert member.ranks
        work = figures.throughput * figures.step_time_s  # of one step
        columns |= {
            "throughput": figures.throughput,
            "throughput_per_rank": figures.throughput / member.ranks,
            "throughput_low": work / figures.high_s,
            "throughput_high": work / figures.low_s,
        }
    return columns | _against_smallest(series, member, figures)


def _against_smallest(series: Series, member: MeasuredPoint, figures: Measurement) -> dict[str, Any]:
    """Speedup, and what is claimed of it: nothing for a point alone, no efficiency without the work of a step."""
    base = series.smallest
    assert base is not None and base.figures is not None and base.ranks and member.ranks
    if not series.compares:
        return {}
    if not series.has_rates:
        return {"speedup": base.figures.step_time_s / figures.step_time_s}
    assert figures.throughput is not None and base.figures.throughput is not None
    ideal = base.figures.throughput * (member.ranks / base.ranks)
    ratios = {
        "throughput_ideal": None if base.crowded else ideal,
        "speedup": figures.throughput / base.figures.throughput,
    }
    if base.crowded or member.crowded:
        return ratios
    losses = {} if member is base else _losses(member, base, figures.throughput / ideal)
    return ratios | _efficiency(member is base, figures, base.figures, ideal) | losses


def _losses(member: MeasuredPoint, base: MeasuredPoint, efficiency: float) -> dict[str, Any]:
    """Divide the lost efficiency of a point among the phases of its steps."""
    here, there = (phase_shares(drop_warmup(one.point.steps)) for one in (member, base))
    parts = lost(here, there, efficiency, alone=base.ranks == 1)
    return {f"lost_to_{phase}": share for phase, share in parts.items()}


def _efficiency(is_base: bool, figures: Measurement, base: Measurement, ideal: float) -> dict[str, Any]:
    """Efficiency, what the quartiles of both points leave of it, and whether that is too much for an exact figure."""
    assert figures.throughput is not None
    efficiency = figures.throughput / ideal
    if is_base:
        return {"efficiency": efficiency, "efficiency_low": efficiency, "efficiency_high": efficiency, "noisy": False}
    return {
        "efficiency": efficiency,
        "efficiency_low": efficiency * (base.low_s / base.step_time_s) * (figures.step_time_s / figures.high_s),
        "efficiency_high": efficiency * (base.high_s / base.step_time_s) * (figures.step_time_s / figures.low_s),
        "noisy": figures.is_noisy or base.is_noisy,
    }


def _run_time_figures(series: Series, member: MeasuredPoint) -> dict[str, Any]:
    """Speedup of a program that records no steps, where it was stated how much work each point did."""
    base = series.smallest
    if base is None or base.figures is not None or not series.compares:
        return {}
    if base.run_rate is None or member.run_rate is None:
        return {}
    assert base.ranks and member.ranks
    speedup = member.run_rate / base.run_rate
    claimed = not base.crowded and not member.crowded
    return {"speedup": speedup, "efficiency": speedup * base.ranks / member.ranks if claimed else None}


def _batches(found: Sequence[Series]) -> dict[str, str]:
    """Kind of scaling -> the batches of its series, for people."""
    texts: dict[str, dict[str, None]] = {}
    for series in found:
        for member in series.members:
            if member.point.environment is not None and series.scaling is not None:
                batch = series_of.CONDITIONS["batch"](member.point.environment)
                texts.setdefault(series.scaling, {}).update({batch: None} if batch else {})
    return {kind: " or ".join(batches) for kind, batches in texts.items()}


def _conditions(found: Sequence[Series]) -> str:
    """Model, precision, hardware and software of the points; several values are all named."""
    known = [m.point.environment for series in found for m in series.members if m.point.environment is not None]
    if not known:
        return "Conditions unavailable: no point has recorded what it ran on."
    parts = [[series_of.CONDITIONS[name](e) for e in known] for name in ("model", "precision", "hardware")]
    parts += [[None if e.torch is None else f"torch {e.torch}" for e in known]]
    commits = [e.commit or ("unavailable" if e.workload == "gpt" else None) for e in known]
    parts += [[None if commit is None else f"commit {commit[:12]}" for commit in commits]]
    parts += [[None if e.command is None else f"command {e.command}" for e in known]]
    told = [" / ".join(dict.fromkeys(value for value in values if value is not None)) for values in parts]
    return "; ".join(text for text in told if text) + "."
