"""Score families whose targets are masks: RES ("mask"), GRES ("masks") and co-segmentation ("coseg").

A fact is a MaskFact: pixel counts of the sample's images at their own size, and whether each side names a region.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vistallm.evaluate.family import Family, NamedScores, each, presence_scores
from vistallm.evaluate.targets import image_masks, scored_regions
from vistallm.metrics import answers, functional
from vistallm.metrics.functional import MaskCounts
from vistallm.schema import Prediction

PRECISIONS = {f"pr{int(100 * t)}": t for t in (0.5, 0.6, 0.7, 0.8, 0.9)}  # name of a Pr@ -> its threshold


@dataclass(frozen=True)
class MaskFact:
    """Counts of a sample's images; `said_none` and `is_none`: the answer, the target name no region at all.

    An answer may name a region that covers no pixel centre: it says "there is one" and draws nothing.
    """

    counts: MaskCounts
    said_none: bool
    is_none: bool

    @property
    def readable(self) -> bool:
        """Whether the answer could be read."""
        return bool(self.counts.readable.all())

    @property
    def iou(self) -> float:
        """IoU of a one-image sample by gRefCOCO's rule: without a target, 1 for "none" and 0 for any region."""
        counts = self.counts
        if self.is_none:
            return float(self.said_none)
        return float((counts.intersection / np.maximum(counts.union, 1) * counts.readable).mean())


def _measure(prediction: Prediction, optional: bool) -> MaskFact:
    regions = scored_regions(prediction, optional)
    truth = image_masks(regions, prediction)
    if prediction.parsed is None:
        return MaskFact(functional.mask_counts([None] * len(truth), truth), False, not regions)
    drawn = image_masks(prediction.parsed.regions, prediction)
    return MaskFact(functional.mask_counts(drawn, truth), not prediction.parsed.regions, not regions)


def _joined(facts: list[MaskFact]) -> MaskCounts:
    if not facts:
        return functional.mask_counts([], [])
    names = MaskCounts.__dataclass_fields__
    return MaskCounts(*(np.concatenate([getattr(f.counts, name) for f in facts]) for name in names))


def _scores(facts: list[MaskFact]) -> NamedScores:
    """mIoU, cIoU and Pr@, the latter over the samples that have a target."""
    iou = np.array([one.iou for one in facts])
    target = iou[[not one.is_none for one in facts]] if facts else iou
    return {
        "miou": answers.ratio(float(iou.sum()), len(iou)),
        "ciou": answers.ratio(*functional.cumulative_iou(_joined(facts))),
        **{name: answers.ratio(int((target >= t).sum()), len(target)) for name, t in PRECISIONS.items()},
    }


def _general_scores(facts: list[MaskFact]) -> NamedScores:
    scores = _scores(facts)
    return {"giou": scores.pop("miou"), "ciou": scores.pop("ciou"), **presence_scores(facts), **scores}


def _images_right(fact: MaskFact) -> bool:
    counts = fact.counts
    return bool((counts.readable & ((counts.predicted_area > 0) == (counts.target_area > 0))).all())


def _coseg_scores(facts: list[MaskFact]) -> NamedScores:
    counts = _joined(facts)
    return {
        "av_j": answers.ratio(*functional.foreground_jaccard(counts)),
        "av_p": answers.ratio(*functional.pixel_precision(counts)),
        "ciou": answers.ratio(*functional.cumulative_iou(counts)),
        "images_right": answers.mean(map(_images_right, facts)),
    }


def _coseg_sample(fact: MaskFact) -> float:
    jaccard = answers.ratio(*functional.foreground_jaccard(fact.counts))
    return float(fact.readable) if jaccard is None else jaccard


_one = each(lambda prediction: _measure(prediction, optional=False))
_none_or_more = each(lambda prediction: _measure(prediction, optional=True))
MASK_FAMILIES: dict[str, Family] = {
    "mask": Family(_one, _scores, lambda f: f.iou, "miou", True, ("miou", *PRECISIONS)),
    "masks": Family(_none_or_more, _general_scores, lambda f: f.iou, "giou", True),
    "coseg": Family(_none_or_more, _coseg_scores, _coseg_sample, "av_j", True, ("av_j", "av_p")),
}
