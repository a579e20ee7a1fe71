"""What sources of recorded annotations share: their settings and files in, records and `RecordSource` out.

A `RecordSource` is a sequence of records and a pure function that makes the samples of one of them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistallm.coinit.sources.base import Draft, Packed, Reject, SourceFormatError, SourceOptions, read_json, require


@dataclass(frozen=True)
class RecordSource:
    """A `Source` of records in a fixed order and `make`, the samples of one record, given it and its number."""

    records: Sequence[Any] | Packed
    make: Callable[[Any, int], Iterator[Draft | Reject]]

    def __len__(self) -> int:
        return len(self.records)

    def unit(self, index: int) -> Iterator[Draft | Reject]:
        """Make the samples of record `index`."""
        return self.make(self.records[index], index)


def read_settings(options: SourceOptions, **known: str | tuple[str, ...]) -> dict[str, str]:
    """The `--set key=value` of a build: the value given or the default of every known key.

    Args:
        options: with the settings of the command line.
        known: key -> its default (any text is allowed) or the values allowed, the default first.

    Raises:
        ValueError: for an unknown key or a value that is not allowed.
    """
    if unknown := set(options.settings) - set(known):
        raise ValueError(f"--set {min(unknown)}: this source knows {', '.join(known) or 'no setting'}")
    values = {}
    for key, allowed in known.items():
        choices = (allowed,) if isinstance(allowed, str) else allowed
        values[key] = options.settings.get(key, choices[0])
        if not isinstance(allowed, str) and values[key] not in allowed:
            raise ValueError(f"--set {key}: expected one of {', '.join(allowed)}, got {values[key]!r}")
    return values


def check_split(options: SourceOptions, *splits: str) -> str:
    """The split asked for; raises ValueError naming those that the source has."""
    if options.split not in splits:
        raise ValueError(f"--split: expected one of {', '.join(splits)}, got {options.split!r}")
    return options.split


def find_file(root: Path, *names: str) -> Path:
    """The first of the named files that is in `root`; raises ValueError naming all when none is."""
    for name in names:
        if (root / name).is_file():
            return root / name
    raise ValueError(f"{root}: expected {' or '.join(names)}, found neither; give the dataset's folder as --root")


def image_file(folder: Path, *names: str) -> Path:
    """The first of the named images that is in `folder`, else the first name (the build says that it is missing)."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def coco_image(folder: Path, name: str) -> Path:
    """A COCO 2014/2015 image such as "COCO_train2014_000000000009.jpg", in `folder` or its subfolder of that year."""
    subset = name.split("_")[1] if name.count("_") >= 2 else ""
    return image_file(folder, name, f"{subset}/{name}")


def read_list(path: Path) -> list[Any]:
    """A JSON file that holds a list."""
    return _as_list(read_json(path), path)


def _as_list(data: Any, path: Path) -> list[Any]:
    if not isinstance(data, list):
        raise SourceFormatError(f"{path}: expected a list of records, got {type(data).__name__}")
    return data


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers only: a pickle that names a class or a function could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it holds {module}.{name}, but only plain lists, dicts, texts and numbers are read"
        )


def read_pickle(path: Path) -> list[Any]:
    """A pickled list of plain values; texts of Python 2 are read byte for byte (latin1, see `repair_text`)."""
    try:
        with path.open("rb") as file:
            return _as_list(_PlainUnpickler(file, encoding="latin1").load(), path)
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError) as error:
        raise SourceFormatError(f"{path}: expected a pickle of plain values, got: {error}") from error


def repair_text(text: str) -> str:
    """A text with the UTF-8 bytes of a Python 2 `str` decoded; any other text stays as it is."""
    try:
        return text.encode("latin1").decode("utf-8")
    except UnicodeError:
        return text


def require_list(record: Any, key: str, kinds: type | tuple[type, ...], where: str) -> list[Any]:
    """`record[key]`, which must be a list of `kinds`; raises as `require` does."""
    values = require(record, key, list, where)
    return [require({key: value}, key, kinds, f"{where}, each of {key!r}") for value in values]
