"""Score families whose targets are masks: RES ("mask"), GRES ("masks") and co-segmentation ("coseg").

Counted are pixels of the sample's images at their own size. An answer may name a region that covers no pixel centre: it
says "there is one" and draws nothing.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from vistallm.evaluate.family import Family, SampleSums, presence, summed
from vistallm.evaluate.targets import image_masks, scored_regions
from vistallm.metrics import functional
from vistallm.metrics.functional import MaskCounts
from vistallm.schema import Prediction

PRECISIONS = {f"pr{int(100 * t)}": t for t in (0.5, 0.6, 0.7, 0.8, 0.9)}  # name of a Pr@ -> its threshold


def _counts(prediction: Prediction, optional: bool) -> tuple[MaskCounts, bool]:
    """Return the counts of a sample's images, and whether its target names no region at all."""
    regions, parsed = scored_regions(prediction, optional), prediction.parsed
    truth = image_masks(regions, prediction)
    drawn = [None] * len(truth) if parsed is None else image_masks(parsed.regions, prediction)
    return functional.mask_counts(drawn, truth), not regions


def _segmentation(prediction: Prediction, optional: bool) -> SampleSums:
    """RES and GRES. IoU by gRefCOCO's rule: without a target, 1 for "none" and 0 for any region; no Pr@ counts it."""
    counts, is_none = _counts(prediction, optional)
    said_none = None if prediction.parsed is None else not prediction.parsed.regions
    iou = float((counts.intersection / np.maximum(counts.union, 1) * counts.readable).mean())
    iou = float(said_none is True) if is_none else iou
    return {
        "score": (iou, 1),
        "miou": (iou, 1),
        "giou": (iou, 1),
        "ciou": functional.cumulative_iou(counts),
        **presence(said_none, is_none),
        **{name: (not is_none and iou >= threshold, not is_none) for name, threshold in PRECISIONS.items()},
    }


def _cosegmentation(prediction: Prediction) -> SampleSums:
    counts, _ = _counts(prediction, optional=True)
    jaccard = functional.foreground_jaccard(counts)
    right = counts.readable & ((counts.predicted_area > 0) == (counts.target_area > 0))
    return {
        "score": jaccard if jaccard[1] else (float(counts.readable.all()), 1),
        "av_j": jaccard,
        "av_p": functional.pixel_precision(counts),
        "ciou": functional.cumulative_iou(counts),
        "images_right": (bool(right.all()), 1),
    }


_one = partial(_segmentation, optional=False)
_none_or_more = partial(_segmentation, optional=True)
MASK_FAMILIES: dict[str, Family] = {
    "mask": summed(_one, "miou", "ciou", *PRECISIONS, masks=True, means=("miou", *PRECISIONS)),
    "masks": summed(_none_or_more, "giou", "ciou", "n_acc", "t_acc", *PRECISIONS, masks=True),
    "coseg": summed(_cosegmentation, "av_j", "av_p", "ciou", "images_right", masks=True, means=("av_j", "av_p")),
}
