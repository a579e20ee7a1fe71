"""Score families whose targets are boxes: REC ("box"), GREC ("boxes"), phrases ("phrase"), Visual7W ("candidates")."""

from __future__ import annotations

import numpy as np

from vistallm.evaluate.family import Family, NamedScores, SampleSums, each, presence, summed
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


def _grec_sums(prediction: Prediction) -> SampleSums:
    target = boxes_of(scored_regions(prediction, optional=True))
    found = None if prediction.parsed is None else boxes_of(prediction.parsed.regions)
    f1 = functional.matched_f1(found, target)
    return {
        "score": (f1, 1),
        "f1_precision": (f1 == 1, 1),
        "f1_precision_giou": (functional.matched_f1(found, target, generalized=True) == 1, 1),
        **presence(None if found is None else len(found) == 0, len(target) == 0),
    }


def _phrase_sums(prediction: Prediction) -> SampleSums:
    """The answer's first box against the best of the phrase's boxes, and against the box around them all."""
    target = boxes_of(scored_regions(prediction))
    any_box = merged = 0.0
    if prediction.parsed is not None and prediction.parsed.regions:
        first = boxes_of(prediction.parsed.regions[:1])
        around = np.concatenate([target[:, :2].min(0), target[:, 2:].max(0)])
        any_box, merged = functional.box_iou(first, target).max(), functional.box_iou(first, around)[0, 0]
    return {"score": (float(any_box), 1), "recall_any": (any_box >= 0.5, 1), "recall_merged": (merged >= 0.5, 1)}


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
    "boxes": summed(_grec_sums, "f1_precision", "f1_precision_giou", "n_acc", "t_acc"),
    "phrase": summed(_phrase_sums, "recall_any", "recall_merged"),
    "candidates": Family(each(_candidate_fact), lambda facts: {"accuracy": answers.mean(facts)}, float, "accuracy"),
}
