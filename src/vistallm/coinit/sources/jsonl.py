"""A user's own data: `<root>/<split>.jsonl`, one sample per line, and image files -> drafts (docs/custom_data.md).

Lines are read when asked for, so memory does not grow with the file. Paths of images lie under `--images`, or under the
root; paths of mask files under the root.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from vistallm.coinit.images import image_size
from vistallm.coinit.sources.base import Draft, Reject, SourceOptions
from vistallm.coinit.sources.records import Record
from vistallm.coinit.sources.shapes import clip_box, rle_area, segmentation_to_rle
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import REGION_KINDS, ImageInfo, Region, Sample
from vistallm.tasks import TASKS

_KEYS = ("id", "task", "images", "image_ids", "fields", "regions", "instruction", "answer", "meta")
_SHAPES = {"box": "box", "point": "point", "rle": "mask", "polygons": "mask", "mask": "mask"}  # key -> kind
_REGION_KEYS = ("image", "object", "kind", *_SHAPES)


def load_jsonl(options: SourceOptions) -> JsonLines:
    """Find the lines of `<root>/<split>.jsonl`; raises ValueError when it is missing or empty."""
    if options.settings:
        raise ValueError(f"jsonl has no --set options, got {', '.join(options.settings)}")
    return JsonLines(options)


class JsonLines:
    """A unit is a line; its number in messages counts from 1, as editors do."""

    def __init__(self, options: SourceOptions) -> None:
        self.options, self.path = options, options.root / f"{options.split}.jsonl"
        if not self.path.is_file() or not self.path.stat().st_size:
            raise ValueError(f"expected samples in {self.path}, which is missing or empty; check --root and --split")
        with self.path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.numbers, self.starts, start = array("q"), array("q"), 0
        for number, line in enumerate(iter(self.data.readline, b""), 1):
            if line.strip():
                self.numbers.append(number)
                self.starts.append(start)
            start += len(line)
        self.starts.append(start)

    def __len__(self) -> int:
        return len(self.numbers)

    def unit(self, index: int) -> Iterator[Draft | Reject]:
        """The sample of a line, or why it is left out; raises SourceFormatError when it is not as documented."""
        line = Record(None, f"{self.path}, line {self.numbers[index]}")
        try:
            value = json.loads(self.data[self.starts[index] : self.starts[index + 1]].strip())
        except ValueError as error:
            raise line.fault(f"not JSON ({error})") from error
        yield self._draft(replace(line, data=value))

    def _draft(self, line: Record) -> Draft | Reject:
        name, task = line.text("id"), line.text("task")
        _check_keys(line, _KEYS)
        if task not in TASKS:
            raise line.fault(f"expected a task of {', '.join(TASKS)}; got {task!r}")
        names = line.optional("images", list) or []
        if not names or not all(isinstance(name, str) for name in names):
            raise line.fault(f"expected 'images' to list at least one path, got {str(names)[:80]}")
        ids = line.optional("image_ids", list) or [f"jsonl:{name}" for name in names]
        if len(ids) != len(names):
            raise line.fault(f"expected an entry in 'image_ids' per image, got {len(ids)}")
        paths = [self.options.image_folder / name for name in names]
        shapes = list(line.records("regions", "region")) if line.optional("regions", list) else []
        try:
            sizes = [image_size(path) if shapes else (0, 0) for path in paths]
        except OSError as error:
            return Reject("missing-image", f"{line.where}: {error}")
        except ValueError as error:
            return Reject("broken-image", f"{line.where}: {error}")
        regions: list[Region] = []
        for number, shape in enumerate(shapes):
            region = self._region(shape, number, sizes)
            if isinstance(region, Reject):
                return region
            regions.append(region)
        sample = Sample(
            f"jsonl-{self.options.split}-{name}",
            task,
            "jsonl",
            [ImageInfo("", *size) for size in sizes],
            instruction=line.optional("instruction", str),
            answer=line.optional("answer", str),
            fields=line.optional("fields", dict) or {},
            regions=regions,
            meta={**(line.optional("meta", dict) or {}), "image_ids": [str(image_id) for image_id in ids]},
        )
        return Draft(sample, paths)

    def _region(self, shape: Record, number: int, sizes: list[tuple[int, int]]) -> Region | Reject:
        """A region of a line: given by one or several of _SHAPES, in pixels of its image."""
        _check_keys(shape, _REGION_KEYS)
        data = shape.data
        image = int(data.get("image", 0))
        if not 0 <= image < len(sizes):
            raise shape.fault(f"expected 'image' from 0 to {len(sizes) - 1}, got {image}")
        given = [key for key in _SHAPES if key in data]
        if not given:
            raise shape.fault(f"expected one of {', '.join(_SHAPES)}, got {', '.join(data)}")
        kind = data.get("kind", _SHAPES[given[-1]])
        if kind not in REGION_KINDS or kind not in {_SHAPES[key] for key in given}:
            raise shape.fault(f"expected a 'kind' that the region gives ({', '.join(given)}), got {kind!r}")
        region = Region(image, kind, int(data.get("object", number)))
        width, height = sizes[image]
        try:
            if "box" in given:
                region.box = clip_box(_numbers(data["box"], 4), width, height)
            if "point" in given:
                x, y = _numbers(data["point"], 2)
                region.point = (min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height)))
            region.rle = self._mask(data, height, width)
        except (TypeError, ValueError) as error:
            raise shape.fault(str(error)) from error
        if "box" in given and region.box is None:
            return Reject("empty-box", f"{shape.where}: {data['box']} has no area in {width} x {height}")
        if region.rle is not None and not rle_area(region.rle):
            return Reject("empty-mask", shape.where)
        return region

    def _mask(self, shape: dict[str, Any], height: int, width: int) -> dict[str, Any] | None:
        if "rle" in shape or "polygons" in shape:
            return segmentation_to_rle(shape["rle"] if "rle" in shape else shape["polygons"], height, width)
        if "mask" not in shape:
            return None
        path = self.options.root / shape["mask"]
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED) if path.is_file() else None
        if pixels is None or pixels.shape[:2] != (height, width):
            got = "none" if pixels is None else f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise ValueError(f"expected a mask image {path} of {width} x {height} pixels, got {got}")
        return mask_to_rle(pixels if pixels.ndim == 2 else np.asarray(pixels[:, :, :3].any(2)))


def _check_keys(record: Record, known: tuple[str, ...]) -> None:
    if not isinstance(record.data, dict):
        raise record.fault(f"expected keys of {', '.join(known)}; got {str(record.data)[:80]}")
    if unknown := sorted(set(record.data) - set(known)):
        raise record.fault(f"expected keys of {', '.join(known)}; got {', '.join(unknown)}")


def _numbers(value: Any, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count or not np.isfinite(value).all():
        raise ValueError(f"expected {count} numbers (pixels), got {str(value)[:80]}")
    return tuple(float(v) for v in value)
