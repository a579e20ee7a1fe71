"""Which outline points to keep: rings of pixel-edge corners and a point budget -> rings of fewer points.

`uniform` spaces points evenly; `curvature` is the paper's rule (dense points, turning angle, keep the largest);
`adaptive` removes points by the area that goes with them (Visvalingam and Whyatt 1993), all parts sharing one budget.
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit

from vistallm.regions.contours import MIN_VERTICES, edge_samples
from vistallm.regions.refine import FINEST_STEP, fit_rings, polish_rings

_OVERSAMPLE = 1.5  # the first removal stops at this many times the budget; 1 loses .001 to .002 IoU, 2 gains nothing
_SAMPLES_PER_POINT = 8  # outline samples per point of the budget; more gains nothing and costs time
_THIN_FACTOR = 2
_DENSE = 2  # dense points per kept point of the paper's rule; with more the kept points cluster on smooth shapes


def uniform_points(rings: list[np.ndarray], points: int) -> list[np.ndarray]:
    """Points at equal steps along each ring: rings of (n, 2) -> rings of (m, 2) float64, sum of m <= points."""
    return [_at_lengths(ring, np.arange(share) / share) for ring, share in _shares(rings, points)]


def curvature_points(rings: list[np.ndarray], points: int) -> list[np.ndarray]:
    """The paper's rule: dense equal steps, turning angle at each, keep the sharpest in outline order.

    Takes and gives what `uniform_points` does; the rings share the budget by length.
    """
    kept = []
    for ring, share in _shares(rings, points):
        count = share * _DENSE
        samples = _at_lengths(ring, np.arange(count) / count)
        back, ahead = np.roll(samples, 1, 0) - samples, np.roll(samples, -1, 0) - samples
        cross = back[:, 0] * ahead[:, 1] - back[:, 1] * ahead[:, 0]
        turning = np.pi - np.abs(np.arctan2(cross, (back * ahead).sum(1)))
        keep = np.sort(np.argsort(-turning, kind="stable")[:share])
        kept.append(samples[keep])
    return kept


def adaptive_points(
    rings: list[np.ndarray], points: int, mask: np.ndarray, num_bins: int | None = None
) -> list[np.ndarray]:
    """Fit polygons to a mask: remove points by area, fit what stays by least squares, polish on the pixels.

    Args:
        rings: outline of the mask, (n, 2) int64 corners on pixel edges (`outline_rings`).
        points: the most vertices of all rings together, at least 3; small rings go before large ones lose shape.
        mask: (H, W) uint8, non-zero = inside, C order.
        num_bins: if set, vertices lie on this many bins of the padded square, so that quantising changes nothing; else
            on fifths of a pixel.

    Returns:
        Rings of (n, 2) float64, pixels inside the image, in the order of `rings`; n >= 3, or 0 for a dropped ring.
    """
    height, width = mask.shape
    side = max(height, width)
    step = side / (num_bins - 1) if num_bins else FINEST_STEP
    pad = np.array([(side - width) // 2, (side - height) // 2] if num_bins else [0, 0])
    corners, counts = np.concatenate(rings), np.array([len(ring) for ring in rings])
    exact = len(corners) <= points
    if exact:
        vertices = corners.astype(np.float64)
    else:
        samples, sample_counts = edge_samples(corners, counts, points * _SAMPLES_PER_POINT)
        vertices, counts, first = samples.copy(), sample_counts, np.arange(len(samples))
        for budget in (int(points * _OVERSAMPLE), points):
            keep, counts = remove_by_area(vertices, counts, budget)
            vertices, first = vertices[keep], first[keep]
            fit_rings(samples, sample_counts, first, vertices, counts)
    vertices, counts = polish_rings(mask, corners, vertices, counts, step, pad, not exact)
    return np.split(vertices, np.cumsum(counts)[:-1])


def _shares(rings: list[np.ndarray], points: int) -> list[tuple[np.ndarray, int]]:
    """Split a budget over the longest rings by length, each at least three points."""
    lengths = np.array([np.abs(np.roll(r, -1, 0) - r).sum() for r in rings], np.float64)
    order = np.argsort(-lengths, kind="stable")[: max(points // MIN_VERTICES, 1)]
    spare = max(points - MIN_VERTICES * len(order), 0)
    exact = spare * lengths[order] / lengths[order].sum()
    extra = np.floor(exact).astype(int)
    extra[np.argsort(extra - exact, kind="stable")[: spare - extra.sum()]] += 1
    return [(rings[r], MIN_VERTICES + int(e)) for r, e in zip(order, extra, strict=True)]


def _at_lengths(ring: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Points at fractions of a closed ring's length, (m,) in [0, 1) -> (m, 2) float64."""
    closed = np.concatenate([ring, ring[:1]]).astype(np.float64)
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    at = fractions * along[-1]
    return np.stack([np.interp(at, along, closed[:, 0]), np.interp(at, along, closed[:, 1])], 1)


@njit(cache=True, error_model="numpy")
def _corner_area(xy: np.ndarray, a: int, b: int, c: int) -> float:
    return 0.5 * abs((xy[b, 0] - xy[a, 0]) * (xy[c, 1] - xy[a, 1]) - (xy[b, 1] - xy[a, 1]) * (xy[c, 0] - xy[a, 0]))


@njit(cache=True, error_model="numpy")
def remove_by_area(xy: np.ndarray, sizes: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Remove the point of the smallest triangle, again and again, over all rings with one heap.

    `xy` (n, 2) float64 holds all rings in a row, `sizes` (rings,) int64 of each; a ring down to a triangle goes for its
    area, but the last one stays. Returns (n,) bool, the points that stay, and (rings,) int64, how many in each ring.
    """
    n = len(xy)
    before, after, ring_of = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    left = sizes.copy()
    start = 0
    for r in range(len(sizes)):
        for k in range(start, start + sizes[r]):
            before[k], after[k], ring_of[k] = k - 1, k + 1, r
        if sizes[r]:
            before[start], after[start + sizes[r] - 1] = start + sizes[r] - 1, start
        start += sizes[r]
    keep, stamp = np.ones(n, np.bool_), np.zeros(n, np.int64)
    total, rings_left = _thin(xy, before, after, keep, left, ring_of, points * _THIN_FACTOR), (sizes > 0).sum()
    heap = [(_corner_area(xy, before[k], k, after[k]), k, 0) for k in range(n) if keep[k]]
    heapq.heapify(heap)
    while total > points and len(heap) > 0:
        area, k, mark = heapq.heappop(heap)
        if not keep[k] or mark != stamp[k]:
            continue
        r = ring_of[k]
        if left[r] == MIN_VERTICES:  # the offer to drop the whole triangle: three points for its area
            if rings_left > 1:
                keep[k] = keep[before[k]] = keep[after[k]] = False
                total, rings_left, left[r] = total - MIN_VERTICES, rings_left - 1, 0
            continue
        keep[k] = False
        total, left[r] = total - 1, left[r] - 1
        a, b = before[k], after[k]
        after[a], before[b] = b, a
        share = 1.0 / MIN_VERTICES if left[r] == MIN_VERTICES else 1.0
        for j in (a, b):
            stamp[j] += 1
            heapq.heappush(heap, (_corner_area(xy, before[j], j, after[j]) * share, j, stamp[j]))
    return keep, left


@njit(cache=True, error_model="numpy")
def _thin(
    xy: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    keep: np.ndarray,
    left: np.ndarray,
    ring_of: np.ndarray,
    points: int,
) -> int:
    """Cheap passes before the heap: drop points of small area, no two neighbours in one pass; returns how many stay."""
    total, limit = len(xy), 0.125
    while total > points and limit < 64:
        dropped = -1
        for k in range(len(xy)):
            if total <= points:
                break
            a, b = before[k], after[k]
            if not keep[k] or a == dropped or left[ring_of[k]] <= 4 or _corner_area(xy, a, k, b) > limit:
                continue
            keep[k], dropped = False, a
            after[a], before[b] = b, a
            total, left[ring_of[k]] = total - 1, left[ring_of[k]] - 1
        limit *= 2
    return total
