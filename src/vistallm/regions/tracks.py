"""Tracks of a video <-> answer text: an object's regions over the frames, in a fixed order of objects.

`frame 1: <m_st>..<m_ed><m_st><m_ed> frame 2: ..`: each frame has a pair of markers for every object, empty where it is
not seen. With `video.keyframes=n` only every n-th frame and the last are written; those between are interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox
from vistallm.schema import Region


def key_frames(count: int, every: int) -> list[int]:
    """The frames of a video that an answer writes, from 0: every n-th one, and the last.

    >>> key_frames(8, 3), key_frames(1, 3)
    ([0, 3, 6, 7], [0])
    """
    return sorted({*range(0, count, every), count - 1})


def write_tracks(
    codec: RegionCodec, tracks: Sequence[Sequence[Region]], letterboxes: list[Letterbox], kind: str
) -> str:
    """Write tracks as text.

    Args:
        codec: writes each region, in the frames that its `keyframes` ask for.
        tracks: of each object its regions, at most one in a frame; no object at all is written as one that is absent.
        letterboxes: of the frames; with a single one no frame is named.
        kind: as in `RegionCodec.encode`, which raises for regions that can't be written.
    """
    frames = []
    for frame in key_frames(len(letterboxes), codec.keyframes):
        pairs = []
        for track in tracks or [()]:
            here = [replace(region, image=0) for region in track if region.image == frame]
            if len(here) > 1:
                raise ValueError(f"frame {frame + 1}: expected one region of an object, got {len(here)}")
            pairs.append(codec.encode(here, [letterboxes[frame]], kind))
        frames.append(f"frame {frame + 1}: " * (len(letterboxes) > 1) + " ".join(pairs))
    return " ".join(frames)


def fill_tracks(regions: Sequence[Region], count: int, every: int) -> list[Region]:
    """Add the regions of frames that an answer does not write, for polygons and boxes in pixels of one frame size.

    Between two written frames that hold the object its vertices move at constant speed. An object that only one of
    them holds is shown there unchanged in the frames that are nearer to it. Regions come by frame, then by object.
    """
    if every == 1:
        return list(regions)
    filled, at = list(regions), {(region.image, region.object): region for region in regions}
    objects = sorted({region.object for region in regions})
    for start, stop in pairwise(key_frames(count, every)):
        for number in objects:
            first, last = at.get((start, number)), at.get((stop, number))
            for frame in range(start + 1, stop):
                share = (frame - start) / (stop - start)
                region = between(first, last, share) if first and last else (first, last)[share > 0.5]
                if region is not None:
                    filled.append(replace(region, image=frame, confidence=None))
    return sorted(filled, key=lambda region: (region.image, region.object))


def between(first: Region, last: Region, share: float) -> Region:
    """The region at `share` of the way from one to the other; the nearer one where their parts differ in number."""
    if first.box is not None and last.box is not None:
        corners = (1 - share) * np.array(first.box) + share * np.array(last.box)
        return replace(first, box=tuple(corners.tolist()))
    a, b = first.polygons or [], last.polygons or []
    if len(a) != len(b):
        return (first, last)[share > 0.5]
    pairs = (align(one, other) for one, other in zip(a, b, strict=True))
    return replace(first, polygons=[((1 - share) * one + share * other).astype(np.float32) for one, other in pairs])


def align(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two polygons (n, 2) and (m, 2) -> both (max(n, m), 2), vertex i of one belonging to vertex i of the other.

    The shorter one gets vertices in the middle of its longest edges. Then the second is shifted cyclically to the least
    sum of squared distances between them, both centroids at the origin: a motion alone changes no pair of vertices.
    """
    count = max(len(first), len(last))
    a, b = (_divided(polygon.astype(np.float64), count) for polygon in (first, last))
    shifted = np.stack([np.roll(b, -shift, axis=0) for shift in range(count)])
    apart = (shifted - b.mean(0)) - (a - a.mean(0))
    return a, shifted[int(np.square(apart).sum((1, 2)).argmin())]


def _divided(polygon: np.ndarray, count: int) -> np.ndarray:
    """The same outline with `count` vertices."""
    while len(polygon) < count:
        following = np.roll(polygon, -1, axis=0)
        longest = int(np.square(following - polygon).sum(1).argmax())
        polygon = np.insert(polygon, longest + 1, (polygon[longest] + following[longest]) / 2, axis=0)
    return polygon
