"""Score families of answers in words: questions, choices, yes or no, statements and captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vistallm.evaluate.box_scores import accuracy
from vistallm.evaluate.family import Family, NamedScores, each, identity
from vistallm.evaluate.parse import read_words
from vistallm.evaluate.targets import fact
from vistallm.metrics import answers, captions
from vistallm.schema import Prediction


@dataclass(frozen=True)
class _WordsFact:
    answer: str | None
    reference: str
    group: str
    mode: str

    @property
    def right(self) -> bool:
        return self.answer is not None and self.answer.casefold() == self.reference.casefold()


def _words(family: str, mode: str = "mode", default: str = "q_a") -> Callable[[Prediction], _WordsFact]:
    def measure(prediction: Prediction) -> _WordsFact:
        reference, reason = read_words(str(prediction.target.get("answer") or ""), family)
        if reference is None:
            raise ValueError(f"prediction {prediction.id}: its target's answer can't be read as {family}: {reason}")
        answer = None if prediction.parsed is None else prediction.parsed.answer
        group = str(fact(prediction, "group", prediction.id))
        return _WordsFact(answer, reference, group, str(fact(prediction, mode, default)))

    return measure


def _right_share(facts: list[_WordsFact]) -> float | None:
    return answers.ratio(sum(f.right for f in facts), len(facts))


def _sample(fact: _WordsFact) -> float:
    return float(fact.right)


def _exact_scores(facts: list[_WordsFact]) -> NamedScores:
    return {"accuracy": _right_share(facts)}


def _asked_scores(facts: list[_WordsFact]) -> NamedScores:
    """LookTwice by what its question names: the object ("these bears"), its super class, or nothing ("these")."""
    parts = {kind: [f for f in facts if f.mode == kind] for kind in ("general", "super", "object")}
    return _exact_scores(facts) | {f"accuracy_{kind}": _right_share(part) for kind, part in parts.items()}


def _truth_scores(facts: list[_WordsFact]) -> NamedScores:
    consistency = answers.all_right_share([f.right for f in facts], [f.group for f in facts])
    return {"accuracy": _right_share(facts), "consistency": consistency}


def _yes_no_scores(facts: list[_WordsFact]) -> NamedScores:
    return answers.yes_no_scores([f.answer for f in facts], [f.reference for f in facts])


def _choice_scores(facts: list[_WordsFact]) -> NamedScores:
    return answers.choice_scores([f.right for f in facts], [f.mode for f in facts], [f.group for f in facts])


def _vqa_fact(prediction: Prediction) -> float:
    references = prediction.target.get("answers")
    single = None if references else read_words(str(prediction.target.get("answer") or ""), "vqa")[0]
    if not references and single is None:
        raise ValueError(f"prediction {prediction.id}: its target has neither `answers` nor an `answer`")
    if prediction.parsed is None:
        return 0.0
    said = prediction.parsed.answer
    if single is not None:  # one reference stands for ten annotators who agree
        return float(answers.normalise_vqa(said) == answers.normalise_vqa(single))
    return answers.vqa_accuracy(said, references or [])


@dataclass(frozen=True)
class _CaptionFact:
    cider: float
    exact: bool
    cider_ptb: float | None = None
    spice: float | None = None


def _references(prediction: Prediction) -> list[str]:
    found = prediction.target.get("answers") or [str(prediction.target.get("answer") or "")]
    if not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"prediction {prediction.id}: its target has no caption to compare with, got {found!r}")
    return list(found)


def _caption_facts(predictions: Sequence[Prediction], java: bool = False) -> list[_CaptionFact]:
    texts = [None if p.parsed is None else p.parsed.answer for p in predictions]
    references = [_references(p) for p in predictions]
    exact = [
        text is not None and captions.caption_tokens(text) in map(captions.caption_tokens, group)
        for text, group in zip(texts, references, strict=True)
    ]
    columns = [captions.cider_scores(texts, references).tolist(), exact]
    if java:
        for found in (captions.cider_scores_ptb(texts, references), captions.spice_scores(texts, references)):
            columns.append([None] * len(texts) if found is None else found.tolist())
    return [_CaptionFact(*row) for row in zip(*columns, strict=True)]


def _caption_scores(facts: list[_CaptionFact]) -> NamedScores:
    return {name: answers.ratio(sum(getattr(f, name) for f in facts), len(facts)) for name in ("cider", "exact")}


def _coco_caption_scores(facts: list[_CaptionFact]) -> NamedScores:
    scores = _caption_scores(facts)
    for name in ("cider_ptb", "spice"):
        found = [value for f in facts if (value := getattr(f, name)) is not None]
        scores[name] = answers.ratio(sum(found), len(found))
    return scores


def _caption_sample(fact: _CaptionFact) -> float:
    return min(1.0, fact.cider / 10)  # a caption as good as its reference scores 10 in CIDEr-D


WORD_FAMILIES: dict[str, Family] = {
    "vqa": Family(each(_vqa_fact), accuracy, identity, "accuracy"),
    "exact": Family(each(_words("exact")), _exact_scores, _sample, "accuracy"),
    "asked": Family(each(_words("exact", "asks", "general")), _asked_scores, _sample, "accuracy"),
    "truth": Family(each(_words("truth")), _truth_scores, _sample, "accuracy"),
    "yesno": Family(each(_words("yesno")), _yes_no_scores, _sample, "f1"),
    "choice": Family(each(_words("choice")), _choice_scores, _sample, "q_ar"),
    "letter": Family(each(_words("choice")), _exact_scores, _sample, "accuracy"),
    "caption": Family(_caption_facts, _caption_scores, _caption_sample, "cider"),
    "coco_caption": Family(lambda p: _caption_facts(p, java=True), _coco_caption_scores, _caption_sample, "cider"),
}
