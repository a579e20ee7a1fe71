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

from omegaconf import OmegaConf
from pycocotools import mask as coco_mask

from vistallm.coinit.tasks import find_task
from vistallm.evaluate.families import FAMILIES, Family, NamedScores
from vistallm.evaluate.targets import fact, target_regions
from vistallm.regions.codec import RegionCodec
from vistallm.regions.frame import Frame
from vistallm.schema import Prediction

BENCHMARKS_FILE = Path(__file__).resolve().parents[3] / "configs" / "benchmarks.yaml"
SCORES_VERSION = 1


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
        data: the data config it belongs to ("mini" or "coinit").
        split: shard split.
        shards: folder of the shards, relative to data.root.
        metric: score family, a key of `FAMILIES`; null in the file = the task's.
        paper: published rows, for a real benchmark only.
    """

    name: str
    task: str
    data: str
    split: str
    shards: str
    metric: str
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
        scores: name -> share in [0, 1], None where no sample counts.
        splits: "seen" and "held_out" (attribute combinations absent from training) -> {"n", "scores"}.
        ceiling: the same scores for the target masks put through the codec, None for other benchmarks.
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


Scores = dict[str, BenchmarkScores]


def load_benchmarks(path: Path = BENCHMARKS_FILE) -> dict[str, Benchmark]:
    """Read benchmarks.yaml; raises ValueError naming the entry and the key that is wrong, all at once."""
    entries = cast(dict[str, dict[str, Any]], OmegaConf.to_container(OmegaConf.load(path)))
    known = {f.name for f in dataclasses.fields(Benchmark)} - {"name"}
    found, problems = {}, []
    for name, entry in entries.items():
        try:
            if unknown := set(entry) - known:
                raise ValueError(f"unknown key(s) {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
            metric = entry.get("metric") or find_task(entry["task"]).metric
            if metric not in FAMILIES:
                raise ValueError(f"metric: expected one of {', '.join(FAMILIES)}, got {metric!r}")
            paper = tuple(PaperRow(**row) for row in entry.get("paper", ()))
            found[name] = Benchmark(
                name, entry["task"], entry["data"], entry["split"], entry.get("shards", "."), metric, paper
            )
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{path.name}, {name}: {'missing key ' if isinstance(error, KeyError) else ''}{error}")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def select_benchmarks(
    benchmarks: Mapping[str, Benchmark], names: Iterable[str] | None, data: str
) -> dict[str, Benchmark]:
    """Return the named benchmarks, or all of a data config; ValueError names the nearest for an unknown name."""
    if names is None:
        return {name: benchmark for name, benchmark in benchmarks.items() if benchmark.data == data}
    names = list(names)
    problems = []
    for name in names:
        if name not in benchmarks:
            near = difflib.get_close_matches(name, benchmarks, 1)
            problems.append(
                f"benchmark {name!r}: no such entry in benchmarks.yaml" + (f"; nearest: {near[0]}" if near else "")
            )
    if problems:
        raise ValueError("\n".join(problems))
    return {name: benchmarks[name] for name in names}


def score(
    predictions: list[Prediction], benchmarks: Mapping[str, Benchmark], codec: RegionCodec | None = None
) -> Scores:
    """Score predictions and fill `Prediction.score` of each.

    Args:
        predictions: of any benchmarks, in any order.
        benchmarks: must hold every benchmark that the predictions name.
        codec: with the run's settings; gives the mask ceilings, which are left out without it.

    Returns:
        Scores per benchmark, in the order of `benchmarks`; benchmarks without predictions are left out.

    Raises:
        ValueError: for an unknown benchmark, an id that occurs twice in one, or a malformed target.
    """
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.benchmark, []).append(prediction)
    select_benchmarks(benchmarks, groups, "")
    for name, group in groups.items():
        twice = [key for key, number in Counter(p.id for p in group).items() if number > 1]
        if twice:
            raise ValueError(f"{name}: {len(twice)} prediction id(s) occur more than once, for example {twice[0]!r}")
    return {name: _score_one(b, groups[name], codec) for name, b in benchmarks.items() if name in groups}


def _score_one(benchmark: Benchmark, predictions: list[Prediction], codec: RegionCodec | None) -> BenchmarkScores:
    family = benchmark.family
    facts = family.measure(_as_filed(predictions))
    for prediction, one in zip(predictions, facts, strict=True):
        prediction.score = round(float(family.sample_score(one)), 6) if prediction.parsed is not None else 0.0
    failures = Counter(p.failure or "unknown" for p in predictions if p.parsed is None)
    splits = {}
    held_out = [fact(p, "held_out") for p in predictions]
    for name, wanted in (("seen", False), ("held_out", True)):
        part = [one for one, flag in zip(facts, held_out, strict=True) if flag is not None and bool(flag) == wanted]
        if part:
            splits[name] = {"n": len(part), "scores": family.summarise(part)}
    return BenchmarkScores(
        name=benchmark.name,
        task=benchmark.task,
        metric=benchmark.metric,
        headline=family.headline,
        n=len(predictions),
        unreadable=sum(failures.values()) / len(predictions),
        failures=dict(failures.most_common()),
        scores=family.summarise(facts),
        splits=splits if len(splits) == 2 else {},
        ceiling=mask_ceiling(predictions, family, codec) if codec is not None and family.masks else None,
        paper=[dataclasses.asdict(row) for row in benchmark.paper],
    )


def mask_ceiling(predictions: list[Prediction], family: Family, codec: RegionCodec) -> NamedScores:
    """Return the scores of a model that writes every target perfectly: encode -> quantise -> decode, then score."""
    perfect = []
    for prediction in predictions:
        frames = [
            Frame(int(i["width"]), int(i["height"]), max(int(i["width"]), int(i["height"]))) for i in prediction.images
        ]
        regions = [region for region in target_regions(prediction) if coco_mask.area(region.rle) > 0]
        parsed = codec.decode(codec.encode(regions, frames, "mask"), frames, "mask")
        perfect.append(dataclasses.replace(prediction, parsed=parsed, failure=None))
    return family.summarise(family.measure(_as_filed(perfect)))


def _as_filed(predictions: list[Prediction]) -> list[Prediction]:
    """Round regions as the file does, to a thousandth of a pixel: the file then scores exactly as the run behind it."""
    return [Prediction.from_json(prediction.to_json()) for prediction in predictions]


def write_scores(scores: Scores, path: Path, run: Mapping[str, Any] | None = None) -> None:
    """Write scores.json: {"version", "run": facts about the run (seconds, ...), "benchmarks": {name: ...}}."""
    record = {
        "version": SCORES_VERSION,
        "run": dict(run or {}),
        "benchmarks": {name: dataclasses.asdict(one) for name, one in scores.items()},
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions.jsonl; raises ValueError naming the line that is malformed."""
    predictions = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                predictions.append(Prediction.from_json(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not predictions:
        raise ValueError(f"{path}: expected one prediction per line, found none")
    return predictions


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    """Write predictions.jsonl, one line per prediction: inverse of `read_predictions`."""
    with path.open("w", encoding="utf-8") as lines:
        for prediction in predictions:
            lines.write(json.dumps(prediction.to_json(), ensure_ascii=False) + "\n")
