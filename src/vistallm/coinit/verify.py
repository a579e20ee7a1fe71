"""The check of a shard folder: hashes, records, images, regions and texts; in: a folder, out: counts and faults."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from vistallm.coinit.shards import read_index, read_shard
from vistallm.coinit.tasks import TASKS, RegionSlot, render, split_placeholders
from vistallm.schema import Region, Sample


@dataclass
class Report:
    """Samples per split and task, and one line per fault (empty = sound)."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def verify(root: Path | str) -> Report:
    """Read every byte of a shard folder and list what is wrong; raises ValueError only when there is no index."""
    root, report = Path(root), Report()
    index = read_index(root)
    listed = index["shards"]
    report.faults += [f"{p.name}: not in index.json" for p in sorted(root.glob("*.tar")) if p.name not in listed]
    seen: dict[str, str] = {}
    for name, row in listed.items():
        report.faults += [f"{name}: {fault}" for fault in _check_shard(root / name, row, report, seen)]
    return report


def _check_shard(path: Path, row: dict[str, Any], report: Report, seen: dict[str, str]) -> Iterator[str]:
    if not path.is_file():
        yield "listed in index.json, but there is no such file"
        return
    data = path.read_bytes()
    if len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
        yield f"bytes differ from the index ({len(data)} bytes, {row['bytes']} listed); build the shard again"
    counts: Counter[str] = Counter()
    try:
        for sample, images in read_shard(path):
            counts[sample.task] += 1
            if sample.id in seen:
                yield f"sample {sample.id}: the same id is in {seen[sample.id]}"
            seen[sample.id] = path.name
            for fault in check_sample(sample, images):
                yield f"sample {sample.id}: {fault}"
    except (ValueError, OSError) as error:  # tarfile's errors are OSErrors
        yield str(error)
    if counts != Counter(row["tasks"]) or counts.total() != row["samples"]:
        yield f"holds {dict(sorted(counts.items()))}, the index says {row['tasks']}"
    report.counts.setdefault(row["split"], Counter()).update(counts)


def check_sample(sample: Sample, images: list[bytes]) -> Iterator[str]:
    """Faults of one sample: task, image sizes, regions inside their image, placeholders that refer to objects."""
    if sample.task not in TASKS:
        yield f"unknown task {sample.task!r}; known: {', '.join(TASKS)}"
        return
    for info, data in zip(sample.images, images, strict=True):
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            yield f"image {info.file} does not decode"
        elif pixels.shape[:2] != (info.height, info.width):
            got = f"{pixels.shape[1]} x {pixels.shape[0]}"
            yield f"image {info.file} is {got}, its record says {info.width} x {info.height}"
    for region in sample.regions:
        size = sample.images[region.image]
        fault = _region_fault(region, size.width, size.height)
        if fault:
            yield f"region of object {region.object}: {fault}"
    yield from _text_faults(sample)


def _region_fault(region: Region, width: int, height: int) -> str | None:
    if region.box is not None:
        x0, y0, x1, y1 = region.box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            return f"box {region.box} is not inside 0..{width} x 0..{height}"
    if region.point is not None and not (0 <= region.point[0] <= width and 0 <= region.point[1] <= height):
        return f"point {region.point} is not inside 0..{width} x 0..{height}"
    if region.rle is None:
        return None
    if list(region.rle.get("size", ())) != [height, width] or not isinstance(region.rle.get("counts"), str):
        return f"rle: expected size {[height, width]} and text counts, got size {region.rle.get('size')}"
    return None if coco_mask.area(region.rle) > 0 else "rle holds no pixel"


def _text_faults(sample: Sample) -> Iterator[str]:
    """The evaluation template must fill, and every placeholder must name an object that has a region."""
    try:
        texts = render(sample, template=0)
        slots = [part for text in texts for part in split_placeholders(text) if isinstance(part, RegionSlot)]
    except ValueError as error:
        yield str(error)
        return
    objects = {region.object for region in sample.regions}
    for slot in slots:
        missing = [number for number in slot.objects if number not in objects]
        if missing:
            yield f"a placeholder names object {missing[0]}, the regions are of {sorted(objects) or 'none'}"
    for text, name in zip(texts, ("instruction", "answer"), strict=True):
        if not text.strip():
            yield f"the {name} is empty"
