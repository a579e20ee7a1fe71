"""Score families whose targets are masks: RES ("mask"), GRES ("masks") and co-segmentation ("coseg").

A fact is a MaskFact: pixel counts of the sample's images at their own size, and whether each side names a region.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vistallm.evaluate.family import Family, NamedScores, each, share
from vistallm.evaluate.targets import image_masks, scored_regions
from vistallm.metrics import answers, functional
from vistallm.metrics.functional import MaskCounts
from vistallm.schema import Prediction

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class MaskFact:
    """Counts of a sample's images; `said_none` and `is_none`: the answer, the target name no region at all.

    An answer may name a region that covers no pixel centre: it says "there is one" and draws nothing.
    """

    counts: MaskCounts
    said_none: bool
    is_none: bool

    @property
    def iou(self) -> float:
        """IoU of a one-image sample by gRefCOCO's rule: without a target, 1 for "none" and 0 for any region."""
        counts = self.counts
        if self.is_none:
            return float(self.said_none)
        return float((counts.intersection / np.maximum(counts.union, 1) * counts.readable).mean())


def _measure(optional: bool) -> Callable[[Prediction], MaskFact]:
    def measure(prediction: Prediction) -> MaskFact:
        regions = scored_regions(prediction, optional)
        truth = image_masks(regions, prediction)
        if prediction.parsed is None:
            return MaskFact(functional.mask_counts([None] * len(truth), truth), False, not regions)
        drawn = image_masks(prediction.parsed.regions, prediction)
        return MaskFact(functional.mask_counts(drawn, truth), not prediction.parsed.regions, not regions)

    return measure


def _joined(facts: list[MaskFact]) -> MaskCounts:
    if not facts:
        return functional.mask_counts([], [])
    names = MaskCounts.__dataclass_fields__
    return MaskCounts(*(np.concatenate([getattr(f.counts, name) for f in facts]) for name in names))


def _scores(facts: list[MaskFact]) -> NamedScores:
    """mIoU, cIoU and Pr@, the latter over the samples that have a target."""
    iou = np.array([one.iou for one in facts])
    target = iou[[not one.is_none for one in facts]] if facts else iou
    precision = {f"pr{int(100 * t)}": answers.ratio(int((target >= t).sum()), len(target)) for t in THRESHOLDS}
    cumulative = share(functional.cumulative_iou(_joined(facts)))
    return {"miou": answers.ratio(float(iou.sum()), len(iou)), "ciou": cumulative} | precision


def _general_scores(facts: list[MaskFact]) -> NamedScores:
    readable = [bool(f.counts.readable.all()) for f in facts]
    presence = [np.array(p, bool) for p in ([f.said_none for f in facts], [f.is_none for f in facts], readable)]
    scores = _scores(facts)
    return {"giou": scores.pop("miou"), "ciou": scores.pop("ciou")} | {
        "n_acc": share(functional.no_target_accuracy(*presence)),
        "t_acc": share(functional.target_accuracy(*presence)),
        **scores,
    }


def _images_right(fact: MaskFact) -> bool:
    counts = fact.counts
    return bool((counts.readable & ((counts.predicted_area > 0) == (counts.target_area > 0))).all())


def _coseg_scores(facts: list[MaskFact]) -> NamedScores:
    counts = _joined(facts)
    return {
        "av_j": share(functional.foreground_jaccard(counts)),
        "av_p": share(functional.pixel_precision(counts)),
        "ciou": share(functional.cumulative_iou(counts)),
        "images_right": answers.ratio(sum(map(_images_right, facts)), len(facts)),
    }


def _coseg_sample(fact: MaskFact) -> float:
    jaccard = share(functional.foreground_jaccard(fact.counts))
    return float(fact.counts.readable.all()) if jaccard is None else jaccard


_PRECISIONS = tuple(f"pr{int(100 * t)}" for t in THRESHOLDS)
MASK_FAMILIES: dict[str, Family] = {
    "mask": Family(each(_measure(False)), _scores, lambda f: f.iou, "miou", True, ("miou", *_PRECISIONS)),
    "masks": Family(each(_measure(True)), _general_scores, lambda f: f.iou, "giou", True),
    "coseg": Family(each(_measure(True)), _coseg_scores, _coseg_sample, "av_j", True, ("av_j", "av_p")),
}
