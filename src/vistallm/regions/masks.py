"""Masks <-> polygons: (H, W) mask or COCO RLE -> parts of (n, 2) float32 within a point budget, and back.

Coordinates are pixels of the original image, x then y, with pixel EDGES at integers. `polygons_to_rle` is the one
drawing rule of the project: pycocotools' polygon rasteriser, which drew the COCO family's own masks; a pixel belongs to a
polygon when its centre lies inside (even-odd), and parts are united.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco

from vistallm.regions.outline import MIN_VERTICES, as_mask, outline_rings
from vistallm.regions.samplers import adaptive_points, curvature_points, uniform_points
from vistallm.schema import Rle

SAMPLERS = ("uniform", "curvature", "adaptive")


def mask_to_polygons(
    mask: np.ndarray,
    points: int = 32,
    sampler: str = "adaptive",
    *,
    target_iou: float | None = None,
) -> list[np.ndarray]:
    """Sample the outline of one object's mask.

    Args:
        mask: (H, W) bool, or numbers with non-zero = inside; any memory order.
        points: the most vertices of all parts together, at least 3.
        sampler: "uniform", "curvature" or "adaptive".
        target_iou: if set, in (0, 1]: the fewest vertices, up to `points`, whose drawing reaches this IoU.

    Returns:
        Parts in canonical order (`canonical_polygons`), each (n, 2) float32 with n >= 3; empty list for an empty mask.

    Raises:
        ValueError: a mask that is not (H, W) numbers, or an option out of range.
    """
    if points < MIN_VERTICES:
        raise ValueError(f"points: expected at least {MIN_VERTICES}, got {points}")
    if sampler not in SAMPLERS:
        raise ValueError(f"mask_sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if target_iou is not None and not 0 < target_iou <= 1:
        raise ValueError(f"target_iou: expected a number in (0, 1], got {target_iou}")
    mask = as_mask(mask)
    rings = outline_rings(mask)
    if not rings:
        return []
    if target_iou is None:
        return _sample(rings, points, sampler, mask)
    truth = mask_to_rle(mask)
    low, high = MIN_VERTICES, points  # the IoU grows with the points but for small steps, so bisection finds the fewest
    while low < high:
        middle = (low + high) // 2
        drawn = polygons_to_rle(_sample(rings, middle, sampler, mask), *mask.shape)
        low, high = (low, middle) if rle_iou(drawn, truth) >= target_iou else (middle + 1, high)
    return _sample(rings, low, sampler, mask)


def rle_to_polygons(
    rle: Rle, points: int = 32, sampler: str = "adaptive", *, target_iou: float | None = None
) -> list[np.ndarray]:
    """Like `mask_to_polygons`, from COCO run lengths."""
    return mask_to_polygons(rle_to_mask(rle), points, sampler, target_iou=target_iou)


def _sample(rings: list[np.ndarray], points: int, sampler: str, mask: np.ndarray) -> list[np.ndarray]:
    if sampler == "adaptive":
        kept = adaptive_points(rings, points, mask)
    elif sum(map(len, rings)) <= points:
        kept = rings
    else:
        kept = (uniform_points if sampler == "uniform" else curvature_points)(rings, points)
    return canonical_polygons([r.astype(np.float32) for r in kept])


def polygons_to_rle(polygons: Sequence[np.ndarray], height: int, width: int) -> Rle:
    """Draw the union of polygons, each (n, 2) float, pixels of an image of this size -> COCO RLE, counts as str."""
    flat = [np.asarray(p, np.float64).ravel() for p in polygons if len(p) >= MIN_VERTICES]
    if not flat:
        return _as_text(coco.encode(np.zeros((height, width), np.uint8, order="F")))
    return _as_text(coco.merge(coco.frPyObjects(flat, height, width)))


def polygons_to_mask(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Draw the union of polygons, each (n, 2) float, pixels of an image of this size -> (height, width) bool."""
    return rle_to_mask(polygons_to_rle(polygons, height, width))


def mask_to_rle(mask: np.ndarray) -> Rle:
    """(H, W) mask, non-zero = inside -> COCO RLE, counts as str."""
    return _as_text(coco.encode(np.asfortranarray(as_mask(mask) != 0).view(np.uint8)))


def rle_to_mask(rle: Rle) -> np.ndarray:
    """COCO RLE, compressed (str or bytes) or a list of runs -> (H, W) bool."""
    return coco.decode(_compressed(rle)).view(bool)


def rle_box(rle: Rle) -> tuple[float, float, float, float]:
    """Box of a mask: (x0, y0, x1, y1), pixel edges."""
    x, y, w, h = coco.toBbox(_compressed(rle)).tolist()
    return x, y, x + w, y + h


def rle_iou(a: Rle, b: Rle) -> float:
    """Intersection over union of two masks of one size; 1 when both are empty."""
    union = int(coco.area(coco.merge([a, b])))
    return int(coco.area(coco.merge([a, b], intersect=True))) / union if union else 1.0


def _compressed(rle: Rle) -> Rle:
    return coco.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle


def _as_text(rle: Rle) -> Rle:
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def canonical_polygons(polygons: Sequence[np.ndarray]) -> list[np.ndarray]:
    """One order for one shape: clockwise, from the topmost then leftmost vertex; parts by that vertex.

    Repeated vertices in a row go, and so do parts with fewer than three vertices or no area.
    """
    parts = []
    for polygon in polygons:
        polygon = polygon[(polygon != np.roll(polygon, 1, 0)).any(1)]
        x, y = polygon.astype(np.float64).T
        area = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()
        if len(polygon) < MIN_VERTICES or area == 0:
            continue
        if area < 0:
            polygon = polygon[::-1]
        keys = polygon[:, ::-1]
        tops = np.flatnonzero((keys == min(map(tuple, keys))).all(1))
        parts.append(min((np.roll(polygon, -k, 0) for k in tops), key=lambda p: p[:, ::-1].tolist()))
    return sorted(parts, key=lambda p: p[:, ::-1].tolist())
