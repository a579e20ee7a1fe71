"""The dataclasses that stages exchange: Sample -> Batch -> Prediction.

In: nothing (this module imports no other module of the package). Out: typed records, with a shape beside every array.

Frame of every coordinate here: pixels of the ORIGINAL image, x to the right, y down, pixel edges at integers
(a one-pixel image spans [0, 1] x [0, 1]); never (y, x).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100
SCHEMA_VERSION = 1

RegionKind = Literal["mask", "box", "point"]
REGION_KINDS: tuple[str, ...] = ("mask", "box", "point")
Rle = dict[str, Any]  # COCO run lengths: {"size": [H, W], "counts": str (compressed)}


class SampleReject(ValueError):
    """A sample that can't be used; `reason` is a short word, for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Region:
    """A box, a point or a mask of one object in one image of a sample.

    Attributes:
        image: index of the image in the sample, from 0.
        kind: "mask", "box" or "point"; the field of the same meaning must be filled.
        object: number of the object, by which a placeholder such as `{regions:0,2}` names it.
        box: (x0, y0, x1, y1) float, pixels of the original image.
        point: (x, y) float, pixels of the original image.
        rle: the whole mask as COCO RLE of the original image size.
        polygons: the mask as parts, each (n, 2) float32, pixels of the original image; filled by sampling or parsing.
        confidence: of a generated region, in [0, 1] (`vistallm.evaluate.confidence`).
    """

    image: int
    kind: str
    object: int = 0
    box: tuple[float, ...] | None = None
    point: tuple[float, ...] | None = None
    rle: Rle | None = None
    polygons: list[np.ndarray] | None = None
    confidence: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict without the fields that are not set."""
        record: dict[str, Any] = {"image": self.image, "kind": self.kind, "object": self.object}
        if self.box is not None:
            record["box"] = [round(float(v), 3) for v in self.box]
        if self.point is not None:
            record["point"] = [round(float(v), 3) for v in self.point]
        if self.rle is not None:
            record["rle"] = self.rle
        if self.polygons is not None:
            record["polygons"] = [np.round(p.astype(float), 3).tolist() for p in self.polygons]
        if self.confidence is not None:
            record["confidence"] = round(self.confidence, 6)
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Region:
        """Read a region; raises ValueError when the kind or its field is missing or has the wrong length."""
        kind = record.get("kind")
        if kind not in REGION_KINDS:
            raise ValueError(f"region kind: expected one of {', '.join(REGION_KINDS)}, got {kind!r}")
        for name, length in (("box", 4), ("point", 2)):
            value = record.get(name)
            if value is not None and (len(value) != length or not np.isfinite(value).all()):
                raise ValueError(f"region {name}: expected {length} finite numbers, got {value!r}")
        polygons = record.get("polygons")
        region = cls(
            image=int(record.get("image", 0)),
            kind=kind,
            object=int(record.get("object", 0)),
            box=tuple(record["box"]) if record.get("box") is not None else None,
            point=tuple(record["point"]) if record.get("point") is not None else None,
            rle=record.get("rle"),
            polygons=None if polygons is None else [np.asarray(p, np.float32).reshape(-1, 2) for p in polygons],
            confidence=record.get("confidence"),
        )
        filled = {"mask": region.rle if region.rle is not None else polygons, "box": region.box, "point": region.point}
        if filled[kind] is None:
            raise ValueError(f"a {kind} region needs its {'rle' if kind == 'mask' else kind} field, got none: {record}")
        return region


@dataclass
class ImageInfo:
    """One image of a sample: member suffix in the shard ("0.jpg") and size in pixels."""

    file: str
    width: int
    height: int


@dataclass
class Sample:
    """One instruction and its answer over one or several images, as stored in a shard (schema version 1).

    `instruction` or `answer` may be None: they are then written from the task's templates and `fields` when streaming.
    `pixels` holds the decoded images, each (H, W, 3) uint8 RGB, and is never written to JSON.
    """

    id: str
    task: str
    source: str
    images: list[ImageInfo]
    instruction: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    answer: str | None = None
    regions: list[Region] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    pixels: list[np.ndarray] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the shard's JSON record."""
        return {
            "version": SCHEMA_VERSION,
            "id": self.id,
            "task": self.task,
            "source": self.source,
            "images": [dataclasses.asdict(image) for image in self.images],
            "instruction": self.instruction,
            "fields": self.fields,
            "answer": self.answer,
            "regions": [region.to_json() for region in self.regions],
            "meta": self.meta,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Sample:
        """Read a shard's JSON record; raises ValueError naming the field that is missing or wrong."""
        if record.get("version") != SCHEMA_VERSION:
            raise ValueError(
                f"sample version: expected {SCHEMA_VERSION}, got {record.get('version')!r}; rebuild the shards"
            )
        missing = [key for key in ("id", "task", "source", "images") if key not in record]
        if missing:
            raise ValueError(f"sample: missing field(s) {', '.join(missing)}; got {', '.join(record)}")
        images = [ImageInfo(str(i["file"]), int(i["width"]), int(i["height"])) for i in record["images"]]
        if not images:
            raise ValueError(f"sample {record['id']}: expected at least one image, got none")
        regions = [Region.from_json(r) for r in record.get("regions", [])]
        outside = [r.image for r in regions if not 0 <= r.image < len(images)]
        if outside:
            raise ValueError(
                f"sample {record['id']}: region of image {outside[0]}, but there are {len(images)} image(s)"
            )
        return cls(
            id=str(record["id"]),
            task=str(record["task"]),
            source=str(record["source"]),
            images=images,
            instruction=record.get("instruction"),
            fields=record.get("fields") or {},
            answer=record.get("answer"),
            regions=regions,
            meta=record.get("meta") or {},
        )


@dataclass
class Batch:
    """Sequences padded to one length; images of all samples are laid one after another, without padding images.

    Attributes:
        input_ids, labels, attention_mask: (B, T) int64; right-padded for training, left-padded for generation.
        instruction_ids, instruction_mask: (B, Q) int64, right-padded.
        images: (N, 3, S, S) uint8, N = sum of the samples' image counts.
        image_owner: (N,) int64, the row of the batch that each image belongs to, ascending.
        ids, tasks: B sample ids and task names.
        rejects: samples that were rejected since the stream's last batch.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    instruction_ids: torch.Tensor
    instruction_mask: torch.Tensor
    images: torch.Tensor
    image_owner: torch.Tensor
    ids: list[str]
    tasks: list[str]
    rejects: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with every tensor on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if hasattr(value := getattr(self, f.name), "to")
        }
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass
class Parsed:
    """What an answer says: `kind` "text", "mask", "box" or "point", its `regions` in order, `answer` the other text.

    presence: how probable any region was, in [0, 1], against an empty pair (`vistallm.evaluate.confidence`).
    """

    kind: str
    regions: list[Region]
    answer: str
    presence: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        record = {"kind": self.kind, "regions": [r.to_json() for r in self.regions], "answer": self.answer}
        return record if self.presence is None else {**record, "presence": round(self.presence, 6)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Parsed:
        """Inverse of `to_json`."""
        regions = [Region.from_json(r) for r in record["regions"]]
        return cls(record["kind"], regions, record.get("answer") or "", record.get("presence"))


@dataclass
class Prediction:
    """One line of predictions.jsonl: a generated answer, how it was read, and the target it is scored against.

    `target` holds {"regions": [Region JSON, full-size RLE for masks], "answer": str, "empty": bool} plus what a
    benchmark needs beside (for example "answers": [10 strings] for VQAv2, "group": str for consistency scores).
    `cut`: the answer ended because decode.max_new_tokens was reached; written only where it is true.
    """

    id: str
    benchmark: str
    task: str
    prompt: str
    text: str
    parsed: Parsed | None
    failure: str | None
    images: list[dict[str, Any]]
    target: dict[str, Any]
    score: float | None = None
    cut: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON record of the line."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cut" or self.cut}
        record["parsed"] = None if self.parsed is None else self.parsed.to_json()
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Prediction:
        """Inverse of `to_json`; raises ValueError naming missing fields."""
        names = [f.name for f in dataclasses.fields(cls)]
        missing = [n for n in names if n not in record and n not in ("score", "failure", "parsed", "cut")]
        if missing:
            raise ValueError(f"prediction: missing field(s) {', '.join(missing)}")
        values: dict[str, Any] = {name: record.get(name) for name in names}
        values["parsed"] = None if record.get("parsed") is None else Parsed.from_json(record["parsed"])
        values["cut"] = bool(record.get("cut"))
        return cls(**values)
