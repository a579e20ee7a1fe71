"""PointQA Local and LookTwice: questions about an object, as `pointqa` with a point on it and as `boxqa` with its box.

In: `{localqa,looktwiceqa}_dataset.json`, an object of image id -> questions, and `..._{split}_imgs.json`, the ids of a
split; and Visual Genome's images with its image_data.json. Keys as the datasets' own scripts write them
(github.com/princetonvisualai/pointingqa, dataset-code/): Local has `question`, `all_objs` with a box {x, y, w, h} each,
and `points` in the same order, {x, y, ans}; LookTwice has `obj_question`, `super_question`, `general_question`, `ans`,
`point` {x, y} and `bbox`, a box {x, y, w, h}. A list [x, y, w, h] is read too, when the point is its middle. Anything
else stops the build.

Settings: `forms=point,box`; for LookTwice `asks=object,super,general`. A unit is one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistallm.coinit.sources.base import (
    Draft,
    Packed,
    Reject,
    Source,
    SourceFormatError,
    SourceOptions,
    clip_box,
    read_json,
    require,
)
from vistallm.coinit.sources.records import RecordSource, check_split, find_file, read_list, read_settings
from vistallm.coinit.sources.visual_genome import NUMBER, GenomeImage, chosen, image_at, read_images
from vistallm.schema import ImageInfo, Region, Sample

_ASKS = ("object", "super", "general")
_TASKS = {"point": "pointqa", "box": "boxqa"}


@dataclass
class _Question:
    """One question: its id within the image, text, answer, box (x, y, width, height), point (x, y), kind if any."""

    name: str
    text: str
    answer: str
    box: tuple[float, ...]
    point: tuple[float, float]
    asks: str | None = None


def load_pointqa_local(options: SourceOptions) -> Source:
    """Questions whose answer is at the point; splits train, val, testdev, testfinal."""
    check_split(options, "train", "val", "testdev", "testfinal")
    settings = read_settings(options, forms="point,box", image_data="")
    return _load("pointqa-local", "localqa", options, settings, _local_questions)


def load_pointqa_looktwice(options: SourceOptions) -> Source:
    """Questions that begin at the point and count over the image; splits train, val, test."""
    check_split(options, "train", "val", "test")
    settings = read_settings(options, forms="point,box", asks=",".join(_ASKS), image_data="")
    asks = chosen(settings, "asks", *_ASKS)

    def read(record: Any, number: int, where: str) -> Iterator[_Question]:
        return _look_twice_questions(record, number, where, asks)

    return _load("pointqa-looktwice", "looktwiceqa", options, settings, read)


def _load(
    source: str,
    stem: str,
    options: SourceOptions,
    settings: dict[str, str],
    read: Callable[[Any, int, str], Iterator[_Question]],
) -> Source:
    path = find_file(options.root, f"{stem}_dataset.json")
    ids = read_list(find_file(options.root, f"{stem}_{options.split}_imgs.json"))
    images, forms = read_images(options, settings["image_data"]), chosen(settings, "forms", *_TASKS)
    records = read_json(path)
    packed = Packed((str(image_id), require(records, str(image_id), list, str(path))) for image_id in ids)
    folder = options.images or options.root

    def make(item: tuple[str, list[Any]], _: int) -> Iterator[Draft | Reject]:
        image_id, entries = item
        image = image_at(images, int(image_id), str(path))
        for number, entry in enumerate(entries):
            where = f"{path}, record {image_id}, question {number}"
            for question in read(entry, number, where):
                for form in forms:
                    yield _draft(f"{source}-{options.split}", question, form, image, where, folder)

    return RecordSource(packed, make)


def _draft(prefix: str, question: _Question, form: str, image: GenomeImage, where: str, folder: Path) -> Draft | Reject:
    x, y, width, height = question.box
    box, (px, py) = clip_box((x, y, x + width, y + height), image.width, image.height), question.point
    if not (0 <= px <= image.width and 0 <= py <= image.height):
        return Reject("point-outside", f"{where}: {question.point} is not in the image, {image.width} x {image.height}")
    if box is None:
        return Reject("empty-box", f"{where}: nothing of {question.box} is in the image")
    meta: dict[str, Any] = {"image_ids": [image.key]}
    if question.asks is not None:
        meta["asks"] = question.asks
    region = Region(0, "point", point=(px, py)) if form == "point" else Region(0, "box", box=box)
    sample = Sample(
        id=f"{prefix}-{image.image_id}-{question.name}-{form}",
        task=_TASKS[form],
        source=prefix.rpartition("-")[0],
        images=[ImageInfo("", image.width, image.height)],
        fields={"question": place_region(question.text), "answer": question.answer},
        regions=[region],
        meta=meta,
    )
    return Draft(sample, [image.path(folder)])


def place_region(question: str) -> str:
    """Write the region into a question: after "these" (the paper's "How many of these [..]"), else before the mark.

    >>> place_region("How many of these bears?"), place_region("What color is the man?")
    ('How many of these {regions:0} bears?', 'What color is the man {regions:0}?')
    """
    head, these, tail = question.strip().partition("of these")
    if these:
        return f"{head}of these {{regions:0}}{tail}"
    text = head.removesuffix("?").rstrip()
    return f"{text} {{regions:0}}{'?' if head.endswith('?') else ''}"


def _local_questions(record: Any, number: int, where: str) -> Iterator[_Question]:
    question = require(record, "question", str, where)
    objects, points = require(record, "all_objs", list, where), require(record, "points", list, where)
    if len(objects) != len(points):
        raise SourceFormatError(
            f"{where}: expected as many points as all_objs, got {len(points)} and {len(objects)}; "
            "each point belongs to the object of the same place"
        )
    for place, (entry, point) in enumerate(zip(objects, points, strict=True)):
        here = f"{where}, object {place}"
        box, middle = _read_place(entry, point, here)
        # `all_ans` is the set of the answers, in any order: only a point's own `ans` belongs to its object.
        yield _Question(f"{number}-{place}", question, require(point, "ans", str, here), box, middle)


def _look_twice_questions(record: Any, number: int, where: str, asks: list[str]) -> Iterator[_Question]:
    box, point = _read_place(require(record, "bbox", object, where), require(record, "point", dict, where), where)
    answer = require(record, "ans", object, where)
    if isinstance(answer, bool) or not str(answer).strip().isdigit():
        raise SourceFormatError(f"{where}: expected key 'ans' as a number, got {answer!r}")
    for kind in asks:
        text = require(record, "obj_question" if kind == "object" else f"{kind}_question", str, where)
        yield _Question(f"{number}-{kind}", text, str(answer).strip(), box, point, kind)


def _read_place(box: Any, point: Any, where: str) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Box (x, y, width, height) and the point in it, pixels; raises SourceFormatError when they do not fit together."""
    px, py = (require(point, key, NUMBER, where) for key in ("x", "y"))
    listed = isinstance(box, list)
    if listed and (len(box) != 4 or not all(isinstance(value, int | float) for value in box)):
        raise SourceFormatError(f"{where}: expected a box of four numbers [x, y, w, h], got {box!r}")
    x, y, w, h = box if listed else (require(box, key, NUMBER, where) for key in ("x", "y", "w", "h"))
    # A point is the rounded middle of its box. [x0, y0, x1, y1] read as [x, y, w, h] would have another one.
    slack_x, slack_y = (1.5, 1.5) if listed else (w / 2 + 1, h / 2 + 1)
    if abs(x + w / 2 - px) > slack_x or abs(y + h / 2 - py) > slack_y:
        raise SourceFormatError(
            f"{where}: expected the point {'in the middle of' if listed else 'in'} the box [x, y, w, h], "
            f"got point {(px, py)} and box {[x, y, w, h]}"
        )
    return (x, y, w, h), (px, py)
