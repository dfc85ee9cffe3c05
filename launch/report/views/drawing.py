"""Drawing with matplotlib: colors, axes, and panels, alone for the page or together in a file."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator

# Colors and style of every drawing of the project.


PALETTE = {
    "paper": ("#ffffff", "#0f1318"),
    "ink": ("#1b1f24", "#e6e9ed"),
    "quiet": ("#57606a", "#9aa4af"),
    "line": ("#d5dae0", "#333b45"),
    "c0": ("#0072b2", "#4aa8e0"),
    "c1": ("#d55e00", "#f0803c"),
    "c2": ("#009e73", "#2cc295"),
    "c3": ("#b4578d", "#dd8fbd"),
    "c4": ("#b87a00", "#e8b13c"),
    "c5": ("#3a94c9", "#86c8ee"),
    "c6": ("#444c56", "#c3cad2"),
    "waiting": ("#b9c0c8", "#6a737d"),
    "fewer": ("#7fc8b0", "#2f7d68"),
    "shutdown": ("#8b949e", "#7d8691"),
    "compile": ("#8a6fb0", "#b59add"),
    "restore": ("#a0522d", "#d08a62"),
}
"""Name -> color on light and on dark paper. Files use the light colors; the page has both, as variables of CSS.

``c0`` to ``c6`` follow Okabe and Ito (Color Universal Design, 2008): color-blind readers can distinguish them.
"""
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
PAPER, INK, GREY, LINE = (LIGHT[name] for name in ("paper", "ink", "quiet", "line"))
COLORS = [LIGHT[f"c{index}"] for index in range(7)]
MARKERS = "os^DvPX*"
STYLE: Any = {
    **{"font.size": 9, "axes.titlesize": 11, "figure.titlesize": 13, "figure.titleweight": "bold"},
    **{"text.color": INK, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": GREY},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8, "legend.frameon": False},
    **{"axes.facecolor": "none", "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.8},
    # Text stays text, so that a reader can search it.
    "svg.fonttype": "none",
}
HOLLOW: dict[str, Any] = {"c": PAPER, "s": 42, "linewidths": 1.6, "zorder": 3}
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.2}
"""Position of a legend below the axes and their name."""
IDEAL: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}


# Axes that several drawings have.


def scale_values(axes: Axes, name: str, log: bool = False) -> None:
    """Set up the axis of the values. It begins at 0, or is logarithmic if the values span a factor of 4 or more."""
    axes.set_ylabel(name)
    axes.grid(True, axis="y")
    if not log:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # With a factor below 4, noise between two points would look like a cliff. The room above is for the legend.
    margin = max(1.1, (4 * low / high) ** 0.5)
    axes.set_ylim(low / margin, high * margin * 1.25)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_locator(NullLocator())


def scale_sizes(axes: Axes, sizes: Sequence[int], name: str) -> None:
    """Space numbers of ranks or nodes by factors of two, and label those with enough room, always the largest."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel(name)
    axes.set_xlim(sizes[0] / 2**0.4, sizes[-1] * 2**0.4)
    axes.xaxis.set_major_locator(FixedLocator(sizes[:: -math.ceil(len(sizes) / 9)]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())


# Panels into files.


@dataclass(frozen=True)
class Panel:
    """One drawing with its title. ``draw`` fills the axes that it receives."""

    title: str
    draw: Callable[[Axes], None]
    inches: float = 3.1
    lead: str = ""
    """Sentence that the page shows under the title."""


WIDE = 5.4
"""Width of one panel in inches."""


@rc_context(STYLE)
def picture(panels: Sequence[Panel], heading: str, conditions: str) -> dict[str, bytes]:
    """Draw panels in rows of two below a heading. Returns the picture as ``png`` and as ``svg``."""
    panels = panels or [Panel("", _draw_nothing)]
    rows = [panels[start : start + 2] for start in range(0, len(panels), 2)]
    inches = [max(panel.inches for panel in row) for row in rows]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(2 * WIDE + 0.2, sum(inches) + 1.0), dpi=150, layout=layout)
    figure.suptitle(heading, x=0.01, ha="left")
    figure.supxlabel("\n".join(textwrap.wrap(conditions, 160)), fontsize=8, color=GREY, x=0.01, ha="left")
    for below, row in zip(figure.subfigures(len(rows), 1, height_ratios=inches, squeeze=False)[:, 0], rows):
        for axes, panel in zip(below.subplots(1, len(row), squeeze=False)[0], row):
            axes.set_title(panel.title)
            panel.draw(axes)
    png = to_png(figure)
    figure.set_layout_engine("none")  # The PNG file has computed the layout, which takes a third of the time.
    return {"png": png, "svg": _svg(figure, "report").encode()}


@rc_context(STYLE)
def inline_svg(panel: Panel, salt: str) -> str:
    """Draw one panel for the page, in colors that are variables of CSS. ``salt`` differs for each panel of a page."""
    figure = Figure(figsize=(WIDE, panel.inches), layout="constrained", facecolor="none")
    panel.draw(figure.subplots())
    text = _svg(figure, salt)
    for name, color in LIGHT.items():
        text = text.replace(color, f"var(--{name})")
    return text[text.index("<svg") :]


def to_png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file. Equal figures give equal bytes."""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def _svg(figure: Figure, salt: str) -> str:
    file = io.StringIO()
    with rc_context({"svg.hashsalt": salt}):  # Without a salt, identifiers inside the SVG are random.
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return file.getvalue()


def _draw_nothing(axes: Axes) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, "no point has enough steps for a figure yet", ha="center", fontsize=12, color=GREY)
