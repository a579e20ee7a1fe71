"""Drawing regions on images: colours, frames and what lies over what."""

import numpy as np
import pytest

from vistallm.regions.masks import mask_to_rle
from vistallm.regions.overlay import COLOURS, draw_regions
from vistallm.schema import Region

DISC = np.hypot(*(np.mgrid[:40, :60] - np.array([20, 30])[:, None, None])) < 12
RING = np.array([[10, 5], [50, 5], [50, 30], [10, 30]], np.float32)


@pytest.mark.parametrize("shade", [0, 255])
def test_a_mask_is_tinted_where_its_pixels_are_and_outlined(shade):
    image = np.full((40, 60, 3), shade, np.uint8)
    drawn = draw_regions(image, [Region(0, "mask", rle=mask_to_rle(DISC))], labels=[""])
    changed = (drawn != image).any(2)
    assert changed[DISC].all()
    assert not changed[np.hypot(*(np.mgrid[:40, :60] - np.array([20, 30])[:, None, None])) > 16].any()
    tint = 0.65 * shade + 0.35 * np.array(COLOURS[0])
    assert np.abs(drawn[20, 30] - tint).max() <= 1
    assert (image == shade).all()  # the given image stays as it is


def test_polygons_boxes_and_points_lie_where_they_say_at_any_scale():
    image = np.zeros((40, 60, 3), np.uint8)
    regions = [
        Region(0, "mask", 1, polygons=[RING]),
        Region(0, "box", 2, box=(5, 8, 40, 35)),
        Region(0, "point", 3, point=(30, 20)),
    ]
    drawn = draw_regions(image, regions, 2.0, labels=["", "", ""])
    assert drawn.shape == (80, 120, 3)
    assert tuple(drawn[20, 100]) == COLOURS[1]  # right edge of the polygon, x = 50
    assert tuple(drawn[60, 10]) == COLOURS[2]  # left edge of the box, x = 5
    assert tuple(drawn[40, 60]) == COLOURS[3]
    assert draw_regions(np.zeros((900, 1500, 3), np.uint8), regions, 0.1).shape == (90, 150, 3)


def test_tags_stay_inside_and_the_inspection_layer_is_white():
    image = np.zeros((40, 60, 3), np.uint8)
    corners = [Region(0, "point", k, point=xy) for k, xy in enumerate([(0, 0), (60, 0), (60, 40), (0, 40)])]
    assert (draw_regions(image, corners, 4.0, ["first", "second", "a long label", "4"]) > 200).any()
    drawn = draw_regions(image, [], 2.0, over=[Region(0, "box", box=(10, 10, 50, 35))])
    assert (drawn[70, 20:100] > 200).all()
    assert (draw_regions(image, [Region(0, "mask", polygons=[])]) == 0).all()


def test_visible_keypoints_are_discs_hidden_ones_rings_and_others_are_left_out():
    keypoints = ((10.0, 10.0, 2), (30.0, 20.0, 1), (50.0, 30.0, 0))
    region = Region(0, "keypoints", 1, keypoints=keypoints)
    drawn = draw_regions(np.zeros((40, 60, 3), np.uint8), [region], 5.0, [""])
    assert tuple(drawn[50, 50]) == COLOURS[1]
    assert tuple(drawn[100, 150]) == (255, 255, 255), "the middle of a ring"
    assert any(tuple(pixel) == COLOURS[1] for pixel in drawn[100, 150:160])
    assert not drawn[130:170, 230:270].any()


def test_prompts_are_white_where_they_are_and_fit_any_size():
    drawn = draw_regions(np.zeros((40, 60, 3), np.uint8), [], 2.0, prompts=[DISC[::2, ::2]])
    assert (drawn[40, 60] == 127).all()
    assert (drawn[2, 2] == 0).all()
