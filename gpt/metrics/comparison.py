"""Comparison of runs: loss at equal tokens, speed, differing settings, and their plot. Imports no torch."""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gpt.metrics.run_json import describe_run
from launch.errors import ConfigError
from launch.runs.compose import flatten, plain
from launch.runs.folder import RunFolder

# Metrics of several runs: the loss at equal tokens, speed, and the settings in which they differ.


WINDOW = 0.05
"""Share of the tokens, up to the common number, over which the training loss is averaged. Single steps are noisy."""
SETTINGS = ("data", "optim", "parallel", "precision", "seed", "compile", "recompute", "init_from")
"""Parts of the config, besides the model, whose differences are listed."""

Curve = list[tuple[int, float]]
"""Tokens seen -> loss, in order."""


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
    compared = [with_losses_at(run, equal) if equal and run.tokens else run for run in runs]
    differences = {
        "architecture": find_differences(runs, ("model",), ignored=("model.name",)),
        "settings": find_differences(runs, SETTINGS),
    }
    return Comparison(compared, equal, differences, write_notes(compared, equal, same_text))


def with_losses_at(run: RunMetrics, tokens: int) -> RunMetrics:
    """Fill in the losses of ``run`` at ``tokens``."""
    window = [loss for seen, loss in run.losses if (1 - WINDOW) * tokens < seen <= tokens]
    loss = sum(window) / len(window) if window else interpolate(run.losses, tokens)
    changed = {"loss_then": loss, "val_loss_then": interpolate(run.val_losses, tokens)}
    return RunMetrics(**{**run.__dict__, **changed})


def interpolate(curve: Curve, tokens: int) -> float | None:
    """Interpolate a curve linearly at ``tokens``; None outside of its points."""
    after = bisect_left(curve, (tokens, float("-inf")))
    if after == len(curve):
        return None
    x1, y1 = curve[after]
    if x1 == tokens:
        return y1
    if after == 0:
        return None
    x0, y0 = curve[after - 1]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def find_differences(
    runs: Sequence[RunMetrics], parts: Sequence[str], ignored: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Return the keys in these parts of the config whose values differ: key -> the value of each run."""
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
    figure = Figure(figsize=(12.0, 4.2 + 0.25 * len(compared.runs)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, speeds = figure.subplots(1, 2, width_ratios=[3, 2])
    draw_losses(losses, compared)
    draw_speeds(speeds, compared)
    handles, names = losses.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # keeps the version of matplotlib out of the file
    return file.getvalue()


def draw_losses(axes: Axes, compared: Comparison) -> None:
    """Draw training loss as lines, validation loss as points, and the number of tokens of the comparison."""
    for index, run in enumerate(compared.runs):
        color = COLORS[index % len(COLORS)]
        smooth = running_mean(run.losses)
        axes.plot([x for x, _ in run.losses], [y for _, y in run.losses], color=color, alpha=0.25, linewidth=0.8)
        axes.plot([x for x, _ in smooth], [y for _, y in smooth], color=color, linewidth=1.6, label=shorten(run.label))
        axes.plot([x for x, _ in run.val_losses], [y for _, y in run.val_losses], "o", color=color, markersize=4)
    if compared.equal_tokens is not None:
        axes.axvline(compared.equal_tokens, color="#595959", linestyle=(0, (4, 3)), linewidth=1.0)
    title = "Loss over tokens: training (line), validation (points)"
    axes.set_title(title if compared.equal_tokens is not None else f"{title}\nnot comparable", fontsize=11, loc="left")
    axes.set_xlabel("tokens")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    tidy(axes)


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
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    tidy(axes)


def tidy(axes: Axes) -> None:
    """Add grid lines, and remove the frame at the top and on the right."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def running_mean(curve: Curve) -> Curve:
    """Smooth a curve by the running mean over about a fortieth of it."""
    width = max(1, len(curve) // 40)
    return [
        (curve[i][0], sum(y for _, y in curve[max(0, i - width + 1) : i + 1]) / min(width, i + 1))
        for i in range(len(curve))
    ]


def shorten(label: str) -> str:
    """Shorten a label to fit into a legend."""
    return label if len(label) <= LABEL_LIMIT else f"{label[: LABEL_LIMIT - 3]}..."
