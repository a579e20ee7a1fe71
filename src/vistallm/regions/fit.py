"""Least-squares vertices: outline samples and the vertices chosen among them -> vertices off the outline, in place.

One vertex after the other moves to the optimum of its two edges, reweighted so that the sum is area (distances, not
squares); samples beside a vertex then change over to the nearer edge. Compiled functions that call each other stay in
one file: numba's cache does not notice a change in another one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_SWEEPS = 3  # more gains nothing, fewer loses .001 IoU at 16 points
_DAMPING = 0.2  # keeps a vertex between two nearly parallel edges from sliding along them
_FLOOR = 0.25  # pixels: nearer to the edge than this, a sample weighs by its squared distance


@njit(cache=True, error_model="numpy")
def fit_rings(
    samples: np.ndarray, sample_counts: np.ndarray, first: np.ndarray, vertices: np.ndarray, counts: np.ndarray
) -> None:
    """Fit the vertices of all rings in place.

    Args:
        samples: (m, 2) float64, outline samples of all rings in a row.
        sample_counts: (rings,) int64, samples per ring.
        first: (k,) int64, the sample at which the edge out of each vertex starts, changed in place.
        vertices: (k, 2) float64 of all rings in a row, pixels, changed in place.
        counts: (rings,) int64, vertices per ring, 0 or at least 3.
    """
    sample_start = start = 0
    for r in range(len(counts)):
        if counts[r]:
            part = slice(start, start + counts[r])
            first[part] -= sample_start
            _fit_ring(samples[sample_start : sample_start + sample_counts[r]], first[part], vertices[part])
            first[part] += sample_start
        sample_start += sample_counts[r]
        start += counts[r]


@njit(cache=True, error_model="numpy")
def _fit_ring(samples: np.ndarray, first: np.ndarray, vertices: np.ndarray) -> None:
    """Move the vertices of one ring in place; `first` are their sample indices within the ring."""
    n, size = len(samples), len(vertices)
    for _ in range(_SWEEPS):
        for i in range(size):
            h, j = (i - 1 if i else size - 1), (i + 1 if i + 1 < size else 0)
            ax, ay, vx, vy = vertices[h, 0], vertices[h, 1], vertices[i, 0], vertices[i, 1]
            bx, by = vertices[j, 0], vertices[j, 1]
            # The edge into v counts from v as well, so that one function serves both edges.
            xx, xy, yy, x, y = _edge_sums(samples, first[h], _span(first[h], first[i], n), vx, vy, ax, ay)
            xx2, xy2, yy2, x2, y2 = _edge_sums(samples, first[i], _span(first[i], first[j], n), vx, vy, bx, by)
            a, b, c = xx + xx2 + _DAMPING, xy + xy2, yy + yy2 + _DAMPING
            determinant = a * c - b * b
            vertices[i, 0] = vx + (c * (x + x2) - b * (y + y2)) / determinant
            vertices[i, 1] = vy + (a * (y + y2) - b * (x + x2)) / determinant
        for i in range(size):
            _reassign(samples, first, vertices, i)


@njit(cache=True, error_model="numpy")
def _span(start: int, stop: int, n: int) -> int:
    """Samples from start up to stop on a ring of n."""
    return stop - start if stop > start else stop - start + n


@njit(cache=True, error_model="numpy")
def _edge_sums(
    samples: np.ndarray, start: int, count: int, vx: float, vy: float, bx: float, by: float
) -> tuple[float, float, float, float, float]:
    """Normal equations (xx, xy, yy, rhs x, rhs y) for the end v of edge v-b, over `count` samples from `start`."""
    length = np.sqrt((bx - vx) ** 2 + (by - vy) ** 2)
    if length < 1e-9:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    tx, ty = (bx - vx) / length, (by - vy) / length
    total = rhs = 0.0
    k = start
    for _ in range(count):
        px, py = samples[k, 0] - vx, samples[k, 1] - vy
        off = py * tx - px * ty
        share = min(max(1.0 - (px * tx + py * ty) / length, 0.0), 1.0)
        weight = share / max(abs(off), _FLOOR)  # IRLS: 1/|r| turns squares into distances
        total += weight * share
        rhs += weight * off
        k = k + 1 if k + 1 < len(samples) else 0
    return total * ty * ty, -total * tx * ty, total * tx * tx, -rhs * ty, rhs * tx


@njit(cache=True, error_model="numpy")
def _distance2(px: float, py: float, ax: float, ay: float, bx: float, by: float) -> float:
    """Squared distance of point p to segment a-b."""
    dx, dy, px, py = bx - ax, by - ay, px - ax, py - ay
    length2 = dx * dx + dy * dy
    at = min(max((px * dx + py * dy) / length2, 0.0), 1.0) if length2 > 0 else 0.0
    return (px - at * dx) ** 2 + (py - at * dy) ** 2


@njit(cache=True, error_model="numpy")
def _reassign(samples: np.ndarray, first: np.ndarray, vertices: np.ndarray, i: int) -> None:
    """Let the samples beside vertex i change to its other edge while they are nearer to that one."""
    n, size = len(samples), len(vertices)
    h, j = (i - 1 if i else size - 1), (i + 1 if i + 1 < size else 0)
    ax, ay, vx, vy, bx, by = *_xy(vertices, h), *_xy(vertices, i), *_xy(vertices, j)
    moved = False
    while _span(first[h], first[i], n) > 1:
        k = first[i] - 1 if first[i] else n - 1
        px, py = samples[k, 0], samples[k, 1]
        if _distance2(px, py, vx, vy, bx, by) >= _distance2(px, py, ax, ay, vx, vy):
            break
        first[i] = k
        moved = True
    while not moved and _span(first[i], first[j], n) > 1:
        px, py = samples[first[i], 0], samples[first[i], 1]
        if _distance2(px, py, ax, ay, vx, vy) >= _distance2(px, py, vx, vy, bx, by):
            break
        first[i] = first[i] + 1 if first[i] + 1 < n else 0


@njit(cache=True, error_model="numpy")
def _xy(vertices: np.ndarray, i: int) -> tuple[float, float]:
    return vertices[i, 0], vertices[i, 1]
