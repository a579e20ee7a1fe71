"""VCR (visual commonsense reasoning): four answers to choose from, then four rationales.

A sample's form has what is given before the underscore and what is answered after it; q = question, c = the four
choices, a = the right answer, r = the right rationale. A letter is the answer of a `vcr` sample, words of `instruct`:

    q_ra      the question -> rationale and answer in words
    qc_rac    with the answer choices -> rationale and answer in words, then the letter
    qc_a      with the answer choices -> the letter
    qac_r     question, right answer and rationale choices -> the letter of the rationale

Training takes all four, evaluation the last two, by which VCR is scored: `meta["mode"]` is then "q_a" or "qa_r", and
`meta["group"]` the annot_id, for Q -> AR. The test split has no labels: it gives qc_a, and qac_r given each of the four
answers in turn (`meta["given"]`), with `meta["unlabelled"]` and (A) as the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from vistallm.coinit.sources.base import Draft, Reject, Source, SourceFormatError, SourceImage, SourceOptions
from vistallm.coinit.sources.records import Record, file_source, read_json_lines, read_object
from vistallm.schema import Region

_LETTERS = "ABCD"
_FORMS = ["q_ra", "qc_rac", "qc_a", "qac_r"]
# The instructions of forms that no template of a task fits; a sample takes one by its number.
_REASON_THEN_ANSWER = ("Explain your answer first.", "Give the reason, then the answer.", "Reason before you answer.")
_ALL_THREE = ("Give the reason, the answer and its letter.", "Explain, answer, and name the letter.")
_CHOOSE_WHY = ("Which of these explains the answer?", "Which reason for this answer is right?")


def load_vcr(options: SourceOptions) -> Source:
    """VCR; the objects that a text names are written as boxes."""
    split = options.check_split("train", "val", "test")
    settings = options.read_settings(forms=_FORMS if split == "train" else _FORMS[2:])
    path = options.find_file(f"{split}.jsonl", folders=("", "vcr1annots/"))

    def make(record: Record, number: int) -> Iterator[Draft | Reject]:
        file, annot_id = record.text("img_fn"), record.text("annot_id")
        scene = _read_scene(record, options)
        size = scene.integer("width"), scene.integer("height")
        image = SourceImage(options.image(file, usual="vcr1images"), f"vcr:{file}", *size)
        answers, rationales = _read_texts(record, "answer_choices"), _read_texts(record, "rationale_choices")
        question = _write(record.require("question", list), record)
        labels = [record.integer(key) for key in ("answer_label", "rationale_label")] if split != "test" else [0, 0]
        if not all(0 <= label < 4 for label in labels):
            raise record.fault(f"expected answer_label and rationale_label 0 to 3, got {labels}")
        for form in settings["forms"]:
            # Of the test split, a rationale is asked for with each answer given in turn.
            for given in range(4 if split == "test" and form == "qac_r" else 1):
                right, why = (given, 0) if split == "test" else labels
                written = _write_form(form, number, question, answers, rationales, right, why)
                regions = _regions(scene, image, written)
                if isinstance(regions, Reject):
                    yield regions
                    continue
                name = f"vcr-{split}-{annot_id}-{form}"
                meta: dict[str, Any] = {"form": form, "group": annot_id, "mode": "qa_r" if form == "qac_r" else "q_a"}
                if split == "test":
                    name, meta["unlabelled"] = f"{name}-{given}", True
                    meta |= {"given": given} if form == "qac_r" else {}
                task = "vcr" if "options" in written["fields"] else "instruct"
                yield image.draft(name, task, "vcr", meta, regions=regions, **written)

    return file_source(path, read_json_lines(path), make)


def _write_form(
    form: str, number: int, question: str, answers: list[str], rationales: list[str], right: int, why: int
) -> dict[str, Any]:
    """The texts of a sample of a form: its own, or fields for the templates of `vcr`."""
    answer, rationale, letter = answers[right], rationales[why], f"({_LETTERS[right]})"
    fields = {"question": question, "options": _options(answers), "answer": letter}
    if form == "qc_a":
        return {"fields": fields}
    if form == "qac_r":
        asked = f"{question} {answer} {_CHOOSE_WHY[number % 2]}"
        return {"fields": {"question": asked, "options": _options(rationales), "answer": f"({_LETTERS[why]})"}}
    if form == "q_ra":
        instruction = f"{question} {_REASON_THEN_ANSWER[number % 3]}"
        return {"instruction": instruction, "answer": f"{rationale} {answer}", "fields": {}}
    instruction = f"{question} Options: {fields['options']} {_ALL_THREE[number % 2]}"
    return {"instruction": instruction, "answer": f"{rationale} {answer} The answer is {letter}.", "fields": fields}


def _options(texts: list[str]) -> str:
    return " ".join(f"({letter}) {text}" for letter, text in zip(_LETTERS, texts, strict=True))


def _read_texts(record: Record, key: str) -> list[str]:
    texts = [_write(tokens, record) for tokens in record.values(key, list)]
    if len(texts) != 4:
        raise record.fault(f"expected 4 {key}, got {len(texts)}")
    return texts


def _write(tokens: list[Any], record: Record) -> str:
    """Words joined to a text; a list of object numbers becomes their names and a placeholder for their regions."""
    words, objects = [], record.values("objects", str)
    for token in tokens:
        if isinstance(token, list):
            if not token or not all(isinstance(i, int) and 0 <= i < len(objects) for i in token):
                raise record.fault(f"expected numbers of its {len(objects)} objects, got {token}")
            names = " and ".join(dict.fromkeys(objects[i] for i in token))
            words.append(f"{names} {{regions:{','.join(map(str, token))}}}")
        elif isinstance(token, str) and "{regions:" not in token:
            words.append(token)
        else:
            raise record.fault(f"expected words and lists of object numbers, got {token!r:.80}")
    # The words are tokens: punctuation and the second half of "does n't" belong to the word before.
    return re.sub(r" (?=[.,!?;:%)]|n't\b|'(?:s|re|ve|ll|d|m)\b)", "", " ".join(words)).strip()


def _read_scene(record: Record, options: SourceOptions) -> Record:
    """The metadata of a record's image: its size, and a box per object."""
    path = options.image(record.text("metadata_fn"), usual="vcr1images")
    if not path.is_file():
        raise record.fault(f"expected its metadata in {path}, which is not there")
    scene = read_object(path)
    boxes, objects = scene.values("boxes", list), record.require("objects", list)
    if len(boxes) != len(objects):
        raise scene.fault(f"expected one box for each of {len(objects)} objects, got {len(boxes)}")
    return scene


def _regions(scene: Record, image: SourceImage, texts: dict[str, Any]) -> list[Region] | Reject:
    """The boxes of the objects that the texts name, or why one of them has none."""
    regions = []
    numbers = {int(i) for ids in re.findall(r"\{regions:([\d,]+)\}", json.dumps(texts)) for i in ids.split(",")}
    for i in sorted(numbers):
        where = f"{scene.where}, object {i}"
        sides = Record({"box": scene.data["boxes"][i]}, where).values("box", int, float)
        if len(sides) != 5:
            raise SourceFormatError(f"{where}: expected x0, y0, x1, y1 and a score, got {sides}")
        if isinstance(box := image.cut(sides[:4], where), Reject):
            return box
        regions.append(Region(0, "box", i, box=box))
    return regions
