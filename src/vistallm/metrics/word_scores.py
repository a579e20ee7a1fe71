"""Scores of answers in words: questions, choices, yes or no, statements and captions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import torch

from vistallm.metrics import captions, words
from vistallm.metrics.scores import FIRST, SCORE, NamedScores, SampleScores, Sums, groups_of, labelled, mean
from vistallm.metrics.targets import fact
from vistallm.schema import Prediction


class AnswerAccuracy(SampleScores):
    """Share of the answers that equal their reference, which is read as answers are; upper and lower case are one."""

    names: tuple[str, ...] = ("accuracy",)
    reader = "exact"  # a key of `words.READERS`

    def answers(self, prediction: Prediction) -> tuple[str | None, str]:
        """Return the answer, None where it could not be read, and the reference."""
        reference, reason = words.read_words(str(prediction.target.get("answer") or ""), self.reader)
        if reference is None:
            raise ValueError(
                f"prediction {prediction.id}: its target's answer can't be read as {self.reader}: {reason}"
            )
        return prediction.parsed.answer if prediction.parsed else None, reference

    def measure(self, prediction: Prediction) -> Sums:
        """Right or wrong as a whole."""
        answer, reference = self.answers(prediction)
        return dict.fromkeys(
            ("score", "accuracy"), (answer is not None and answer.casefold() == reference.casefold(), 1)
        )


class LetterAccuracy(AnswerAccuracy):
    """Share of the choices that are right."""

    reader = "choice"


class AskedAccuracy(AnswerAccuracy):
    """LookTwice by what its question names: the object ("these bears"), its super class, or nothing ("these")."""

    names = ("accuracy", "accuracy_general", "accuracy_super", "accuracy_object")

    def measure(self, prediction: Prediction) -> Sums:
        """Each sample counts in one of the three kinds."""
        sums, asks = super().measure(prediction), f"accuracy_{fact(prediction, 'asks', 'general')}"
        right = sums["accuracy"][0]
        return sums | {name: (right and name == asks, name == asks) for name in self.names[1:]}


class StatementScores(AnswerAccuracy):
    """NLVR2: accuracy, and consistency: share of the statements that are right on all of their image pairs."""

    names = ("accuracy", "consistency")
    reader, group_key = "truth", "group"

    def measure(self, prediction: Prediction) -> Sums:
        """Consistency is taken from the groups."""
        return super().measure(prediction) | {"consistency": (0, 0)}

    def ratios(self, rows: np.ndarray) -> NamedScores:
        """A group is right when all of it is."""
        right = [float((part[:, SCORE] == 1).all()) for part in groups_of(rows)]
        return super().ratios(rows) | {"consistency": mean(right)}


class ChoiceScores(AnswerAccuracy):
    """VCR: Q>A, QA>R, and Q>AR: share of the questions with both choices that have both right."""

    names, headline = ("q_a", "qa_r", "q_ar"), "q_ar"
    reader, group_key = "choice", "group"

    def measure(self, prediction: Prediction) -> Sums:
        """`mode` says which choice a sample asks for, "q_a" or "qa_r", `group` the question both belong to."""
        sums, mode = super().measure(prediction), fact(prediction, "mode", "q_a")
        right = sums["accuracy"][0]
        return sums | {name: (right and name == mode, name == mode) for name in self.names[:2]} | {"q_ar": (0, 0)}

    def ratios(self, rows: np.ndarray) -> NamedScores:
        """The second sum of `q_a` and of `qa_r` says which choice a row is."""
        asked = (FIRST + 1, FIRST + 3)
        pairs = [part for part in groups_of(rows) if part[:, asked].any(0).all()]
        return super().ratios(rows) | {"q_ar": mean(float((part[:, SCORE] == 1).all()) for part in pairs)}


class YesNoScores(AnswerAccuracy):
    """POPE: F1, precision and recall of "yes", accuracy and the share of "yes"; as RUCAIBox/POPE evaluate.py."""

    names, headline = ("accuracy", "precision", "recall", "f1", "yes_share"), "f1"
    reader = "yesno"

    def measure(self, prediction: Prediction) -> Sums:
        """An unreadable answer counts as the opposite of its reference."""
        answer, reference = self.answers(prediction)
        truth = reference == "yes"
        counted = not truth if answer is None else answer == "yes"
        hit, right = counted and truth, counted == truth
        return {
            "score": (right, 1),
            "accuracy": (right, 1),
            "precision": (hit, counted),
            "recall": (hit, truth),
            "f1": (2 * hit, counted + truth),
            "yes_share": (answer == "yes", 1),
        }


class VqaAccuracy(SampleScores):
    """VQAv2's soft accuracy; one reference stands for ten annotators who agree."""

    names = ("accuracy",)

    def measure(self, prediction: Prediction) -> Sums:
        """Leave-one-out over the annotators' answers."""
        references = prediction.target.get("answers")
        single = None if references else words.read_words(str(prediction.target.get("answer") or ""), "vqa")[0]
        if not references and single is None:
            raise ValueError(f"prediction {prediction.id}: its target has neither `answers` nor an `answer`")
        answer = prediction.parsed.answer if prediction.parsed else None
        if answer is None:
            value = 0.0
        elif single is not None:
            value = float(words.normalise_vqa(answer) == words.normalise_vqa(single))
        else:
            value = words.vqa_accuracy(answer, references or [])
        return dict.fromkeys(("score", "accuracy"), (value, 1.0))


class CaptionScores(SampleScores):
    """Captions: CIDEr and exact matches; the other names need Java and are None where there is none.

    The weights of CIDEr's words come from the references of all samples together, so texts are a state of their own.
    """

    names: tuple[str, ...] = ("cider", "exact")
    texts: list[torch.Tensor]

    def __init__(self, average: str | None = None) -> None:
        super().__init__(average)
        self.add_state("texts", [], dist_reduce_fx="cat")  # bytes: a line of JSON per sample

    def measure(self, prediction: Prediction) -> Sums:
        """What needs all samples is filled in by `table`."""
        text = prediction.parsed.answer if prediction.parsed else None
        references = map(captions.caption_tokens, _references(prediction))
        exact = text is not None and captions.caption_tokens(text) in references
        return dict.fromkeys(("score", *self.names), (math.nan, 1.0)) | {"exact": (exact, 1.0)}

    def update(self, predictions: Sequence[Prediction]) -> None:
        """As in the base class."""
        super().update(predictions)
        pairs = [(p.parsed.answer if p.parsed else None, _references(p)) for p in labelled(predictions)]
        lines = "".join(f"{json.dumps(pair)}\n" for pair in pairs).encode()
        self.texts.append(torch.frombuffer(bytearray(lines), dtype=torch.uint8).to(self.device) if lines else _NO_TEXT)

    def table(self) -> np.ndarray:
        """As in the base class, with the scores of all captions filled in."""
        rows = super().table()
        joined = torch.cat([self.texts] if isinstance(self.texts, torch.Tensor) else self.texts)
        pairs = [json.loads(line) for line in bytes(joined.cpu().numpy()).splitlines()]
        texts, references = [text for text, _ in pairs], [group for _, group in pairs]
        rows[:, FIRST] = captions.cider_scores(texts, references)
        rows[:, SCORE] = np.minimum(1, rows[:, FIRST] / 10)  # a caption as good as its reference scores 10 in CIDEr-D
        for number, name in enumerate(self.names[2:], 2):
            found = captions.PUBLIC[name](texts, references)
            column = FIRST + 2 * number
            rows[:, column : column + 2] = 0 if found is None else np.stack([found, np.ones(len(found))], 1)
        return rows


class PublicCaptionScores(CaptionScores):
    """COCO captions: CIDEr also with the public Java tokeniser, and SPICE."""

    names = ("cider", "exact", "cider_ptb", "spice")


_NO_TEXT = torch.zeros(0, dtype=torch.uint8)


def _references(prediction: Prediction) -> list[str]:
    texts = prediction.target.get("answers") or [str(prediction.target.get("answer") or "")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"prediction {prediction.id}: its target has no caption to compare with, got {texts!r}")
    return list(texts)
