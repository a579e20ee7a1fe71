"""Pure score functions on masks and boxes: RLEs and boxes in, int64 counts and (numerator, denominator) sums out.

Every score is a ratio of two sums over samples, so a score over any split of the samples into batches or processes is
the ratio of the added sums, to the last bit (`exact_sum`). Definitions follow the gRefCOCO evaluation (ReLA,
gres_model/evaluation) and, for mask co-segmentation, precision and Jaccard per image. An unreadable answer (None) is
wrong by every score: it adds its target's area to cIoU's union and no mask of its own.

Frame: pixels of the original image; masks are COCO RLE of the image's own size; boxes are x0, y0, x1, y1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from vistallm.schema import Rle

Sums = tuple[float, int]
Boxes = np.ndarray | Sequence  # (N, 4), or one box (4,)


@dataclass(frozen=True)
class MaskCounts:
    """Pixel counts of N masks against their targets.

    Attributes:
        readable: (N,) bool, False where the answer could not be read.
        intersection, union, predicted_area, target_area, image_area: (N,) int64, pixels.
    """

    readable: np.ndarray
    intersection: np.ndarray
    union: np.ndarray
    predicted_area: np.ndarray
    target_area: np.ndarray
    image_area: np.ndarray

    def __len__(self) -> int:
        return len(self.intersection)


def union_rle(masks: Sequence[Rle], height: int, width: int) -> Rle:
    """Return one COCO RLE of (height, width) that covers all `masks`; no mask at all gives the empty mask."""
    if not masks:
        return coco_mask.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
    wrong = [rle["size"] for rle in masks if list(rle["size"]) != [height, width]]
    if wrong:
        raise ValueError(f"mask size: expected [{height}, {width}], the image's own height and width, got {wrong[0]}")
    return masks[0] if len(masks) == 1 else coco_mask.merge(list(masks), intersect=False)


def mask_counts(predicted: Sequence[Rle | None], target: Sequence[Rle]) -> MaskCounts:
    """Count the pixels of N masks (COCO RLE, None: unreadable) against N targets, on run lengths: no mask is drawn.

    Raises:
        ValueError: if the lengths differ, or a mask is not of its target's size.
    """
    if len(predicted) != len(target):
        raise ValueError(f"masks: expected one prediction per target, got {len(predicted)} and {len(target)}")
    rows = np.zeros((len(target), 5), np.int64)
    for row, mask, truth in zip(rows, predicted, target, strict=True):
        height, width = truth["size"]
        # uint32 areas would wrap round in `a + b - i`
        target_area = int(coco_mask.area(truth))
        if mask is None:
            row[:] = 0, target_area, 0, target_area, height * width
            continue
        if list(mask["size"]) != [height, width]:
            raise ValueError(f"mask size: expected the target's [{height}, {width}], got {list(mask['size'])}")
        area = int(coco_mask.area(mask))
        intersection = int(coco_mask.area(coco_mask.merge([mask, truth], intersect=True)))
        row[:] = intersection, area + target_area - intersection, area, target_area, height * width
    readable = np.array([mask is not None for mask in predicted], bool)
    return MaskCounts(readable, *rows.T)


def sample_iou(counts: MaskCounts) -> np.ndarray:
    """Return (N,) float64 IoU in [0, 1]; two empty masks agree (1), an unreadable answer never does (0)."""
    iou = counts.intersection / np.maximum(counts.union, 1)
    return np.where(counts.union == 0, 1.0, iou) * counts.readable


def exact_sum(values: np.ndarray | Sequence[float]) -> float:
    """Sum N numbers in [0, 1], each rounded to 2**-32: the same to the last bit for any order and any split.

    Float sums depend on their order, so a mean over batches or processes would not be one number. Sums of multiples of
    2**-32 have no rounding up to two million samples, and a mean moves by less than 1.2e-10.
    """
    return float(np.rint(np.asarray(values, np.float64) * 2.0**32).sum() / 2.0**32)


def mean_sample_iou(counts: MaskCounts) -> Sums:
    """Mean of per-sample IoU (mIoU). With no-target samples in, it is gRefCOCO's gIoU: a right "none" counts 1."""
    return exact_sum(sample_iou(counts)), len(counts)


def cumulative_iou(counts: MaskCounts) -> Sums:
    """Sum of intersections over sum of unions (cIoU, oIoU): a false mask adds its area, a right "none" nothing."""
    return int(counts.intersection.sum()), int(counts.union.sum())


def precision_at_iou(counts: MaskCounts, threshold: float) -> Sums:
    """Share of the samples with a target whose IoU is at least `threshold` (Pr@)."""
    has_target = counts.target_area > 0
    return int((sample_iou(counts)[has_target] >= threshold).sum()), int(has_target.sum())


def no_target_accuracy(predicted_empty: np.ndarray, target_empty: np.ndarray, readable: np.ndarray) -> Sums:
    """Share of the samples without a target that are answered "none" (N-acc); three (N,) bool arrays."""
    return int((predicted_empty & readable)[target_empty].sum()), int(target_empty.sum())


def target_accuracy(predicted_empty: np.ndarray, target_empty: np.ndarray, readable: np.ndarray) -> Sums:
    """Share of the samples with a target that are answered with some region (T-acc); three (N,) bool arrays."""
    return int((~predicted_empty & readable)[~target_empty].sum()), int((~target_empty).sum())


def pixel_precision(counts: MaskCounts) -> Sums:
    """Mean over images of the share of pixels labelled rightly, object and background alike (Av.P)."""
    wrong = counts.union - counts.intersection
    return exact_sum((1 - wrong / np.maximum(counts.image_area, 1)) * counts.readable), len(counts)


def foreground_jaccard(counts: MaskCounts) -> Sums:
    """Mean IoU over the images that hold the target or a predicted mask (Av.J).

    Where each image holds the common object this is the usual Av.J. In AttCoSeg some images hold none: leaving
    those alone earns nothing (it would lift the mean of an empty answer), a false mask there counts 0.
    """
    counted = counts.union > 0
    return exact_sum(sample_iou(counts)[counted]), int(counted.sum())


def box_iou(boxes: Boxes, others: Boxes, generalized: bool = False) -> np.ndarray:
    """Return (N, M) float64 IoU, or generalised IoU in [-1, 1], of boxes (N, 4) and (M, 4).

    A box with x1 < x0 or y1 < y0 has no area. Generalised IoU: Rezatofighi et al. 2019.
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


def box_hit(predicted: Boxes | None, target: Boxes, threshold: float = 0.5) -> bool:
    """Return whether one box (4,) has an IoU ABOVE `threshold` with the target (REC's P@0.5); None is a miss."""
    return predicted is not None and bool(box_iou(predicted, target)[0, 0] > threshold)


def matched_f1(predicted: Boxes | None, target: Boxes, threshold: float = 0.5, generalized: bool = False) -> float:
    """F1 in [0, 1] of N boxes (N >= 0; None: unreadable, 0) against M targets; with M = 0 only N = 0 is right.

    Pairs are matched best first while their overlap is at least `threshold`, as gRefCOCO's code does. `generalized`
    measures overlap by generalised IoU (the published GREC code does; the text says IoU).
    """
    if predicted is None:
        return 0.0
    count = len(predicted) + len(target)
    if len(predicted) == 0 or len(target) == 0:
        return float(count == 0)
    overlap = box_iou(predicted, target, generalized)
    matches = 0
    for _ in range(min(overlap.shape)):
        row, column = np.unravel_index(int(overlap.argmax()), overlap.shape)
        if overlap[row, column] < threshold:
            break
        matches += 1
        overlap[row, :] = -np.inf
        overlap[:, column] = -np.inf
    return 2 * matches / count


def chosen_candidate(region: np.ndarray, candidates: np.ndarray) -> int:
    """Return the index of the candidate box that an answered box (4,) or point (2,) means.

    The highest generalised IoU wins (it still orders boxes that do not touch); equal ones go to the nearer centre,
    which is what decides for a point inside two candidates.
    """
    box = np.asarray(region, np.float64)
    box = np.tile(box, 2) if box.size == 2 else box
    boxes = np.asarray(candidates, np.float64).reshape(-1, 4)
    overlap = box_iou(box, boxes, generalized=True)[0]
    distance = np.hypot(*((boxes[:, :2] + boxes[:, 2:] - box[:2] - box[2:]) / 2).T)
    return int(np.lexsort((distance, -overlap))[0])
