"""POPE: yes/no questions about objects of COCO val2014 images, JSON lines in, `pope` samples out.

In: `coco_pope_{random,popular,adversarial}.json` (3,000 lines each: question_id, image, text, label). The three ways to
pick absent objects are the splits, all for evaluation. A unit is one question.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vistallm.coinit.sources.base import (
    Draft,
    Packed,
    Reject,
    Source,
    SourceFormatError,
    SourceOptions,
    read_json_lines,
    require,
)
from vistallm.coinit.sources.records import RecordSource, check_split, coco_image, find_file, read_settings
from vistallm.schema import ImageInfo, Sample


def load_pope(options: SourceOptions) -> Source:
    """POPE; splits random, popular, adversarial."""
    read_settings(options)
    split = check_split(options, "random", "popular", "adversarial")
    name = f"coco_pope_{split}.json"
    path = find_file(options.root, name, f"coco/{name}", f"output/coco/{name}")

    def make(record: Any, number: int) -> Iterator[Draft | Reject]:
        where = f"{path}, record {number}"
        label, image = require(record, "label", str, where), require(record, "image", str, where)
        image_id = image.rpartition("_")[2].partition(".")[0]
        if label not in ("yes", "no") or not image_id.isdigit():
            raise SourceFormatError(f"{where}: expected label yes or no and a COCO image, got {label!r}, {image!r}")
        question_id = require(record, "question_id", int, where)
        sample = Sample(
            f"pope-{split}-{question_id}",
            "pope",
            "pope",
            [ImageInfo("", 0, 0)],
            fields={"question": require(record, "text", str, where), "answer": label},
            meta={"image_ids": [f"coco:{int(image_id)}"], "level": split, "question_id": question_id},
        )
        yield Draft(sample, [coco_image(options.images or options.root, image)])

    return RecordSource(Packed(read_json_lines(path)), make)
