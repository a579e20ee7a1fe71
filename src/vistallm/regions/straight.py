"""Masks drawn from few straight edges -> polygons that draw the very same mask: rings of corner points -> vertices.

A line is fitted by least squares to each straight stretch of the outline (the error of a line over n pixels falls with
n), neighbouring lines are intersected, and the few pixels that are wrong after rounding are searched away.
"""

from __future__ import annotations

import cv2
import numpy as np
from numba import njit

from vistallm.regions.contours import MIN_VERTICES, edge_samples
from vistallm.regions.raster import FINEST_STEP, error_raster, polish, settle, snap_whole

_TOLERANCE = 0.75  # pixels: half an edge, and what the drawing rule's fifths add
_LONG = 20  # pixels: mean length of edges below which looking for lines seldom pays
_GATE = 60  # wrong pixels of a drawing; with more the mask is no polygon of few edges, or not one on this grid
_HOPE = 16  # wrong pixels that adding vertices may still mend
_STALLS = 3  # vertices that may be added in a row without a gain


def straight_rings(
    rings: list[np.ndarray], points: int, mask: np.ndarray, grid: tuple[float, np.ndarray], at_hand: tuple[int, int]
) -> list[np.ndarray] | None:
    """Find polygons of straight edges that draw a mask better than those at hand, to the pixel if they can.

    Args:
        rings: outline of the mask, (n, 2) int64 corners on pixel edges.
        points: the most vertices of all rings together.
        mask: (H, W) uint8, non-zero = inside.
        grid: step of the vertices, and (2,) offset of the image in the grid, pixels.
        at_hand: wrong pixels and vertices of the polygons at hand.

    Returns:
        Rings of (n, 2) float64, n >= 3, pixels, inside the image, in the order of `rings`; None where the
        polygons at hand are better (fewer wrong pixels, then fewer vertices).
    """
    found: list[np.ndarray] = []
    for ring in rings:
        vertices = _corners(ring, points - sum(map(len, found)))
        if vertices is None:
            return None
        found.append(vertices)
    (step, pad), size, outline = grid, np.array([mask.shape[1], mask.shape[0]]), np.concatenate(rings)
    low, high = np.maximum(outline.min(0) - 2, 0), np.minimum(outline.max(0) + 2, size)
    inside = mask[low[1] : high[1], low[0] : high[0]]
    vertices, counts = np.concatenate(found) - low, np.array([len(part) for part in found])
    best, least, fewest, stalls = None, at_hand, _GATE, 0
    while True:
        vertices = np.rint((np.clip(vertices + low, 0, size) + pad) / step) * step - pad - low
        errors = error_raster(inside, vertices, counts)
        left = settle(errors, vertices, counts, step) if errors.sum() <= _GATE else _GATE
        stalls = 0 if left < fewest else stalls + 1
        fewest = min(left, fewest)
        outside = (vertices < -low).any() or (vertices > size - low).any()
        if (left, len(vertices)) < least and not outside:
            best, least = (vertices.copy(), counts), (left, len(vertices))
        if left == 0 or stalls == _STALLS or left > _HOPE or len(vertices) == points:
            break
        at = np.argwhere(errors)[left * stalls // _STALLS]
        vertices, counts = _split(vertices, counts, at[::-1] + 0.5)
    if best is None:
        return None
    vertices, counts = best
    errors = error_raster(inside, vertices, counts)
    counts = polish(errors, vertices, counts, step, True)
    if step == FINEST_STEP:
        snap_whole(errors, vertices, counts)
    return np.split(np.clip(vertices[: counts.sum()] + low, 0, size), np.cumsum(counts)[:-1])


def _corners(ring: np.ndarray, most: int) -> np.ndarray | None:
    """Corner points of one ring -> vertices, (n, 2) float64, off the grid; None where there would be too many."""
    samples, _ = edge_samples(ring, np.array([len(ring)]), 1 << 40)
    doubled = (2 * samples).astype(np.int32)
    kept = cv2.approxPolyDP(doubled[:, None], 2.0, True)[:, 0]
    if not MIN_VERTICES <= len(kept) <= min(2 * most, len(samples) / _LONG):
        return None
    # Each unit edge of the outline has one middle, so a sample is known by its coordinates.
    keys, wanted = (xy[:, 0] * np.int64(1 << 32) + xy[:, 1] for xy in (doubled, kept))
    first = _merge(samples, np.flatnonzero(np.isin(keys, wanted)))
    return _intersect(samples, first) if len(first) <= most else None


def _split(vertices: np.ndarray, counts: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add a vertex at a point, into the edge that lies nearest to it."""
    ends = np.cumsum(counts)
    after = np.arange(1, len(vertices) + 1)
    after[ends - 1] = ends - counts
    edge = vertices[after] - vertices
    along = ((point - vertices) * edge).sum(1) / np.maximum((edge**2).sum(1), 1e-9)
    gaps = ((vertices + np.clip(along, 0, 1)[:, None] * edge - point) ** 2).sum(1)
    at = int(gaps.argmin())
    return np.insert(vertices, at + 1, point, 0), counts + (
        np.arange(len(counts)) == np.searchsorted(ends, at, "right")
    )


@njit(cache=True, error_model="numpy")
def _line(samples: np.ndarray, start: int, stop: int) -> tuple[float, float, float, float, float]:
    """Total least squares line of samples start..stop-1 of a ring: centre, direction, and the largest distance.

    The sample at each end is left out, as it may lie half around the corner.
    """
    n = len(samples)
    count = stop - start if stop > start else stop - start + n
    trim = 1 if count > 4 else 0
    x = y = xx = xy = yy = worst = 0.0
    for k in range(start + trim, start + count - trim):
        x += samples[k % n, 0]
        y += samples[k % n, 1]
    x, y = x / (count - 2 * trim), y / (count - 2 * trim)
    for k in range(start + trim, start + count - trim):
        dx, dy = samples[k % n, 0] - x, samples[k % n, 1] - y
        xx, xy, yy = xx + dx * dx, xy + dx * dy, yy + dy * dy
    angle = 0.5 * np.arctan2(2 * xy, xx - yy)
    tx, ty = np.cos(angle), np.sin(angle)
    for k in range(start + trim, start + count - trim):
        worst = max(worst, abs((samples[k % n, 0] - x) * ty - (samples[k % n, 1] - y) * tx))
    return x, y, tx, ty, worst


@njit(cache=True, error_model="numpy")
def _merge(samples: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Join neighbouring stretches while one line fits both; `first` are the samples at which stretches start."""
    size = len(first)
    first, misfit = first.copy(), np.empty(size)
    for i in range(size):
        misfit[i] = _line(samples, first[i - 1], first[(i + 1) % size])[4]
    while size > MIN_VERTICES:
        i = int(np.argmin(misfit[:size]))
        if misfit[i] > _TOLERANCE:
            break
        first[i : size - 1], misfit[i : size - 1] = first[i + 1 : size].copy(), misfit[i + 1 : size].copy()
        size -= 1
        for j in ((i - 1) % size, i % size):
            misfit[j] = _line(samples, first[(j - 1) % size], first[(j + 1) % size])[4]
    return first[:size].copy()


@njit(cache=True, error_model="numpy")
def _intersect(samples: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Vertices between the lines of all stretches, after samples changed over to the nearer of two lines."""
    n, size = len(samples), len(first)
    lines, vertices = np.empty((size, 5)), np.empty((size, 2))
    for _ in range(4):
        for i in range(size):
            lines[i] = _line(samples, first[i], first[(i + 1) % size])
        for i in range(size):
            for _ in range(8):
                k = (first[i] - 1) % n
                if _lean(lines, i, samples[k]) > 0 and (first[i] - first[i - 1]) % n > 2:
                    first[i] = k
                elif _lean(lines, i, samples[first[i]]) < 0 and (first[(i + 1) % size] - first[i]) % n > 2:
                    first[i] = (first[i] + 1) % n
                else:
                    break
    for i in range(size):
        vertices[i] = (samples[first[i]] + samples[first[i] - 1]) / 2
        ax, ay, atx, aty, _ = lines[i - 1]
        bx, by, btx, bty, _ = lines[i]
        sine = atx * bty - aty * btx
        if abs(sine) > 0.02:  # nearly parallel lines meet anywhere
            t = ((bx - ax) * bty - (by - ay) * btx) / sine
            x, y = ax + t * atx, ay + t * aty
            if (x - vertices[i, 0]) ** 2 + (y - vertices[i, 1]) ** 2 < 100:
                vertices[i] = x, y
    return vertices


@njit(cache=True, error_model="numpy")
def _lean(lines: np.ndarray, i: int, point: np.ndarray) -> float:
    """How much nearer a point lies to line i than to the one before it."""
    before = abs((point[0] - lines[i - 1, 0]) * lines[i - 1, 3] - (point[1] - lines[i - 1, 1]) * lines[i - 1, 2])
    return before - abs((point[0] - lines[i, 0]) * lines[i, 3] - (point[1] - lines[i, 1]) * lines[i, 2])
