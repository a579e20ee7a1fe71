"""Sources on Visual Genome's images: its regions (REG, REC), PointQA (point and box questions), Visual7W pointing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vistallm.coinit.images import image_size
from vistallm.coinit.sources.base import Box, Draft, Packed, Reject, Source, SourceImage, SourceOptions, corners
from vistallm.coinit.sources.records import Record, read_json, read_object, stream_records
from vistallm.schema import Region


@dataclass(frozen=True)
class Genome:
    """Visual Genome's images, from image_data.json.

    Attributes:
        options: of the source. images: by id, with sizes and paths relative to the images' folder. of_coco: ids of
            those that COCO has too, by its id; their `image_id` is "vg:1|coco:5".
    """

    options: SourceOptions
    images: dict[int, SourceImage]
    of_coco: dict[int, int]

    def at(self, image_id: int, record: Record) -> SourceImage:
        """The image of an id, where the two zips put it (also as images/ and images2/), or all images side by side."""
        if image_id not in self.images:
            raise record.fault(f"image_id {image_id} is not in image_data.json; use version 1.2 of both")
        name, file = self.images[image_id].path.name, self.images[image_id].path.as_posix()
        places = [file, name, *(f"{folder}/{name}" for folder in ("VG_100K", "VG_100K_2"))]
        places += [f"{zipped}/{file}" for zipped in ("images", "images2", "../images2")]
        return replace(self.images[image_id], path=self.options.image(*places))


def read_genome(options: SourceOptions, image_data: str = "") -> Genome:
    """Read image_data.json from the path given, --root or --images.

    Raises:
        ValueError: it is in none of them. SourceFormatError: a record lacks a key.
    """
    folders = [folder for folder in (options.root, options.images, options.root.parent) if folder is not None]
    paths = [folder / "image_data.json" for folder in folders if (folder / "image_data.json").is_file()]
    hint = "it is Visual Genome's (version 1.2): put it there, or name it with --set image_data=FILE"
    path = Path(image_data) if image_data else paths[0] if paths else options.find_file("image_data.json", hint=hint)
    genome = Genome(options, {}, {})
    for number, value in enumerate(read_json(path, list)):
        record = Record(value, f"{path}, record {number}")
        if isinstance(value, dict) and "id" in value and "image_id" not in value:
            raise record.fault("expected key 'image_id', got 'id', as in Visual Genome 1.0; fetch version 1.2")
        image_id, coco_id = record.integer("image_id"), record.optional("coco_id", int)
        file, key = Path(*record.text("url").split("/")[-2:]), f"vg:{image_id}"
        if coco_id is not None:
            genome.of_coco[coco_id], key = image_id, f"{key}|coco:{coco_id}"
        genome.images[image_id] = SourceImage(file, key, record.integer("width"), record.integer("height"))
    return genome


# ---- regions


def load_visual_genome(options: SourceOptions) -> Source:
    """Region captions and region REC; a phrase that an image's regions use twice makes no REC sample."""
    options.check_split("train")
    settings = options.read_settings(tasks=["reg", "rec"], portion=1.0, image_data="")
    if not 0 < settings["portion"] <= 1:
        raise ValueError(f"--set portion: expected a share above 0 and up to 1, got {settings['portion']}")
    genome = read_genome(options, settings["image_data"])
    # 5.4 million regions are some 300 MB packed (57 bytes each), and forked workers share them.
    packed = Packed(_read_phrases(options.find_file("region_descriptions.json")))
    starts = np.cumsum([0, *(len(packed[i][1]) for i in range(len(packed)))]).tolist()
    drawn = {
        task: np.random.default_rng([options.seed, number]).random(starts[-1]) < settings["portion"]
        for number, task in enumerate(("reg", "rec"))
        if task in settings["tasks"]
    }

    def make(record: tuple[int, list[tuple[int, Box, str]]], index: int) -> Iterator[Draft | Reject]:
        image_id, phrases = record
        image = genome.at(image_id, Record(None, f"region_descriptions.json, record {index}"))
        uses = Counter(phrase.lower() for _, _, phrase in phrases)
        for row, (region_id, sides, phrase) in enumerate(phrases, starts[index]):
            tasks = [task for task, rows in drawn.items() if rows[row]]
            where = f"region_descriptions.json, image {image_id}, region {region_id}"
            box = image.cut(corners(*sides), where)
            if isinstance(box, Reject) or not phrase:
                if tasks:
                    yield box if isinstance(box, Reject) else Reject("empty-phrase", where)
                continue
            for task in tasks:
                if task == "rec" and uses[phrase.lower()] > 1:
                    yield Reject("ambiguous-phrase", f"{where}: {phrase!r} names {uses[phrase.lower()]} regions")
                    continue
                name, regions = f"visual-genome-train-{image_id}-{region_id}-{task}", [Region(0, "box", box=box)]
                yield image.draft(name, task, "visual-genome", fields={"expr": phrase}, regions=regions)

    return Source(packed, make)


def _read_phrases(path: Path) -> Iterator[tuple[int, list[tuple[int, Box, str]]]]:
    """Image id, and of each region: id, box (x, y, width, height) in pixels, phrase."""
    for record in stream_records(path):
        phrases: list[tuple[int, Box, str]] = []
        for region in record.records("regions"):
            x, y, width, height = (region.integer(key) for key in ("x", "y", "width", "height"))
            phrase = " ".join(region.text("phrase").split())
            phrases.append((region.integer("region_id"), (x, y, width, height), phrase))
        yield record.integer("id"), phrases


# ---- PointQA, with the keys of the authors' own scripts (github.com/princetonvisualai/pointingqa, dataset-code)


def load_pointqa(kind: str, options: SourceOptions) -> Source:
    """PointQA "local", whose answer is at the point, or "looktwice", which counts over the image from there."""
    local = kind == "local"
    options.check_split("train", "val", *(("testdev", "testfinal") if local else ("test",)))
    asks = {} if local else {"asks": ["object", "super", "general"]}
    settings = options.read_settings(forms=["point", "box"], image_data="", **asks)
    path, source = options.find_file(f"{kind}qa_dataset.json"), f"pointqa-{kind}"
    ids = [str(image_id) for image_id in read_json(options.find_file(f"{kind}qa_{options.split}_imgs.json"), list)]
    genome, data = read_genome(options, settings["image_data"]), read_object(path)

    def make(item: tuple[str, list[Any]], _: int) -> Iterator[Draft | Reject]:
        image = genome.at(int(item[0]), Record(None, str(path)))
        for number, entry in enumerate(item[1]):
            record = Record(entry, f"{path}, record {item[0]}, question {number}")
            for asked in _local_questions(record) if local else _count_questions(settings["asks"], record):
                name, text, answer, meta, sides, point = asked
                for form in settings["forms"]:
                    if not (0 <= point[0] <= image.width and 0 <= point[1] <= image.height):
                        where = f"{record.where}: {point} is not in the image, {image.width} x {image.height}"
                        yield Reject("point-outside", where)
                    elif isinstance(box := image.cut(corners(*sides), record.where), Reject):
                        yield box
                    else:
                        region = Region(0, "point", point=point) if form == "point" else Region(0, "box", box=box)
                        fields = {"question": place_region(text), "answer": answer}
                        task = "pointqa" if form == "point" else "boxqa"
                        begin = f"{source}-{options.split}-{item[0]}-{number}{name}-{form}"
                        yield image.draft(begin, task, source, meta, fields=fields, regions=[region])

    return Source(((image_id, data.require(image_id, list)) for image_id in ids), make)


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


# A question: id within the image, text, answer, meta, box (x, y, width, height), point (x, y).
_Question = tuple[str, str, str, dict[str, str], Box, tuple[float, float]]


def _local_questions(record: Record) -> Iterator[_Question]:
    objects, points = record.require("all_objs", list), list(record.records("points"))
    if len(objects) != len(points):
        got = f"{len(points)} and {len(objects)}; each point belongs to the object at the same position"
        raise record.fault(f"expected as many points as all_objs, got {got}")
    for i, (box, point) in enumerate(zip(objects, points, strict=True)):
        # `all_ans` is the set of the answers, in any order: only a point's own `ans` belongs to its object.
        yield f"-{i}", record.text("question"), point.text("ans"), {}, *_read_object(box, point)


def _count_questions(asks: list[str], record: Record) -> Iterator[_Question]:
    place = _read_object(record.require("bbox", object), Record(record.require("point", dict), record.where))
    answer = str(record.require("ans", object)).strip()
    if not answer.isdigit():
        raise record.fault(f"expected key 'ans' as a number, got {answer!r}")
    for kind in asks:
        text = record.text("obj_question" if kind == "object" else f"{kind}_question")
        yield f"-{kind}", text, answer, {"asks": kind}, *place


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


# ---- Visual7W


def load_visual7w(options: SourceOptions) -> Source:
    """Which-questions with four candidate boxes, answered by the box or by its middle (`v7w_point`).

    The order of the candidates is drawn from the seed and the question's id. A box may begin at -1, which is cut.
    """
    settings = options.read_settings(tasks=["v7w", "v7w_point"], image_data="")
    split = options.check_split("train", "val", "test")
    genome = read_genome(options, settings["image_data"])
    path = options.find_file(
        "dataset_v7w_pointing.json", "dataset.json"
    )  # as zipped; as the toolkit's script leaves it
    data = read_object(path)
    boxes = {box.integer("box_id"): box.numbers("x", "y", "width", "height") for box in data.records("boxes")}
    records = (
        (image.integer("image_id"), image.text("filename"), [_read_pair(p, boxes) for p in image.records("qa_pairs")])
        for image in data.records("images")
        if image.text("split") == split
    )

    def make(record: tuple[int, str, list[Any]], _: int) -> Iterator[Draft | Reject]:
        image_id, file, pairs = record
        image_path, where = options.image(file, f"images/{file}", usual="images"), f"{path}, image {image_id}"
        try:
            size = image_size(image_path)  # the annotations have no sizes, and boxes must be cut to them
        except (OSError, ValueError) as error:
            yield Reject("missing-image", f"{where}: {error}")
            return
        image = SourceImage(image_path, genome.at(image_id, Record(None, where)).image_id, *size)
        for qa_id, question, sides in pairs:
            cut = [image.cut(corners(*box), f"{path}, qa_id {qa_id}") for box in sides]
            if rejects := [box for box in cut if isinstance(box, Reject)]:
                yield rejects[0]
                continue
            candidates = [box for box in cut if not isinstance(box, Reject)]
            order = np.random.default_rng([options.seed, qa_id]).permutation(len(sides)).tolist()
            slots = " ".join(f"{{regions:{number}:box}}" for number in range(len(order)))
            fields = {"question": question, "candidates": slots, "targets": [order.index(0)]}
            for task in settings["tasks"]:
                kind, regions = "box" if task == "v7w" else "point", []
                for number, i in enumerate(order):
                    x0, y0, x1, y1 = candidates[i]
                    point = ((x0 + x1) / 2, (y0 + y1) / 2) if kind == "point" else None
                    regions.append(Region(0, kind, number, box=candidates[i], point=point))
                name, meta = f"visual7w-{split}-{qa_id}-{kind}", {"qa_id": qa_id}
                yield image.draft(name, task, "visual7w", meta, fields=fields, regions=regions)

    return Source(records, make)


def _read_pair(pair: Record, boxes: dict[int, tuple[float, ...]]) -> tuple[int, str, list[tuple[float, ...]]]:
    """Question id, text and boxes (x, y, width, height), the right one first."""
    qa_id, choices = pair.integer("qa_id"), pair.values("multiple_choices", int)
    ids = [pair.integer("answer"), *choices]
    if unknown := [box for box in ids if box not in boxes]:
        raise pair.fault(f"qa_id {qa_id}: expected ids of `boxes`, got {unknown[0]}")
    if len(choices) != 3:
        raise pair.fault(f"qa_id {qa_id}: expected 3 wrong choices, got {len(choices)}")
    return qa_id, pair.text("question").strip(), [boxes[box] for box in ids]
