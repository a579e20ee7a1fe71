"""Pure scores on captions: generated texts and their references in, one score per caption out.

CIDEr is pycocoevalcap's `Cider` (CIDEr-D). The public caption evaluation splits texts into words with Stanford's Penn
Treebank tokeniser, a Java program; `caption_tokens` writes its rules down for English captions, so that CIDEr needs no
Java and is the same on every machine. Where Java is at hand the public tokeniser is used beside it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from importlib import resources

import numpy as np
from pycocoevalcap.cider.cider import Cider

_WORD = re.compile(
    r"(?:[a-z]\.){2,}|\b(?:mr|mrs|ms|dr|st|jr|sr|etc|vs)\.|\d+(?:[.,:]\d+)+|o'clock\b|[a-z]+(?=n't\b)|n't\b"
    r"|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-/]\w+)*|[$%&#@*/+=]|[()\[\]{}]"
)
_JOINED = re.compile(r"\b(can|gon|wan|got|gim|lem)(not|na|ta|me)\b")  # "cannot" is two words of the treebank
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
Tokens = dict[int, list[str]]


def caption_tokens(text: str) -> str:
    """Return a caption as lower-case words joined by spaces, as the public tokeniser and its punctuation list leave it.

    >>> caption_tokens("The dog's T-shirt isn't red (at 5:30 p.m.)!")
    "the dog 's t-shirt is n't red -lrb- at 5:30 p.m. -rrb-"
    """
    words = _WORD.findall(_JOINED.sub(r"\1 \2", text.lower().replace("’", "'")))
    return " ".join(_BRACKETS.get(word, word) for word in words)


def _cider(
    captions: Sequence[str | None], references: Sequence[Sequence[str]], split: Callable[[list], list]
) -> np.ndarray:
    if not captions:
        return np.zeros(0)
    answers = dict(enumerate(split([[caption or ""] for caption in captions])))
    return np.asarray(Cider().compute_score(dict(enumerate(split(list(references)))), answers)[1], float)


def cider_scores(captions: Sequence[str | None], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return (N,) float64 CIDEr-D of N captions (1.0 is printed as 100); the mean is the corpus score.

    Word weights come from the references of these N samples together, so with one sample every weight is 0.
    """
    return _cider(captions, references, lambda groups: [[caption_tokens(text) for text in group] for group in groups])


def cider_scores_ptb(captions: Sequence[str | None], references: Sequence[Sequence[str]]) -> np.ndarray | None:
    """As `cider_scores`, with the public Java tokeniser; None where there is no Java."""
    if not captions or shutil.which("java") is None:
        return None
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def split(groups: list) -> list:
        tokens = PTBTokenizer().tokenize({i: [{"caption": text} for text in group] for i, group in enumerate(groups)})
        return [tokens[i] for i in range(len(groups))]

    return _cider(captions, references, split)


def spice_scores(captions: Sequence[str | None], references: Sequence[Sequence[str]]) -> np.ndarray | None:
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


SCORERS: dict[str, Callable[..., np.ndarray | None]] = {
    "cider": cider_scores,
    "cider_ptb": cider_scores_ptb,
    "spice": spice_scores,
}
