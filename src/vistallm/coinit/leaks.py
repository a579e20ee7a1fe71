"""Image ids of shards: which images evaluation splits hold, and which training samples use one of them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from vistallm.coinit.shards import read_index
from vistallm.schema import Sample


def is_training(split: str) -> bool:
    """Whether a split is trained on: "train", "train2014", ...; every other one is kept for evaluation."""
    return split.startswith("train")


def sample_images(sample: Sample) -> set[str]:
    """Ids of a sample's images; one that is in two datasets has both ("vg:1|coco:5" is two ids)."""
    return {part for name in sample.meta.get("image_ids", []) for part in str(name).split("|")}


def read_ids(path: Path) -> frozenset[str]:
    """Image ids of a file, one or several joined by "|" per line; raises ValueError for an empty file."""
    lines = path.read_text(encoding="utf-8").split()
    if not lines:
        raise ValueError(f"{path}: expected image ids such as coco:581857, one per line, got an empty file")
    return frozenset(part for line in lines for part in line.split("|"))


def records(shard: Path) -> Iterator[dict]:
    """JSON records of a shard; the images are skipped, not read."""
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".json"):
                file = tar.extractfile(member)
                assert file is not None
                yield json.loads(file.read())


def evaluation_images(folders: list[Path]) -> set[str]:
    """Ids of all images in evaluation splits of shard folders."""
    found: set[str] = set()
    for folder in folders:
        for name, row in read_index(folder)["shards"].items():
            if not is_training(row["split"]):
                for record in records(folder / name):
                    found |= sample_images(Sample.from_json(record))
    return found
