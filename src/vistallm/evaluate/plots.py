"""Numbers of a run -> inline SVG for the report: metrics.csv rows and per-sample scores in, SVG text out."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

SOFT = "#6a7280"
LINES = ("#2f5bd7", "#d9480f", "#0b8a6a", "#8a3ffc", "#b58105", "#c2255c", "#1098ad", "#5c677d")
STYLE = Path(__file__).with_suffix(".mplstyle")
Curve = tuple[np.ndarray, np.ndarray]  # x and y, both (n,) float64


class Plot(NamedTuple):
    """A plot of the report; `note` is a sentence under its caption."""

    caption: str
    svg: Markup
    note: str = ""


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a metrics.csv, each (rows,) float64 with NaN for a blank cell; {} when there is no row."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in (rows[0] if rows else ())}


def curve(columns: Mapping[str, np.ndarray], name: str, points: int = 120) -> Curve | None:
    """Return a column against the step, averaged in at most `points` runs of rows; None where it has no number."""
    filled = np.flatnonzero(np.isfinite(columns.get(name, np.empty(0))))
    if not len(filled):
        return None
    runs = np.array_split(filled, min(points, len(filled)))
    steps, values = (np.array([columns[key][run].mean() for run in runs]) for key in ("step", name))
    return steps, values


def line_plots(
    caption: str, curves: Mapping[str, Curve], x_label: str, y_label: str, note: str = "", style: str = ""
) -> list[Plot]:
    """Draw named curves, one plot for every `len(LINES)` of them, more can't be told apart; none without a curve.

    `style`: "log" for a logarithmic y axis (where all values are positive), "unit" for axes from 0 to 1, "reliability"
    for these with dots in place of lines, beside the line y = x.
    """
    plots, names = [], list(curves)
    for start in range(0, len(names), len(LINES)):
        with matplotlib.rc_context(fname=STYLE):
            figure = Figure(figsize=(4.4, 2.9), layout="constrained")
            axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
            if style == "reliability":
                axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
            for colour, name in zip(LINES, names[start : start + len(LINES)], strict=False):
                dots = "o" if style == "reliability" else "o-" if len(curves[name][0]) < 20 else "-"
                axes.plot(*curves[name], dots, color=colour, linewidth=1.6, label=name, markersize=3.5)
            if style == "log" and all((y > 0).all() for _, y in curves.values()):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
            if style in ("unit", "reliability"):
                axes.set(xlim=(0, 1), ylim=(0, 1.02))
            if len(names) > 1 or style == "reliability":
                axes.legend(fontsize=8, handlelength=1.4)
            buffer = io.StringIO()
            figure.savefig(
                buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
            )
        svg = buffer.getvalue()
        plots.append(Plot(caption, Markup(_shorten(svg[svg.index("<svg") :])), note))
    return plots


def _shorten(svg: str) -> str:
    """Drop what no reader sees of matplotlib's SVG, half of it: names of groups, fonts, parts of a tenth of a point."""
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"|(?<=<g) id="[^"]*"|font-family: [^;]*; |\n *(?=<)', "", svg)
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda place: re.sub(r"(\.\d)\d+", r"\1", place[0]), svg)
    return re.sub(r"\s*([MLz]) ?(?=[\d\n\"-])", r"\1", svg)


def precision_curve(scores: Sequence[float]) -> Curve:
    """Return the share of samples whose score is at least t, for t = 0, 0.01, ..., 1."""
    thresholds = np.linspace(0, 1, 101)
    return thresholds, (np.asarray(scores, float)[None] >= thresholds[:, None]).mean(1)
