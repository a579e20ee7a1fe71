"""Score families: predictions of one benchmark -> a fact per sample -> named scores over any subset of the samples.

A fact holds what a family counts of one sample (pixels, an IoU, a right answer), so splits and per-sample scores cost
nothing beside it. Definitions live in `vistallm.metrics`; scores are shares in [0, 1] (CIDEr: 1.0 is printed as 100).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vistallm.evaluate.parse import read_words
from vistallm.evaluate.targets import boxes_of, fact, image_masks, target_regions
from vistallm.metrics import answers, functional
from vistallm.metrics.functional import MaskCounts, Sums
from vistallm.schema import Prediction

NamedScores = dict[str, float | None]
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
SCORE_NAMES = {
    "miou": "Mean IoU (mIoU)",
    "ciou": "Cumulative IoU (cIoU)",
    "giou": "gRefCOCO gIoU",
    **{f"pr{int(100 * t)}": f"Precision at IoU {t}" for t in THRESHOLDS},
    "n_acc": "No-target accuracy (N-acc)",
    "t_acc": "Target accuracy (T-acc)",
    "av_p": "Pixel precision (Av.P)",
    "av_j": "Foreground IoU (Av.J)",
    "images_right": "Right set of images",
    "p_at_50": "Precision at box IoU 0.5",
    "mean_box_iou": "Mean box IoU",
    "f1_precision": "All boxes right (F1 = 1, IoU 0.5)",
    "f1_precision_giou": "All boxes right (F1 = 1, generalised IoU 0.5)",
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "yes_share": "Share of yes",
    "consistency": "Consistency",
    "q_a": "Q to A",
    "qa_r": "QA to R",
    "q_ar": "Q to AR",
    "cider": "CIDEr",
    "exact": "Exact match",
}


@dataclass(frozen=True)
class Family:
    """How one kind of task is scored.

    Attributes:
        measure: predictions -> one fact each.
        summarise: facts of any subset -> named scores, None where nothing counts.
        sample_score: fact -> the sample's own score in [0, 1], for `Prediction.score` and the gallery.
        headline: the score that stands for the benchmark.
        masks: whether targets are masks, so that a mask ceiling exists.
    """

    measure: Callable[[Sequence[Prediction]], list[Any]]
    summarise: Callable[[list[Any]], NamedScores]
    sample_score: Callable[[Any], float]
    headline: str
    masks: bool = False


def _share(sums: Sums) -> float | None:
    return answers.ratio(*sums)


def _each(measure_one: Callable[[Prediction], Any]) -> Callable[[Sequence[Prediction]], list[Any]]:
    return lambda predictions: [measure_one(prediction) for prediction in predictions]


# ---- masks: a fact is the MaskCounts of the sample's images


def _mask_fact(prediction: Prediction) -> MaskCounts:
    truth = image_masks(target_regions(prediction), prediction)
    if prediction.parsed is None:
        return functional.mask_counts([None] * len(truth), truth)
    return functional.mask_counts(image_masks(prediction.parsed.regions, prediction), truth)


def _joined(facts: list[MaskCounts]) -> MaskCounts:
    if not facts:
        return functional.mask_counts([], [])
    return MaskCounts(*(np.concatenate([getattr(f, name) for f in facts]) for name in MaskCounts.__dataclass_fields__))


def _mask_scores(facts: list[MaskCounts]) -> NamedScores:
    counts = _joined(facts)
    scores = {"miou": _share(functional.mean_sample_iou(counts)), "ciou": _share(functional.cumulative_iou(counts))}
    return scores | {f"pr{int(100 * t)}": _share(functional.precision_at_iou(counts, t)) for t in THRESHOLDS}


def _general_mask_scores(facts: list[MaskCounts]) -> NamedScores:
    counts = _joined(facts)
    presence = (counts.predicted_area == 0, counts.target_area == 0, counts.readable)
    scores = _mask_scores(facts)
    return {"giou": scores.pop("miou"), "ciou": scores.pop("ciou")} | {
        "n_acc": _share(functional.no_target_accuracy(*presence)),
        "t_acc": _share(functional.target_accuracy(*presence)),
        **scores,
    }


def _images_right(counts: MaskCounts) -> bool:
    return bool((counts.readable & ((counts.predicted_area > 0) == (counts.target_area > 0))).all())


def _coseg_scores(facts: list[MaskCounts]) -> NamedScores:
    counts = _joined(facts)
    return {
        "av_j": _share(functional.foreground_jaccard(counts)),
        "av_p": _share(functional.pixel_precision(counts)),
        "ciou": _share(functional.cumulative_iou(counts)),
        "images_right": answers.ratio(sum(map(_images_right, facts)), len(facts)),
    }


def _coseg_sample(counts: MaskCounts) -> float:
    jaccard = _share(functional.foreground_jaccard(counts))
    return float(counts.readable.all()) if jaccard is None else jaccard


# ---- boxes


def _box_fact(prediction: Prediction) -> float:
    """IoU of the one box that REC asks for; an answer that is not one box has none."""
    target = boxes_of(target_regions(prediction))
    if len(target) != 1:
        raise ValueError(f"prediction {prediction.id}: expected one target box, got {len(target)}")
    if prediction.parsed is None or len(prediction.parsed.regions) != 1:
        return 0.0
    return float(functional.box_iou(boxes_of(prediction.parsed.regions), target)[0, 0])


def _box_scores(facts: list[float]) -> NamedScores:
    hits = sum(iou > 0.5 for iou in facts)
    return {"p_at_50": answers.ratio(hits, len(facts)), "mean_box_iou": answers.ratio(sum(facts), len(facts))}


@dataclass(frozen=True)
class _BoxesFact:
    f1: float
    f1_giou: float
    predicted_empty: bool
    target_empty: bool
    readable: bool


def _boxes_fact(prediction: Prediction) -> _BoxesFact:
    target = boxes_of(target_regions(prediction))
    found = None if prediction.parsed is None else boxes_of(prediction.parsed.regions)
    return _BoxesFact(
        functional.matched_f1(found, target),
        functional.matched_f1(found, target, generalized=True),
        found is not None and len(found) == 0,
        len(target) == 0,
        found is not None,
    )


def _boxes_scores(facts: list[_BoxesFact]) -> NamedScores:
    presence = [np.array([getattr(f, n) for f in facts], bool) for n in ("predicted_empty", "target_empty", "readable")]
    return {
        "f1_precision": answers.ratio(sum(f.f1 == 1 for f in facts), len(facts)),
        "f1_precision_giou": answers.ratio(sum(f.f1_giou == 1 for f in facts), len(facts)),
        "n_acc": _share(functional.no_target_accuracy(*presence)),
        "t_acc": _share(functional.target_accuracy(*presence)),
    }


def _candidate_fact(prediction: Prediction) -> float:
    candidates = np.asarray(prediction.target.get("candidates") or [], float).reshape(-1, 4)
    target = boxes_of(target_regions(prediction))
    if len(candidates) < 2 or len(target) != 1:
        raise ValueError(f"prediction {prediction.id}: expected `candidates` and one target box in its target")
    if prediction.parsed is None or len(prediction.parsed.regions) != 1:
        return 0.0
    region = prediction.parsed.regions[0]
    chosen = functional.chosen_candidate(np.array(region.point or region.box, float), candidates)
    return float(chosen == functional.chosen_candidate(target[0], candidates))


def _accuracy(facts: list[float]) -> NamedScores:
    return {"accuracy": answers.ratio(sum(facts), len(facts))}


# ---- words


@dataclass(frozen=True)
class _WordsFact:
    answer: str | None
    reference: str
    group: str
    mode: str

    @property
    def right(self) -> bool:
        return self.answer is not None and self.answer.casefold() == self.reference.casefold()


def _words_fact(family: str) -> Callable[[Prediction], _WordsFact]:
    def measure(prediction: Prediction) -> _WordsFact:
        reference, reason = read_words(str(prediction.target.get("answer") or ""), family)
        if reference is None:
            raise ValueError(f"prediction {prediction.id}: its target's answer can't be read as {family}: {reason}")
        answer = None if prediction.parsed is None else prediction.parsed.answer
        group, mode = (
            str(fact(prediction, name, default)) for name, default in (("group", prediction.id), ("mode", "q_a"))
        )
        return _WordsFact(answer, reference, group, mode)

    return measure


def _right_share(facts: list[_WordsFact]) -> float | None:
    return answers.ratio(sum(f.right for f in facts), len(facts))


def _truth_scores(facts: list[_WordsFact]) -> NamedScores:
    consistency = answers.all_right_share([f.right for f in facts], [f.group for f in facts])
    return {"accuracy": _right_share(facts), "consistency": consistency}


def _vqa_fact(prediction: Prediction) -> float:
    if prediction.parsed is None:
        return 0.0
    references = prediction.target.get("answers")
    if not references:  # a single reference stands for ten annotators who agree
        reference = read_words(str(prediction.target.get("answer") or ""), "vqa")[0] or ""
        references = [answers.normalise_vqa(reference)] * 10
    return answers.vqa_accuracy(prediction.parsed.answer, references)


def _caption_facts(predictions: Sequence[Prediction]) -> list[tuple[float, bool]]:
    texts = [None if p.parsed is None else p.parsed.answer for p in predictions]
    references = [p.target.get("answers") or [str(p.target.get("answer") or "")] for p in predictions]
    ciders = answers.cider_scores(texts, references)
    exact = [
        text is not None and answers.caption_tokens(text) in map(answers.caption_tokens, group)
        for text, group in zip(texts, references, strict=True)
    ]
    return list(zip(ciders.tolist(), exact, strict=True))


def _caption_scores(facts: list[tuple[float, bool]]) -> NamedScores:
    cider, exact = (sum(fact[i] for fact in facts) for i in (0, 1))
    return {"cider": answers.ratio(cider, len(facts)), "exact": answers.ratio(exact, len(facts))}


def _identity(score: float) -> float:
    return score


FAMILIES: dict[str, Family] = {
    "mask": Family(_each(_mask_fact), _mask_scores, lambda f: functional.mean_sample_iou(f)[0], "miou", True),
    "masks": Family(_each(_mask_fact), _general_mask_scores, lambda f: functional.mean_sample_iou(f)[0], "giou", True),
    "coseg": Family(_each(_mask_fact), _coseg_scores, _coseg_sample, "av_j", True),
    "box": Family(_each(_box_fact), _box_scores, _identity, "p_at_50"),
    "boxes": Family(_each(_boxes_fact), _boxes_scores, lambda f: f.f1, "f1_precision"),
    "candidates": Family(_each(_candidate_fact), _accuracy, _identity, "accuracy"),
    "vqa": Family(_each(_vqa_fact), _accuracy, _identity, "accuracy"),
    "exact": Family(
        _each(_words_fact("exact")), lambda f: {"accuracy": _right_share(f)}, lambda f: float(f.right), "accuracy"
    ),
    "truth": Family(_each(_words_fact("truth")), _truth_scores, lambda f: float(f.right), "accuracy"),
    "yesno": Family(
        _each(_words_fact("yesno")),
        lambda facts: answers.yes_no_scores([f.answer for f in facts], [f.reference for f in facts]),
        lambda f: float(f.right),
        "f1",
    ),
    "choice": Family(
        _each(_words_fact("choice")),
        lambda fs: answers.choice_scores([f.right for f in fs], [f.mode for f in fs], [f.group for f in fs]),
        lambda f: float(f.right),
        "q_ar",
    ),
    # a caption as good as its reference scores 10 in CIDEr-D
    "caption": Family(_caption_facts, _caption_scores, lambda f: min(1.0, f[0] / 10), "cider"),
}
