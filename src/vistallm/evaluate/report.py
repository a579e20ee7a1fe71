"""Scores, predictions and a run's history -> report.html: one page that needs nothing beside itself.

The page is the Jinja template `report.html` beside this module, with `report.css` and `report.js` in it; images are
data URIs, plots inline SVG. Here stands what the template is filled with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from vistallm.evaluate import analysis
from vistallm.evaluate.benchmarks import BenchmarkScores, Scores
from vistallm.evaluate.families import SCORE_NAMES
from vistallm.evaluate.gallery import make_card, pick, short_text
from vistallm.evaluate.plots import Figure, curve, line_plot, read_columns, sparkline
from vistallm.evaluate.predictions import by_benchmark
from vistallm.schema import Prediction
from vistallm.tasks import TASKS

TITLES = {
    "caption": "Image captions",
    "reg": "Region captions",
    "vqa": "Questions (VQA)",
    "rec": "Referring boxes (REC)",
    "res": "Referring masks (RES)",
    "grec": "Boxes: none, one or more (GREC)",
    "gres": "Masks: none, one or more (GRES)",
    "pointqa": "Questions at a point (PointQA)",
    "boxqa": "Questions on a box (BoxQA)",
    "v7w": "Pointing among boxes (Visual7W)",
    "vcr": "Choice with reason (VCR)",
    "pope": "Presence, yes or no (POPE)",
    "nlvr2": "Statements on two images (NLVR2)",
    "coseg": "Co-segmentation (CoSeg)",
    "attcoseg": "Co-segmentation by attribute (AttCoSeg)",
    "v7w_point": "Pointing by a point (Visual7W)",
    "vqa_e": "Questions with explanation (VQA-E)",
    "flickr": "Grounded captions (Flickr30k)",
    "instruct": "Conversation",
}
COLUMNS = ("Ceiling", "Known pairs", "New pairs", "Published", "Samples", "Unreadable")
TILES = ("samples per second", "tokens per second", "seconds per image", "seconds of generation")


def write_report(
    path: Path,
    scores: Scores,
    predictions: Sequence[Prediction],
    images: Mapping[str, Sequence[np.ndarray]] | None = None,
    *,
    title: str = "VistaLLM evaluation",
    history: Mapping[str, Path] | None = None,
    run: Mapping[str, Any] | None = None,
    config: str = "",
) -> None:
    """Write the report.

    Args:
        path: of the HTML file.
        scores: from `benchmarks.score`, which has also filled the predictions' scores.
        predictions: those that were scored.
        images: prediction id -> its images, each (H, W, 3) uint8 RGB; predictions without any are drawn on a canvas.
        title: heading.
        history: label ("Stage 1") -> metrics.csv of the run that trained it; missing files are left out.
        run: facts to list (seconds, samples per second, device, ...), by name.
        config: the resolved configuration as text.
    """
    # Masks first: overlays are what a reader comes for.
    kinds = ("mask", "box", "point", "text")
    order = sorted(scores.values(), key=lambda one: kinds.index(TASKS[one.task].kind))
    groups, images, run = by_benchmark(predictions), images or {}, run or {}
    titles = {one.name: TITLES.get(one.task, one.task) if one.name.startswith("mini_") else one.name for one in order}
    # the part of a title in brackets, "RES", where there is one
    short = {name: words.rpartition("(")[2].rstrip(")") for name, words in titles.items()}
    columns = {one.name: _columns(one) for one in order}
    chosen = [(group, one) for name in titles for group, one in pick(groups[name])]
    page = _template().render(
        title=title,
        order=order,
        titles=titles,
        short=short,
        score_names=SCORE_NAMES,
        values=_values,
        summary=_summary(order),
        columns=columns,
        labels=[label for label in COLUMNS if any(row[label] for row in columns.values())],
        published=[found for found in map(_published, order) if found.names],
        cards=[make_card(one, group, images.get(one.id)) for group, one in chosen],
        outcome_words=analysis.OUTCOMES,
        outcomes=[(one, *analysis.outcomes(groups[one.name], one.metric)) for one in order],
        precision=analysis.precision(order, groups, short),
        failures=analysis.failures(order, short),
        confidence=analysis.confidence(order, groups, short),
        training=[found for label, file in (history or {}).items() if (found := _training(label, file))],
        run=run,
        tiles=[name for name in TILES if name in run],
        config=config,
    )
    path.write_text(page, encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vistallm", "evaluate"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "brief": _brief, "short_text": short_text}
    return environment.get_template("report.html")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _brief(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _summary(order: Sequence[BenchmarkScores]) -> str:
    samples = sum(one.n for one in order)
    unread = sum(sum(one.failures.values()) for one in order)
    share = 100 * unread / max(samples, 1)
    return f"{samples:,} answers on {len(order)} benchmarks; {unread:,} ({share:.1f}%) could not be read."


def _values(one: BenchmarkScores, name: str) -> list[float | None]:
    """A score's result, its mask ceiling, and the results on known and on new pairs."""
    parts = (one.splits.get(split, {"scores": {}})["scores"] for split in ("seen", "held_out"))
    return [one.scores[name], *(found.get(name) for found in (one.ceiling or {}, *parts))]


def _columns(one: BenchmarkScores) -> dict[str, str]:
    """The cells of `COLUMNS`; a column that no benchmark fills is left out of the page."""
    _, *own = map(_percent, _values(one, one.headline))
    rows = [row for row in one.paper if _is_followed(row) and one.headline in row["scores"]]
    paper = "; ".join(f"{row['scores'][one.headline]:.1f} ({row['model']})" for row in rows)
    return dict(zip(COLUMNS, (*own, paper, f"{one.n:,}", f"{100 * one.unreadable:.1f}%"), strict=True))


def _is_followed(row: Mapping[str, Any]) -> bool:
    """Whether a published row is of the system that this code follows."""
    return str(row["model"]).startswith("VistaLLM")


class Published(NamedTuple):
    """A benchmark beside published rows: the scores that any of them gives, and our ceilings of these, if any."""

    one: BenchmarkScores
    names: list[str]
    ceilings: list[float | None]
    rows: list[dict[str, Any]]


def _published(one: BenchmarkScores) -> Published:
    names = [name for name in one.scores if any(name in row["scores"] for row in one.paper)]
    ceilings = [_values(one, name)[1] for name in names]
    rows = sorted(one.paper, key=lambda row: not _is_followed(row))
    return Published(one, names, ceilings if any(value is not None for value in ceilings) else [], rows)


class Training(NamedTuple):
    """How one run of training went: its plots, and (task, last loss, curve) for every task."""

    label: str
    pace: str
    plots: list[Figure]
    task_losses: list[tuple[str, float, Markup]]


def _training(label: str, path: Path) -> Training | None:
    columns = read_columns(path)
    if not columns:
        return None
    losses = {"training": curve(columns, "loss"), "validation": curve(columns, "val_loss")}
    drawn = {name: line for name, line in losses.items() if line is not None}
    plots = [Figure("Loss", line_plot(drawn, "step", "loss per token", log_y=True))] if drawn else []
    if (rate := curve(columns, "lr")) is not None:
        plots.append(Figure("Learning rate", line_plot({"learning rate": rate}, "step", "learning rate")))
    tasks = {name: curve(columns, name, 40) for name in columns if name.startswith("loss/")}
    sparks = [(name[5:], line[1][-1], sparkline(line[1])) for name, line in tasks.items() if line is not None]
    return Training(label, _pace(columns), plots, sparks)


def _pace(columns: Mapping[str, np.ndarray]) -> str:
    seconds, samples = (float(np.nansum(columns.get(name, np.zeros(1)))) for name in ("seconds", "samples"))
    if not seconds:
        return ""
    rate = f", {samples:,.0f} samples, {samples / seconds:,.0f} samples per second" if samples else ""
    return f"{int(np.nanmax(columns['step'])):,} steps in {seconds / 60:,.1f} minutes{rate}."
