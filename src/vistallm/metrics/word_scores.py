"""Scores of answers in words: questions, choices, yes or no, statements and captions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import torch

from vistallm.metrics import captions, words
from vistallm.metrics.overlap import fact
from vistallm.metrics.scores import FIRST, SCORE, NamedScores, SampleScores, Sums, groups_of, labelled, mean
from vistallm.schema import Prediction


class AnswerAccuracy(SampleScores):
    """Share of the answers that equal their reference, which is read as answers are; upper and lower case are one."""

    names: tuple[str, ...] = ("accuracy",)
    reader = "exact"  # a key of `words.READERS`

    def _texts(self, prediction: Prediction) -> tuple[str | None, str]:
        """Return the answer, None where it could not be read, and the reference."""
        reference, reason = words.read_words(str(prediction.target.get("answer") or ""), self.reader)
        if reference is None:
            target = f"prediction {prediction.id}: its target's answer"
            raise ValueError(f"{target} can't be read as {self.reader}: {reason}")
        return prediction.parsed.answer if prediction.parsed else None, reference

    def _measure(self, prediction: Prediction) -> Sums:
        answer, reference = self._texts(prediction)
        right = answer is not None and answer.casefold() == reference.casefold()
        return dict.fromkeys(("score", "accuracy"), (right, 1)) | self._parts(prediction, right)

    def _parts(self, prediction: Prediction, right: bool) -> Sums:
        """What the sample adds to the scores that count only some samples."""
        return {}


class LetterAccuracy(AnswerAccuracy):
    """Share of the choices that are right."""

    reader = "choice"


class AskedAccuracy(AnswerAccuracy):
    """LookTwice by what its question names: the object ("these bears"), its super class, or nothing ("these")."""

    names = ("accuracy", "accuracy_general", "accuracy_super", "accuracy_object")

    def _parts(self, prediction: Prediction, right: bool) -> Sums:
        asks = f"accuracy_{fact(prediction, 'asks', 'general')}"
        return {name: (right and name == asks, name == asks) for name in self.names[1:]}


class StatementScores(AnswerAccuracy):
    """NLVR2: accuracy, and consistency: share of the statements that are right on all of their image pairs."""

    names = ("accuracy", "consistency")
    reader, group_key = "truth", "group"

    def _parts(self, prediction: Prediction, right: bool) -> Sums:
        return {"consistency": (0, 0)}

    def _ratios(self, rows: np.ndarray) -> NamedScores:
        consistent = [float(part[:, SCORE].all()) for part in groups_of(rows)]
        return super()._ratios(rows) | {"consistency": mean(consistent)}


class ChoiceScores(AnswerAccuracy):
    """VCR: Q>A, QA>R, and Q>AR: share of the questions with both choices that have both right.

    A sample's `mode` says which choice it asks for, "q_a" or "qa_r", its `group` the question that both belong to.
    """

    names, headline = ("q_a", "qa_r", "q_ar"), "q_ar"
    reader, group_key = "choice", "group"

    def _parts(self, prediction: Prediction, right: bool) -> Sums:
        mode = fact(prediction, "mode", "q_a")
        return {name: (right and name == mode, name == mode) for name in self.names}

    def _ratios(self, rows: np.ndarray) -> NamedScores:
        asked = (FIRST + 1, FIRST + 3)  # the second sums of q_a and of qa_r say which choice a row is
        pairs = [part for part in groups_of(rows) if part[:, asked].any(0).all()]
        return super()._ratios(rows) | {"q_ar": mean(float(part[:, SCORE].all()) for part in pairs)}


class YesNoScores(AnswerAccuracy):
    """POPE: accuracy, precision, recall and F1 of "yes", share of "yes"; an unreadable answer is the wrong one."""

    names, headline = ("accuracy", "precision", "recall", "f1", "yes_share"), "f1"
    reader = "yesno"

    def _measure(self, prediction: Prediction) -> Sums:
        answer, reference = self._texts(prediction)
        truth = reference == "yes"
        counted = not truth if answer is None else answer == "yes"
        hit = counted and truth
        return {
            **dict.fromkeys(("score", "accuracy"), (counted == truth, 1)),
            "precision": (hit, counted),
            "recall": (hit, truth),
            "f1": (2 * hit, counted + truth),
            "yes_share": (answer == "yes", 1),
        }


class VqaAccuracy(SampleScores):
    """VQAv2's soft accuracy; one reference stands for ten annotators who agree."""

    names = ("accuracy",)

    def _measure(self, prediction: Prediction) -> Sums:
        references = prediction.target.get("answers") or []
        single = words.read_words(str(prediction.target.get("answer") or ""), "vqa")[0]
        if not references and single is None:
            raise ValueError(f"prediction {prediction.id}: its target has neither `answers` nor an `answer`")
        value = 0.0
        if prediction.parsed is not None:
            answer = prediction.parsed.answer
            same = words.normalise_vqa(answer) == words.normalise_vqa(single or "")
            value = words.vqa_accuracy(answer, references) if references else float(same)
        return dict.fromkeys(("score", "accuracy"), (value, 1.0))


class CaptionScores(SampleScores):
    """Captions: CIDEr and exact matches.

    The weights of CIDEr's words come from the references of all samples together, so texts are a state of their own.
    """

    names: tuple[str, ...] = ("cider", "exact")
    texts: list[torch.Tensor]

    def __init__(self, average: str | None = None) -> None:
        super().__init__(average)
        self.add_state("texts", [], dist_reduce_fx="cat")  # bytes: a line of JSON per sample

    def _measure(self, prediction: Prediction) -> Sums:
        answer, references = _texts(prediction)
        exact = answer is not None and captions.caption_tokens(answer) in map(captions.caption_tokens, references)
        # the rest needs all samples: `table` fills it in
        return dict.fromkeys(("score", *self.names), (math.nan, 1.0)) | {"exact": (exact, 1.0)}

    def update(self, predictions: Sequence[Prediction]) -> None:
        """As in the base class."""
        super().update(predictions)
        lines = "".join(f"{json.dumps(_texts(prediction))}\n" for prediction in labelled(predictions))
        self.texts.append(torch.tensor(list(lines.encode()), dtype=torch.uint8, device=self.device))

    def table(self) -> np.ndarray:
        """As in the base class, with the scores of all captions filled in."""
        rows = super().table()
        joined = torch.cat([self.texts] if isinstance(self.texts, torch.Tensor) else self.texts)
        pairs = [json.loads(line) for line in bytes(joined.cpu().numpy()).splitlines()]
        answers, references = [answer for answer, _ in pairs], [texts for _, texts in pairs]
        for number, name in enumerate(self.names):
            if name != "exact":
                found, column = captions.SCORERS[name](answers, references), FIRST + 2 * number
                rows[:, column : column + 2] = 0 if found is None else np.stack([found, np.ones(len(found))], 1)
        rows[:, SCORE] = np.minimum(1, rows[:, FIRST] / 10)  # a caption as good as its reference scores 10 in CIDEr-D
        return rows


class PublicCaptionScores(CaptionScores):
    """COCO captions: CIDEr also with the public tokeniser, and SPICE; without Java they are None."""

    names = ("cider", "exact", "cider_ptb", "spice")


def _texts(prediction: Prediction) -> tuple[str | None, list[str]]:
    references = prediction.target.get("answers") or [str(prediction.target.get("answer") or "")]
    if not all(isinstance(text, str) and text.strip() for text in references):
        raise ValueError(f"prediction {prediction.id}: its target has no caption to compare with, got {references!r}")
    return prediction.parsed.answer if prediction.parsed else None, list(references)
