"""Pure functions on masks and boxes: RLEs and boxes in, pixel counts, overlaps and matches out.

Definitions follow the gRefCOCO evaluation (ReLA, gres_model/evaluation). Frame: pixels of the original image; masks are
COCO RLE of the image's own size; boxes are x0, y0, x1, y1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from vistallm.schema import Rle

Boxes = np.ndarray | Sequence  # (N, 4), or one box (4,)


class MaskCounts(NamedTuple):
    """Pixels of one predicted mask and its target."""

    intersection: int
    union: int
    pixels: int  # of the image

    @property
    def iou(self) -> float:
        """IoU in [0, 1]; 0 where both masks are empty."""
        return self.intersection / max(self.union, 1)


def union_rle(masks: Sequence[Rle], height: int, width: int) -> Rle:
    """Return one COCO RLE of (height, width) that covers all `masks`; no mask at all gives the empty mask."""
    if not masks:
        return coco_mask.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
    wrong = [rle["size"] for rle in masks if list(rle["size"]) != [height, width]]
    if wrong:
        raise ValueError(f"mask size: expected [{height}, {width}], the image's own height and width, got {wrong[0]}")
    return masks[0] if len(masks) == 1 else coco_mask.merge(list(masks), intersect=False)


def mask_counts(predicted: Rle, target: Rle) -> MaskCounts:
    """Count pixels on run lengths, no mask is drawn; both masks are of one size."""
    # int(): uint32 areas would wrap round in the sum
    areas = int(coco_mask.area(predicted)) + int(coco_mask.area(target))
    intersection = int(coco_mask.area(coco_mask.merge([predicted, target], intersect=True)))
    height, width = target["size"]
    return MaskCounts(intersection, areas - intersection, height * width)


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
