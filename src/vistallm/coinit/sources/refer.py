"""Referring expressions and grounded phrases: RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and Flickr30k Entities."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vistallm.coinit.sources.base import (
    Box,
    Draft,
    Packed,
    Reject,
    Source,
    SourceFormatError,
    SourceImage,
    SourceOptions,
)
from vistallm.coinit.sources.records import Record, add_regions, read_json, read_object, read_pickle, repair_text
from vistallm.schema import Region
from vistallm.tasks.texts import tidy

# ---- the RefCOCO family, on COCO's train2014

_KINDS = {"rec": "box", "res": "mask", "reg": "box", "grec": "box", "gres": "mask"}


def load_refs(name: str, split_by: str, options: SourceOptions) -> Source:
    """RefCOCO ("left man"), RefCOCO+ (no words of place) or RefCOCOg (long expressions); `split_by` is the usual split.

    REG has one sample per expression for training, and one per object, with all its expressions, for evaluation.
    """
    others = tuple(other for other in ("unc", "umd", "google") if other != split_by)
    settings = options.read_settings(split_by=(split_by, *others), tasks=["rec", "res", "reg"])
    options.check_split("train", "val", *(("testA", "testB") if settings["split_by"] == "unc" else ("test",)))
    path = options.find_file(f"refs({settings['split_by']}).p", folders=(f"{name}/", ""))
    return _ref_source(name, options, path, settings["tasks"])


def load_grefcoco(options: SourceOptions) -> Source:
    """gRefCOCO: expressions of no, one or several objects."""
    tasks = options.read_settings(tasks=["grec", "gres"])["tasks"]
    options.check_split("train", "val", "testA", "testB")
    path = options.find_file("grefs(unc).json", "grefs(unc).p", folders=("grefcoco/", ""))
    return _ref_source("grefcoco", options, path, tasks)


class _Table:
    """Images or annotations of instances.json, by id."""

    def __init__(self, data: Record, key: str) -> None:
        self.file, self.key = data.where, key
        self.rows = {record.integer("id"): row for row, record in enumerate(data.records(key))}
        self.records = Packed(data.data[key])

    def at(self, number: int, where: str) -> Record:
        """The record of an id that `where` names."""
        if number not in self.rows:
            raise SourceFormatError(f"{where}: expected id {number} among {self.key} of {self.file}, it is not there")
        return Record(self.records[self.rows[number]], f"{self.file}, {self.key[:-1]} {number}")


def _ref_source(source: str, options: SourceOptions, path: Path, tasks: list[str]) -> Source:
    """The refs of a split, given the instances.json beside the file."""
    refs = read_json(path, list) if path.suffix == ".json" else read_pickle(path)
    split, splits = options.split, [Record(ref, f"{path}, record {i}").text("split") for i, ref in enumerate(refs)]
    if split not in splits:
        raise ValueError(f"{path}: expected refs of split {split!r}, its splits are {sorted(set(splits))}")
    instances = read_object(path.with_name("instances.json"))
    images, annotations = _Table(instances, "images"), _Table(instances, "annotations")
    tasks = [task for task in _KINDS if task in tasks]

    def make(item: tuple[int, Any], _: int) -> Iterator[Draft | Reject]:
        ref = Record(item[1], f"{path}, record {item[0]}")
        # A ref's own `file_name` carries an annotation id.
        info = images.at(ref.integer("image_id"), ref.where)
        file, size = info.text("file_name"), (info.integer("width"), info.integer("height"))
        image = SourceImage(options.coco_image(file), f"coco:{info.data['id']}", *size)
        meant = _annotations(ref, annotations, several=source == "grefcoco")
        regions: dict[str, list[Region]] = {"box": [], "mask": []}
        yield from add_regions(regions, meant, image, f"{ref.where} keeps its box samples only")
        name, meta = f"{source}-{split}-{ref.integer('ref_id')}", {"ref_id": ref.data["ref_id"]}
        fields: dict[str, Any] = {"targets": list(range(len(meant)))} if source == "grefcoco" else {}
        expressions = []
        for number, sentence in enumerate(ref.records("sentences")):
            # RefCOCOg's sentences are tokens joined by spaces ("the candle - holder").
            text, sent_id = repair_text(sentence.text("sent")).strip(), sentence.optional("sent_id", int)
            if not (text := tidy(text, tokenised=True) if source == "refcocog" else text):
                yield Reject("empty-text", f"{ref.where}, sentence {number}")
                continue
            expressions.append(text)
            sent_id = number if sent_id is None else sent_id  # gRefCOCO may have none
            more = {"meta": {**meta, "sent_id": sent_id}, "fields": {"expr": text, **fields}}
            for task in tasks:
                if _KINDS[task] in regions and (task != "reg" or split == "train"):
                    yield image.draft(f"{name}-{number}-{task}", task, source, regions=regions[_KINDS[task]], **more)
        if "reg" in tasks and split != "train" and "box" in regions and expressions:
            fields = {"expr": expressions[0], "answers": expressions}
            yield image.draft(f"{name}-reg", "reg", source, meta, fields=fields, regions=regions["box"])

    return Source(((i, ref) for i, ref in enumerate(refs) if splits[i] == split), make)


def _annotations(ref: Record, table: _Table, several: bool) -> list[Record]:
    """The annotations of a ref from left to right, an order that can be learnt.

    gRefCOCO has several: a list of ids, in which a lone -1 says that nothing is meant.
    """
    value = ref.require("ann_id", *((list, int) if several else (int,)))
    ids, annotations = ref.values("ann_id", int) if isinstance(value, list) else [value], []
    for ann_id in dict.fromkeys(() if several and ids == [-1] else ids):
        annotation = table.at(ann_id, ref.where)
        if (image_id := annotation.integer("image_id")) != ref.data["image_id"]:
            raise annotation.fault(f"expected image {ref.data['image_id']} of {ref.where}, got {image_id}")
        if len(sides := annotation.values("bbox", int, float)) != 4:
            raise annotation.fault(f"expected bbox [x, y, width, height], got {sides}")
        annotations.append(annotation)
    return sorted(annotations, key=lambda a: (2 * a.data["bbox"][0] + a.data["bbox"][2], a.data["id"]))


# ---- Flickr30k Entities

_PHRASE = re.compile(r"\[/EN#(\d+)(?:/[\w-]+)+ ([^\]]+)\]")


def load_flickr30k(options: SourceOptions) -> Source:
    """Captions whose phrases are followed by their boxes (`flickr`), and for evaluation each phrase alone (`grec`).

    "[/EN#1/people A man] in [/EN#2/clothing a blue shirt] ." becomes "A man {regions:0} in a blue shirt {regions:1}.";
    phrases without a box stay plain words.
    """
    split = options.check_split("train", "val", "test")
    tasks = options.read_settings(tasks=["flickr", "grec"])["tasks"]
    if split == "train" and "tasks" not in options.settings:
        tasks = ["flickr"]

    def make(image_id: str, _: int) -> Iterator[Draft | Reject]:
        files = [options.root / name for name in (f"Annotations/{image_id}.xml", f"Sentences/{image_id}.txt")]
        if missing := [path for path in files if not path.is_file()]:
            raise SourceFormatError(f"{split}.txt, record {image_id}: expected {missing[0]}, there is no such file")
        path = options.image(f"{image_id}.jpg", f"flickr30k-images/{image_id}.jpg", usual="flickr30k-images")
        image, boxes, of_phrase, rejects = _read_boxes(files[0], path)
        yield from rejects
        for line, sentence in enumerate(files[1].read_text(encoding="utf-8").splitlines()):
            if not sentence.strip():
                continue
            where = f"Sentences/{image_id}.txt, line {line + 1}"
            caption, used, phrases = _write_caption(sentence, of_phrase, where)
            if not used:
                yield Reject("no-box", f"{where}: none of its phrases has a box")
                continue
            texts = [("flickr", f"{line}", {"caption": caption}, used)]
            texts += [("grec", f"{line}-{i}", {"expr": phrase}, named) for i, (phrase, named) in enumerate(phrases)]
            for task, name, fields, numbers in texts:
                if task in tasks:
                    more = {"fields": {**fields, "targets": list(range(len(numbers)))}}
                    regions = [Region(0, "box", i, box=boxes[number]) for i, number in enumerate(numbers)]
                    name = f"flickr30k-{split}-{image_id}-{name}"
                    yield image.draft(name, task, "flickr30k", regions=regions, **more)

    return Source(options.find_file(f"{split}.txt").read_text(encoding="utf-8").split(), make)


def _write_caption(
    sentence: str, of_phrase: dict[str, list[int]], where: str
) -> tuple[str, list[int], list[tuple[str, list[int]]]]:
    """Caption with placeholders, the boxes behind their numbers as first named, (phrase, boxes) of each phrase."""
    used: dict[int, int] = {}
    phrases = []

    def replace(match: re.Match[str]) -> str:
        if not (boxes := of_phrase.get(match[1], [])):
            return match[2]
        phrases.append((match[2], boxes))
        numbers = [str(used.setdefault(number, len(used))) for number in boxes]
        return f"{match[2]} {{regions:{','.join(numbers)}}}"

    caption = _PHRASE.sub(replace, " ".join(sentence.split()))
    if "[/EN#" in caption:
        raise SourceFormatError(f"{where}: expected phrases as [/EN#1/people A man], got {sentence!r}")
    return tidy(caption), list(used), phrases


def _read_boxes(path: Path, image_path: Path) -> tuple[SourceImage, list[Box], dict[str, list[int]], list[Reject]]:
    """An XML file's image, its boxes cut to it, the boxes of each phrase id, and boxes that lie outside.

    The file counts pixels from 1 and includes the last one: pixels 2 to 90 span the edges 1 to 90.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise SourceFormatError(f"{path}: not XML ({error}); download it again") from error

    def number(entry: ElementTree.Element, name: str) -> float:
        try:
            return float(entry.findtext(name) or "")
        except ValueError:
            text = entry.findtext(name)
            raise SourceFormatError(f"{path}: expected a number in <{name}>, got {text!r}") from None

    size = int(number(root, "size/width")), int(number(root, "size/height"))
    image = SourceImage(image_path, f"flickr30k:{path.stem}", *size)
    boxes, of_phrase, rejects = list[Box](), dict[str, list[int]](), list[Reject]()
    for index, entry in enumerate(root.findall("object")):
        where, names = f"{path}, object {index}", [name.text or "" for name in entry.findall("name")]
        kinds = [kind for kind in ("bndbox", "scene", "nobndbox") if entry.find(kind) is not None]
        if not names or not kinds:
            missing = "<bndbox>, <scene> or <nobndbox>" if names else "<name>"
            raise SourceFormatError(f"{where}: expected {missing}, there is none")
        if kinds[0] == "bndbox":
            x0, y0, x1, y1 = (number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
            if isinstance(box := image.cut((x0 - 1, y0 - 1, x1, y1), where), Reject):
                rejects.append(box)
                continue
            for name in names:
                of_phrase.setdefault(name, []).append(len(boxes))
            boxes.append(box)
    return image, boxes, of_phrase, rejects
