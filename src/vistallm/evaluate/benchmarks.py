"""Predictions -> scores: benchmarks as entries of configs/benchmarks.yaml, scored from the predictions list alone.

`score` needs no model, image or shard, so anyone can recompute a table from predictions.jsonl; processes share it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pycocotools import mask as coco_mask
from torch import distributed as dist

from vistallm.config import Config
from vistallm.evaluate.export import EXPORTS
from vistallm.evaluate.predictions import Faults, by_benchmark, line_id
from vistallm.metrics import METRICS, NamedScores, SampleScores
from vistallm.metrics.regions import target_regions
from vistallm.metrics.scores import GROUPS, labelled
from vistallm.metrics.video import track_regions
from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.tracks import fill_tracks, write_tracks
from vistallm.schema import Prediction
from vistallm.tasks import find_task

BENCHMARKS_FILE = Path(__file__).resolve().parents[3] / "configs" / "benchmarks.yaml"
SCORES_VERSION = 1
SPLITS = {"seen": False, "held_out": True}
CEILING_SAMPLES = 1000  # targets put through the codec for a ceiling, evenly taken: writing a mask costs milliseconds
T = TypeVar("T")


@dataclass
class Benchmark:
    """One test set and how it is scored: an entry of configs/benchmarks.yaml, which describes the fields."""

    name: str
    task: str
    data: str
    split: str
    shards: str = "."
    metric: str = ""
    headline: str = ""
    average: str | None = None
    export: str | None = None
    paper: Sequence[Mapping[str, Any]] = ()
    head: str = "text"
    size: int | None = None  # samples that published rows are of, where that is known

    def __post_init__(self) -> None:
        task = find_task(self.task)
        self.metric = self.metric or task.metric
        choices = {"head": task.heads, "metric": METRICS, "average": (*GROUPS, None), "export": (*EXPORTS, None)}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}: expected one of {', '.join(map(str, allowed))}, got {getattr(self, key)!r}")
        self.headline = self.headline or METRICS[self.metric].headline or METRICS[self.metric].names[0]

    @property
    def needs_links(self) -> bool:
        """Whether only a model with links can answer it: by its head, or because its task comes with them."""
        return self.head == "link" or find_task(self.task).mini_links

    @property
    def needs_video(self) -> bool:
        """Whether its samples are videos: a model without videos is asked for it by name alone."""
        return find_task(self.task).video

    def new_metric(self) -> SampleScores:
        """Return the metric that scores it, without any sample, on the device that processes exchange tensors on."""
        nccl = dist.is_initialized() and "nccl" in dist.get_backend()
        metric = METRICS[self.metric](self.average).to("cuda" if nccl else "cpu")
        metric.update([])  # a process without any sample has to take part
        return metric


@dataclass
class BenchmarkScores:
    """Scores of one benchmark.

    Attributes:
        head: what wrote the regions of the answers, "text" or "link".
        n: samples; unreadable: share of them whose answer could not be read; failures: their number by reason.
        scores: name -> share in [0, 1], None where no sample counts.
        splits: "seen" and "held_out" (attribute combinations absent from training) -> {"n", "scores"}.
        ceiling: the same scores for (at most 1,000 of) the target masks put through the codec, None without masks.
        unlabelled: samples whose answer the dataset keeps to itself; they are exported and in no score.
        cut: samples whose answer ended because decode.max_new_tokens was reached.
        faults: predictions that could not be read or scored; above 0 the benchmark is incomplete.
        teacher_forced: the same scores where links are read behind the true answer's text (decode.teacher_forced), else
            None. What they are above `scores` is what the model's own text loses.
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
    paper: list[Mapping[str, Any]] = field(default_factory=list)
    unlabelled: int = 0
    cut: int = 0
    faults: int = 0
    head: str = "text"
    teacher_forced: NamedScores | None = None
    size: int | None = None  # samples that published rows are of, where that is known


Scores = dict[str, BenchmarkScores]


def load_benchmarks(path: Path = BENCHMARKS_FILE) -> dict[str, Benchmark]:
    """Read benchmarks.yaml; raises ValueError naming the entry and the key that is wrong, all at once.

    An entry whose task can be answered by text and by links is followed by its twin by the other head, `NAME_link` or
    `NAME_text`.
    """
    benchmarks, problems = {}, []
    for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        try:
            benchmarks[name] = one = Benchmark(name, **entry)
            for head in set(find_task(one.task).heads) - {one.head}:
                benchmarks[f"{name}_{head}"] = dataclasses.replace(one, name=f"{name}_{head}", head=head)
        except (TypeError, ValueError) as error:
            problems.append(f"{path.name}, {name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return benchmarks


def select_benchmarks(
    benchmarks: Mapping[str, Benchmark], names: Iterable[str] | None, data: str, config: Config | None = None
) -> dict[str, Benchmark]:
    """Return the named benchmarks, or all of a data config, that `config` (None: any) has a head for.

    A model without links leaves out what needs them; `answer=text|link` leaves out the other head.

    Raises:
        ValueError: an unknown name, with the nearest one, or a named benchmark that the model has no links for.
    """
    links, answer = (True, "both") if config is None else (config.model.links != "none", config.answer)
    if names is None:
        videos = config is None or config.model.video != "none"
        own = [one for one in benchmarks.values() if one.data == data]
        names = [one.name for one in own if links >= one.needs_links and videos >= one.needs_video]
    names = list(names)
    if unknown := [name for name in names if name not in benchmarks]:
        near = {name: ", ".join(difflib.get_close_matches(name, benchmarks, 1)) or "none" for name in unknown}
        lines = [f"benchmark {name!r}: no such entry in {BENCHMARKS_FILE.name}; nearest: {near[name]}" for name in near]
        raise ValueError("\n".join(lines))
    if lacking := [name for name in names if benchmarks[name].needs_links and not links]:
        raise ValueError(f"benchmarks {', '.join(lacking)}: expected a model with links, got model.links=none")
    return {name: benchmarks[name] for name in names if answer in ("both", benchmarks[name].head)}


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_all(value: T) -> list[T]:
    """Return the values of all processes, by rank."""
    values = [value] * rank_and_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def score(
    predictions: Sequence[Prediction],
    benchmarks: Mapping[str, Benchmark],
    codec: RegionCodec | None = None,
    faults: Faults | None = None,
) -> Scores:
    """Score predictions of any benchmarks, in any order, and fill `Prediction.score` of each (None: in no score).

    Every process calls it with all predictions, measures a share of them, and returns all scores.

    Args:
        predictions: of any benchmarks.
        benchmarks: by name; scores come in their order, those without predictions are left out.
        codec: with the run's settings; gives the mask ceilings, which are left out without it.
        faults: gets unknown benchmarks, ids that occur twice in one, and missing or malformed targets; the rest is
            scored. Without it they raise ValueError.
    """
    groups, scores, found = by_benchmark(predictions), {}, Faults() if faults is None else faults
    for name in [*(name for name in benchmarks if name in groups), *sorted(set(groups) - set(benchmarks))]:
        try:
            benchmark = select_benchmarks(benchmarks, [name], "")[name]
        except ValueError as error:
            found.add(name, str(error))
            continue
        one = _score_one(benchmark, [each for each in groups[name] if not each.forced], codec, found)
        if forced := [each for each in groups[name] if each.forced]:
            one.teacher_forced = _score_one(benchmark, forced, None, found).scores
        if one.n:
            scores[name] = one
    if faults is None and found.found:
        raise ValueError("\n".join(fault for some in found.found.values() for fault in some))
    return scores


def _score_one(
    benchmark: Benchmark, predictions: list[Prediction], codec: RegionCodec | None, faults: Faults
) -> BenchmarkScores:
    name, metric, by_id = benchmark.name, benchmark.new_metric(), dict[str, Prediction]()
    for one in predictions:
        one.score = None
        if one.id in by_id:
            faults.add(name, f"prediction {line_id(one)} occurs more than once")
        by_id.setdefault(one.id, one)
    wrong, (rank, size) = dict[str, str](), rank_and_size()
    for key in list(by_id)[rank::size]:
        try:
            metric.update([by_id[key]])
        except ValueError as error:
            wrong[key] = str(error)
    for key, fault in sorted(pair for some in from_all(wrong) for pair in some.items()):
        faults.add(name, fault, line_id(by_id.pop(key)))
    with metric.sync_context():
        rows = metric.rows()
    own = {row["id"]: row["score"] for row in rows}
    scored = [by_id[key] for key in sorted(by_id)]
    known = labelled(scored)
    for one in known:
        value, weight = own[one.id]
        one.score = round(value / weight, 6) if one.parsed is not None else 0.0
    failures = Counter(one.failure or "unknown" for one in scored if one.parsed is None)
    polygons = metric.masks and benchmark.head == "text"
    splits = {split: [row for row in rows if row["held_out"] == held] for split, held in SPLITS.items()}
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
        if all(splits.values())
        else {},
        ceiling=mask_ceiling(known, benchmark, codec) if polygons and codec and known else None,
        paper=list(benchmark.paper),
        size=benchmark.size,
        unlabelled=len(scored) - len(known),
        cut=sum(one.cut for one in scored),
        faults=len(faults.found.get(name, [])),
        head=benchmark.head,
    )


def mask_ceiling(predictions: Sequence[Prediction], benchmark: Benchmark, codec: RegionCodec) -> NamedScores:
    """Return the scores of a model that writes every target perfectly: encode -> quantise -> decode, then score."""
    chosen = np.linspace(0, len(predictions) - 1, min(len(predictions), CEILING_SAMPLES)).round().astype(int)
    perfect, (rank, size) = [], rank_and_size()
    for prediction in (predictions[i] for i in chosen[rank::size]):
        sizes = [(int(image["width"]), int(image["height"])) for image in prediction.images]
        letterboxes = [Letterbox(width, height, max(width, height)) for width, height in sizes]
        targets = track_regions(prediction) if benchmark.needs_video else target_regions(prediction, optional=True)
        regions = [region for region in targets if coco_mask.area(region.rle) > 0]
        if benchmark.needs_video:
            tracks = [[one for one in regions if one.object == n] for n in sorted({one.object for one in regions})]
            written = write_tracks(codec, tracks, letterboxes, "mask")
            parsed = codec.decode(written, letterboxes, "mask", video=True)
            parsed.regions = fill_tracks(parsed.regions, len(letterboxes), codec.keyframes)
        else:
            parsed = codec.decode(codec.encode(regions, letterboxes, "mask"), letterboxes, "mask")
        perfect.append(dataclasses.replace(prediction, parsed=parsed, failure=None))
    metric = benchmark.new_metric()
    metric.update(perfect)
    return metric.compute()


def write_scores(scores: Scores, path: Path, run: Mapping[str, Any] | None = None) -> None:
    """Write scores.json: {"version", "run": facts about the run, "benchmarks": {name: ...}}."""
    usual = {"head": "text", "teacher_forced": None, "size": None}  # written only where they differ
    rows = {name: dataclasses.asdict(one).items() for name, one in scores.items()}
    kept = {name: {k: v for k, v in row if k not in usual or v != usual[k]} for name, row in rows.items()}
    record = {"version": SCORES_VERSION, "run": dict(run or {}), "benchmarks": kept}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_scores(path: Path) -> dict[str, NamedScores]:
    """Return benchmark -> its scores from a scores.json; raises ValueError for another file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: one["scores"] for name, one in record["benchmarks"].items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the scores.json of an evaluation, got {error!r}") from error
