from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from vistallm.ablation.arms import Ablation, Run
from vistallm.ablation.results import (
    Arm,
    SeedScore,
    amount,
    collect,
    interval,
    paired_difference,
    spread,
    write_results,
)
from vistallm.ablation.runner import Runner


def arm(name, scores):
    return Arm(name, [SeedScore(seed, score, None, 0, 0, 0) for seed, score in enumerate(scores)])


def test_interval_equals_scipys_paired_test():
    ours, theirs = [0.71, 0.64, 0.69, 0.75], [0.66, 0.65, 0.60, 0.70]
    mean, half = paired_difference(arm("a", ours), arm("b", theirs))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert interval([0.5])[0] == 0.5
    assert np.isnan(interval([0.5])[1])


@pytest.mark.parametrize(
    ("better", "other", "verdict"),
    [
        ([0.50, 0.60, 0.70], [0.40, 0.51, 0.59], "confirmed"),  # the seeds differ more than the arms: pairing tells
        ([0.40, 0.51, 0.59], [0.50, 0.60, 0.70], "not confirmed"),
        ([0.50, 0.60, 0.70], [0.60, 0.50, 0.69], "undecided at this scale"),
        ([0.50], [0.10], "undecided at this scale"),
    ],
)
def test_verdict(better, other, verdict):
    compared = arm("b", other)
    compared.difference = paired_difference(arm("a", better), compared)
    assert compared.verdict == verdict


def test_only_common_seeds_are_paired():
    other = arm("b", [0.1, 0.7, 0.3])
    del other.runs[1]
    mean, half = paired_difference(arm("a", [0.2, 0.9, 0.4]), other)
    assert (mean, half) == pytest.approx((0.1, 0.0))


@pytest.fixture
def finished(tmp_path):
    """An ablation with three arms over three seeds, one of which has no run, and the runner of its folder."""
    runs = {name: Run(f"r/{name}", (), None, (), ("mini_res",)) for name in ("8", "16", "32")}
    ablation = Ablation(
        recipe="r",
        claim="More <points>.",
        source="paper",
        metric="mini_res.miou",
        better="16",
        equal="steps",
        arms={name: [] for name in runs},
        name="points",
        runs=runs,
    )
    runner = Runner(tmp_path, 1)
    for name, base in (("8", 0.3), ("16", 0.5)):
        for seed in range(3):
            folder = runner.folder((runs[name], seed))
            row = {"scores": {"miou": base + 0.1 * seed}, "ceiling": {"miou": 0.9}}
            runner.scores((runs[name], seed)).parent.mkdir(parents=True)
            runner.scores((runs[name], seed)).write_text(json.dumps({"benchmarks": {"mini_res": row}}))
            (folder / "metrics.csv").write_text("step,seconds,samples,tokens\n1,0.5,32,100\n2,1.5,32,140\n")
    return ablation, runner


def test_pages_and_tables(finished, tmp_path):
    ablation, runner = finished
    result = collect(ablation, runner, 3)
    assert result.verdict == "undecided at this scale", "an arm has not run"
    write_results([result], tmp_path / "out", "python tools/ablate.py points")
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert len(rows) == 6
    assert rows[4] == {"ablation": "points", "arm": "16", "seed": "1", "metric": "mini_res.miou", "score": "0.6",
                       "ceiling": "0.9", "samples": "64.0", "tokens": "240.0", "seconds": "2.0"}  # fmt: skip
    text = (tmp_path / "out/results.md").read_text()
    assert "| 8 | 40.0 ± 24.8 | 90.0 | +20.0 ± 0.0 | confirmed | 64 | 240 | 2 s | 3 |" in text
    assert "| 32 | not run |" in text
    page = (tmp_path / "out/results.html").read_text()
    assert "More &lt;points&gt;." in page


def test_an_unknown_score_names_those_there_are(finished):
    ablation, runner = finished
    wrong = dataclasses.replace(ablation, metric="mini_res.mioo")
    with pytest.raises(ValueError, match="mini_res has no score 'mioo'; it has miou"):
        collect(wrong, runner, 1)


def test_numbers_as_text():
    assert spread((0.5, 0.01)) == "50.0 ± 1.0"
    assert spread((-0.005, float("nan")), "+") == "-0.5"
    assert spread(interval([])) == amount(interval([])) == ""
    assert [amount((mean, 0.0)) for mean in (11200.0, 2310000.0)] == ["11,200", "2.31 M"]
