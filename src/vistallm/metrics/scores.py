"""The base of all score classes: one row of numbers per sample, which every score, split and group mean comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from vistallm.schema import Prediction

NamedScores = dict[str, float | None]
Sums = dict[str, Any]
"""What one sample adds to each score: a tuple of two numbers to its two sums, or what the class computes it from, as
JSON holds it; "score" is the sample's own score in [0, 1]."""
Row = dict[str, Any]
"""One sample: its "id", "held_out" and "group" (None: not known), and its `Sums`, as JSON lists of two floats."""
# meta key that samples can be grouped by -> suffix of the averaged scores' names, and their words
GROUPS = {"ref_id": ("instance", "mean per instance"), "class": ("class", "mean per class")}


class SampleScores(Metric):
    """Named scores of one kind of task in [0, 1] (CIDEr: 1.0 is printed as 100), ratios of two sums over the samples.

    The state is one row per sample (a line of JSON, in bytes), concatenated over processes. Sums are correctly rounded
    (`math.fsum`), so scores are equal to the last bit for any order of samples, any batches and any number of
    processes. An unreadable answer is wrong by every score; a sample whose answer the dataset keeps to itself
    ("unlabelled") is in none.

    Attributes:
        names: the scores.
        headline: the one that stands for the others; "" = the first.
        means: those that are means over samples and may also be averaged over groups of samples.
        masks: whether targets are masks, so that a mask ceiling exists.
        group_key: meta key of the groups that a score of the class itself needs; "" = none.
    """

    full_state_update: bool | None = False
    names: tuple[str, ...] = ()
    headline = ""
    means: tuple[str, ...] = ()
    masks = False
    group_key = ""
    lines: list[torch.Tensor]

    def __init__(self, average: str | None = None, names: tuple[str, ...] | None = None) -> None:
        """Start without a sample; `average`: a key of `GROUPS` to average means over; `names`: these scores only."""
        super().__init__()
        self.average, self.names = average, names or self.names
        self.add_state("lines", [], dist_reduce_fx="cat")

    def _measure(self, prediction: Prediction) -> Sums:
        """What one sample adds; raises ValueError for a target that is missing or malformed."""
        raise NotImplementedError

    def update(self, predictions: Sequence[Prediction]) -> None:
        """Add N predictions, each with its target; every process calls it, also with none.

        Raises:
            ValueError: a target is missing, or an answer or target is malformed; nothing is added then.
        """
        text = "".join(json.dumps(self._row(prediction)) + "\n" for prediction in labelled(predictions))
        self.lines.append(torch.tensor(bytearray(text.encode()), dtype=torch.uint8, device=self.device))

    def _row(self, prediction: Prediction) -> Row:
        try:
            sums = self._measure(prediction)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            why = error if isinstance(error, ValueError) else f"malformed answer or target ({error!r})"
            raise ValueError(f"prediction {prediction.id}: {why}") from error
        group = fact(prediction, self.average or self.group_key, None if self.average else prediction.id)
        facts = {"id": prediction.id, "held_out": fact(prediction, "held_out"), "group": group}
        return facts | {
            name: tuple(map(float, value)) if isinstance(value, tuple) else value for name, value in sums.items()
        }

    def rows(self) -> list[Row]:
        """Return the rows of all samples; those of all processes inside of `sync_context()`."""
        return [json.loads(line) for line in bytes(dim_zero_cat(self.lines).cpu().numpy()).splitlines()]

    def summarise(self, rows: Sequence[Row]) -> NamedScores:
        """Return the named scores of any of the rows, None where nothing counts."""
        scores = self._ratios(rows)
        if self.average is None:
            return scores
        known = all(row["group"] is not None for row in rows)  # without a group for each there is no mean over groups
        parts = [self._ratios(part) for part in groups_of(rows)] if known else []
        suffix = GROUPS[self.average][0]
        return scores | {f"{name}_{suffix}": mean(part[name] for part in parts) for name in self.means}

    def _ratios(self, rows: Sequence[Row]) -> NamedScores:
        sums = {name: [math.fsum(row[name][i] for row in rows) for i in (0, 1)] for name in self.names}
        return {name: a / b if b else None for name, (a, b) in sums.items()}

    def compute(self) -> NamedScores:
        """Return the named scores of all samples."""
        return self.summarise(self.rows())


def fact(prediction: Prediction, name: str, default: Any = None) -> Any:
    """Return what the target says beside regions and answer ("held_out", "group", "mode", "class"), or `default`."""
    return prediction.target.get(name, (prediction.target.get("meta") or {}).get(name, default))


def labelled(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Return the predictions whose target is public."""
    return [prediction for prediction in predictions if not fact(prediction, "unlabelled", False)]


def groups_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Split rows by their group."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return list(groups.values())


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
