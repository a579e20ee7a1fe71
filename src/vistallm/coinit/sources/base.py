"""What a source of instruction data is: files of a public dataset in, drafts of samples (or counted rejects) out.

A source reads its annotations once; the builder then forks workers, which share out its units (a reference, an image,
a question ...) and ask for each unit's drafts. Keep annotations in plain lists, arrays or `Packed`, and no open files.
"""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vistallm.schema import ImageInfo, Sample

Box = tuple[float, float, float, float]


class SourceFormatError(ValueError):
    """A source file is not as documented: the build stops, as a format misread once is misread a million times."""


@dataclass(frozen=True)
class SourceOptions:
    """The command line's choices for a source; `images` None = its usual place under `root`, `settings` from --set."""

    root: Path
    split: str
    images: Path | None = None
    seed: int = 0
    settings: dict[str, str] = field(default_factory=dict)

    def image(self, *names: str, usual: str = "") -> Path:
        """The first of the named files under `images`, or else `root`/`usual`; if none is there, the first name.

        The build reports that one as missing.
        """
        folder = self.images or self.root / usual
        return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])

    def coco_image(self, name: str) -> Path:
        """A COCO image such as "COCO_train2014_000000000009.jpg", or under its name of 2017, also in subfolders."""
        short, subset = name.rpartition("_")[2], f"{name.split('_')[1]}/" if name.count("_") >= 2 else ""
        return self.image(name, f"{subset}{name}", short, f"train2017/{short}", f"val2017/{short}")

    def check_split(self, *splits: str) -> str:
        """The split of the command line; raises ValueError naming those that the source has."""
        if self.split not in splits:
            raise ValueError(f"--split: expected one of {', '.join(splits)}, got {self.split!r}")
        return self.split

    def read_settings(self, **known: str | float | tuple[str, ...] | list[str]) -> dict[str, Any]:
        """The value given or the default of every setting of a source; ValueError for an unknown key or value.

        `known` has a key's default, a text (any other text is allowed) or a number; or the values allowed: one of a
        tuple, the first is the default, or several of a list (comma-separated), all are the default.
        """
        if unknown := set(self.settings) - set(known):
            raise ValueError(f"--set {min(unknown)}: this source knows {', '.join(known) or 'no setting'}")
        return {key: _read_setting(key, self.settings.get(key), allowed) for key, allowed in known.items()}

    def find_file(
        self, *names: str, folders: Sequence[str] = ("",), hint: str = "give the dataset's folder as --root"
    ) -> Path:
        """The first of the named files in `root` or these folders of it ("data/"); else a ValueError with the hint."""
        for path in (self.root / f"{folder}{name}" for folder in folders for name in names):
            if path.is_file():
                return path
        below = "".join(f" or in {folder[:-1]}" for folder in folders if folder)
        raise ValueError(f"{self.root}: expected {' or '.join(names)} there{below}, got no such file; {hint}")


def _read_setting(key: str, value: str | None, allowed: str | float | tuple[str, ...] | list[str]) -> Any:
    if value is None:
        return allowed[0] if isinstance(allowed, tuple) else allowed
    if isinstance(allowed, str):
        return value
    if isinstance(allowed, int | float):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"--set {key}: expected a number, got {value!r}") from None
    values = value.split(",") if isinstance(allowed, list) else [value]
    if unknown := [value for value in values if value not in allowed]:
        expected = f"some of {','.join(allowed)}" if isinstance(allowed, list) else f"one of {', '.join(allowed)}"
        raise ValueError(f"--set {key}: expected {expected}, got {unknown[0]!r}")
    return values if isinstance(allowed, list) else value


def is_training(split: str) -> bool:
    """Whether a split is trained on: "train", "train2014", ...; every other one is kept for evaluation."""
    return split.startswith("train")


def sample_images(sample: Sample) -> set[str]:
    """Ids of a sample's images; one that is in two datasets has both ("vg:1|coco:5" is two ids)."""
    return {part for name in sample.meta.get("image_ids", []) for part in str(name).split("|")}


@dataclass
class Draft:
    """A sample and its image files, in order.

    `sample.images[i]` is ImageInfo("", width, height) with the size in the annotations, or 0 x 0 where they have none;
    the builder fills in the file name and compares with the image's header. Regions: pixels of that image.
    """

    sample: Sample
    images: list[Path]


@dataclass(frozen=True)
class Reject:
    """Something left out: `reason` is a short kebab-case word to count by, `where` names file, record and cause."""

    reason: str
    where: str


@dataclass(frozen=True)
class SourceImage:
    """An image of a dataset: file, id that leaks are searched by ("coco:9"), size where the annotations have it."""

    path: Path
    image_id: str
    width: int = 0
    height: int = 0

    def draft(self, name: str, task: str, source: str, meta: dict[str, Any] | None = None, **more: Any) -> Draft:
        """A sample of this image alone; `more` are further fields of `Sample`."""
        info, meta = ImageInfo("", self.width, self.height), {"image_ids": [self.image_id], **(meta or {})}
        return Draft(Sample(name, task, source, [info], meta=meta, **more), [self.path])

    def cut(self, box: Sequence[float], where: str) -> Box | Reject:
        """(x0, y0, x1, y1) in pixels, cut to the image; a Reject, `empty-box`, when nothing is left."""
        x0, y0, x1, y1 = box
        x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(self.width)), min(y1, float(self.height))
        # Shards keep three decimals, so a thinner box would be empty in them.
        if x1 - x0 >= 0.001 and y1 - y0 >= 0.001:
            return x0, y0, x1, y1
        return Reject("empty-box", f"{where}: nothing of {list(box)} is in the image, {self.width} x {self.height}")


def group_draft(
    images: list[SourceImage], name: str, task: str, source: str, meta: dict[str, Any], **more: Any
) -> Draft:
    """A sample of several images; `more` are further fields of `Sample`."""
    infos = [ImageInfo("", image.width, image.height) for image in images]
    meta = {**meta, "image_ids": [image.image_id for image in images]}
    return Draft(Sample(name, task, source, infos, meta=meta, **more), [image.path for image in images])


def corners(x: float, y: float, width: float, height: float) -> Box:
    """A box as most datasets write it -> (x0, y0, x1, y1)."""
    return x, y, x + width, y + height


class Packed:
    """A read-only list of JSON-like records, kept as bytes in one buffer, a fraction of the dicts' memory.

    Forked workers share it; reading a dict changes its reference count, so that each would end up with its own copy.
    """

    def __init__(self, records: Iterable[Any]) -> None:
        self._data, self._ends = bytearray(), array("q", [0])
        for record in records:
            self._data += marshal.dumps(record)
            self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        with memoryview(self._data) as view:
            return marshal.loads(view[self._ends[index] : self._ends[index + 1]])


@dataclass
class Source:
    """A loaded split of a dataset: records in a fixed order, a unit each, and the samples that each one makes.

    Records are anything that has a length and an index; an iterator's are `Packed`. `make(record, number)` is a pure
    function; it raises SourceFormatError when a record is not as documented.
    """

    records: Any
    make: Callable[[Any, int], Iterable[Draft | Reject]]

    def __post_init__(self) -> None:
        if isinstance(self.records, Iterator):
            self.records = Packed(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def unit(self, index: int) -> Iterator[Draft | Reject]:
        """Drafts and rejects of record `index`."""
        yield from self.make(self.records[index], index)
