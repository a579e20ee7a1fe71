"""AttCoSeg: groups of two to four images, some of which share an attribute value; the answer names and segments those.

In: Visual Genome's `attributes.json` and `image_data.json` under --root; `--set masks=FILE`, instances in COCO's or
LVIS's format; --images, the images of that file. Only images that are in both are used, and they are the mask file's
(Visual Genome has the same photographs at other sizes, so its boxes are scaled). Out: `attcoseg` samples, "The images
are 2 and 3. The masks are [...], [...]." (one mask per image: all its objects of the value together).

An image is an example of a value when every object that Visual Genome gives the value has a mask or is part of one that
has (`--set outside=N` allows N others), and a hard negative when it shows another value of the same kind and nothing of
this one; those with an object of the same name are preferred. `attribute_words.yaml` lists the words.

Settings: `attributes=shape,colour,size,position`; `groups=N`, default one per example; `iou=0.6`, `names=check|ignore`
(boxes and masks of one object), `objects=3`, `min_area=0.01` (of an example). A unit is one group; the attributes take
turns, and every example of an attribute leads a group before one does so again. The split is only a name: give train
and test different mask files (instances_train2014.json, instances_val2014.json), and `check` them together for leaks.

To look at what was built: `python tools/view_samples.py DIR --task attcoseg --out sheet.png`.
"""

from __future__ import annotations

import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vistallm.coinit import attcoseg as rules
from vistallm.coinit.attcoseg import Findings, Limits, Thing, Words, name_words, read_words
from vistallm.coinit.sources.base import Draft, Source, SourceImage, SourceOptions, chosen, coco_image, first_file
from vistallm.coinit.sources.records import Record, read_object
from vistallm.coinit.sources.shapes import merge_rles, read_mask, rle_area
from vistallm.coinit.sources.visual_genome import GenomeImage, read_images, stream_records
from vistallm.schema import ImageInfo, Region, Rle, Sample

ATTRIBUTES = ("shape", "colour", "size", "position")
Key = tuple[str, str]  # attribute and value
_HARD_TRIES = 30  # negatives looked at for one that shows an object of the same name


@dataclass(frozen=True)
class _Example:
    """An image that shows a value: its number, the mask of all its objects of the value, the words for them."""

    image: int
    rle: Rle
    words: frozenset[str]


@dataclass
class _Table:
    """All images used, their examples and hard negatives by value, and why other pairs of image and value are neither.

    `negatives` holds (image number, words of the objects that show another value).
    """

    images: list[SourceImage] = field(default_factory=list)
    examples: dict[Key, list[_Example]] = field(default_factory=dict)
    negatives: dict[Key, list[tuple[int, frozenset[str]]]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def load_attcoseg(options: SourceOptions) -> Source:
    """Groups of images by shared attribute; prints how many examples every value has."""
    settings = options.read_settings(
        masks="",
        attributes=",".join(ATTRIBUTES),
        groups="0",
        iou="0.6",
        names=("check", "ignore"),
        objects="3",
        min_area="0.01",
        outside="0",
        image_data="",
    )
    attributes = chosen(settings, "attributes", *ATTRIBUTES)
    try:
        numbers = {key: float(settings[key]) for key in ("groups", "iou", "objects", "min_area", "outside")}
    except ValueError as error:
        raise ValueError(f"--set groups, iou, objects, min_area, outside: expected numbers ({error})") from None
    objects, outside, names = int(numbers["objects"]), int(numbers["outside"]), settings["names"] == "check"
    limits = Limits(numbers["iou"], objects, numbers["min_area"], outside, names)
    path = Path(settings["masks"])
    if not path.is_file():
        raise ValueError(f"--set masks: expected a file of instances (COCO or LVIS), got {settings['masks'] or 'none'}")
    genome = {i.coco_id: i for i in read_images(options, settings["image_data"]).values() if i.coco_id is not None}
    table = _read_table(options, _MaskFile(path, genome, read_words()), limits)
    keys = sorted(key for key, found in table.examples.items() if len(found) > 1 and key[0] in attributes)
    print(describe(table, keys), file=sys.stderr)
    return _Groups(options, table, keys, int(numbers["groups"]))


def describe(table: _Table, keys: list[Key]) -> str:
    """Statistics in words: examples and hard negatives per value, and what was left out."""
    lines = [f"attcoseg: {len(table.images)} images with masks and attributes"]
    for attribute in ATTRIBUTES:
        values = sorted((key for key in keys if key[0] == attribute), key=lambda key: -len(table.examples[key]))
        counts = (f"{key[1]} {len(table.examples[key])}/{len(table.negatives.get(key, ()))}" for key in values)
        lines.append(f"  {attribute:<9} examples/negatives: {', '.join(counts) or 'none'}")
    out = ", ".join(f"{reason} {count}" for reason, count in table.left_out.most_common())
    return "\n".join([*lines, f"  left out: {out or 'nothing'}"])


class _MaskFile:
    """Instances of the images that Visual Genome has too."""

    def __init__(self, path: Path, genome: dict[int, GenomeImage], words: Words) -> None:
        data = read_object(path)
        self.words, self.names = words, dict[int, frozenset[str]]()  # category -> what its objects may be called
        for category in data.records("categories", "category"):
            name = category.text("name")
            names = [name, *category.data.get("synonyms", ()), *words.same_as.get(name.replace("_", " "), ())]
            self.names[category.integer("id")] = name_words(names)
        self.genome = {image.image_id: image for image in genome.values()}
        self.images: dict[int, SourceImage] = {}  # by Visual Genome's id; the path is the bare file name
        of_coco: dict[int, int] = {}
        for image in data.records("images", "image"):
            found = genome.get(image.integer("id"))
            if found is not None:
                file = image.optional("file_name", str) or image.text("coco_url")  # LVIS v1 has the url only
                size = image.integer("width"), image.integer("height")
                self.images[found.image_id] = SourceImage(Path(file.split("/")[-1]), found.key, *size)
                of_coco[image.integer("id")] = found.image_id
        self.annotations: dict[int, list[Record]] = {}
        for annotation in data.records("annotations", "annotation"):
            if (image_id := of_coco.get(annotation.integer("image_id"))) is not None:
                self.annotations.setdefault(image_id, []).append(annotation)

    def things(self, image_id: int) -> list[Thing]:
        """The objects of an image; `number` is the place among its annotations."""
        image, found = self.images[image_id], []
        for number, annotation in enumerate(self.annotations.get(image_id, ())):
            category = annotation.integer("category_id")
            x, y, w, h = annotation.values("bbox", int, float)
            (area,) = annotation.numbers("area")
            if category not in self.names:
                raise annotation.fault(f"category_id {category} is not in its categories")
            crowd, share = bool(annotation.data.get("iscrowd")), area / (image.width * image.height)
            found.append(Thing((x, y, x + w, y + h), share, self.names[category], number, crowd))
        return found

    def mask(self, image_id: int, things: list[Thing]) -> Rle:
        """The masks of things of an image, united."""
        image, found = self.images[image_id], [self.annotations[image_id][thing.number] for thing in things]
        return merge_rles([read_mask(annotation, image.height, image.width) for annotation in found])


def _read_table(options: SourceOptions, masks: _MaskFile, limits: Limits) -> _Table:
    table = _Table()
    for record in stream_records(options.find_file("attributes.json")):
        image_id = record.integer("image_id")
        if image_id not in masks.images:
            table.left_out["image-without-masks"] += 1
            continue
        image, genome = masks.images[image_id], masks.genome[image_id]
        if abs(genome.width * image.height / (genome.height * image.width) - 1) > 0.02:
            table.left_out["image-of-other-shape"] += 1
            continue
        things = masks.things(image_id)
        scale = (image.width / genome.width, image.height / genome.height)
        try:
            objects = list(rules.named_objects(record.values("attributes", dict), scale, things, limits))
        except (KeyError, TypeError) as error:
            raise record.fault(f"expected objects with x, y, w, h; got {error!r}") from error
        findings = rules.find_attributes(objects, things, masks.words, limits)
        rules.find_positions(things, image.width, image.height, limits, findings)
        _add_image(table, findings, masks, image_id)
        table.images.append(image)
    return table


def _add_image(table: _Table, findings: Findings, masks: _MaskFile, image_id: int) -> None:
    number = len(table.images)
    table.left_out.update(findings.left_out)
    for key, things in findings.examples.items():
        rle = masks.mask(image_id, things)
        if rle_area(rle):
            table.examples.setdefault(key, []).append(_Example(number, rle, findings.words[key]))
        else:
            table.left_out["empty-mask"] += 1
    for key in findings.counters:
        table.negatives.setdefault(key, []).append((number, findings.words[key]))


class _Groups:
    """The source: unit i is group i."""

    def __init__(self, options: SourceOptions, table: _Table, keys: list[Key], groups: int) -> None:
        self.options, self.table = options, table
        self.seed = [options.seed, zlib.crc32(options.split.encode())]
        self.leaders: list[list[tuple[Key, int]]] = []  # one list per attribute that has examples, in drawn order
        for attribute in ATTRIBUTES:
            every = [(key, i) for key in keys if key[0] == attribute for i in range(len(table.examples[key]))]
            if every:
                order = np.random.default_rng([*self.seed, len(self.leaders)]).permutation(len(every))
                self.leaders.append([every[i] for i in order])
        self.count = (groups or sum(map(len, self.leaders))) if self.leaders else 0

    def __len__(self) -> int:
        return self.count

    def unit(self, index: int) -> Iterator[Draft]:
        """One group."""
        turn, attribute = divmod(index, len(self.leaders))
        key, first = self.leaders[attribute][turn % len(self.leaders[attribute])]
        rng = np.random.default_rng([*self.seed, 1 << 20, index])
        size = int(rng.integers(2, 5))
        examples = self._examples(rng, key, first, int(rng.integers(2, size + 1)))
        negatives = self._negatives(rng, key, examples[0].words, size - len(examples))
        images = [example.image for example in examples] + negatives
        order = rng.permutation(len(images)).tolist()
        masks = {example.image: example.rle for example in examples}
        yield self._draft(index, key, [images[place] for place in order], masks)

    def _examples(self, rng: np.random.Generator, key: Key, first: int, number: int) -> list[_Example]:
        found = self.table.examples[key]
        others = rng.choice(len(found) - 1, size=min(number, len(found)) - 1, replace=False)
        return [found[first], *(found[i + (i >= first)] for i in others.tolist())]

    def _negatives(self, rng: np.random.Generator, key: Key, words: frozenset[str], number: int) -> list[int]:
        """Images that lack the value; of `_HARD_TRIES` drawn, those that show an object of the same name come first."""
        found = self.table.negatives.get(key, [])
        drawn = rng.choice(len(found), size=min(_HARD_TRIES, len(found)), replace=False).tolist() if found else []
        return [found[i][0] for i in sorted(drawn, key=lambda i: not found[i][1] & words)[:number]]

    def _draft(self, index: int, key: Key, images: list[int], masks: dict[int, Rle]) -> Draft:
        infos = [self.table.images[image] for image in images]
        places = [place for place, image in enumerate(images) if image in masks]
        numbers = [str(place + 1) for place in places]
        sample = Sample(
            id=f"attcoseg-{self.options.split}-{index:07d}",
            task="attcoseg",
            source="attcoseg",
            images=[ImageInfo("", info.width, info.height) for info in infos],
            fields={
                "attribute": key[0],
                "value": key[1],
                "images": f"{', '.join(numbers[:-1])} and {numbers[-1]}",
                "targets": list(range(len(places))),
            },
            regions=[Region(place, "mask", i, rle=masks[images[place]]) for i, place in enumerate(places)],
            meta={"asks": key[0], "positives": len(places), "image_ids": [info.image_id for info in infos]},
        )
        return Draft(sample, [_find_image(self.options.image_folder, info.path.name) for info in infos])


def _find_image(folder: Path, name: str) -> Path:
    """A COCO image by the name of 2014, which says its folder, or of 2017 ("000000000009.jpg")."""
    path = coco_image(folder, name)
    short = name.split("_")[-1]
    return path if path.is_file() else first_file(folder, short, f"train2017/{short}", f"val2017/{short}")
