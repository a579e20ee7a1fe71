"""Photographs of one's own with a COCO-style JSON file -> REC, RES, GREC and GRES samples (docs/custom_data.md)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vistallm.coinit.sources.base import Draft, Reject, Source, SourceImage, SourceOptions, is_training
from vistallm.coinit.sources.records import Record, add_regions, read_object
from vistallm.regions.masks import rle_box
from vistallm.schema import Region

_KINDS = {"rec": "box", "res": "mask", "grec": "box", "gres": "mask"}
# How files write a box: four numbers, or four arrays -> (x0, y0, x1, y1).
_CONVENTIONS: dict[str, Callable[..., tuple[Any, Any, Any, Any]]] = {
    "xywh": lambda x, y, w, h: (x, y, x + w, y + h),
    "xyxy": lambda x0, y0, x1, y1: (x0, y0, x1, y1),
    "cxcywh": lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
    "yxhw": lambda y, x, h, w: (x, y, x + w, y + h),
    "yxyx": lambda y0, x0, y1, x1: (x0, y0, x1, y1),
}
_SLACK = 1.5  # pixels by which a box may leave its image, as annotation tools round
_FITTING = 0.98  # share of the boxes that fit when they are read by the right convention
_Objects = list[tuple[str, dict[str, Any]]]  # where each annotation is, and its values


def load_coco(options: SourceOptions) -> Source:
    """Objects with a category, or a phrase of their own, as referring expressions; a unit is one image.

    An object alone in its category is "the dog" (REC, RES); all of a category are "every dog" (GREC, GRES). A phrase
    stays as it is; one that several objects of an image share makes no REC or RES sample. A crowd is for GRES alone,
    as its box is not one object's.

    Raises:
        ValueError: for a setting, or boxes that fit their images or polygons by another convention only.
    """
    settings = options.read_settings(
        file="", tasks=list(_KINDS), phrase="", boxes=tuple(_CONVENTIONS), absent=0, holdout=0.0
    )
    split, phrase, absent = options.split, settings["phrase"], int(settings["absent"])
    names = [settings["file"]] if settings["file"] else [f"{split}.json", f"instances_{split}.json"]
    path = options.find_file(*names, folders=("", "annotations/"), hint="name your file with --set file=NAME")
    category, images, objects = _read_file(path, by_category=not phrase)
    if absent and (phrase or len(category) < 2):
        raise ValueError("--set absent: expected two categories or more and no phrases, as no phrase is known absent")
    _check_boxes(path, settings["boxes"], images, objects)
    tasks = settings["tasks"]
    if not any(values.get("segmentation") for some in objects.values() for _, values in some):
        tasks = [task for task in tasks if _KINDS[task] == "box"]
        print(f"{path}: no object has a mask; tasks: {', '.join(tasks) or 'none'}", file=sys.stderr)
    kept = [number for number in images if _is_kept(number, options, settings["holdout"])]

    def make(record: tuple[dict[str, Any], _Objects], _: int) -> Iterator[Draft | Reject]:
        info = Record(record[0], f"{path}, image {record[0]['id']}")
        image, groups = _image(options, info), dict[str, list[Record]]()
        for annotation in [Record(values, where) for where, values in record[1]]:
            _set_box(annotation, settings["boxes"], image)
            name = annotation.optional(phrase, str) or "" if phrase else category[annotation.data["category_id"]]
            groups.setdefault(name.strip(), []).append(annotation)
        if nameless := groups.pop("", []):
            yield Reject("empty-text", f"{nameless[0].where}: expected {phrase or 'name'!r} to be a text, got none")
        groups |= _absent_names(info, category, groups, absent, options.seed)
        for number in info.data.get("not_exhaustive_category_ids", ()):  # LVIS: its objects are not all annotated
            groups.pop(category.get(number, ""), None)
        for number, (name, group) in enumerate(groups.items()):
            texts = (name, name) if phrase else (f"the {name}", f"every {name}")
            yield from _drafts(f"coco-{split}-{info.data['id']}-{number}", texts, group, image, tasks)

    return Source(((images[number].data, objects[number]) for number in kept), make)


def _read_file(path: Path, by_category: bool) -> tuple[dict[int, str], dict[int, Record], dict[int, _Objects]]:
    """Names of categories, images, and the objects of each image, all by id."""
    data = read_object(path)
    category = {c.integer("id"): c.text("name").replace("_", " ") for c in data.records("categories")}
    images = {image.integer("id"): image for image in data.records("images")}
    objects: dict[int, _Objects] = {number: [] for number in images}
    for annotation in data.records("annotations"):
        keys: list[tuple[str, Any]] = [("image_id", images), ("category_id", category)]
        for key, known in keys[: 2 if by_category else 1]:
            if (number := annotation.integer(key)) not in known:
                raise annotation.fault(f"expected {key} of one of those listed, got {number}")
        objects[annotation.data["image_id"]].append((annotation.where, annotation.data))
    return category, images, objects


def _absent_names(
    info: Record, category: dict[int, str], present: dict[str, list[Record]], number: int, seed: int
) -> dict[str, list[Record]]:
    """Names of `number` categories that an image does not show, drawn; LVIS says which ones were looked for."""
    looked_for = info.data.get("neg_category_ids", category)
    names = [category[c] for c in looked_for if c in category and category[c] not in present]
    drawn = np.random.default_rng([seed, info.data["id"]]).permutation(names)[:number]
    return {name: [] for name in drawn.tolist()}


def _drafts(
    begin: str, texts: tuple[str, str], group: list[Record], image: SourceImage, tasks: list[str]
) -> Iterator[Draft | Reject]:
    """The samples of all objects of a name, from left to right; `texts` mean one of them and all."""
    crowd = any(annotation.data.get("iscrowd") for annotation in group)
    group = sorted(group, key=lambda a: 2 * a.data["bbox"][0] + a.data["bbox"][2])
    regions: dict[str, list[Region]] = {kind: [] for kind in {_KINDS[task] for task in tasks}}
    yield from add_regions(regions, group, image, f"{texts[1]!r} has box samples only")
    for task in tasks:
        several = task in ("grec", "gres")
        if _KINDS[task] in regions and (several or len(group) == 1) and (task == "gres" or not crowd):
            fields: dict[str, Any] = {"expr": texts[several]}
            fields |= {"targets": list(range(len(group)))} if several else {}
            yield image.draft(f"{begin}-{task}", task, "coco", fields=fields, regions=regions[_KINDS[task]])


def _image(options: SourceOptions, info: Record) -> SourceImage:
    """An image's file, under --images or --root; a name of COCO's gives COCO's id, by which leaks are seen."""
    file, split = info.optional("file_name", str), options.split
    file = file or "/".join(info.text("coco_url").split("/")[-2:])  # LVIS v1 has the URL only
    stem = Path(file).stem.rpartition("_")[2]
    path = options.image(file, f"images/{file}", f"{split}/{file}", Path(file).name)
    key = f"coco:{int(stem)}" if len(stem) == 12 and stem.isdigit() else f"custom:{file}"
    return SourceImage(path, key, info.integer("width"), info.integer("height"))


def _is_kept(number: int, options: SourceOptions, holdout: float) -> bool:
    """Whether an image is of the split; `holdout` is the share of a file's images that training splits lack."""
    held = np.random.default_rng([options.seed, number]).random() < holdout
    return not holdout or bool(held) != is_training(options.split)


def _set_box(annotation: Record, convention: str, image: SourceImage) -> None:
    """Write an object's box as [x, y, width, height], from its mask where it has none."""
    values = annotation.data
    values.setdefault("segmentation", [])
    if values.get("bbox") is None:
        x0, y0, x1, y1 = rle_box(annotation.mask(image.height, image.width))
    else:
        x0, y0, x1, y1 = _CONVENTIONS[convention](*annotation.values("bbox", int, float))
    values["bbox"] = [x0, y0, x1 - x0, y1 - y0]


def _check_boxes(path: Path, convention: str, images: dict[int, Record], objects: dict[int, _Objects]) -> None:
    """Raise ValueError for boxes that are shares of their image, or that fit by another convention only."""
    rows = []
    for number, some in objects.items():
        size = images[number].numbers("width", "height")
        for annotation in [Record(values, where) for where, values in some if values.get("bbox") is not None]:
            if len(sides := annotation.values("bbox", int, float)) != 4:
                raise annotation.fault(f"expected 'bbox' of four numbers, got {sides}")
            parts = annotation.data.get("segmentation") or ()
            points = [v for part in parts for v in part] if isinstance(parts, list) else []
            x, y = points[0::2] or [np.nan], points[1::2] or [np.nan]
            rows.append([*sides, *size, min(x), min(y), max(x), max(y)])
    if not rows:
        return
    table = np.array(rows, float).T  # (10, N): box, image size, extent of the polygons
    if (largest := table[:4].max()) <= 1:
        raise ValueError(
            f"{path}: expected boxes in pixels, got no number above {largest}: they look normalised; multiply x and "
            "width by the image's width, y and height by its height"
        )
    fits = {name: _fits(np.stack(read(*table[:4])), table[4:6], table[6:]) for name, read in _CONVENTIONS.items()}
    best = max(fits, key=lambda name: fits[name])
    if fits[convention] < _FITTING:
        text = f"{1 - fits[convention]:.0%} of {len(rows)} boxes do not fit their images or polygons as {convention}"
        if fits[best] >= _FITTING:
            raise ValueError(
                f"{path}: {text}, but {fits[best]:.0%} fit as {best}; look at some, and give --set boxes={best} if "
                "they are"
            )
        print(f"{path}: {text}; look at a sheet of tools/view_samples.py", file=sys.stderr)


def _fits(boxes: np.ndarray, sizes: np.ndarray, extents: np.ndarray) -> float:
    """Share of boxes (4, N) in their images (2, N) that overlap the extent of their polygons (4, N; or NaN) by half."""
    inside = (boxes[:2] >= -_SLACK) & (boxes[:2] < boxes[2:]) & (boxes[2:] <= sizes + _SLACK)
    shared = (np.minimum(boxes[2:], extents[2:]) - np.maximum(boxes[:2], extents[:2])).clip(0).prod(0)
    union = (boxes[2:] - boxes[:2]).prod(0) + (extents[2:] - extents[:2]).prod(0) - shared
    return float((inside.all(0) & ~(shared < union / 2)).mean())
