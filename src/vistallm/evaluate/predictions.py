"""predictions.jsonl: one Prediction per line, written before any score; read, written and rounded here."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

from vistallm.schema import Parsed, Prediction


def read_predictions(path: Path, faults: dict[str, str] | None = None) -> list[Prediction]:
    """Read predictions.jsonl; raises ValueError naming a malformed line, or a file without any prediction.

    With `faults` (benchmark -> why it can't be scored) a malformed line is not raised but left out, and faults the
    benchmark it names, or that of the line before it where it can't be told.
    """
    predictions: list[Prediction] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                predictions.append(Prediction.from_json(json.loads(line)))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                said = f"{path}, line {number}: {str(error) or repr(error)}"
                if faults is None:
                    raise ValueError(said) from error
                named = re.search(r'"benchmark": *"([^"]+)"', line)
                before = predictions[-1].benchmark if predictions else "(unknown)"
                faults.setdefault(named[1] if named else before, said)
    if not predictions:
        raise ValueError("; ".join([f"{path}: expected one prediction per line, found none", *(faults or {}).values()]))
    return predictions


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    """Write predictions.jsonl, one line per prediction: inverse of `read_predictions`."""
    with path.open("w", encoding="utf-8") as lines:
        for prediction in predictions:
            lines.write(json.dumps(prediction.to_json(), ensure_ascii=False) + "\n")


def by_benchmark(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Group predictions by their benchmark, both in the order of the file."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.benchmark, []).append(prediction)
    return groups


def as_filed(prediction: Prediction) -> Prediction:
    """Return a prediction as it is read from the file, rounded: the file then scores exactly as the run behind it."""
    if prediction.parsed is None:
        return prediction
    return dataclasses.replace(prediction, parsed=Parsed.from_json(prediction.parsed.to_json()))
