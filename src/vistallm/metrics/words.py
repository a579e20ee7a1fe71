"""Pure scores on answers in words: normalised strings in, per-sample scores or named ratios out.

VQAv2: the public evaluation (GT-Vision-Lab/VQA, vqaEval.py). POPE: RUCAIBox/POPE evaluate.py. NLVR2: lil-lab metrics.
VCR: r2c eval_q2ar.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import resources

import numpy as np

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
# The public table maps a contraction that lacks one of its apostrophes to the whole; "somebody'd" is its own oddity.
_WORDS = resources.files("vistallm.metrics").joinpath("contractions.txt").read_text("utf-8").split()
_CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _WORDS for i, mark in enumerate(word) if mark == "'"}
_CONTRACTIONS["somebody'd"] = "somebodyd"


def _strip_punctuation(text: str) -> str:
    number_comma = re.search(r"\d,\d", text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or number_comma else " ")
    # The public code passes re.UNICODE (= 32) as `count`: at most 32 full stops go. Kept, to agree with it exactly.
    return re.sub(r"\.(?!\d)", "", stripped, count=32)


def normalise_vqa(text: str) -> str:
    """Return an answer in VQAv2's normal form: no punctuation or articles, number words as digits, contractions.

    >>> normalise_vqa("The two dogs, dont they?")
    "2 dogs don't they"
    """
    text = _strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
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


Read = tuple[str | None, str | None]
"""What was read and None, or None and the reason it could not be read."""

_LETTER = re.compile(r"\(\s*([A-Z])\s*\)|\b([A-Z])\b")


def _read_all(text: str) -> Read:
    return (text, None) if text else (None, "empty")


def _read_short(text: str) -> Read:
    """Cut "... the answer is X." down to X; a text without those words is the answer itself."""
    start = text.lower().rfind("answer is")
    short = text[start + len("answer is") :] if start >= 0 else text
    return _read_all(short.strip(" :").removesuffix(".").strip())


def _read_choice(text: str) -> Read:
    match = _LETTER.search(_read_short(text)[0] or "")
    return (match[1] or match[2], None) if match else (None, "no-choice")


def _read_yes_no(text: str) -> Read:
    """POPE's own reading ("not" means no, first sentence only), but a text with neither word is no silent "yes"."""
    said = set(re.findall(r"[a-z]+", text.split(".")[0].lower()))
    if said & {"no", "not"}:
        return "no", None
    return ("yes", None) if "yes" in said else (None, "no-yes-or-no")


def _read_truth(text: str) -> Read:
    said = {word.capitalize() for word in re.findall(r"[a-z]+", text.lower())} & {"True", "False"}
    return (said.pop(), None) if len(said) == 1 else (None, "no-true-or-false")


READERS: dict[str, Callable[[str], Read]] = {
    "caption": _read_all,
    "vqa": _read_short,
    "exact": _read_short,
    "choice": _read_choice,
    "yesno": _read_yes_no,
    "truth": _read_truth,
}


def read_words(text: str, family: str) -> Read:
    """Read an answer in words (a generated one, or a target's) by the reader of a text family."""
    return READERS[family](text.strip())
