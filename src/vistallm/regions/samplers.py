"""Which outline points to keep: rings of pixel-edge corners and a point budget -> rings of fewer points.

`uniform` spaces points evenly; `curvature` is the paper's rule (dense points, turning angle, keep the largest);
`adaptive` removes points by the area that goes with them (Visvalingam and Whyatt 1993), all parts sharing one budget.
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit

MIN_VERTICES = 3


def uniform_points(rings: list[np.ndarray], points: int) -> list[np.ndarray]:
    """Points at equal steps along each ring: rings of (n, 2) -> rings of (m, 2) float64, sum of m <= points."""
    return [_at_lengths(ring, np.arange(share) / share) for ring, share in _shares(rings, points)]


def curvature_points(rings: list[np.ndarray], points: int, dense: int | None = None) -> list[np.ndarray]:
    """The paper's rule: dense equal steps, turning angle at each, keep the sharpest in outline order.

    Args:
        rings: (n, 2) corner points.
        points: budget, shared by the rings by length.
        dense: dense points per kept point times the share; default 2 (paper.md 1.8: more makes the points cluster).
    """
    kept = []
    for ring, share in _shares(rings, points):
        count = max(share, round(share * (dense or 2)))
        samples = _at_lengths(ring, np.arange(count) / count)
        back, ahead = np.roll(samples, 1, 0) - samples, np.roll(samples, -1, 0) - samples
        cross = back[:, 0] * ahead[:, 1] - back[:, 1] * ahead[:, 0]
        turning = np.pi - np.abs(np.arctan2(cross, (back * ahead).sum(1)))
        keep = np.sort(np.argsort(-turning, kind="stable")[:share])
        kept.append(samples[keep])
    return kept


def adaptive_points(rings: list[np.ndarray], points: int) -> list[np.ndarray]:
    """Keep the points whose removal would cost the most area; small parts go before large ones lose shape."""
    xy = np.concatenate(rings).astype(np.float64)
    sizes = np.array([len(r) for r in rings])
    keep = _remove_by_area(xy, sizes, max(points, MIN_VERTICES))
    ends = np.cumsum(sizes)
    kept = [xy[e - s : e][keep[e - s : e]] for s, e in zip(sizes, ends, strict=True)]
    return [ring for ring in kept if len(ring)]


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


@njit(cache=True)
def _corner_area(xy, a, b, c):  # noqa: ANN001, ANN202 - compiled: types are inferred
    return 0.5 * abs((xy[b, 0] - xy[a, 0]) * (xy[c, 1] - xy[a, 1]) - (xy[b, 1] - xy[a, 1]) * (xy[c, 0] - xy[a, 0]))


@njit(cache=True)
def _remove_by_area(xy, sizes, points):  # noqa: ANN001, ANN202 - compiled: types are inferred
    """Greedy removal over all rings with one heap; returns (n,) bool, the points that stay."""
    n = len(xy)
    before, after, ring_of = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    left, first = sizes.copy(), np.empty(len(sizes), np.int64)
    start = 0
    for r in range(len(sizes)):
        first[r] = start
        for k in range(start, start + sizes[r]):
            before[k], after[k], ring_of[k] = k - 1, k + 1, r
        before[start], after[start + sizes[r] - 1] = start + sizes[r] - 1, start
        start += sizes[r]
    keep, stamp = np.ones(n, np.bool_), np.zeros(n, np.int64)
    heap = [(_corner_area(xy, before[k], k, after[k]), k, 0) for k in range(n)]
    heapq.heapify(heap)
    total, rings_left = n, len(sizes)
    while total > points and len(heap) > 0:
        area, k, mark = heapq.heappop(heap)
        if not keep[k] or mark != stamp[k]:
            continue
        r = ring_of[k]
        if left[r] == 3:
            if mark < 0:  # this is the offer to drop the whole triangle: three points for its area
                keep[k] = keep[before[k]] = keep[after[k]] = False
                total, rings_left = total - 3, rings_left - 1
            elif rings_left > 1:
                for j in (before[k], k, after[k]):
                    stamp[j] = -1
                heapq.heappush(heap, (_corner_area(xy, before[k], k, after[k]) / 3, k, -1))
            continue
        keep[k] = False
        total, left[r] = total - 1, left[r] - 1
        a, b = before[k], after[k]
        after[a], before[b] = b, a
        for j in (a, b):
            stamp[j] += 1
            heapq.heappush(heap, (_corner_area(xy, before[j], j, after[j]), j, stamp[j]))
    return keep
