"""Image files of a dataset and boxes in them -> drafts of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistallm.coinit.sources.base import Draft, Reject
from vistallm.coinit.sources.records import Record
from vistallm.regions.masks import rle_area
from vistallm.schema import ImageInfo, Region, Sample

Box = tuple[float, float, float, float]


def first_file(folder: Path, *names: str) -> Path:
    """The first of the named files that is in `folder`, else the first name (the build reports it as missing)."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def coco_image(folder: Path, name: str) -> Path:
    """A COCO 2014/2015 image such as "COCO_train2014_000000000009.jpg", in `folder` or its subfolder of that year."""
    subset = name.split("_")[1] if name.count("_") >= 2 else ""
    return first_file(folder, name, f"{subset}/{name}")


@dataclass(frozen=True)
class SourceImage:
    """An image of a dataset: file, id that leaks are searched by ("coco:9"), size where the annotations have it."""

    path: Path
    image_id: str
    width: int = 0
    height: int = 0

    def draft(self, name: str, task: str, source: str, meta: dict[str, Any] | None = None, **more: Any) -> Draft:
        """A sample of this image alone; `more` are further fields of `Sample`."""
        info, meta = ImageInfo("", self.width, self.height), {"image_ids": [self.image_id], **(meta or {})}
        return Draft(Sample(name, task, source, [info], meta=meta, **more), [self.path])

    def cut(self, box: Sequence[float], where: str) -> Box | Reject:
        """(x0, y0, x1, y1) in pixels, cut to the image; a Reject, `empty-box`, when nothing is left."""
        x0, y0, x1, y1 = box
        x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(self.width)), min(y1, float(self.height))
        # Shards keep three decimals, so a thinner box would be empty in them.
        if x1 - x0 >= 0.001 and y1 - y0 >= 0.001:
            return x0, y0, x1, y1
        return Reject("empty-box", f"{where}: nothing of {list(box)} is in the image, {self.width} x {self.height}")


def group_draft(
    images: list[SourceImage], name: str, task: str, source: str, meta: dict[str, Any], **more: Any
) -> Draft:
    """A sample of several images; `more` are further fields of `Sample`."""
    infos = [ImageInfo("", image.width, image.height) for image in images]
    meta = {**meta, "image_ids": [image.image_id for image in images]}
    return Draft(Sample(name, task, source, infos, meta=meta, **more), [image.path for image in images])


def corners(x: float, y: float, width: float, height: float) -> Box:
    """A box as most datasets write it -> (x0, y0, x1, y1)."""
    return x, y, x + width, y + height


def add_regions(
    regions: dict[str, list[Region]], annotations: list[Record], image: SourceImage, note: str
) -> Iterator[Reject]:
    """Add the regions of COCO annotations to the lists of `regions`, by kind ("box", "mask"); yield what is wrong.

    A kind that one of the objects lacks is removed from `regions`; `note` ends the message of a missing mask.
    """
    kinds = set(regions)
    for number, annotation in enumerate(annotations):
        if "box" in kinds:
            box = image.cut(corners(*annotation.data["bbox"]), annotation.where)
            if isinstance(box, Reject):
                yield box
                regions.pop("box", None)
            elif "box" in regions:
                regions["box"].append(Region(0, "box", number, box=box))
        if "mask" in kinds:
            rle, parts = annotation.mask(image.height, image.width), annotation.data["segmentation"]
            short = sum(isinstance(part, list) and len(part) < 6 for part in parts) if isinstance(parts, list) else 0
            yield from [Reject("short-polygon", annotation.where)] * short  # under three points: it draws nothing
            if not rle_area(rle):
                yield Reject("empty-mask", f"{annotation.where}: {note}")
                regions.pop("mask", None)
            elif "mask" in regions:
                regions["mask"].append(Region(0, "mask", number, rle=rle))
