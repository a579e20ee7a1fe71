"""Scores of captions: generated texts and their references in, one score per caption out.

CIDEr is pycocoevalcap's `Cider` (CIDEr-D). The public caption evaluation splits texts into words with Stanford's Penn
Treebank tokeniser, a Java program; `caption_tokens` writes its rules down for English captions, so that CIDEr needs no
Java and is the same on every machine. Where Java is at hand the public tokeniser is used beside it.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Sequence
from importlib import resources

import numpy as np
from pycocoevalcap.cider.cider import Cider

from vistallm.metrics.scores import Row, SampleScores, Sums
from vistallm.schema import Prediction

_WORD = re.compile(
    r"(?:[a-z]\.){2,}|\b(?:mr|mrs|ms|dr|st|jr|sr|etc|vs)\.|\d+(?:[.,:]\d+)+|o'clock\b|[a-z]+(?=n't\b)|n't\b"
    r"|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-/]\w+)*|[$%&#@*/+=]|[()\[\]{}]"
)
_JOINED = re.compile(r"\b(can|gon|wan|got|gim|lem)(not|na|ta|me)\b")  # "cannot" is two words of the treebank
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
Captions = Sequence[str | None]
References = Sequence[Sequence[str]]


def caption_tokens(text: str) -> str:
    """Return a caption as lower-case words joined by spaces, as the public tokeniser and its punctuation list leave it.

    >>> caption_tokens("The dog's T-shirt isn't red (at 5:30 p.m.)!")
    "the dog 's t-shirt is n't red -lrb- at 5:30 p.m. -rrb-"
    """
    words = _WORD.findall(_JOINED.sub(r"\1 \2", text.lower().replace("’", "'")))
    return " ".join(_BRACKETS.get(word, word) for word in words)


def cider_scores(captions: Captions, references: References, public: bool = False) -> np.ndarray | None:
    """Return (N,) float64 CIDEr-D of N captions (1.0 is printed as 100); the mean is the corpus score.

    Word weights come from the references of these N samples together, so with one sample every weight is 0. `public`:
    words by the public Java tokeniser; None where there is no Java.
    """

    def split(groups: References) -> dict[int, list[str]]:
        if not public:
            return {i: [caption_tokens(text) for text in group] for i, group in enumerate(groups)}
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        return PTBTokenizer().tokenize({i: [{"caption": text} for text in group] for i, group in enumerate(groups)})

    if not captions or (public and shutil.which("java") is None):
        return None if public else np.zeros(0)
    answers = split([[caption or ""] for caption in captions])
    return np.asarray(Cider().compute_score(split(references), answers)[1], float)


def spice_scores(captions: Captions, references: References) -> np.ndarray | None:
    """Return (N,) float64 SPICE F-scores by pycocoevalcap, or None where it can't run.

    It needs Java 8 and Stanford CoreNLP 3.6.0, which pycocoevalcap downloads into its own `spice/lib`
    (`pycocoevalcap.spice.get_stanford_models`); nothing is downloaded from here.
    """
    models = resources.files("pycocoevalcap.spice") / "lib" / "stanford-corenlp-3.6.0.jar"
    if not captions or shutil.which("java") is None or not models.is_file():
        return None
    from pycocoevalcap.spice.spice import Spice

    answers = {i: [caption or ""] for i, caption in enumerate(captions)}
    rows = Spice().compute_score({i: list(group) for i, group in enumerate(references)}, answers)[1]
    return np.nan_to_num(np.array([row["All"]["f"] for row in rows], float))


SCORERS: dict[str, Callable[[Captions, References], np.ndarray | None]] = {
    "cider": cider_scores,
    "cider_ptb": functools.partial(cider_scores, public=True),
    "spice": spice_scores,
}


class CaptionScores(SampleScores):
    """Captions: CIDEr and exact matches. CIDEr's word weights come from the references of all samples together."""

    names: tuple[str, ...] = ("cider", "exact")

    def _texts(self, prediction: Prediction) -> tuple[str | None, list[str]]:
        references = prediction.target.get("answers") or [str(prediction.target.get("answer") or "")]
        if not all(isinstance(text, str) and text.strip() for text in references):
            raise ValueError(f"its target has no caption to compare with, got {references!r}")
        return prediction.parsed.answer if prediction.parsed else None, list(references)

    def _measure(self, prediction: Prediction) -> Sums:
        answer, references = self._texts(prediction)
        return {"exact": (answer is not None and caption_tokens(answer) in map(caption_tokens, references), 1)}

    def _row(self, prediction: Prediction) -> Row:
        return super()._row(prediction) | {"texts": self._texts(prediction)}

    def rows(self) -> list[Row]:
        """As in the base class, with the scores that need all captions."""
        rows = super().rows()
        answers, references = [row["texts"][0] for row in rows], [row["texts"][1] for row in rows]
        for name in (name for name in self.names if name != "exact"):
            values = SCORERS[name](answers, references)
            for number, row in enumerate(rows):
                row[name] = (0.0, 0.0) if values is None else (float(values[number]), 1.0)
        for row in rows:  # a caption as good as its reference scores 10 in CIDEr-D
            row["score"] = (min(1.0, row["cider"][0] / 10), 1.0)
        return rows


class PublicCaptionScores(CaptionScores):
    """COCO captions: CIDEr also with the public tokeniser, and SPICE; without Java they are None."""

    names = ("cider", "exact", "cider_ptb", "spice")
