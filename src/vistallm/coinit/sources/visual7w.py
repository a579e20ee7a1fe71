"""Visual7W pointing: `dataset_v7w_pointing.json` in, questions with four candidate boxes out, `v7w` and `v7w_point`.

The answer and the three wrong choices of a question are box ids. A box may begin at -1, which is cut to the image. The
order of the candidates is drawn from the seed and the question's id. `v7w` answers with the box, `v7w_point` with the
point in its middle; both name the candidates by boxes. Images are v7w_<id>.jpg; the ids are Visual Genome's, and its
image_data.json says which of them are COCO images too. Settings: `tasks=v7w,v7w_point`. A unit is one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

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
from vistallm.coinit.sources.records import (
    RecordSource,
    check_split,
    find_file,
    image_file,
    read_settings,
    require_list,
)
from vistallm.coinit.sources.visual_genome import NUMBER, chosen, image_at, read_images
from vistallm.schema import ImageInfo, Region, Sample

_TASKS = ("v7w", "v7w_point")


def load_visual7w(options: SourceOptions) -> Source:
    """Which-questions answered by a region; splits train, val, test."""
    settings = read_settings(options, tasks=",".join(_TASKS), image_data="")
    check_split(options, "train", "val", "test")
    tasks, genome = chosen(settings, "tasks", *_TASKS), read_images(options, settings["image_data"])
    path = find_file(options.root, "dataset_v7w_pointing.json")
    data = read_json(path)
    boxes = {
        require(box, "box_id", int, where): tuple(
            require(box, key, NUMBER, where) for key in ("x", "y", "width", "height")
        )
        for where, box in ((f"{path}, box {i}", box) for i, box in enumerate(require(data, "boxes", list, str(path))))
    }
    folder = options.images or options.root / "images"

    def records() -> Iterator[tuple[int, str, list[Any]]]:
        for number, image in enumerate(require(data, "images", list, str(path))):
            where = f"{path}, image {number}"
            if require(image, "split", str, where) == options.split:
                pairs = [_read_pair(pair, boxes, where) for pair in require(image, "qa_pairs", list, where)]
                yield require(image, "image_id", int, where), require(image, "filename", str, where), pairs

    packed = Packed(records())

    def make(record: tuple[int, str, list[Any]], _: int) -> Iterator[Draft | Reject]:
        image_id, file, pairs = record
        image = image_file(folder, file, f"images/{file}")
        try:
            with Image.open(image) as header:  # the annotations name no sizes, and boxes must be cut to them
                width, height = header.size
        except (OSError, UnidentifiedImageError) as error:
            yield Reject("missing-image", f"{path}, image {image_id}: {error}")
            return
        key = image_at(genome, image_id, f"{path}, image {image_id}").key
        for pair in pairs:
            cut = [clip_box((x, y, x + w, y + h), width, height) for x, y, w, h in pair[2]]
            if None in cut:
                yield Reject(
                    "empty-box", f"{path}, qa_id {pair[0]}: nothing of {pair[2][cut.index(None)]} is in the image"
                )
                continue
            for task in tasks:
                sample = _question(options, task, pair, [box for box in cut if box is not None])
                sample.images, sample.meta = [ImageInfo("", width, height)], {"image_ids": [key], "qa_id": pair[0]}
                yield Draft(sample, [image])

    return RecordSource(packed, make)


def _read_pair(pair: Any, boxes: dict[int, tuple[float, ...]], where: str) -> tuple[int, str, list[tuple[float, ...]]]:
    """Question id, text and boxes (x, y, width, height), the right one first."""
    qa_id, choices = require(pair, "qa_id", int, where), require_list(pair, "multiple_choices", int, where)
    ids = [require(pair, "answer", int, where), *choices]
    if unknown := [box for box in ids if box not in boxes]:
        raise SourceFormatError(f"{where}, qa_id {qa_id}: expected ids of `boxes`, got {unknown[0]}")
    if len(choices) != 3:
        raise SourceFormatError(f"{where}, qa_id {qa_id}: expected 3 wrong choices, got {len(choices)}")
    return qa_id, require(pair, "question", str, where).strip(), [boxes[box] for box in ids]


def _question(options: SourceOptions, task: str, pair: tuple[int, str, list[Any]], boxes: list[Any]) -> Sample:
    """The sample of a question, without its image; object i is the i-th candidate."""
    qa_id, question, _ = pair
    order = np.random.default_rng([options.seed, qa_id]).permutation(len(boxes)).tolist()
    kind = "point" if task == "v7w_point" else "box"
    regions = []
    for number, place in enumerate(order):
        x0, y0, x1, y1 = boxes[place]
        point = ((x0 + x1) / 2, (y0 + y1) / 2) if kind == "point" else None
        regions.append(Region(0, kind, number, box=boxes[place], point=point))
    fields_of = {
        "question": question,
        "candidates": " ".join(f"{{regions:{number}:box}}" for number in range(len(order))),
        "targets": [order.index(0)],
    }
    return Sample(f"visual7w-{options.split}-{qa_id}-{kind}", task, "visual7w", [], fields=fields_of, regions=regions)
