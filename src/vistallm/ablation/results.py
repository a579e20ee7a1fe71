"""Finished runs -> results.csv, results.md, results.html and plots, with intervals and a verdict for each claim.

Arms are compared seed by seed: the difference between the arm that the claim prefers and another one is taken for each
seed, and its mean gets a 95% interval by Student's t over the seeds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from scipy.stats import t as student

from vistallm.ablation.arms import Ablation
from vistallm.ablation.plots import draw
from vistallm.ablation.runner import Runner
from vistallm.evaluate.plots import read_columns

VERDICTS = ("confirmed", "not confirmed", "undecided at this scale")
Interval = tuple[float, float]  # mean and half the width of its 95% interval; NaN where there is one seed


@dataclass
class Arm:
    """What the runs of an arm gave, one value per seed that is there: scores and the ceiling between 0 and 1.

    samples, tokens: read in training (with those of the runs it starts from); seconds: of its training steps alone.
    """

    name: str
    seeds: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @cached_property
    def score(self) -> Interval:
        """Mean score over the seeds."""
        return interval(self.scores)

    @property
    def ceiling(self) -> float | None:
        """Mean score of a perfect model through the same tokens; None where the score has none."""
        return float(np.mean(self.ceilings)) if self.ceilings else None


@dataclass
class Comparison:
    """The preferred arm against another: the paired difference of their scores, and what it says of the claim."""

    arm: str
    difference: Interval
    seeds: int

    @property
    def verdict(self) -> str:
        """Confirmed where the whole interval is above 0, not confirmed where it is below, else undecided."""
        mean, half = self.difference
        if mean - half > 0:
            return VERDICTS[0]
        return VERDICTS[1] if mean + half < 0 else VERDICTS[2]


@dataclass
class Result:
    """One ablation with its numbers."""

    ablation: Ablation
    arms: list[Arm]
    comparisons: list[Comparison]

    @property
    def verdict(self) -> str:
        """The claim as a whole: confirmed against every arm, not confirmed if beaten by any, else undecided."""
        said = {comparison.verdict for comparison in self.comparisons}
        if VERDICTS[1] in said:
            return VERDICTS[1]
        return VERDICTS[0] if said == {VERDICTS[0]} else VERDICTS[2]

    @property
    def has_ceiling(self) -> bool:
        """Whether the score is one of masks, which tokens limit."""
        return any(arm.ceilings for arm in self.arms)

    def against(self, arm: Arm) -> Comparison | None:
        """The comparison of the preferred arm with `arm`; None for itself."""
        return next((comparison for comparison in self.comparisons if comparison.arm == arm.name), None)


def interval(values: Sequence[float]) -> Interval:
    """Mean of (n,) values and half the width of its 95% interval by Student's t with n - 1 degrees of freedom."""
    if len(values) < 2:
        return float(np.mean(values)) if values else float("nan"), float("nan")
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def collect(ablation: Ablation, runner: Runner, seeds: int) -> Result:
    """Read the scores and the training logs of an ablation's finished runs."""
    arms = []
    for name, run in ablation.arms.items():
        arm = Arm(name)
        for seed in range(seeds):
            if (path := runner.scores((run, seed))).is_file():
                score, ceiling = read_score(path, ablation.metric)
                arm.seeds.append(seed)
                arm.scores.append(score)
                arm.ceilings += [ceiling] if ceiling is not None else []
                logs = [read_columns(runner.folder((part, seed)) / "metrics.csv") for part in run.chain]
                arm.samples.append(float(sum(log["samples"].sum() for log in logs)))
                arm.tokens.append(float(sum(log["tokens"].sum() for log in logs)))
                arm.seconds.append(float(logs[-1]["seconds"].sum()))
        arms.append(arm)
    best = next(arm for arm in arms if arm.name == ablation.better)
    comparisons = [compare(best, arm) for arm in arms if arm is not best]
    return Result(ablation, arms, comparisons)


def read_score(path: Path, metric: tuple[str, str]) -> tuple[float, float | None]:
    """Read a (benchmark, score) of a scores.json and its ceiling, None without one; ValueError for no such score."""
    benchmark, score = metric
    row = json.loads(path.read_text(encoding="utf-8"))["benchmarks"][benchmark]
    if score not in row["scores"]:
        raise ValueError(f"{benchmark} has no score {score!r}; it has {', '.join(row['scores'])}")
    return row["scores"][score], row["ceiling"][score] if row["ceiling"] else None


def compare(best: Arm, other: Arm) -> Comparison:
    """Pair two arms by seed; seeds that only one of them has are left out."""
    scores = [dict(zip(arm.seeds, arm.scores, strict=True)) for arm in (best, other)]
    common = sorted(set(scores[0]) & set(scores[1]))
    return Comparison(other.name, interval([scores[0][seed] - scores[1][seed] for seed in common]), len(common))


def write_results(results: list[Result], out: Path, command: str) -> None:
    """Write results.csv (a row per arm and seed), results.md, results.html, and plots/NAME.png and .svg into `out`."""
    (out / "plots").mkdir(parents=True, exist_ok=True)
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ablation", "arm", "seed", "metric", "score", "ceiling", "samples", "tokens", "seconds"])
        for result in results:
            for arm in result.arms:
                ceilings: Sequence[float | str] = arm.ceilings or [""] * len(arm.seeds)
                rows = zip(arm.seeds, arm.scores, ceilings, arm.samples, arm.tokens, arm.seconds, strict=True)
                metric = ".".join(result.ablation.metric)
                writer.writerows([result.ablation.name, arm.name, seed, metric, *rest] for seed, *rest in rows)
    for result in results:
        draw(result, out / "plots" / result.ablation.name)
    templates = Environment(loader=PackageLoader("vistallm.ablation", "."), trim_blocks=True, lstrip_blocks=True)
    templates.filters |= {"points": points, "spread": spread, "amount": amount}
    for name in ("results.md", "results.html"):
        templates.autoescape = name.endswith("html")
        page = templates.get_template(f"{name}.jinja").render(results=results, command=command)
        (out / name).write_text(page, encoding="utf-8")


def points(value: float | None) -> str:
    """A share as points of 100: 0.682 -> 68.2; blank for None and NaN."""
    return "" if value is None or np.isnan(value) else f"{100 * value:.1f}"


def spread(value: Interval, signed: bool = False) -> str:
    """Mean and interval as points of 100: `68.2 ± 1.4`; blank without a mean, no interval with one seed."""
    mean, half = 100 * value[0], 100 * value[1]
    if np.isnan(mean):
        return "not run"
    return f"{mean:+.1f}" * signed + f"{mean:.1f}" * (not signed) + ("" if np.isnan(half) else f" ± {half:.1f}")


def amount(values: Sequence[float]) -> str:
    """Mean of a few counts: `11,200`, `2.31 M` from a million on; blank without one."""
    if not values:
        return ""
    mean = float(np.mean(values))
    return f"{mean / 1e6:.2f} M" if mean >= 1e6 else f"{mean:,.0f}"
