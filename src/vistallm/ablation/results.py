"""Finished runs -> results.csv, results.md and results.html, with intervals and a verdict for each claim.

Arms are compared seed by seed: the difference between the arm that the claim prefers and another one is taken for each
seed, and its mean gets a 95% interval by Student's t over the seeds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader
from scipy.stats import t as student

from vistallm.ablation.arms import Ablation
from vistallm.ablation.runner import Runner
from vistallm.evaluate.plots import read_columns

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "not confirmed", "undecided at this scale"
Interval = tuple[float, float]  # mean and half the width of its 95% interval; NaN where there are too few numbers


class SeedScore(NamedTuple):
    """A run: score and ceiling in [0, 1]; samples and tokens with those of its starts; seconds of its own steps."""

    seed: int
    score: float
    ceiling: float | None
    samples: float
    tokens: float
    seconds: float


@dataclass
class Arm:
    """An arm's finished runs, and the preferred arm's paired difference from it (None for the preferred arm)."""

    name: str
    runs: list[SeedScore] = field(default_factory=list)
    difference: Interval | None = None

    def mean(self, column: str) -> Interval:
        """Mean of a column over the runs that have it, with its interval."""
        return interval([value for run in self.runs if (value := getattr(run, column)) is not None])

    @property
    def verdict(self) -> str:
        """Confirmed where the whole interval of the difference is above 0, not confirmed where it is below."""
        mean, half = self.difference or (np.nan, np.nan)
        return CONFIRMED if mean - half > 0 else REFUTED if mean + half < 0 else UNDECIDED


@dataclass
class AblationScores:
    """One ablation with its numbers."""

    ablation: Ablation
    arms: list[Arm]

    @property
    def verdict(self) -> str:
        """The claim as a whole: confirmed against every arm, not confirmed if beaten by any, else undecided."""
        verdicts = {arm.verdict for arm in self.arms if arm.difference}
        return REFUTED if REFUTED in verdicts else CONFIRMED if verdicts == {CONFIRMED} else UNDECIDED


def interval(values: Sequence[float]) -> Interval:
    """Mean of (n,) values and half the width of its 95% interval by Student's t with n - 1 degrees of freedom."""
    if len(values) < 2:
        return float(np.mean(values)) if values else np.nan, np.nan
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def collect(ablation: Ablation, runner: Runner, seeds: int) -> AblationScores:
    """Read the scores and the training logs of an ablation's finished runs, and compare its arms.

    Raises:
        ValueError: the benchmark has no such score.
    """
    benchmark, _, name = ablation.metric.partition(".")
    arms = {name: Arm(name) for name in ablation.runs}
    for arm, run in ablation.runs.items():
        for seed in range(seeds):
            if not (path := runner.scores((run, seed))).is_file():
                continue
            row = json.loads(path.read_text(encoding="utf-8"))["benchmarks"][benchmark]
            if name not in row["scores"]:
                raise ValueError(f"{benchmark} has no score {name!r}; it has {', '.join(row['scores'])}")
            logs = [read_columns(runner.folder((link, seed)) / "metrics.csv") for link in run.chain]
            samples, tokens = (float(sum(np.nansum(log[key]) for log in logs)) for key in ("samples", "tokens"))
            ceiling = row["ceiling"][name] if row["ceiling"] else None
            seconds = float(np.nansum(logs[-1]["seconds"]))
            arms[arm].runs.append(SeedScore(seed, row["scores"][name], ceiling, samples, tokens, seconds))
    best = arms[ablation.better]
    for one in arms.values():
        one.difference = None if one is best else paired_difference(best, one)
    return AblationScores(ablation, list(arms.values()))


def paired_difference(best: Arm, other: Arm) -> Interval:
    """Mean of best - other over their common seeds, with its interval."""
    scores = {run.seed: run.score for run in other.runs}
    return interval([run.score - scores[run.seed] for run in best.runs if run.seed in scores])


def write_results(results: list[AblationScores], out: Path, command: str) -> None:
    """Write results.csv (a row per arm and seed), results.md and results.html into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ablation", "arm", "seed", "metric", "score", "ceiling", "samples", "tokens", "seconds"])
        for one, arms in ((result.ablation, result.arms) for result in results):
            writer.writerows([one.name, arm.name, run.seed, one.metric, *run[1:]] for arm in arms for run in arm.runs)
    templates = Environment(loader=PackageLoader("vistallm.ablation", "."), trim_blocks=True, lstrip_blocks=True)
    templates.filters |= {"spread": spread, "amount": amount}
    for name in ("results.md", "results.html"):
        templates.autoescape = name.endswith("html")
        page = templates.get_template(f"{name}.jinja").render(results=results, command=command)
        (out / name).write_text(page, encoding="utf-8")


def spread(value: Interval, sign: str = "", interval: bool = True) -> str:
    """Mean and interval as points of 100, `68.2 ± 1.4`; blank without a mean, no interval with one seed."""
    mean, half = 100 * value[0], 100 * value[1]
    return "" if np.isnan(mean) else f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if interval and half == half else "")


def amount(value: Interval) -> str:
    """Mean as text: `11,200`, `2.31 M` from a million on; blank without one."""
    return "" if np.isnan(value[0]) else f"{value[0] / 1e6:.2f} M" if value[0] >= 1e6 else f"{value[0]:,.0f}"
