"""Scores, predictions and a run's history -> report.html: one page that needs nothing beside itself.

The page is the Jinja template `report.html` beside this module, with `report.css` and `report.js` in it; images are
data URIs, plots inline SVG. This module computes what the template is filled with.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from vistallm.evaluate.benchmarks import BenchmarkScores, Scores
from vistallm.evaluate.confidence import RIGHT_FROM, answer_confidence, calibration, rejection_curve
from vistallm.evaluate.gallery import draw_pictures, embed_images, pick, short_text
from vistallm.evaluate.plots import Curve, Plot, curve, line_plots, precision_curve, read_columns
from vistallm.evaluate.predictions import by_benchmark
from vistallm.metrics import METRICS, SCORE_NAMES, NamedScores
from vistallm.schema import Prediction
from vistallm.tasks import TASKS

WORDS: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TITLES, OUTCOMES = WORDS["titles"], WORDS["outcomes"]
TILES = ("samples per second", "tokens per second", "seconds per image", "seconds of generation")
FEW = 5  # a bin of fewer answers is not drawn
Card = tuple[str, list[tuple[Prediction, list[dict[str, Any]], float | None]]]  # group; answers, pictures, confidences
Benchmarks = list[tuple[BenchmarkScores, str, list[Prediction]]]  # scores, short name, and what was scored


def write_report(
    path: Path,
    scores: Scores,
    predictions: Sequence[Prediction],
    images: Mapping[str, Sequence[np.ndarray]] | None = None,
    history: Mapping[str, Path] | None = None,
    run: Mapping[str, Any] | None = None,
    config: str = "",
    beside: Mapping[str, Mapping[str, NamedScores]] | None = None,
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        scores: from `benchmarks.score`, which has also filled the predictions' scores.
        predictions: those that were scored.
        images: prediction id -> its images, each (H, W, 3) uint8 RGB; predictions without any are drawn on a canvas.
        history: label ("Stage 1") -> metrics.csv of the run that trained it; missing files are left out.
        run: facts to list (seconds, samples per second, device, ...), by name.
        config: the resolved configuration as text.
        beside: label -> benchmark -> scores of other evaluations, each a column.
    """
    # Masks first: overlays are what a reader comes for.
    kinds = ("mask", "box", "keypoints", "point", "text")
    order = sorted(scores.values(), key=lambda one: kinds.index(TASKS[one.task].kind))
    groups = by_benchmark(predictions)
    titles = {one.name: TITLES.get(one.task, one.task) if one.name.startswith("mini_") else one.name for one in order}
    links = any(one.head == "link" for one in order)
    short = {name: _abbreviation(words) for name, words in titles.items()}
    short |= {one.name: f"{short[one.name]}, {WORDS['heads'][one.head]}" for one in order if links}
    benchmarks = [(one, short[one.name], groups[one.name]) for one in order]
    texts, cards = _texts_of(order, groups), list[Card]()
    picked = [each for one in order if one.name not in texts.values() for each in pick(groups[one.name])]
    uris = embed_images({one.id: images[one.id] for _, one in picked if images and one.id in images})
    for group, prediction in picked:
        beside_it = (one for one in groups.get(texts.get(prediction.benchmark, ""), ()) if one.id == prediction.id)
        both = [*itertools.islice(beside_it, 1), prediction]
        cards.append((group, [(one, draw_pictures(one, uris.get(one.id)), answer_confidence(one)) for one in both]))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vistallm", "evaluate"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": _percent,
        "brief": _brief,
        "short_text": short_text,
        "abbreviation": _abbreviation,
    }
    columns = _columns(order, beside or {})
    named = [(one, [name for name in one.scores if any(name in row["scores"] for row in one.paper)]) for one in order]
    page = environment.get_template("report.html").render(
        order=order,
        titles=titles,
        short=short,
        score_names=SCORE_NAMES,
        links=links,
        unreadable=sum(sum(one.failures.values()) for one in order),
        columns=columns,
        published=[
            (one, names, sorted(one.paper, key=lambda row: not row["model"].startswith("VistaLLM")))
            for one, names in named
            if names
        ],
        cards=cards,
        shown={answers[-1][0].benchmark for _, answers in cards},
        heads=WORDS["heads"],
        outcome_words=OUTCOMES,
        outcomes=[(one, Counter(outcome(each, one.metric) for each in group)) for one, _, group in benchmarks],
        precision=_precision(benchmarks),
        failures=_failures(benchmarks),
        confidence=_confidence(benchmarks),
        training=[_training(label, found) for label, file in (history or {}).items() if (found := read_columns(file))],
        run=run or {},
        tiles=[name for name in TILES if name in (run or {})],
        config=config,
    )
    path.write_text(page, encoding="utf-8")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _abbreviation(title: str) -> str:
    """The abbreviation at the end of a title, "RES", where there is one."""
    return title.rpartition("(")[2].rstrip(")")


def _brief(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _columns(
    order: Sequence[BenchmarkScores], beside: Mapping[str, Mapping[str, NamedScores]]
) -> dict[str, dict[str, NamedScores]]:
    """Return column -> benchmark -> scores, of the columns that hold a headline."""
    columns = {label: {one.name: named.get(one.name, {}) for one in order} for label, named in beside.items()}
    columns["Teacher-forced"] = {one.name: one.teacher_forced or {} for one in order}
    columns["Ceiling"] = {one.name: one.ceiling or {} for one in order}
    for split, label in (("seen", "Seen pairs"), ("held_out", "Held-out pairs")):
        columns[label] = {one.name: one.splits.get(split, {"scores": {}})["scores"] for one in order}
    heads = {one.name: one.headline for one in order}
    return {
        label: column
        for label, column in columns.items()
        if any(scores.get(heads[name]) is not None for name, scores in column.items())
    }


def _texts_of(order: Sequence[BenchmarkScores], groups: Mapping[str, Sequence[Prediction]]) -> dict[str, str]:
    """Return benchmark answered by links -> the one in which text answers the same samples, where there is one."""
    ids = {name: {one.id for one in group} for name, group in groups.items()}
    texts = [one for one in order if one.head == "text"]
    return {
        one.name: text.name
        for one in order
        for text in texts
        if one.head == "link" and text.task == one.task and ids[one.name] & ids[text.name]
    }


def outcome(prediction: Prediction, metric: str) -> str:
    """Return the key of `OUTCOMES` that says how a scored answer went."""
    parsed, empty = prediction.parsed, bool(prediction.target.get("empty"))
    if parsed is None:
        return "unreadable"
    if (prediction.score or 0.0) >= RIGHT_FROM.get(metric, 0.5):
        return "right"
    if metric not in RIGHT_FROM:
        return "wrong"
    if empty or not prediction.sure_regions:
        return "imagined" if empty else "missed"
    return "inexact" if prediction.score else "elsewhere"


def _precision(benchmarks: Benchmarks) -> list[Plot]:
    """Pr@ as a curve over all thresholds, of the mask tasks; samples without a target have no IoU and are left out."""
    curves = {}
    for one, name, group in benchmarks:
        ious = [p.score or 0.0 for p in group if p.target.get("regions")]
        if METRICS[one.metric].masks and ious:
            curves[name] = precision_curve(ious)
    return line_plots("Precision at every IoU threshold", curves, "IoU threshold", "share at or above", "", "unit")


def _failures(benchmarks: Benchmarks) -> list[tuple[str, dict[str, int]]]:
    """Unreadable answers: (reason, benchmark -> how many), most frequent reason first."""
    reasons: dict[str, dict[str, int]] = {}
    for one, name, _ in benchmarks:
        for reason, number in one.failures.items():
            reasons.setdefault(reason, {})[name] = number
    return sorted(reasons.items(), key=lambda row: -sum(row[1].values()))


def _confidence(benchmarks: Benchmarks) -> list[Plot]:
    """Reliability of the confidences with its ECE, and rejection where samples may have no target."""
    curves: dict[str, Curve] = {}
    rejections = []
    for one, name, group in benchmarks:
        right_from = RIGHT_FROM.get(one.metric, np.inf)
        known = [(sure, (p.score or 0.0) >= right_from) for p in group if (sure := answer_confidence(p)) is not None]
        if known and one.metric in RIGHT_FROM:
            confidence, right, answers, ece = calibration([sure for sure, _ in known], [hit for _, hit in known])
            curves[f"{name}, ECE {100 * ece:.0f}%"] = (confidence[answers >= FEW], right[answers >= FEW])
        if (lines := rejection_curve(group)) is not None:
            x_label = "share of answers rejected, lowest presence first"
            note = "At 0: the answers as given. To the right, more answers count as “no target”."
            rejections += line_plots(f"Rejection, {name}", lines, x_label, "share", note, "unit")
    note = f"A dot is a bin of at least {FEW} answers. Right: IoU of at least 0.5, every box, or the right candidate."
    axes = ("mean confidence", "share right")
    return line_plots("Reliability", curves, *axes, note, "reliability") + rejections


def _training(label: str, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How one run of training went: its pace, its plots, and (task, curve of its loss) for every task."""

    def curves(names: Mapping[str, str]) -> dict[str, Curve]:
        return {words: line for name, words in names.items() if (line := curve(columns, name)) is not None}

    plots = line_plots("Loss", curves({"loss": "training", "val_loss": "validation"}), "step", "loss", "", "log")
    plots += line_plots("Learning rate", curves({"lr": "learning rate"}), "step", "learning rate")
    scores = {name: name.removeprefix("val/") for name in columns if name.startswith("val/")}
    plots += line_plots("Validation scores", curves(scores), "step", "score, share")
    tasks = {name[5:]: line for name in columns if name.startswith("loss/") and (line := curve(columns, name, 40))}
    pace = {name: float(np.nansum(columns.get(name, np.zeros(1)))) for name in ("seconds", "samples")}
    steps = float(np.nanmax(columns["step"]))
    return {"label": label, "steps": steps, **pace, "plots": plots, "losses": {k: y for k, (_, y) in tasks.items()}}
