"""The check of shard folders: hashes, records, images, regions, texts and leaks; folders in, counts and faults out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from vistallm.coinit.build import is_normalised, run_forked, text_number
from vistallm.coinit.images import decode_pixels
from vistallm.coinit.shards import read_index, read_raw, read_shard
from vistallm.coinit.sources.base import is_training, sample_images
from vistallm.regions.codec import RegionCodec, RegionParseError
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.tracks import write_tracks
from vistallm.schema import REGION_KINDS, ImageInfo, Region, Sample
from vistallm.tasks import (
    TASKS,
    RegionSlot,
    earlier_rounds,
    find_region,
    find_tracks,
    split_placeholders,
    write_answer,
    write_instruction,
)

FIRST = 5  # faults of each kind that are kept with their text
WARNINGS = ("lost-character", "exif-orientation")  # kinds that leave a set usable
Fault = tuple[str, str]  # kind, a short kebab-case word, and what is wrong where
_BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_FOREIGN = re.compile(r"[^\x00-\x7f]{2,}")
_ROUND = ("instruction", "answer")


@dataclass
class CheckReport:
    """Samples per (folder, split) by task; faults (`totals` empty = sound) and warnings, counted by kind.

    `faults` keeps the texts of the first FIRST of each kind. `notes` say what is worth a look, but may be right.
    """

    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    totals: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, text: str, number: int = 1) -> None:
        """Count faults or warnings of a kind and keep the text of the first."""
        (self.warnings if kind in WARNINGS else self.totals)[kind] += number
        kept = self.faults.setdefault(kind, [])
        if len(kept) < FIRST:
            kept.append(text)


@dataclass
class _CheckedShard:
    """What one shard gives: its faults, and what only makes sense beside the other shards."""

    path: Path
    split: str
    tasks: Counter[str] = field(default_factory=Counter)
    report: CheckReport = field(default_factory=CheckReport)
    ids: list[int] = field(default_factory=list)  # 64 bits of each sample's
    images: set[str] = field(default_factory=set)
    files: set[int] = field(default_factory=set)  # hashes of image bytes: forked workers share Python's hash seed
    nameless: int = 0  # samples without image ids


def check(
    roots: Iterable[Path | str], exclude: frozenset[str] = frozenset(), workers: int | None = None
) -> CheckReport:
    """Read every byte of shard folders and list what is wrong; raises ValueError when one has no index.

    Give folders of evaluation splits too, so that leaks are seen: neither their images nor those of `exclude` may be in
    training samples. `workers`: processes, None = one per CPU.
    """
    report, listed = CheckReport(), []
    for root in map(Path, roots):
        rows = read_index(root)["shards"]
        for path in sorted(root.glob("*.tar")):
            if path.name not in rows:
                report.add("unlisted-shard", f"{path}: not in index.json")
        listed += [(root / name, row) for name, row in rows.items()]
    running = run_forked(_check_shard, listed, workers)
    shards = list(tqdm(running, total=len(listed), unit="shard", desc="check"))
    for shard in shards:
        for kind, texts in shard.report.faults.items():
            for text in texts:
                report.add(kind, f"{shard.path}: {text}", 0)
        report.totals += shard.report.totals
        report.warnings += shard.report.warnings
        report.counts.setdefault((str(shard.path.parent), shard.split), Counter()).update(shard.tasks)
    _find_duplicates(shards, report)
    _find_leaks(shards, exclude, report)
    return report


def evaluation_images(folders: Iterable[Path]) -> set[str]:
    """Ids of all images in evaluation splits of shard folders; raises ValueError for a record that can't be read."""
    ids: set[str] = set()
    shards = [(folder / name, row["split"]) for folder in folders for name, row in read_index(folder)["shards"].items()]
    for path in (path for path, split in shards if not is_training(split)):
        for raw in read_raw(path, images=False):
            if raw.record is None:
                raise ValueError(f"{path}: expected records that can be read, got {raw.fault}; build the shard again")
            ids |= sample_images(Sample.from_json(raw.record))
    return ids


def _check_shard(listed: tuple[Path, dict[str, Any]]) -> _CheckedShard:
    """Check one shard against its index row, and every sample in it."""
    path, row = listed
    shard = _CheckedShard(path, row["split"])
    report = shard.report
    if not path.is_file():
        report.add("missing-shard", "listed in index.json, but there is no such file")
        return shard
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    if size != row["bytes"] or digest != row["sha256"]:
        report.add("bytes", f"bytes differ from the index ({size} bytes, {row['bytes']} listed); build the shard again")
    # The answer must be readable whatever the sampler, so the cheapest one writes it.
    codec = RegionCodec(mask_sampler="uniform", cache_size=256)
    try:
        for sample, images in read_shard(path):
            shard.tasks[sample.task] += 1
            shard.ids.append(text_number(sample.id))
            shard.images |= sample_images(sample)
            shard.files.update(map(hash, images))
            shard.nameless += not sample.meta.get("image_ids")
            for kind, text in sample_faults(sample, images, codec):
                report.add(kind, f"sample {sample.id}: {text}")
    except (ValueError, TypeError, AttributeError, OSError, tarfile.TarError) as error:  # other types in a record, too
        report.add("record", f"{error!r}; the rest of the shard was not checked")
    if shard.tasks != Counter(row["tasks"]) or shard.tasks.total() != row["samples"]:
        report.add("count", f"holds {dict(sorted(shard.tasks.items()))}, the index says {row['tasks']}")
    return shard


def _find_duplicates(shards: list[_CheckedShard], report: CheckReport) -> None:
    """Ids that occur twice anywhere, by the places of their samples."""
    ids = np.concatenate([np.array(shard.ids, np.uint64) for shard in shards])
    ends = np.cumsum([len(shard.ids) for shard in shards])
    order = np.argsort(ids, kind="stable")

    def place(index: int) -> str:
        number = int(np.searchsorted(ends, index, "right"))
        return f"{shards[number].path}, sample {index - ends[number] + len(shards[number].ids)}"

    for i in np.flatnonzero(np.diff(ids[order]) == 0).tolist():
        report.add("duplicate-id", f"{place(order[i + 1])}: the same id is that of {place(order[i])}")


def _find_leaks(shards: list[_CheckedShard], exclude: frozenset[str], report: CheckReport) -> None:
    """Images of evaluation splits, here or in `exclude`, that training shards hold."""
    kept: dict[str, str] = dict.fromkeys(exclude, "the list of excluded images")
    training = [shard for shard in shards if is_training(shard.split)]
    evaluation = [shard for shard in shards if not is_training(shard.split)]
    for shard in evaluation:
        kept.update(dict.fromkeys(shard.images, str(shard.path)))
    for shard in training:
        if leaked := sorted(shard.images & kept.keys()):
            text = f"{shard.path}: {len(leaked)} image(s) are for evaluation, first {leaked[0]} of {kept[leaked[0]]}"
            report.add("leak", f"{text}; build the split with --exclude", len(leaked))
    same = set[int]().union(*(shard.files for shard in training)) & set().union(*(shard.files for shard in evaluation))
    if same:
        report.notes.append(f"{len(same)} image file(s) of evaluation splits are in training shards, byte for byte")
    if nameless := sum(shard.nameless for shard in training):
        report.notes.append(f"{nameless} training sample(s) carry no image ids, so that leaks cannot be seen by them")


def broken_text(text: str) -> str | None:
    """The first piece of a text that was decoded wrongly: lost or control characters, or UTF-8 read as Windows-1252."""
    if broken := _BROKEN.search(text):
        return broken[0]
    for piece in _FOREIGN.findall(text):
        with contextlib.suppress(UnicodeError):
            if piece.encode("cp1252").decode("utf-8") != piece:
                return piece
    return None


@lru_cache(16)
def _image_faults(data: bytes, info: tuple[str, int, int]) -> list[Fault]:
    """Faults of an encoded image beside its (file, width, height) in the record."""
    file, *size = info
    try:
        height, width = decode_pixels(data, file).shape[:2]
    except ValueError as error:
        return [("image", str(error))]
    with Image.open(io.BytesIO(data)) as header:
        orientation = header.getexif().get(0x0112, 1)
    faults = []
    if orientation != 1:
        faults.append(("exif-orientation", f"image {file} has orientation {orientation}; its stored pixels are used"))
    if [width, height] != size:
        faults.append(("image-size", f"image {file} is {width} x {height}, its record says {size[0]} x {size[1]}"))
    return faults


def sample_faults(sample: Sample, images: list[bytes], codec: RegionCodec) -> Iterator[Fault]:
    """Faults of a sample: task, image sizes, regions inside their image, texts, and an answer that reads back."""
    if sample.task not in TASKS:
        yield "task", f"unknown task {sample.task!r}; known: {', '.join(TASKS)}"
        return
    ids = sample.meta.get("image_ids")
    if ids is not None and (not isinstance(ids, list) or len(ids) != len(images)):
        yield "image-ids", f"expected a list of {len(images)} image ids, got {ids}"
    for info, data in zip(sample.images, images, strict=True):
        yield from _image_faults(data, (info.file, info.width, info.height))
    faults = [(region.object, _region_fault(region, sample.images[region.image])) for region in sample.regions]
    if any(fault for _, fault in faults):
        yield from (("region", f"region of object {number}: {fault}") for number, fault in faults if fault)
        return
    try:
        pairs = [
            (f"earlier {name}", text)
            for pair in earlier_rounds(sample)
            for name, text in zip(_ROUND, pair, strict=True)
        ]
        pairs.append(("instruction", write_instruction(sample, template=0)))
        if not sample.meta.get("unlabelled"):
            pairs.append(("answer", write_answer(sample)))
    except ValueError as error:
        yield "text", str(error)
    else:
        for name, text in pairs:
            yield from ((kind, f"the {name} {fault}") for kind, fault in _text_faults(name, text, sample, codec))


def _text_faults(name: str, text: str, sample: Sample, codec: RegionCodec) -> Iterator[Fault]:
    """Placeholders name objects that have regions, and an answer's regions read back as written when streaming."""
    if not text.strip():
        yield "empty-text", "is empty"
    if (broken := broken_text(text)) == "\ufffd":
        yield "lost-character", f"has {broken!r} for a character that its source's file lacks"
    elif broken:
        yield "mojibake", f"holds {broken!r}; read the source's texts as UTF-8"
    letterboxes = [Letterbox(info.width, info.height, max(info.width, info.height)) for info in sample.images]
    pieces, written, posed = [], list[int](), list[Region]()  # of the text; the image of each region in it
    try:
        for piece in split_placeholders(text):
            if isinstance(piece, RegionSlot):
                piece, images, posed = _slot_text(piece, sample, posed, codec, letterboxes, name.endswith("answer"))
                written += images
            pieces.append(piece)
        if written and name.endswith("answer"):
            read = [region.image for region in codec.decode("".join(pieces), letterboxes, video=sample.video).regions]
            if written != read:
                yield "parse-back", f"has {len(written)} regions, {len(read)} are read back"
    except RegionParseError as error:
        yield "parse-back", f"can't be read: {error}"
    except ValueError as error:
        yield "placeholder", f"has a wrong placeholder: {error}"


def _written(slot: RegionSlot, sample: Sample, before: list[Region]) -> tuple[list[Region], str]:
    """The regions that a placeholder is about and the kind of their tokens, "" where links alone write them.

    A keypoint is about the regions `before` it. Raises ValueError for a region prompt without a mask, or a keypoint
    that an object lacks.
    """
    regions = [find_region(sample, number, slot.kind) for number in slot.objects]
    regions = sorted(regions, key=lambda region: region.image) if slot.keypoint is None else before
    if slot.shape and any(region.rle is None for region in regions):
        raise ValueError(f"region prompt {slot.shape} of object {slot.objects[0]}: expected a mask, got none")
    if slot.keypoint is not None and (short := [r for r in regions if slot.keypoint >= len(r.keypoints or ())]):
        raise ValueError(f"point {slot.keypoint} of object {short[0].object}: it has {len(short[0].keypoints or ())}")
    kind = slot.kind or (regions[0].kind if regions else "")
    return regions, kind if kind in REGION_KINDS and not slot.shape and slot.keypoint is None else ""


def _slot_text(
    slot: RegionSlot,
    sample: Sample,
    before: list[Region],
    codec: RegionCodec,
    letterboxes: list[Letterbox],
    answer: bool,
) -> tuple[str, list[int], list[Region]]:
    """A placeholder as text, the image of each region in it, and the regions that a keypoint behind it is about."""
    if sample.video and answer:
        tracks, kind = find_tracks(sample, slot)
        images = sorted(region.image for track in tracks for region in track)
        return write_tracks(codec, tracks, letterboxes, kind), images, before
    regions, kind = _written(slot, sample, before)
    text = codec.encode(regions, letterboxes, kind) if kind else ""
    return text, [region.image for region in regions if kind], regions


def _region_fault(region: Region, image: ImageInfo) -> str | None:
    width, height = image.width, image.height
    if region.box is not None:
        x0, y0, x1, y1 = region.box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            return f"box {region.box} is not inside 0..{width} x 0..{height}"
        if is_normalised(region.box):
            return f"box {region.box} is in the first pixel; expected pixels, not shares of the image's sides"
    if region.point is not None and not (0 <= region.point[0] <= width and 0 <= region.point[1] <= height):
        return f"point {region.point} is not inside 0..{width} x 0..{height}"
    for x, y, v in region.keypoints or ():
        if v and not (0 <= x <= width and 0 <= y <= height):
            return f"keypoint {(x, y)} is not inside 0..{width} x 0..{height}"
    if region.rle is None:
        return None
    if list(region.rle.get("size", ())) != [height, width] or not isinstance(region.rle.get("counts"), str):
        return f"rle: expected size {[height, width]} and text counts, got size {region.rle.get('size')}"
    return None if coco_mask.area(region.rle) > 0 else "rle holds no pixel"
