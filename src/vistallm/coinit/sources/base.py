"""What a source of instruction data is: files of a public dataset in, drafts of samples (or counted rejects) out.

A source loads its annotations once; the builder then forks workers, which share out its units (a reference, an image,
a question ...) and ask for each unit's drafts. Keep annotations in plain lists, arrays or `Packed`, and no open files.
"""

from __future__ import annotations

import json
import marshal
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pycocotools import mask as coco

from vistallm.regions import masks
from vistallm.schema import Rle, Sample


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


@dataclass
class Draft:
    """A sample and its image files, in order.

    `sample.images[i]` is ImageInfo("", width, height) with the size that the annotations name, or 0 x 0 where they name
    none; the builder fills in the file name and compares with the image's header. Regions: pixels of that image.
    """

    sample: Sample
    images: list[Path]


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


def read_json(path: Path) -> Any:
    """Read a JSON file; raises SourceFormatError when it is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SourceFormatError(f"expected {path}, which is not there; check --root and --split") from None
    except ValueError as error:
        raise SourceFormatError(f"{path}: not JSON ({error}); download it again") from error


def read_json_lines(path: Path) -> Iterator[Any]:
    """Yield the records of a file of one JSON value per line; raises SourceFormatError, naming the line."""
    if not path.is_file():
        raise SourceFormatError(f"expected {path}, which is not there; check --root and --split")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise SourceFormatError(f"{path}, line {number}: not JSON ({error})") from error


def require(record: Any, key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """Value of a key that must be there with one of these types, else SourceFormatError; `where` = file and record."""
    if not isinstance(record, dict) or key not in record:
        got = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise SourceFormatError(f"{where}: expected key {key!r}, got {got or 'no key'}")
    value = record[key]
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    # JSON's true and false are ints in Python, but never a count or a coordinate.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise SourceFormatError(f"{where}: expected {key!r} to be {names}, got {str(value)[:80]!r}")
    return value


def clip_box(box: tuple[float, ...], width: int, height: int) -> tuple[float, float, float, float] | None:
    """(x0, y0, x1, y1) cut to the image; None when nothing of it is left (a Reject, `empty-box`)."""
    x0, y0, x1, y1 = box
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    # Shards keep three decimals, so a thinner box would be empty in them.
    return (x0, y0, x1, y1) if x1 - x0 >= 0.001 and y1 - y0 >= 0.001 else None


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> Rle:
    """A COCO segmentation -> RLE of the whole object, counts as text.

    Args:
        segmentation: polygons [[x0, y0, x1, y1, ...], ...] (all parts are united; those of fewer than three points draw
            nothing: `short_parts` counts them), RLE with text or listed counts (crowds), or a list of RLEs.
        height: image height in pixels.
        width: image width in pixels.

    Returns:
        RLE of size [height, width]; it may be empty (`rle_area` 0), which is the caller's Reject, `empty-mask`.

    Raises:
        ValueError: another form, or run lengths of another image size.
    """
    pieces = segmentation if isinstance(segmentation, list) else [segmentation]
    if not pieces or not all(isinstance(piece, dict) for piece in pieces):
        return masks.segmentation_to_rle(segmentation, height, width)
    for piece in pieces:
        counts, size = piece.get("counts"), list(piece.get("size", ()))
        runs = sum(counts) if isinstance(counts, list) else height * width
        if size != [height, width] or runs != height * width or not isinstance(counts, list | str | bytes):
            raise ValueError(f"segmentation: expected run lengths of size {[height, width]}, got size {size}")
    rles = [masks.segmentation_to_rle(piece, height, width) for piece in pieces]
    return rles[0] if len(rles) == 1 else merge_rles(rles)


def merge_rles(rles: list[Rle]) -> Rle:
    """Union of masks of one size (several annotations that an expression names together)."""
    merged = coco.merge(rles)
    return {"size": list(merged["size"]), "counts": merged["counts"].decode()}


def rle_area(rle: Rle) -> int:
    """Pixels of a mask."""
    return int(coco.area(rle))


def short_parts(segmentation: Any) -> int:
    """Polygons of fewer than three points in a COCO segmentation: each is a Reject, `short-polygon`."""
    return sum(isinstance(p, list) and len(p) < 6 for p in segmentation) if isinstance(segmentation, list) else 0
