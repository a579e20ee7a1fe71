"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO: referring expressions of COCO train2014 images.

In: `refs(<split_by>).p` (a pickle of Python 2) or `grefs(unc).json` (or `.p`), each beside its own `instances.json`;
out: REC, RES and REG samples, or GREC and GRES samples, from one pass. A ref's `file_name` carries an annotation id
("..._581857_16.jpg"), so the image's name is taken from instances.json. A unit is one ref.

Settings: `split_by=unc|umd|google` (RefCOCO/+: unc; RefCOCOg: umd, whose val and test sets share no image with its
training set), `tasks=rec,res,reg`.

Every sample's meta holds `ref_id` and `sent_id`: scores can be taken per expression or per referred object. REG has one
sample per expression for training and one per object, with all its expressions as references, for evaluation.
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
    SourceImage,
    SourceOptions,
    chosen,
    coco_image,
)
from vistallm.coinit.sources.records import Record, RecordSource, read_list, read_object, read_pickle, repair_text
from vistallm.coinit.sources.shapes import clip_box, read_mask, rle_area, short_parts
from vistallm.schema import Region

_SPLITS = {"refcoco": ("testA", "testB"), "refcoco+": ("testA", "testB"), "refcocog": ("test",)}
_KINDS = {"rec": "box", "res": "mask", "reg": "box", "grec": "box", "gres": "mask"}


def load_refcoco(options: SourceOptions) -> Source:
    """RefCOCO: 50,000 objects, with words of place ("left man") allowed; splits train, val, testA, testB."""
    return _load_refs("refcoco", "unc", options)


def load_refcoco_plus(options: SourceOptions) -> Source:
    """RefCOCO+: words of place were not allowed; splits train, val, testA, testB."""
    return _load_refs("refcoco+", "unc", options)


def load_refcocog(options: SourceOptions) -> Source:
    """RefCOCOg: long expressions; splits train, val and (umd only) test."""
    return _load_refs("refcocog", "umd", options)


def _load_refs(name: str, split_by: str, options: SourceOptions) -> Source:
    others = tuple(other for other in ("unc", "umd", "google") if other != split_by)
    settings = options.read_settings(split_by=(split_by, *others), tasks="rec,res,reg")
    options.check_split("train", "val", *_SPLITS[name])
    tasks = chosen(settings, "tasks", "rec", "res", "reg")
    file = f"refs({settings['split_by']}).p"
    path = options.find_file(f"{name}/{file}", file)
    return _source(name, options, path, read_pickle(path), tasks)


def load_grefcoco(options: SourceOptions) -> Source:
    """gRefCOCO: expressions of no, one or several objects; splits train, val, testA, testB."""
    tasks = chosen(options.read_settings(tasks="grec,gres"), "tasks", "grec", "gres")
    options.check_split("train", "val", "testA", "testB")
    names = ("grefs(unc).json", "grefs(unc).p")
    path = options.find_file(*(f"grefcoco/{name}" for name in names), *names)
    return _source("grefcoco", options, path, read_list(path) if path.suffix == ".json" else read_pickle(path), tasks)


def _source(name: str, options: SourceOptions, path: Path, refs: list[Any], tasks: list[str]) -> Source:
    splits = [Record(ref, f"{path}, record {i}").text("split") for i, ref in enumerate(refs)]
    if options.split not in splits:
        raise ValueError(f"{path}: expected refs of split {options.split!r}, its splits are {sorted(set(splits))}")
    maker = _RefMaker(name, path, options, [task for task in _KINDS if task in tasks])
    return RecordSource(Packed((i, ref) for i, ref in enumerate(refs) if splits[i] == options.split), maker.unit)


class _Table:
    """Images or annotations of instances.json, by id."""

    def __init__(self, data: Record, key: str, name: str) -> None:
        self.file, self.key, self.name = data.where, key, name
        self.places = {record.integer("id"): place for place, record in enumerate(data.records(key))}
        self.records = Packed(data.data[key])

    def find(self, number: int, where: str) -> Record:
        """The record of an id that `where` names."""
        if number not in self.places:
            raise SourceFormatError(f"{where}: expected id {number} among {self.key} of {self.file}, it is not there")
        return Record(self.records[self.places[number]], f"{self.file}, {self.name} {number}")


class _RefMaker:
    """Makes the samples of a ref, given the instances.json beside the refs."""

    def __init__(self, source: str, path: Path, options: SourceOptions, tasks: list[str]) -> None:
        self.source, self.path, self.split, self.tasks = source, path, options.split, tasks
        self.folder = options.image_folder
        data = read_object(path.with_name("instances.json"))
        self.images, self.annotations = _Table(data, "images", "image"), _Table(data, "annotations", "annotation")

    def unit(self, item: tuple[int, Any], _: int) -> Iterator[Draft | Reject]:
        """All samples of a ref."""
        ref = Record(item[1], f"{self.path}, record {item[0]}")
        info = self.images.find(ref.integer("image_id"), ref.where)
        size = info.integer("width"), info.integer("height")
        image = SourceImage(coco_image(self.folder, info.text("file_name")), f"coco:{info.data['id']}", *size)
        regions, rejects = self._regions(ref, image)
        yield from rejects
        ref_id, sentences = ref.integer("ref_id"), _sentences(ref)

        def draft(name: str, task: str, fields: dict[str, Any], **meta: int) -> Draft:
            meta, found = {"ref_id": ref_id, **meta}, regions[_KINDS[task]]
            name = f"{self.source}-{self.split}-{ref_id}-{name}"
            return image.draft(name, task, self.source, meta, fields=fields, regions=found)

        for place, (expression, sent_id) in enumerate(sentences):
            if not expression:
                yield Reject("empty-text", f"{ref.where}, sentence {place}")
                continue
            fields: dict[str, Any] = {"expr": expression}
            if self.source == "grefcoco":
                fields["targets"] = list(range(len(self._ann_ids(ref))))
            for task in self.tasks:
                if _KINDS[task] in regions and (task != "reg" or self.split == "train"):
                    yield draft(f"{place}-{task}", task, fields, sent_id=sent_id)
        expressions = [expression for expression, _ in sentences if expression]
        if "reg" in self.tasks and self.split != "train" and "box" in regions and expressions:
            yield draft("reg", "reg", {"expr": expressions[0], "answers": expressions})

    def _ann_ids(self, ref: Record) -> list[int]:
        """The annotations that a ref means; gRefCOCO has a list, in which a lone -1 says that nothing is meant."""
        if self.source != "grefcoco":
            return [ref.integer("ann_id")]
        one_or_several = ref.require("ann_id", list, int)
        ids = ref.values("ann_id", int) if isinstance(one_or_several, list) else [one_or_several]
        return [] if ids == [-1] else list(dict.fromkeys(ids))

    def _regions(self, ref: Record, image: SourceImage) -> tuple[dict[str, list[Region]], list[Reject]]:
        """Boxes and masks of a ref's objects by kind, and rejects; a kind that one of the objects lacks is left out."""
        found: dict[str, list[Region]] = {"box": [], "mask": []}
        rejects = []
        annotations = [self._annotation(ann_id, ref) for ann_id in self._ann_ids(ref)]
        # Left to right: an order that can be learnt.
        annotations.sort(key=lambda a: (2 * a.data["bbox"][0] + a.data["bbox"][2], a.data["id"]))
        for number, annotation in enumerate(annotations):
            x, y, w, h = annotation.data["bbox"]
            box = clip_box((x, y, x + w, y + h), image.width, image.height)
            rle = read_mask(annotation, image.height, image.width)
            rejects += [Reject("short-polygon", annotation.where)] * short_parts(annotation.data["segmentation"])
            if box is None:
                outside = f"bbox {[x, y, w, h]} in {image.width} x {image.height}"
                rejects.append(Reject("empty-box", f"{annotation.where}: {outside}"))
                found.pop("box", None)
            if not rle_area(rle):
                rejects.append(Reject("empty-mask", f"{annotation.where}: {ref.where} keeps its box samples only"))
                found.pop("mask", None)
            for region in (Region(0, "box", number, box=box), Region(0, "mask", number, rle=rle)):
                if region.kind in found:
                    found[region.kind].append(region)
        return found, rejects

    def _annotation(self, ann_id: int, ref: Record) -> Record:
        annotation = self.annotations.find(ann_id, ref.where)
        if (image_id := annotation.integer("image_id")) != ref.data["image_id"]:
            raise annotation.fault(f"expected image {ref.data['image_id']} of {ref.where}, got {image_id}")
        if len(sides := annotation.values("bbox", int, float)) != 4:
            raise annotation.fault(f"expected bbox [x, y, width, height], got {sides}")
        return annotation


def _sentences(ref: Record) -> list[tuple[str, int]]:
    """Expression and `sent_id` of each sentence; the latter is optional in gRefCOCO, its place stands for it."""
    found = []
    for place, sentence in enumerate(ref.records("sentences", "sentence")):
        text, sent_id = repair_text(sentence.text("sent")).strip(), sentence.optional("sent_id", int)
        found.append((text, place if sent_id is None else sent_id))
    return found
