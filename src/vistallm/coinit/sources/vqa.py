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
    read_json,
    read_json_lines,
    require,
)
from vistallm.coinit.sources.records import (
    RecordSource,
    check_split,
    coco_image,
    find_file,
    image_file,
    read_list,
    read_settings,
    require_list,
)
from vistallm.schema import ImageInfo, Sample

_SETS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
UNKNOWN = "unknown"
"""The answer of a sample whose dataset publishes none; its meta says `unlabelled`."""


def load_vqav2(options: SourceOptions) -> Source:
    """VQAv2; splits train, val, test and test-dev (both of the images of test2015, without answers)."""
    read_settings(options)
    questions = _questions(options.root, check_split(options, *_SETS))
    answers = _annotations(options.root, options.split) if options.split in ("train", "val") else None
    if answers is not None and (missing := questions.keys() ^ answers.keys()):
        raise SourceFormatError(
            f"{options.root}, {options.split}: expected the same question_id in questions and annotations; "
            f"{len(missing)} are in one of them only, such as {min(missing)}"
        )
    maker = _Maker(options, "vqav2", "test2015" if answers is None else _SETS[options.split])

    unknown: tuple[str, list[str]] = (UNKNOWN, [])

    def make(record: Any, _: int) -> Iterator[Draft | Reject]:
        question_id, image_id, question, answer, ten = record
        meta: dict[str, Any] = {"question_id": question_id} | ({} if ten else {"unlabelled": True})
        values = {"question": question, "answer": answer} | ({"answers": ten} if ten else {})
        yield maker.draft("vqa", str(question_id), image_id, values, **meta)

    return RecordSource(
        Packed((key, *asked, *(answers[key] if answers else unknown)) for key, asked in questions.items()), make
    )


def load_vqa_e(options: SourceOptions) -> Source:
    """VQA-E: questions of VQAv2 whose answer an image caption explains; splits train, val."""
    read_settings(options)
    split = check_split(options, "train", "val")
    path = find_file(options.root, f"VQA-E_{split}_set.json", f"vqa_E_{split}.jsonl")
    if path.suffix == ".jsonl":
        return _jsonl_source(options, "vqa-e", path, "explanation", "multiple_answers")
    maker = _Maker(options, "vqa-e", _SETS[split])

    def make(record: Any, number: int) -> Iterator[Draft | Reject]:
        where = f"{path}, record {number}"
        explanation = _first_text(require(record, "explanation", list, where), where)  # [text, its score]
        answer = require(record, "multiple_choice_answer", str, where)
        values = {"question": require(record, "question", str, where), "explanation": explanation, "answer": answer}
        if "answers" in record:
            values["answers"] = require_list(record, "answers", str, where)
        yield maker.explained(str(number), require(record, "img_id", int, where), values)

    return RecordSource(Packed(read_list(path)), make)


def load_vqa_x(options: SourceOptions) -> Source:
    """VQA-X: explanations by people; splits train (of VQAv2's train), val and test (both of its val)."""
    read_settings(options)
    split = check_split(options, "train", "val", "test")
    names = (f"{split}_exp_anno.json", f"textual/{split}_exp_anno.json", f"Annotations/{split}_exp_anno.json")
    path = find_file(options.root, *names, f"vqa_X_{split}.jsonl")
    if path.suffix == ".jsonl":
        return _jsonl_source(options, "vqa-x", path, "justification", "multiple_choice_answer")
    joined = "train" if split == "train" else "val"
    questions, answers = _questions(options.root, joined), _annotations(options.root, joined)
    maker = _Maker(options, "vqa-x", _SETS[joined])

    def make(record: tuple[str, Any], _: int) -> Iterator[Draft | Reject]:
        key, explanations = record
        where = f"{path}, question {key}"
        if not key.isdigit() or int(key) not in questions or int(key) not in answers:
            raise SourceFormatError(f"{where}: expected a question_id of VQAv2 {joined}, got {key!r}")
        image_id, question = questions[int(key)]
        answer, ten = answers[int(key)]
        if not isinstance(explanations, list):
            raise SourceFormatError(f"{where}: expected a list of explanations, got {explanations!r:.80}")
        for place, explanation in enumerate(explanations if split == "train" else explanations[:1]):
            values = {"question": question, "explanation": explanation, "answer": answer, "answers": ten}
            yield maker.explained(f"{key}-{place}", image_id, values, question_id=int(key))

    return RecordSource(Packed(_items(path)), make)


def _items(path: Path) -> list[tuple[str, Any]]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise SourceFormatError(f"{path}: expected question ids with their explanations, got {type(data).__name__}")
    return list(data.items())


def _questions(root: Path, split: str) -> dict[int, tuple[int, str]]:
    """question_id -> (image_id, question)."""
    name = f"v2_OpenEnded_mscoco_{_SETS[split]}_questions.json"
    path = find_file(root, name, f"Questions/{name}")
    found = {}
    for number, record in enumerate(require(read_json(path), "questions", list, str(path))):
        where = f"{path}, questions {number}"
        key, image_id = require(record, "question_id", int, where), require(record, "image_id", int, where)
        found[key] = (image_id, require(record, "question", str, where).strip())
    return found


def _annotations(root: Path, split: str) -> dict[int, tuple[str, list[str]]]:
    """question_id -> (the most frequent answer, the ten answers)."""
    name = f"v2_mscoco_{_SETS[split]}_annotations.json"
    path = find_file(root, name, f"Annotations/{name}")
    found = {}
    for number, record in enumerate(require(read_json(path), "annotations", list, str(path))):
        where = f"{path}, annotations {number}"
        ten = [require(a, "answer", str, where) for a in require_list(record, "answers", dict, where)]
        if len(ten) != 10:
            raise SourceFormatError(f"{where}: expected 10 answers, got {len(ten)}")
        found[require(record, "question_id", int, where)] = (require(record, "multiple_choice_answer", str, where), ten)
    return found


def _jsonl_source(options: SourceOptions, source: str, path: Path, explanation_key: str, answer_key: str) -> Source:
    maker, folder = _Maker(options, source, ""), options.images or options.root

    def make(record: Any, number: int) -> Iterator[Draft | Reject]:
        where = f"{path}, record {number}"
        file = require(record, "file_path", str, where)
        digits = re.search(r"(\d{12})\.jpg$", file)
        if digits is None:
            raise SourceFormatError(f"{where}: expected a COCO file name in 'file_path', got {file!r}")
        answer, explanation = record.get(answer_key), record.get(explanation_key)
        values = {
            "question": require(record, "question", str, where),
            "explanation": explanation if isinstance(explanation, str) else _first_text(explanation, where),
            "answer": answer if isinstance(answer, str) else _first_text(answer, where),
        }
        draft = maker.explained(str(number), int(digits[1]), values)
        if isinstance(draft, Draft):
            draft.images = [image_file(folder, file, Path(file).name)]
        yield draft

    return RecordSource(Packed(read_json_lines(path)), make)


def _first_text(values: Any, where: str) -> str:
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise SourceFormatError(f"{where}: expected a list that begins with a text, got {values!r:.80}")
    return values[0]


@dataclass(frozen=True)
class _Maker:
    """Makes samples of one source; `subset` is the part of COCO that its images are of."""

    options: SourceOptions
    source: str
    subset: str

    def draft(self, task: str, name: str, image_id: int, values: dict[str, Any], **meta: Any) -> Draft:
        name, meta = f"{self.source}-{self.options.split}-{name}", {"image_ids": [f"coco:{image_id}"], **meta}
        sample = Sample(name, task, self.source, [ImageInfo("", 0, 0)], fields=values, meta=meta)
        folder = self.options.images or self.options.root
        return Draft(sample, [coco_image(folder, f"COCO_{self.subset}_{image_id:012d}.jpg")])

    def explained(self, name: str, image_id: int, values: dict[str, Any], **meta: Any) -> Draft | Reject:
        """The explanation becomes a sentence, as "So the answer is .." follows it."""
        explanation = " ".join(values["explanation"].split())
        if not explanation:
            return Reject("empty-text", f"{self.source}, {name}: expected an explanation, got none")
        values["explanation"] = explanation if explanation[-1] in ".!?" else f"{explanation}."
        return self.draft("vqa_e", name, image_id, values, **meta)
