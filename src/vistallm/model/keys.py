"""Weights in files: names and shapes against the model's own with every difference named, and files cut short."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

from torch import Tensor


def check_keys(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, advice: str, free_rows: str | None = None
) -> None:
    """Raise ValueError unless `state`, read from `source`, has the names and shapes of `own`.

    The message is a line that ends with `advice`, and one for every missing, unexpected or misshapen key, in which the
    numbers of layers are folded. `free_rows` names a matrix whose number of rows may differ.
    """
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {there} in the file, {here} here"
            for key, (there, here) in shapes.items()
            if there[key == free_rows :] != here[key == free_rows :]
        ],
    }
    raise_faults(faults, source, advice)


def raise_faults(faults: Mapping[str, list[str]], source: str, advice: str) -> None:
    """Raise ValueError with all keys of `faults` by what is wrong with them, unless there are none."""
    if any(faults.values()):
        counts = ", ".join(f"{len(names)} keys {what}" for what, names in faults.items() if names)
        lines = [f"{what}: {name}" for what, names in faults.items() for name in fold(names)]
        raise ValueError("\n  ".join([f"{source}: weights of another model ({counts}); {advice}", *lines]))


def fold(names: Iterable[str]) -> list[str]:
    """Join names that differ in their first number alone: `layers.0.x`, `layers.1.x` -> `layers.{0..1}.x`."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        place = re.search(r"(?<=\.)\d+(?=\.)", name)
        start, end = place.span() if place else (len(name), len(name))
        numbers.setdefault((name[:start], name[end:]), []).append(name[start:end])
    return [before + _ranges(found) + after for (before, after), found in numbers.items()]


def _ranges(numbers: list[str]) -> str:
    """Write 0, 1, 2, 5 as `{0..2,5}`, and one number as it is."""
    if len(numbers) == 1:
        return numbers[0]
    ordered = enumerate(sorted(map(int, numbers)))
    runs = [[number for _, number in run] for _, run in groupby(ordered, lambda pair: pair[1] - pair[0])]
    return "{" + ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


@contextlib.contextmanager
def reading(path: Path, holds: Iterable[str] = ()) -> Iterator[None]:
    """Turn whatever a reader of `path` raises into one ValueError that names the weights it holds."""
    try:
        yield
    except Exception as error:
        said, keys = str(error).strip().partition("\n")[0], ", ".join(holds)
        raise ValueError(
            f"{path}: not readable (half-downloaded?); fetch it again ({said})" + (f"; it holds {keys}" if keys else "")
        ) from error
