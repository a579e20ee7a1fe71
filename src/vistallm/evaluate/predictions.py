"""predictions.jsonl: one Prediction per line, written before any score; its reader names every fault with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vistallm.schema import Prediction


@dataclass
class Faults:
    """What is left out of the scores: benchmark ("" = none) -> its faults, and the line of each prediction."""

    found: dict[str, list[str]] = field(default_factory=dict)
    lines: dict[tuple[str, str], str] = field(default_factory=dict)  # (benchmark, id) -> file and line number

    def add(self, benchmark: str, fault: str, id: str | None = None) -> None:
        """Add a fault, with the line of the prediction `id` where it was read from a file."""
        where = self.lines.get((benchmark, id or ""))
        self.found.setdefault(benchmark, []).append(f"{where}: {fault}" if where else fault)


def read_predictions(path: Path, faults: Faults | None = None) -> list[Prediction]:
    """Read predictions.jsonl, blank lines skipped.

    With `faults`, a malformed or repeated line is added to those of the benchmark it names, and left out.

    Raises:
        ValueError: a malformed line (without `faults`), or a file without any prediction.
    """
    predictions: list[Prediction] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                prediction = Prediction.from_json(json.loads(line))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                fault = f"{path}, line {number}: {str(error) or repr(error)}"
                if faults is None:
                    raise ValueError(fault) from error
                named = re.search(r'"benchmark": *"([^"]+)"', line)
                faults.add(named[1] if named else "", fault)
                continue
            if faults is not None:
                where, key = f"{path}, line {number}", (prediction.benchmark, prediction.id)
                if faults.lines.setdefault(key, where) != where:
                    fault = f"{where}: prediction {prediction.id} occurs more than once, first in {faults.lines[key]}"
                    faults.add(prediction.benchmark, fault)
                    continue
            predictions.append(prediction)
    if not predictions:
        known = [fault for some in (faults.found.values() if faults else ()) for fault in some]
        raise ValueError("; ".join([f"{path}: expected one prediction per line, found none", *known]))
    return predictions


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    """Write predictions.jsonl, which appears whole or not at all: inverse of `read_predictions`."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as lines:
        for prediction in predictions:
            lines.write(json.dumps(prediction.to_json(), ensure_ascii=False) + "\n")
    temporary.replace(path)


def by_benchmark(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Group predictions by their benchmark, both in the order of the file."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.benchmark, []).append(prediction)
    return groups
