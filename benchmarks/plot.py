"""The tables as one figure: a panel for each family, times and memory over the reference's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from matplotlib.transforms import ScaledTranslation

from benchmarks.timing import Rounds, Table, ratios
from lipbook.lab import plots

MARKERS = "osDv^"


def panel(axes: Axes, results: Sequence[tuple[Table, Rounds]]) -> None:
    """Draw the medians of tables that share their rows, with bars from least to largest."""
    table = results[0][0]
    names = list(dict.fromkeys(name for table, _ in results for name in table.steps))
    axes.axvline(1, color="0.6", linewidth=1)
    for index, (each, rounds) in enumerate(results):
        values = ratios(rounds, each.reference)
        rows = [names.index(name) for name in values]
        low, middle, high = zip(*values.values(), strict=True)
        axes.plot(
            middle, rows, MARKERS[index], color=plots.COLOURS[index], alpha=0.8, label=each.label
        )
        axes.hlines(rows, low, high, color=plots.COLOURS[index], linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))
    axes.set_yticks(range(len(names)), names)
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text().startswith("lipbook") else "normal")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.set_title(table.family, loc="left", x=0, fontweight="bold")
    axes.set_xlabel(f"{'time' if table.unit == 'ms' else 'bytes'} / {table.reference}")
    below = ScaledTranslation(0, -0.45, axes.figure.dpi_scale_trans)
    place = {"bbox_to_anchor": (0, 0), "bbox_transform": axes.transAxes + below}
    axes.legend(loc="upper left", borderaxespad=0, **place)


def drawn(results: Sequence[tuple[Table, Rounds]]) -> Figure:
    """Draw a panel for each family."""
    plots.style()
    families: dict[str, list[tuple[Table, Rounds]]] = {}
    for table, rounds in results:
        families.setdefault(table.family, []).append((table, rounds))
    rows = [
        len({name for table, _ in group for name in table.steps}) + len(group) + 3
        for group in families.values()
    ]
    drawing, panels = plt.subplots(
        len(rows),
        1,
        figsize=(1.6 * plots.WIDTH, 0.27 * sum(rows)),
        height_ratios=rows,
        squeeze=False,
    )
    for axes, group in zip(panels[:, 0], families.values(), strict=True):
        panel(axes, group)
    return drawing


def figure(results: Sequence[tuple[Table, Rounds]], to: Path) -> None:
    """Write the figure as SVG whose bytes depend on the numbers alone."""
    drawing, written = drawn(results), io.StringIO()
    drawing.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(drawing)
    to.write_text(plots.compact_svg(written.getvalue()), "utf-8")
