"""Scored predictions -> the figures of the report that say what limits the scores and what a confidence is worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from vistallm.evaluate.benchmarks import BenchmarkScores
from vistallm.evaluate.confidence import RIGHT_FROM, calibrate, rejection_curve
from vistallm.evaluate.families import FAMILIES
from vistallm.evaluate.plots import Curve, Figure, line_plot, precision_curve
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


def precision(order: Sequence[BenchmarkScores], groups: Groups, names: Mapping[str, str]) -> list[Figure]:
    """Pr@ as a curve over all thresholds, of the mask tasks; samples without a target have no IoU and are left out."""
    curves = {}
    for one in order:
        found = [p.score or 0.0 for p in groups[one.name] if p.target.get("regions")]
        if FAMILIES[one.metric].masks and found:
            curves[names[one.name]] = precision_curve(found)
    return [
        Figure("Precision at every IoU threshold", line_plot(part, "IoU threshold", "share at or above", square=True))
        for part in _parts(curves)
    ]


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


def outcomes(predictions: Sequence[Prediction], metric: str) -> tuple[Counter[str], str | None]:
    """Count how the answers of a benchmark went; also the most common failure, None without any."""
    counts = Counter(outcome(prediction, metric) for prediction in predictions)
    failed = [key for key in OUTCOMES if counts[key] and key != "right"]
    return counts, max(failed, key=lambda key: counts[key], default=None)


def failures(order: Sequence[BenchmarkScores], names: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """Unreadable answers: (reason, how many, from which benchmarks), most first."""
    reasons: dict[str, dict[str, int]] = {}
    for one in order:
        for reason, number in one.failures.items():
            reasons.setdefault(reason, {})[names[one.name]] = number
    found = [
        (reason, sum(tasks.values()), ", ".join(f"{task} {number}" for task, number in tasks.items()))
        for reason, tasks in reasons.items()
    ]
    return sorted(found, key=lambda row: -row[1])


def confidence(order: Sequence[BenchmarkScores], groups: Groups, names: Mapping[str, str]) -> list[Figure]:
    """Reliability of the confidences with its ECE, and rejection where samples may have no target."""
    curves, rejections = {}, []
    for one in order:
        name = names[one.name]
        if (found := calibrate(groups[one.name], one.metric)) is not None:
            curves[f"{name}, ECE {100 * found.ece:.0f}%"] = (found.confidence, found.right)
        if (lines := rejection_curve(groups[one.name])) is not None:
            plot = line_plot(lines, "share of regions taken back, least present first", "share", square=True)
            note = "At 0 the answers as given; further right, more are emptied."
            rejections.append(Figure(f"Rejection, {name}", plot, note))
    right = "Right: IoU of at least 0.5, every box, or the right candidate."
    return [
        Figure("Reliability", line_plot(part, "mean confidence", "share right", square=True, diagonal=True), right)
        for part in _parts(curves)
    ] + rejections


def _parts(curves: Mapping[str, Curve]) -> list[dict[str, Curve]]:
    items = list(curves.items())
    return [dict(items[start : start + MAX_LINES]) for start in range(0, len(items), MAX_LINES)]
