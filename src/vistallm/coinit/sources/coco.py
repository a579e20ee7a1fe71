"""Photographs of one's own with a COCO-style JSON file -> REC, RES, GREC and GRES samples, and those of links.

The tasks of links are detection, instance and semantic segmentation, counting, interactive segmentation and keypoints
(docs/custom_data.md).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vistallm.coinit.sources.base import Draft, Reject, Source, SourceImage, SourceOptions, is_training
from vistallm.coinit.sources.records import Record, add_regions, read_object
from vistallm.regions.masks import merge_rles, rle_area, rle_box
from vistallm.schema import PROMPT_SHAPES, Region
from vistallm.tasks import list_objects

_KINDS = {"rec": "box", "res": "mask", "grec": "box", "gres": "mask"}
_LINK_KINDS = {"det": "box", "insseg": "mask", "semseg": "mask", "count": "box", "interactive": "mask", "pose": "box"}
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


@dataclass
class _Group:
    """The objects of an image that have one name, from left to right."""

    begin: str  # of the ids of its samples
    name: str
    annotations: list[Record]
    regions: dict[str, list[Region]]  # of all of them, by kind; without a kind that one of them lacks

    @property
    def crowd(self) -> bool:
        """Whether a box among them covers several objects."""
        return any(annotation.data.get("iscrowd") for annotation in self.annotations)


def load_coco(options: SourceOptions) -> Source:
    """Objects with a category, or a phrase of their own, as referring expressions; a unit is one image.

    An object alone in its category is "the dog" (REC, RES); all of a category are "every dog" (GREC, GRES). A phrase
    stays as it is; one that several objects of an image share makes no REC or RES sample. A crowd is for GRES and
    semantic segmentation alone, as its box is not one object's.

    Raises:
        ValueError: for a setting, or boxes that fit their images or polygons by another convention only.
    """
    settings = options.read_settings(
        file="", tasks=[*_KINDS, *_LINK_KINDS], phrase="", boxes=tuple(_CONVENTIONS), absent=0, holdout=0.0
    )
    split, phrase, absent = options.split, settings["phrase"], int(settings["absent"])
    names = [settings["file"]] if settings["file"] else [f"{split}.json", f"instances_{split}.json"]
    path = options.find_file(*names, folders=("", "annotations/"), hint="name your file with --set file=NAME")
    category, keypoints, images, objects = _read_file(path, by_category=not phrase)
    tasks = settings["tasks"] if "tasks" in options.settings else list(_KINDS)
    if phrase and (named := [task for task in tasks if task in _LINK_KINDS]):
        raise ValueError(f"--set tasks={','.join(named)}: expected categories, as these list names; got phrases")
    if "pose" in tasks and not keypoints:
        raise ValueError(f"{path}: --set tasks=pose: expected a category with names of 'keypoints', got none")
    if absent and (phrase or len(category) < 2):
        raise ValueError("--set absent: expected two categories or more and no phrases, as no phrase is known absent")
    _check_boxes(path, settings["boxes"], images, objects)
    kinds = _KINDS | _LINK_KINDS
    if not any(values.get("segmentation") for some in objects.values() for _, values in some):
        tasks = [task for task in tasks if kinds[task] == "box"]
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
        begin, ready = f"coco-{split}-{info.data['id']}", list[_Group]()
        for number, (name, group) in enumerate(groups.items()):
            texts = (name, name) if phrase else (f"the {name}", f"every {name}")
            regions: dict[str, list[Region]] = {kind: [] for kind in {kinds[task] for task in tasks}}
            group.sort(key=lambda a: 2 * a.data["bbox"][0] + a.data["bbox"][2])
            yield from add_regions(regions, group, image, f"{texts[1]!r} has box samples only")
            ready.append(_Group(f"{begin}-{number}", name, group, regions))
            yield from _drafts(ready[-1], texts, image, tasks)
        yield from _link_drafts(
            begin, ready, keypoints, image, tasks, np.random.default_rng([options.seed, 1, info.integer("id")])
        )

    return Source(((images[number].data, objects[number]) for number in kept), make)


def _read_file(
    path: Path, by_category: bool
) -> tuple[dict[int, str], dict[str, list[str]], dict[int, Record], dict[int, _Objects]]:
    """Names of categories, images, and the objects of each image, all by id; names of keypoints by category name."""
    data = read_object(path)
    category = {c.integer("id"): c.text("name").replace("_", " ") for c in data.records("categories")}
    keypoints = {
        category[c.data["id"]]: [name.replace("_", " ") for name in c.values("keypoints", str)]
        for c in data.records("categories")
        if c.optional("keypoints", list)
    }
    images = {image.integer("id"): image for image in data.records("images")}
    objects: dict[int, _Objects] = {number: [] for number in images}
    for annotation in data.records("annotations"):
        keys: list[tuple[str, Any]] = [("image_id", images), ("category_id", category)]
        for key, known in keys[: 2 if by_category else 1]:
            if (number := annotation.integer(key)) not in known:
                raise annotation.fault(f"expected {key} of one of those listed, got {number}")
        objects[annotation.data["image_id"]].append((annotation.where, annotation.data))
    return category, keypoints, images, objects


def _absent_names(
    info: Record, category: dict[int, str], present: dict[str, list[Record]], number: int, seed: int
) -> dict[str, list[Record]]:
    """Names of `number` categories that an image does not show, drawn; LVIS says which ones were looked for."""
    looked_for = info.data.get("neg_category_ids", category)
    names = [category[c] for c in looked_for if c in category and category[c] not in present]
    drawn = np.random.default_rng([seed, info.data["id"]]).permutation(names)[:number]
    return {name: [] for name in drawn.tolist()}


def _drafts(group: _Group, texts: tuple[str, str], image: SourceImage, tasks: list[str]) -> Iterator[Draft]:
    """The samples of referring expressions of a group; `texts` mean one of its objects and all."""
    for task in [task for task in tasks if task in _KINDS]:
        several, one = task in ("grec", "gres"), len(group.annotations) == 1
        if _KINDS[task] in group.regions and (several or one) and (task == "gres" or not group.crowd):
            fields: dict[str, Any] = {"expr": texts[several]}
            fields |= {"targets": list(range(len(group.annotations)))} if several else {}
            regions = group.regions[_KINDS[task]]
            yield image.draft(f"{group.begin}-{task}", task, "coco", fields=fields, regions=regions)


def _link_drafts(
    begin: str,
    groups: list[_Group],
    keypoints: dict[str, list[str]],
    image: SourceImage,
    tasks: list[str],
    rng: np.random.Generator,
) -> Iterator[Draft]:
    """The samples of links: lists of all names of the image in random order, then those of each name."""
    for task in [task for task in tasks if task in ("det", "insseg", "semseg")]:
        usable = [g for g in groups if _LINK_KINDS[task] in g.regions and (task == "semseg" or not g.crowd)]
        usable = [usable[i] for i in rng.permutation(len(usable))]
        if usable:
            names = ", ".join(_plain(group.name) for group in usable)
            yield _listing(f"{begin}-{task}", task, {"names": names}, usable, image)
    for group in [group for group in groups if not group.crowd]:
        if "count" in tasks and "box" in group.regions:
            fields = {"expr": f"instances of {_plain(group.name)}"}
            yield _listing(f"{group.begin}-count", "count", fields, [group], image)
        if "interactive" in tasks and (masks := group.regions.get("mask")):
            shape = PROMPT_SHAPES[rng.integers(len(PROMPT_SHAPES))]
            region, fields = masks[rng.integers(len(masks))], {"prompt": f"{{region:0:{shape}}}"}
            draft = (f"{group.begin}-interactive", "interactive", "coco", {"prompt": shape})
            yield image.draft(*draft, fields=fields, regions=[replace(region, object=0)])
        posed = any(any((annotation.data.get("keypoints") or ())[2::3]) for annotation in group.annotations)
        if "pose" in tasks and posed and "box" in group.regions and (points := keypoints.get(group.name)):
            fields = {"expr": _plain(group.name), "points": ", ".join(points)}
            yield _listing(f"{group.begin}-pose", "pose", fields, [group], image, points)


def _listing(
    name: str, task: str, fields: dict[str, Any], groups: list[_Group], image: SourceImage, points: Sequence[str] = ()
) -> Draft:
    """A sample that lists the objects of groups; with `points`, keypoints of those names."""
    kind, found = _LINK_KINDS[task], list[tuple[str, list[Region]]]()
    for group in groups:
        first, regions = sum(len(regions) for _, regions in found), group.regions[kind]
        if task == "semseg" and regions:
            regions = [Region(0, "mask", rle=merge_rles([region.rle for region in regions if region.rle is not None]))]
        if points:
            regions = [_posed(*pair, len(points), image) for pair in zip(group.annotations, regions, strict=True)]
        regions = [replace(region, object=first + i, label=_plain(group.name)) for i, region in enumerate(regions)]
        found.append((_plain(group.name), regions))
    listed = list_objects(found, "keypoints" if points else kind)
    fields = fields | {"found": listed + "".join(f", {word} {{point:{i}}}" for i, word in enumerate(points))}
    return image.draft(
        name, task, "coco", fields=fields, regions=[region for _, regions in found for region in regions]
    )


def _posed(annotation: Record, region: Region, number: int, image: SourceImage) -> Region:
    """A box region with its keypoints, which are not labelled where the annotation has none, and its mask."""
    values = annotation.values("keypoints", int, float) if annotation.data.get("keypoints") else [0] * 3 * number
    if len(values) != 3 * number or not {*values[2::3]} <= {0, 1, 2}:
        raise annotation.fault(f"expected 'keypoints' of {number} times x, y and 0, 1 or 2, got {values}")
    # COCO's integers name pixels, whose centres are half a pixel on, as in Detectron2's reader.
    triples = zip(values[0::3], values[1::3], values[2::3], strict=True)
    points = tuple(
        (min(max(x + 0.5, 0.0), image.width), min(max(y + 0.5, 0.0), image.height), v) if v else (0.0, 0.0, 0)
        for x, y, v in triples
    )
    rle = annotation.mask(image.height, image.width) if annotation.data["segmentation"] else None
    return replace(region, kind="keypoints", keypoints=points, rle=rle if rle and rle_area(rle) else None)


def _plain(name: str) -> str:
    """A category's name without the marks that divide the items of a list."""
    return re.sub(r"[][,.:{}]", "", name)


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
