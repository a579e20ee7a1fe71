"""Score families of answers in words: questions, choices, yes or no, statements and captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vistallm.evaluate.family import Family, NamedScores, each
from vistallm.evaluate.parse import read_words
from vistallm.evaluate.targets import fact
from vistallm.metrics import answers, captions
from vistallm.schema import Prediction


@dataclass(frozen=True)
class _WordsFact:
    """An answer beside its reference; `mode` and `asks` say what the question is about (VCR, LookTwice)."""

    answer: str | None
    reference: str
    group: str
    mode: str
    asks: str

    @property
    def right(self) -> bool:
        return self.answer is not None and self.answer.casefold() == self.reference.casefold()


def _words(reader: str, summarise: Callable[[list[_WordsFact]], NamedScores], headline: str = "accuracy") -> Family:
    """Return a family of answers that are right or wrong as a whole; targets are read as answers are."""

    def measure(prediction: Prediction) -> _WordsFact:
        reference, reason = read_words(str(prediction.target.get("answer") or ""), reader)
        if reference is None:
            raise ValueError(f"prediction {prediction.id}: its target's answer can't be read as {reader}: {reason}")
        answer = None if prediction.parsed is None else prediction.parsed.answer
        about = (("group", prediction.id), ("mode", "q_a"), ("asks", "general"))
        return _WordsFact(answer, reference, *(str(fact(prediction, name, default)) for name, default in about))

    return Family(each(measure), summarise, lambda f: float(f.right), headline)


def _exact_scores(facts: list[_WordsFact]) -> NamedScores:
    return {"accuracy": answers.mean(f.right for f in facts)}


def _asked_scores(facts: list[_WordsFact]) -> NamedScores:
    """LookTwice by what its question names: the object ("these bears"), its super class, or nothing ("these")."""
    kinds = ("general", "super", "object")
    parts = {f"accuracy_{kind}": answers.mean(f.right for f in facts if f.asks == kind) for kind in kinds}
    return _exact_scores(facts) | parts


def _truth_scores(facts: list[_WordsFact]) -> NamedScores:
    consistency = answers.all_right_share([f.right for f in facts], [f.group for f in facts])
    return _exact_scores(facts) | {"consistency": consistency}


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


def _references(prediction: Prediction) -> list[str]:
    found = prediction.target.get("answers") or [str(prediction.target.get("answer") or "")]
    if not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"prediction {prediction.id}: its target has no caption to compare with, got {found!r}")
    return list(found)


def _captions(*public: str) -> Family:
    """Return the family of captions, with the `public` scores beside it that need Java (None where there is none)."""
    more = {"cider_ptb": captions.cider_scores_ptb, "spice": captions.spice_scores}
    names = ("cider", "exact", *public)

    def measure(predictions: Sequence[Prediction]) -> list[NamedScores]:
        texts = [None if p.parsed is None else p.parsed.answer for p in predictions]
        references = [_references(p) for p in predictions]
        exact = [
            text is not None and captions.caption_tokens(text) in map(captions.caption_tokens, group)
            for text, group in zip(texts, references, strict=True)
        ]
        columns = [captions.cider_scores(texts, references).tolist(), exact]
        for name in public:
            found = more[name](texts, references)
            columns.append([None] * len(texts) if found is None else found.tolist())
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def summarise(facts: list[NamedScores]) -> NamedScores:
        return {name: answers.mean(value for f in facts if (value := f[name]) is not None) for name in names}

    # a caption as good as its reference scores 10 in CIDEr-D
    return Family(measure, summarise, lambda f: min(1.0, f["cider"] / 10), "cider")


WORD_FAMILIES: dict[str, Family] = {
    "vqa": Family(each(_vqa_fact), lambda facts: {"accuracy": answers.mean(facts)}, float, "accuracy"),
    "exact": _words("exact", _exact_scores),
    "asked": _words("exact", _asked_scores),
    "truth": _words("truth", _truth_scores),
    "yesno": _words("yesno", _yes_no_scores, "f1"),
    "choice": _words("choice", _choice_scores, "q_ar"),
    "letter": _words("choice", _exact_scores),
    "caption": _captions(),
    "coco_caption": _captions("cider_ptb", "spice"),
}
