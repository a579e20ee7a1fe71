"""Masks <-> polygons: (H, W) mask or COCO RLE -> parts of (n, 2) float32 within a point budget, and back.

Coordinates are pixels of the original image, x then y, with pixel EDGES at integers. There is one drawing
rule: pycocotools' polygon rasteriser, which drew the COCO family's own masks. A pixel belongs to a polygon when its
centre does (even-odd), and parts are united. `polygons_to_rle` and `polygons_to_mask` both follow it, to the pixel.

A mask whose edges follow pixel edges, with at most `points` corners, comes back as a polygon that draws it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numba import njit
from pycocotools import mask as coco

from vistallm.regions.contours import MIN_VERTICES, as_mask, outline_rings
from vistallm.regions.refine import draw_polygon
from vistallm.regions.samplers import adaptive_points, curvature_points, uniform_points
from vistallm.schema import Region, Rle

SAMPLERS = ("uniform", "curvature", "adaptive")


def mask_to_polygons(
    mask: np.ndarray,
    points: int = 32,
    sampler: str = "adaptive",
    *,
    target_iou: float | None = None,
    num_bins: int | None = None,
) -> list[np.ndarray]:
    """Sample the outline of one object's mask; holes are filled.

    Args:
        mask: (H, W) bool, or numbers with non-zero = inside; any memory order.
        points: the most vertices of all parts together, at least 3.
        sampler: "uniform", "curvature" or "adaptive".
        target_iou: if set, in (0, 1]: the fewest vertices, up to `points`, whose drawing reaches this IoU; all `points`
            where none does.
        num_bins: for "adaptive": choose vertices on these bins of the padded square, as the codec does.

    Returns:
        Parts in canonical order (`canonical_polygons`), each (n, 2) float32 with n >= 3; empty list for an empty mask.

    Raises:
        ValueError: a mask that is not (H, W) numbers, or an option out of range.
    """
    check_options(points, sampler, target_iou)
    mask = as_mask(mask)
    rings = outline_rings(mask)

    def sample(budget: int) -> list[np.ndarray]:
        if sampler == "adaptive":
            kept = adaptive_points(rings, budget, mask, num_bins)
        else:
            kept = uniform_points(rings, budget) if sampler == "uniform" else curvature_points(rings, budget)
        polygons = canonical_polygons([ring.astype(np.float32) for ring in kept])
        # Coarse bins or three points on a thin line can leave no area; the mask's box always has some.
        return polygons or [box_polygon(np.concatenate(rings), budget).astype(np.float32)]

    if not rings:
        return []
    if target_iou is not None:
        truth = mask_to_rle(mask)
        for budget in range(MIN_VERTICES, points):
            polygons = sample(budget)
            if rle_iou(polygons_to_rle(polygons, *mask.shape), truth) >= target_iou:
                return polygons
    return sample(points)


def load_compiled() -> None:
    """Load the compiled samplers, or compile them (some 15 s, once per machine).

    Call it before worker processes fork, so that not every worker does it; `NUMBA_CACHE_DIR` moves the cache away
    from the source files.
    """
    disc = rle_to_mask(mask_to_rle(np.hypot(*(np.mgrid[:32, :32] - 15.5)) < 14))
    polygons_to_mask(mask_to_polygons(disc, 8, num_bins=101), 32, 32)


def box_polygon(points: np.ndarray, budget: int) -> np.ndarray:
    """Box around points, (n, 2) -> (4, 2) of the same type, clockwise; half of it where the budget is three."""
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])[:budget]


def check_options(points: int, sampler: str, target_iou: float | None) -> None:
    """Raise ValueError for sampling options out of range, before any mask is at hand."""
    if points < MIN_VERTICES:
        raise ValueError(f"points: expected at least {MIN_VERTICES}, got {points}")
    if sampler not in SAMPLERS:
        raise ValueError(f"mask_sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if target_iou is not None and not 0 < target_iou <= 1:
        raise ValueError(f"target_iou: expected a number in (0, 1], got {target_iou}")


def polygons_to_rle(polygons: Sequence[np.ndarray], height: int, width: int) -> Rle:
    """Draw the union of polygons, each (n, 2) float, pixels of an image of this size -> COCO RLE, counts as str."""
    flat = [np.asarray(p, np.float64).ravel() for p in polygons if len(p) >= MIN_VERTICES]
    if not flat:
        return _as_text(coco.encode(np.zeros((height, width), np.uint8, order="F")))
    return _as_text(coco.merge(coco.frPyObjects(flat, height, width)))


def polygons_to_mask(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Draw the union of polygons, each (n, 2) float, pixels of an image of this size -> (height, width) bool."""
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        if len(polygon) >= MIN_VERTICES:
            draw_polygon(mask, np.ascontiguousarray(polygon, np.float64))
    return mask.view(bool)


def mask_to_rle(mask: np.ndarray) -> Rle:
    """(H, W) mask, non-zero = inside -> COCO RLE, counts as str."""
    return _as_text(coco.encode(np.asfortranarray(as_mask(mask) != 0).view(np.uint8)))


def rle_to_mask(rle: Rle) -> np.ndarray:
    """COCO RLE, compressed (str or bytes) or a list of runs -> (H, W) bool; ValueError where its runs don't fill it."""
    height, width = map(int, rle["size"])
    counts = _compressed(rle)["counts"]
    flat = _draw_runs(np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8), height * width)
    if not flat.size:
        raise ValueError(
            f"rle: its runs do not fill {height} x {width} pixels: {counts[:40]!r}; build the sample again"
        )
    return cv2.transpose(flat.reshape(width, height)).view(bool)


@njit(cache=True, error_model="numpy")
def _draw_runs(counts: np.ndarray, size: int) -> np.ndarray:
    """COCO's compressed counts, (n,) uint8 -> (size,) uint8 of 0 and 1, column by column; empty where they don't fit.

    Five times as quick as pycocotools' decoding into row order, and runs beyond the image are refused.
    """
    mask = np.zeros(size, np.uint8)
    at = before = last = value = shift = number = 0
    for char in counts:
        bits = int(np.int64(char)) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32 and shift < 60:
            continue
        if bits & 16:
            value -= 1 << shift
        value += before if number > 2 else 0  # from the fourth on, a run is stored less the one before the last
        if value < 0 or value > size - at:
            return mask[:0]
        mask[at : at + value] = number % 2
        at, before, last, number = at + value, last, value, number + 1
        value = shift = 0
    return mask if at == size and not shift else mask[:0]


def segmentation_to_rle(segmentation: Any, height: int | None = None, width: int | None = None) -> Rle:
    """A COCO annotation's segmentation -> RLE of the whole object, counts as str.

    Args:
        segmentation: polygons as flat lists [x0, y0, x1, y1, ...], pixels (all parts are united; coordinates outside
            the image are cut off, polygons of fewer than three points draw nothing), RLE (compressed, or the list of
            runs of a crowd), or a list of RLEs.
        height: image height in pixels, needed for polygons; where given, RLEs must be of this size.
        width: likewise.

    Raises:
        ValueError: another form, an odd number of coordinates, runs of another size, or polygons without image size.
    """
    pieces = segmentation if isinstance(segmentation, list) else [segmentation]
    if pieces and all(isinstance(piece, dict) for piece in pieces):
        rles = [_checked(piece, [height, width] if height else list(piece.get("size", ()))) for piece in pieces]
        return rles[0] if len(rles) == 1 else merge_rles(rles)
    if not height or not width:
        raise ValueError("segmentation: polygons need the image's height and width, got none; add them to the record")
    if not isinstance(segmentation, list) or any(len(p) % 2 or not np.isfinite(p).all() for p in segmentation):
        raise ValueError(f"segmentation: expected RLE or lists of finite x, y pairs, got {str(segmentation)[:80]}")
    return polygons_to_rle([np.reshape(p, (-1, 2)) for p in segmentation], int(height), int(width))


def _checked(rle: Rle, size: list[int | None]) -> Rle:
    """One RLE of a segmentation, compressed; ValueError where it is not of this size."""
    counts, given = rle.get("counts"), list(rle.get("size", ()))
    fits = sum(counts) == math.prod(given) if isinstance(counts, list) else isinstance(counts, str | bytes)
    if given != size or len(given) != 2 or not fits:
        raise ValueError(f"segmentation: expected run lengths of size {size}, got size {given}")
    return _as_text(_compressed(rle))


def rle_area(rle: Rle) -> int:
    """Pixels of a mask."""
    return int(coco.area(rle))


def merge_rles(rles: Sequence[Rle]) -> Rle:
    """Union of masks of one size."""
    return _as_text(coco.merge(list(rles)))


def rle_box(rle: Rle) -> tuple[float, float, float, float]:
    """Box of a mask: (x0, y0, x1, y1), pixel edges."""
    x, y, w, h = coco.toBbox(_compressed(rle)).tolist()
    return x, y, x + w, y + h


def box_of(region: Region) -> tuple[float, ...]:
    """Return a region's box (x0, y0, x1, y1): its own, its point as a box without area, or its mask's or keypoints'."""
    if region.box or region.point:
        return region.box or 2 * (region.point or ())
    if region.rle is not None:
        return rle_box(region.rle)
    points = [point for polygon in region.polygons or () for point in polygon.tolist()]
    points += [[x, y] for x, y, v in region.keypoints or () if v > 0]
    hull = np.array(points or [[0.0, 0.0]])
    return (*hull.min(0).tolist(), *hull.max(0).tolist())


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
    """One order for one shape: clockwise, from the topmost then leftmost vertex; parts by that vertex, then the next.

    Args:
        polygons: (n, 2) float32 or integers, x then y.

    Returns:
        The same type. Repeats of a vertex in a row are gone, and so are parts without three vertices or without area.
    """
    parts = [_canonical_ring(polygon) for polygon in polygons if len(polygon) >= MIN_VERTICES]
    parts = [part for part in parts if len(part)]
    return sorted(parts, key=lambda part: part[:, ::-1].tolist()) if len(parts) > 1 else parts


@njit(cache=True, error_model="numpy")
def _canonical_ring(polygon: np.ndarray) -> np.ndarray:
    """One part in canonical order, empty if it has no area."""
    ring = np.empty_like(polygon)
    size = 0
    for k in range(len(polygon)):
        if polygon[k, 0] != polygon[k - 1, 0] or polygon[k, 1] != polygon[k - 1, 1]:
            ring[size] = polygon[k]
            size += 1
    area = 0.0
    for k in range(size):
        j = k + 1 if k + 1 < size else 0
        area += float(ring[k, 0]) * ring[j, 1] - float(ring[j, 0]) * ring[k, 1]
    if size < MIN_VERTICES or area == 0:
        return ring[:0].copy()
    if area < 0:
        ring[:size] = ring[:size][::-1].copy()
    start = 0
    for k in range(1, size):
        # A vertex visited twice ties: the walk from it decides.
        for step in range(size):
            a, b = ring[(k + step) % size], ring[(start + step) % size]
            if a[1] != b[1] or a[0] != b[0]:
                if a[1] < b[1] or (a[1] == b[1] and a[0] < b[0]):
                    start = k
                break
    return np.concatenate((ring[start:size], ring[:start]))
