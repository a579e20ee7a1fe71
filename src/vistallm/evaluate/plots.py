"""Numbers of a run -> inline SVG for the report: metrics.csv rows and per-sample scores in, SVG text out."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.figure
import numpy as np
from markupsafe import Markup

SOFT = "#6a7280"
LINES = ("#2f5bd7", "#d9480f", "#0b8a6a", "#8a3ffc", "#b58105", "#c2255c", "#1098ad", "#5c677d")
MAX_LINES = len(LINES)  # of one plot: more can't be told apart
Curve = tuple[np.ndarray, np.ndarray]  # x and y, both (n,) float64

STYLE = Path(__file__).with_suffix(".mplstyle")


class Figure(NamedTuple):
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
    names = rows[0] if rows else {}
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def curve(columns: Mapping[str, np.ndarray], name: str, points: int = 120) -> Curve | None:
    """Return a column against the step, averaged in at most `points` runs of rows; None where it has no number."""
    filled = np.flatnonzero(np.isfinite(columns.get(name, np.empty(0))))
    if not len(filled):
        return None
    runs = np.array_split(filled, min(points, len(filled)))
    steps, values = (np.array([columns[key][run].mean() for run in runs]) for key in ("step", name))
    return steps, values


def line_plots(
    caption: str,
    curves: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    note: str = "",
    *,
    log_y: bool = False,
    square: bool = False,
    diagonal: bool = False,
) -> list[Figure]:
    """Draw named curves, at most `MAX_LINES` a figure; no figure without a curve.

    `square`: both axes run from 0 to 1; `diagonal`: points, beside the line y = x.
    """
    figures = []
    for start in range(0, len(curves), MAX_LINES):
        part = dict(list(curves.items())[start : start + MAX_LINES])
        with matplotlib.rc_context(fname=STYLE):
            figure = matplotlib.figure.Figure(figsize=(4.4, 2.9), layout="constrained")
            axes = figure.add_subplot()
            if diagonal:
                axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
            marker = "o" if diagonal else None
            for colour, (name, (x, y)) in zip(LINES, part.items(), strict=False):
                axes.plot(x, y, color=colour, linewidth=1.6, label=name, marker=marker, markersize=3.5)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            if log_y and all((y > 0).all() for _, y in part.values()):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
            if square:
                axes.set(xlim=(0, 1), ylim=(0, 1.02))
            if len(part) > 1 or diagonal:
                axes.legend(fontsize=8, handlelength=1.4)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
        figures.append(Figure(caption, Markup(svg[svg.index("<svg") :]), note))
    return figures


def sparkline(values: np.ndarray, width: int = 120, height: int = 30) -> Markup:
    """Draw (n,) values as one small line without axes; its floor is 0."""
    x = np.linspace(1, width - 1, len(values))
    y = height - 2 - (height - 4) * values / max(float(values.max()), 1e-12)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return Markup(
        f'<svg class="spark" viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{points}"/></svg>'
    )


def precision_curve(scores: Sequence[float]) -> Curve:
    """Return the share of samples whose score is at least t, for t = 0, 0.01, ..., 1."""
    thresholds = np.linspace(0, 1, 101)
    return thresholds, (np.asarray(scores, float)[None] >= thresholds[:, None]).mean(1)


def draw_arms(
    path: Path,
    arms: Mapping[str, tuple[Sequence[float], float, float, float]],
    best: str,
    axis: str | None,
    metric: str,
) -> None:
    """Write an ablation's plot as `path`.png and `path`.svg: seeds as dots, mean and 95% interval.

    Args:
        path: of the files, without suffix.
        arms: name -> (score of each seed, mean, half the interval, ceiling), in [0, 1], NaN where there is none.
        best: the arm in blue.
        axis: what the arms' names count, as a logarithmic axis; None: names in a row.
        metric: label of the scores.
    """
    places = np.array([float(name) if axis else number for number, name in enumerate(arms)], float)
    with matplotlib.rc_context(fname=STYLE):
        figure = matplotlib.figure.Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        if axis:
            axes.plot(places, [100 * mean for _, mean, *_ in arms.values()], color=LINES[0], linewidth=1.4)
            axes.set_xscale("log")
            axes.minorticks_off()
        for place, (name, (scores, mean, half, _)) in zip(places, arms.items(), strict=True):
            colour = LINES[0] if name == best else SOFT
            axes.plot([place] * len(scores), 100 * np.array(scores), ".", color=colour, alpha=0.45)
            axes.errorbar(place, 100 * mean, 100 * np.nan_to_num(half), fmt="o", color=colour, capsize=4)
        # Ceilings as words: scores of small budgets lie far below them, and one scale for both hides what differs.
        ceilings = [f"\nceiling {100 * top:.1f}" if np.isfinite(top) else "" for *_, top in arms.values()]
        axes.set_xticks(places, [name + text for name, text in zip(arms, ceilings, strict=True)], fontsize=8)
        axes.set(xlabel=axis or "", ylabel=f"{metric.replace('.', ' ')} x 100")
        axes.margins(x=0.15)
        figure.savefig(path.with_suffix(".png"), dpi=160)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
