"""The frame of a score family: predictions of one benchmark -> a fact per sample -> named scores over any of them.

A fact holds what a family counts of one sample (pixels, an IoU, a right answer), so splits, groups and per-sample
scores cost nothing beside it. Scores are shares in [0, 1] (CIDEr: 1.0 is printed as 100).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from vistallm.metrics import answers
from vistallm.metrics.functional import Sums
from vistallm.schema import Prediction

NamedScores = dict[str, float | None]
SampleSums = dict[str, Sums]
"""A fact of scores that are ratios of two sums: what the sample adds to each; "score" is the sample's own score."""


@dataclass(frozen=True)
class Family:
    """How one kind of task is scored.

    Attributes:
        measure: predictions -> one fact each; raises ValueError naming a prediction whose target is missing.
        summarise: facts of any subset -> named scores, None where nothing counts.
        sample_score: fact -> the sample's own score in [0, 1], for `Prediction.score` and the gallery.
        headline: the score that stands for the benchmark.
        masks: whether targets are masks, so that a mask ceiling exists.
        means: the scores that are means over samples, which may also be averaged over groups of samples.
    """

    measure: Callable[[Sequence[Prediction]], list[Any]]
    summarise: Callable[[list[Any]], NamedScores]
    sample_score: Callable[[Any], float]
    headline: str
    masks: bool = False
    means: tuple[str, ...] = ()


def each(measure_one: Callable[[Prediction], Any]) -> Callable[[Sequence[Prediction]], list[Any]]:
    """Return the `measure` of a family whose samples are measured one by one."""
    return lambda predictions: [measure_one(p) for p in tqdm(predictions, "scoring", leave=False, disable=None)]


def summed(
    measure_one: Callable[[Prediction], SampleSums], *names: str, masks: bool = False, means: tuple[str, ...] = ()
) -> Family:
    """Return the family whose scores `names` are ratios of sums over the samples; the first is the headline."""

    def ratio(facts: list[SampleSums], name: str) -> float | None:
        numerators, denominators = (np.array([sums[name][side] for sums in facts]) for side in (0, 1))
        return answers.ratio(float(numerators.sum()), int(denominators.sum()))

    def summarise(facts: list[SampleSums]) -> NamedScores:
        return {name: ratio(facts, name) for name in names}

    def sample_score(sums: SampleSums) -> float:
        return sums["score"][0] / sums["score"][1]

    return Family(each(measure_one), summarise, sample_score, names[0], masks, means)


def presence(said_none: bool | None, is_none: bool) -> SampleSums:
    """Return a sample's part of N-acc and T-acc; `said_none` is None for an unreadable answer."""
    right = said_none is is_none
    return {"n_acc": (right and is_none, is_none), "t_acc": (right and not is_none, not is_none)}


def group_mean(family: Family, measured: Sequence[tuple[Any, Hashable]], suffix: str) -> NamedScores:
    """Average a family's means over the groups of (fact, group): within each group first, then over groups, all alike.

    With the group a RefCOCO object (`ref_id`, which has about three expressions) these are instance-level scores; with
    the group an image class they are co-segmentation's means per image, then per class. Names get `_<suffix>`.
    """
    members: dict[Hashable, list[Any]] = {}
    for one, group in measured:
        members.setdefault(group, []).append(one)
    parts = [family.summarise(part) for part in members.values()]
    return {
        f"{name}_{suffix}": answers.mean(value for part in parts if (value := part[name]) is not None)
        for name in family.means
    }
