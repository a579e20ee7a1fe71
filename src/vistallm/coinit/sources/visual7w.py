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

from vistallm.coinit.images import image_size
from vistallm.coinit.sources.base import Draft, Packed, Reject, Source, SourceImage, SourceOptions, chosen, first_file
from vistallm.coinit.sources.records import Record, RecordSource, read_object
from vistallm.coinit.sources.shapes import clip_box
from vistallm.coinit.sources.visual_genome import image_at, read_images
from vistallm.schema import Region

_KINDS = {"v7w": "box", "v7w_point": "point"}  # task -> how it answers
_Pair = tuple[int, str, list[tuple[float, ...]]]
"""Question id, text and boxes (x, y, width, height), the right one first."""


def load_visual7w(options: SourceOptions) -> Source:
    """Which-questions answered by a region; splits train, val, test."""
    settings = options.read_settings(tasks=",".join(_KINDS), image_data="")
    split = options.check_split("train", "val", "test")
    tasks, genome = chosen(settings, "tasks", *_KINDS), read_images(options, settings["image_data"])
    path = options.find_file("dataset_v7w_pointing.json")
    data = read_object(path)
    boxes = {box.integer("box_id"): box.numbers("x", "y", "width", "height") for box in data.records("boxes", "box")}
    packed = Packed(
        (
            image.integer("image_id"),
            image.text("filename"),
            [_read_pair(pair, boxes) for pair in image.records("qa_pairs")],
        )
        for image in data.records("images", "image")
        if image.text("split") == split
    )

    def make(record: tuple[int, str, list[_Pair]], _: int) -> Iterator[Draft | Reject]:
        image_id, file, pairs = record
        image_path = first_file(options.images or options.root / "images", file, f"images/{file}")
        where = f"{path}, image {image_id}"
        try:
            size = image_size(image_path)  # the annotations name no sizes, and boxes must be cut to them
        except (OSError, ValueError) as error:
            yield Reject("missing-image", f"{where}: {error}")
            return
        image = SourceImage(image_path, image_at(genome, image_id, where).key, *size)
        for qa_id, question, sides in pairs:
            cut = [clip_box((x, y, x + w, y + h), *size) for x, y, w, h in sides]
            if None in cut:
                nothing = f"nothing of {sides[cut.index(None)]} is in the image"
                yield Reject("empty-box", f"{path}, qa_id {qa_id}: {nothing}")
                continue
            order = np.random.default_rng([options.seed, qa_id]).permutation(len(cut)).tolist()
            for task in tasks:
                yield image.draft(
                    f"visual7w-{split}-{qa_id}-{_KINDS[task]}",
                    task,
                    "visual7w",
                    {"qa_id": qa_id},
                    fields={
                        "question": question,
                        "candidates": " ".join(f"{{regions:{number}:box}}" for number in range(len(order))),
                        "targets": [order.index(0)],
                    },
                    regions=[_candidate(_KINDS[task], number, cut[place]) for number, place in enumerate(order)],
                )

    return RecordSource(packed, make)


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
