"""The base of all score classes: one row of numbers per sample, which every score, split and group mean comes from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric

from vistallm.metrics.overlap import fact
from vistallm.schema import Prediction

NamedScores = dict[str, float | None]
Sums = dict[str, tuple[float, float]]
"""What one sample adds to the two sums of each score; "score" is the sample's own score in [0, 1]."""
# meta key that samples can be grouped by -> suffix of the averaged scores' names, and their words
GROUPS = {"ref_id": ("instance", "mean per instance"), "class": ("class", "mean per class")}
KEY, HELD_OUT, GROUP, SCORE, FIRST = range(5)  # columns of a row; from FIRST on, the two sums of each score


class SampleScores(Metric):
    """Named scores of one kind of task in [0, 1] (CIDEr: 1.0 is printed as 100), ratios of two sums over the samples.

    The state is one float64 row per sample, concatenated over processes. Sums are correctly rounded (`math.fsum`), so
    scores are equal to the last bit for any order of samples, any batches and any number of processes. An unreadable
    answer is wrong by every score; a sample whose answer the dataset keeps to itself ("unlabelled") is in none.

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
    rows: list[torch.Tensor]

    def __init__(self, average: str | None = None, names: tuple[str, ...] | None = None) -> None:
        """Start without a sample.

        Args:
            average: a key of `GROUPS`: the means are also averaged over the samples that share this meta value.
            names: compute only these of the scores.
        """
        super().__init__()
        self.average, self.names = average, names or self.names
        self.add_state("rows", [], dist_reduce_fx="cat")

    def _measure(self, prediction: Prediction) -> Sums:
        """What one sample adds; raises ValueError naming a prediction whose target is missing or malformed."""
        raise NotImplementedError

    def update(self, predictions: Sequence[Prediction]) -> None:
        """Add N predictions, each with its target; every process calls it, also with none.

        Raises:
            ValueError: a target is missing, or an answer or target is malformed; nothing is added then.
        """
        rows = [self._row(prediction) for prediction in labelled(predictions)]
        table = torch.tensor(rows, dtype=torch.float64, device=self.device)
        self.rows.append(table.reshape(len(rows), FIRST + 2 * len(self.names)))

    def _row(self, prediction: Prediction) -> list[float]:
        try:
            sums = self._measure(prediction)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"prediction {prediction.id}: malformed answer or target ({error!r})") from error
        held_out, (score, weight) = fact(prediction, "held_out"), sums["score"]
        group = fact(prediction, self.average or self.group_key, None if self.average else prediction.id)
        facts = (digest(prediction.id), math.nan if held_out is None else held_out, digest(group), score / weight)
        return [float(value) for value in chain(facts, *(sums[name] for name in self.names))]

    def table(self) -> np.ndarray:
        """Return the rows, (N, FIRST + 2 x scores) float64; of all processes inside of `sync_context()`."""
        # `rows` is a tensor where torchmetrics has joined processes
        return torch.cat([self.rows] if isinstance(self.rows, torch.Tensor) else self.rows).cpu().numpy()

    def summarise(self, rows: np.ndarray | None = None) -> NamedScores:
        """Return the named scores of any of the rows (default: of none), None where nothing counts."""
        rows = np.zeros((0, FIRST + 2 * len(self.names))) if rows is None else rows
        scores = self._ratios(rows)
        if self.average is None:
            return scores
        known = not np.isnan(rows[:, GROUP]).any()  # without a group for each there is no mean over groups
        parts = [self._ratios(part) for part in groups_of(rows)] if known else []
        suffix = GROUPS[self.average][0]
        return scores | {f"{name}_{suffix}": mean(part[name] for part in parts) for name in self.means}

    def _ratios(self, rows: np.ndarray) -> NamedScores:
        sums = [math.fsum(column) for column in rows.T[FIRST:]]
        return {name: a / b if b else None for name, a, b in zip(self.names, sums[0::2], sums[1::2], strict=True)}

    def compute(self) -> NamedScores:
        """Return the named scores of all samples."""
        return self.summarise(self.table())


def labelled(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Return the predictions whose target is public."""
    return [prediction for prediction in predictions if not fact(prediction, "unlabelled", False)]


def groups_of(rows: np.ndarray) -> list[np.ndarray]:
    """Split rows by their group."""
    rows = rows[np.argsort(rows[:, GROUP], kind="stable")]
    return [part for part in np.split(rows, np.flatnonzero(np.diff(rows[:, GROUP])) + 1) if len(part)]


def digest(value: Any) -> float:
    """Return 52 bits of a text's hash, equal on every process and exact in float64; NaN of None."""
    if value is None:
        return math.nan
    return float(int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=8).digest()) >> 12)


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
