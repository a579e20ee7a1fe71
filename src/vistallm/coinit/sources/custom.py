"""A user's own data: `<root>/<split>.jsonl`, one sample per line, and image files -> drafts (docs/custom_data.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vistallm.coinit.images import image_size
from vistallm.coinit.sources.base import Draft, Reject, Source, SourceImage, SourceOptions, group_draft
from vistallm.coinit.sources.records import Record, parse_json
from vistallm.regions.masks import mask_to_rle, rle_area, segmentation_to_rle
from vistallm.schema import REGION_KINDS, Region, Rle
from vistallm.tasks import TASKS

_KEYS = ("id", "task", "images", "image_ids", "fields", "regions", "instruction", "answer", "meta")
_SHAPES = {"box": "box", "point": "point", "rle": "mask", "polygons": "mask", "mask": "mask"}  # key -> kind


def load_jsonl(options: SourceOptions) -> Source:
    """Samples as lines. Images lie under --images, or under --root; mask files under --root."""
    options.read_settings()
    path = options.find_file(f"{options.split}.jsonl", hint="check --root and --split")
    lines = [(number, line.strip()) for number, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]

    def make(line: tuple[int, bytes], _: int) -> Iterator[Draft | Reject]:
        where = f"{path}, line {line[0]}"
        yield _line_draft(options, Record(parse_json(line[1], where), where))

    return Source(iter(lines), make)


def _line_draft(options: SourceOptions, line: Record) -> Draft | Reject:
    """The sample of a line, or why it is left out; raises SourceFormatError when it is not as documented."""
    name, task = line.text("id"), line.text("task")
    _check_keys(line, _KEYS)
    if task not in TASKS:
        raise line.fault(f"expected a task of {', '.join(TASKS)}; got {task!r}")
    if not (names := line.values("images", str)):
        raise line.fault("expected 'images' to list at least one path, got none")
    ids = line.optional("image_ids", list) or [f"jsonl:{name}" for name in names]
    if len(ids) != len(names):
        raise line.fault(f"expected an entry in 'image_ids' per image, got {len(ids)}")
    paths = [options.image(name) for name in names]
    shapes = list(line.records("regions")) if line.optional("regions", list) else []
    try:
        sizes = [image_size(path) if shapes else (0, 0) for path in paths]
    except (OSError, ValueError) as error:
        return Reject("missing-image" if isinstance(error, OSError) else "broken-image", f"{line.where}: {error}")
    images = [SourceImage(path, str(i), *size) for path, i, size in zip(paths, ids, sizes, strict=True)]
    regions: list[Region] = []
    for number, shape in enumerate(shapes):
        if isinstance(region := _read_region(shape, number, images, options.root), Reject):
            return region
        regions.append(region)
    meta = {key: value for key, value in (line.optional("meta", dict) or {}).items() if key != "image_ids"}
    texts = {key: line.optional(key, str) for key in ("instruction", "answer")}
    name, fields = f"jsonl-{options.split}-{name}", line.optional("fields", dict) or {}
    return group_draft(images, name, task, "jsonl", meta, fields=fields, regions=regions, **texts)


def _read_region(shape: Record, number: int, images: list[SourceImage], root: Path) -> Region | Reject:
    """A region of a line: given by one or several of _SHAPES, in pixels of its image."""
    _check_keys(shape, ("image", "object", "kind", *_SHAPES))
    data = shape.data
    index = int(data.get("image", 0))
    if not 0 <= index < len(images):
        raise shape.fault(f"expected 'image' from 0 to {len(images) - 1}, got {index}")
    given = [key for key in _SHAPES if key in data]
    if not given:
        raise shape.fault(f"expected one of {', '.join(_SHAPES)}, got {', '.join(data)}")
    kind = data.get("kind", _SHAPES[given[-1]])
    if kind not in REGION_KINDS or kind not in {_SHAPES[key] for key in given}:
        raise shape.fault(f"expected a 'kind' that the region gives ({', '.join(given)}), got {kind!r}")
    region, image = Region(index, kind, int(data.get("object", number))), images[index]
    try:
        if "box" in given:
            if isinstance(box := image.cut(_numbers(data["box"], 4), shape.where), Reject):
                return box
            region.box = box
        if "point" in given:
            x, y = _numbers(data["point"], 2)
            region.point = (min(max(x, 0.0), float(image.width)), min(max(y, 0.0), float(image.height)))
        if "rle" in given or "polygons" in given:
            segmentation = data["rle"] if "rle" in given else data["polygons"]
            region.rle = segmentation_to_rle(segmentation, image.height, image.width)
        elif "mask" in given:
            region.rle = _read_mask(root / data["mask"], image)
    except (TypeError, ValueError) as error:
        raise shape.fault(str(error)) from error
    return region if region.rle is None or rle_area(region.rle) else Reject("empty-mask", shape.where)


def _read_mask(path: Path, image: SourceImage) -> Rle:
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED) if path.is_file() else None
    if pixels is None or pixels.shape[:2] != (image.height, image.width):
        got = "none" if pixels is None else f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise ValueError(f"expected a mask image {path} of {image.width} x {image.height} pixels, got {got}")
    return mask_to_rle(pixels if pixels.ndim == 2 else np.asarray(pixels[:, :, :3].any(2)))


def _check_keys(record: Record, known: tuple[str, ...]) -> None:
    if unknown := sorted(set(record.data) - set(known)) if isinstance(record.data, dict) else [str(record.data)[:80]]:
        raise record.fault(f"expected keys of {', '.join(known)}; got {', '.join(unknown)}")


def _numbers(value: Any, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count or not np.isfinite(value).all():
        raise ValueError(f"expected {count} numbers (pixels), got {str(value)[:80]}")
    return tuple(float(v) for v in value)
