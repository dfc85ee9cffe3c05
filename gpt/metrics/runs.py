"""The file ``run.json``: a whole run in one value, with config, startup, steps, evaluations, checkpoints and summary.

It depends only on the run folder, so interruptions do not change it, and all tools read a run alike. Imports no torch.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.checkpoint import folders
from launch.errors import ConfigError
from launch.runs.compose import flatten, plain
from launch.runs.events import saves_that_count
from launch.runs.files import read_json, write_json
from launch.runs.folder import RunFolder, read_mapping
from launch.runs.records import StepRecord, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
WARM_UP_STEPS = 5
"""Number of first steps of an attempt that its speed excludes: caches fill, kernels are chosen, the compiler works."""
SHARE = 0.002
"""Largest share of the wall time for rewriting the file during the run."""


class RunJson:
    """Writer of ``run.json``, which is rewritten at the start, at evaluations and at the end."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._not_before = 0.0
        self._write()

    def write(self, record: StepRecord) -> None:
        """Write the file after an evaluation. For a long run, whose file takes long to write, some evaluations are
        skipped."""
        if record.val_loss is not None and time.monotonic() >= self._not_before:
            self._write()

    def close(self) -> None:
        """Write the file for the last time."""
        self._write()

    def _write(self) -> None:
        started = time.monotonic()
        write_json(self._folder.run_json, describe_run(self._folder))
        # The longer the file takes, the later the next write is, so writing takes at most SHARE of the time.
        self._not_before = time.monotonic() + (time.monotonic() - started) / SHARE


def describe_run(folder: RunFolder) -> dict[str, Any]:
    """Return everything that a run folder records about its run, as plain values."""
    records = read_records(folder.metrics(0))
    events = folder.read_events()
    evaluation = ("step", "attempt", "time", "val_loss", "val_bits_per_byte")
    kept = set(folders.steps(folder.checkpoints))
    saved = {event["step"]: event for event in saves_that_count(events)}  # a step repeated after a crash counts once
    return {
        "format": FORMAT,
        "run": {"name": folder.path.parent.name, "point": folder.point, "path": str(folder.path)},
        "config": read_mapping(folder.config) if folder.config.exists() else None,
        "startup": read_startup(folder),
        "steps": records,
        "evaluations": [
            {name: record[name] for name in evaluation if name in record} for record in records if "val_loss" in record
        ],
        "checkpoints": [
            {name: saved[step][name] for name in ("step", "attempt", "time", "seconds")} | {"kept": step in kept}
            for step in sorted(saved)
        ],
        "summary": summarize(folder, records, events),
    }


def read_startup(folder: RunFolder) -> dict[str, Any] | None:
    """Return the environment that the newest attempt recorded at its start; None if no attempt did."""
    for attempt in reversed(folder.attempts()):
        known = read_json(folder.environment(attempt))
        if known:
            return known
    return None


def summarize(folder: RunFolder, records: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a summary of a run in a few numbers. Unknown values are absent. Speeds are medians without the warm-up
    steps."""
    ends = [e["event"] for e in events if e["event"] in ("started", "finished", "stopped", "rank_failed")]
    found: dict[str, Any] = {
        "state": {"started": "running", "rank_failed": "failed"}.get(ends[-1], ends[-1]) if ends else "not started",
        "attempts": len(folder.attempts()),
        "steps": records[-1]["step"] if records else 0,
    }
    if not records:
        return found
    if "loss" in records[-1]:
        found["loss"] = records[-1]["loss"]
    if "skipped_steps" in records[-1]:
        found["skipped_steps"] = records[-1]["skipped_steps"]
    evaluated = [record for record in records if "val_loss" in record]
    if evaluated:
        best = min(evaluated, key=lambda record: record["val_loss"])
        found |= {"val_loss": evaluated[-1]["val_loss"]}
        found |= {"best_val_loss": best["val_loss"], "best_val_step": best["step"]}
    shares = ("mfu_palm", "mfu_bf16", "mfu_causal", "hfu")
    for name in ("step_time_s", "tokens_per_s", "tflops_per_s", *shares, "data_wait_s"):
        values = [record[name] for record in select_steady(records) if name in record]
        if values:
            found[name] = statistics.median(values)
    peaks = [record["memory_peak_gib"] for record in records if "memory_peak_gib" in record]
    if peaks:
        found["memory_peak_gib"] = max(peaks)
    return found | {"training_s": sum(record["step_time_s"] for record in records)}


def select_steady(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records after the warm-up steps of each attempt; all records if none would remain."""
    first: dict[int, int] = {}
    for record in records:
        first.setdefault(record["attempt"], record["step"])
    return [r for r in records if r["step"] >= first[r["attempt"]] + WARM_UP_STEPS] or list(records)


# Metrics of several runs: the loss at equal tokens, speed, and the settings in which they differ.


WINDOW = 0.05
"""Share of the tokens, up to the common number, over which the training loss is averaged. Single steps are noisy."""
SETTINGS = ("data", "optim", "parallel", "precision", "seed", "compile", "recompute", "init_from")
"""Parts of the config, besides the model, whose differences are listed."""

Curve = list[tuple[int, float]]
"""Pairs of tokens seen and loss in nats per token, by ascending tokens."""


@dataclass(frozen=True)
class RunMetrics:
    """Metrics of one run. ``*_then`` are values at the number of tokens that all compared runs have seen."""

    label: str
    state: str
    parameters: int | None
    steps: int
    tokens: int
    losses: Curve
    val_losses: Curve
    best_val_loss: float | None
    tokens_per_s: float | None
    mfu_palm: float | None
    mfu_bf16: float | None
    memory_peak_gib: float | None
    ranks: int | None
    device: str | None
    data_sha256: str | None
    config: dict[str, Any]
    loss_then: float | None = None
    val_loss_then: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Metrics of several runs. ``differences`` is heading -> key -> the value of each run."""

    runs: list[RunMetrics]
    equal_tokens: int | None
    """Number of tokens at which losses are compared; None if losses are not comparable, or a run has no tokens yet."""
    differences: dict[str, dict[str, list[str]]]
    notes: list[str] = field(default_factory=list)


def read_metrics(folder: RunFolder, label: str) -> RunMetrics:
    """Read the metrics of one run folder.

    Raises:
        ConfigError: the folder has no config.
    """
    run = describe_run(folder)
    if run["config"] is None:
        raise ConfigError(f"no {folder.config}", "the folder of a run", "python -m gpt.train, to make one")
    start, summary = run["startup"] or {}, run["summary"]
    per_step = start.get("global_batch", 0) * start.get("block_size", 0)
    devices = {rank["device_name"] for rank in start.get("ranks", [])}
    return RunMetrics(
        label=label,
        state=summary["state"],
        parameters=start.get("parameters"),
        steps=summary["steps"],
        tokens=summary["steps"] * per_step,
        losses=[(record["step"] * per_step, record["loss"]) for record in run["steps"] if "loss" in record],
        val_losses=[(e["step"] * per_step, e["val_loss"]) for e in run["evaluations"]],
        best_val_loss=summary.get("best_val_loss"),
        tokens_per_s=summary.get("tokens_per_s"),
        mfu_palm=summary.get("mfu_palm"),
        mfu_bf16=summary.get("mfu_bf16"),
        memory_peak_gib=summary.get("memory_peak_gib"),
        ranks=start.get("world_size"),
        device=" and ".join(sorted(devices)) or None,
        data_sha256=start.get("data_sha256"),
        config=flatten(run["config"]),
    )


def compare(runs: Sequence[RunMetrics]) -> Comparison:
    """Compare the runs at the same number of tokens, with their differences and with notes on incomparable values."""
    begun = [run for run in runs if run.tokens]
    # The checksum covers the tokens: losses per token of another tokenizer are not comparable either.
    same_text = len({run.data_sha256 for run in begun}) <= 1
    equal = min(run.tokens for run in begun) if len(begun) > 1 and same_text else None
    compared = [
        replace(run, loss_then=mean_loss_at(run.losses, equal), val_loss_then=interpolate(run.val_losses, equal))
        if equal and run.tokens
        else run
        for run in runs
    ]
    differences = {
        "architecture": find_differences(runs, ("model",), ignored=("model.name",)),
        "settings": find_differences(runs, SETTINGS),
    }
    return Comparison(compared, equal, differences, write_notes(compared, equal, same_text))


def mean_loss_at(curve: Curve, tokens: int) -> float | None:
    """Return the mean training loss over the last ``WINDOW`` of ``tokens``; without a step there, interpolate."""
    window = [loss for seen, loss in curve if (1 - WINDOW) * tokens < seen <= tokens]
    return sum(window) / len(window) if window else interpolate(curve, tokens)


def interpolate(curve: Curve, tokens: int) -> float | None:
    """Interpolate a curve linearly at ``tokens``; None outside of its points."""
    if not curve or not curve[0][0] <= tokens <= curve[-1][0]:
        return None
    return float(np.interp(tokens, *points(curve)))


def find_differences(
    runs: Sequence[RunMetrics], parts: Sequence[str], ignored: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Return the keys in these parts of the config whose values differ: key -> the value of each run as text."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key.split(".")[0] in parts)
    found = {}
    for key in keys:
        values = [plain(run.config[key]) if key in run.config else "-" for run in runs]
        # A run made before the key existed has no value for it.
        if key not in ignored and len(set(values) - {"-"}) > 1:
            found[key] = values
    return found


def write_notes(runs: Sequence[RunMetrics], equal: int | None, same_text: bool) -> list[str]:
    """Return notes on the meaning of the metrics, and on incomparable values."""
    said = []
    if equal is not None:
        said.append(
            f"* at {equal:,} tokens, the most that all runs have seen. The training loss is the mean over the last "
            f"{WINDOW:.0%} of them, the validation loss is interpolated between the evaluations around."
        )
        late = [run.label for run in runs if run.tokens and run.val_loss_then is None]
        if late:
            said.append(f"No validation loss there for {', '.join(late)}: not evaluated both before and after.")
    if not same_text:
        said.append("Losses are not compared: the runs were trained on different data, or tokens of another kind.")
    waiting = [run.label for run in runs if not run.tokens]
    if waiting:
        said.append(f"No steps yet: {', '.join(waiting)}.")
    sizes = {run.config.get("model.block_size") for run in runs}
    if equal is not None and len(sizes) > 1:
        said.append("Sequences differ in length: longer ones make the same text easier to predict.")
    if len({(run.device, run.ranks, run.config.get("precision")) for run in runs if run.tokens}) > 1:
        said.append("Devices, ranks or precision differ: tokens/s is that of each set-up, not of the model alone.")
    return said


# Plot of a comparison: loss over tokens, and tokens per second with the MFU.


# Colors that color-blind readers can distinguish (Okabe and Ito, Color Universal Design, 2008), without their yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LABEL_LIMIT = 44


def draw(compared: Comparison) -> bytes:
    """Draw the plot. Return the bytes of a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed by this alone
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12.0, 4.2 + 0.25 * len(compared.runs)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, speeds = figure.subplots(1, 2, width_ratios=[3, 2])
    draw_losses(losses, compared)
    draw_speeds(speeds, compared)
    for axes in (losses, speeds):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = losses.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # keeps the version of matplotlib out of the file
    return file.getvalue()


def draw_losses(axes: Axes, compared: Comparison) -> None:
    """Draw training losses as lines, validation losses as points, both in nats per token over tokens.

    A dashed line marks the number of tokens at which losses are compared, if they are comparable.
    """
    for index, run in enumerate(compared.runs):
        color = COLORS[index % len(COLORS)]
        label = run.label if len(run.label) <= LABEL_LIMIT else f"{run.label[: LABEL_LIMIT - 3]}..."
        axes.plot(*points(run.losses), color=color, alpha=0.25, linewidth=0.8)
        axes.plot(*points(running_mean(run.losses)), color=color, linewidth=1.6, label=label)
        axes.plot(*points(run.val_losses), "o", color=color, markersize=4)
    if compared.equal_tokens is not None:
        axes.axvline(compared.equal_tokens, color="#595959", linestyle=(0, (4, 3)), linewidth=1.0)
    title = "Loss over tokens: training (line), validation (points)"
    axes.set_title(title if compared.equal_tokens is not None else f"{title}\nnot comparable", fontsize=11, loc="left")
    axes.set_xlabel("tokens")
    axes.set_ylabel("nats per token")


def draw_speeds(axes: Axes, compared: Comparison) -> None:
    """Draw tokens per second as bars, with the model FLOPs utilization if known."""
    rows = range(len(compared.runs))
    values = [run.tokens_per_s or 0.0 for run in compared.runs]
    axes.barh(rows, values, color=[COLORS[i % len(COLORS)] for i in rows], height=0.6)
    for row, run in zip(rows, compared.runs, strict=True):
        rate = "no steps" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}"
        share = "" if run.mfu_palm is None else f", MFU {run.mfu_palm:.1%}"
        axes.annotate(rate + share, (values[row], row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_title("Tokens per second, median after the first steps", fontsize=11, loc="left")
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max([*values, 1.0]))


def points(curve: Curve) -> tuple[list[int], list[float]]:
    """Return the x values and the y values of a curve."""
    return [x for x, _ in curve], [y for _, y in curve]


def running_mean(curve: Curve) -> Curve:
    """Smooth a curve by the running mean over about a fortieth of it."""
    width = max(1, len(curve) // 40)
    return [
        (curve[i][0], sum(y for _, y in curve[max(0, i - width + 1) : i + 1]) / min(width, i + 1))
        for i in range(len(curve))
    ]
