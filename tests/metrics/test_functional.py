"""Mask and box scores against brute-force NumPy on random and edge inputs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from vistallm.metrics import functional as F

SHAPES = [(1, 1), (7, 5), (40, 64)]


def rle(mask):
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def random_masks(seed, count=40):
    """Pairs (predicted or None, target) of bool masks: random, empty, full and unreadable ones."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        shape = SHAPES[i % len(SHAPES)]
        predicted, target = (rng.random(shape) < rng.choice([0, 0.05, 0.5, 0.9, 1]) for _ in range(2))
        pairs.append((None if rng.random() < 0.15 else predicted, target))
    return pairs


def counts_of(pairs):
    return F.mask_counts([p if p is None else rle(p) for p, _ in pairs], [rle(t) for _, t in pairs])


def brute_iou(predicted, target):
    if predicted is None:
        return 0.0
    union = (predicted | target).sum()
    return (predicted & target).sum() / union if union else 1.0


def share(values):
    values = list(values)
    return (sum(values), len(values))


@pytest.mark.parametrize("seed", range(5))
def test_mask_scores_equal_brute_force(seed):
    pairs = random_masks(seed)
    counts = counts_of(pairs)
    ious = [brute_iou(*pair) for pair in pairs]
    assert F.sample_iou(counts) == pytest.approx(ious, abs=1e-12)
    assert F.mean_sample_iou(counts) == pytest.approx((sum(ious), len(ious)), rel=1e-9)
    drawn = [(np.zeros_like(t) if p is None else p, t) for p, t in pairs]
    assert F.cumulative_iou(counts) == (sum((p & t).sum() for p, t in drawn), sum((p | t).sum() for p, t in drawn))
    for threshold in (0.5, 0.7, 0.9):
        expected = share(iou >= threshold for iou, (_, t) in zip(ious, pairs, strict=True) if t.any())
        assert F.precision_at_iou(counts, threshold) == expected
    presence = (counts.predicted_area == 0, counts.target_area == 0, counts.readable)
    assert F.no_target_accuracy(*presence) == share(p is not None and not p.any() for p, t in pairs if not t.any())
    assert F.target_accuracy(*presence) == share(p is not None and p.any() for p, t in pairs if t.any())
    precision = [0.0 if p is None else (p == t).mean() for p, t in pairs]
    assert F.pixel_precision(counts) == pytest.approx((sum(precision), len(pairs)))
    counted = [iou for iou, (p, t) in zip(ious, drawn, strict=True) if (p | t).any()]
    assert F.foreground_jaccard(counts) == pytest.approx((sum(counted), len(counted)))


def test_counts_are_int64_and_survive_large_masks():
    huge = {"size": [60000, 60000], "counts": [0, 3_600_000_000]}
    full = coco_mask.frPyObjects(huge, 60000, 60000)
    counts = F.mask_counts([full], [full])
    assert counts.intersection.dtype == np.int64
    assert counts.union[0] == 3_600_000_000


def test_exact_sums_do_not_depend_on_the_order():
    values = np.random.default_rng(0).random(20000)
    assert len({float(np.random.default_rng(s).permutation(values).cumsum()[-1]) for s in range(5)}) > 1
    parts = [np.random.default_rng(s).permutation(values) for s in range(5)]
    sums = {F.exact_sum(p[:7]) + F.exact_sum(p[7:9000]) + F.exact_sum(p[9000:]) for p in parts}
    assert sums == {F.exact_sum(values)}
    assert F.exact_sum(values) / 20000 == pytest.approx(values.mean(), abs=1.2e-10)
    assert F.exact_sum([]) == 0


def test_no_samples_and_empty_union():
    assert len(F.mask_counts([], [])) == 0
    assert F.mean_sample_iou(F.mask_counts([], [])) == (0.0, 0)
    empty = F.union_rle([], 4, 6)
    assert coco_mask.decode(empty).shape == (4, 6)
    assert not coco_mask.decode(empty).any()
    assert F.sample_iou(F.mask_counts([empty, None], [empty, empty])).tolist() == [1, 0]


def test_union_of_masks_is_the_pixelwise_or():
    masks = [mask for _, mask in random_masks(3, 6)[2::3]]
    assert (coco_mask.decode(F.union_rle([rle(m) for m in masks], 40, 64)) == np.any(masks, axis=0)).all()


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 4\], got \[5, 5\]"):
        F.mask_counts([F.union_rle([], 5, 5)], [F.union_rle([], 4, 4)])
    with pytest.raises(ValueError, match="mask size"):
        F.union_rle([F.union_rle([], 5, 5)], 4, 4)


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


def test_box_hit_is_strict_at_the_threshold():
    assert not F.box_hit(np.array([0, 0, 4, 2]), np.array([0, 0, 4, 4]))
    assert F.box_hit(np.array([0, 0, 4, 2.1]), np.array([0, 0, 4, 4]))
    assert not F.box_hit(None, np.array([0, 0, 4, 4]))


def test_chosen_candidate_takes_the_nearest_for_boxes_and_points():
    candidates = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 30, 30]])
    assert F.chosen_candidate([1, 1, 9, 9], candidates) == 0
    assert F.chosen_candidate([33, 0, 36, 4], candidates[:2]) == 1
    assert F.chosen_candidate([25, 5], candidates[:2]) == 1
    assert F.chosen_candidate([6, 6], candidates) == 0  # inside two candidates: the nearer centre
    assert F.chosen_candidate([18, 20], candidates) == 2
