"""Scores, predictions and a run's history -> report.html: one page that needs nothing beside itself.

Images are data URIs, plots inline SVG, style and script inside the page, whose frame is `report.html`, `report.css` and
`report.js` beside this module.
"""

from __future__ import annotations

import html
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from vistallm.coinit.tasks import TASKS
from vistallm.evaluate import analysis
from vistallm.evaluate.benchmarks import BenchmarkScores, Scores
from vistallm.evaluate.families import SCORE_NAMES
from vistallm.evaluate.gallery import gallery
from vistallm.evaluate.plots import Curve, curve, line_plot, read_columns, sparkline
from vistallm.schema import Prediction

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
_LEGEND = " ".join(
    f'<span class="legend"><i class="key {key}-key"></i>{name}</span>'
    for key, name in (("answer", "answer"), ("truth", "truth"), ("given", "given in the prompt"))
)


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
    titles = {one.name: _title(one) for one in order}
    groups = {one.name: [p for p in predictions if p.benchmark == one.name] for one in order}
    short = {one.name: _short(one) for one in order}
    heads, headlines = _headlines(order)
    page = string.Template(_asset("report.html")).substitute(
        title=html.escape(title),
        css=_asset("report.css"),
        js=_asset("report.js"),
        summary=_summary(order),
        heads=heads,
        headlines=headlines,
        all_scores="\n".join(_all_scores(one) for one in order),
        legend=_LEGEND,
        task_options="".join(
            f'<option value="{html.escape(name)}">{html.escape(titles[name])}</option>' for name in groups
        ),
        cards=gallery(groups, images, short),
        outcomes=analysis.outcomes(order, groups, titles),
        analysis=analysis.precision(order, groups, short) + analysis.failures(order, short),
        confidence=analysis.confidence(order, groups, short),
        published=_published(order),
        speed=_speed(run or {}),
        training=_training(history or {}),
        facts="".join(f"<div><dt>{html.escape(k)}</dt><dd>{_fact(v)}</dd></div>" for k, v in (run or {}).items()),
        config=html.escape(config),
    )
    path.write_text(page, encoding="utf-8")


def _asset(name: str) -> str:
    return resources.files("vistallm.evaluate").joinpath(name).read_text("utf-8")


def _title(one: BenchmarkScores) -> str:
    return TITLES.get(one.task, one.task) if one.name.startswith("mini_") else one.name


def _short(one: BenchmarkScores) -> str:
    """The part of the title in brackets, "RES", where there is one."""
    return _title(one).rpartition("(")[2].rstrip(")")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _fact(value: Any) -> str:
    if not isinstance(value, float):
        return html.escape(str(value))
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _summary(order: Sequence[BenchmarkScores]) -> str:
    samples = sum(one.n for one in order)
    unread = sum(sum(one.failures.values()) for one in order)
    share = 100 * unread / max(samples, 1)
    return f"{samples:,} answers on {len(order)} benchmarks; {unread:,} ({share:.1f}%) could not be read."


def _headlines(order: Sequence[BenchmarkScores]) -> tuple[str, str]:
    """The headline table's optional column heads and its rows; a column that no benchmark fills is left out."""
    columns = [_columns(one) for one in order]
    labels = [label for label in columns[0] if any(row[label] for row in columns)] if columns else []
    rows = []
    for one, row in zip(order, columns, strict=True):
        bad = {"Unreadable"} if one.unreadable > 0.01 else set()
        cells = (f'<td data-label="{label}"{" class=bad" * (label in bad)}>{row[label]}</td>' for label in labels)
        rows.append(f"<tr>{_result(one)}{''.join(cells)}</tr>")
    return "".join(f"<th>{label}</th>" for label in labels), "\n".join(rows)


def _result(one: BenchmarkScores) -> str:
    name, value = one.headline, one.scores[one.headline]
    ceiling = (one.ceiling or {}).get(name)
    tick = "" if ceiling is None else f'<b style="left:{100 * min(ceiling, 1):.1f}%"></b>'
    full = 10.0 if name == "cider" else 1.0  # a caption equal to its one reference has a CIDEr of 10
    bar = f'<span class="bar"><i style="width:{100 * min(1, (value or 0) / full):.1f}%"></i>{tick}</span>'
    return (
        f'<td class="name">{html.escape(_title(one))}</td><td class="metric">{html.escape(SCORE_NAMES[name])}</td>'
        f'<td class="value"><strong>{_percent(value) or "–"}</strong>{bar}</td>'
    )


def _columns(one: BenchmarkScores) -> dict[str, str]:
    name = one.headline
    paper = "; ".join(
        f"{row['scores'][name]:.1f} ({row['model']})" for row in _paper_rows(one) if name in row["scores"]
    )
    return {
        "Ceiling": _percent((one.ceiling or {}).get(name)),
        "Known pairs": _percent(_split(one, "seen", name)),
        "New pairs": _percent(_split(one, "held_out", name)),
        "Published": html.escape(paper),
        "Samples": f"{one.n:,}",
        "Unreadable": f"{100 * one.unreadable:.1f}%",
    }


def _paper_rows(one: BenchmarkScores) -> list[dict[str, Any]]:
    """The rows of the system that this code follows; other systems stand in the table of published results."""
    return [row for row in one.paper if str(row["model"]).startswith("VistaLLM")]


def _published(order: Sequence[BenchmarkScores]) -> str:
    """The section that sets our scores beside published ones: a table per benchmark, only columns that others fill."""
    tables = []
    for one in order:
        names = [name for name in one.scores if any(name in row["scores"] for row in one.paper)]
        if not names:
            continue
        heads = "".join(f"<th>{html.escape(SCORE_NAMES[name])}</th>" for name in names)
        ours = "".join(f"<td>{_percent(one.scores[name]) or '–'}</td>" for name in names)
        rows = [f'<tr class="ours"><td>this run<small>{one.n:,} samples</small></td>{ours}</tr>']
        if one.ceiling and any(one.ceiling.get(name) is not None for name in names):
            ceilings = "".join(f"<td>{_percent(one.ceiling.get(name))}</td>" for name in names)
            rows.append(f'<tr class="limit"><td>mask ceiling<small>perfect polygons</small></td>{ceilings}</tr>')
        for row in sorted(one.paper, key=lambda row: row not in _paper_rows(one)):
            values = (row["scores"].get(name) for name in names)
            cells = "".join("<td></td>" if value is None else f"<td>{value:.1f}</td>" for value in values)
            source = f"{html.escape(str(row['model']))}<small>{html.escape(str(row['source']))}</small>"
            rows.append(f"<tr><td>{source}</td>{cells}</tr>")
        tables.append(
            f'<table class="published"><caption>{html.escape(_title(one))}</caption><thead><tr><th>System</th>{heads}'
            f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )
    note = (
        "Per cent. Compare a score only with the same score: VistaLLM's masks on RefCOCO are scored by mIoU, most "
        "other systems' by cIoU. Blank: no source at hand gives it."
    )
    return (
        f"<section id=published><h2>Beside published results</h2><p class=note>{note}</p>"
        f"<div class=tables>{''.join(tables)}</div></section>"
        if tables
        else ""
    )


def _speed(run: Mapping[str, Any]) -> str:
    """The figures of speed as tiles; nothing where predictions were only scored."""
    names = ("samples per second", "tokens per second", "seconds per image", "seconds of generation")
    tiles = "".join(f"<div><dd>{_fact(run[name])}</dd><dt>{name}</dt></div>" for name in names if name in run)
    device = f"<p class=note>Generation on {html.escape(str(run['device']))}.</p>" if "device" in run else ""
    return f'<dl class="tiles">{tiles}</dl>{device}' if tiles else ""


def _split(one: BenchmarkScores, split: str, name: str) -> float | None:
    return one.splits.get(split, {"scores": {}})["scores"].get(name)


def _all_scores(one: BenchmarkScores) -> str:
    rows = [f'<tr><th scope="rowgroup" colspan="5">{html.escape(_title(one))}</th></tr>']
    for name, value in one.scores.items():
        cells = (value, (one.ceiling or {}).get(name), _split(one, "seen", name), _split(one, "held_out", name))
        values = "".join(f"<td>{_percent(cell)}</td>" for cell in cells)
        rows.append(f"<tr><td>{html.escape(SCORE_NAMES[name])}</td>{values}</tr>")
    return f"<tbody>{''.join(rows)}</tbody>"


def _training(history: Mapping[str, Path]) -> str:
    parts = []
    for label, path in history.items():
        columns = read_columns(path)
        if not columns:
            continue
        losses: dict[str, Curve | None] = {"training": curve(columns, "loss"), "validation": curve(columns, "val_loss")}
        drawn = {name: line for name, line in losses.items() if line is not None}
        plots = analysis.figure("Loss", line_plot(drawn, "step", "loss per token", log_y=True)) if drawn else ""
        if (rate := curve(columns, "lr")) is not None:
            plots += analysis.figure("Learning rate", line_plot({"learning rate": rate}, "step", "learning rate"))
        parts.append(
            f"<h3>{html.escape(label)}</h3>{_pace(columns)}<div class=plots>{plots}</div>{_task_losses(columns)}"
        )
    return f"<section id=training><h2>Training</h2>{''.join(parts)}</section>" if parts else ""


def _pace(columns: Mapping[str, np.ndarray]) -> str:
    seconds, samples = (float(np.nansum(columns.get(name, np.zeros(1)))) for name in ("seconds", "samples"))
    if not seconds:
        return ""
    rate = f", {samples:,.0f} samples, {samples / seconds:,.0f} samples per second" if samples else ""
    return f"<p class=note>{int(np.nanmax(columns['step'])):,} steps in {seconds / 60:,.1f} minutes{rate}.</p>"


def _task_losses(columns: Mapping[str, np.ndarray]) -> str:
    cells = []
    for name in columns:
        line = curve(columns, name, 40) if name.startswith("loss/") else None
        if line is not None:
            cells.append(
                f"<div><span>{html.escape(name[5:])}</span><span>{line[1][-1]:.2f}</span>{sparkline(line[1])}</div>"
            )
    return f"<h4>Loss by task, with its last value</h4><div class=sparks>{''.join(cells)}</div>" if cells else ""
