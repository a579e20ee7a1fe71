"""One ablation's numbers -> a plot: seeds as dots, mean and 95% interval; the ceiling stands under the arm's name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.figure
import numpy as np

from vistallm.evaluate.plots import LINES, PLOT_STYLE, SOFT

if TYPE_CHECKING:
    from vistallm.ablation.results import Result


def draw(result: Result, path: Path) -> None:
    """Write `path`.png and `path`.svg; arms without a finished run stay blank."""
    ablation, arms = result.ablation, result.arms
    places = np.array([float(arm.name) for arm in arms]) if ablation.axis else np.arange(len(arms), dtype=float)
    with matplotlib.rc_context(PLOT_STYLE):
        figure = matplotlib.figure.Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        means = np.array([100 * arm.score[0] for arm in arms])
        if ablation.axis:
            axes.plot(places, means, color=LINES[0], linewidth=1.4)
        for place, arm, mean in zip(places, arms, means, strict=True):
            colour = LINES[0] if arm.name == ablation.better else SOFT
            axes.plot([place] * len(arm.scores), 100 * np.array(arm.scores), ".", color=colour, alpha=0.45)
            axes.errorbar(place, mean, 100 * np.nan_to_num(arm.score[1]), fmt="o", color=colour, capsize=4)
        # Scores lie far below their ceilings at small budgets: one scale for both would hide what differs.
        below = [f"\nceiling {100 * arm.ceiling:.1f}" if arm.ceiling is not None else "" for arm in arms]
        if ablation.axis:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(places, [arm.name + text for arm, text in zip(arms, below, strict=True)], fontsize=8)
        axes.set_xlabel(ablation.axis or "")
        axes.set_ylabel(f"{ablation.metric[0]} {ablation.metric[1]} x 100")
        axes.margins(x=0.15)
        figure.savefig(path.with_suffix(".png"), dpi=160)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
