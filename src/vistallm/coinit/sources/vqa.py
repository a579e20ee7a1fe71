"""VQAv2, and VQA-E and VQA-X, which explain its answers.

In: VQAv2's `v2_OpenEnded_mscoco_<set>_questions.json` and `v2_mscoco_<set>_annotations.json`, joined on question_id;
`VQA-E_{train,val}_set.json` (a list); `{train,val,test}_exp_anno.json` of VQA-X (question id -> explanations, joined
with VQAv2). Out: `vqa` and `vqa_e` samples. A unit is one question.

VQA-E has no question ids, so its samples are named by their place in the file. Both are also read in the form of JSON
lines `vqa_{E,X}_{split}.jsonl`, with `file_path`, `question` and either `explanation`, `multiple_answers` (E) or
`justification`, `multiple_choice_answer` (X). VQAv2's test and test-dev have no annotations, which
`meta["unlabelled"]` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vistallm.coinit.sources.base import (
    Draft,
    Packed,
    Reject,
    Source,
    SourceFormatError,
    SourceImage,
    SourceOptions,
    coco_image,
    first_file,
)
from vistallm.coinit.sources.records import Record, RecordSource, file_source, read_json_lines, read_list, read_object

_SETS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
UNKNOWN = "unknown"
"""The answer of a sample whose dataset publishes none; its meta says `unlabelled`."""


def load_vqav2(options: SourceOptions) -> Source:
    """VQAv2; splits train, val, test and test-dev (both of the images of test2015, without answers)."""
    options.read_settings()
    questions = _questions(options, options.check_split(*_SETS))
    answers = _annotations(options, options.split) if options.split in ("train", "val") else None
    if answers is not None and (missing := questions.keys() ^ answers.keys()):
        raise SourceFormatError(
            f"{options.root}, {options.split}: expected the same question_id in questions and annotations; "
            f"{len(missing)} are in one of them only, such as {min(missing)}"
        )
    subset = "test2015" if answers is None else _SETS[options.split]
    unknown: tuple[str, list[str]] = (UNKNOWN, [])

    def make(record: Any, _: int) -> Iterator[Draft]:
        question_id, image_id, question, answer, ten = record
        yield _image(options, subset, image_id).draft(
            f"vqav2-{options.split}-{question_id}",
            "vqa",
            "vqav2",
            fields={"question": question, "answer": answer} | ({"answers": ten} if ten else {}),
            meta={"question_id": question_id} | ({} if ten else {"unlabelled": True}),
        )

    rows = ((key, *asked, *(answers[key] if answers else unknown)) for key, asked in questions.items())
    return RecordSource(Packed(rows), make)


def load_vqa_e(options: SourceOptions) -> Source:
    """VQA-E: questions of VQAv2 whose answer an image caption explains; splits train, val."""
    options.read_settings()
    split = options.check_split("train", "val")
    path = options.find_file(f"VQA-E_{split}_set.json", f"vqa_E_{split}.jsonl")
    if path.suffix == ".jsonl":
        return _jsonl_source(options, "vqa-e", path, "explanation", "multiple_answers")

    def make(record: Record, number: int) -> Iterator[Draft | Reject]:
        explanation = _first_text(record.require("explanation", list), record)  # [text, its score]
        fields: dict[str, Any] = {"question": record.text("question"), "explanation": explanation}
        fields["answer"] = record.text("multiple_choice_answer")
        if "answers" in record.data:
            fields["answers"] = record.values("answers", str)
        yield _explained("vqa-e", f"{split}-{number}", _image(options, _SETS[split], record.integer("img_id")), fields)

    return file_source(path, read_list(path), make)


def load_vqa_x(options: SourceOptions) -> Source:
    """VQA-X: explanations by people; splits train (of VQAv2's train), val and test (both of its val)."""
    options.read_settings()
    split = options.check_split("train", "val", "test")
    names = [f"{folder}{split}_exp_anno.json" for folder in ("", "textual/", "Annotations/")]
    path = options.find_file(*names, f"vqa_X_{split}.jsonl")
    if path.suffix == ".jsonl":
        return _jsonl_source(options, "vqa-x", path, "justification", "multiple_choice_answer")
    joined = "train" if split == "train" else "val"
    questions, answers = _questions(options, joined), _annotations(options, joined)

    def make(item: tuple[str, Any], _: int) -> Iterator[Draft | Reject]:
        key, explanations = item
        record = Record({"explanations": explanations}, f"{path}, question {key}")
        if not key.isdigit() or int(key) not in questions or int(key) not in answers:
            raise record.fault(f"expected a question_id of VQAv2 {joined}, got {key!r}")
        (image_id, question), (answer, ten) = questions[int(key)], answers[int(key)]
        texts = record.values("explanations", str)
        for place, text in enumerate(texts if split == "train" else texts[:1]):
            fields = {"question": question, "explanation": text, "answer": answer, "answers": ten}
            image = _image(options, _SETS[joined], image_id)
            yield _explained("vqa-x", f"{split}-{key}-{place}", image, fields, {"question_id": int(key)})

    data = read_object(path).data
    if not isinstance(data, dict):
        raise SourceFormatError(f"{path}: expected question ids with their explanations, got {type(data).__name__}")
    return RecordSource(Packed(data.items()), make)


def _questions(options: SourceOptions, split: str) -> dict[int, tuple[int, str]]:
    """question_id -> (image_id, question)."""
    name = f"v2_OpenEnded_mscoco_{_SETS[split]}_questions.json"
    records = read_object(options.find_file(name, f"Questions/{name}")).records("questions")
    return {r.integer("question_id"): (r.integer("image_id"), r.text("question").strip()) for r in records}


def _annotations(options: SourceOptions, split: str) -> dict[int, tuple[str, list[str]]]:
    """question_id -> (the most frequent answer, the ten answers)."""
    name = f"v2_mscoco_{_SETS[split]}_annotations.json"
    found = {}
    for record in read_object(options.find_file(name, f"Annotations/{name}")).records("annotations"):
        ten = [Record(answer, record.where).text("answer") for answer in record.values("answers", dict)]
        if len(ten) != 10:
            raise record.fault(f"expected 10 answers, got {len(ten)}")
        found[record.integer("question_id")] = (record.text("multiple_choice_answer"), ten)
    return found


def _jsonl_source(options: SourceOptions, source: str, path: Path, explanation_key: str, answer_key: str) -> Source:
    def make(record: Record, number: int) -> Iterator[Draft | Reject]:
        file = record.text("file_path")
        digits = re.search(r"(\d{12})\.jpg$", file)
        if digits is None:
            raise record.fault(f"expected a COCO file name in 'file_path', got {file!r}")
        fields = {
            "question": record.text("question"),
            "explanation": _first_text(record.data.get(explanation_key), record),
            "answer": _first_text(record.data.get(answer_key), record),
        }
        image = SourceImage(first_file(options.image_folder, file, Path(file).name), f"coco:{int(digits[1])}")
        yield _explained(source, f"{options.split}-{number}", image, fields)

    return file_source(path, read_json_lines(path), make)


def _first_text(value: Any, record: Record) -> str:
    """A text, or the first of a list."""
    found = value[0] if isinstance(value, list) and value else value
    if not isinstance(found, str):
        raise record.fault(f"expected a list that begins with a text, got {value!r:.80}")
    return found


def _image(options: SourceOptions, subset: str, image_id: int) -> SourceImage:
    """An image of a part of COCO, such as "train2014"."""
    path = coco_image(options.image_folder, f"COCO_{subset}_{image_id:012d}.jpg")
    return SourceImage(path, f"coco:{image_id}")


def _explained(
    source: str, name: str, image: SourceImage, fields: dict[str, Any], meta: dict[str, Any] | None = None
) -> Draft | Reject:
    """The explanation becomes a sentence, as "So the answer is .." follows it."""
    explanation = " ".join(fields["explanation"].split())
    if not explanation:
        return Reject("empty-text", f"{source}, {name}: expected an explanation, got none")
    fields["explanation"] = explanation if explanation[-1] in ".!?" else f"{explanation}."
    return image.draft(f"{source}-{name}", "vqa_e", source, meta, fields=fields)
