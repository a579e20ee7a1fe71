"""predictions.jsonl: one Prediction per line, written before any score; its reader names every fault with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from vistallm.schema import Prediction


@dataclass
class Faults:
    """What is left out of the scores: benchmark ("" = none) -> its faults, and the line of each prediction."""

    found: dict[str, list[str]] = field(default_factory=dict)
    lines: dict[tuple[str, str], str] = field(default_factory=dict)  # (benchmark, id) -> file and line number

    def add(self, benchmark: str, fault: str, id: str = "") -> None:
        """Add a fault, with the line of the prediction `id` where it was read from a file."""
        where = self.lines.get((benchmark, id))
        self.found.setdefault(benchmark, []).append(f"{where}: {fault}" if where else fault)


def line_id(prediction: Prediction) -> str:
    """Return what names a line of its benchmark: a sample may have a free-running and a teacher-forced answer."""
    return f"{prediction.id} (teacher-forced)" if prediction.forced else prediction.id


def read_predictions(path: Path, faults: Faults) -> list[Prediction]:
    """Read predictions.jsonl; a malformed or repeated line is a fault of the benchmark it names, and left out.

    Raises ValueError for a file without any prediction.
    """
    predictions: list[Prediction] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                prediction = Prediction.from_json(json.loads(line))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                named = re.search(r'"benchmark": *"([^"]+)"', line)
                faults.add(named[1] if named else "", f"{where}: {str(error) or repr(error)}")
                continue
            first = faults.lines.setdefault((prediction.benchmark, line_id(prediction)), where)
            if first == where:
                predictions.append(prediction)
            else:
                fault = f"{where}: prediction {prediction.id} occurs more than once, first in {first}"
                faults.add(prediction.benchmark, fault)
    if not predictions:
        raise ValueError("; ".join([f"{path}: expected predictions, found none", *chain(*faults.found.values())]))
    return predictions


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    """Write predictions.jsonl, which appears whole or not at all: inverse of `read_predictions`."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(one.to_json(), ensure_ascii=False) + "\n" for one in predictions)
    temporary.replace(path)


def by_benchmark(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Group predictions by their benchmark, both in the order of the file."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.benchmark, []).append(prediction)
    return groups
