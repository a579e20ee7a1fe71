"""Scores of answers with regions: masks (RES, GRES, co-segmentation) and boxes (REC, GREC, phrases, candidates).

Frame: pixels of the original image. Masks are COCO RLE of the image's own size, boxes are x0, y0, x1, y1. Definitions
follow the gRefCOCO evaluation (ReLA, gres_model/evaluation). A region answer whose polygons hold no pixel centre is a
region answer (not "no target") that draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from vistallm.metrics.scores import NamedScores, Row, SampleScores, Sums, fact, mean
from vistallm.regions.masks import box_of, polygons_to_rle
from vistallm.schema import PROMPT_SHAPES, Prediction, Region, Rle

Boxes = np.ndarray | Sequence  # (N, 4), or one box (4,)
PRECISIONS = tuple(f"pr{percent}" for percent in (50, 60, 70, 80, 90))  # Pr@, named by the threshold in per cent


def target_regions(prediction: Prediction, optional: bool = False) -> list[Region]:
    """Return the regions to score against; `optional`: the task has a "no target" answer.

    Raises:
        ValueError: one is malformed or in no image, or there is none and the target does not say so by `empty`.
    """
    regions = [Region.from_json(record) for record in prediction.target.get("regions", [])]
    if any(not 0 <= region.image < len(prediction.images) for region in regions):
        raise ValueError(f"a target region lies in none of its {len(prediction.images)} images")
    none = prediction.target.get("empty")
    if not regions and not (optional and none) or regions and none:
        raise ValueError(f"its target has {len(regions)} region(s), and empty is {none}")
    return regions


def mask_of(region: Region, image: Mapping[str, Any]) -> Rle:
    """Return a region's own RLE (a target's, a link's), else its polygons drawn at the image's width and height."""
    return region.rle or polygons_to_rle(region.polygons or [], int(image["height"]), int(image["width"]))


def image_masks(regions: Sequence[Region], prediction: Prediction) -> list[Rle]:
    """Return one RLE per image of the prediction: the union of the mask regions in that image, maybe empty.

    Raises ValueError for an RLE that is not of its image's size.
    """
    drawn = []
    for index, image in enumerate(prediction.images):
        size = [int(image["height"]), int(image["width"])]
        masks = [mask_of(region, image) for region in regions if region.image == index]
        if wrong := [rle["size"] for rle in masks if list(rle["size"]) != size]:
            raise ValueError(f"image {index}: mask size: expected {size}, height and width, got {wrong[0]}")
        empty = coco_mask.frPyObjects({"size": size, "counts": [size[0] * size[1]]}, *size)
        drawn.append(coco_mask.merge(masks, intersect=False) if masks else empty)
    return drawn


def mask_counts(predicted: Rle, target: Rle) -> tuple[int, int, int]:
    """Return the pixels of intersection, union and image, from run lengths: no mask is drawn; both are of one size."""
    # int(): uint32 areas would wrap round in the sum
    areas = int(coco_mask.area(predicted)) + int(coco_mask.area(target))
    intersection = int(coco_mask.area(coco_mask.merge([predicted, target], intersect=True)))
    return intersection, areas - intersection, target["size"][0] * target["size"][1]


def boxes_of(regions: Sequence[Region]) -> np.ndarray:
    """Return (n, 4) float64 boxes."""
    return np.array([box_of(region) for region in regions], np.float64).reshape(-1, 4)


def box_iou(boxes: Boxes, others: Boxes, generalized: bool = False) -> np.ndarray:
    """Return (N, M) float64 IoU, or generalised IoU in [-1, 1] (Rezatofighi et al. 2019), of (N, 4) and (M, 4).

    A box with x1 < x0 or y1 < y0 has no area.
    """
    a = np.asarray(boxes, np.float64).reshape(-1, 1, 4)
    b = np.asarray(others, np.float64).reshape(1, -1, 4)

    def area(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.clip(high - low, 0, None).prod(-1)

    intersection = area(np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - intersection
    iou = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    if not generalized:
        return iou
    hull = area(np.minimum(a[..., :2], b[..., :2]), np.maximum(a[..., 2:], b[..., 2:]))
    return iou - np.divide(hull - union, hull, out=np.zeros_like(hull), where=hull > 0)


def matched_f1(predicted: Boxes | None, target: Boxes, generalized: bool = False) -> float:
    """F1 in [0, 1] of N boxes (N >= 0; None: unreadable, 0) against M targets; with M = 0 only N = 0 is right.

    Pairs are matched best first while their overlap is at least 0.5, as gRefCOCO's code does. `generalized` measures
    overlap by generalised IoU (the published GREC code does; the text says IoU).
    """
    if predicted is None:
        return 0.0
    count = len(predicted) + len(target)
    if len(predicted) == 0 or len(target) == 0:
        return float(count == 0)
    overlap, matches = box_iou(predicted, target, generalized), 0
    while overlap.max() >= 0.5:
        row, column = np.unravel_index(int(overlap.argmax()), overlap.shape)
        overlap[row, :] = overlap[:, column] = -np.inf
        matches += 1
    return 2 * matches / count


def chosen_candidate(box: np.ndarray, candidates: np.ndarray) -> int:
    """Return the index of the candidate box (of N, 4) that an answered box (4,) means; a point is one without area.

    The highest generalised IoU wins (it still orders boxes that do not touch); equal ones go to the nearer centre,
    which is what decides for a point inside two candidates.
    """
    offsets = candidates - box
    distance = np.hypot(offsets[:, 0] + offsets[:, 2], offsets[:, 1] + offsets[:, 3])
    return int(np.lexsort((distance, -box_iou(box, candidates, generalized=True)[0]))[0])


def answered(prediction: Prediction) -> list[Region]:
    """Return the regions of an answer, none of one that could not be read."""
    return prediction.parsed.regions if prediction.parsed else []


def _counts(prediction: Prediction, target: list[Region]) -> np.ndarray:
    """Return (3, images) int64 pixels of intersection, union and image; an unreadable answer has no mask of its own."""
    pairs = zip(image_masks(answered(prediction), prediction), image_masks(target, prediction), strict=True)
    return np.array([mask_counts(*pair) for pair in pairs], np.int64).T


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
        target = target_regions(prediction, self.optional)
        intersection, union, _ = _counts(prediction, target)
        iou = float(intersection.sum() / max(union.sum(), 1))
        if not target:  # gRefCOCO's rule: 1 for "no target", 0 for any region, and no Pr@ counts the sample
            iou = float(prediction.parsed is not None and not prediction.parsed.regions)
        return {
            **dict.fromkeys(("score", "miou", "giou"), (iou, 1)),
            "ciou": (intersection.sum(), union.sum()),
            **_presence(prediction, target),
            **{name: (bool(target) and iou >= int(name[2:]) / 100, bool(target)) for name in PRECISIONS},
        }


class GeneralizedMaskScores(MaskScores):
    """GRES: none, one or several targets. A false mask adds its area to cIoU's union, a right "no target" nothing."""

    names: tuple[str, ...] = ("giou", "ciou", "n_acc", "t_acc", *PRECISIONS)
    means: tuple[str, ...] = ()
    optional = True


class PromptedScores(MaskScores):
    """Interactive segmentation: RES's scores for each shape of the region prompt (meta "prompt"), and their mean."""

    names = ("miou_prompts", *(f"miou_{shape}" for shape in PROMPT_SHAPES), "miou", "ciou", *PRECISIONS)

    def _measure(self, prediction: Prediction) -> Sums:
        sums, shape = super()._measure(prediction), fact(prediction, "prompt")
        if shape not in PROMPT_SHAPES:
            raise ValueError(f'its meta["prompt"]: expected one of {", ".join(PROMPT_SHAPES)}, got {shape!r}')
        own = {f"miou_{name}": (sums["miou"][0] * (name == shape), name == shape) for name in PROMPT_SHAPES}
        return sums | own | {"miou_prompts": (0, 0)}

    def _ratios(self, rows: Sequence[Row]) -> NamedScores:
        scores = super()._ratios(rows)
        return scores | {"miou_prompts": mean(scores[f"miou_{shape}"] for shape in PROMPT_SHAPES)}


class ContextScores(GeneralizedMaskScores):
    """In-context segmentation: GRES's scores, and mIoU over the samples that have a target."""

    names = ("miou", *GeneralizedMaskScores.names)

    def _measure(self, prediction: Prediction) -> Sums:
        sums = super()._measure(prediction)
        return sums | {"miou": (sums["miou"][0] * sums["t_acc"][1], sums["t_acc"][1])}


class CosegmentationScores(SampleScores):
    """CoSeg and AttCoSeg: Av.J, Av.P, cIoU and whether the right set of images is named.

    Av.J is the mean IoU over the images that hold the target or a predicted mask: in AttCoSeg some images hold none;
    leaving those alone earns nothing, a false mask there counts 0. Av.P is the share of pixels labelled rightly.
    """

    names = ("av_j", "av_p", "ciou", "images_right")
    means = ("av_j", "av_p")
    masks = True

    def _measure(self, prediction: Prediction) -> Sums:
        target, parsed = target_regions(prediction, optional=True), prediction.parsed
        intersection, union, pixels = _counts(prediction, target)
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
        target, answer = boxes_of(target_regions(prediction)), boxes_of(answered(prediction))
        if len(target) != 1:
            raise ValueError(f"expected one target box, got {len(target)}")
        iou = float(box_iou(answer, target)[0, 0]) if len(answer) == 1 else 0.0
        return {"score": (iou, 1), "mean_box_iou": (iou, 1), "p_at_50": (iou > 0.5, 1)}


class BoxSetScores(SampleScores):
    """GREC: share of the samples whose set of boxes is exactly right (F1 = 1 at IoU >= 0.5), N-acc and T-acc."""

    names: tuple[str, ...] = ("f1_precision", "f1_precision_giou", "n_acc", "t_acc")

    def _measure(self, prediction: Prediction) -> Sums:
        target = target_regions(prediction, optional=True)
        answer = None if prediction.parsed is None else boxes_of(prediction.parsed.regions)
        f1, by_giou = (matched_f1(answer, boxes_of(target), generalized) for generalized in (False, True))
        exact = {"f1_precision": (f1 == 1, 1), "f1_precision_giou": (by_giou == 1, 1)}
        return {"score": (f1, 1), **exact, **_presence(prediction, target)}


class PhraseScores(SampleScores):
    """Recall@1 of phrases: the answer's first box against the best of the phrase's boxes, and against their hull."""

    names = ("recall_any", "recall_merged")

    def _measure(self, prediction: Prediction) -> Sums:
        target, first = boxes_of(target_regions(prediction)), boxes_of(answered(prediction)[:1])
        hull = np.concatenate([target[:, :2].min(0), target[:, 2:].max(0)])
        best, merged = (box_iou(first, boxes).max(initial=0) for boxes in (target, hull))
        return {"score": (best, 1), "recall_any": (best >= 0.5, 1), "recall_merged": (merged >= 0.5, 1)}


class CandidateScores(SampleScores):
    """Visual7W: share of the samples whose box or point means the right one of the candidate boxes."""

    names = ("accuracy",)

    def _measure(self, prediction: Prediction) -> Sums:
        candidates = np.asarray(prediction.target.get("candidates") or [], float).reshape(-1, 4)
        target, answer = boxes_of(target_regions(prediction)), boxes_of(answered(prediction))
        if len(candidates) < 2 or len(target) != 1:
            raise ValueError("expected `candidates` and one target box in its target")
        chosen = {chosen_candidate(box, candidates) for box in (*answer, *target)}
        return dict.fromkeys(("score", "accuracy"), (len(answer) == 1 and len(chosen) == 1, 1))
