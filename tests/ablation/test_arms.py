from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from vistallm.ablation.arms import ARMS_FILE, choose, load_ablations, preparation
from vistallm.config import load_config


def test_every_arm_of_the_shipped_file_loads_and_differs_from_the_others():
    ablations = load_ablations()
    for ablation in ablations.values():
        assert ablation.better in ablation.arms
        assert ablation.metric[0] in next(iter(ablation.arms.values())).benchmarks
        ways = [(run.words, run.start and run.start.name, run.decode) for run in ablation.arms.values()]
        assert len(set(ways)) == len(ways), ablation.name
    asked = {"mask_sampler", "points", "coords", "num_bins", "kind", "queries", "decoder", "fraction", "grammar"}
    words = {w for a in ablations.values() for run in a.arms.values() for w in (*run.words, *run.decode)}
    assert asked <= {word.partition("=")[0].rpartition(".")[2] for word in words}


def test_arms_with_the_same_words_share_a_run_and_start_from_plain_ones():
    ablations = load_ablations(("trainer.max_steps=3",))
    sampler, grammar = ablations["sampler"].arms, ablations["grammar"].arms
    assert sampler["adaptive"].name == grammar["on"].name == grammar["off"].name == "masks/plain"
    assert grammar["on"].scores != grammar["off"].scores
    assert [run.name for run in ablations["stage2"].arms["stage 2"].chain] == [
        "boxes/plain",
        "masks/plain",
        "multi/plain",
    ]
    one = ablations["multi-data"].arms["one stage"]
    assert [run.name for run in one.chain][0] == "boxes/plain"
    assert len(one.chain) == 2
    assert all(load_config(list(run.words)).trainer["max_steps"] == 3 for run in one.chain), "extra words come last"
    assert load_config(list(sampler["uniform"].words)).mask_sampler == "uniform"


def test_the_multi_image_arms_read_the_same_samples_of_each_task():
    """`one stage` reads what the two stages read together, to a tenth."""
    arms, sizes = load_ablations()["multi-data"].arms, {"rec": 3020, "res": 3843, "attcoseg": 1922}

    def read(runs):
        total = dict.fromkeys(sizes, 0.0)
        for config in (load_config(list(run.words)) for run in runs):
            weight = {task: w * sizes[task] for task, w in config.data.weights.items()}
            for task, share in weight.items():
                total[task] += config.trainer["max_steps"] * config.data.batch_size * share / sum(weight.values())
        return total

    two, one = read(arms["two stages"].chain[1:]), read(arms["one stage"].chain[1:])
    assert two == {task: pytest.approx(n, rel=0.1) for task, n in one.items()}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("ablations.points.arms.8", ["pionts=8"], r"run masks/pionts=8: unknown key 'pionts'.*'points'"),
        ("ablations.points.arms.8", ["points=x"], r"run masks/points=x: points: Value 'x'"),
        ("ablations.points.better", "9", r"ablation points: better: 9 is none of its arms"),
        ("ablations.points.arms.many", ["points=64"], r"axis=points per mask: expected arms named by numbers"),
        (
            "ablations.points.metric",
            "mini_rec.p_at_50",
            r"metric 'mini_rec.p_at_50': expected BENCHMARK.SCORE.*mini_res",
        ),
        ("ablations.points.recipe", "musks", r"no recipe 'musks'; there are boxes, masks, multi"),
        ("ablations.points.clam", "x", r"ablation points: unknown key 'clam'"),
        ("recipes.masks.start", "boxen", r"arm 8: no recipe 'boxen'"),
        ("recipes.masks.benchmarks", None, r"recipe masks: 'benchmarks' is missing"),
    ],
)
def test_a_typo_is_refused_before_anything_runs(tmp_path, path, value, said):
    content = OmegaConf.to_container(OmegaConf.load(ARMS_FILE))
    *folders, key = path.split(".")
    place = content
    for folder in folders:
        place = place[folder]
    place[int(key) if key.isdigit() else key] = value
    if value is None:
        del place[key]
    OmegaConf.save(OmegaConf.create(content), tmp_path / "arms.yaml")
    with pytest.raises(ValueError, match=said):
        load_ablations(path=tmp_path / "arms.yaml")


def test_names_and_data():
    ablations = load_ablations()
    assert [ablation.name for ablation in choose(ablations, "points,coords")] == ["points", "coords"]
    assert len(choose(ablations, "all")) == len(ablations)
    with pytest.raises(ValueError, match="no ablation pionts; there are sampler, points"):
        choose(ablations, "sampler,pionts")
    assert "mini" in preparation(("trainer.max_steps=3",))
    assert preparation(("data.root=/some",)) == []
