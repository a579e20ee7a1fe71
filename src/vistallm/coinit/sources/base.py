"""What a source of instruction data is: files of a public dataset in, drafts of samples (or counted rejects) out.

A source loads its annotations once; the builder then forks workers, which share out its units (a reference, an image,
a question ...) and ask for each unit's drafts. Keep annotations in plain lists, arrays or `Packed`, and no open files.
"""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vistallm.schema import ImageInfo, Sample


class SourceFormatError(ValueError):
    """A source file is not as documented; the message names file, record and key, what was expected and what is there.

    The build stops: a format that was misread once is misread a million times.
    """


@dataclass(frozen=True)
class SourceOptions:
    """What the command line says of a source.

    Attributes:
        root: folder of the annotations; images: folder of the images, None = the source's usual place under `root`.
        split: the split's name as the dataset spells it ("train", "val", "testA", ...).
        seed: of everything random. settings: the source's own options, from `--set key=value`.
    """

    root: Path
    split: str
    images: Path | None = None
    seed: int = 0
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def image_folder(self) -> Path:
        """Where the images are, for a source whose usual place is `root` itself."""
        return self.images or self.root

    def check_split(self, *splits: str) -> str:
        """The split asked for; raises ValueError naming those that the source has."""
        if self.split not in splits:
            raise ValueError(f"--split: expected one of {', '.join(splits)}, got {self.split!r}")
        return self.split

    def read_settings(self, **known: str | tuple[str, ...]) -> dict[str, str]:
        """The value given or the default of every setting of a source.

        Args:
            known: key -> its default (any text is allowed) or the values allowed, the default first.

        Raises:
            ValueError: for an unknown key or a value that is not allowed.
        """
        if unknown := set(self.settings) - set(known):
            raise ValueError(f"--set {min(unknown)}: this source knows {', '.join(known) or 'no setting'}")
        values = {}
        for key, allowed in known.items():
            values[key] = self.settings.get(key, allowed if isinstance(allowed, str) else allowed[0])
            if not isinstance(allowed, str) and values[key] not in allowed:
                raise ValueError(f"--set {key}: expected one of {', '.join(allowed)}, got {values[key]!r}")
        return values

    def find_file(self, *names: str) -> Path:
        """The first of the named files that is in `root`; raises ValueError naming all when none is."""
        if (path := first_file(self.root, *names)).is_file():
            return path
        expected = " or ".join(names)
        raise ValueError(f"{self.root}: expected {expected}, found neither; give the dataset's folder as --root")


def chosen(settings: dict[str, str], key: str, *known: str) -> list[str]:
    """The values of a comma-separated setting; raises ValueError naming those that are known."""
    values = settings[key].split(",")
    if unknown := [value for value in values if value not in known]:
        raise ValueError(f"--set {key}: expected some of {','.join(known)}, got {unknown[0]!r}")
    return values


def first_file(folder: Path, *names: str) -> Path:
    """The first of the named files that is in `folder`, else the first name (the build says that it is missing)."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def coco_image(folder: Path, name: str) -> Path:
    """A COCO 2014/2015 image such as "COCO_train2014_000000000009.jpg", in `folder` or its subfolder of that year."""
    subset = name.split("_")[1] if name.count("_") >= 2 else ""
    return first_file(folder, name, f"{subset}/{name}")


@dataclass
class Draft:
    """A sample and its image files, in order.

    `sample.images[i]` is ImageInfo("", width, height) with the size that the annotations name, or 0 x 0 where they name
    none; the builder fills in the file name and compares with the image's header. Regions: pixels of that image.
    """

    sample: Sample
    images: list[Path]


@dataclass(frozen=True)
class SourceImage:
    """An image of a dataset: file, id that leaks are searched by ("coco:9"), size where the annotations name it."""

    path: Path
    image_id: str
    width: int = 0
    height: int = 0

    def draft(self, name: str, task: str, source: str, meta: dict[str, Any] | None = None, **parts: Any) -> Draft:
        """A sample of this image alone; `parts` are further fields of `Sample`."""
        meta = {"image_ids": [self.image_id], **(meta or {})}
        sample = Sample(name, task, source, [ImageInfo("", self.width, self.height)], meta=meta, **parts)
        return Draft(sample, [self.path])


@dataclass(frozen=True)
class Reject:
    """Something left out: `reason` is a short kebab-case word to count by, `where` names file, record and cause."""

    reason: str
    where: str


class Source(Protocol):
    """A loaded split of a dataset."""

    def __len__(self) -> int:
        """Number of units, in a fixed order."""

    def unit(self, index: int) -> Iterator[Draft | Reject]:
        """Drafts and rejects of one unit: a pure function of the options and `index`.

        Raises:
            SourceFormatError: a record is not as documented.
        """


class Packed:
    """A read-only list of JSON-like records, kept as bytes in one buffer.

    It takes a fraction of the memory of the dicts themselves, and forked workers share it: reading a dict changes its
    reference count, so that every worker would end up with its own copy of a list of dicts.
    """

    def __init__(self, records: Iterable[Any]) -> None:
        self._data, self._ends = bytearray(), array("q", [0])
        for record in records:
            self._data += marshal.dumps(record)
            self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        """Return a fresh copy of a record."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        with memoryview(self._data) as view:
            return marshal.loads(view[self._ends[index] : self._ends[index + 1]])
