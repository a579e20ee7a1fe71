"""Predictions -> the masks and boxes that scores compare, of the answer and of its target.

Frame: pixels of the original image. Masks are COCO RLE of the image's size; a parsed mask is drawn from its polygons.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vistallm.metrics.functional import union_rle
from vistallm.regions.masks import polygons_to_rle, rle_box
from vistallm.schema import Prediction, Region, Rle


def target_regions(prediction: Prediction) -> list[Region]:
    """Return the target's regions; raises ValueError naming the prediction when one is malformed or in no image."""
    try:
        regions = [Region.from_json(record) for record in prediction.target.get("regions", [])]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"prediction {prediction.id}: target region is malformed: {error}") from error
    if any(not 0 <= region.image < len(prediction.images) for region in regions):
        raise ValueError(
            f"prediction {prediction.id}: a target region lies in none of its {len(prediction.images)} images"
        )
    return regions


def scored_regions(prediction: Prediction, optional: bool = False) -> list[Region]:
    """Return the target's regions to score against; `optional`: the task has a "no target" answer.

    Raises:
        ValueError: as `target_regions`; also where the target is missing: "no target" must be said by `empty`.
    """
    regions = target_regions(prediction)
    none = prediction.target.get("empty")
    if not regions and not (optional and none) or regions and none:
        raise ValueError(f"prediction {prediction.id}: its target has {len(regions)} region(s), and empty is {none}")
    return regions


def fact(prediction: Prediction, name: str, default: Any = None) -> Any:
    """Return what the target says beside regions and answer ("held_out", "group", "mode", "class"), or `default`."""
    return prediction.target.get(name, (prediction.target.get("meta") or {}).get(name, default))


def region_rle(region: Region, height: int, width: int) -> Rle:
    """Return a mask region as COCO RLE of (height, width): its own (a target's full mask), else its polygons drawn."""
    if region.rle is not None:
        return region.rle
    if region.polygons is None:
        raise ValueError(f"expected a mask region with polygons or RLE, got {region}")
    return polygons_to_rle(region.polygons, height, width)


def image_masks(regions: list[Region], prediction: Prediction) -> list[Rle]:
    """Return one RLE per image of the prediction: the union of the mask regions in that image, maybe empty."""
    drawn = []
    for index, image in enumerate(prediction.images):
        height, width = int(image["height"]), int(image["width"])
        masks = [region_rle(region, height, width) for region in regions if region.image == index]
        try:
            drawn.append(union_rle(masks, height, width))
        except ValueError as error:
            raise ValueError(f"prediction {prediction.id}, image {index}: {error}") from error
    return drawn


def box_of(region: Region) -> tuple[float, ...]:
    """Return a region's box (x0, y0, x1, y1): its own, the one of its mask, or its point as a box without area."""
    if region.box is not None:
        return region.box
    if region.point is not None:
        return (*region.point, *region.point)
    if region.rle is None:
        raise ValueError(f"expected a region with a box, a point or a mask, got {region}")
    return rle_box(region.rle)


def boxes_of(regions: list[Region]) -> np.ndarray:
    """Return (n, 4) float64 boxes."""
    return np.array([box_of(region) for region in regions], np.float64).reshape(-1, 4)
