import numpy as np
import pytest

from vistallm.regions.masks import mask_to_polygons, mask_to_rle, polygons_to_mask, rle_to_mask, rle_to_polygons


def test_one_pixel_is_its_box():
    mask = np.zeros((5, 6), bool)
    mask[0, 0] = True
    assert mask_to_polygons(mask)[0].tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize("sampler", ["uniform", "curvature", "adaptive"])
def test_ellipse_keeps_its_shape_within_the_budget(sampler):
    y, x = np.mgrid[:128, :128]
    mask = ((x - 60) / 40) ** 2 + ((y - 64) / 25) ** 2 < 1
    polygons = mask_to_polygons(mask, 16, sampler)
    assert sum(map(len, polygons)) <= 16
    drawn = polygons_to_mask(polygons, 128, 128)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.85


def test_rle_round_trip():
    mask = np.random.default_rng(0).random((20, 30)) < 0.5
    assert (rle_to_mask(mask_to_rle(mask)) == mask).all()
    assert isinstance(mask_to_rle(mask)["counts"], str)
    a, b = mask_to_polygons(mask), rle_to_polygons(mask_to_rle(mask))
    assert all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))
