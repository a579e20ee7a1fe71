"""VCR (visual commonsense reasoning): four answers to choose from, then four rationales.

In: `{train,val,test}.jsonl` and, beside each image of `vcr1images`, a metadata file with boxes and segments; out: `vcr`
samples where a letter is asked for, `instruct` samples where the words themselves are. A unit is one question.

The forms of a sample (`--set forms=q_ra,qc_a,..`) are those of the authors' release: before the last underscore what is
given, after it what is to be said; q = question, c = the four choices, a = the right answer, r = the right rationale.

    q_a         the question -> the answer in words
    q_ra        the question -> rationale and answer in words
    qc_a        with the answer choices -> the letter
    qc_ra       with the answer choices -> the rationale in words, then the letter
    qc_rac      with the answer choices -> rationale and answer in words, then the letter
    qa_r        question and right answer -> the rationale in words
    qac_r       question, right answer and rationale choices -> the letter of the rationale
    q_a_q_r     two rounds: q_a, then the rationale in words
    qc_a_qc_r   two rounds: qc_a, then rationale choices -> the letter of the rationale

Training takes q_ra, qc_rac, qc_a and qac_r (the release's stage 1), validation qc_a and qac_r, by which VCR is scored:
`meta["mode"]` is then "q_a" or "qa_r", and `meta["group"]` the annot_id, for Q -> AR. The test split has no labels: it
gives qc_a, and qac_r given each of the four answers in turn (`meta["given"]`), with `meta["unlabelled"]` and (A) as the
answer. `--set regions=mask` writes the people and things that a text names as masks, from their segments, in place of
boxes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistallm.coinit.sources.base import Draft, Reject, Source, SourceFormatError, SourceImage, SourceOptions
from vistallm.coinit.sources.records import Record, file_source, read_json, read_json_lines
from vistallm.coinit.sources.shapes import clip_box, rle_area, segmentation_to_rle
from vistallm.schema import Region, Rle

FORMS = ("q_a", "q_ra", "qc_a", "qc_ra", "qc_rac", "qa_r", "qac_r", "q_a_q_r", "qc_a_qc_r")
_DEFAULT = {"train": "q_ra,qc_rac,qc_a,qac_r", "val": "qc_a,qac_r", "test": "qc_a,qac_r"}
# What is asked for where no template of a task fits; a sample takes one by its number.
_REASON_THEN_ANSWER = ("Explain your answer first.", "Give the reason, then the answer.", "Reason before you answer.")
_REASON_THEN_LETTER = ("Give the reason, then the letter.", "Explain first, then choose a letter.")
_ALL_THREE = ("Give the reason, the answer and its letter.", "Explain, answer, and name the letter.")
_WHY = ("Why?", "Explain why.", "What tells you so?", "Give the reason for this answer.")
_CHOOSE_WHY = ("Which of these explains the answer?", "Which reason for this answer is right?")


def load_vcr(options: SourceOptions) -> Source:
    """VCR; splits train, val, test (without labels)."""
    split = options.check_split(*_DEFAULT)
    settings = options.read_settings(forms=_DEFAULT[split], regions=("box", "mask"))
    forms = settings["forms"].split(",")
    allowed = FORMS if split != "test" else ("qc_a", "qac_r")
    if unknown := [form for form in forms if form not in allowed]:
        raise ValueError(f"--set forms ({split}): expected some of {', '.join(allowed)}, got {unknown[0]!r}")
    path = options.find_file(f"{split}.jsonl", f"vcr1annots/{split}.jsonl")
    folder = options.images or options.root / "vcr1images"

    def make(record: Record, number: int) -> Iterator[Draft | Reject]:
        file, annot_id = record.text("img_fn"), record.text("annot_id")
        scene = _read_scene(record, folder / record.text("metadata_fn"))
        image = SourceImage(folder / file, f"vcr:{file}", *(scene.integer(key) for key in ("width", "height")))
        question = _Question.read(record, number)
        for form, given in _asked(forms, split):
            texts = question.forms(given, 0) if split == "test" else question.forms(*_labels(record))
            regions = _regions(scene, texts[form].objects(), settings["regions"])
            if isinstance(regions, Reject):
                yield regions
                continue
            name = f"vcr-{split}-{annot_id}-{form}"
            meta: dict[str, Any] = {"form": form, "group": annot_id, "mode": "qa_r" if form.endswith("c_r") else "q_a"}
            if split == "test":
                name, meta["unlabelled"] = f"{name}-{given}", True
                if form == "qac_r":
                    meta["given"] = given
            yield image.draft(name, texts[form].task, "vcr", meta, regions=regions, **vars(texts[form]))

    return file_source(path, read_json_lines(path), make)


def _asked(forms: list[str], split: str) -> list[tuple[str, int]]:
    """The forms of a split's questions; a rationale of the test split is asked for with each answer given in turn."""
    return [(form, given) for form in forms for given in range(4 if split == "test" and form == "qac_r" else 1)]


def _labels(record: Record) -> list[int]:
    labels = [record.integer(key) for key in ("answer_label", "rationale_label")]
    if not all(0 <= label < 4 for label in labels):
        raise record.fault(f"expected answer_label and rationale_label 0 to 3, got {labels}")
    return labels


@dataclass(frozen=True)
class _Texts:
    """What a sample of one form says: texts of its own, or fields for the templates of `vcr`."""

    instruction: str | None
    answer: str | None
    fields: dict[str, Any]

    @property
    def task(self) -> str:
        """`vcr` where a letter is asked for."""
        return "vcr" if "options" in self.fields else "instruct"

    def objects(self) -> list[int]:
        """The objects that are named."""
        texts = json.dumps([self.instruction, self.answer, self.fields])
        return sorted({int(i) for found in re.findall(r"\{regions:([\d,]+)\}", texts) for i in found.split(",")})


@dataclass(frozen=True)
class _Question:
    """A record's texts, with `{regions:i}` after the names of objects."""

    number: int
    question: str
    answers: list[str]
    rationales: list[str]

    @classmethod
    def read(cls, record: Record, number: int) -> _Question:
        """Read the texts of a record."""
        objects = record.values("objects", str)
        choices = []
        for key in ("answer_choices", "rationale_choices"):
            choices.append([_write(tokens, objects, record) for tokens in record.values(key, list)])
            if len(choices[-1]) != 4:
                raise record.fault(f"expected 4 {key}, got {len(choices[-1])}")
        return cls(number, _write(record.require("question", list), objects, record), *choices)

    def forms(self, answer_label: int, rationale_label: int) -> dict[str, _Texts]:
        """The sample texts of every form."""
        question, answer, rationale = self.question, self.answers[answer_label], self.rationales[rationale_label]
        letter, reason_letter, options = _letter(answer_label), _letter(rationale_label), _options(self.answers)
        asked, chosen = f"{question} Options: {options}", f"The answer is {letter}."
        choice = {"question": question, "options": options, "answer": letter}
        reason = {"question": self._one_of(_CHOOSE_WHY), "options": _options(self.rationales), "answer": reason_letter}
        told = f"{question} {answer}"
        return {
            "q_a": _Texts(question, answer, {}),
            "q_ra": _Texts(f"{question} {self._one_of(_REASON_THEN_ANSWER)}", f"{rationale} {answer}", {}),
            "qc_a": _Texts(None, None, choice),
            "qc_ra": _Texts(f"{asked} {self._one_of(_REASON_THEN_LETTER)}", f"{rationale} {chosen}", choice),
            "qc_rac": _Texts(f"{asked} {self._one_of(_ALL_THREE)}", f"{rationale} {answer} {chosen}", choice),
            "qa_r": _Texts(f"{told} {self._one_of(_WHY)}", rationale, {}),
            "qac_r": _Texts(None, None, {**reason, "question": f"{told} {reason['question']}"}),
            "q_a_q_r": _Texts(self._one_of(_WHY), rationale, {"rounds": [[question, answer]]}),
            "qc_a_qc_r": _Texts(None, None, {**reason, "rounds": [[asked, chosen]]}),
        }

    def _one_of(self, phrases: tuple[str, ...]) -> str:
        return phrases[self.number % len(phrases)]


def _letter(number: int) -> str:
    return f"({'ABCD'[number]})"


def _options(texts: list[str]) -> str:
    return " ".join(f"{_letter(i)} {text}" for i, text in enumerate(texts))


def _write(tokens: list[Any], objects: list[str], record: Record) -> str:
    """Words joined to a text; a list of object numbers becomes their names and a placeholder for their regions."""
    words = []
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


def _read_scene(record: Record, path: Path) -> Record:
    """The metadata of a record's image: its size, and a box and segments (polygons of (x, y) points) per object."""
    if not path.is_file():
        raise record.fault(f"expected its metadata in {path}, which is not there")
    scene = Record(read_json(path), str(path))
    boxes, segments, objects = scene.values("boxes", list), scene.values("segms", list), record.require("objects", list)
    if not len(boxes) == len(segments) == len(objects):
        got = f"{len(boxes)} boxes and {len(segments)} segms"
        raise scene.fault(f"expected one box and segm for each of {len(objects)} objects, got {got}")
    return scene


def _regions(scene: Record, numbers: list[int], kind: str) -> list[Region] | Reject:
    """The regions of these objects, or why one of them has none."""
    found = []
    for i in numbers:
        where = f"{scene.where}, object {i}"
        sides = Record({"box": scene.data["boxes"][i]}, where).values("box", int, float)
        if len(sides) != 5:
            raise SourceFormatError(f"{where}: expected x0, y0, x1, y1 and a score, got {sides}")
        width, height = scene.data["width"], scene.data["height"]
        box = clip_box(tuple(sides[:4]), width, height)
        rle = _mask(scene.data["segms"][i], height, width, where) if kind == "mask" else None
        if (box if kind == "box" else rle) is None:
            return Reject(f"empty-{kind}", where)
        found.append(Region(0, kind, i, box=box if kind == "box" else None, rle=rle))
    return found


def _mask(segments: Any, height: int, width: int, where: str) -> Rle | None:
    """The mask of an object; polygons of fewer than three points draw nothing."""
    try:
        polygons = [[float(v) for point in polygon for v in point] for polygon in segments]
        rle = segmentation_to_rle(polygons, height, width) if polygons else None
    except (TypeError, ValueError) as error:
        raise SourceFormatError(f"{where}: expected polygons [[[x, y], ..], ..]: {error}") from error
    return rle if rle and rle_area(rle) else None
