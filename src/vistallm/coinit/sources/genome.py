"""Sources on Visual Genome's images: its regions (REG, REC), PointQA (point and box questions), Visual7W pointing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vistallm.coinit.images import image_size
from vistallm.coinit.sources.base import Draft, Packed, Reject, Source, SourceFormatError, SourceOptions
from vistallm.coinit.sources.images import Box, SourceImage, corners, first_file
from vistallm.coinit.sources.records import Record, read_json, read_object, stream_records
from vistallm.schema import Region


@dataclass(frozen=True)
class GenomeImage:
    """An image of Visual Genome: size in pixels, its COCO id if it is one of COCO's, file relative to the images."""

    image_id: int
    width: int
    height: int
    coco_id: int | None
    file: str

    @property
    def key(self) -> str:
        """The id that leaks are searched by: "vg:1", or "vg:1|coco:5"."""
        return f"vg:{self.image_id}" + (f"|coco:{self.coco_id}" if self.coco_id is not None else "")

    def locate(self, folder: Path) -> SourceImage:
        """The image in a folder that holds VG_100K and VG_100K_2, or all images side by side."""
        name = self.file.rpartition("/")[2]
        path = first_file(folder, self.file, name, f"VG_100K/{name}", f"VG_100K_2/{name}", f"images/{self.file}")
        return SourceImage(path, self.key, self.width, self.height)


def read_images(options: SourceOptions, image_data: str = "") -> dict[int, GenomeImage]:
    """Read image_data.json from the path given, --root or --images: sizes, and which images are COCO's too.

    Raises:
        ValueError: it is in none of them. SourceFormatError: a record lacks a key.
    """
    folders = [folder for folder in (options.root, options.images, options.root.parent) if folder is not None]
    paths = [folder / "image_data.json" for folder in folders if (folder / "image_data.json").is_file()]
    path = Path(image_data) if image_data else paths[0] if paths else options.find_file("image_data.json")
    images = {}
    for number, value in enumerate(read_json(path, list)):
        record = Record(value, f"{path}, record {number}")
        image_id, file = record.integer("image_id"), "/".join(record.text("url").split("/")[-2:])
        size = record.integer("width"), record.integer("height")
        images[image_id] = GenomeImage(image_id, *size, record.optional("coco_id", int), file)
    return images


def image_at(images: dict[int, GenomeImage], image_id: int, where: str) -> GenomeImage:
    """The image of an id; raises SourceFormatError when image_data.json has none."""
    if image_id not in images:
        raise SourceFormatError(f"{where}: image_id {image_id} is not in image_data.json; both must be of one version")
    return images[image_id]


# ---- regions

_Phrase = tuple[int, Box, str]  # id, box (x, y, width, height) in pixels, phrase


def load_visual_genome(options: SourceOptions) -> Source:
    """Region captions and region REC; a phrase that an image's regions use twice makes no REC sample."""
    options.check_split("train")
    settings = options.read_settings(tasks=["reg", "rec"], portion=1.0, image_data="")
    if not 0 < settings["portion"] <= 1:
        raise ValueError(f"--set portion: expected a share above 0 and up to 1, got {settings['portion']}")
    images = read_images(options, settings["image_data"])
    # 5.4 million regions are some 300 MB packed (57 bytes each), and forked workers share them.
    packed = Packed(_read_phrases(options.find_file("region_descriptions.json"), images))
    starts = np.cumsum([0, *(len(packed[i][1]) for i in range(len(packed)))]).tolist()
    drawn = {
        task: np.random.default_rng([options.seed, number]).random(starts[-1]) < settings["portion"]
        for number, task in enumerate(("reg", "rec"))
        if task in settings["tasks"]
    }

    def make(record: tuple[int, list[_Phrase]], index: int) -> Iterator[Draft | Reject]:
        image_id, phrases = record
        image = images[image_id].locate(options.image_folder)
        uses = Counter(phrase.lower() for _, _, phrase in phrases)
        for row, (region_id, sides, phrase) in enumerate(phrases, starts[index]):
            tasks = [task for task, rows in drawn.items() if rows[row]]
            if not tasks:
                continue
            where = f"region_descriptions.json, image {image_id}, region {region_id}"
            box = image.cut(corners(*sides), where)
            if isinstance(box, Reject) or not phrase:
                yield box if isinstance(box, Reject) else Reject("empty-phrase", where)
                continue
            for task in tasks:
                if task == "rec" and uses[phrase.lower()] > 1:
                    yield Reject("ambiguous-phrase", f"{where}: {phrase!r} names {uses[phrase.lower()]} regions")
                    continue
                name, region = f"visual-genome-train-{image_id}-{region_id}-{task}", Region(0, "box", box=box)
                yield image.draft(name, task, "visual-genome", fields={"expr": phrase}, regions=[region])

    return Source(packed, make)


def _read_phrases(path: Path, images: dict[int, GenomeImage]) -> Iterator[tuple[int, list[_Phrase]]]:
    """The regions of each image, in file order."""
    for record in stream_records(path):
        image_id = image_at(images, record.integer("id"), record.where).image_id
        phrases: list[_Phrase] = []
        for region in record.records("regions", "region"):
            x, y, width, height = (region.integer(key) for key in ("x", "y", "width", "height"))
            phrase = " ".join(region.text("phrase").split())
            phrases.append((region.integer("region_id"), (x, y, width, height), phrase))
        yield image_id, phrases


# ---- PointQA, with the keys of the authors' own scripts (github.com/princetonvisualai/pointingqa, dataset-code)

_ASKS = ["object", "super", "general"]
_FORMS = {"point": "pointqa", "box": "boxqa"}


@dataclass
class _Question:
    """One question: its id within the image, text, answer, box (x, y, width, height), point (x, y), kind if any."""

    name: str
    text: str
    answer: str
    box: Box
    point: tuple[float, float]
    asks: str | None = None


def load_pointqa_local(options: SourceOptions) -> Source:
    """Questions whose answer is at the point."""
    options.check_split("train", "val", "testdev", "testfinal")
    settings = options.read_settings(forms=list(_FORMS), image_data="")
    return _load_pointqa("pointqa-local", "localqa", options, settings, _local_questions)


def load_pointqa_looktwice(options: SourceOptions) -> Source:
    """Questions that begin at the point and count over the image."""
    options.check_split("train", "val", "test")
    settings = options.read_settings(forms=list(_FORMS), asks=_ASKS, image_data="")
    read = partial(_look_twice_questions, settings["asks"])
    return _load_pointqa("pointqa-looktwice", "looktwiceqa", options, settings, read)


def _load_pointqa(
    source: str,
    stem: str,
    options: SourceOptions,
    settings: dict[str, Any],
    read: Callable[[Record, int], Iterator[_Question]],
) -> Source:
    path = options.find_file(f"{stem}_dataset.json")
    ids = [str(image_id) for image_id in read_json(options.find_file(f"{stem}_{options.split}_imgs.json"), list)]
    images, data = read_images(options, settings["image_data"]), read_object(path)

    def make(item: tuple[str, list[Any]], _: int) -> Iterator[Draft | Reject]:
        image_id, entries = item
        image = image_at(images, int(image_id), str(path)).locate(options.image_folder)
        for number, entry in enumerate(entries):
            record = Record(entry, f"{path}, record {image_id}, question {number}")
            for question in read(record, number):
                for form in settings["forms"]:
                    region = _question_region(form, question, image, record.where)
                    if isinstance(region, Reject):
                        yield region
                        continue
                    yield image.draft(
                        f"{source}-{options.split}-{image_id}-{question.name}-{form}",
                        _FORMS[form],
                        source,
                        {} if question.asks is None else {"asks": question.asks},
                        fields={"question": place_region(question.text), "answer": question.answer},
                        regions=[region],
                    )

    return Source(Packed((image_id, data.require(image_id, list)) for image_id in ids), make)


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
            "each point belongs to the object at the same position"
        )
    for i, (box, point) in enumerate(zip(objects, points, strict=True)):
        # `all_ans` is the set of the answers, in any order: only a point's own `ans` belongs to its object.
        yield _Question(f"{number}-{i}", question, point.text("ans"), *_read_object(box, point))


def _look_twice_questions(asks: list[str], record: Record, number: int) -> Iterator[_Question]:
    place = _read_object(record.require("bbox", object), Record(record.require("point", dict), record.where))
    answer = str(record.require("ans", object)).strip()
    if not answer.isdigit():
        raise record.fault(f"expected key 'ans' as a number, got {answer!r}")
    for kind in asks:
        text = record.text("obj_question" if kind == "object" else f"{kind}_question")
        yield _Question(f"{number}-{kind}", text, answer, *place, kind)


def _read_object(box: Any, point: Record) -> tuple[Box, tuple[float, float]]:
    """Box (x, y, width, height), of four keys or a list, and the point in it, pixels.

    Raises SourceFormatError when they do not fit: a point is the rounded middle of its box, which [x0, y0, x1, y1] read
    as a list [x, y, w, h] would have elsewhere.
    """
    listed = isinstance(box, list)
    if listed and (len(box) != 4 or not all(isinstance(value, int | float) for value in box)):
        raise point.fault(f"expected a box of four numbers [x, y, w, h], got {box!r}")
    px, py = point.numbers("x", "y")
    x, y, w, h = box if listed else Record(box, point.where).numbers("x", "y", "w", "h")
    slack_x, slack_y = (1.5, 1.5) if listed else (w / 2 + 1, h / 2 + 1)
    if abs(x + w / 2 - px) > slack_x or abs(y + h / 2 - py) > slack_y:
        expected = f"expected the point {'in the middle of' if listed else 'in'} the box [x, y, w, h]"
        raise point.fault(f"{expected}, got point {(px, py)} and box {[x, y, w, h]}")
    return (x, y, w, h), (px, py)


def _question_region(form: str, question: _Question, image: SourceImage, where: str) -> Region | Reject:
    px, py = question.point
    if not (0 <= px <= image.width and 0 <= py <= image.height):
        return Reject("point-outside", f"{where}: {question.point} is not in the image, {image.width} x {image.height}")
    box = image.cut(corners(*question.box), where)
    if isinstance(box, Reject):
        return box
    return Region(0, "point", point=(px, py)) if form == "point" else Region(0, "box", box=box)


# ---- Visual7W

_KINDS = {"v7w": "box", "v7w_point": "point"}  # task -> how it answers
_Pair = tuple[int, str, list[tuple[float, ...]]]
"""Question id, text and boxes (x, y, width, height), the right one first."""


def load_visual7w(options: SourceOptions) -> Source:
    """Which-questions with four candidate boxes, answered by the box or by its middle (`v7w_point`).

    The order of the candidates is drawn from the seed and the question's id. A box may begin at -1, which is cut.
    """
    settings = options.read_settings(tasks=list(_KINDS), image_data="")
    split = options.check_split("train", "val", "test")
    genome, path = read_images(options, settings["image_data"]), options.find_file("dataset_v7w_pointing.json")
    data = read_object(path)
    boxes = {box.integer("box_id"): box.numbers("x", "y", "width", "height") for box in data.records("boxes", "box")}
    packed = Packed(
        (image.integer("image_id"), image.text("filename"), [_read_pair(p, boxes) for p in image.records("qa_pairs")])
        for image in data.records("images", "image")
        if image.text("split") == split
    )

    def make(record: tuple[int, str, list[_Pair]], _: int) -> Iterator[Draft | Reject]:
        image_id, file, pairs = record
        image_path = first_file(options.images or options.root / "images", file, f"images/{file}")
        where = f"{path}, image {image_id}"
        try:
            size = image_size(image_path)  # the annotations have no sizes, and boxes must be cut to them
        except (OSError, ValueError) as error:
            yield Reject("missing-image", f"{where}: {error}")
            return
        image = SourceImage(image_path, image_at(genome, image_id, where).key, *size)
        for qa_id, question, sides in pairs:
            candidates = [image.cut(corners(*box), f"{path}, qa_id {qa_id}") for box in sides]
            if rejects := [box for box in candidates if isinstance(box, Reject)]:
                yield rejects[0]
                continue
            order = np.random.default_rng([options.seed, qa_id]).permutation(len(sides)).tolist()
            fields = {
                "question": question,
                "candidates": " ".join(f"{{regions:{number}:box}}" for number in range(len(order))),
                "targets": [order.index(0)],
            }
            for task in settings["tasks"]:
                name, kind = f"visual7w-{split}-{qa_id}-{_KINDS[task]}", _KINDS[task]
                regions = [_candidate(kind, number, candidates[i]) for number, i in enumerate(order)]
                yield image.draft(name, task, "visual7w", {"qa_id": qa_id}, fields=fields, regions=regions)

    return Source(packed, make)


def _read_pair(pair: Record, boxes: dict[int, tuple[float, ...]]) -> _Pair:
    qa_id, choices = pair.integer("qa_id"), pair.values("multiple_choices", int)
    ids = [pair.integer("answer"), *choices]
    if unknown := [box for box in ids if box not in boxes]:
        raise pair.fault(f"qa_id {qa_id}: expected ids of `boxes`, got {unknown[0]}")
    if len(choices) != 3:
        raise pair.fault(f"qa_id {qa_id}: expected 3 wrong choices, got {len(choices)}")
    return qa_id, pair.text("question").strip(), [boxes[box] for box in ids]


def _candidate(kind: str, number: int, box: Any) -> Region:
    x0, y0, x1, y1 = box
    point = ((x0 + x1) / 2, (y0 + y1) / 2) if kind == "point" else None
    return Region(0, kind, number, box=box, point=point)
