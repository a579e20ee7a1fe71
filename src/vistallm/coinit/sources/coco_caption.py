"""COCO captions, by Karpathy's split (`dataset_coco.json`) or the official files (`captions_{train,val}<year>.json`).

In: one JSON file; out: `caption` samples. Training has one sample per caption, evaluation one per image with all its
captions as references. A unit is one image.

Settings: `annotations=karpathy|official`; `year=2014|2017` for the official files. Karpathy's `restval` (images of
val2014 that are in neither his val nor his test split) counts as train, as it does in the papers that use the split.
The two must not be mixed: official val2014 holds images of Karpathy's training split and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vistallm.coinit.sources.base import Draft, Reject, Source, SourceFormatError, SourceOptions, read_json, require
from vistallm.coinit.sources.records import (
    RecordSource,
    check_split,
    coco_image,
    find_file,
    image_file,
    read_settings,
    require_list,
)
from vistallm.schema import ImageInfo, Sample


@dataclass(frozen=True)
class _Captioned:
    image_id: int
    file: tuple[str, ...]  # folder of the image, if the annotations tell, and its name
    size: tuple[int, int]  # width, height; 0, 0 = the annotations do not say
    captions: list[str]


def load_coco_caption(options: SourceOptions) -> Source:
    """COCO captions; splits train, val and (Karpathy only) test."""
    settings = read_settings(options, annotations=("karpathy", "official"), year=("2014", "2017"))
    if settings["annotations"] == "official":
        check_split(options, "train", "val")
        name = f"captions_{options.split}{settings['year']}.json"
        records = _read_official(find_file(options.root, name, f"annotations/{name}"))
    else:
        check_split(options, "train", "val", "test")
        path = find_file(options.root, "dataset_coco.json", "karpathy/dataset_coco.json")
        records = _read_karpathy(path, ("train", "restval") if options.split == "train" else (options.split,))
    folder = options.images or options.root

    def make(record: _Captioned, _: int) -> Iterator[Draft | Reject]:
        name = record.file[-1]
        image = image_file(folder, "/".join(record.file), name) if len(record.file) > 1 else coco_image(folder, name)
        captions = [caption for caption in record.captions if caption]
        if len(captions) < len(record.captions):
            yield Reject("empty-text", f"image {record.image_id}: a caption without a word")
        for place, caption in enumerate(captions if options.split == "train" else captions[:1]):
            values = {"caption": caption} if options.split == "train" else {"caption": caption, "answers": captions}
            key = f"coco-caption-{options.split}-{record.image_id}-{place}"
            meta = {"image_ids": [f"coco:{record.image_id}"]}
            info = ImageInfo("", *record.size)
            yield Draft(Sample(key, "caption", "coco-caption", [info], fields=values, meta=meta), [image])

    return RecordSource(records, make)


def _read_official(path: Path) -> list[_Captioned]:
    data, found = read_json(path), {}
    for number, image in enumerate(require(data, "images", list, str(path))):
        where = f"{path}, images {number}"
        image_id = require(image, "id", int, where)
        size = (int(image.get("width", 0)), int(image.get("height", 0)))
        found[image_id] = _Captioned(image_id, (require(image, "file_name", str, where),), size, [])
    for number, annotation in enumerate(require(data, "annotations", list, str(path))):
        where = f"{path}, annotations {number}"
        image_id = require(annotation, "image_id", int, where)
        if image_id not in found:
            raise SourceFormatError(f"{where}: expected image_id of one of the images listed, got {image_id}")
        found[image_id].captions.append(_clean(require(annotation, "caption", str, where)))
    return list(found.values())


def _read_karpathy(path: Path, splits: tuple[str, ...]) -> list[_Captioned]:
    data, found = read_json(path), []
    for number, image in enumerate(require(data, "images", list, str(path))):
        where = f"{path}, images {number}"
        if require(image, "split", str, where) in splits:
            file = (require(image, "filepath", str, where), require(image, "filename", str, where))
            captions = [_clean(require(s, "raw", str, where)) for s in require_list(image, "sentences", dict, where)]
            found.append(_Captioned(require(image, "cocoid", int, where), file, (0, 0), captions))
    return found


def _clean(caption: str) -> str:
    return " ".join(caption.split())  # some captions hold line breaks
