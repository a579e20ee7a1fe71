"""Annotation files -> `Record`s, whose values are read by key with their types checked."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistallm.coinit.sources.base import Draft, Reject, Source, SourceFormatError, SourceImage, corners
from vistallm.regions.masks import rle_area, segmentation_to_rle
from vistallm.schema import Region, Rle

_CHUNK = 1 << 22  # characters read at a time; a record of region_descriptions.json has some 7,000


@dataclass(frozen=True)
class Record:
    """A JSON object; `where` names file and record ("refs(unc).p, record 3") and begins every message.

    Every method raises SourceFormatError when a value is missing or of another type.
    """

    data: Any
    where: str

    def require(self, key: str, *kinds: type) -> Any:
        """The value of a key, of one of these types."""
        if not isinstance(self.data, dict) or key not in self.data:
            got = ", ".join(map(str, self.data)) if isinstance(self.data, dict) else type(self.data).__name__
            raise self.fault(f"expected key {key!r}, got {got or 'no key'}")
        value = self.data[key]
        # JSON's true and false are ints in Python, but never a count or a coordinate.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise self.fault(f"expected {key!r} to be {names}, got {str(value)[:80]!r}")
        return value

    def optional(self, key: str, *kinds: type) -> Any:
        """Like `require`, but None when the key is not there or null."""
        if isinstance(self.data, dict) and self.data.get(key) is None:
            return None
        return self.require(key, *kinds)

    def text(self, key: str) -> str:
        """A text."""
        return self.require(key, str)

    def integer(self, key: str) -> int:
        """A whole number."""
        return self.require(key, int)

    def numbers(self, *keys: str) -> tuple[float, ...]:
        """The numbers of several keys."""
        return tuple(self.require(key, int, float) for key in keys)

    def values(self, key: str, *kinds: type) -> list[Any]:
        """A list of values of these types."""
        where = f"{self.where}, each of {key!r}"
        return [Record({key: value}, where).require(key, *kinds) for value in self.require(key, list)]

    def records(self, key: str) -> Iterator[Record]:
        """The objects of a list."""
        for number, entry in enumerate(self.require(key, list)):
            yield Record(entry, f"{self.where}, {key.removesuffix('s')} {number}")

    def mask(self, height: int, width: int) -> Rle:
        """The mask of an annotation of COCO's form; it may be empty (`rle_area` 0)."""
        segmentation = self.require("segmentation", list, dict)
        try:
            return segmentation_to_rle(segmentation, height, width)
        except (ValueError, TypeError, OverflowError) as error:
            raise self.fault(str(error)) from error

    def fault(self, text: str) -> SourceFormatError:
        """The error to raise for something else that is not as documented."""
        return SourceFormatError(f"{self.where}: {text}")


def add_regions(
    regions: dict[str, list[Region]], annotations: list[Record], image: SourceImage, note: str
) -> Iterator[Reject]:
    """Add the regions of COCO annotations to the lists of `regions`, by kind ("box", "mask"); yield what is wrong.

    A kind that one of the objects lacks is removed from `regions`; `note` ends the message of a missing mask.
    """
    kinds = set(regions)
    for number, annotation in enumerate(annotations):
        if "box" in kinds:
            box = image.cut(corners(*annotation.data["bbox"]), annotation.where)
            if isinstance(box, Reject):
                yield box
                regions.pop("box", None)
            elif "box" in regions:
                regions["box"].append(Region(0, "box", number, box=box))
        if "mask" in kinds:
            rle, parts = annotation.mask(image.height, image.width), annotation.data["segmentation"]
            short = sum(isinstance(part, list) and len(part) < 6 for part in parts) if isinstance(parts, list) else 0
            yield from [Reject("short-polygon", annotation.where)] * short  # under three points: it draws nothing
            if not rle_area(rle):
                yield Reject("empty-mask", f"{annotation.where}: {note}")
                regions.pop("mask", None)
            elif "mask" in regions:
                regions["mask"].append(Region(0, "mask", number, rle=rle))


def file_source(path: Path, values: Iterable[Any], make: Callable[[Record, int], Iterable[Draft | Reject]]) -> Source:
    """The source of a file's values, a unit each, which `make` gets as `Record`s."""
    return Source(iter(values), lambda value, number: make(Record(value, f"{path}, record {number}"), number))


def _check_kind(data: Any, kind: type, path: Path) -> Any:
    if not isinstance(data, kind):
        raise SourceFormatError(f"{path}: expected a {kind.__name__} of records, got {type(data).__name__}")
    return data


def parse_json(text: bytes, where: str) -> Any:
    """The value that a text holds; raises SourceFormatError, which begins with `where`."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise SourceFormatError(f"{where}: not JSON ({error}); download it again") from error


def read_json(path: Path, kind: type = object) -> Any:
    """Read a JSON file; raises SourceFormatError when it is missing, broken, or not of this type."""
    if not path.is_file():
        raise SourceFormatError(f"expected {path}, which is not there; check --root and --split")
    return _check_kind(parse_json(path.read_bytes(), str(path)), kind, path)


def read_object(path: Path) -> Record:
    """A JSON file that holds an object."""
    return Record(read_json(path), str(path))


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a JSON list or of JSON lines, whatever the file's name ends in; a broken line is named."""
    with path.open("rb") as file:
        lines = enumerate(file, 1)
        filled = ((number, line) for number, line in lines if line.strip())
        number, first = next(filled, (1, b"[]"))
        if first.lstrip().startswith(b"["):
            yield from read_json(path, list)
            return
        yield parse_json(first, f"{path}, line {number}")
        for number, line in filled:
            yield parse_json(line, f"{path}, line {number}")


def stream_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSON list one by one, so that the file is never whole in memory."""
    decoder, text, start, number = json.JSONDecoder(), "", 0, 0
    with path.open(encoding="utf-8") as file:
        if file.read(1) != "[":
            raise SourceFormatError(f"{path}: expected a JSON list, it begins otherwise")
        while True:
            while start < len(text) and text[start] in ", \t\r\n":
                start += 1
            if text[start : start + 1] == "]":
                return
            where = f"{path}, record {number}"
            try:
                record, start = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                if not (more := file.read(_CHUNK)):
                    raise SourceFormatError(f"{where}: not JSON ({error}); download it again") from error
                text, start = text[start:] + more, 0
                continue
            yield Record(record, where)
            number += 1


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers only: a pickle that names a class or a function could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}; only lists, dicts, texts and numbers are read")


def read_pickle(path: Path) -> list[Any]:
    """A pickled list of plain values; texts of Python 2 are read byte for byte (latin1, see `repair_text`)."""
    try:
        with path.open("rb") as file:
            return _check_kind(_PlainUnpickler(file, encoding="latin1").load(), list, path)
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError) as error:
        raise SourceFormatError(f"{path}: expected a pickle of plain values, got: {error}") from error


def repair_text(text: str) -> str:
    """A text with the UTF-8 bytes of a Python 2 `str` decoded; any other text stays as it is."""
    try:
        return text.encode("latin1").decode("utf-8")
    except UnicodeError:
        return text
