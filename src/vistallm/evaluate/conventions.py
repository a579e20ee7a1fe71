"""Scores of a predictions file in every convention of the field, with intervals, and who may stand beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vistallm.evaluate.benchmarks import Benchmark
from vistallm.evaluate.predictions import Faults, by_benchmark
from vistallm.metrics import METRICS, SCORE_NAMES
from vistallm.metrics.scores import Row, fact, groups_of, mean
from vistallm.schema import Prediction

RESAMPLES = 1000


def write_conventions(
    path: Path, benchmarks: Mapping[str, Benchmark], predictions: Sequence[Prediction], faults: Faults
) -> None:
    """Write and print a table per benchmark, as Markdown."""
    groups = by_benchmark(one for one in predictions if one.score is not None and not one.forced)
    tables = [compare(benchmarks[name], group, bool(faults.found.get(name))) for name, group in groups.items()]
    path.write_text("\n".join(line for table in tables for line in [*table, ""]), encoding="utf-8")
    print(path.read_text(encoding="utf-8"), end="")


def compare(benchmark: Benchmark, predictions: Sequence[Prediction], incomplete: bool = False) -> list[str]:
    """Return the Markdown table of a benchmark: every score that its class measures, its 95% interval, and the rows.

    A published row stands beside the score of its own definition alone, and beside none where the samples are others.
    """
    known = bool(METRICS[benchmark.metric].means) and all(fact(one, "ref_id") is not None for one in predictions)
    metric = METRICS[benchmark.metric]("ref_id" if known else None)
    metric.update(predictions)
    images = {one.id: str((fact(one, "image_ids") or [one.id])[0]) for one in predictions}
    sums = row_sums(metric.rows(), images, metric.means if known else ())
    others = "" if benchmark.paper else "No published row is known."
    if benchmark.paper and (incomplete or benchmark.size not in (None, len(predictions))):
        size = benchmark.size or "the"
        others = f"No published row stands beside: they are of all {size} samples, these scores are not."
    lines = [f"## {benchmark.name}: {len(predictions)} samples of {len(set(images.values()))} images", ""]
    lines += ["| score | value | 95% interval | published rows of this definition |", "|---|---|---|---|"]
    for name, pairs in sums.items():
        rows = [(row, row["scores"][name]) for row in benchmark.paper if name in row["scores"]]
        beside = ", ".join(f"{row['model']} {value} ({row.get('note', row['source'])})" for row, value in rows)
        low, high = interval(pairs)
        value = 100 * pairs[:, 0].sum() / max(pairs[:, 1].sum(), 1e-9)
        text = SCORE_NAMES.get(name, name)
        lines.append(f"| {text} | {value:.1f} | {100 * low:.1f} to {100 * high:.1f} | {'' if others else beside} |")
    return [*lines, "", f"Intervals: {RESAMPLES} bootstrap samples of images. " + others]


def row_sums(rows: Sequence[Row], images: Mapping[str, str], means: Sequence[str]) -> dict[str, np.ndarray]:
    """Return score -> (images, 2) float64, what each image adds to its two sums; `means` also per instance."""
    names = [name for name in SCORE_NAMES if isinstance(rows[0].get(name), list) and len(rows[0][name]) == 2]
    number = {image: i for i, image in enumerate(sorted({images[row["id"]] for row in rows}))}
    sums = {name: np.zeros((len(number), 2)) for name in names}
    for row in rows:
        for name in names:
            sums[name][number[images[row["id"]]]] += row[name]
    for name in means:
        own = sums[f"{name}_instance"] = np.zeros((len(number), 2))
        for group in groups_of(rows):
            value = mean(row[name][0] / row[name][1] for row in group if row[name][1])
            own[number[images[group[0]["id"]]]] += (0, 0) if value is None else (value, 1)
    return {name: pairs for name, pairs in sums.items() if pairs[:, 1].any()}


def interval(pairs: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile interval of a ratio of sums, (n, 2) float64, over bootstrap samples of the n rows."""
    draws = np.random.default_rng(seed).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), RESAMPLES)
    above, below = (draws @ pairs).T
    low, high = np.percentile((above / np.maximum(below, 1e-9))[below > 0], (2.5, 97.5))
    return float(low), float(high)
