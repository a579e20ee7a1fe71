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
    SourceOptions,
    clip_box,
    read_json,
    require,
    rle_area,
    segmentation_to_rle,
    short_parts,
)
from vistallm.coinit.sources.records import (
    RecordSource,
    check_split,
    coco_image,
    find_file,
    read_list,
    read_pickle,
    read_settings,
    repair_text,
    require_list,
)
from vistallm.schema import ImageInfo, Region, Sample

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
    settings = read_settings(options, split_by=(split_by, *others), tasks="rec,res,reg")
    check_split(options, "train", "val", *_SPLITS[name])
    file = f"refs({settings['split_by']}).p"
    path = find_file(options.root, f"{name}/{file}", file)
    return _source(name, options, path, read_pickle(path), settings["tasks"])


def load_grefcoco(options: SourceOptions) -> Source:
    """gRefCOCO: expressions of no, one or several objects; splits train, val, testA, testB."""
    settings = read_settings(options, tasks="grec,gres")
    check_split(options, "train", "val", "testA", "testB")
    names = ("grefs(unc).json", "grefs(unc).p")
    path = find_file(options.root, *(f"grefcoco/{name}" for name in names), *names)
    refs = read_list(path) if path.suffix == ".json" else read_pickle(path)
    return _source("grefcoco", options, path, refs, settings["tasks"])


def _source(name: str, options: SourceOptions, path: Path, refs: list[Any], tasks: str) -> Source:
    known = ("grec", "gres") if name == "grefcoco" else ("rec", "res", "reg")
    if unknown := set(tasks.split(",")) - set(known):
        raise ValueError(f"--set tasks: expected some of {','.join(known)}, got {min(unknown)!r}")
    splits = [require(ref, "split", str, f"{path}, record {i}") for i, ref in enumerate(refs)]
    chosen = [(i, ref) for i, ref in enumerate(refs) if splits[i] == options.split]
    if not chosen:
        raise ValueError(f"{path}: expected refs of split {options.split!r}, its splits are {sorted(set(splits))}")
    maker = _RefMaker(name, path, options, [task for task in known if task in tasks.split(",")])
    return RecordSource(Packed(chosen), maker.unit)


class _RefMaker:
    """Makes the samples of a ref, given the instances.json beside the refs."""

    def __init__(self, source: str, path: Path, options: SourceOptions, tasks: list[str]) -> None:
        self.source, self.path, self.split, self.tasks = source, path, options.split, tasks
        self.folder = options.images or options.root
        self.instances = path.with_name("instances.json")
        data = read_json(self.instances)
        self.images, self.annotations = self._packed(data, "images"), self._packed(data, "annotations")

    def _packed(self, data: Any, key: str) -> tuple[dict[int, int], Packed]:
        """Records of instances.json and the place of each id among them."""
        records = require(data, key, list, str(self.instances))
        places = {require(r, "id", int, f"{self.instances}, {key} {i}"): i for i, r in enumerate(records)}
        return places, Packed(records)

    def unit(self, item: tuple[int, dict[str, Any]], _: int) -> Iterator[Draft | Reject]:
        """All samples of a ref."""
        number, ref = item
        where = f"{self.path}, record {number}"
        info = self._find("images", require(ref, "image_id", int, where), where)
        image = coco_image(self.folder, require(info, "file_name", str, f"{self.instances}, image {info['id']}"))
        ids = self._ann_ids(ref, where)
        regions, rejects = self._regions(info, ids, where)
        yield from rejects
        sentences = self._sentences(ref, where)
        for place, (expression, sent_id) in enumerate(sentences):
            if not expression:
                yield Reject("empty-text", f"{where}, sentence {place}")
                continue
            values: dict[str, Any] = {"expr": expression}
            if self.source == "grefcoco":
                values["targets"] = list(range(len(ids)))
            for task in self.tasks:
                if _KINDS[task] in regions and (task != "reg" or self.split == "train"):
                    sample = self._sample(ref, info, f"{place}-{task}", values, regions[_KINDS[task]])
                    sample.meta["sent_id"] = sent_id
                    yield Draft(sample, [image])
        expressions = [expression for expression, _ in sentences if expression]
        if "reg" in self.tasks and self.split != "train" and "box" in regions and expressions:
            values = {"expr": expressions[0], "answers": expressions}
            yield Draft(self._sample(ref, info, "reg", values, regions["box"]), [image])

    def _find(self, key: str, number: int, where: str) -> dict[str, Any]:
        places, records = self.images if key == "images" else self.annotations
        if number not in places:
            raise SourceFormatError(f"{where}: expected id {number} among {key} of {self.instances}, it is not there")
        return records[places[number]]

    def _ann_ids(self, ref: dict[str, Any], where: str) -> list[int]:
        """The annotations that a ref means; gRefCOCO has a list, in which a lone -1 says that nothing is meant."""
        if self.source != "grefcoco":
            return [require(ref, "ann_id", int, where)]
        several = isinstance(ref.get("ann_id"), list)
        ids = require_list(ref, "ann_id", int, where) if several else [require(ref, "ann_id", int, where)]
        return [] if ids == [-1] else list(dict.fromkeys(ids))

    def _regions(
        self, info: dict[str, Any], ids: list[int], where: str
    ) -> tuple[dict[str, list[Region]], list[Reject]]:
        """Boxes and masks of the annotations by kind, and rejects; a kind that one of the objects lacks is left out."""
        found: dict[str, list[Region]] = {"box": [], "mask": []}
        rejects = []
        place = f"{self.instances}, image {info['id']}"
        width, height = require(info, "width", int, place), require(info, "height", int, place)
        annotations = [self._annotation(ann_id, info["id"], where) for ann_id in ids]
        annotations.sort(key=lambda a: (2 * a["bbox"][0] + a["bbox"][2], a["id"]))  # left to right: it can be learnt
        for number, annotation in enumerate(annotations):
            named = f"{self.instances}, annotation {annotation['id']}"
            x, y, w, h = annotation["bbox"]
            box = clip_box((x, y, x + w, y + h), width, height)
            segmentation = require(annotation, "segmentation", (list, dict), named)
            try:
                rle = segmentation_to_rle(segmentation, height, width)
            except (ValueError, TypeError) as error:
                raise SourceFormatError(f"{named}: {error}") from error
            rejects += [Reject("short-polygon", named)] * short_parts(segmentation)
            if box is None:
                rejects.append(Reject("empty-box", f"{named}: bbox {annotation['bbox']} in {width} x {height}"))
                found.pop("box", None)
            if not rle_area(rle):
                rejects.append(Reject("empty-mask", f"{named}: {where} keeps its box samples only"))
                found.pop("mask", None)
            for kind, region in (
                ("box", Region(0, "box", number, box=box)),
                ("mask", Region(0, "mask", number, rle=rle)),
            ):
                if kind in found:
                    found[kind].append(region)
        return found, rejects

    def _annotation(self, ann_id: int, image_id: int, where: str) -> dict[str, Any]:
        annotation, named = self._find("annotations", ann_id, where), f"{self.instances}, annotation {ann_id}"
        if require(annotation, "image_id", int, named) != image_id:
            raise SourceFormatError(f"{named}: expected image {image_id} of {where}, got {annotation['image_id']}")
        if len(sides := require_list(annotation, "bbox", (int, float), named)) != 4:
            raise SourceFormatError(f"{named}: expected bbox [x, y, width, height], got {sides}")
        return annotation

    def _sentences(self, ref: dict[str, Any], where: str) -> list[tuple[str, int]]:
        """Expression and `sent_id` of each sentence; the latter is optional in gRefCOCO, its place stands for it."""
        found = []
        for place, sentence in enumerate(require_list(ref, "sentences", dict, where)):
            text = repair_text(require(sentence, "sent", str, f"{where}, sentence {place}"))
            found.append((text.strip(), int(sentence.get("sent_id", place))))
        return found

    def _sample(
        self, ref: dict[str, Any], info: dict[str, Any], name: str, values: dict[str, Any], regions: list[Region]
    ) -> Sample:
        ref_id = require(ref, "ref_id", int, str(self.path))
        return Sample(
            f"{self.source}-{self.split}-{ref_id}-{name}",
            name.rpartition("-")[2],
            self.source,
            [ImageInfo("", info["width"], info["height"])],
            fields=values,
            regions=regions,
            meta={"image_ids": [f"coco:{info['id']}"], "ref_id": ref_id},
        )
