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
from dataclasses import dataclass, field
from pathlib import Path

from vistallm.coinit.sources.base import (
    Draft,
    Reject,
    Source,
    SourceFormatError,
    SourceImage,
    SourceOptions,
    chosen,
    first_file,
)
from vistallm.coinit.sources.records import RecordSource
from vistallm.coinit.sources.shapes import clip_box
from vistallm.schema import Region

Box = tuple[float, float, float, float]
_PHRASE = re.compile(r"\[/EN#(\d+)(?:/[\w-]+)+ ([^\]]+)\]")
_BEFORE_MARK = re.compile(r" (?=[.,;:!?](?: |$))")


@dataclass
class _Annotation:
    """An image's size, its boxes (x0, y0, x1, y1) in pixels, cut to it, and which of them each phrase id names."""

    width: int
    height: int
    boxes: list[Box] = field(default_factory=list)
    of_phrase: dict[str, list[int]] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)


def load_flickr30k(options: SourceOptions) -> Source:
    """Grounded captions and phrases; splits train, val, test."""
    split = options.check_split("train", "val", "test")
    default = "flickr" if split == "train" else "flickr,grec"
    tasks = chosen(options.read_settings(tasks=default), "tasks", "flickr", "grec")
    ids = options.find_file(f"{split}.txt").read_text(encoding="utf-8").split()
    folder = options.images or options.root / "flickr30k-images"

    def make(image_id: str, _: int) -> Iterator[Draft | Reject]:
        files = [options.root / name for name in (f"Annotations/{image_id}.xml", f"Sentences/{image_id}.txt")]
        if missing := [path for path in files if not path.is_file()]:
            raise SourceFormatError(f"{split}.txt, record {image_id}: expected {missing[0]}, found no such file")
        found = _read_annotation(files[0])
        yield from found.rejects
        path = first_file(folder, f"{image_id}.jpg", f"flickr30k-images/{image_id}.jpg")
        image = SourceImage(path, f"flickr30k:{image_id}", found.width, found.height)
        for line, sentence in enumerate(files[1].read_text(encoding="utf-8").splitlines()):
            if not sentence.strip():
                continue
            where = f"Sentences/{image_id}.txt, line {line + 1}"
            caption, used, phrases = _write_caption(sentence, found.of_phrase, where)
            if not used:
                yield Reject("no-box", f"{where}: none of its phrases has a box")
                continue
            texts: list[tuple[str, str, dict[str, str], list[int]]] = [
                ("flickr", f"{line}", {"caption": caption}, used)
            ]
            texts += [("grec", f"{line}-{i}", {"expr": phrase}, boxes) for i, (phrase, boxes) in enumerate(phrases)]
            for task, name, fields, boxes in texts:
                if task in tasks:
                    yield image.draft(
                        f"flickr30k-{split}-{image_id}-{name}",
                        task,
                        "flickr30k",
                        fields={**fields, "targets": list(range(len(boxes)))},
                        regions=[Region(0, "box", i, box=found.boxes[box]) for i, box in enumerate(boxes)],
                    )

    return RecordSource(ids, make)


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


def _read_annotation(path: Path) -> _Annotation:
    """Read an XML file; a box of which nothing is in the image is a reject.

    The file counts pixels from 1 and includes the last one: pixels 2 to 90 span the edges 1 to 90.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise SourceFormatError(f"{path}: not XML ({error}); download it again") from error
    found = _Annotation(int(_number(root, "size/width", path)), int(_number(root, "size/height", path)))
    for place, entry in enumerate(root.findall("object")):
        names = [name.text or "" for name in entry.findall("name")]
        if not names:
            raise SourceFormatError(f"{path}, object {place}: expected <name>, found none")
        if entry.find("bndbox") is None:
            if entry.find("scene") is None and entry.find("nobndbox") is None:
                raise SourceFormatError(f"{path}, object {place}: expected <bndbox>, <scene> or <nobndbox>, found none")
            continue
        x0, y0, x1, y1 = (_number(entry, f"bndbox/{name}", path) for name in ("xmin", "ymin", "xmax", "ymax"))
        box = (x0 - 1, y0 - 1, x1, y1)
        cut = clip_box(box, found.width, found.height)
        if cut is None:
            found.rejects.append(Reject("empty-box", f"{path}, object {place}: nothing of {box} is in the image"))
            continue
        for name in names:
            found.of_phrase.setdefault(name, []).append(len(found.boxes))
        found.boxes.append(cut)
    return found


def _number(entry: ElementTree.Element, name: str, path: Path) -> float:
    text = entry.findtext(name)
    try:
        return float(text or "")
    except ValueError:
        raise SourceFormatError(f"{path}: expected a number in <{name}>, got {text!r}") from None
