"""Time per mask of sampling, drawing and scoring, each beside its floor in the same run; and a fuzz run.

python tools/bench_masks.py [FILE.json]        microseconds per mask; made shapes without a file
python tools/bench_masks.py --fuzz 100000      random masks through mask -> text -> mask, every promise checked
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco

from mask_ceiling import read_masks
from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import (
    SAMPLERS,
    mask_to_polygons,
    mask_to_rle,
    polygons_to_mask,
    polygons_to_rle,
    rle_iou,
    rle_to_mask,
)
from vistallm.schema import Region


def random_mask(rng: np.random.Generator) -> np.ndarray:
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


def fuzz(count: int, seed: int) -> int:
    """Check every promise on random masks; returns how many failed."""
    rng = np.random.default_rng(seed)
    failures = 0
    for index in range(count):
        mask = random_mask(rng)
        points, sampler = int(rng.integers(3, 40)), str(rng.choice(SAMPLERS))
        num_bins = int(rng.choice([16, 101, 1001]))
        try:
            check(mask, points, sampler, num_bins)
        except Exception as error:  # noqa: BLE001 - any failure at all is what a fuzz run looks for
            failures += 1
            print(f"mask {index}: {mask.shape} {points} {sampler} {num_bins}: {type(error).__name__}: {error}")
    print(f"{count} masks, seed {seed}: {failures} failures")
    return failures


def check(mask: np.ndarray, points: int, sampler: str, num_bins: int) -> None:
    """One mask through the codec; raises AssertionError (or anything else) where a promise is broken."""
    letterbox = Letterbox(mask.shape[1], mask.shape[0], 224)
    polygons = mask_to_polygons(mask, points, sampler, num_bins=num_bins)
    assert bool(polygons) == bool(mask.any()), "polygons exactly where there are pixels"
    if not polygons:
        return
    assert sum(map(len, polygons)) <= points, "at most N points"
    assert min(map(len, polygons)) >= 3, "at least 3 per part"
    assert all(np.isfinite(p).all() and (p >= 0).all() and (p <= mask.shape[::-1]).all() for p in polygons), "inside"
    codec = RegionCodec(num_bins=num_bins, points=points)
    text = codec.encode([Region(0, "mask", polygons=polygons)], [letterbox], "mask")
    regions = codec.decode(text, [letterbox]).regions  # raises on an illegal bin or too few points
    assert codec.encode(regions, [letterbox], "mask") == text, "text is a fixed point"
    drawn = polygons_to_mask(regions[0].polygons or [], *mask.shape)
    assert (drawn == rle_to_mask(polygons_to_rle(regions[0].polygons or [], *mask.shape))).all(), "one drawing rule"


def median_us(function: Callable[..., Any], arguments: list[tuple[Any, ...]], repeats: int) -> float:
    """Median over the masks of the best time of each, in microseconds."""
    best = np.full(len(arguments), np.inf)
    for _ in range(repeats):
        for index, values in enumerate(arguments):
            start = time.perf_counter()
            function(*values)
            best[index] = min(best[index], time.perf_counter() - start)
    return float(np.median(best)) * 1e6


def fill_poly(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """The floor for drawing: integer vertices, so not the same pixels."""
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.rint(p).astype(np.int32) for p in polygons], 1)
    return canvas


def bench(masks: list[np.ndarray], points: int, repeats: int) -> None:
    """Print the table: name, microseconds, times the floor."""
    dense = [(np.ascontiguousarray(m).view(np.uint8),) for m in masks]
    polygons = [mask_to_polygons(m[0], points) for m in dense]
    draw = [(p, *m.shape) for p, m in zip(polygons, masks, strict=True)]
    pairs = [(mask_to_rle(m), polygons_to_rle(*d)) for m, d in zip(masks, draw, strict=True)]
    floor = lambda m: cv2.findContours(m, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)  # noqa: E731
    runs = lambda a, b: (coco.area(coco.merge([a, b], True)), coco.area(coco.merge([a, b])))  # noqa: E731
    flat = lambda p, h, w: coco.merge(coco.frPyObjects([np.ravel(q).astype(float) for q in p], h, w))  # noqa: E731
    groups: list[tuple[str, list[tuple[Any, ...]], dict[str, Callable[..., Any]]]] = [
        (
            f"encode at {points} points",
            dense,
            {"cv2.findContours": floor}
            | {s: (lambda m, s=s: mask_to_polygons(m, points, s)) for s in SAMPLERS}
            | {"adaptive on bins": lambda m: mask_to_polygons(m, points, num_bins=1001)},
        ),
        (
            "draw",
            draw,
            {
                "cv2.fillPoly": fill_poly,
                "polygons_to_mask": polygons_to_mask,
                "pycocotools runs": flat,
                "polygons_to_rle": polygons_to_rle,
                "pycocotools runs + decode": lambda p, h, w: coco.decode(flat(p, h, w)),
            },
        ),
        ("score", pairs, {"pycocotools on runs": runs, "rle_iou": rle_iou}),
    ]
    for title, arguments, functions in groups:
        times = {name: median_us(f, arguments, repeats) for name, f in functions.items()}
        least = next(iter(times.values()))
        print(f"{title} (first row: the floor)")
        for name, value in times.items():
            print(f"  {name:<26} {value:8.1f} us  {value / least:6.2f} x")


def main() -> int:
    """Read, measure, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="annotations or shards, as tools/mask_ceiling.py reads them")
    parser.add_argument("--points", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fuzz", type=int, help="check this many random masks instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.fuzz:
        return int(fuzz(args.fuzz, args.seed) > 0)
    rng = np.random.default_rng(args.seed)
    masks = [rle_to_mask(r) for r in read_masks(args.file)] if args.file else [random_mask(rng) for _ in range(500)]
    masks = [m for m in masks if m.any()]
    print(f"{len(masks)} masks, median of the best of {args.repeats} runs each")
    bench(masks, args.points, args.repeats)
    return 0


if __name__ == "__main__":
    cv2.setNumThreads(1)
    sys.exit(main())
