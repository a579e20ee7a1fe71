"""Scores of videos: region similarity J and contour accuracy F of tracks of masks, vIoU and tIoU of tubes of boxes.

J and F follow the evaluation code of DAVIS 2017 (Perazzi et al. 2016), vIoU that of spatio-temporal grounding (VidSTG,
HC-STVG). They are taken over the frames that the model has seen (`data.frames`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from vistallm.metrics.regions import answered, box_iou, image_masks
from vistallm.metrics.scores import SampleScores, Sums
from vistallm.regions.masks import box_of, rle_to_mask
from vistallm.schema import Prediction, Region

TOLERANCE = 0.008  # of a contour, as a share of the frame's diagonal, rounded up to whole pixels


def region_similarity(predicted: np.ndarray, target: np.ndarray) -> float:
    """J: IoU of two (H, W) bool masks; 1 where both are empty."""
    union = np.count_nonzero(predicted | target)
    return np.count_nonzero(predicted & target) / union if union else 1.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels of a (H, W) bool mask that differ from the one to the right, below or diagonally below; bool as well."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here, right, below, across = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (here ^ right) | (here ^ below) | (here ^ across)


def contour_accuracy(predicted: np.ndarray, target: np.ndarray) -> float:
    """F: harmonic mean of the shares of both contours that lie near the other one; (H, W) bool masks.

    Near: at most TOLERANCE of the diagonal away. Two empty contours give 1, one empty contour 0.
    """
    lines = [contour(mask) for mask in (predicted, target)]
    counts = [np.count_nonzero(line) for line in lines]
    if 0 in counts:
        return float(counts == [0, 0])
    radius = math.ceil(TOLERANCE * math.hypot(*target.shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x * x + y * y <= radius * radius).astype(np.uint8)
    near = [cv2.dilate(line.astype(np.uint8), disk) > 0 for line in lines]
    precision, recall = (np.count_nonzero(lines[i] & near[1 - i]) / counts[i] for i in (0, 1))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def track_regions(prediction: Prediction) -> list[Region]:
    """The target's regions; a target that is seen in no frame has none. Raises ValueError for one in no frame."""
    regions = [Region.from_json(record) for record in prediction.target.get("regions", [])]
    if any(not 0 <= region.image < len(prediction.images) for region in regions):
        raise ValueError(f"a target region lies in none of its {len(prediction.images)} frames")
    return regions


class TrackScores(SampleScores):
    """Video object segmentation by an expression: J&F, J and F, means over a video's frames, then over samples.

    The masks of all objects of an expression count as one. `inner` leaves out the first and the last frame, as the
    semi-supervised DAVIS scripts do and those of referring expressions do not.
    """

    names: tuple[str, ...] = ("j_and_f", "j", "f")
    means: tuple[str, ...] = names
    masks = True
    inner = False

    def _measure(self, prediction: Prediction) -> Sums:
        target = image_masks(track_regions(prediction), prediction)
        found = image_masks(answered(prediction), prediction)
        pairs = [(rle_to_mask(a), rle_to_mask(b)) for a, b in zip(found, target, strict=True)]
        pairs = pairs[1:-1] if self.inner and len(pairs) > 2 else pairs
        read = float(prediction.parsed is not None)  # an unreadable answer earns nothing where nothing is to be seen
        scores = region_similarity, contour_accuracy
        j, f = (read * float(np.mean([measure(*pair) for pair in pairs])) for measure in scores)
        both = ((j + f) / 2, 1)
        return {"score": both, "j_and_f": both, "j": (j, 1), "f": (f, 1)}


class InnerTrackScores(TrackScores):
    """J&F, J and F without the first and the last frame."""

    inner = True


class TubeScores(SampleScores):
    """Spatio-temporal grounding: m_vIoU, the shares of vIoU above .3 and .5, and m_tIoU, means over samples.

    tIoU is the IoU of the sets of frames; vIoU the sum of the boxes' IoU over the frames that both hold, divided by the
    number of frames that either holds. Of several boxes in a frame the first counts.
    """

    names: tuple[str, ...] = ("m_viou", "viou_30", "viou_50", "m_tiou")
    means: tuple[str, ...] = names

    def _measure(self, prediction: Prediction) -> Sums:
        target, found = _tube(track_regions(prediction)), _tube(answered(prediction))
        either, both = target.keys() | found.keys(), target.keys() & found.keys()
        empty_right = float(prediction.parsed is not None and not either)
        overlap = math.fsum(float(box_iou(found[frame], target[frame])[0, 0]) for frame in both)
        viou = overlap / len(either) if either else empty_right
        tiou = len(both) / len(either) if either else empty_right
        shares = {"viou_30": (viou > 0.3, 1), "viou_50": (viou > 0.5, 1)}
        return {"score": (viou, 1), "m_viou": (viou, 1), "m_tiou": (tiou, 1), **shares}


def _tube(regions: Sequence[Region]) -> dict[int, tuple[float, ...]]:
    """Frame -> its first box."""
    return {region.image: box_of(region) for region in reversed(regions)}
