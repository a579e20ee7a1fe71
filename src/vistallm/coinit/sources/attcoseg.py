"""AttCoSeg: groups of two to four images, some of which share an attribute value; the answer names and segments those.

In: Visual Genome's attributes.json and image_data.json, `--set masks=FILE`, instances in COCO's or LVIS's format, and
the images of that file. Only images that are in both are used, and they are the mask file's (Visual Genome has the same
photographs at other sizes, so its boxes are scaled). Out: `attcoseg` samples, "The images are 2 and 3. The masks are
[...], [...]." (one mask per image: all its objects of the value together). `vistallm.coinit.attcoseg` says which images
are examples and hard negatives of a value.

A unit is one group; the attributes take turns, and every example of an attribute leads a group before one does so
again. The split is only a name: give train and test different mask files, and `check` them together for leaks.
"""

from __future__ import annotations

import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vistallm.coinit import attcoseg as rules
from vistallm.coinit.sources.base import Draft, Source, SourceImage, SourceOptions, corners, group_draft
from vistallm.coinit.sources.genome import Genome, read_genome
from vistallm.coinit.sources.records import Record, read_object, stream_records
from vistallm.regions.masks import merge_rles, rle_area
from vistallm.schema import Region, Rle

ATTRIBUTES = ["shape", "colour", "size", "position"]
Key = tuple[str, str]  # attribute and value
_NUMBERS = {"groups": 0, "iou": 0.6, "objects": 3, "min_area": 0.01, "outside": 0}  # settings and their defaults
_HARD_TRIES = 30  # negatives looked at for one that shows an object of the same name


@dataclass
class _Table:
    """All images used, examples and hard negatives by value, and why other pairs of image and value are neither.

    Examples are (image number, mask of all its objects of the value, words for them), negatives (image number, words
    of the objects that show another value).
    """

    images: list[SourceImage] = field(default_factory=list)
    examples: dict[Key, list[tuple[int, Rle, frozenset[str]]]] = field(default_factory=dict)
    negatives: dict[Key, list[tuple[int, frozenset[str]]]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def load_attcoseg(options: SourceOptions) -> Source:
    """Groups of images by shared attribute; prints how many examples and hard negatives every value has."""
    settings = options.read_settings(
        masks="", attributes=ATTRIBUTES, names=("check", "ignore"), image_data="", **_NUMBERS
    )
    objects, outside, names = int(settings["objects"]), int(settings["outside"]), settings["names"] == "check"
    limits = rules.Limits(settings["iou"], objects, settings["min_area"], outside, names)
    path = Path(settings["masks"])
    if not path.is_file():
        raise ValueError(f"--set masks: expected a file of instances (COCO or LVIS), got {settings['masks'] or 'none'}")
    table = _read_table(options, path, read_genome(options, settings["image_data"]), limits)
    keys = sorted(key for key, examples in table.examples.items() if len(examples) > 1)
    keys = [key for key in keys if key[0] in settings["attributes"]]
    _print_counts(table, keys)
    if not keys:
        raise ValueError(
            f"attcoseg: expected a value with two examples, got none in {len(table.images)} images that are in both "
            f"attributes.json and {path}; give masks of images that are in Visual Genome too (COCO's 2014 or 2017 sets)"
        )
    groups = _Groups(options, table, keys)
    return Source(range(int(settings["groups"]) or sum(map(len, groups.leaders))), groups.make)


def _print_counts(table: _Table, keys: list[Key]) -> None:
    lines = [f"attcoseg: {len(table.images)} images with masks and attributes"]
    for attribute in ATTRIBUTES:
        values = sorted((key for key in keys if key[0] == attribute), key=lambda key: -len(table.examples[key]))
        counts = (f"{key[1]} {len(table.examples[key])}/{len(table.negatives.get(key, ()))}" for key in values)
        lines.append(f"  {attribute:<9} examples/negatives: {', '.join(counts) or 'none'}")
    reasons = ", ".join(f"{reason} {count}" for reason, count in table.left_out.most_common())
    print("\n".join([*lines, f"  left out: {reasons or 'nothing'}"]), file=sys.stderr)


@dataclass
class _Masked:
    """An image of the mask file, the same photograph in Visual Genome, and its objects with their annotations."""

    image: SourceImage  # its path is the bare file name
    genome: SourceImage
    annotations: list[Record] = field(default_factory=list)
    things: list[rules.Thing] = field(default_factory=list)


def _read_masks(path: Path, genome: Genome, words: rules.Words) -> dict[int, _Masked]:
    """The images that Visual Genome has too, by its id."""
    data, names, masked = read_object(path), dict[int, frozenset[str]](), dict[int, _Masked]()
    for category in data.records("categories"):
        name = category.text("name")
        called = [name, *category.data.get("synonyms", ()), *words.same_as.get(name.replace("_", " "), ())]
        names[category.integer("id")] = rules.name_words(called)
    for image in data.records("images"):
        if (image_id := genome.of_coco.get(image.integer("id"))) is not None:
            file = image.optional("file_name", str) or image.text("coco_url")  # LVIS v1 has the url only
            other, size = genome.images[image_id], (image.integer("width"), image.integer("height"))
            masked[image_id] = _Masked(SourceImage(Path(Path(file).name), other.image_id, *size), other)
    for annotation in data.records("annotations"):
        if entry := masked.get(genome.of_coco.get(annotation.integer("image_id"), -1)):
            (area,), box = annotation.numbers("area"), corners(*annotation.values("bbox", int, float))
            if (category_id := annotation.integer("category_id")) not in names:
                raise annotation.fault(f"category_id {category_id} is not in its categories")
            crowd, share = bool(annotation.data.get("iscrowd")), area / (entry.image.width * entry.image.height)
            entry.things.append(rules.Thing(box, share, names[category_id], len(entry.things), crowd))
            entry.annotations.append(annotation)
    return masked


def _read_table(options: SourceOptions, path: Path, genome_images: Genome, limits: rules.Limits) -> _Table:
    table, words = _Table(), rules.read_words()
    masked = _read_masks(path, genome_images, words)
    for record in stream_records(options.find_file("attributes.json")):
        if (entry := masked.get(record.integer("image_id"))) is None:
            table.left_out["image-without-masks"] += 1
            continue
        image, genome, things = entry.image, entry.genome, entry.things
        if abs(genome.width * image.height / (genome.height * image.width) - 1) > 0.02:
            table.left_out["image-of-other-shape"] += 1
            continue
        scale = (image.width / genome.width, image.height / genome.height)
        try:
            objects = list(rules.named_objects(record.values("attributes", dict), scale, things, limits))
        except (KeyError, TypeError) as error:
            raise record.fault(f"expected objects with x, y, w, h; got {error!r}") from error
        findings = rules.find_attributes(objects, things, words, limits)
        rules.find_positions(things, image.width, image.height, limits, findings)
        table.left_out.update(findings.left_out)
        for key, examples in findings.examples.items():
            rle = merge_rles([entry.annotations[thing.number].mask(image.height, image.width) for thing in examples])
            if rle_area(rle):
                table.examples.setdefault(key, []).append((len(table.images), rle, findings.words[key]))
            else:
                table.left_out["empty-mask"] += 1
        for key in findings.counters:
            table.negatives.setdefault(key, []).append((len(table.images), findings.words[key]))
        table.images.append(image)
    return table


class _Groups:
    """Draws group i of the source."""

    def __init__(self, options: SourceOptions, table: _Table, keys: list[Key]) -> None:
        self.options, self.table = options, table
        self.seed = [options.seed, zlib.crc32(options.split.encode())]
        self.leaders: list[list[tuple[Key, int]]] = []  # one list per attribute that has examples, in drawn order
        for attribute in ATTRIBUTES:
            every = [(key, i) for key in keys if key[0] == attribute for i in range(len(table.examples[key]))]
            if every:
                order = np.random.default_rng([*self.seed, len(self.leaders)]).permutation(len(every))
                self.leaders.append([every[i] for i in order])

    def make(self, index: int, _: int) -> Iterator[Draft]:
        """One group."""
        turn, attribute = divmod(index, len(self.leaders))
        key, first = self.leaders[attribute][turn % len(self.leaders[attribute])]
        rng = np.random.default_rng([*self.seed, 1 << 20, index])
        size = int(rng.integers(2, 5))
        every = self.table.examples[key]
        others = rng.choice(len(every) - 1, size=min(int(rng.integers(2, size + 1)), len(every)) - 1, replace=False)
        examples = [every[first], *(every[i + (i >= first)] for i in others.tolist())]
        # Of the images drawn that lack the value, those that show an object of the same name come first.
        lacking, words = self.table.negatives.get(key, []), examples[0][2]
        drawn = rng.choice(len(lacking), size=min(_HARD_TRIES, len(lacking)), replace=False).tolist() if lacking else []
        drawn = sorted(drawn, key=lambda i: not lacking[i][1] & words)[: size - len(examples)]
        numbers = [number for number, *_ in examples] + [lacking[i][0] for i in drawn]
        numbers = [numbers[i] for i in rng.permutation(len(numbers)).tolist()]
        masks = {number: rle for number, rle, _ in examples}
        images = [self.table.images[number] for number in numbers]
        images = [replace(image, path=self.options.coco_image(image.path.name)) for image in images]
        shown = [i for i, number in enumerate(numbers) if number in masks]
        names = [str(i + 1) for i in shown]
        fields = {"attribute": key[0], "value": key[1], "images": f"{', '.join(names[:-1])} and {names[-1]}"}
        regions = [Region(i, "mask", number, rle=masks[numbers[i]]) for number, i in enumerate(shown)]
        name, meta = f"attcoseg-{self.options.split}-{index:07d}", {"asks": key[0], "positives": len(shown)}
        more: dict[str, Any] = {"fields": {**fields, "targets": list(range(len(shown)))}, "regions": regions}
        yield group_draft(images, name, "attcoseg", "attcoseg", meta, **more)
