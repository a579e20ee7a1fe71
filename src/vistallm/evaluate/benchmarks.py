"""Predictions -> scores: benchmarks as entries of configs/benchmarks.yaml, scored from the predictions list alone.

`score` needs no model, image or shard, so anyone can recompute a table from predictions.jsonl.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf
from pycocotools import mask as coco_mask

from vistallm.evaluate.export import EXPORTS
from vistallm.evaluate.families import FAMILIES, GROUPS
from vistallm.evaluate.family import Family, NamedScores, group_mean
from vistallm.evaluate.predictions import as_filed, by_benchmark
from vistallm.evaluate.targets import fact, target_regions
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
        metric: score family, a key of `FAMILIES`; null in the file = the task's.
        headline: the score that stands for it; null in the file = the family's.
        average: "ref_id" or "class": the family's means are also averaged over the groups that share this meta value.
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

    @property
    def family(self) -> Family:
        """The score family."""
        return FAMILIES[self.metric]


@dataclass
class BenchmarkScores:
    """Scores of one benchmark.

    Attributes:
        headline: the name in `scores` that stands for the benchmark.
        n: samples; unreadable: share of them whose answer could not be read; failures: their number by reason.
        unlabelled: samples whose answer the dataset keeps to itself; they are exported and in no score.
        scores: name -> share in [0, 1], None where no sample counts.
        splits: "seen" and "held_out" (attribute combinations absent from training) -> {"n", "scores"}.
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
    choices = {"metric": FAMILIES, "average": (*GROUPS, None), "export": (*EXPORTS, None)}
    for key, allowed in choices.items():
        if entry.get(key) not in allowed:
            raise ValueError(f"{key}: expected one of {', '.join(map(str, allowed))}, got {entry.get(key)!r}")
    entry["headline"] = entry.get("headline") or FAMILIES[entry["metric"]].headline
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
    faults: dict[str, str] | None = None,
) -> Scores:
    """Score predictions of any benchmarks, in any order, and fill `Prediction.score` of each.

    Args:
        predictions: of any benchmarks.
        benchmarks: by name; scores come in their order, those without predictions are left out.
        codec: with the run's settings; gives the mask ceilings, which are left out without it.
        faults: benchmark -> why it has no score. With it, a benchmark in it is left out, one that can't be scored is
            added to it, and the others are scored; without it, the first fault is raised.

    Raises:
        ValueError: for an unknown benchmark, an id that occurs twice in one, or a missing or malformed target.
    """
    groups, scores = by_benchmark(predictions), {}
    for name in [*(name for name in benchmarks if name in groups), *sorted(set(groups) - set(benchmarks))]:
        if name in (faults or {}):
            continue
        try:
            benchmark = select_benchmarks(benchmarks, [name], "")[name]
            scores[name] = _score_one(benchmark, sorted(groups[name], key=lambda one: one.id), codec)
        except ValueError as error:
            if faults is None:
                raise
            faults[name] = str(error)
    return scores


def _score_one(benchmark: Benchmark, predictions: list[Prediction], codec: RegionCodec | None) -> BenchmarkScores:
    """Score one benchmark's predictions, sorted by id: sums of floats depend on their order."""
    name, twice = benchmark.name, [key for key, number in Counter(p.id for p in predictions).items() if number > 1]
    if twice:
        raise ValueError(f"{name}: {len(twice)} prediction id(s) occur more than once, for example {twice[0]!r}")
    labelled = [prediction for prediction in predictions if not fact(prediction, "unlabelled", False)]
    measured = _measure(benchmark, labelled)
    for prediction, (one, _) in zip(labelled, measured, strict=True):
        prediction.score = round(float(benchmark.family.sample_score(one)), 6) if prediction.parsed is not None else 0.0
    failures = Counter(p.failure or "unknown" for p in predictions if p.parsed is None)
    splits = {}
    for split, wanted in (("seen", False), ("held_out", True)):
        part = [one for one, p in zip(measured, labelled, strict=True) if fact(p, "held_out") == wanted]
        if part:
            splits[split] = {"n": len(part), "scores": _summarise(benchmark, part)}
    return BenchmarkScores(
        name=benchmark.name,
        task=benchmark.task,
        metric=benchmark.metric,
        headline=benchmark.headline,
        n=len(predictions),
        unreadable=sum(failures.values()) / len(predictions),
        failures=dict(failures.most_common()),
        scores=_summarise(benchmark, measured),
        splits=splits if len(splits) == 2 else {},
        ceiling=mask_ceiling(labelled, benchmark, codec) if codec and benchmark.family.masks and labelled else None,
        paper=[dataclasses.asdict(row) for row in benchmark.paper],
        unlabelled=len(predictions) - len(labelled),
    )


def _measure(benchmark: Benchmark, predictions: list[Prediction]) -> list[tuple[Any, Any]]:
    """Return (what the family counts, the group it is averaged over or None) of each prediction."""
    facts = benchmark.family.measure([as_filed(prediction) for prediction in predictions])
    return list(zip(facts, [fact(p, benchmark.average or "") for p in predictions], strict=True))


def _summarise(benchmark: Benchmark, measured: list[tuple[Any, Any]]) -> NamedScores:
    """Return the scores of some of the samples, with the averages over groups if the benchmark has them."""
    scores = dict(benchmark.family.summarise([one for one, _ in measured]))
    if benchmark.average is None:
        return scores
    known = all(group is not None for _, group in measured)  # else there is no mean over groups
    return scores | group_mean(benchmark.family, measured if known else [], GROUPS[benchmark.average][0])


def score_names(benchmark: Benchmark) -> list[str]:
    """Return the names of the scores that a benchmark has, those averaged over groups included."""
    return list(_summarise(benchmark, []))


def mask_ceiling(predictions: list[Prediction], benchmark: Benchmark, codec: RegionCodec) -> NamedScores:
    """Return the scores of a model that writes every target perfectly: encode -> quantise -> decode, then score."""
    places = np.linspace(0, len(predictions) - 1, min(len(predictions), CEILING_SAMPLES)).round().astype(int)
    perfect = []
    for prediction in (predictions[i] for i in places):
        sizes = [(int(image["width"]), int(image["height"])) for image in prediction.images]
        letterboxes = [Letterbox(width, height, max(width, height)) for width, height in sizes]
        regions = [region for region in target_regions(prediction) if coco_mask.area(region.rle) > 0]
        parsed = codec.decode(codec.encode(regions, letterboxes, "mask"), letterboxes, "mask")
        perfect.append(dataclasses.replace(prediction, parsed=parsed, failure=None))
    return _summarise(benchmark, _measure(benchmark, perfect))


def write_scores(scores: Scores, path: Path, run: Mapping[str, Any] | None = None) -> None:
    """Write scores.json: {"version", "run": facts about the run (seconds, ...), "benchmarks": {name: ...}}."""
    record = {
        "version": SCORES_VERSION,
        "run": dict(run or {}),
        "benchmarks": {name: dataclasses.asdict(one) for name, one in scores.items()},
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
