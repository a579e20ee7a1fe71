"""The most that masks as sequences can score: mean IoU of sample -> quantise -> decode -> draw against the whole mask.

    python tools/mask_ceiling.py FILE.json|SHARD.tar|SHARD_DIR [--points 16 32] [--sampler adaptive uniform]
    python tools/mask_ceiling.py SHARD.tar|SHARD_DIR --keyframes 1 2 4 [...]        tracks of videos: J&F

FILE is COCO-style (a dict with images and annotations) or a list of {"segmentation": RLE or polygons, ...}, where
polygons need "height" and "width"; a shard or a folder of shards gives the masks of its samples. Every mask is
read and drawn by the project's own codec and drawing rule. With --keyframes the tracks of videos are written, in every
n-th frame and the last, and read with the frames between.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vistallm.metrics.video import TrackScores
from vistallm.regions import masks as M
from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.tracks import fill_tracks, write_tracks
from vistallm.schema import Parsed, Prediction, Region, Rle, Sample

COLUMNS = "sampler points masks mean_iou under_0.8 worst tokens ms_sample ms_all"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON records of a shard or a folder of shards."""
    for tar in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.name.endswith(".json") and (file := archive.extractfile(member)):
                    yield json.load(file)


def read_masks(path: Path) -> Iterator[Rle]:
    """Masks of an annotation file, a shard or a folder of shards; raises ValueError where there are none to read."""
    if path.is_dir() or path.suffix == ".tar":
        yield from (r["rle"] for record in read_records(path) for r in record.get("regions", []) if r.get("rle"))
        return
    content = json.loads(path.read_text())
    sizes = {i["id"]: i for i in content["images"]} if isinstance(content, dict) else {}
    for record in content["annotations"] if isinstance(content, dict) else content:
        size = sizes.get(record.get("image_id"), record)
        yield M.segmentation_to_rle(record["segmentation"], size.get("height"), size.get("width"))


def measure(masks: list[Rle], codec: RegionCodec, options: dict[str, Any]) -> dict[str, Any]:
    """One row of the table, with the IoU of every mask; `options`, of `mask_to_polygons`, are those of the codec."""
    ious, tokens, sampling, start = [], 0, 0.0, time.perf_counter()
    for rle in masks:
        height, width = rle["size"]
        letterboxes, mask = [Letterbox(width, height, 224)], M.rle_to_mask(rle).view(np.uint8)
        begun = time.perf_counter()
        polygons = M.mask_to_polygons(mask, **options)
        sampling += time.perf_counter() - begun
        text = codec.encode([Region(0, "mask", polygons=polygons)], letterboxes, "mask")
        tokens += text.count("<")
        read = codec.decode(text, letterboxes).regions[0].polygons or []
        ious.append(M.rle_iou(M.polygons_to_rle(read, height, width), rle))
    total, scores = time.perf_counter() - start, np.array(ious)
    ceiling = (round(float(scores.mean()), 5), round(float((scores < 0.8).mean()), 5), round(float(scores.min()), 4))
    costs = (round(tokens / len(masks), 1), *(round(1e3 * seconds / len(masks), 3) for seconds in (sampling, total)))
    values = (options["sampler"], options["points"], len(masks), *ceiling, *costs)
    return {**dict(zip(COLUMNS.split(), values, strict=True)), "iou": scores.round(5).tolist()}


def measure_tracks(videos: list[Sample], codec: RegionCodec) -> dict[str, Any]:
    """J&F, J and F of the videos' tracks, written and read again, and tokens per track."""
    metric, tokens, count = TrackScores(), 0, 0
    for sample in videos:
        letterboxes = [Letterbox(info.width, info.height, 224) for info in sample.images]
        numbers = sorted({region.object for region in sample.regions})
        text = write_tracks(codec, [[r for r in sample.regions if r.object == n] for n in numbers], letterboxes, "mask")
        regions = codec.decode(text, letterboxes, video=True).regions
        parsed = Parsed("mask", fill_tracks(regions, len(letterboxes), codec.keyframes), "")
        images = [{"width": info.width, "height": info.height} for info in sample.images]
        target = {"regions": [region.to_json() for region in sample.regions]}
        metric.update([Prediction(sample.id, "", sample.task, "", text, parsed, None, images, target)])
        tokens, count = tokens + text.count("<"), count + len(numbers)
    return {**metric.compute(), "tokens": round(tokens / count, 1)}


def run_tracks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return a row for each distance of keyframes, points and sampler."""
    records = (record for record in read_records(args.file) if record.get("fields", {}).get("video"))
    samples = [Sample.from_json(record) for record in records]
    videos = [sample for sample in samples if any(region.rle for region in sample.regions)]
    if not videos:
        raise ValueError(f"expected videos with masks, got none among {len(samples)} videos")
    print(f"{args.file}: {len(videos)} videos\nkeyframes sampler points j_and_f j f tokens")
    rows = []
    for every, points, sampler in itertools.product(args.keyframes, args.points, args.sampler):
        codec = RegionCodec("tokens", args.num_bins, points, sampler, args.target_iou, keyframes=every)
        row = measure_tracks(videos, codec)
        rows.append({"keyframes": every, "sampler": sampler, "points": points, **row})
        print(*(round(v, 4) if isinstance(v, float) else v for v in rows[-1].values()), flush=True)
    return rows


def run_masks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return a row for each budget of points and each sampler."""
    read = list(read_masks(args.file))
    masks = [rle for rle in read if M.rle_to_mask(rle).any()]
    if not masks:
        raise ValueError(f"{args.file}: expected at least one mask that is not empty, got {len(read)} empty ones")
    M.load_compiled()  # before timing
    print(f"{args.file}: {len(masks)} masks, {len(read) - len(masks)} empty ones left out\n{COLUMNS}")
    rows = []
    for points, sampler in itertools.product(args.points, args.sampler):
        codec = RegionCodec("tokens", args.num_bins, points, sampler, args.target_iou)
        options = {"points": points, "sampler": sampler, "target_iou": args.target_iou, "num_bins": args.num_bins}
        rows.append(measure(masks, codec, options))
        print(*(rows[-1][c] for c in COLUMNS.split()), flush=True)
    return rows


def main() -> int:
    """Read, measure, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--points", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--sampler", nargs="+", default=list(M.SAMPLERS), choices=M.SAMPLERS)
    parser.add_argument("--keyframes", type=int, nargs="+", default=[], help="of videos: write every so many frames")
    parser.add_argument("--num-bins", type=int, default=1001)
    parser.add_argument("--target-iou", type=float, help="fewest points that reach this IoU, --points being the most")
    parser.add_argument("--out", type=Path, help="write the table here, with the IoU of every mask")
    args = parser.parse_args()
    try:
        rows = run_tracks(args) if args.keyframes else run_masks(args)
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        reason = str(error).partition("\n")[0].removeprefix(f"{args.file}: ")  # tarfile has a line per compression
        print(f"mask_ceiling: {args.file}: {type(error).__name__}: {reason}", file=sys.stderr)
        return 1
    if args.out:
        args.out.write_text(json.dumps({"file": args.file.name, "num_bins": args.num_bins, "rows": rows}))
    return 0


if __name__ == "__main__":
    cv2.setNumThreads(1)
    sys.exit(main())
