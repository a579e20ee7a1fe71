"""Scores of videos against slow and plain readings of the public definitions, pixel by pixel."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from vistallm.metrics import METRICS, ContourAccuracy, MeanTubeIoU, RegionSimilarity
from vistallm.metrics.video import contour, contour_accuracy, region_similarity
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import Parsed, Prediction, Region


def slow_contour(mask):
    """The boundary map of DAVIS: a pixel is on it where right, lower or lower-right neighbour differ; a loop."""
    height, width = mask.shape
    line = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            near = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            line[y, x] = any(mask[y, x] != mask[v, u] for v, u in near if v < height and u < width)
    return line


def slow_f(predicted, target):
    """Precision and recall of the contours by the distances between all of their pixels."""
    one, other = (np.argwhere(slow_contour(mask)) for mask in (predicted, target))
    if not len(one) and not len(other):
        return 1.0
    if not len(one) or not len(other):
        return 0.0
    reach = np.ceil(0.008 * np.linalg.norm(target.shape))
    near = cdist(one, other) <= reach
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def blobs(rng, height, width):
    y, x = np.ogrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 4)):
        mask |= np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width)) < rng.uniform(2, 16)
    return mask


def test_contours_and_f_are_those_of_loops_over_pixels():
    rng = np.random.default_rng(0)
    for height, width in ((30, 40), (48, 33), (64, 150)):
        for _ in range(4):
            target, predicted = blobs(rng, height, width), blobs(rng, height, width)
            predicted = predicted if rng.random() < 0.5 else np.roll(target, rng.integers(-3, 4, 2), (0, 1))
            assert (contour(target) == slow_contour(target)).all()
            assert contour_accuracy(predicted, target) == pytest.approx(slow_f(predicted, target), abs=1e-12)


def test_empty_masks():
    empty, full, some = np.zeros((20, 30), bool), np.ones((20, 30), bool), np.eye(20, 30, dtype=bool)
    assert (region_similarity(empty, empty), contour_accuracy(empty, empty)) == (1, 1)
    assert (region_similarity(some, empty), contour_accuracy(some, empty)) == (0, 0)
    assert (region_similarity(empty, some), contour_accuracy(empty, some)) == (0, 0)
    assert contour_accuracy(full, full) == slow_f(full, full) == 1  # the frame's edge is no contour


def video(target, found, name="a", parsed=True):
    """A prediction over (T, H, W) bool masks; empty frames have no region."""

    def regions(masks):
        return [Region(t, "mask", rle=mask_to_rle(mask)) for t, mask in enumerate(masks) if mask.any()]

    return Prediction(
        id=name,
        benchmark="mini_video_ref",
        task="video_ref",
        prompt="",
        text="",
        parsed=Parsed("mask", regions(found), "") if parsed else None,
        failure=None if parsed else "unclosed",
        images=[{"width": target.shape[2], "height": target.shape[1]}] * len(target),
        target={"regions": [region.to_json() for region in regions(target)], "answer": ""},
    )


def test_j_and_f_are_means_over_frames_then_samples():
    rng = np.random.default_rng(1)
    videos = []
    for n, length in enumerate((5, 8)):
        target, found = (np.stack([blobs(rng, 40, 60) for _ in range(length)]) for _ in range(2))
        target[-1], found[1] = False, False
        videos.append((target, found, str(n)))
    metric, inner = METRICS["video"](), METRICS["video_inner"]()
    for one in (metric, inner):
        one.update([video(*each) for each in videos])
    for one, cut in ((metric, slice(None)), (inner, slice(1, -1))):
        pairs = [list(zip(target[cut], found[cut], strict=True)) for target, found, _ in videos]
        j = [np.mean([(a & b).sum() / (a | b).sum() if (a | b).any() else 1 for a, b in each]) for each in pairs]
        f = [np.mean([slow_f(b, a) for a, b in each]) for each in pairs]
        scores = one.compute()
        assert scores["j"] == pytest.approx(np.mean(j))
        assert scores["f"] == pytest.approx(np.mean(f))
        assert scores["j_and_f"] == pytest.approx((np.mean(j) + np.mean(f)) / 2)


def test_an_unreadable_answer_and_a_target_that_is_never_seen():
    nothing = np.zeros((3, 20, 20), bool)
    metric = METRICS["video"]()
    metric.update([video(nothing, nothing, "right"), video(nothing, nothing, "unreadable", parsed=False)])
    assert metric.compute() == {"j_and_f": 0.5, "j": 0.5, "f": 0.5}
    for single in (RegionSimilarity, ContourAccuracy):
        metric = single()
        metric.update([video(nothing, nothing)])
        assert list(metric.compute().values()) == [1.0]


def tube(target, found, parsed=True):
    def regions(boxes):
        return [Region(frame, "box", box=box) for frame, box in boxes.items()]

    return Prediction(
        "a", "mini_video_grounding", "video_grounding", "", "", Parsed("box", regions(found), "") if parsed else None,
        None if parsed else "unclosed", [{"width": 100, "height": 100}] * 8,
        {"regions": [region.to_json() for region in regions(target)], "answer": ""},
    )  # fmt: skip


def test_viou_and_tiou_on_cases_by_hand():
    target = {t: (0.0, 0.0, 10.0, 10.0) for t in (2, 3, 4, 5)}
    same, half = (0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 5.0)
    cases = [
        ({2: same, 3: same, 4: same, 5: same}, 1.0, 1.0),
        ({4: same, 5: half, 6: same, 7: same}, 1.5 / 6, 2 / 6),
        ({0: same}, 0.0, 0.0),
        ({}, 0.0, 0.0),
        ({2: half, 3: half, 4: half, 5: half}, 0.5, 1.0),
    ]
    for found, viou, tiou in cases:
        metric = METRICS["tube"]()
        metric.update([tube(target, found)])
        expected = {"m_viou": viou, "viou_30": float(viou > 0.3), "viou_50": float(viou > 0.5), "m_tiou": tiou}
        assert metric.compute() == pytest.approx(expected)
    metric = MeanTubeIoU()
    metric.update([tube(target, target, parsed=False)])
    assert metric.compute() == {"m_viou": 0.0}


def test_a_region_outside_of_the_video_is_a_fault():
    one = tube({9: (0.0, 0.0, 1.0, 1.0)}, {})
    with pytest.raises(ValueError, match="none of its 8 frames"):
        METRICS["tube"]().update([one])
