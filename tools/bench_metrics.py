"""What a mask score costs: metric update and whole scoring of referring segmentation beside its run-length floor.

    python tools/bench_metrics.py [--count 10000]

Makes predictions of one polygon each against full masks of 640x480 images, in memory and as a predictions file. The
floor is what pycocotools itself needs for the same polygons: polygon -> runs -> intersection -> three areas.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from vistallm.evaluate.benchmarks import load_benchmarks, score
from vistallm.evaluate.predictions import read_predictions, write_predictions
from vistallm.metrics import CumulativeIoU, MeanSampleIoU
from vistallm.regions.masks import polygons_to_rle
from vistallm.schema import Parsed, Prediction, Region, Rle

HEIGHT, WIDTH = 480, 640
POINTS, TARGET_POINTS = 24, 60
NAME = "refcoco_val_res"


def outline(rng: np.random.Generator, points: int) -> np.ndarray:
    """(points, 2) float32 of a star-shaped polygon of 40 to 200 pixels radius, cut by the image border."""
    turn = np.arange(points) * 2 * np.pi / points
    radius = rng.uniform(40, 200) * rng.uniform(0.6, 1, points)
    at = rng.uniform([100, 100], [WIDTH - 100, HEIGHT - 100])
    polygon = at + radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
    return np.clip(polygon, 0, (WIDTH, HEIGHT)).astype(np.float32)


def make_predictions(count: int, seed: int = 0) -> list[Prediction]:
    """Predictions with one polygon each and their targets as RLE, as eval.py writes them."""
    rng, found = np.random.default_rng(seed), []
    for index in range(count):
        truth = polygons_to_rle([outline(rng, TARGET_POINTS)], HEIGHT, WIDTH)
        parsed = Parsed("mask", [Region(0, "mask", polygons=[outline(rng, POINTS).round(3)])], "")
        regions = [Region(0, "mask", rle=truth).to_json()]
        target = {"regions": regions, "answer": "{regions:0}", "empty": False, "meta": {"ref_id": index // 3}}
        images = [{"width": WIDTH, "height": HEIGHT}]
        found.append(Prediction(f"{index:06d}", NAME, "res", "", "<m_st>..<m_ed>", parsed, None, images, target))
    return found


def floor(polygon: list[float], truth: Rle) -> int:
    """Polygon -> runs -> intersection, and the areas that an IoU needs, in pycocotools alone."""
    drawn = coco.frPyObjects([polygon], HEIGHT, WIDTH)[0]
    return int(coco.area(coco.merge([drawn, truth], True))) + int(coco.area(drawn)) + int(coco.area(truth))


def interleaved(functions: list[Callable[[slice], Any]], count: int, chunk: int, rounds: int) -> np.ndarray:
    """(functions, chunks) best seconds; chunk after chunk, so that other load hits all alike."""
    slices = [slice(start, start + chunk) for start in range(0, count, chunk)]
    seconds = np.zeros((rounds, len(functions), len(slices)))
    for column, part in enumerate(slices):
        for row in seconds:
            for number, function in enumerate(functions):
                start = time.perf_counter()
                function(part)
                row[number, column] = time.perf_counter() - start
    return seconds.min(0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--chunk", type=int, default=100, help="samples per timing")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    benchmarks = {NAME: load_benchmarks()[NAME]}
    predictions = make_predictions(args.count)
    polygons = [p.parsed.regions[0].polygons or [] for p in predictions if p.parsed]
    flat = [parts[0].astype(float).ravel().tolist() for parts in polygons]
    truths = [p.target["regions"][0]["rle"] for p in predictions]
    metric, mean, every = CumulativeIoU(), MeanSampleIoU(), benchmarks[NAME].new_metric()
    functions: dict[str, Callable[[slice], Any]] = {
        "floor: pycocotools": lambda part: [floor(*one) for one in zip(flat[part], truths[part], strict=True)],
        "CumulativeIoU.update": lambda part: metric.update(predictions[part]),
        "MeanSampleIoU.update": lambda part: mean.update(predictions[part]),
        "update, one by one": lambda part: [metric.update([one]) for one in predictions[part]],
        "evaluate: pixel counts": lambda part: every.update(predictions[part]),
        "evaluate: all scores": lambda part: score(predictions[part], benchmarks),
    }
    best = interleaved(list(functions.values()), args.count, args.chunk, args.rounds)
    print(f"{args.count} masks of {WIDTH}x{HEIGHT}: median over chunks of {args.chunk}")
    for name, seconds in zip(functions, best, strict=True):
        print(f"  {name:<24} {np.median(seconds) / args.chunk * 1e6:8.1f} us  {np.median(seconds / best[0]):6.2f} x")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        write_predictions(predictions, path)
        start = time.perf_counter()
        score(read_predictions(path), benchmarks)
        print(f"predictions.jsonl -> scores: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
