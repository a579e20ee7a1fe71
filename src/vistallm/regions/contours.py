"""Masks -> outlines: (H, W) mask or COCO RLE -> closed rings of corner points on the pixel edges.

A ring follows the pixel edges themselves (not pixel centres), clockwise on screen, so its polygon encloses exactly the
pixels of the part. Parts that touch at a corner share one ring (8-connectivity, as `cv2.findContours`).
"""

from __future__ import annotations

import cv2
import numpy as np
from numba import njit

MIN_VERTICES = 3

# Directions of a chain step, indexed by (dy + 1) * 3 + (dx + 1). Corners of a pixel are numbered clockwise from the top
# left: 0 (0,0), 1 (1,0), 2 (1,1), 3 (0,1). Walking clockwise the outside lies to the left, so a step in direction d
# enters a pixel at corner ENTRY[d] and leaves the one before it at corner LEAVE[d]: the same point of the image.
_ENTRY = np.array([2, 3, 3, 2, 0, 0, 1, 1, 0], np.int64)
_LEAVE = np.array([0, 0, 1, 3, 0, 1, 3, 2, 2], np.int64)


def as_mask(mask: np.ndarray) -> np.ndarray:
    """Check a mask: (H, W) bool or numbers, any memory order, non-zero = inside -> (H, W) uint8 of 0 and 1, C order.

    Raises:
        ValueError: not two-dimensional, without a pixel, or not finite.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"mask: expected a non-empty (H, W) array, got shape {mask.shape}; pass one object's mask")
    if mask.dtype == np.bool_:
        return np.ascontiguousarray(mask).view(np.uint8)
    if mask.dtype == np.uint8:
        return np.ascontiguousarray(mask)
    if mask.dtype.kind not in "iuf" or not np.isfinite(mask).all():
        raise ValueError(f"mask: expected bool, integers or finite floats, got {mask.dtype} (or non-finite values)")
    return np.ascontiguousarray(mask != 0).view(np.uint8)


def outline_rings(mask: np.ndarray, holes: bool = False) -> list[np.ndarray]:
    """Trace a mask along its pixel edges.

    Args:
        mask: (H, W) uint8, C order, non-zero = inside (`as_mask`).
        holes: also trace holes; their rings run counter-clockwise.

    Returns:
        Rings of (n, 2) int64, x then y, pixel edges: corner points only, n >= 4; none for an empty mask.
    """
    mode = cv2.RETR_CCOMP if holes else cv2.RETR_EXTERNAL
    contours, _ = cv2.findContours(mask, mode, cv2.CHAIN_APPROX_NONE)
    return [_edge_ring(contour) for contour in contours]


@njit(cache=True, error_model="numpy")
def _edge_ring(contour: np.ndarray) -> np.ndarray:
    """Pixel chain of findContours, (n, 1, 2) int32, counter-clockwise -> corners of its pixel-edge ring, clockwise."""
    n = contour.shape[0]
    out = np.empty((4 * n, 2), np.int64)
    if n == 1:
        x, y = contour[0, 0, 0], contour[0, 0, 1]
        for c in range(4):
            out[c, 0], out[c, 1] = x + (c == 1 or c == 2), y + (c >= 2)
        return out[:4].copy()
    size = 0
    for k in range(n - 1, -1, -1):
        x, y = contour[k, 0, 0], contour[k, 0, 1]
        before, after = contour[(k + 1) % n, 0], contour[k - 1, 0]
        step_in = (y - before[1] + 1) * 3 + x - before[0] + 1
        step_out = (after[1] - y + 1) * 3 + after[0] - x + 1
        corner = _ENTRY[step_in]
        turns = (_LEAVE[step_out] - corner) % 4
        # A diagonal dead end walks around all four corners of its last pixel.
        if turns == 0 and step_in + step_out == 8 and step_in % 2 == 0:
            turns = 4
        for _ in range(turns):
            out[size, 0], out[size, 1] = x + (corner == 1 or corner == 2), y + (corner >= 2)
            size += 1
            corner = (corner + 1) % 4
    # Keep the points where the ring turns.
    ring = np.empty((size, 2), np.int64)
    kept = 0
    for k in range(size):
        a, b, c = out[k - 1 if k else size - 1], out[k], out[k + 1 if k + 1 < size else 0]
        if (b[0] - a[0]) * (c[1] - b[1]) != (b[1] - a[1]) * (c[0] - b[0]) or (b[0] - a[0]) * (c[0] - b[0]) + (
            b[1] - a[1]
        ) * (c[1] - b[1]) < 0:
            ring[kept] = b
            kept += 1
    return ring[:kept].copy()


@njit(cache=True, error_model="numpy")
def edge_samples(corners: np.ndarray, counts: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """About `most` outline samples, each the mean of one or more unit pixel edges in a row.

    `corners` (n, 2) int64 holds all rings in a row, `counts` (rings,) int64 of each. Returns (m, 2) float64, and
    (rings,) int64, how many in each ring.
    """
    lengths = np.zeros(len(counts), np.int64)
    start = 0
    for r in range(len(counts)):
        for k in range(start, start + counts[r]):
            after = k + 1 if k + 1 < start + counts[r] else start
            lengths[r] += abs(corners[after, 0] - corners[k, 0]) + abs(corners[after, 1] - corners[k, 1])
        start += counts[r]
    stride = max(lengths.sum() // most, 1)
    out = np.zeros((16 * len(counts) + lengths.sum() // stride, 2))
    start = size = 0
    for r in range(len(counts)):
        filled = 0
        group = max(min(stride, lengths[r] // 8), 1)
        for k in range(start, start + counts[r]):
            after = k + 1 if k + 1 < start + counts[r] else start
            dx, dy = corners[after, 0] - corners[k, 0], corners[after, 1] - corners[k, 1]
            length = abs(dx) + abs(dy)
            for j in range(length):
                out[size, 0] += corners[k, 0] + dx * (j + 0.5) / length
                out[size, 1] += corners[k, 1] + dy * (j + 0.5) / length
                filled += 1
                if filled == group:
                    out[size] /= filled
                    size, filled = size + 1, 0
        if filled:
            out[size] /= filled
            size += 1
        start += counts[r]
        lengths[r] = (lengths[r] + group - 1) // group
    return out[:size], lengths
