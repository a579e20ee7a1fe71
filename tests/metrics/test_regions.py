"""Mask and box scores against brute-force NumPy on random and edge inputs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from vistallm.metrics import regions as F
from vistallm.schema import Prediction, Region


def rle(mask):
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_counts_equal_drawn_masks_and_survive_large_ones():
    rng = np.random.default_rng(0)
    for share in (0, 0.05, 0.5, 1):
        predicted, target = rng.random((2, 40, 64)) < np.array([share, 0.5])[:, None, None]
        counts = F.mask_counts(rle(predicted), rle(target))
        assert counts == ((predicted & target).sum(), (predicted | target).sum(), 40 * 64)
    huge = {"size": [60000, 60000], "counts": [0, 3_600_000_000]}
    full = coco_mask.frPyObjects(huge, 60000, 60000)
    assert F.mask_counts(full, full) == (3_600_000_000, 3_600_000_000, 3_600_000_000)


def test_union_of_masks_is_the_pixelwise_or():
    masks = np.random.default_rng(3).random((3, 40, 64)) < 0.2
    regions = [Region(number > 2, "mask", rle=rle(mask)) for number, mask in enumerate([*masks, np.zeros((5, 6))])]
    sizes = [{"width": 64, "height": 40}, {"width": 6, "height": 5}, {"width": 6, "height": 4}]
    drawn = F.image_masks(regions, Prediction("a", "b", "t", "", "", None, None, sizes, {}))
    assert (coco_mask.decode(drawn[0]) == masks.any(0)).all()
    assert [coco_mask.decode(one).shape for one in drawn] == [(40, 64), (5, 6), (4, 6)]
    assert not any(coco_mask.decode(one).any() for one in drawn[1:])
    with pytest.raises(ValueError, match="image 1: mask size"):
        F.image_masks(regions, Prediction("a", "b", "t", "", "", None, None, sizes[::2], {}))


def grid_area(box, other, side=12):
    """Intersection, union and hull area of two integer boxes, counted on a grid."""
    drawn = []
    for x0, y0, x1, y1 in (box, other):
        canvas = np.zeros((side, side), bool)
        canvas[y0:y1, x0:x1] = True
        drawn.append(canvas)
    hull = np.zeros((side, side), bool)
    hull[min(box[1], other[1]) : max(box[3], other[3]), min(box[0], other[0]) : max(box[2], other[2])] = True
    return (drawn[0] & drawn[1]).sum(), (drawn[0] | drawn[1]).sum(), hull.sum()


corner = st.tuples(*[st.integers(0, 11)] * 4)
boxes_strategy = corner.map(lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])))


@given(boxes_strategy, boxes_strategy)
def test_box_iou_equals_a_grid_count(box, other):
    intersection, union, hull = grid_area(box, other)
    iou = intersection / union if union else 0.0
    assert F.box_iou(box, other)[0, 0] == pytest.approx(iou)
    expected = iou - (hull - union) / hull if hull else iou
    assert F.box_iou(box, other, generalized=True)[0, 0] == pytest.approx(expected)


@settings(max_examples=60)
@given(st.lists(boxes_strategy, max_size=4), st.lists(boxes_strategy, max_size=4))
def test_matched_f1_is_one_only_for_a_perfect_matching(predicted, target):
    score = F.matched_f1(np.array(predicted).reshape(-1, 4), np.array(target).reshape(-1, 4))
    assert 0 <= score <= 1
    overlap = F.box_iou(np.array(predicted), np.array(target)) if predicted and target else None
    best = len(predicted) == len(target) and (
        not predicted
        or any(
            all(overlap[i, j] >= 0.5 for i, j in enumerate(order))
            for order in itertools.permutations(range(len(target)))
        )
    )
    if score == 1:
        assert best
    if (
        len(set(predicted)) == len(predicted)
        and sorted(predicted) == sorted(target)
        and all(x1 > x0 and y1 > y0 for x0, y0, x1, y1 in predicted)
    ):
        assert score == 1


def test_matched_f1_counts_partial_answers():
    boxes = np.array([[0, 0, 4, 4], [6, 6, 9, 9]])
    assert F.matched_f1(boxes[:1], boxes) == pytest.approx(2 / 3)
    assert F.matched_f1(boxes, boxes[:0]) == 0
    assert F.matched_f1(boxes[:0], boxes[:0]) == 1
    assert F.matched_f1(None, boxes[:0]) == 0


def test_chosen_candidate_takes_the_nearest_for_boxes_and_points():
    candidates = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 30, 30]])
    assert F.chosen_candidate([1, 1, 9, 9], candidates) == 0
    assert F.chosen_candidate([33, 0, 36, 4], candidates[:2]) == 1
    assert F.chosen_candidate([25, 5, 25, 5], candidates[:2]) == 1
    assert F.chosen_candidate([6, 6, 6, 6], candidates) == 0  # inside two candidates: the nearer centre
    assert F.chosen_candidate([18, 20, 18, 20], candidates) == 2
