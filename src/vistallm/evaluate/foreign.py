"""Predictions of other systems -> ours: one `Prediction` per sample of a benchmark, with the target from its shards.

COCO results, masks as image files (LISA) or in JSON (GLaMM), and text answers with boxes or polygons. The convention of
written coordinates is declared (`foreign.*`), never found out: `doubts` says where the numbers speak against it.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np

from vistallm.coinit.shards import read_raw, split_shards
from vistallm.config import CHOICES, Config, ForeignConfig
from vistallm.evaluate.benchmarks import Benchmark
from vistallm.evaluate.generate import ONE_REGION, target_of
from vistallm.evaluate.predictions import Faults
from vistallm.metrics.regions import box_iou, boxes_of
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import mask_to_rle, rle_area, rle_to_mask, segmentation_to_rle
from vistallm.schema import Parsed, Prediction, Region, Sample
from vistallm.tasks import Task, find_task, write_answer
from vistallm.tasks.answers import read_words

Record = dict[str, Any]
COCO_BOXES = ForeignConfig(coordinates="pixels", order="xywh")  # of COCO results
TEXT_KEYS = ("text", "answer", "response", "prediction")
EXPRESSION_KEYS = ("expression", "expr", "sentence", "phrase")
CHECKED = 500  # samples by which other conventions are compared with the declared one
DOUBT = 0.1  # mean box IoU by which another one has to be better
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_GROUP = re.compile(rf"[\[(]\s*({_NUMBER}(?:[\s,;]+{_NUMBER})*)\s*[\])]")


@dataclass
class Given:
    """What a file gives for one sample; `none`: whether it says "no target", None where no region says it."""

    text: str = ""
    masks: list[Any] = field(default_factory=list)  # COCO segmentations, or paths of mask images
    numbers: list[list[float]] = field(default_factory=list)  # boxes and polygons, as written
    none: bool | None = None
    size: tuple[float, float] | None = None  # width and height of the image that pixels are of; None = its own


def read_foreign(config: Config, root: Path, chosen: Mapping[str, Benchmark], faults: Faults) -> list[Prediction]:
    """Read `predictions=` in `format=` against the samples of the chosen benchmarks.

    A sample without a record is a wrong answer ("missing"); records of no sample and repeated ones are left out. All of
    them are counted in `faults`.

    Raises:
        ValueError: the file can't be read, holds no record of these benchmarks, or the settings do not fit.
    """
    path = Path(str(config.predictions))
    if config.format == "text" and config.foreign.coordinates is None:
        words = ", ".join(map(str, CHOICES["foreign.coordinates"][1:]))
        raise ValueError(f"format=text: expected foreign.coordinates= with one of {words}, got none")
    if several := [name for name, one in chosen.items() if find_task(one.task).multi_image]:
        raise ValueError(f"format={config.format}: expected benchmarks of one image a sample, got {', '.join(several)}")
    records = list(_read_images(path) if config.format == "masks" else _read_json(path, faults))
    used, predictions = set[int](), list[Prediction]()
    for benchmark in chosen.values():
        samples = list(itertools.islice(_samples(root, benchmark, faults), config.decode.limit))
        found = _match(records, samples, used)
        predictions += _answer(benchmark, samples, found, config, faults)
    if not used:
        shown = json.dumps(records[0] if records else {})[:150]
        raise ValueError(f"{path}: none of its {len(records)} records names a sample of {', '.join(chosen)}: {shown}")
    if unknown := [i for i in range(len(records)) if i not in used]:
        shown = json.dumps(records[unknown[0]])[:150]
        faults.add("", f"{path}: {len(unknown)} of {len(records)} records name no sample, the first is {shown}")
    return predictions


def _samples(root: Path, benchmark: Benchmark, faults: Faults) -> Iterator[Sample]:
    for shard in split_shards(root / benchmark.shards, benchmark.split, benchmark.task):
        for raw in read_raw(shard, benchmark.task.__eq__, images=False):
            if raw.record is None:
                faults.add(benchmark.name, f"{raw.shard}: {raw.fault}")
            else:
                yield Sample.from_json(raw.record)


def _read_json(path: Path, faults: Faults) -> Iterator[Record]:
    """The records of a JSON list, of JSON lines, or of the JSON files of a folder; GLaMM's hold a mask per phrase."""
    for file in sorted(path.glob("*.json*")) if path.is_dir() else [path]:
        text = file.read_text(encoding="utf-8")
        pieces = [line for line in text.splitlines() if line.strip()] if file.suffix == ".jsonl" else [text]
        for number, piece in enumerate(pieces, 1):
            try:
                value = json.loads(piece)
                records = value if isinstance(value, list) else [value]
                for record in records:
                    shared = {key: one for key, one in record.items() if key not in ("phrases", "pred_masks")}
                    pairs = list(zip(record.get("phrases", ()), record.get("pred_masks", ()), strict=True))
                    yield from [shared | {"phrase": name, "segmentation": mask} for name, mask in pairs] or [record]
            except (AttributeError, ValueError) as error:
                faults.add("", f"{file}, line {number}: expected a record or a list of them ({error})")


def _read_images(path: Path) -> Iterator[Record]:
    """A record per sample from `<id>.png` or, with several masks, `<id>_mask_<k>.jpg` as LISA names them."""
    if not path.is_dir():
        raise ValueError(f"predictions={path}: format=masks expects a folder of mask images, got a file")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
    for name, group in itertools.groupby(files, lambda file: re.sub(r"_mask_\d+$", "", file.stem)):
        yield {"id": name, "sent_id": name, "masks": [str(file) for file in group]}


def _names(facts: Mapping[str, Any]) -> list[Hashable]:
    """What may name a sample, the surest first; a record belongs to the first one that one sample alone has."""
    names: list[Hashable] = [("id", str(facts[key])) for key in ("id", "expression") if key in facts]
    if "ref_id" in facts and "sent_id" in facts:
        names.append(("ref", str(facts["ref_id"]), str(facts["sent_id"])))
    names += [(key, str(facts[key])) for key in ("sent_id", "question_id") if key in facts]
    expression = next((" ".join(str(facts[key]).casefold().split()) for key in EXPRESSION_KEYS if key in facts), "")
    image = Path(str(facts.get("image_id", facts.get("image", ""))).rpartition(":")[2]).stem
    if image and expression:  # COCO_train2014_000000581857.jpg and 581857 are one image
        names += [("image", part, expression) for part in (image, *map(int, re.findall(r"\d+", image)[-1:]))]
    return names


def _match(records: list[Record], samples: list[Sample], used: set[int]) -> dict[str, list[Record]]:
    """Return sample id -> its records; `used` gets the numbers of those that name a sample."""
    owners: dict[Hashable, list[str]] = {}
    for sample in samples:
        facts = {**sample.meta, "id": sample.id, "image_id": (sample.meta.get("image_ids") or [""])[0]}
        for name in _names(facts | {key: sample.fields[key] for key in ("expr",) if key in sample.fields}):
            owners.setdefault(name, []).append(sample.id)
    found: dict[str, list[Record]] = {}
    for number, record in enumerate(records):
        owner = next((owners[name][0] for name in _names(record) if len(owners.get(name, ())) == 1), None)
        if owner is not None:
            used.add(number)
            found.setdefault(owner, []).append(record)
    return found


def _answer(
    benchmark: Benchmark, samples: list[Sample], found: Mapping[str, list[Record]], config: Config, faults: Faults
) -> list[Prediction]:
    """Set the records of each sample beside its target; count what is missing, repeated or malformed, print doubts."""
    declared, wrong = config.foreign if config.format == "text" else COCO_BOXES, dict[str, list[str]]()
    predictions, written = [], list[tuple[Given, Prediction]]()
    for sample in samples:
        records, given = found.get(sample.id, []), Given()
        parsed, failure = cast(Parsed | None, None), cast(str | None, "missing")
        own = [one for n, one in enumerate(records) if not n or config.format != "text" and one not in records[:n]]
        if len(own) < len(records):
            wrong.setdefault("more than one record, the first counts", []).append(sample.id)
        images = [{"width": image.width, "height": image.height} for image in sample.images]
        target, prompt = target_of(sample, write_answer(sample)), sample.fields.get("expr", "")
        if own:
            try:
                given = _merge(own, config)
                parsed, failure = read_given(given, find_task(sample.task), images[0], declared)
            except (KeyError, StopIteration, TypeError, ValueError) as error:
                failure = "malformed"
                wrong.setdefault("a malformed record, which counts as wrong", []).append(f"{sample.id}: {error!r}")
        else:
            wrong.setdefault("no record, which counts as wrong", []).append(sample.id)
        one = Prediction(sample.id, benchmark.name, sample.task, prompt, given.text, parsed, failure, images, target)
        predictions.append(one)
        written += [(given, one)] if parsed and given.numbers and target["regions"] else []
    for what, ids in wrong.items():
        faults.add(benchmark.name, f"{len(ids)} of {len(samples)} samples have {what}; the first is {ids[0]}")
    if doubt := doubt_of(written[:: len(written) // CHECKED + 1], declared):
        print(f"eval.py: warning: {benchmark.name}: {doubt}", file=sys.stderr)
    return predictions


def _merge(records: list[Record], config: Config) -> Given:
    """Join the records of one sample, an object each; raises ValueError or KeyError for one that says nothing."""
    first = records[0]
    size = (float(first["width"]), float(first["height"])) if {"width", "height"} <= first.keys() else None
    if config.format == "text":
        return text_given(str(next(first[key] for key in TEXT_KEYS if key in first)), config.foreign.none, size)
    given = Given(size=size)
    for record in records:
        if not {"boxes", "bbox", "masks", "segmentation", "no_target"} & record.keys():
            raise ValueError("expected segmentation, bbox or no_target")
        masks = record.get("masks", [record["segmentation"]] if "segmentation" in record else [])
        given.masks += masks
        given.numbers += [] if masks else record.get("boxes", [record["bbox"]] if "bbox" in record else [])
        given.none = record.get("no_target", given.none)
    return given


def text_given(text: str, none: str, size: tuple[float, float] | None = None) -> Given:
    """Find the numbers of a text answer; without any, the regular expression `none` says whether it means no target."""
    numbers = written_numbers(text)
    return Given(text, [], numbers, not numbers and re.search(none, text) is not None, size)


def written_numbers(text: str) -> list[list[float]]:
    """Return the bracketed lists of 4 or more numbers of a text; points side by side, "(1, 2), (3, 4)", are one list.

    >>> written_numbers("Two: [0, 1, 2, 3] and <box>(4,5),(6,7)</box>")
    [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    """
    groups, end, points = list[list[float]](), 0, False
    for match in _GROUP.finditer(text):
        numbers = [float(number) for number in re.findall(_NUMBER, match[1])]
        if points and len(numbers) == 2 and not text[end : match.start()].strip(", \n"):
            groups[-1] += numbers
        else:
            groups.append(numbers)
        points, end = len(numbers) == 2, match.end()
    return [group for group in groups if len(group) >= 4]


def read_given(
    given: Given, task: Task, image: Mapping[str, Any], declared: ForeignConfig
) -> tuple[Parsed | None, str | None]:
    """Return (answer, None) or (None, reason), as `read_answer` does; `image`: its "width" and "height".

    Raises ValueError for a mask of another size, or numbers that are no box or polygon.
    """
    if task.kind == "text":
        answer, failure = read_words(given.text, task.metric)
        return (None, failure) if answer is None else (Parsed("text", [], answer), None)
    size = (image["width"], image["height"])
    rles = [_rle(mask, *size) for mask in given.masks]
    regions = [Region(0, "mask", rle=rle) for rle in rles if rle_area(rle)]
    for points in (np.clip(place(numbers, task.kind, size, declared, given), 0, size) for numbers in given.numbers):
        if task.kind == "mask":
            regions.append(Region(0, "mask", polygons=[points.astype(np.float32)]))
        else:
            regions += [Region(0, "box", box=tuple(box)) for box in points.reshape(-1, 4).tolist()]
    for number, region in enumerate(regions):
        region.object = number
    if any(region.kind != task.kind for region in regions):
        return None, "wrong-kind"
    if bool(regions) == given.none:
        return None, "contradictory" if regions else "no-region"
    if task.metric in ONE_REGION and len(regions) != 1:
        return None, "wrong-count"
    return Parsed(task.kind, [Region.from_json(region.to_json()) for region in regions], given.text), None


def _rle(mask: Any, width: int, height: int) -> Record:
    """The run lengths of a segmentation or of a mask image of the image's own size; ValueError for another size."""
    if not isinstance(mask, str):
        rle = segmentation_to_rle(mask, height, width)
        rle_to_mask(rle)  # raises where the runs do not fill the image, which pycocotools does not see
        return rle
    pixels = cv2.imread(mask, cv2.IMREAD_GRAYSCALE)
    if pixels is None or pixels.shape != (height, width):
        got = "no image" if pixels is None else f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise ValueError(f"{mask}: expected a mask of {width} x {height} pixels, got {got}")
    if Path(mask).suffix == ".png" and len(np.unique(pixels)) > 2:
        raise ValueError(f"{mask}: expected two grey values, got {len(np.unique(pixels))}; threshold it yourself")
    return mask_to_rle(pixels > pixels.max() / 2)  # LISA writes 0 and 100, as JPEG: greys stand around both


def place(numbers: list[float], kind: str, own: tuple[int, int], declared: ForeignConfig, given: Given) -> np.ndarray:
    """Put coordinates, as written, into an image of width and height `own`: (n, 2) float64 pixels, not clipped to it.

    Two rows are a box; all are one polygon. Raises ValueError for a length that is no box's or polygon's.
    """
    if len(numbers) % (4 if kind == "box" else 2) or (kind == "mask" and len(numbers) < 6):
        raise ValueError(f"expected {'4 numbers a box' if kind == 'box' else 'at least 3 x, y pairs'}, got {numbers}")
    points = np.asarray(numbers, float).reshape(-1, 2)
    if declared.order == "yxyx":
        points = points[:, ::-1]
    elif kind == "box" and declared.order == "xywh":
        points = points.reshape(-1, 2, 2).cumsum(1).reshape(-1, 2)
    sizes = np.array([given.size or own, own], float)
    frame, real = np.repeat(sizes.max(1, keepdims=True), 2, 1) if declared.padded else sizes
    pixels = points / {"unit": 1.0, "thousand": 1000.0, "pixels": frame}[str(declared.coordinates)] * real
    return pixels - Letterbox(*own, 1).padding if declared.padded else pixels


def doubt_of(written: list[tuple[Given, Prediction]], declared: ForeignConfig) -> str:
    """Return what speaks against the declared convention, "" for nothing: another one fits the targets better.

    They are compared by the mean over samples of the best box IoU with a target; nothing is read by the others.
    """

    def fit(convention: ForeignConfig) -> float:
        ious = []
        for given, one in written:
            answer = read_given(given, find_task(one.task), one.images[0], convention)[0]
            target = boxes_of([Region.from_json(region) for region in one.target["regions"]])
            ious.append(box_iou(boxes_of(answer.regions), target).max(initial=0) if answer else 0)
        return float(np.mean(ious))

    options = itertools.product(map(str, CHOICES["foreign.coordinates"][1:]), ("xyxy", "yxyx", "xywh"), (False, True))
    fits = {option: fit(ForeignConfig(*option)) for option in options} if written else {}
    best, now = max(fits, key=lambda option: fits[option], default=None), declared.coordinates or ""
    if best is None or fits[best] <= (own := fits[now, declared.order, declared.padded]) + DOUBT:
        return ""
    words = "coordinates={} order={} padded={}".format(*best)
    return f"mean box IoU is {own:.2f} as declared; {words} would give {fits[best]:.2f}: check what the system writes"
