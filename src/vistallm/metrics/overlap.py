"""Masks and boxes of predictions and their targets, and pure functions on them: pixel counts, overlaps, matches.

Frame: pixels of the original image. Masks are COCO RLE of the image's own size, boxes are x0, y0, x1, y1. Definitions
follow the gRefCOCO evaluation (ReLA, gres_model/evaluation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from vistallm.regions.masks import polygons_to_rle, rle_box
from vistallm.schema import Prediction, Region, Rle

Boxes = np.ndarray | Sequence  # (N, 4), or one box (4,)
MaskCounts = tuple[int, int, int]  # pixels of the intersection, the union and the image


def target_regions(prediction: Prediction) -> list[Region]:
    """Return the target's regions; raises ValueError naming the prediction when one is malformed or in no image."""
    try:
        regions = [Region.from_json(record) for record in prediction.target.get("regions", [])]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"prediction {prediction.id}: target region is malformed: {error}") from error
    if any(not 0 <= region.image < len(prediction.images) for region in regions):
        raise ValueError(
            f"prediction {prediction.id}: a target region lies in none of its {len(prediction.images)} images"
        )
    return regions


def scored_regions(prediction: Prediction, optional: bool = False) -> list[Region]:
    """Return the target's regions to score against; `optional`: the task has a "no target" answer.

    Raises:
        ValueError: as `target_regions`; also where the target is missing: "no target" must be said by `empty`.
    """
    regions = target_regions(prediction)
    none = prediction.target.get("empty")
    if not regions and not (optional and none) or regions and none:
        raise ValueError(f"prediction {prediction.id}: its target has {len(regions)} region(s), and empty is {none}")
    return regions


def fact(prediction: Prediction, name: str, default: Any = None) -> Any:
    """Return what the target says beside regions and answer ("held_out", "group", "mode", "class"), or `default`."""
    return prediction.target.get(name, (prediction.target.get("meta") or {}).get(name, default))


def image_masks(regions: list[Region], prediction: Prediction) -> list[Rle]:
    """Return one RLE per image of the prediction: the union of the mask regions in that image, maybe empty.

    A region is drawn by its own RLE (a target's full mask), else by its polygons.
    """
    drawn = []
    for index, image in enumerate(prediction.images):
        size = int(image["height"]), int(image["width"])
        here = [region for region in regions if region.image == index]
        masks = [polygons_to_rle(one.polygons or [], *size) if one.rle is None else one.rle for one in here]
        try:
            drawn.append(union_rle(masks, *size))
        except ValueError as error:
            raise ValueError(f"prediction {prediction.id}, image {index}: {error}") from error
    return drawn


def box_of(region: Region) -> tuple[float, ...]:
    """Return a region's box (x0, y0, x1, y1): its own, its point as a box without area, or the one of its mask."""
    if region.rle is not None and region.box is None and region.point is None:
        return rle_box(region.rle)
    return region.box or 2 * (region.point or ())


def boxes_of(regions: list[Region]) -> np.ndarray:
    """Return (n, 4) float64 boxes."""
    return np.array([box_of(region) for region in regions], np.float64).reshape(-1, 4)


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
    return intersection, areas - intersection, height * width


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
