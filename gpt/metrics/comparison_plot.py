"""Plot of a comparison: loss over tokens, and tokens per second with the MFU.

Owns the drawing. Must not compute what the table does not say.
"""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gpt.metrics.comparison import Comparison, Curve

# Colors that the color-blind tell apart (Okabe and Ito, Color Universal Design, 2008), without their yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LABEL_LIMIT = 44


def draw(compared: Comparison) -> bytes:
    """Draw the plot; returns it as the bytes of a PNG."""
    figure = Figure(figsize=(12.0, 4.2 + 0.25 * len(compared.runs)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, speeds = figure.subplots(1, 2, width_ratios=[3, 2])
    draw_losses(losses, compared)
    draw_speeds(speeds, compared)
    handles, names = losses.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # no version of matplotlib in the file
    return file.getvalue()


def draw_losses(axes: Axes, compared: Comparison) -> None:
    """Draw training loss as lines, validation loss as points, and the number of tokens at which they are compared."""
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
    """Draw tokens per second as bars, with the model FLOPs utilization where it is known."""
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
