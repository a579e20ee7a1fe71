"""Random masks through mask -> text -> mask: every promise of sampler, codec and drawing rule."""

import cv2
import numpy as np
import pytest

from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import SAMPLERS, mask_to_polygons, polygons_to_mask, polygons_to_rle, rle_to_mask
from vistallm.schema import Region


def random_mask(rng):
    """(H, W) bool of a random kind and size: noise, ellipses, thin lines, self-crossing polygons, specks, full."""
    height, width = rng.integers(1, 96, 2)
    mask = np.zeros((height, width), np.uint8)
    kind = rng.integers(6)
    if kind == 0:
        return rng.random((height, width)) < rng.choice([0.02, 0.3, 0.6, 0.95])
    if kind == 1:
        return np.ones((height, width), bool)
    for _ in range(rng.integers(1, 5)):
        points = (rng.random((rng.integers(3, 20), 2)) * (width, height)).astype(np.int32)
        if kind == 2:
            axes = rng.integers(0, 40, 2).tolist()
            cv2.ellipse(mask, points[0].tolist(), axes, float(rng.integers(180)), 0, 360, 1, -1)
        elif kind == 3:
            cv2.polylines(mask, [points], False, 1, int(rng.integers(1, 4)))
        elif kind == 4:
            cv2.fillPoly(mask, [points], 1)
        else:
            mask[points[:, 1], points[:, 0]] = 1
    return mask.astype(bool)


def check(mask, points, sampler, num_bins):
    letterbox = Letterbox(mask.shape[1], mask.shape[0], 224)
    polygons = mask_to_polygons(mask, points, sampler, num_bins=num_bins)
    assert bool(polygons) == bool(mask.any()), "polygons exactly where there are pixels"
    if not polygons:
        return
    assert sum(map(len, polygons)) <= points
    assert min(map(len, polygons)) >= 3
    assert all(np.isfinite(p).all() and (p >= 0).all() and (p <= mask.shape[::-1]).all() for p in polygons), "inside"
    codec = RegionCodec(num_bins=num_bins, points=points)
    text = codec.encode([Region(0, "mask", polygons=polygons)], [letterbox], "mask")
    regions = codec.decode(text, [letterbox]).regions  # raises on an illegal bin or too few points
    assert codec.encode(regions, [letterbox], "mask") == text, "text is a fixed point"
    drawn = polygons_to_mask(regions[0].polygons, *mask.shape)
    assert (drawn == rle_to_mask(polygons_to_rle(regions[0].polygons, *mask.shape))).all(), "one drawing rule"


@pytest.mark.parametrize("count", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_masks_keep_every_promise(count):
    rng = np.random.default_rng(count)
    for index in range(count):
        mask, points, sampler = random_mask(rng), int(rng.integers(3, 40)), str(rng.choice(SAMPLERS))
        num_bins = int(rng.choice([16, 101, 1001]))
        try:
            check(mask, points, sampler, num_bins)
        except Exception as error:
            raise AssertionError(f"mask {index}: {mask.shape} {points} {sampler} {num_bins}") from error
