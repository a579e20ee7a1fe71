"""Visual Genome's regions: `region_descriptions.json` and `image_data.json` in, REG and REC samples out.

Visual Genome has no splits of its own: the only one is `train`. Settings: `tasks=reg,rec`; `portion=1.0`, the share of
the regions to take, drawn for each task by the seed (there are 5.4 million; the authors' release takes 0.05 of each). A
unit is one image. A phrase that an image's regions use twice names no single box: it makes no REC sample.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vistallm.coinit.sources.base import (
    Draft,
    Packed,
    Reject,
    Source,
    SourceFormatError,
    SourceImage,
    SourceOptions,
    chosen,
    first_file,
)
from vistallm.coinit.sources.records import Record, RecordSource, read_list
from vistallm.coinit.sources.shapes import clip_box
from vistallm.schema import Region

_Region = tuple[int, tuple[int, ...], str]  # id, box (x, y, width, height) in pixels, phrase
_CHUNK = 1 << 22  # characters read at a time; a record of region_descriptions.json has some 7,000


@dataclass(frozen=True)
class GenomeImage:
    """An image of Visual Genome: size in pixels, its COCO id if it is one of COCO's, file relative to the images."""

    image_id: int
    width: int
    height: int
    coco_id: int | None
    file: str

    @property
    def key(self) -> str:
        """The id that leaks are searched by: "vg:1", or "vg:1|coco:5"."""
        return f"vg:{self.image_id}" + (f"|coco:{self.coco_id}" if self.coco_id is not None else "")

    def find(self, folder: Path) -> SourceImage:
        """The image in a folder that holds VG_100K and VG_100K_2, or all images side by side."""
        name = self.file.rpartition("/")[2]
        path = first_file(folder, self.file, name, f"VG_100K/{name}", f"VG_100K_2/{name}", f"images/{self.file}")
        return SourceImage(path, self.key, self.width, self.height)


def read_images(options: SourceOptions, image_data: str = "") -> dict[int, GenomeImage]:
    """Read image_data.json from the path given, --root or --images: sizes, and which images are COCO's too.

    Raises:
        ValueError: it is in none of them. SourceFormatError: a record lacks a key.
    """
    folders = [folder for folder in (options.root, options.images, options.root.parent) if folder is not None]
    found = [folder / "image_data.json" for folder in folders if (folder / "image_data.json").is_file()]
    path = Path(image_data) if image_data else found[0] if found else options.find_file("image_data.json")
    images = {}
    for number, value in enumerate(read_list(path)):
        record = Record(value, f"{path}, record {number}")
        image_id, file = record.integer("image_id"), "/".join(record.text("url").split("/")[-2:])
        size = record.integer("width"), record.integer("height")
        images[image_id] = GenomeImage(image_id, *size, record.optional("coco_id", int), file)
    return images


def stream_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSON list one by one; the file is never whole in memory.

    Raises:
        SourceFormatError: the file is not a list, or ends within a record.
    """
    decoder, text, place, number = json.JSONDecoder(), "", 0, 0
    with path.open(encoding="utf-8") as file:
        if file.read(1) != "[":
            raise SourceFormatError(f"{path}: expected a JSON list, it begins otherwise")
        while True:
            while place < len(text) and text[place] in ", \t\r\n":
                place += 1
            if text[place : place + 1] == "]":
                return
            where = f"{path}, record {number}"
            try:
                record, place = decoder.raw_decode(text, place)
            except json.JSONDecodeError as error:
                if not (more := file.read(_CHUNK)):
                    raise SourceFormatError(f"{where}: not JSON ({error}); download it again") from error
                text, place = text[place:] + more, 0
                continue
            yield Record(record, where)
            number += 1


def image_at(images: dict[int, GenomeImage], image_id: int, where: str) -> GenomeImage:
    """The image of an id; raises SourceFormatError when image_data.json has none."""
    if image_id not in images:
        raise SourceFormatError(f"{where}: image_id {image_id} is not in image_data.json; both must be of one version")
    return images[image_id]


def load_visual_genome(options: SourceOptions) -> Source:
    """Region captions and region REC; the split is `train`."""
    options.check_split("train")
    settings = options.read_settings(tasks="reg,rec", portion="1.0", image_data="")
    tasks = chosen(settings, "tasks", "reg", "rec")
    try:
        portion = float(settings["portion"])
    except ValueError:
        portion = 0.0
    if not 0 < portion <= 1:
        raise ValueError(f"--set portion: expected a share above 0 and up to 1, got {settings['portion']!r}")
    images = read_images(options, settings["image_data"])
    # 5.4 million regions are some 300 MB packed (57 bytes each), and forked workers share them.
    packed = Packed(_read_regions(options.find_file("region_descriptions.json"), images))
    starts = np.cumsum([0, *(len(packed[i][1]) for i in range(len(packed)))]).tolist()
    drawn = {
        task: np.random.default_rng([options.seed, number]).random(starts[-1]) < portion
        for number, task in enumerate(("reg", "rec"))
        if task in tasks
    }

    def make(record: tuple[int, list[_Region]], index: int) -> Iterator[Draft | Reject]:
        image_id, regions = record
        image = images[image_id].find(options.image_folder)
        uses = Counter(phrase.lower() for _, _, phrase in regions)
        for row, (region_id, (x, y, width, height), phrase) in enumerate(regions, starts[index]):
            tasks = [task for task, rows in drawn.items() if rows[row]]
            if not tasks:
                continue
            where = f"region_descriptions.json, image {image_id}, region {region_id}"
            box = clip_box((x, y, x + width, y + height), image.width, image.height)
            if box is None:
                yield Reject("empty-box", f"{where}: nothing of {(x, y, width, height)} is in the image")
                continue
            if not phrase:
                yield Reject("empty-phrase", where)
                continue
            for task in tasks:
                if task == "rec" and uses[phrase.lower()] > 1:
                    yield Reject("ambiguous-phrase", f"{where}: {phrase!r} names {uses[phrase.lower()]} regions")
                    continue
                name, region = f"visual-genome-train-{image_id}-{region_id}-{task}", Region(0, "box", box=box)
                yield image.draft(name, task, "visual-genome", fields={"expr": phrase}, regions=[region])

    return RecordSource(packed, make)


def _read_regions(path: Path, images: dict[int, GenomeImage]) -> Iterator[tuple[int, list[_Region]]]:
    """The regions of each image, in file order."""
    for record in stream_records(path):
        image = image_at(images, record.integer("id"), record.where)
        regions = [
            (
                region.integer("region_id"),
                tuple(region.integer(key) for key in ("x", "y", "width", "height")),
                " ".join(region.text("phrase").split()),
            )
            for region in record.records("regions", "region")
        ]
        yield image.image_id, regions
