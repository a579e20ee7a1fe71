"""COCO captions, by Karpathy's split (`dataset_coco.json`) or the official files (`captions_{train,val}<year>.json`).

In: one JSON file; out: `caption` samples. Training has one sample per caption, evaluation one per image with all its
captions as references. A unit is one image.

Settings: `annotations=karpathy|official`; `year=2014|2017` for the official files. Karpathy's `restval` (images of
val2014 that are in neither his val nor his test split) counts as train, as it does in the papers that use the split.
The two must not be mixed: official val2014 holds images of Karpathy's training split and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vistallm.coinit.sources.base import (
    Draft,
    Packed,
    Reject,
    Source,
    SourceFormatError,
    SourceOptions,
    read_json,
    require,
)
from vistallm.coinit.sources.records import (
    RecordSource,
    check_split,
    find_file,
    image_file,
    read_settings,
    require_list,
)
from vistallm.schema import ImageInfo, Sample

_Captioned = tuple[int, str, tuple[int, int], list[str]]
"""image_id, the image's file, (width, height) or (0, 0) where the annotations do not say, and its captions."""


def load_coco_caption(options: SourceOptions) -> Source:
    """COCO captions; splits train, val and (Karpathy only) test."""
    settings = read_settings(options, annotations=("karpathy", "official"), year=("2014", "2017"))
    if settings["annotations"] == "official":
        check_split(options, "train", "val")
        name = f"captions_{options.split}{settings['year']}.json"
        path = find_file(options.root, name, f"annotations/{name}")
        records = _read_official(path, f"{options.split}{settings['year']}")
    else:
        check_split(options, "train", "val", "test")
        path = find_file(options.root, "dataset_coco.json", "karpathy/dataset_coco.json")
        records = _read_karpathy(path, ("train", "restval") if options.split == "train" else (options.split,))
    folder = options.images or options.root

    def make(record: _Captioned, _: int) -> Iterator[Draft | Reject]:
        image_id, file, size, written = record
        captions = [caption for caption in written if caption]
        if not captions or len(captions) < len(written):
            yield Reject("empty-text", f"{path}, image {image_id}: a caption without a word, or none")
        image = image_file(folder, file, file.rpartition("/")[2])
        for place, caption in enumerate(captions if options.split == "train" else captions[:1]):
            values: dict[str, Any] = {"caption": caption}
            if options.split != "train":
                values["answers"] = captions
            key, meta = f"coco-caption-{options.split}-{image_id}-{place}", {"image_ids": [f"coco:{image_id}"]}
            yield Draft(
                Sample(key, "caption", "coco-caption", [ImageInfo("", *size)], fields=values, meta=meta), [image]
            )

    return RecordSource(Packed(records), make)


def _read_official(path: Path, folder: str) -> list[_Captioned]:
    data, found = read_json(path), dict[int, _Captioned]()
    for number, image in enumerate(require(data, "images", list, str(path))):
        where = f"{path}, images {number}"
        image_id = require(image, "id", int, where)
        size = (int(image.get("width", 0)), int(image.get("height", 0)))
        found[image_id] = (image_id, f"{folder}/{require(image, 'file_name', str, where)}", size, [])
    for number, annotation in enumerate(require(data, "annotations", list, str(path))):
        where = f"{path}, annotations {number}"
        image_id = require(annotation, "image_id", int, where)
        if image_id not in found:
            raise SourceFormatError(f"{where}: expected image_id of one of the images listed, got {image_id}")
        found[image_id][3].append(_clean(require(annotation, "caption", str, where)))
    return list(found.values())


def _read_karpathy(path: Path, splits: tuple[str, ...]) -> list[_Captioned]:
    data, found = read_json(path), []
    for number, image in enumerate(require(data, "images", list, str(path))):
        where = f"{path}, images {number}"
        if require(image, "split", str, where) in splits:
            file = f"{require(image, 'filepath', str, where)}/{require(image, 'filename', str, where)}"
            captions = [_clean(require(s, "raw", str, where)) for s in require_list(image, "sentences", dict, where)]
            found.append((require(image, "cocoid", int, where), file, (0, 0), captions))
    return found


def _clean(caption: str) -> str:
    return " ".join(caption.split())  # some captions hold line breaks
