"""Flickr30k Entities: `Sentences/<id>.txt`, `Annotations/<id>.xml`, `{train,val,test}.txt` in, captions with boxes out.

A sentence such as "[/EN#1/people A man] in [/EN#2/clothing a blue shirt] ." becomes the caption
"A man {regions:0} in a blue shirt {regions:1}.": the boxes of a phrase follow it (task `flickr`). Phrases that show
nothing (id 0) or have no box (`scene`, `nobndbox`) stay plain words. Each phrase alone with its boxes is a `grec`
sample, for the phrase grounding benchmarks. Settings: `tasks=flickr` for training, `tasks=flickr,grec` otherwise.
Images: flickr30k-images/<id>.jpg. A unit is one image.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistallm.coinit.sources.base import Draft, Reject, Source, SourceFormatError, SourceOptions, clip_box
from vistallm.coinit.sources.records import RecordSource, check_split, find_file, image_file, read_settings
from vistallm.coinit.sources.visual_genome import chosen
from vistallm.schema import ImageInfo, Region, Sample

Box = tuple[float, float, float, float]
_PHRASE = re.compile(r"\[/EN#(\d+)(?:/[\w-]+)+ ([^\]]+)\]")
_BEFORE_MARK = re.compile(r" (?=[.,;:!?](?: |$))")


@dataclass(frozen=True)
class _Image:
    """Where an image's captions come from, and its boxes: (x0, y0, x1, y1) in pixels, by phrase id."""

    image_id: str
    path: Path
    width: int
    height: int
    boxes: list[Box]
    of_phrase: dict[str, list[int]]


def load_flickr30k(options: SourceOptions) -> Source:
    """Grounded captions and phrases; splits train, val, test."""
    check_split(options, "train", "val", "test")
    default = "flickr" if options.split == "train" else "flickr,grec"
    tasks = chosen(read_settings(options, tasks=default), "tasks", "flickr", "grec")
    ids = find_file(options.root, f"{options.split}.txt").read_text(encoding="utf-8").split()

    def make(image_id: str, _: int) -> Iterator[Draft | Reject]:
        annotation = options.root / "Annotations" / f"{image_id}.xml"
        sentences = options.root / "Sentences" / f"{image_id}.txt"
        if missing := [path for path in (annotation, sentences) if not path.is_file()]:
            raise SourceFormatError(
                f"{options.split}.txt, record {image_id}: expected {missing[0]}, found no such file"
            )
        folder = options.images or options.root / "flickr30k-images"
        path = image_file(folder, f"{image_id}.jpg", f"flickr30k-images/{image_id}.jpg")
        image, rejects = _read_annotation(annotation, image_id, path)
        yield from rejects
        for line, sentence in enumerate(sentences.read_text(encoding="utf-8").splitlines()):
            if sentence.strip():
                yield from _samples(options.split, tasks, image, line, sentence)

    return RecordSource(ids, make)


def _samples(split: str, tasks: list[str], image: _Image, line: int, sentence: str) -> Iterator[Draft | Reject]:
    where = f"Sentences/{image.image_id}.txt, line {line + 1}"
    caption, used, phrases = _write_caption(sentence, image.of_phrase, where)
    if not used:
        yield Reject("no-box", f"{where}: none of its phrases has a box")
        return

    def draft(task: str, name: str, fields: dict[str, Any], numbers: list[int]) -> Draft:
        regions = [Region(0, "box", i, box=image.boxes[number]) for i, number in enumerate(numbers)]
        sample = Sample(
            id=f"flickr30k-{split}-{image.image_id}-{name}",
            task=task,
            source="flickr30k",
            images=[ImageInfo("", image.width, image.height)],
            fields={**fields, "targets": list(range(len(regions)))},
            regions=regions,
            meta={"image_ids": [f"flickr30k:{image.image_id}"]},
        )
        return Draft(sample, [image.path])

    if "flickr" in tasks:
        yield draft("flickr", str(line), {"caption": caption}, used)
    if "grec" in tasks:
        for place, (phrase, numbers) in enumerate(phrases):
            yield draft("grec", f"{line}-{place}", {"expr": phrase}, numbers)


def _write_caption(
    sentence: str, of_phrase: dict[str, list[int]], where: str
) -> tuple[str, list[int], list[tuple[str, list[int]]]]:
    """Caption with placeholders, the boxes behind their numbers as first named, (phrase, boxes) of each phrase."""
    used: dict[int, int] = {}
    phrases = []

    def replace(match: re.Match[str]) -> str:
        found = of_phrase.get(match[1], [])
        if not found:
            return match[2]
        phrases.append((match[2], found))
        numbers = [str(used.setdefault(number, len(used))) for number in found]
        return f"{match[2]} {{regions:{','.join(numbers)}}}"

    caption = _PHRASE.sub(replace, " ".join(sentence.split()))
    if "[/EN#" in caption:
        raise SourceFormatError(f"{where}: expected phrases as [/EN#1/people A man], got {sentence!r}")
    return _BEFORE_MARK.sub("", caption), list(used), phrases


def _read_annotation(path: Path, image_id: str, image: Path) -> tuple[_Image, list[Reject]]:
    """The image with its boxes cut to it, and a reject for every box of which nothing is left."""
    (width, height), entries = _read_boxes(path)
    rejects: list[Reject] = []
    boxes: list[Box] = []
    of_phrase: dict[str, list[int]] = {}
    for number, (box, names) in enumerate(entries):
        cut = clip_box(box, width, height)
        if cut is None:
            rejects.append(Reject("empty-box", f"{path}, box {number}: nothing of {box} is in the image"))
            continue
        for name in names:
            of_phrase.setdefault(name, []).append(len(boxes))
        boxes.append(cut)
    return _Image(image_id, image, width, height, boxes, of_phrase), rejects


def _read_boxes(path: Path) -> tuple[tuple[int, int], list[tuple[Box, list[str]]]]:
    """Image size, and each object's box with the phrase ids that name it.

    The file counts pixels from 1 and includes the last one: pixels 2 to 90 span the edges 1 to 90.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise SourceFormatError(f"{path}: not XML ({error}); download it again") from error
    size = (int(_number(root, "size/width", path)), int(_number(root, "size/height", path)))
    boxes = []
    for place, entry in enumerate(root.findall("object")):
        names = [name.text or "" for name in entry.findall("name")]
        if not names:
            raise SourceFormatError(f"{path}, object {place}: expected <name>, found none")
        if entry.find("bndbox") is None:
            if entry.find("scene") is None and entry.find("nobndbox") is None:
                raise SourceFormatError(f"{path}, object {place}: expected <bndbox>, <scene> or <nobndbox>, found none")
            continue
        x0, y0, x1, y1 = (_number(entry, f"bndbox/{name}", path) for name in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append(((x0 - 1, y0 - 1, x1, y1), names))
    return size, boxes


def _number(entry: ElementTree.Element, name: str, path: Path) -> float:
    text = entry.findtext(name)
    try:
        return float(text or "")
    except ValueError:
        raise SourceFormatError(f"{path}: expected a number in <{name}>, got {text!r}") from None
