"""Predictions -> scores: benchmarks as entries of configs/benchmarks.yaml, scored from the predictions list alone.

`score` needs no model, image or shard, so anyone can recompute a table from predictions.jsonl.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf
from pycocotools import mask as coco_mask

from vistallm.evaluate.export import EXPORTS
from vistallm.evaluate.predictions import Faults, by_benchmark
from vistallm.evaluate.processes import exchange_device, from_all, share
from vistallm.metrics import METRICS, NamedScores, SampleScores
from vistallm.metrics.overlap import target_regions
from vistallm.metrics.scores import GROUPS, HELD_OUT, KEY, SCORE, digest, labelled
from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox
from vistallm.schema import Prediction
from vistallm.tasks import find_task

BENCHMARKS_FILE = Path(__file__).resolve().parents[3] / "configs" / "benchmarks.yaml"
SCORES_VERSION = 1
CEILING_SAMPLES = 1000  # targets put through the codec for a ceiling, evenly taken: writing a mask costs milliseconds


@dataclass(frozen=True)
class PaperRow:
    """A published row: `scores` are in the table's own unit (per cent) under our score names."""

    model: str
    source: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Benchmark:
    """One test set and how it is scored.

    Attributes:
        name: the key in benchmarks.yaml, and `Prediction.benchmark`.
        task: name in the task table; its first template is the prompt, its kind says how answers are read.
        data: the data config it belongs to ("mini" or "coinit"); shards: their folder, relative to data.root.
        metric: a key of `METRICS`; null in the file = the task's.
        headline: the score that stands for it; null in the file = the metric's.
        average: "ref_id" or "class": the metric's means are also averaged over the groups that share this meta value.
        export: submission file, a key of `EXPORTS`, or None.
        paper: published rows, for a real benchmark only.
    """

    name: str
    task: str
    data: str
    split: str
    shards: str
    metric: str
    headline: str
    average: str | None = None
    export: str | None = None
    paper: tuple[PaperRow, ...] = ()

    def new_metric(self) -> SampleScores:
        """Return the metric that scores it, without any sample."""
        return METRICS[self.metric](self.average).to(exchange_device())


@dataclass
class BenchmarkScores:
    """Scores of one benchmark.

    Attributes:
        headline: the name in `scores` that stands for the benchmark.
        n: samples; unreadable: share of them whose answer could not be read; failures: their number by reason.
        unlabelled: samples whose answer the dataset keeps to itself; they are exported and in no score.
        scores: name -> share in [0, 1], None where no sample counts.
        splits: "seen" and "held_out" (attribute combinations absent from training) -> {"n", "scores"}.
        cut: samples whose answer ended because decode.max_new_tokens was reached.
        faults: predictions that could not be read or scored; above 0 the benchmark is incomplete.
        ceiling: the same scores for (at most 1,000 of) the target masks put through the codec, None without masks.
    """

    name: str
    task: str
    metric: str
    headline: str
    n: int
    unreadable: float
    failures: dict[str, int]
    scores: NamedScores
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    ceiling: NamedScores | None = None
    paper: list[dict[str, Any]] = field(default_factory=list)
    unlabelled: int = 0
    cut: int = 0
    faults: int = 0


Scores = dict[str, BenchmarkScores]


def load_benchmarks(path: Path = BENCHMARKS_FILE) -> dict[str, Benchmark]:
    """Read benchmarks.yaml; raises ValueError naming the entry and the key that is wrong, all at once."""
    entries = cast(dict[str, dict[str, Any]], OmegaConf.to_container(OmegaConf.load(path)))
    found, problems = {}, []
    for name, entry in entries.items():
        try:
            found[name] = _read_entry(name, entry)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{path.name}, {name}: {'missing key ' if isinstance(error, KeyError) else ''}{error}")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _read_entry(name: str, entry: dict[str, Any]) -> Benchmark:
    known = {f.name for f in dataclasses.fields(Benchmark)} - {"name"}
    if unknown := set(entry) - known:
        raise ValueError(f"unknown key(s) {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    entry["metric"] = entry.get("metric") or find_task(entry["task"]).metric
    choices = {"metric": METRICS, "average": (*GROUPS, None), "export": (*EXPORTS, None)}
    for key, allowed in choices.items():
        if entry.get(key) not in allowed:
            raise ValueError(f"{key}: expected one of {', '.join(map(str, allowed))}, got {entry.get(key)!r}")
    metric = METRICS[entry["metric"]]
    entry["headline"] = entry.get("headline") or metric.headline or metric.names[0]
    rows = tuple(PaperRow(**row) for row in entry.pop("paper", ()))
    return Benchmark(name, **{"shards": ".", **entry}, paper=rows)


def select_benchmarks(
    benchmarks: Mapping[str, Benchmark], names: Iterable[str] | None, data: str
) -> dict[str, Benchmark]:
    """Return the named benchmarks, or all of a data config; ValueError names the nearest for an unknown name."""
    if names is None:
        return {name: benchmark for name, benchmark in benchmarks.items() if benchmark.data == data}
    names, problems = list(names), []
    for name in names:
        if name not in benchmarks:
            near = "".join(f"; nearest: {other}" for other in difflib.get_close_matches(name, benchmarks, 1))
            problems.append(f"benchmark {name!r}: no such entry in benchmarks.yaml{near}")
    if problems:
        raise ValueError("\n".join(problems))
    return {name: benchmarks[name] for name in names}


def score(
    predictions: list[Prediction],
    benchmarks: Mapping[str, Benchmark],
    codec: RegionCodec | None = None,
    faults: Faults | None = None,
) -> Scores:
    """Score predictions of any benchmarks, in any order, and fill `Prediction.score` of each.

    Every process calls it with all predictions, measures a share of them, and returns all scores.

    Args:
        predictions: of any benchmarks.
        benchmarks: by name; scores come in their order, those without predictions are left out.
        codec: with the run's settings; gives the mask ceilings, which are left out without it.
        faults: predictions and benchmarks that can't be scored are added to it, and the rest is scored; without it, the
            first fault is raised.

    Raises:
        ValueError: for an unknown benchmark, an id that occurs twice in one, or a missing or malformed target.
    """
    groups, scores, found = by_benchmark(predictions), {}, Faults() if faults is None else faults
    for name in [*(name for name in benchmarks if name in groups), *sorted(set(groups) - set(benchmarks))]:
        try:
            benchmark = select_benchmarks(benchmarks, [name], "")[name]
        except ValueError as error:
            found.add(name, str(error))
            continue
        one = _score_one(benchmark, groups[name], codec, found)
        if one.n:
            scores[name] = one
    if faults is None and found.found:
        raise ValueError("\n".join(chain(*found.found.values())))
    return scores


def _score_one(
    benchmark: Benchmark, predictions: list[Prediction], codec: RegionCodec | None, faults: Faults
) -> BenchmarkScores:
    name, metric, by_id = benchmark.name, benchmark.new_metric(), dict[str, Prediction]()
    for one in predictions:
        if one.id in by_id:
            faults.add(name, f"prediction {one.id} occurs more than once")
        by_id.setdefault(one.id, one)
    metric.update([])
    wrong: dict[str, str] = {}
    for key in share(list(by_id)):
        try:
            metric.update([by_id[key]])
        except ValueError as error:
            wrong[key] = str(error)
    for key, fault in sorted(chain(*(found.items() for found in from_all(wrong)))):
        faults.add(name, fault, key)
        del by_id[key]
    with metric.sync_context():
        rows = metric.table()
    own = dict(zip(rows[:, KEY], rows[:, SCORE], strict=True))
    scored = [by_id[key] for key in sorted(by_id)]
    known = labelled(scored)
    for one in known:
        one.score = round(float(own[digest(one.id)]), 6) if one.parsed is not None else 0.0
    failures = Counter(one.failure or "unknown" for one in scored if one.parsed is None)
    splits = {split: rows[rows[:, HELD_OUT] == held_out] for split, held_out in (("seen", 0), ("held_out", 1))}
    return BenchmarkScores(
        name=name,
        task=benchmark.task,
        metric=benchmark.metric,
        headline=benchmark.headline,
        n=len(scored),
        unreadable=sum(failures.values()) / max(len(scored), 1),
        failures=dict(failures.most_common()),
        scores=metric.summarise(rows),
        splits={split: {"n": len(part), "scores": metric.summarise(part)} for split, part in splits.items()}
        if all(map(len, splits.values()))
        else {},
        ceiling=mask_ceiling(known, benchmark, codec) if codec and metric.masks and known else None,
        paper=[dataclasses.asdict(row) for row in benchmark.paper],
        unlabelled=len(scored) - len(known),
        cut=sum(one.cut for one in scored),
        faults=len(faults.found.get(name, [])),
    )


def mask_ceiling(predictions: Sequence[Prediction], benchmark: Benchmark, codec: RegionCodec) -> NamedScores:
    """Return the scores of a model that writes every target perfectly: encode -> quantise -> decode, then score."""
    chosen = np.linspace(0, len(predictions) - 1, min(len(predictions), CEILING_SAMPLES)).round().astype(int)
    perfect = []
    for prediction in share([predictions[i] for i in chosen]):
        sizes = [(int(image["width"]), int(image["height"])) for image in prediction.images]
        letterboxes = [Letterbox(width, height, max(width, height)) for width, height in sizes]
        regions = [region for region in target_regions(prediction) if coco_mask.area(region.rle) > 0]
        parsed = codec.decode(codec.encode(regions, letterboxes, "mask"), letterboxes, "mask")
        perfect.append(dataclasses.replace(prediction, parsed=parsed, failure=None))
    metric = benchmark.new_metric()
    metric.update(perfect)
    return metric.compute()


def write_scores(scores: Scores, path: Path, run: Mapping[str, Any] | None = None) -> None:
    """Write scores.json: {"version", "run": facts about the run, "benchmarks": {name: ...}}."""
    record = {
        "version": SCORES_VERSION,
        "run": dict(run or {}),
        "benchmarks": {name: dataclasses.asdict(one) for name, one in scores.items()},
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
