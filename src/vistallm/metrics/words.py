"""Scores of answers in words: questions, choices, yes or no, statements; `tasks/answers.py` reads such answers.

VQAv2: the public evaluation (GT-Vision-Lab/VQA, vqaEval.py). POPE: RUCAIBox/POPE evaluate.py. NLVR2: lil-lab metrics.
VCR: r2c eval_q2ar.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources

import numpy as np

from vistallm.metrics.scores import NamedScores, Row, SampleScores, Sums, fact, groups_of, mean
from vistallm.schema import Prediction
from vistallm.tasks.answers import read_words

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
# The public table maps a contraction that lacks one of its apostrophes to the whole; "somebody'd" is its own oddity.
_WORDS = resources.files("vistallm.metrics").joinpath("contractions.txt").read_text("utf-8").split()
_CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _WORDS for i, mark in enumerate(word) if mark == "'"}
_CONTRACTIONS["somebody'd"] = "somebodyd"


def normalise_vqa(text: str) -> str:
    """Return an answer in VQAv2's normal form: no punctuation or articles, number words as digits, contractions.

    >>> normalise_vqa("The two dogs, dont they?")
    "2 dogs don't they"
    """
    text = stripped = text.replace("\n", " ").replace("\t", " ").strip()
    number_comma = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or number_comma else " ")
    # The public code passes re.UNICODE (= 32) as `count`: at most 32 full stops go. Kept, to agree with it exactly.
    stripped = re.sub(r"\.(?!\d)", "", stripped, count=32)
    words = [_DIGITS.get(word, word) for word in stripped.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return VQAv2's soft accuracy: mean over the annotators of min(1, matches among the OTHERS / 3).

    As in the public code, answer and references are normalised only where the annotators differ: an answer to a
    unanimous question must equal theirs letter by letter.

    >>> vqa_accuracy("Two.", ["2", "2", "2", "3", "3", "3", "3", "3", "3", "3"])
    0.9
    """
    answer, *others = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *references))
    if len(set(others)) > 1:
        answer, others = normalise_vqa(answer), [normalise_vqa(reference) for reference in others]
    matches = np.array([reference == answer for reference in others], int)
    return float(np.minimum(1, (matches.sum() - matches) / 3).mean())


class AnswerAccuracy(SampleScores):
    """Share of the answers that equal their reference, which is read as answers are; upper and lower case are one."""

    names: tuple[str, ...] = ("accuracy",)
    reader = "exact"  # a key of `READERS`

    def _measure(self, prediction: Prediction) -> Sums:
        reference, reason = read_words(str(prediction.target.get("answer") or ""), self.reader)
        if reference is None:
            raise ValueError(f"its target's answer can't be read as {self.reader}: {reason}")
        right = prediction.parsed is not None and prediction.parsed.answer.casefold() == reference.casefold()
        return dict.fromkeys(("score", "accuracy"), (right, 1)) | self._parts(prediction, reference, right)

    def _parts(self, prediction: Prediction, reference: str, right: bool) -> Sums:
        """What the sample adds to the other scores."""
        return {}


class LetterAccuracy(AnswerAccuracy):
    """Share of the choices that are right."""

    reader = "choice"


class AskedAccuracy(AnswerAccuracy):
    """LookTwice by what its question names: the object ("these bears"), its super class, or nothing ("these")."""

    names = ("accuracy", "accuracy_general", "accuracy_super", "accuracy_object")

    def _parts(self, prediction: Prediction, reference: str, right: bool) -> Sums:
        asks = f"accuracy_{fact(prediction, 'asks', 'general')}"
        return {name: (right and name == asks, name == asks) for name in self.names[1:]}


class StatementScores(AnswerAccuracy):
    """NLVR2: accuracy, and consistency: share of the statements that are right on all of their image pairs."""

    names = ("accuracy", "consistency")
    reader, group_key = "truth", "group"

    def _parts(self, prediction: Prediction, reference: str, right: bool) -> Sums:
        return {"consistency": (0, 0)}

    def _ratios(self, rows: Sequence[Row]) -> NamedScores:
        consistent = [float(all(row["accuracy"][0] for row in group)) for group in groups_of(rows)]
        return super()._ratios(rows) | {"consistency": mean(consistent)}


class ChoiceScores(AnswerAccuracy):
    """VCR: Q>A, QA>R, and Q>AR: share of the questions with both choices that have both right.

    A sample's `mode` says which choice it asks for, "q_a" or "qa_r", its `group` the question that both belong to.
    """

    names, headline = ("q_a", "qa_r", "q_ar"), "q_ar"
    reader, group_key = "choice", "group"

    def _parts(self, prediction: Prediction, reference: str, right: bool) -> Sums:
        mode = fact(prediction, "mode", "q_a")
        return {name: (right and name == mode, name == mode) for name in self.names}

    def _ratios(self, rows: Sequence[Row]) -> NamedScores:
        pairs = [group for group in groups_of(rows) if any(row["q_a"][1] for row in group)]
        pairs = [group for group in pairs if any(row["qa_r"][1] for row in group)]
        right = [float(all(row["score"][0] for row in pair)) for pair in pairs]
        return super()._ratios(rows) | {"q_ar": mean(right)}


class YesNoScores(AnswerAccuracy):
    """POPE: accuracy, precision, recall and F1 of "yes", share of "yes"; an unreadable answer is the wrong one."""

    names, headline = ("accuracy", "precision", "recall", "f1", "yes_share"), "f1"
    reader = "yesno"

    def _parts(self, prediction: Prediction, reference: str, right: bool) -> Sums:
        truth = reference == "yes"
        counted = truth == right  # as a "yes"
        return {
            "precision": (right and truth, counted),
            "recall": (right and truth, truth),
            "f1": (2 * (right and truth), counted + truth),
            "yes_share": (counted and prediction.parsed is not None, 1),
        }


class VqaAccuracy(SampleScores):
    """VQAv2's soft accuracy; one reference stands for ten annotators who agree."""

    names = ("accuracy",)

    def _measure(self, prediction: Prediction) -> Sums:
        references = prediction.target.get("answers") or []
        single = read_words(str(prediction.target.get("answer") or ""), "vqa")[0]
        if not references and single is None:
            raise ValueError("its target has neither `answers` nor an `answer`")
        value = 0.0
        if prediction.parsed is not None:
            answer = prediction.parsed.answer
            same = normalise_vqa(answer) == normalise_vqa(single or "")
            value = vqa_accuracy(answer, references) if references else float(same)
        return dict.fromkeys(("score", "accuracy"), (value, 1.0))
