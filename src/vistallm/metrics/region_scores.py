"""Scores of answers with regions: masks (RES, GRES, co-segmentation) and boxes (REC, GREC, phrases, candidates).

A region answer whose polygons hold no pixel centre is a region answer (not "no target") that draws nothing.
"""

from __future__ import annotations

import numpy as np

from vistallm.metrics import functional
from vistallm.metrics.functional import MaskCounts
from vistallm.metrics.scores import SampleScores, Sums
from vistallm.metrics.targets import boxes_of, image_masks, scored_regions
from vistallm.schema import Prediction, Region

PRECISIONS = tuple(f"pr{percent}" for percent in (50, 60, 70, 80, 90))  # Pr@, named by the threshold in per cent


def _counts(prediction: Prediction, target: list[Region]) -> list[MaskCounts]:
    """Return the pixel counts of each image; an unreadable answer has no mask of its own."""
    answer = prediction.parsed.regions if prediction.parsed else []
    masks = (image_masks(regions, prediction) for regions in (answer, target))
    return [functional.mask_counts(*pair) for pair in zip(*masks, strict=True)]


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

    def measure(self, prediction: Prediction) -> Sums:
        """Without a target, IoU is 1 for "no target" and 0 for any region, and no Pr@ counts it (gRefCOCO's rule)."""
        target = scored_regions(prediction, self.optional)
        counts = _counts(prediction, target)
        iou = float(np.mean([one.iou for one in counts]))
        if not target:
            iou = float(prediction.parsed is not None and not prediction.parsed.regions)
        own = dict.fromkeys(("score", "miou", "giou"), (iou, 1.0))
        total = (sum(one.intersection for one in counts), sum(one.union for one in counts))
        thresholds = {name: int(name[2:]) / 100 for name in self.names if name.startswith("pr")}
        hits = {name: (bool(target) and iou >= threshold, bool(target)) for name, threshold in thresholds.items()}
        return {**own, "ciou": total, **_presence(prediction, target), **hits}


class GeneralizedMaskScores(MaskScores):
    """GRES: none, one or several targets. A false mask adds its area to cIoU's union, a right "no target" nothing."""

    names: tuple[str, ...] = ("giou", "ciou", "n_acc", "t_acc", *PRECISIONS)
    means: tuple[str, ...] = ()
    optional = True


class CumulativeIoU(GeneralizedMaskScores):
    """cIoU alone; large objects weigh more."""

    names = ("ciou",)


class MeanSampleIoU(GeneralizedMaskScores):
    """mIoU alone: every sample weighs the same."""

    names = means = ("miou",)


class GeneralizedIoU(GeneralizedMaskScores):
    """gRefCOCO's gIoU alone: mIoU of samples some of which have no target."""

    names = ("giou",)


class PrecisionAtIoU(GeneralizedMaskScores):
    """Pr@ alone: share of the samples with a target whose IoU is at least `threshold` (whole per cents)."""

    def __init__(self, threshold: float = 0.5, average: str | None = None) -> None:
        super().__init__(average)
        self.names = self.means = (f"pr{round(100 * threshold)}",)


class NoTargetAccuracy(GeneralizedMaskScores):
    """N-acc alone: share of the samples without a target that are answered "no target"; masks or boxes."""

    names = ("n_acc",)

    def measure(self, prediction: Prediction) -> Sums:
        """No mask is drawn."""
        target = scored_regions(prediction, optional=True)
        sums = _presence(prediction, target)
        return {**sums, "score": sums["t_acc" if target else "n_acc"]}


class TargetAccuracy(NoTargetAccuracy):
    """T-acc alone: share of the samples with a target that are answered with some region, right or not."""

    names = ("t_acc",)


class CosegmentationScores(SampleScores):
    """CoSeg and AttCoSeg: Av.J, Av.P, cIoU and whether the right set of images is named.

    Av.J is the mean IoU over the images that hold the target or a predicted mask: in AttCoSeg some images hold none;
    leaving those alone earns nothing, a false mask there counts 0. Av.P is the share of pixels labelled rightly.
    """

    names = ("av_j", "av_p", "ciou", "images_right")
    means = ("av_j", "av_p")
    masks = True

    def measure(self, prediction: Prediction) -> Sums:
        """Sums over the images of the sample."""
        target, parsed = scored_regions(prediction, optional=True), prediction.parsed
        counts = _counts(prediction, target)
        total = (sum(one.intersection for one in counts), sum(one.union for one in counts))
        jaccard = [one.iou for one in counts if one.union]
        pixels = [1 - (one.union - one.intersection) / max(one.pixels, 1) for one in counts]
        named = None if parsed is None else {region.image for region in parsed.regions}
        return {
            "score": (sum(jaccard), len(jaccard)) if jaccard else (parsed is not None, 1),
            "av_j": (sum(jaccard), len(jaccard)),
            "av_p": (sum(pixels) if parsed else 0.0, len(pixels)),
            "ciou": total,
            "images_right": (named == {region.image for region in target}, 1),
        }


class BoxScores(SampleScores):
    """REC: one box. Share of the samples whose box has an IoU ABOVE 0.5 with the target's, and the mean IoU."""

    names: tuple[str, ...] = ("p_at_50", "mean_box_iou")
    means: tuple[str, ...] = names

    def measure(self, prediction: Prediction) -> Sums:
        """An answer that is not one box has IoU 0."""
        target = boxes_of(scored_regions(prediction))
        if len(target) != 1:
            raise ValueError(f"prediction {prediction.id}: expected one target box, got {len(target)}")
        answer = boxes_of(prediction.parsed.regions if prediction.parsed else [])
        iou = float(functional.box_iou(answer, target)[0, 0]) if len(answer) == 1 else 0.0
        return {"score": (iou, 1), "mean_box_iou": (iou, 1), "p_at_50": (iou > 0.5, 1)}


class BoxAccuracy(BoxScores):
    """P@0.5 of REC alone."""

    names = means = ("p_at_50",)


class BoxSetScores(SampleScores):
    """GREC: share of the samples whose set of boxes is exactly right (F1 = 1 at IoU >= 0.5), N-acc and T-acc."""

    names: tuple[str, ...] = ("f1_precision", "f1_precision_giou", "n_acc", "t_acc")

    def measure(self, prediction: Prediction) -> Sums:
        """The sample's own score is its F1."""
        regions = scored_regions(prediction, optional=True)
        target, answer = boxes_of(regions), None if prediction.parsed is None else boxes_of(prediction.parsed.regions)
        f1, by_giou = (functional.matched_f1(answer, target, generalized=one) for one in (False, True))
        exact = {"f1_precision": (f1 == 1, 1), "f1_precision_giou": (by_giou == 1, 1)}
        return {"score": (f1, 1), **exact, **_presence(prediction, regions)}


class GeneralizedBoxPrecision(BoxSetScores):
    """Pr(F1 = 1, IoU >= 0.5) of GREC alone."""

    names = ("f1_precision",)


class PhraseScores(SampleScores):
    """Recall@1 of phrases: the answer's first box against the best of the phrase's boxes, and against their hull."""

    names = ("recall_any", "recall_merged")

    def measure(self, prediction: Prediction) -> Sums:
        """The sample's own score is the first box's best IoU."""
        target = boxes_of(scored_regions(prediction))
        best = merged = 0.0
        if prediction.parsed is not None and prediction.parsed.regions:
            first = boxes_of(prediction.parsed.regions[:1])
            hull = np.concatenate([target[:, :2].min(0), target[:, 2:].max(0)])
            best, merged = functional.box_iou(first, target).max(), functional.box_iou(first, hull)[0, 0]
        return {"score": (best, 1), "recall_any": (best >= 0.5, 1), "recall_merged": (merged >= 0.5, 1)}


class CandidateScores(SampleScores):
    """Visual7W: share of the samples whose box or point means the right one of the candidate boxes."""

    names = ("accuracy",)

    def measure(self, prediction: Prediction) -> Sums:
        """An answer that is not one region is wrong."""
        candidates = np.asarray(prediction.target.get("candidates") or [], float).reshape(-1, 4)
        target = boxes_of(scored_regions(prediction))
        if len(candidates) < 2 or len(target) != 1:
            raise ValueError(f"prediction {prediction.id}: expected `candidates` and one target box in its target")
        answer = boxes_of(prediction.parsed.regions if prediction.parsed else [])
        right = len(answer) == 1 and (
            functional.chosen_candidate(answer[0], candidates) == functional.chosen_candidate(target[0], candidates)
        )
        return dict.fromkeys(("score", "accuracy"), (right, 1))
