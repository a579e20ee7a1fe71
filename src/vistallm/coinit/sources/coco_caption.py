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

from vistallm.coinit.sources.base import Draft, Packed, Reject, Source, SourceImage, SourceOptions, first_file
from vistallm.coinit.sources.records import Record, RecordSource, read_object

_Captioned = tuple[int, str, tuple[int, int], list[str]]
"""image_id, the image's file, (width, height) or (0, 0) where the annotations do not say, and its captions."""


def load_coco_caption(options: SourceOptions) -> Source:
    """COCO captions; splits train, val and (Karpathy only) test."""
    settings = options.read_settings(annotations=("karpathy", "official"), year=("2014", "2017"))
    training = options.split == "train"
    if settings["annotations"] == "official":
        folder = options.check_split("train", "val") + settings["year"]
        path = options.find_file(f"captions_{folder}.json", f"annotations/captions_{folder}.json")
        records = iter(_read_official(path, folder))
    else:
        split = options.check_split("train", "val", "test")
        path = options.find_file("dataset_coco.json", "karpathy/dataset_coco.json")
        records = _read_karpathy(path, ("train", "restval") if training else (split,))

    def make(record: _Captioned, _: int) -> Iterator[Draft | Reject]:
        image_id, file, size, written = record
        captions = [caption for caption in written if caption]
        if not captions or len(captions) < len(written):
            yield Reject("empty-text", f"{path}, image {image_id}: a caption without a word, or none")
        image_path = first_file(options.image_folder, file, file.rpartition("/")[2])
        image = SourceImage(image_path, f"coco:{image_id}", *size)
        for place, caption in enumerate(captions if training else captions[:1]):
            fields: dict[str, Any] = {"caption": caption} if training else {"caption": caption, "answers": captions}
            name = f"coco-caption-{options.split}-{image_id}-{place}"
            yield image.draft(name, "caption", "coco-caption", fields=fields)

    return RecordSource(Packed(records), make)


def _read_official(path: Path, folder: str) -> list[_Captioned]:
    data, found = read_object(path), dict[int, _Captioned]()
    for image in data.records("images"):
        image_id = image.integer("id")
        size = (int(image.data.get("width", 0)), int(image.data.get("height", 0)))
        found[image_id] = (image_id, f"{folder}/{image.text('file_name')}", size, [])
    for annotation in data.records("annotations"):
        image_id = annotation.integer("image_id")
        if image_id not in found:
            raise annotation.fault(f"expected image_id of one of the images listed, got {image_id}")
        found[image_id][3].append(_clean(annotation.text("caption")))
    return list(found.values())


def _read_karpathy(path: Path, splits: tuple[str, ...]) -> Iterator[_Captioned]:
    for image in read_object(path).records("images"):
        if image.text("split") in splits:
            captions = [_clean(Record(s, image.where).text("raw")) for s in image.values("sentences", dict)]
            yield image.integer("cocoid"), f"{image.text('filepath')}/{image.text('filename')}", (0, 0), captions


def _clean(caption: str) -> str:
    return " ".join(caption.split())  # some captions hold line breaks
