"""Pixel-exact polish: a mask and fitted vertices -> vertices on a grid, moved while fewer pixels come out wrong.

A raster of wrong pixels is kept up to date: when a vertex moves, only pixels between its old and new edges change sides,
so a step costs a few pixels. A pixel is inside when its centre is, as in the drawing rule (masks.py).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vistallm.regions.outline import MIN_VERTICES

_SWEEPS = 2


@njit(cache=True)
def polish_rings(
    mask: np.ndarray,
    corners: np.ndarray,
    vertices: np.ndarray,
    counts: np.ndarray,
    step: float,
    pad: np.ndarray,
    prune: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Round vertices to a grid and polish them.

    Args:
        mask: (H, W) uint8, non-zero = inside.
        corners: (n, 2) int64, outline of the mask, for its extent.
        vertices: (k, 2) float64 of all rings in a row; counts: (rings,) int64, how many each.
        step: grid step in pixels; pad: (2,) offset of the image in the grid, pixels.
        prune: drop vertices that no pixel needs.

    Returns:
        The vertices, (k', 2) float64 inside the image, and their counts.
    """
    size = np.array([mask.shape[1], mask.shape[0]])
    low, high = np.empty(2, np.int64), np.empty(2, np.int64)
    for a in range(2):
        low[a], high[a] = max(corners[:, a].min() - 2, 0), min(corners[:, a].max() + 2, size[a])
        for k in range(len(vertices)):
            inside = min(max(vertices[k, a], 0.0), size[a])
            vertices[k, a] = np.rint((inside + pad[a]) / step) * step - pad[a] - low[a]
    errors = _error_raster(mask[low[1] : high[1], low[0] : high[0]], vertices, counts)
    if errors.any() or prune:
        counts = _polish(errors, vertices, counts, step, prune)
    vertices = vertices[: counts.sum()]
    for k in range(len(vertices)):
        for a in range(2):
            vertices[k, a] = min(max(vertices[k, a] + low[a], 0.0), size[a])
    return vertices, counts


@njit(cache=True)
def _xy(vertices: np.ndarray, i: int) -> tuple[float, float]:
    return vertices[i, 0], vertices[i, 1]


@njit(cache=True)
def _slope(ax: float, ay: float, bx: float, by: float) -> float:
    return (by - ay) / (bx - ax) if bx != ax else 0.0


@njit(cache=True)
def _crossing(ax: float, ay: float, bx: float, slope: float, column: int, height: int) -> int:
    """First row whose pixel centre is at or below edge a-b in a column, 0..height; -1 where the edge misses the centre."""
    x = column + 0.5
    if (ax <= x) == (bx <= x):
        return -1
    return min(max(int(np.ceil(ay + (x - ax) * slope - 0.5)), 0), height)


@njit(cache=True)
def _error_raster(mask: np.ndarray, vertices: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(h, w) uint8 of 0 and 1: pixels where the even-odd drawing of the rings differs from the mask."""
    height, width = mask.shape
    flips = np.zeros((height + 1, width), np.uint8)
    start = 0
    for r in range(len(counts)):
        for k in range(start, start + counts[r]):
            a, b = vertices[k], vertices[k + 1 if k + 1 < start + counts[r] else start]
            for column in range(max(int(min(a[0], b[0])), 0), min(int(max(a[0], b[0])) + 1, width)):
                row = _crossing(a[0], a[1], b[0], _slope(a[0], a[1], b[0], b[1]), column, height)
                if row >= 0:
                    flips[row, column] ^= 1
        start += counts[r]
    for row in range(1, height):
        for column in range(width):
            flips[row, column] ^= flips[row - 1, column]
    for row in range(height):
        for column in range(width):
            flips[row, column] ^= mask[row, column] != 0
    return flips[:height]


@njit(cache=True)
def _flip_rows(errors: np.ndarray, column: int, start: int, stop: int, commit: bool) -> int:
    """Wrong pixels gained when the drawing changes in rows start..stop-1 of a column."""
    change = 0
    for row in range(start, stop):
        change += 1 - 2 * np.int64(errors[row, column])
        if commit:
            errors[row, column] ^= 1
    return change


@njit(cache=True)
def _change(errors: np.ndarray, ring: np.ndarray, h: int, i: int, j: int, x: float, y: float, commit: bool) -> int:
    """Wrong pixels gained when vertex i between h and j moves to (x, y); with `commit` the raster is updated."""
    height, width = errors.shape
    ax, ay, vx, vy, bx, by = *_xy(ring, h), *_xy(ring, i), *_xy(ring, j)
    low, high = min(min(ax, bx), min(vx, x)), max(max(ax, bx), max(vx, x))
    av, vb, an, nb = _slope(ax, ay, vx, vy), _slope(vx, vy, bx, by), _slope(ax, ay, x, y), _slope(x, y, bx, by)
    change = 0
    for column in range(max(int(low), 0), min(int(high) + 1, width)):
        # Old and new edges close a loop: an even number of them cross, and pixels between pairs change sides. Sorted by
        # a network of five exchanges, misses (-1) come first and are pairs of empty ranges.
        p = _crossing(ax, ay, vx, av, column, height)
        q = _crossing(vx, vy, bx, vb, column, height)
        r = _crossing(ax, ay, x, an, column, height)
        s = _crossing(x, y, bx, nb, column, height)
        p, q = min(p, q), max(p, q)
        r, s = min(r, s), max(r, s)
        p, r = min(p, r), max(p, r)
        q, s = min(q, s), max(q, s)
        q, r = min(q, r), max(q, r)
        change += _flip_rows(errors, column, max(p, 0), q, commit) + _flip_rows(errors, column, max(r, 0), s, commit)
    return change


@njit(cache=True)
def _polish(errors: np.ndarray, vertices: np.ndarray, counts: np.ndarray, step: float, prune: bool) -> np.ndarray:
    """Lower the wrong pixels in place; returns the new counts, vertices are compacted to the front."""
    counts = counts.copy()
    start = kept_start = 0
    for r in range(len(counts)):
        ring = vertices[start : start + counts[r]]
        start += counts[r]
        size = len(ring)
        for _ in range(_SWEEPS):
            moved = False
            for i in range(size):
                moved |= _nudge(errors, ring, i, step)
            if not moved:
                break
        i = 0
        while prune and i < size and size > MIN_VERTICES:
            h, j = (i - 1 if i else size - 1), (i + 1 if i + 1 < size else 0)
            if _change(errors, ring, h, i, j, ring[j, 0], ring[j, 1], False) <= 0:
                _change(errors, ring, h, i, j, ring[j, 0], ring[j, 1], True)
                ring[i : size - 1] = ring[i + 1 : size].copy()
                size -= 1
            else:
                i += 1
        vertices[kept_start : kept_start + size] = ring[:size].copy()
        kept_start += size
        counts[r] = size
    return counts


@njit(cache=True)
def _nudge(errors: np.ndarray, ring: np.ndarray, i: int, step: float) -> bool:
    """Move vertex i by one step along x or y to where fewer pixels are wrong; False where it already stands best."""
    h, j = (i - 1 if i else len(ring) - 1), (i + 1 if i + 1 < len(ring) else 0)
    best, best_x, best_y = 0, ring[i, 0], ring[i, 1]
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        x, y = ring[i, 0] + dx * step, ring[i, 1] + dy * step
        change = _change(errors, ring, h, i, j, x, y, False)
        if change < best:
            best, best_x, best_y = change, x, y
    if best < 0:
        _change(errors, ring, h, i, j, best_x, best_y, True)
        ring[i, 0], ring[i, 1] = best_x, best_y
    return best < 0
