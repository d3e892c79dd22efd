"""The plots: small, thin-lined, labelled at the lines themselves, told apart by dashes and markers before colour.

Each is drawn once by matplotlib and used twice: as PNG, and as SVG in the page, where the colours become CSS variables,
so that it is dark on a dark page, and the letters stay text, so that it is read, searched and printed like the rest.
Small plots instead of one large: they keep their letters' size on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import MachineError, UserError
from common.report.runs import RunData
from common.view.curves import smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PAPER = "#1c1c1e", "#b9b9bf", "#ffffff"
# Okabe and Ito's colours, darkened until thin lines of them can be seen on white: safe with colour-blindness.
LINES = ("#0b62a8", "#c2410c", "#0f7a55", "#8f4a86", "#7a5c00", "#4b5563")
VARIABLES = {INK: "--ink", FAINT: "--faint", PAPER: "--paper"} | {
    color: f"--line{number}" for number, color in enumerate(LINES)
}
DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (3, 1), (9, 3))
MARKERS = ("o", "s", "^", "D", "v", "P")
INCHES = (3.9, 2.5)
PIXELS_PER_INCH = 200
FEW = 25  # points of a line up to which each is marked; longer ones have some marks to tell them apart


@dataclass(frozen=True)
class Plot:
    """Hold one plot, drawn."""

    name: str  # of its PNG
    title: str
    note: str  # what is seen, in words
    svg: str
    png: bytes


@dataclass(frozen=True)
class Line:
    """Hold one line to draw, and its label at the right end."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    style: int  # number of its run
    raw: Sequence[float] = ()  # unsmoothed, drawn faintly behind
    validation: bool = False


@dataclass(frozen=True)
class Panel:
    """Say what a plot shows, and in which unit."""

    name: str
    title: str
    lines: Sequence[Line]
    unit: str
    tick: Callable[[float], str]
    from_zero: bool = False


def draw_plots(runs: Sequence[RunData]) -> list[Plot]:
    """Draw every plot that the runs have figures for; raises MachineError where matplotlib is missing."""
    if len(runs) > len(LINES):
        raise UserError(f"{len(runs)} runs: expected up to {len(LINES)}, as no more lines can be told apart")
    try:
        import matplotlib
    except ImportError as error:
        raise MachineError(
            f"report: matplotlib can't be imported ({error}); install it with: pip install 'twintune[report]'"
        ) from None
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "twintune", "font.size": 9, "axes.unicode_minus": False}
    ):
        return [_draw(panel) for panel in panels(runs) if any(len(line.steps) for line in panel.lines)]


def panels(runs: Sequence[RunData]) -> list[Panel]:
    """Choose what is plotted."""
    single = len(runs) == 1

    def lines(key: str, factor: float = 1.0, smooth: bool = False) -> list[Line]:
        found = []
        for number, run in enumerate(runs):
            steps, values = run.series(key)
            values = [value * factor for value in values]
            shown = smooth_of(values) if smooth else values
            found.append(Line("" if single else run.name, steps, shown, number, values if smooth and single else ()))
        return found

    loss = lines("loss", smooth=True)
    if single:
        loss = [Line("training", *_parts(loss[0]))]
        loss += [Line("validation", *runs[0].series("eval_loss"), style=1, validation=True)]
    plots = [
        Panel("loss", "Loss, training and validation" if single else "Training loss", loss, "nats a token", _plain)
    ]
    if not single:
        evaluated = [Line(run.name, *run.series("eval_loss"), style=at, validation=True) for at, run in enumerate(runs)]
        plots.append(Panel("validation-loss", "Validation loss", evaluated, "nats a token", _plain))
    return [
        *plots,
        Panel("learning-rate", "Learning rate", lines("learning_rate"), "", _small, from_zero=True),
        Panel("gradient-norm", "Gradient norm", lines("grad_norm", smooth=True), "before clipping", _plain, True),
        Panel("speed", "Speed", lines("tokens_per_second"), "tokens a second", _count, from_zero=True),
        Panel("memory", "Peak memory", lines("peak_memory_bytes", 1e-9), "GB", _plain, from_zero=True),
    ]


def smooth_of(values: Sequence[float]) -> list[float]:
    """Smooth a line as strongly as it has points: over some thirtieth of it, not at all where there are few."""
    span = max(1.0, len(values) / 30)
    return smoothed(values, keep=1 - 1 / span)


def spread(wanted: Sequence[float], gap: float, lowest: float) -> list[float]:
    """Move labels apart, in their order, until they stand `gap` from each other; as little as that takes.

    None goes below `lowest`.
    """
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    groups: list[tuple[float, int]] = []  # mean place, size
    for at in order:
        groups.append((wanted[at], 1))
        while len(groups) > 1:
            (low, few), (high, more) = groups[-2:]
            if high - low >= gap * (few + more) / 2:
                break
            groups[-2:] = [((low * few + high * more) / (few + more), few + more)]
    places = [mean + gap * (at - (size - 1) / 2) for mean, size in groups for at in range(size)]
    places = [max(place, lowest + gap * at) for at, place in enumerate(places)]
    return [place for _, place in sorted(zip(order, places, strict=True))]


def _parts(line: Line) -> tuple[Sequence[int], Sequence[float], int, Sequence[float]]:
    return line.steps, line.values, line.style, line.raw


def _plain(value: float) -> str:
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else _small(value)


def _count(value: float) -> str:
    """Write 20000 as 20k, which fits beside an axis."""
    return f"{value / 1000:g}k" if value >= 10_000 and value % 100 == 0 else f"{value:,.0f}"


def _small(value: float) -> str:
    """Write 0.00075 as 7.5e-4, which fits beside an axis."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.2g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _draw(panel: Panel) -> Plot:
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, facecolor=PAPER)
    axes = figure.add_axes((0.13, 0.16, 0.63 if _has_labels(panel) else 0.72, 0.65), facecolor=PAPER)
    figure.text(0.015, 0.985, panel.title, color=INK, fontsize=10, fontweight="bold", va="top")
    figure.text(0.015, 0.905, panel.unit, color=INK, fontsize=8.5, va="top")
    _prepare(axes, panel)
    lines = [line for line in panel.lines if len(line.steps)]
    for line in lines:
        _draw_line(axes, line)
    _limit(axes, panel, lines)
    _label(axes, panel, lines)
    return Plot(panel.name, panel.title, _note(panel, lines), _svg(figure), _png(figure))


def _has_labels(panel: Panel) -> bool:
    return any(line.label for line in panel.lines)


def _prepare(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.spines["bottom"].set_linewidth(0.7)
    axes.grid(axis="y", color=FAINT, linewidth=0.4, alpha=0.7)
    axes.tick_params(colors=INK, length=0, pad=4, labelsize=8.5)
    axes.tick_params(axis="x", length=3, width=0.6, color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.tick(value)))
    axes.text(1, -0.125, "step", transform=axes.transAxes, color=INK, fontsize=8.5, ha="center", va="top")


def _draw_line(axes: Axes, line: Line) -> None:
    color, few = LINES[line.style], len(line.steps) <= FEW
    if line.raw and list(line.raw) != list(line.values):
        axes.plot(line.steps, line.raw, color=FAINT, linewidth=0.7, solid_joinstyle="round")
    every = 1 if few else len(line.steps) // 8
    (drawn,) = axes.plot(
        line.steps,
        line.values,
        color=color,
        linewidth=1.15,
        marker=MARKERS[line.style],
        markevery=every,
        markersize=3.2 if line.validation else 2.4,
        markerfacecolor=PAPER if line.validation else color,
        markeredgewidth=0.9,
        solid_joinstyle="round",
    )
    if DASHES[line.style]:
        drawn.set_dashes(DASHES[line.style])


def _limit(axes: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    """Leave air above and below, and begin at zero where a share of the whole is to be seen."""
    values = [value for line in lines for value in (*line.values, *line.raw)]
    low, high = min(values), max(values)
    low = min(0.0, low) if panel.from_zero or low < 0.35 * high else low
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    axes.set_ylim(low if low == 0 else low - room, high + room)
    last = max(line.steps[-1] for line in lines)
    first = min(line.steps[0] for line in lines)
    axes.set_xlim(min(first, last - 1), last)
    for each in axes.lines:
        each.set_clip_on(False)


def _label(axes: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    """Write each line's name and last value beside its end, with a leader where that is further away."""
    low, high = axes.get_ylim()
    height = (high - low) * (0.22 if _has_labels(panel) else 0.1)
    places = spread([line.values[-1] for line in lines], height, lowest=low + 0.3 * height)
    for line, place in zip(lines, places, strict=True):
        is_near = line.steps[-1] == axes.get_xlim()[1] and abs(place - line.values[-1]) < height / 2
        axes.annotate(
            "\n".join(part for part in (_shortened(line.label), panel.tick(line.values[-1])) if part),
            xy=(line.steps[-1], line.values[-1]),
            xytext=(1.035, place),
            textcoords=("axes fraction", "data"),
            arrowprops=None if is_near else _leader(),
            va="center",
            color=LINES[line.style],
            fontsize=8.5,
            linespacing=1.15,
        )


def _leader() -> dict[str, Any]:
    return {
        **{"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "linestyle": (0, (1, 2))},
        **{"relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3},
    }


def _shortened(label: str) -> str:
    return label if len(label) <= 16 else f"...{label[-14:]}"


def _note(panel: Panel, lines: Sequence[Line]) -> str:
    """Say in words what a plot shows, for those who don't see it."""
    told = [
        f"{line.label + ': ' if line.label else ''}from {panel.tick(line.values[0])} at step {line.steps[0]:,} "
        f"to {panel.tick(line.values[-1])} at step {line.steps[-1]:,}"
        for line in lines
    ]
    return f"{panel.title}{', ' + panel.unit if panel.unit else ''}; " + "; ".join(told)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH)
    return buffer.getvalue()


def _svg(figure: Figure) -> str:
    """Return the figure as SVG to stand in a page: no header, no numbered ids, the page's letters and colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib\.axis|grid)_?\d*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
