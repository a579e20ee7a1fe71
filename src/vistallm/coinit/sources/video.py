"""Videos: Ref-YouTube-VOS, Ref-DAVIS17 and MeViS (masks), HC-STVG (tubes of boxes) and ActivityNet-QA (questions).

A video is a folder of frames, `<images>/<video>/*.jpg`, in the order of their names. A shard keeps `--set frames=32` of
them, evenly spread; `data.frames` of those are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vistallm.coinit.frames import frame_numbers
from vistallm.coinit.sources.base import Draft, Reject, Source, SourceImage, SourceOptions, corners, group_draft
from vistallm.coinit.sources.records import Record, file_source, read_json, read_object
from vistallm.coinit.sources.text import UNKNOWN
from vistallm.regions.masks import mask_to_rle, rle_area, segmentation_to_rle
from vistallm.schema import Region
from vistallm.tasks.texts import tidy


def load_expressions(name: str, options: SourceOptions) -> Source:
    """Expressions of masks over frames, a unit for each video of meta_expressions.json.

    The masks are those of MeViS's mask_dict.json where that is there, else palette images in DAVIS's form,
    `Annotations/<video>/<frame>.png`, whose value is the object's number. Without an object's number nothing is scored.
    """
    split, settings = options.split, options.read_settings(frames=32)
    path = options.find_file("meta_expressions.json", folders=(f"meta_expressions/{split}/", f"{split}/", ""))
    folder = next((one for one in (options.root / split, options.root) if (one / "JPEGImages").is_dir()), options.root)
    listed = folder / "mask_dict.json"
    masks = Record(read_json(listed), str(listed)) if listed.is_file() else None
    videos = read_object(path).require("videos", dict)

    def make(item: tuple[str, Any], _: int) -> Iterator[Draft | Reject]:
        video, record = item[0], Record(item[1], f"{path}, video {item[0]}")
        names = sorted(record.values("frames", str))
        chosen = frame_numbers(len(names), int(settings["frames"]))
        place = (options.images or folder / "JPEGImages") / video
        images = [SourceImage(place / f"{names[i]}.jpg", f"{name}:{video}/{names[i]}") for i in chosen]
        for number, one in record.require("expressions", dict).items():
            expression = Record(one, f"{record.where}, expression {number}")
            text, key = tidy(expression.text("exp")), "obj_id" if masks is None else "anno_id"
            given = expression.optional(key, str, int, list)
            objects = [] if given is None else given if isinstance(given, list) else [given]
            meta: dict[str, Any] = {"video": video} | ({"unlabelled": True} if given is None else {})
            meta |= {"ref_id": f"{video}-{'-'.join(map(str, objects))}"} if objects else {}
            if masks is None:
                shown, drawn = [names[i] for i in chosen], folder / "Annotations" / video
                tracks = [_drawn(drawn, shown, int(thing), n) for n, thing in enumerate(objects)]
            else:
                tracks = [_listed(masks, str(thing), chosen, n) for n, thing in enumerate(objects)]
            rejected = [track for track in tracks if isinstance(track, Reject)]
            if rejected or not text:
                yield rejected[0] if rejected else Reject("empty-text", expression.where)
                continue
            regions = [region for track in tracks if not isinstance(track, Reject) for region in track]
            fields = {"video": True, "expr": text, "targets": list(range(len(objects)))}
            sample_id = f"{name}-{split}-{video}-{number}"
            yield group_draft(images, sample_id, "video_ref", name, meta, fields=fields, regions=regions)

    return Source(iter(sorted(videos.items())), make)


def _drawn(folder: Path, names: Sequence[str], number: int, place: int) -> list[Region] | Reject:
    """The masks of an object in palette images, one for each frame that shows it."""
    regions = []
    for frame, name in enumerate(names):
        try:
            with Image.open(folder / f"{name}.png") as file:
                values = np.asarray(file) if file.mode in ("P", "L") else None
        except OSError as error:
            return Reject("no-mask", f"{folder / name}.png: {error}")
        if values is None:
            return Reject("no-mask", f"{folder / name}.png: expected an image whose pixels are numbers of objects")
        if (values == number).any():
            regions.append(Region(frame, "mask", place, rle=mask_to_rle(values == number)))
    return regions


def _listed(masks: Record, number: str, chosen: Sequence[int], place: int) -> list[Region] | Reject:
    """The masks of an annotation in mask_dict.json: a run-length code, or null, for each frame."""
    track = masks.require(number, list)
    if chosen and chosen[-1] >= len(track):
        raise masks.fault(f"{number}: expected a mask or null for each of {chosen[-1] + 1} frames, got {len(track)}")
    coded = [(frame, track[i]) for frame, i in enumerate(chosen) if track[i] is not None]
    found = [(frame, segmentation_to_rle(rle, *rle["size"])) for frame, rle in coded]
    return [Region(frame, "mask", place, rle=rle) for frame, rle in found if rle_area(rle)]


def _frames(options: SourceOptions, source: str, video: str, count: int, where: str) -> list[SourceImage] | Reject:
    """All frames of a video's folder; `count`: how many there must be, 0 = any number."""
    folder = (options.images or options.root / "frames") / video
    files = sorted(folder.glob("*.jpg"))
    if not files or count and len(files) != count:
        return Reject("no-frames", f"{where}: expected {count or 'some'} frames *.jpg in {folder}, got {len(files)}")
    return [SourceImage(path, f"{source}:{video}/{path.stem}") for path in files]


def load_hcstvg(options: SourceOptions) -> Source:
    """HC-STVG: when and where a person does what is said; `bbox` lists [x, y, width, height] from frame `st_frame` on.

    `st_frame` counts from 1. The folder of a video holds all of its `img_num` frames.
    """
    settings = options.read_settings(frames=32, file="")
    path = options.find_file(*filter(None, (settings["file"], f"{options.split}.json", f"{options.split}v2.json")))

    def make(item: tuple[str, Any], _: int) -> Iterator[Draft | Reject]:
        video, record = Path(item[0]).stem, Record(item[1], f"{path}, {item[0]}")
        height, width = record.values("img_size", int, float)
        images = _frames(options, "hcstvg", video, record.integer("img_num"), record.where)
        if isinstance(images, Reject):
            yield images
            return
        first, tube = record.integer("st_frame") - 1, record.values("bbox", list)
        chosen, regions = frame_numbers(len(images), int(settings["frames"])), list[Region]()
        canvas = SourceImage(Path(), "", int(width), int(height))
        for place, frame in enumerate(chosen):
            if first <= frame < first + len(tube):
                box = canvas.cut(corners(*tube[frame - first]), f"{record.where}, frame {frame + 1}")
                if isinstance(box, Reject):
                    yield box
                else:
                    regions.append(Region(place, "box", 0, box=box))
        name = next(key for key in ("English", "caption") if key in record.data or key == "caption")
        fields = {"video": True, "expr": tidy(record.text(name))}
        kept, sample_id = [images[i] for i in chosen], f"hcstvg-{options.split}-{video}"
        meta = {"video": video}
        yield group_draft(kept, sample_id, "video_grounding", "hcstvg", meta, fields=fields, regions=regions)

    return Source(iter(sorted(read_json(path, dict).items())), make)


def load_activitynet_qa(options: SourceOptions) -> Source:
    """ActivityNet-QA: questions about a video in `<split>_q.json`, one-word answers by id in `<split>_a.json`."""
    split, settings = options.split, options.read_settings(frames=32)
    path = options.find_file(f"{split}_q.json", folders=("dataset/", ""))
    beside = path.with_name(f"{split}_a.json")
    answers = {one["question_id"]: one for one in read_json(beside, list)} if beside.is_file() else {}

    def make(record: Record, _: int) -> Iterator[Draft | Reject]:
        video, number = record.text("video_name"), record.text("question_id")
        images = _frames(options, "activitynet", f"v_{video}", 0, record.where)
        if isinstance(images, Reject):
            yield images
            return
        answer = Record(answers[number], f"{beside}, {number}") if number in answers else None
        meta = {"video": video} | ({"asks": str(answer.integer("type"))} if answer else {"unlabelled": True})
        said = answer.text("answer") if answer else UNKNOWN
        fields = {"video": True, "question": tidy(record.text("question")).rstrip("?") + "?", "answer": said}
        kept = [images[i] for i in frame_numbers(len(images), int(settings["frames"]))]
        yield group_draft(kept, f"activitynet-qa-{number}", "video_qa", "activitynet-qa", meta, fields=fields)

    return file_source(path, read_json(path, list), make)
