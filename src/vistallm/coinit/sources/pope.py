"""POPE: yes/no questions about objects of COCO val2014 images, JSON lines in, `pope` samples out.

In: `coco_pope_{random,popular,adversarial}.json` (3,000 lines each: question_id, image, text, label). The three ways to
pick absent objects are the splits, all for evaluation. A unit is one question.
"""

from __future__ import annotations

from collections.abc import Iterator

from vistallm.coinit.sources.base import Draft, Source, SourceImage, SourceOptions, coco_image
from vistallm.coinit.sources.records import Record, file_source, read_json_lines


def load_pope(options: SourceOptions) -> Source:
    """POPE; splits random, popular, adversarial."""
    options.read_settings()
    split = options.check_split("random", "popular", "adversarial")
    name = f"coco_pope_{split}.json"
    path = options.find_file(name, f"coco/{name}", f"output/coco/{name}")

    def make(record: Record, _: int) -> Iterator[Draft]:
        label, file = record.text("label"), record.text("image")
        image_id = file.rpartition("_")[2].partition(".")[0]
        if label not in ("yes", "no") or not image_id.isdigit():
            raise record.fault(f"expected label yes or no and a COCO image, got {label!r}, {file!r}")
        question_id = record.integer("question_id")
        yield SourceImage(coco_image(options.image_folder, file), f"coco:{int(image_id)}").draft(
            f"pope-{split}-{question_id}",
            "pope",
            "pope",
            fields={"question": record.text("text"), "answer": label},
            meta={"level": split, "question_id": question_id},
        )

    return file_source(path, read_json_lines(path), make)
