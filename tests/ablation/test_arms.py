from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from vistallm.ablation.arms import ARMS_FILE, load_ablations
from vistallm.config import load_config


def test_every_arm_of_the_shipped_file_loads_and_differs_from_the_others():
    ablations = load_ablations().ablations
    for ablation in ablations.values():
        assert ablation.better in ablation.arms
        assert ablation.metric.partition(".")[0] in next(iter(ablation.runs.values())).benchmarks
        ways = [(run.overrides, run.start and run.start.name, run.decode) for run in ablation.runs.values()]
        assert len(set(ways)) == len(ways), ablation.name
    asked = {"mask_sampler", "points", "coords", "num_bins", "kind", "queries", "decoder", "fraction", "grammar"}
    words = {w for a in ablations.values() for run in a.runs.values() for w in (*run.overrides, *run.decode)}
    assert asked <= {word.partition("=")[0].rpartition(".")[2] for word in words}


def test_arms_with_the_same_words_share_a_run_and_start_from_plain_ones():
    ablations = load_ablations(("trainer.max_steps=3",)).ablations
    sampler, grammar = ablations["sampler"].runs, ablations["grammar"].runs
    assert sampler["adaptive"].name == grammar["on"].name == grammar["off"].name == "masks/plain"
    assert grammar["on"].evaluation != grammar["off"].evaluation
    assert [run.name for run in ablations["stage2"].runs["stage 2"].chain] == [
        "boxes/plain",
        "masks/plain",
        "multi/plain",
    ]
    one = ablations["multi-data"].runs["one stage"]
    assert [run.name for run in one.chain][0] == "boxes/plain"
    assert len(one.chain) == 2
    assert all(load_config(list(run.overrides)).trainer["max_steps"] == 3 for run in one.chain), "extra words come last"
    assert load_config(list(sampler["uniform"].overrides)).mask_sampler == "uniform"


def test_the_multi_image_arms_read_the_same_samples_of_each_task():
    """`one stage` reads what the two stages read together, to a tenth."""
    arms, sizes = load_ablations().ablations["multi-data"].runs, {"rec": 3020, "res": 3843, "attcoseg": 1922}

    def read(runs):
        total = dict.fromkeys(sizes, 0.0)
        for config in (load_config(list(run.overrides)) for run in runs):
            weight = {task: w * sizes[task] for task, w in config.data.weights.items()}
            for task, share in weight.items():
                total[task] += config.trainer["max_steps"] * config.data.batch_size * share / sum(weight.values())
        return total

    two, one = read(arms["two stages"].chain[1:]), read(arms["one stage"].chain[1:])
    assert two == {task: pytest.approx(n, rel=0.1) for task, n in one.items()}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ablations.points.arms.8", ["pionts=8"], r"run masks/pionts=8: unknown key 'pionts'.*'points'"),
        ("ablations.points.arms.8", ["points=x"], r"run masks/points=x: points: Value 'x'"),
        ("ablations.points.better", "9", r"ablation points: better=9: expected one of two arms or more, got 8, 12"),
        ("ablations.points.metric", "mini_rec.p_at_50", r"metric=mini_rec.p_at_50: expected BENCHMARK.SCORE.*mini_res"),
        ("ablations.points.recipe", "musks", r"ablation points: no recipe 'musks'; there are boxes, masks, multi"),
        ("ablations.points.clam", "x", r"'clam'.*ablations.points.clam"),
        ("ablations.points.arms.8", 8, r"ablations.points.arms\[8\]|ablations.points.arms.8"),
        ("recipes.masks.start", "boxen", r"ablation points: no recipe 'boxen'"),
        ("recipes.masks.benchmarks", None, r"missing mandatory value: benchmarks"),
    ],
)
def test_a_typo_is_refused_before_anything_runs(tmp_path, path, value, message):
    content = OmegaConf.to_container(OmegaConf.load(ARMS_FILE))
    *folders, key = path.split(".")
    entry = content
    for folder in folders:
        entry = entry[folder]
    entry[key] = value
    if value is None:
        del entry[key]
    OmegaConf.save(OmegaConf.create(content), tmp_path / "arms.yaml")
    with pytest.raises(ValueError, match=message):
        load_ablations(path=tmp_path / "arms.yaml")


def test_choose():
    file = load_ablations()
    assert [ablation.name for ablation in file.choose("points,coords")] == ["points", "coords"]
    assert len(file.choose("all")) == len(file.ablations)
    with pytest.raises(ValueError, match="no ablation pionts; there are sampler, points"):
        file.choose("sampler,pionts")
    assert "mini" in file.prepare
