"""Score families whose targets are boxes: REC ("box"), GREC ("boxes"), phrases ("phrase"), Visual7W ("candidates")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vistallm.evaluate.family import Family, NamedScores, each, presence_scores
from vistallm.evaluate.targets import boxes_of, scored_regions
from vistallm.metrics import answers, functional
from vistallm.schema import Prediction


def _rec_fact(prediction: Prediction) -> float:
    """IoU of the one box that REC asks for; an answer that is not one box has none."""
    target = boxes_of(scored_regions(prediction))
    if len(target) != 1:
        raise ValueError(f"prediction {prediction.id}: expected one target box, got {len(target)}")
    if prediction.parsed is None or len(prediction.parsed.regions) != 1:
        return 0.0
    return float(functional.box_iou(boxes_of(prediction.parsed.regions), target)[0, 0])


def _rec_scores(facts: list[float]) -> NamedScores:
    return {"p_at_50": answers.mean(iou > 0.5 for iou in facts), "mean_box_iou": answers.mean(facts)}


@dataclass(frozen=True)
class _BoxesFact:
    f1: float
    f1_giou: float
    said_none: bool
    is_none: bool
    readable: bool


def _grec_fact(prediction: Prediction) -> _BoxesFact:
    target = boxes_of(scored_regions(prediction, optional=True))
    found = None if prediction.parsed is None else boxes_of(prediction.parsed.regions)
    return _BoxesFact(
        functional.matched_f1(found, target),
        functional.matched_f1(found, target, generalized=True),
        found is not None and len(found) == 0,
        len(target) == 0,
        found is not None,
    )


def _grec_scores(facts: list[_BoxesFact]) -> NamedScores:
    return {
        "f1_precision": answers.mean(f.f1 == 1 for f in facts),
        "f1_precision_giou": answers.mean(f.f1_giou == 1 for f in facts),
        **presence_scores(facts),
    }


def _phrase_fact(prediction: Prediction) -> tuple[float, float]:
    """IoU of the answer's first box with the best of the phrase's boxes, and with the box around them all."""
    target = boxes_of(scored_regions(prediction))
    if prediction.parsed is None or not prediction.parsed.regions:
        return 0.0, 0.0
    first = boxes_of(prediction.parsed.regions[:1])
    around = np.concatenate([target[:, :2].min(0), target[:, 2:].max(0)])
    return float(functional.box_iou(first, target).max()), float(functional.box_iou(first, around)[0, 0])


def _phrase_scores(facts: list[tuple[float, float]]) -> NamedScores:
    return {
        "recall_any": answers.mean(any_box >= 0.5 for any_box, _ in facts),
        "recall_merged": answers.mean(merged >= 0.5 for _, merged in facts),
    }


def _candidate_fact(prediction: Prediction) -> float:
    candidates = np.asarray(prediction.target.get("candidates") or [], float).reshape(-1, 4)
    target = boxes_of(scored_regions(prediction))
    if len(candidates) < 2 or len(target) != 1:
        raise ValueError(f"prediction {prediction.id}: expected `candidates` and one target box in its target")
    if prediction.parsed is None or len(prediction.parsed.regions) != 1:
        return 0.0
    chosen = functional.chosen_candidate(boxes_of(prediction.parsed.regions)[0], candidates)
    return float(chosen == functional.chosen_candidate(target[0], candidates))


BOX_FAMILIES: dict[str, Family] = {
    "box": Family(each(_rec_fact), _rec_scores, float, "p_at_50", means=("p_at_50", "mean_box_iou")),
    "boxes": Family(each(_grec_fact), _grec_scores, lambda f: f.f1, "f1_precision"),
    "phrase": Family(each(_phrase_fact), _phrase_scores, lambda f: f[0], "recall_any"),
    "candidates": Family(each(_candidate_fact), lambda facts: {"accuracy": answers.mean(facts)}, float, "accuracy"),
}
