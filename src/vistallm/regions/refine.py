"""Fitted vertices, and the drawing rule they are fitted to: compiled kernels; in and out: vertices and pixels.

Least squares comes first: one vertex after the other moves to the optimum of its two edges, over samples of the
outline, reweighted so that the sum is area (distances, not squares); samples beside a vertex then change over to the
nearer edge. The polish comes second, on the pixels: a raster keeps which pixels are drawn wrong, and a vertex moves by
one grid step while fewer are. Only pixels between its old and new edges change sides, so a step costs a few pixels.

The drawing rule is that of pycocotools' `frPyObjects`, to the pixel (tested): vertices are rounded to fifths of a
pixel, and a pixel belongs to a polygon when its centre does (even-odd). A column of pixels is drawn from the rows at
which edges cross it, by a running exclusive or downwards. Drawing a dense mask costs what `cv2.fillPoly` costs;
decoding pycocotools' runs takes twenty times as long.

These functions call each other, so they stay in one file: numba's cache does not notice a change in another one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vistallm.regions.contours import MIN_VERTICES

_FIT_SWEEPS = 3  # more gains nothing, fewer loses .001 IoU at 16 points
_DAMPING = 0.2  # keeps a vertex between two nearly parallel edges from sliding along them
_FLOOR = 0.25  # pixels: nearer to the edge than this, a sample weighs by its squared distance
_POLISH_SWEEPS = 2
_SUBPIXELS = 5  # the rule's fifths of a pixel; column c is crossed between fifths 5c+2 and 5c+3, around its centre
FINEST_STEP = 1 / _SUBPIXELS  # pixels: finer vertices draw nothing else


@njit(cache=True, error_model="numpy")
def fit_rings(
    samples: np.ndarray, sample_counts: np.ndarray, first: np.ndarray, vertices: np.ndarray, counts: np.ndarray
) -> None:
    """Fit the vertices of all rings, (k, 2) float64 pixels in a row, in place; `counts` of each ring, 0 or at least 3.

    `samples` (m, 2) float64 of the outlines, `sample_counts` of each ring; `first` (k,) int64: the sample at which the
    edge out of each vertex starts, changed in place.
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
    for _ in range(_FIT_SWEEPS):
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


@njit(cache=True, error_model="numpy")
def draw_polygon(mask: np.ndarray, polygon: np.ndarray) -> None:
    """Set the pixels inside a polygon, (n, 2) float64 pixels, to 1 in a mask, (H, W) uint8, in place."""
    left, right = max(int(polygon[:, 0].min()), 0), min(int(polygon[:, 0].max()) + 1, mask.shape[1])
    top, bottom = max(int(polygon[:, 1].min()), 0), min(int(polygon[:, 1].max()) + 1, mask.shape[0])
    if left < right and top < bottom:
        flips = np.zeros((bottom - top + 1, right - left), np.uint8)
        _flip_ring(flips, polygon, left, top)
        _run_down(flips)
        for row in range(bottom - top):
            for column in range(right - left):
                mask[top + row, left + column] |= flips[row, column]


@njit(cache=True, error_model="numpy")
def _flip_ring(flips: np.ndarray, ring: np.ndarray, left: int, top: int) -> None:
    """Mark where the edges of a ring cross columns, in a window of h rows that starts at (left, top): (h + 1, w)."""
    bottom, right = top + flips.shape[0] - 1, left + flips.shape[1]
    for k in range(len(ring)):
        ax, ay, bx, by = *_fifths(ring, k - 1), *_fifths(ring, k)
        slope = _slope(ax, ay, bx, by)
        for column in range(max(min(ax, bx) // _SUBPIXELS, left), min(max(ax, bx) // _SUBPIXELS + 1, right)):
            row = _crossing(ax, ay, bx, by, slope, column, bottom)
            if row >= 0:
                flips[max(row - top, 0), column - left] ^= 1


@njit(cache=True, error_model="numpy")
def _run_down(flips: np.ndarray) -> None:
    """Crossings -> pixels inside, in place: a pixel is inside after an odd number of crossings above it."""
    for row in range(1, flips.shape[0]):
        for column in range(flips.shape[1]):
            flips[row, column] ^= flips[row - 1, column]


@njit(cache=True, error_model="numpy")
def _fifths(vertices: np.ndarray, i: int) -> tuple[int, int]:
    """A vertex in fifths of a pixel, rounded as the rule does (towards zero below zero)."""
    return int(vertices[i, 0] * _SUBPIXELS + 0.5), int(vertices[i, 1] * _SUBPIXELS + 0.5)


@njit(cache=True, error_model="numpy")
def _slope(ax: int, ay: int, bx: int, by: int) -> float:
    """Slope of edge a-b along its longer axis."""
    dx, dy = bx - ax, by - ay
    if abs(dx) >= abs(dy):
        return dy / dx if dx else 0.0
    return dx / dy


@njit(cache=True, error_model="numpy")
def _crossing(ax: int, ay: int, bx: int, by: int, slope: float, column: int, height: int) -> int:
    """First row at or below edge a-b (in fifths) in a column of pixels, 0..height; -1 where it does not cross."""
    left = _SUBPIXELS * column + 2
    if (ax <= left) == (bx <= left):
        return -1
    if abs(bx - ax) >= abs(by - ay):
        x, y = (ax, ay) if ax < bx else (bx, by)
        y = min(int(y + slope * (left - x) + 0.5), int(y + slope * (left + 1 - x) + 0.5))
    else:
        x, y = (ax, ay) if ay < by else (bx, by)
        # The rule walks a steep edge down by fifths; find the last one before it changes sides, whatever the rounding.
        start = x <= left
        steps = int((left + 0.5 - x) / slope)
        while (int(x + slope * steps + 0.5) <= left) != start:
            steps -= 1
        while (int(x + slope * (steps + 1) + 0.5) <= left) == start:
            steps += 1
        y += steps
    return min(max((y + 2) // _SUBPIXELS, 0), height)


@njit(cache=True, error_model="numpy")
def polish_rings(
    mask: np.ndarray,
    corners: np.ndarray,
    vertices: np.ndarray,
    counts: np.ndarray,
    step: float,
    pad: np.ndarray,
    prune: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Round the vertices of all rings, (k, 2) float64, to a grid, and polish them on the pixels of a (H, W) mask.

    `corners` of the outline say how far the mask reaches; `step` of the grid and `pad`, the offset of the image in it,
    are pixels; `prune` drops vertices that no pixel needs. Returns vertices inside the image, and counts by ring.
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


@njit(cache=True, error_model="numpy")
def _error_raster(mask: np.ndarray, vertices: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(h, w) uint8 of 0 and 1: pixels where the even-odd drawing of all rings differs from the mask."""
    height, width = mask.shape
    flips = np.zeros((height + 1, width), np.uint8)
    start = 0
    for count in counts:
        _flip_ring(flips, vertices[start : start + count], 0, 0)
        start += count
    _run_down(flips)
    for row in range(height):
        for column in range(width):
            flips[row, column] ^= mask[row, column] != 0
    return flips[:height]


@njit(cache=True, error_model="numpy")
def _flip_rows(errors: np.ndarray, column: int, start: int, stop: int, commit: bool) -> int:
    """Wrong pixels gained when the drawing changes in rows start..stop-1 of a column."""
    change = 0
    for row in range(start, stop):
        change += -1 if errors[row, column] else 1
        if commit:
            errors[row, column] ^= 1
    return change


@njit(cache=True, error_model="numpy")
def _change(errors: np.ndarray, ring: np.ndarray, i: int, size: int, x: float, y: float, commit: bool) -> int:
    """Wrong pixels gained when vertex i of a ring moves to (x, y); with `commit` the raster is updated."""
    height, width = errors.shape
    ax, ay = _fifths(ring, i - 1 if i else size - 1)
    vx, vy = _fifths(ring, i)
    bx, by = _fifths(ring, i + 1 if i + 1 < size else 0)
    nx, ny = int(x * _SUBPIXELS + 0.5), int(y * _SUBPIXELS + 0.5)
    low, high = min(min(ax, bx), min(vx, nx)), max(max(ax, bx), max(vx, nx))
    av, vb, an, nb = _slope(ax, ay, vx, vy), _slope(vx, vy, bx, by), _slope(ax, ay, nx, ny), _slope(nx, ny, bx, by)
    change = 0
    for column in range(max(low // _SUBPIXELS, 0), min(high // _SUBPIXELS + 1, width)):
        # Old and new edges close a loop: an even number of them cross, and pixels between pairs change sides. Sorted by
        # a network of five exchanges, misses (-1) come first and are pairs of empty ranges.
        p = _crossing(ax, ay, vx, vy, av, column, height)
        q = _crossing(vx, vy, bx, by, vb, column, height)
        r = _crossing(ax, ay, nx, ny, an, column, height)
        s = _crossing(nx, ny, bx, by, nb, column, height)
        p, q = min(p, q), max(p, q)
        r, s = min(r, s), max(r, s)
        p, r = min(p, r), max(p, r)
        q, s = min(q, s), max(q, s)
        q, r = min(q, r), max(q, r)
        change += _flip_rows(errors, column, max(p, 0), q, commit) + _flip_rows(errors, column, max(r, 0), s, commit)
    return change


@njit(cache=True, error_model="numpy")
def _polish(errors: np.ndarray, vertices: np.ndarray, counts: np.ndarray, step: float, prune: bool) -> np.ndarray:
    """Lower the wrong pixels in place; returns the new counts, vertices are compacted to the front."""
    counts = counts.copy()
    start = kept_start = 0
    for r in range(len(counts)):
        ring = vertices[start : start + counts[r]]
        start += counts[r]
        for _ in range(_POLISH_SWEEPS):
            moved = False
            for i in range(len(ring)):
                moved |= _nudge(errors, ring, i, step)
            if not moved:
                break
        size = _prune(errors, ring) if prune else len(ring)
        vertices[kept_start : kept_start + size] = ring[:size].copy()
        kept_start += size
        counts[r] = size
    return counts


@njit(cache=True, error_model="numpy")
def _prune(errors: np.ndarray, ring: np.ndarray) -> int:
    """Drop vertices without which no more pixels are wrong, in place; returns how many stay, in front."""
    size, i = len(ring), 0
    while i < size and size > MIN_VERTICES:
        j = i + 1 if i + 1 < size else 0
        if _change(errors, ring, i, size, ring[j, 0], ring[j, 1], False) <= 0:
            _change(errors, ring, i, size, ring[j, 0], ring[j, 1], True)
            ring[i : size - 1] = ring[i + 1 : size].copy()
            size -= 1
        else:
            i += 1
    return size


@njit(cache=True, error_model="numpy")
def _nudge(errors: np.ndarray, ring: np.ndarray, i: int, step: float) -> bool:
    """Move vertex i by one step along x or y to where fewer pixels are wrong; False where it already stands best."""
    a, b = ring[i - 1 if i else len(ring) - 1], ring[i + 1 if i + 1 < len(ring) else 0]
    if not _any_error(errors, a, ring[i], b, step):
        return False
    best, best_x, best_y = 0, ring[i, 0], ring[i, 1]
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        x, y = ring[i, 0] + dx * step, ring[i, 1] + dy * step
        change = _change(errors, ring, i, len(ring), x, y, False)
        if change < best:
            best, best_x, best_y = change, x, y
    if best < 0:
        _change(errors, ring, i, len(ring), best_x, best_y, True)
        ring[i, 0], ring[i, 1] = best_x, best_y
    return best < 0


@njit(cache=True, error_model="numpy")
def _any_error(errors: np.ndarray, a: np.ndarray, v: np.ndarray, b: np.ndarray, step: float) -> bool:
    """Whether a wrong pixel lies in reach of edges a-v-b; without one no move of v can help, the usual case."""
    top, bottom = int(min(a[1], b[1], v[1]) - step), int(max(a[1], b[1], v[1]) + step) + 2
    left, right = int(min(a[0], b[0], v[0]) - step), int(max(a[0], b[0], v[0]) + step) + 2
    for row in range(max(top, 0), min(bottom, errors.shape[0])):
        for column in range(max(left, 0), min(right, errors.shape[1])):
            if errors[row, column]:
                return True
    return False
