"""Scored predictions -> the figures of the report that say what limits the scores and what a confidence is worth."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence

from vistallm.evaluate.benchmarks import BenchmarkScores
from vistallm.evaluate.confidence import RIGHT_FROM, calibrate, rejection_curve
from vistallm.evaluate.families import FAMILIES
from vistallm.evaluate.plots import line_plot, precision_curve
from vistallm.schema import Prediction

Groups = Mapping[str, Sequence[Prediction]]
MAX_LINES = 8  # of one plot: more can't be told apart
OUTCOMES = {
    "right": "right",
    "inexact": "in place, inexact",
    "elsewhere": "in the wrong place",
    "missed": "target not seen",
    "imagined": "target that is not there",
    "wrong": "wrong words",
    "unreadable": "unreadable",
}


def figure(caption: str, body: str, note: str = "") -> str:
    """Return a captioned figure; `note` is a sentence under the caption."""
    small = f"<small>{html.escape(note)}</small>" if note else ""
    return f"<figure><figcaption>{html.escape(caption)}{small}</figcaption>{body}</figure>"


def precision(order: Sequence[BenchmarkScores], groups: Groups, names: Mapping[str, str]) -> str:
    """Pr@ as a curve over all thresholds, of the mask tasks; samples without a target have no IoU and are left out."""
    curves = {}
    for one in order:
        if FAMILIES[one.metric].masks and (
            found := [p.score or 0.0 for p in groups[one.name] if p.target.get("regions")]
        ):
            curves[names[one.name]] = precision_curve(found)
    return "".join(
        figure("Precision at every IoU threshold", line_plot(part, "IoU threshold", "share at or above", square=True))
        for part in _parts(curves)
    )


def outcome(prediction: Prediction, metric: str) -> str:
    """Return the key of `OUTCOMES` that says how a scored answer went."""
    parsed, empty = prediction.parsed, bool(prediction.target.get("empty"))
    if parsed is None:
        return "unreadable"
    if (prediction.score or 0.0) >= RIGHT_FROM.get(metric, 0.5):
        return "right"
    if metric not in RIGHT_FROM:
        return "wrong"
    if empty or not parsed.regions:
        return "imagined" if empty else "missed"
    return "inexact" if prediction.score else "elsewhere"


def outcomes(order: Sequence[BenchmarkScores], groups: Groups, titles: Mapping[str, str]) -> str:
    """A table of stacked bars: how the answers of each benchmark went."""
    rows = []
    for one in order:
        counts = Counter(outcome(prediction, one.metric) for prediction in groups[one.name])
        shares = {key: 100 * counts[key] / one.n for key in OUTCOMES if counts[key]}
        parts = "".join(
            f'<i class="{key}" style="width:{share:.2f}%" title="{OUTCOMES[key]}: {counts[key]}"></i>'
            for key, share in shares.items()
        )
        worst = max((key for key in shares if key != "right"), key=lambda key: shares[key], default=None)
        said = "" if worst is None else f"{OUTCOMES[worst]} {shares[worst]:.0f}%"
        bar = f'<span class="stack">{parts}</span>'
        rows.append(f"<tr><td>{html.escape(titles[one.name])}</td><td>{bar}</td><td>{said}</td></tr>")
    keys = "".join(f'<span class="legend"><i class="key {key}"></i>{text}</span> ' for key, text in OUTCOMES.items())
    head = "<thead><tr><th>Task</th><th>Answers</th><th>Most common failure</th></tr></thead>"
    return f'<p class=note>{keys}</p><table class="outcomes">{head}<tbody>{"".join(rows)}</tbody></table>'


def failures(order: Sequence[BenchmarkScores], names: Mapping[str, str]) -> str:
    """Unreadable answers by reason, with the benchmarks they come from."""
    reasons: dict[str, dict[str, int]] = {}
    for one in order:
        for reason, number in one.failures.items():
            reasons.setdefault(reason, {})[names[one.name]] = number
    if not reasons:
        return figure("Unreadable answers", "<p class=note>None: every answer could be read.</p>")
    ranked = sorted(reasons.items(), key=lambda item: -sum(item[1].values()))
    most = sum(ranked[0][1].values())
    rows = []
    for reason, tasks in ranked:
        total, detail = sum(tasks.values()), ", ".join(f"{task} {number}" for task, number in tasks.items())
        rows.append(
            f"<tr><td>{html.escape(reason)}<small>{html.escape(detail)}</small></td><td>{total}</td>"
            f'<td><span class="bar"><i style="width:{100 * total / most:.0f}%"></i></span></td></tr>'
        )
    body = f'<table class="counts"><tbody>{"".join(rows)}</tbody></table>'
    return figure("Unreadable answers by reason", body)


def confidence(order: Sequence[BenchmarkScores], groups: Groups, names: Mapping[str, str]) -> str:
    """The section on confidences: reliability with its ECE, and rejection where samples may have no target."""
    curves, errors, rejections = {}, [], []
    for one in order:
        if (found := calibrate(groups[one.name], one.metric)) is not None:
            curves[f"{names[one.name]}, ECE {100 * found.ece:.0f}%"] = (found.confidence, found.right)
            errors.append((names[one.name], found))
        if (lines := rejection_curve(groups[one.name])) is not None:
            plot = line_plot(lines, "share of regions taken back, least present first", "share", square=True)
            rejections.append(
                figure(
                    f"Rejection, {names[one.name]}", plot, "At 0 the answers as given; further right, more are emptied."
                )
            )
    if not curves and not rejections:
        return ""
    plots = "".join(
        figure(
            "Reliability",
            line_plot(part, "mean confidence", "share right", square=True, diagonal=True),
            "Right: IoU of at least 0.5, every box, or the right candidate.",
        )
        for part in _parts(curves)
    )
    return (
        "<section id=confidence><h2>Confidence</h2><p class=note>A region's confidence is the geometric mean of its "
        "tokens' probabilities, an empty answer's the probability of saying so. Neighbouring coordinates share "
        "probability, so it ranks answers and is no chance of being right; ECE is the mean gap between the two. A "
        "threshold for rejection must be chosen on other data than it is reported on.</p>"
        f"<div class=plots>{plots}{''.join(rejections)}</div></section>"
    )


def _parts(curves: Mapping[str, tuple]) -> list[dict[str, tuple]]:
    items = list(curves.items())
    return [dict(items[start : start + MAX_LINES]) for start in range(0, len(items), MAX_LINES)]
