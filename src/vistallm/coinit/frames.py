"""Which frames of a video are read: evenly spread for evaluation, one drawn within each equal part while training."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

from vistallm.coinit.shards import RawSample


def frame_numbers(total: int, count: int, rng: random.Random | None = None) -> list[int]:
    """Numbers, from 0, of at most `count` of `total` frames: the middle of each equal part, or one drawn in it.

    >>> frame_numbers(32, 4), frame_numbers(3, 8)
    ([4, 12, 20, 28], [0, 1, 2])
    """
    if total <= count:
        return list(range(total))
    edges = [i * total // count for i in range(count + 1)]
    return [(low + high) // 2 if rng is None else rng.randrange(low, high) for low, high in pairwise(edges)]


def choose_frames(raw: RawSample, count: int, rng: random.Random | None = None) -> RawSample:
    """A sample that is a video with at most `count` of its frames; any other sample as it is.

    Images and regions are renumbered; `meta["frames"]` says which frames these are.
    """
    record = raw.record or {}
    fields, images, regions = (record.get(name) for name in ("fields", "images", "regions"))
    if not isinstance(fields, dict) or not fields.get("video") or not isinstance(images, list) or len(images) <= count:
        return raw
    chosen = frame_numbers(len(images), count, rng)
    new = {frame: place for place, frame in enumerate(chosen)}
    kept = [{**one, "image": new[one.get("image", 0)]} for one in regions or [] if one.get("image", 0) in new]
    meta = {**(record.get("meta") or {}), "frames": chosen}
    return replace(raw, record={**record, "images": [images[i] for i in chosen], "regions": kept, "meta": meta})
