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
from typing import Any, Protocol

from vistallm.schema import Sample

_ROOT = "give the dataset's folder as --root"


class SourceFormatError(ValueError):
    """A source file is not as documented; the message names file, record and key, what was expected and what is there.

    The build stops: a format that was misread once is misread a million times.
    """


@dataclass(frozen=True)
class SourceOptions:
    """The command line's choices for a source.

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
        """The split of the command line; raises ValueError naming those that the source has."""
        if self.split not in splits:
            raise ValueError(f"--split: expected one of {', '.join(splits)}, got {self.split!r}")
        return self.split

    def read_settings(self, **known: str | float | tuple[str, ...] | list[str]) -> dict[str, Any]:
        """The value given or the default of every setting of a source.

        Args:
            known: key -> its default, a text (any other text is allowed) or a number; or the values allowed: one of a
                tuple, the first is the default, or several of a list (comma-separated), all are the default.

        Raises:
            ValueError: for an unknown key or a value that is not allowed.
        """
        if unknown := set(self.settings) - set(known):
            raise ValueError(f"--set {min(unknown)}: this source knows {', '.join(known) or 'no setting'}")
        return {key: _read_setting(key, self.settings.get(key), allowed) for key, allowed in known.items()}

    def find_file(self, *names: str, folders: Sequence[str] = ("",), hint: str = _ROOT) -> Path:
        """The first of the named files in `root` or these folders of it ("data/").

        Raises:
            ValueError: there is none; the message holds all names and the hint.
        """
        for path in (self.root / f"{folder}{name}" for folder in folders for name in names):
            if path.is_file():
                return path
        below = "".join(f" or in {folder[:-1]}" for folder in folders if folder)
        expected = f"expected {' or '.join(names)} there{below}, got no such file"
        raise ValueError(f"{self.root}: {expected}; {hint}")


def _read_setting(key: str, value: str | None, allowed: str | float | tuple[str, ...] | list[str]) -> Any:
    if isinstance(allowed, str):
        return allowed if value is None else value
    if isinstance(allowed, int | float):
        try:
            return allowed if value is None else float(value)
        except ValueError:
            raise ValueError(f"--set {key}: expected a number, got {value!r}") from None
    values = [*allowed[: None if isinstance(allowed, list) else 1]] if value is None else value.split(",")
    if isinstance(allowed, tuple) and (len(values) > 1 or values[0] not in allowed):
        raise ValueError(f"--set {key}: expected one of {', '.join(allowed)}, got {value!r}")
    if unknown := [value for value in values if value not in allowed]:
        raise ValueError(f"--set {key}: expected some of {','.join(allowed)}, got {unknown[0]!r}")
    return values if isinstance(allowed, list) else values[0]


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


class Records(Protocol):
    """What a source keeps in memory: a list, `Packed` records, the lines of a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Source:
    """A loaded split of a dataset: records in a fixed order, a unit each, and the samples that each one makes.

    `make(record, number)` is a pure function; it raises SourceFormatError when a record is not as documented.
    """

    records: Records
    make: Callable[[Any, int], Iterable[Draft | Reject]]

    def __len__(self) -> int:
        return len(self.records)

    def unit(self, index: int) -> Iterator[Draft | Reject]:
        """Drafts and rejects of record `index`."""
        yield from self.make(self.records[index], index)


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
