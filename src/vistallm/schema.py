"""The dataclasses that stages exchange: Sample -> Batch -> Prediction.

Coordinates are pixels of the ORIGINAL image, x to the right, y down, edges at integers (a one-pixel image spans
[0, 1] x [0, 1]); never (y, x).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100
SCHEMA_VERSION = 1

REGION_KINDS: tuple[str, ...] = ("mask", "box", "point")  # what region tokens can write
STORED_KINDS = (*REGION_KINDS, "keypoints")  # what a shard can hold; keypoints are written by links alone
PROMPT_SHAPES = ("point", "box", "circle", "scribble", "polygon", "mask")  # in which an instruction shows an object
SURE = 0.5  # the confidence from which a link's object of a class counts as said, where no ranking is asked for
Rle = dict[str, Any]  # COCO run lengths: {"size": [H, W], "counts": str (compressed)}


class SampleReject(ValueError):
    """A sample that can't be used; `reason` is a short word, for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Region:
    """A box, a point, a mask or keypoints of one object in one image; the field of its `kind` must be filled."""

    image: int  # index in the sample, from 0
    kind: str  # one of STORED_KINDS
    object: int = 0  # by which a placeholder such as `{regions:0,2}` names it
    box: tuple[float, ...] | None = None  # (x0, y0, x1, y1)
    point: tuple[float, ...] | None = None  # (x, y)
    rle: Rle | None = None  # the whole mask at the original size
    polygons: list[np.ndarray] | None = None  # the mask as parts, each (n, 2) float32; filled by sampling or parsing
    # (x, y, v) of each, v as in COCO: 0 = not labelled, 1 = hidden, 2 = visible; the answer's text names them in order.
    keypoints: tuple[tuple[float, ...], ...] | None = None
    label: str | None = None  # class name of the object, or the phrase of the link that found it
    confidence: float | None = None  # of a generated region, in [0, 1] (`vistallm.evaluate.confidence`)

    @property
    def sure(self) -> bool:
        """Whether an answer by links stands for it: of the classes that links name they give doubtful objects, too."""
        return self.label is None or self.confidence is None or self.confidence >= SURE

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, without the fields that are not set."""
        rounded = {
            "box": self.box and [round(float(v), 3) for v in self.box],
            "point": self.point and [round(float(v), 3) for v in self.point],
            "rle": self.rle,
            "polygons": self.polygons and [np.round(p.astype(float), 3).tolist() for p in self.polygons],
            "keypoints": self.keypoints and [[round(float(v), 3) for v in point] for point in self.keypoints],
            "label": self.label,
            "confidence": self.confidence and round(self.confidence, 6),
        }
        own = {"image": self.image, "kind": self.kind, "object": self.object}
        return own | {name: value for name, value in rounded.items() if value is not None}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Region:
        """Read a region; raises ValueError when the kind or its field is missing or has the wrong length."""
        kind = record.get("kind")
        if kind not in STORED_KINDS:
            raise ValueError(f"region kind: expected one of {', '.join(STORED_KINDS)}, got {kind!r}")
        for name, length in (("box", 4), ("point", 2)):
            value = record.get(name)
            if value is not None and (len(value) != length or not np.isfinite(value).all()):
                raise ValueError(f"region {name}: expected {length} finite numbers, got {value!r}")
        polygons, box, point, keypoints = (record.get(name) for name in ("polygons", "box", "point", "keypoints"))
        for value in keypoints or ():
            if len(value) != 3 or not np.isfinite(value).all() or value[2] not in (0, 1, 2):
                raise ValueError(f"region keypoints: expected finite (x, y, v) with v of 0, 1 or 2, got {value!r}")
        region = cls(
            image=int(record.get("image", 0)),
            kind=kind,
            object=int(record.get("object", 0)),
            box=None if box is None else tuple(box),
            point=None if point is None else tuple(point),
            rle=record.get("rle"),
            polygons=None if polygons is None else [np.asarray(p, np.float32).reshape(-1, 2) for p in polygons],
            keypoints=None if keypoints is None else tuple(tuple(value) for value in keypoints),
            label=record.get("label"),
            confidence=record.get("confidence"),
        )
        if {"mask": region.rle or polygons, "box": box, "point": point, "keypoints": keypoints}[kind] is None:
            raise ValueError(f"a {kind} region needs its {'rle' if kind == 'mask' else kind} field, got none: {record}")
        return region


@dataclass
class ImageInfo:
    """One image of a sample: its name in the shard ("0.jpg", or the member that another sample brought), its pixels."""

    file: str
    width: int
    height: int


@dataclass
class Sample:
    """One instruction and its answer over one or several images, as stored in a shard (schema version 1)."""

    id: str
    task: str
    source: str
    images: list[ImageInfo]
    instruction: str | None = None  # None: written from the task's templates and `fields` when streaming
    fields: dict[str, Any] = field(default_factory=dict)
    answer: str | None = None  # None: as `instruction`
    regions: list[Region] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    pixels: list[np.ndarray] | None = None  # decoded images, each (H, W, 3) uint8 RGB; never written to JSON

    @property
    def video(self) -> bool:
        """Whether the images are frames in time order; the regions of an object number are then its track."""
        return bool(self.fields.get("video"))

    def to_json(self) -> dict[str, Any]:
        """The shard's JSON record."""
        record = {name: value for name, value in vars(self).items() if name != "pixels"}
        record["images"] = [dataclasses.asdict(image) for image in self.images]
        record["regions"] = [region.to_json() for region in self.regions]
        return {"version": SCHEMA_VERSION, **record}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Sample:
        """Read a shard's JSON record; raises ValueError naming the field that is missing or wrong."""
        if record.get("version") != SCHEMA_VERSION:
            raise ValueError(
                f"sample version: expected {SCHEMA_VERSION}, got {record.get('version')!r}; build it again"
            )
        if missing := [key for key in ("id", "task", "source", "images") if key not in record]:
            raise ValueError(f"sample: missing field(s) {', '.join(missing)}; got {', '.join(record)}")
        images = [ImageInfo(str(i["file"]), int(i["width"]), int(i["height"])) for i in record["images"]]
        regions = [Region.from_json(r) for r in record.get("regions", [])]
        if not images or any(not 0 <= r.image < len(images) for r in regions):
            used = sorted({r.image for r in regions})
            raise ValueError(f"sample {record['id']}: {len(images)} image(s), and regions of images {used}")
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
class LinkBatch:
    """The L links of a batch, ordered by row and position, and in training their O objects.

    Coordinates are shares of the letterbox square.
    """

    kind: torch.Tensor  # (L,) int64, index in links.LINKS
    row: torch.Tensor  # (L,) int64, row of the batch
    image: torch.Tensor  # (L,) int64, index in Batch.images
    group: torch.Tensor  # (L,) int64, ascending from 0; the links of a group share object queries
    object_link: torch.Tensor  # (O,) int64, the link that an object answers
    boxes: torch.Tensor  # (O, 4) float32, centre x, y, width, height
    masks: torch.Tensor  # (O, M, M) uint8, the share of each pixel that is covered, 255 = all of it
    has_mask: torch.Tensor  # (O,) bool
    keypoint_object: torch.Tensor  # (Q,) int64, the object of each keypoint
    keypoint_link: torch.Tensor  # (Q,) int64, the link that names it
    keypoints: torch.Tensor  # (Q, 3) float32, x, y and visibility: 0 not labelled, 1 hidden, 2 visible
    # (L,) int64, the routing token of the batch, in order, whose slots a link reads; None: each reads its own. The
    # links of a video's frames read the slots of one.
    token: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LinkBatch:
        """Return it with every tensor on `device`."""
        tensors = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return LinkBatch(**{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()})


@dataclass
class Batch:
    """Sequences padded to one length; images of all samples are laid one after another, without padding images.

    The texts are right-padded for training and left-padded for generation, instructions right-padded.
    """

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) int64
    instruction_ids: torch.Tensor  # (B, Q) int64
    instruction_mask: torch.Tensor  # (B, Q) int64
    images: torch.Tensor  # (N, 3, S, S) uint8, N = sum of the samples' image counts
    image_owner: torch.Tensor  # (N,) int64, the row of the batch that each image belongs to, ascending
    ids: list[str]
    tasks: list[str]
    first_copy: torch.Tensor | None = None  # (N,) int64, of each image the first equal one in `images`; generation only
    rejects: int = 0  # samples rejected since the stream's last batch
    links: LinkBatch | None = None  # of the answers; None where the model has none, or in generation
    prompts: torch.Tensor | None = None  # (R, S, S) uint8 0 or 1, the masks of the `<region>` tokens, in order
    prompt_image: torch.Tensor | None = None  # (R,) int64, index in `images` of each
    pixels: torch.Tensor | None = None  # (N, 3, L, L) uint8, larger images for the links' stem
    frame: torch.Tensor | None = None  # (N,) int64, place of an image in its video, -1 = in none; None: no video here

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with every tensor on `device`."""
        tensors = {name: value for name, value in vars(self).items() if hasattr(value, "to")}
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()}
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass
class RolloutBatch:
    """Samples whose answers a model is to draw (stage=rl), and others whose true answers it replays."""

    prompts: Batch  # left-padded, without answers
    samples: list[Sample]  # of its rows, without pixels
    answers: list[str]  # their true ones, as text
    replay: Batch | None  # None without replay
    rejects: int = 0  # as Batch.rejects

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RolloutBatch:
        """Return it with every tensor on `device`."""
        replay = self.replay and self.replay.to(device, non_blocking)
        return dataclasses.replace(self, prompts=self.prompts.to(device, non_blocking), replay=replay)

    def __len__(self) -> int:
        return len(self.samples)


@dataclass
class Parsed:
    """What an answer says."""

    kind: str  # "text" or one of REGION_KINDS
    regions: list[Region]  # in order
    answer: str  # the other text
    presence: float | None = None  # how probable any region was against an empty pair (`vistallm.evaluate.confidence`)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
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
    # written only where they differ from these
    cut: bool = False  # the answer reached decode.max_new_tokens
    head: str = "text"  # text | link: what wrote the regions
    forced: bool = False  # the links were read with the true answer as text (decode.teacher_forced)

    @property
    def sure_regions(self) -> list[Region]:
        """The regions that the answer stands for, without the doubtful ones of links, which AP ranks."""
        regions = self.parsed.regions if self.parsed else []
        return [one for one in regions if self.head == "text" or one.sure]

    def to_json(self) -> dict[str, Any]:
        """The JSON record of the line."""
        usual = {"cut": False, "head": "text", "forced": False}
        record = {name: value for name, value in vars(self).items() if name not in usual or value != usual[name]}
        return record | {"parsed": None if self.parsed is None else self.parsed.to_json()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Prediction:
        """Inverse of `to_json`; raises ValueError naming missing fields."""
        names = [f.name for f in dataclasses.fields(cls)]
        optional = ("score", "failure", "parsed", "cut", "head", "forced")
        if missing := [name for name in names if name not in record and name not in optional]:
            raise ValueError(f"prediction: missing field(s) {', '.join(missing)}")
        values: dict[str, Any] = {name: record.get(name) for name in names}
        parsed = None if record.get("parsed") is None else Parsed.from_json(record["parsed"])
        flags = {
            "cut": bool(record.get("cut")),
            "head": record.get("head", "text"),
            "forced": bool(record.get("forced")),
        }
        return cls(**values | {"parsed": parsed} | flags)
