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
from functools import partial
from typing import Any

from vistallm.coinit.sources.base import Draft, Packed, Reject, Source, SourceImage, SourceOptions, chosen
from vistallm.coinit.sources.records import Record, RecordSource, read_list, read_object
from vistallm.coinit.sources.shapes import clip_box
from vistallm.coinit.sources.visual_genome import image_at, read_images
from vistallm.schema import Region

_ASKS = ("object", "super", "general")
_TASKS = {"point": "pointqa", "box": "boxqa"}


@dataclass
class _Question:
    """One question: its id within the image, text, answer, box (x, y, width, height), point (x, y), kind if any."""

    name: str
    text: str
    answer: str
    box: tuple[float, ...]
    point: tuple[float, ...]
    asks: str | None = None


def load_pointqa_local(options: SourceOptions) -> Source:
    """Questions whose answer is at the point; splits train, val, testdev, testfinal."""
    options.check_split("train", "val", "testdev", "testfinal")
    settings = options.read_settings(forms="point,box", image_data="")
    return _load("pointqa-local", "localqa", options, settings, _local_questions)


def load_pointqa_looktwice(options: SourceOptions) -> Source:
    """Questions that begin at the point and count over the image; splits train, val, test."""
    options.check_split("train", "val", "test")
    settings = options.read_settings(forms="point,box", asks=",".join(_ASKS), image_data="")
    asks = chosen(settings, "asks", *_ASKS)
    return _load("pointqa-looktwice", "looktwiceqa", options, settings, partial(_look_twice_questions, asks))


def _load(
    source: str,
    stem: str,
    options: SourceOptions,
    settings: dict[str, str],
    read: Callable[[Record, int], Iterator[_Question]],
) -> Source:
    path = options.find_file(f"{stem}_dataset.json")
    ids = read_list(options.find_file(f"{stem}_{options.split}_imgs.json"))
    images, forms = read_images(options, settings["image_data"]), chosen(settings, "forms", *_TASKS)
    data = read_object(path)

    def make(item: tuple[str, list[Any]], _: int) -> Iterator[Draft | Reject]:
        image_id, entries = item
        image = image_at(images, int(image_id), str(path)).find(options.image_folder)
        for number, entry in enumerate(entries):
            record = Record(entry, f"{path}, record {image_id}, question {number}")
            for question in read(record, number):
                for form in forms:
                    region = _region(form, question, image, record.where)
                    if isinstance(region, Reject):
                        yield region
                        continue
                    yield image.draft(
                        f"{source}-{options.split}-{image_id}-{question.name}-{form}",
                        _TASKS[form],
                        source,
                        {} if question.asks is None else {"asks": question.asks},
                        fields={"question": place_region(question.text), "answer": question.answer},
                        regions=[region],
                    )

    return RecordSource(Packed((str(image_id), data.require(str(image_id), list)) for image_id in ids), make)


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


def _local_questions(record: Record, number: int) -> Iterator[_Question]:
    question = record.text("question")
    objects, points = record.require("all_objs", list), list(record.records("points", "object"))
    if len(objects) != len(points):
        raise record.fault(
            f"expected as many points as all_objs, got {len(points)} and {len(objects)}; "
            "each point belongs to the object of the same place"
        )
    for place, (box, point) in enumerate(zip(objects, points, strict=True)):
        # `all_ans` is the set of the answers, in any order: only a point's own `ans` belongs to its object.
        yield _Question(f"{number}-{place}", question, point.text("ans"), *_read_place(box, point))


def _look_twice_questions(asks: list[str], record: Record, number: int) -> Iterator[_Question]:
    place = _read_place(record.require("bbox", object), Record(record.require("point", dict), record.where))
    answer = str(record.require("ans", object)).strip()
    if not answer.isdigit():
        raise record.fault(f"expected key 'ans' as a number, got {answer!r}")
    for kind in asks:
        text = record.text("obj_question" if kind == "object" else f"{kind}_question")
        yield _Question(f"{number}-{kind}", text, answer, *place, kind)


def _read_place(box: Any, point: Record) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Box (x, y, width, height) and the point in it, pixels; raises SourceFormatError when they do not fit together."""
    px, py = point.numbers("x", "y")
    listed = isinstance(box, list)
    if listed and (len(box) != 4 or not all(isinstance(value, int | float) for value in box)):
        raise point.fault(f"expected a box of four numbers [x, y, w, h], got {box!r}")
    x, y, w, h = box if listed else Record(box, point.where).numbers("x", "y", "w", "h")
    # A point is the rounded middle of its box. [x0, y0, x1, y1] read as [x, y, w, h] would have another one.
    slack_x, slack_y = (1.5, 1.5) if listed else (w / 2 + 1, h / 2 + 1)
    if abs(x + w / 2 - px) > slack_x or abs(y + h / 2 - py) > slack_y:
        place = "in the middle of" if listed else "in"
        raise point.fault(
            f"expected the point {place} the box [x, y, w, h], got point {(px, py)} and box {[x, y, w, h]}"
        )
    return (x, y, w, h), (px, py)


def _region(form: str, question: _Question, image: SourceImage, where: str) -> Region | Reject:
    x, y, width, height = question.box
    box, (px, py) = clip_box((x, y, x + width, y + height), image.width, image.height), question.point
    if not (0 <= px <= image.width and 0 <= py <= image.height):
        return Reject("point-outside", f"{where}: {question.point} is not in the image, {image.width} x {image.height}")
    if box is None:
        return Reject("empty-box", f"{where}: nothing of {question.box} is in the image")
    return Region(0, "point", point=(px, py)) if form == "point" else Region(0, "box", box=box)
