"""Pure scores on answers in words: normalised strings in, per-sample scores or named ratios out.

VQAv2: the public evaluation (GT-Vision-Lab/VQA, vqaEval.py). POPE: RUCAIBox/POPE evaluate.py. NLVR2: lil-lab metrics.
VCR: r2c eval_q2ar.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
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


def yes_no_scores(answers: Sequence[str | None], references: Sequence[str]) -> dict[str, float | None]:
    """Return POPE's accuracy, precision, recall, F1 (of "yes") and the share of "yes" among the answers.

    An unreadable answer (None) counts as the opposite of its reference.

    >>> yes_no_scores(["yes", "yes", "no", None], ["yes", "no", "no", "yes"])["f1"]
    0.5
    """
    said = np.array([answer == "yes" for answer in answers], bool)
    truth = np.array([reference == "yes" for reference in references], bool)
    counted = np.where([answer is None for answer in answers], ~truth, said) if len(truth) else said
    true_yes = int((counted & truth).sum())
    return {
        "accuracy": ratio(int((counted == truth).sum()), len(truth)),
        "precision": ratio(true_yes, int(counted.sum())),
        "recall": ratio(true_yes, int(truth.sum())),
        "f1": ratio(2 * true_yes, int(counted.sum() + truth.sum())),
        "yes_share": ratio(int(said.sum()), len(truth)),
    }


def all_right_share(right: Sequence[bool], groups: Sequence[str]) -> float | None:
    """Return the share of groups whose every sample is right: NLVR2's consistency, VCR's Q>AR.

    >>> all_right_share([True, True, True, False], ["a", "a", "b", "b"])
    0.5
    """
    members: dict[str, list[bool]] = defaultdict(list)
    for is_right, group in zip(right, groups, strict=True):
        members[group].append(bool(is_right))
    return mean(map(all, members.values()))


def choice_scores(right: Sequence[bool], parts: Sequence[str], groups: Sequence[str]) -> dict[str, float | None]:
    """Return VCR's Q>A, QA>R and Q>AR of N samples.

    `parts` says which choice a sample asks for, "q_a" or "qa_r", `groups` the question that both choices belong to;
    Q>AR counts the questions that have both.
    """
    rows = list(zip(right, parts, groups, strict=True))
    asked = {part: {group for _, p, group in rows if p == part} for part in ("q_a", "qa_r")}
    paired = [(ok, group) for ok, _, group in rows if group in asked["q_a"] & asked["qa_r"]]
    return {
        "q_a": mean(ok for ok, part, _ in rows if part == "q_a"),
        "qa_r": mean(ok for ok, part, _ in rows if part == "qa_r"),
        "q_ar": all_right_share([ok for ok, _ in paired], [group for _, group in paired]),
    }


def ratio(numerator: float, denominator: int) -> float | None:
    """Return numerator / denominator, or None where nothing was counted."""
    return numerator / denominator if denominator else None


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, added up in order, or None of no value at all."""
    values = list(values)
    return ratio(sum(values), len(values))
