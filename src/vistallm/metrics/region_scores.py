"""Scores of answers with regions: masks (RES, GRES, co-segmentation) and boxes (REC, GREC, phrases, candidates).

A region answer whose polygons hold no pixel centre is a region answer (not "no target") that draws nothing.
"""

from __future__ import annotations

import numpy as np

from vistallm.metrics.overlap import (
    box_iou,
    boxes_of,
    chosen_candidate,
    image_masks,
    mask_counts,
    matched_f1,
    scored_regions,
)
from vistallm.metrics.scores import SampleScores, Sums
from vistallm.schema import Prediction, Region

PRECISIONS = tuple(f"pr{percent}" for percent in (50, 60, 70, 80, 90))  # Pr@, named by the threshold in per cent


def _counts(prediction: Prediction, target: list[Region]) -> np.ndarray:
    """Return (images, 3) int64 pixels of intersection, union and image; an unreadable answer has no mask of its own."""
    answer = prediction.parsed.regions if prediction.parsed else []
    pairs = zip(image_masks(answer, prediction), image_masks(target, prediction), strict=True)
    return np.array([mask_counts(*pair) for pair in pairs], np.int64)


def _presence(prediction: Prediction, target: list[Region]) -> Sums:
    """Return a sample's part of N-acc and T-acc: whether it says "no target" where there is none, and only there."""
    right = prediction.parsed is not None and bool(prediction.parsed.regions) == bool(target)
    return {"n_acc": (right and not target, not target), "t_acc": (right and bool(target), bool(target))}


class MaskScores(SampleScores):
    """RES: one target. mIoU (mean of samples' IoU), cIoU (sum of intersections over sum of unions) and Pr@."""

    names: tuple[str, ...] = ("miou", "ciou", *PRECISIONS)
    means: tuple[str, ...] = ("miou", *PRECISIONS)
    masks = True
    optional = False  # whether a sample may have no target

    def _measure(self, prediction: Prediction) -> Sums:
        target = scored_regions(prediction, self.optional)
        intersection, union, _ = _counts(prediction, target).T
        iou = float((intersection / np.maximum(union, 1)).mean())
        if not target:  # gRefCOCO's rule: 1 for "no target", 0 for any region, and no Pr@ counts the sample
            iou = float(prediction.parsed is not None and not prediction.parsed.regions)
        thresholds = {name: int(name[2:]) / 100 for name in self.names if name.startswith("pr")}
        return {
            **dict.fromkeys(("score", "miou", "giou"), (iou, 1)),
            "ciou": (intersection.sum(), union.sum()),
            **_presence(prediction, target),
            **{name: (bool(target) and iou >= threshold, bool(target)) for name, threshold in thresholds.items()},
        }


class GeneralizedMaskScores(MaskScores):
    """GRES: none, one or several targets. A false mask adds its area to cIoU's union, a right "no target" nothing."""

    names: tuple[str, ...] = ("giou", "ciou", "n_acc", "t_acc", *PRECISIONS)
    means: tuple[str, ...] = ()
    optional = True


class CosegmentationScores(SampleScores):
    """CoSeg and AttCoSeg: Av.J, Av.P, cIoU and whether the right set of images is named.

    Av.J is the mean IoU over the images that hold the target or a predicted mask: in AttCoSeg some images hold none;
    leaving those alone earns nothing, a false mask there counts 0. Av.P is the share of pixels labelled rightly.
    """

    names = ("av_j", "av_p", "ciou", "images_right")
    means = ("av_j", "av_p")
    masks = True

    def _measure(self, prediction: Prediction) -> Sums:
        target, parsed = scored_regions(prediction, optional=True), prediction.parsed
        intersection, union, pixels = _counts(prediction, target).T
        jaccard = (intersection / np.maximum(union, 1))[union > 0]
        named = None if parsed is None else {region.image for region in parsed.regions}
        return {
            "score": (jaccard.sum(), len(jaccard)) if len(jaccard) else (parsed is not None, 1),
            "av_j": (jaccard.sum(), len(jaccard)),
            "av_p": ((1 - (union - intersection) / np.maximum(pixels, 1)).sum() if parsed else 0, len(pixels)),
            "ciou": (intersection.sum(), union.sum()),
            "images_right": (named == {region.image for region in target}, 1),
        }


class BoxScores(SampleScores):
    """REC: share of the samples whose one box has an IoU ABOVE 0.5 with the target's, and the mean IoU."""

    names: tuple[str, ...] = ("p_at_50", "mean_box_iou")
    means: tuple[str, ...] = names

    def _measure(self, prediction: Prediction) -> Sums:
        target = boxes_of(scored_regions(prediction))
        if len(target) != 1:
            raise ValueError(f"prediction {prediction.id}: expected one target box, got {len(target)}")
        answer = boxes_of(prediction.parsed.regions if prediction.parsed else [])
        iou = float(box_iou(answer, target)[0, 0]) if len(answer) == 1 else 0.0
        return {"score": (iou, 1), "mean_box_iou": (iou, 1), "p_at_50": (iou > 0.5, 1)}


class BoxSetScores(SampleScores):
    """GREC: share of the samples whose set of boxes is exactly right (F1 = 1 at IoU >= 0.5), N-acc and T-acc."""

    names: tuple[str, ...] = ("f1_precision", "f1_precision_giou", "n_acc", "t_acc")

    def _measure(self, prediction: Prediction) -> Sums:
        regions = scored_regions(prediction, optional=True)
        target, answer = boxes_of(regions), None if prediction.parsed is None else boxes_of(prediction.parsed.regions)
        f1, by_giou = (matched_f1(answer, target, generalized=one) for one in (False, True))
        exact = {"f1_precision": (f1 == 1, 1), "f1_precision_giou": (by_giou == 1, 1)}
        return {"score": (f1, 1), **exact, **_presence(prediction, regions)}


class PhraseScores(SampleScores):
    """Recall@1 of phrases: the answer's first box against the best of the phrase's boxes, and against their hull."""

    names = ("recall_any", "recall_merged")

    def _measure(self, prediction: Prediction) -> Sums:
        target = boxes_of(scored_regions(prediction))
        best = merged = 0.0
        if prediction.parsed is not None and prediction.parsed.regions:
            first = boxes_of(prediction.parsed.regions[:1])
            hull = np.concatenate([target[:, :2].min(0), target[:, 2:].max(0)])
            best, merged = box_iou(first, target).max(), box_iou(first, hull)[0, 0]
        return {"score": (best, 1), "recall_any": (best >= 0.5, 1), "recall_merged": (merged >= 0.5, 1)}


class CandidateScores(SampleScores):
    """Visual7W: share of the samples whose box or point means the right one of the candidate boxes."""

    names = ("accuracy",)

    def _measure(self, prediction: Prediction) -> Sums:
        candidates = np.asarray(prediction.target.get("candidates") or [], float).reshape(-1, 4)
        target = boxes_of(scored_regions(prediction))
        if len(candidates) < 2 or len(target) != 1:
            raise ValueError(f"prediction {prediction.id}: expected `candidates` and one target box in its target")
        answer = boxes_of(prediction.parsed.regions if prediction.parsed else [])
        chosen = {chosen_candidate(box, candidates) for box in (*answer, *target)}
        return dict.fromkeys(("score", "accuracy"), (len(answer) == 1 and len(chosen) == 1, 1))
