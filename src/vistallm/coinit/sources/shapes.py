"""Masks as datasets write them -> COCO RLE of one image."""

from __future__ import annotations

from typing import Any

from pycocotools import mask as coco

from vistallm.regions import masks
from vistallm.schema import Rle


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> Rle:
    """A COCO segmentation of an image of this size -> RLE of the whole object, counts as text.

    Args:
        segmentation: polygons [[x0, y0, x1, y1, ...], ...] (all parts are united; those of fewer than three points draw
            nothing: `short_parts` counts them), RLE with text or listed counts (crowds), or a list of RLEs.
        height: pixels.
        width: pixels.

    Returns:
        RLE; it may be empty (`rle_area` 0), which is the caller's Reject, `empty-mask`.

    Raises:
        ValueError: another form, or run lengths of another image size.
    """
    pieces = segmentation if isinstance(segmentation, list) else [segmentation]
    if not pieces or not all(isinstance(piece, dict) for piece in pieces):
        return masks.segmentation_to_rle(segmentation, height, width)
    for piece in pieces:
        counts, size = piece.get("counts"), list(piece.get("size", ()))
        runs = sum(counts) if isinstance(counts, list) else height * width
        if size != [height, width] or runs != height * width or not isinstance(counts, list | str | bytes):
            raise ValueError(f"segmentation: expected run lengths of size {[height, width]}, got size {size}")
    rles = [masks.segmentation_to_rle(piece, height, width) for piece in pieces]
    return rles[0] if len(rles) == 1 else merge_rles(rles)


def merge_rles(rles: list[Rle]) -> Rle:
    """Union of masks of one size (several annotations that an expression names together)."""
    merged = coco.merge(rles)
    return {"size": list(merged["size"]), "counts": merged["counts"].decode()}


def rle_area(rle: Rle) -> int:
    """Pixels of a mask."""
    return int(coco.area(rle))


def short_parts(segmentation: Any) -> int:
    """Polygons of fewer than three points in a COCO segmentation: each is a Reject, `short-polygon`."""
    return sum(isinstance(p, list) and len(p) < 6 for p in segmentation) if isinstance(segmentation, list) else 0
