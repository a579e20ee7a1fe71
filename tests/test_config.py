from __future__ import annotations

import itertools

import pytest

from vistallm.config import CONFIG_ROOT, GROUPS, apply_overrides, config_from_file, load_config, save_config


def names(group):
    return sorted(path.stem for path in (CONFIG_ROOT / group).glob("*.yaml"))


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A config folder of our own, so that the real values may change."""
    for group in GROUPS:
        (tmp_path / group).mkdir()
    (tmp_path / "default.yaml").write_text("stage: 1\nmodel: a\ndata: d\nseed: 3\n")
    (tmp_path / "stage" / "1.yaml").write_text("train: {lr: 0.1, decoder: full}\n")
    (tmp_path / "stage" / "2.yaml").write_text("train: {lr: 0.2, decoder: frozen}\n")
    (tmp_path / "model" / "a.yaml").write_text(
        "model: {name: a}\ntrain: {warmup: 0.5}\nstage_2: {train: {decoder: full}}\n"
    )
    (tmp_path / "data" / "d.yaml").write_text("data: {name: d, weights: {rec: 1, res: 2}}\n")
    monkeypatch.setattr("vistallm.config.CONFIG_ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("choice", list(itertools.product(*map(names, GROUPS))), ids="-".join)
def test_every_combination_of_the_shipped_files_loads(choice):
    config = load_config([f"{group}={name}" for group, name in zip(GROUPS, choice, strict=True)])
    assert str(config.stage) == choice[0]
    assert config.model.name == choice[1]
    assert config.data.name == choice[2]
    assert config.run_dir == f"runs/stage{choice[0]}-{choice[1]}"


def test_vicuna_trains_the_paper_sets():
    for model in ("vicuna-7b", "vicuna-13b"):
        one, two = (load_config([f"stage={stage}", f"model={model}"]).train for stage in (1, 2))
        assert (one.encoder, one.tokenizer, one.decoder) == (False, True, "full")
        assert (two.encoder, two.tokenizer, two.decoder) == (False, True, "frozen")


def test_layers_override_each_other_in_order(configs):
    one, two = load_config([]), load_config(["stage=2"])
    assert (one.seed, one.train.lr, one.train.decoder, one.train.warmup) == (3, 0.1, "full", 0.5)
    assert (two.train.lr, two.train.decoder) == (0.2, "full"), "stage_2 of the model file counts in stage 2 only"
    assert load_config(["stage=2", "train.decoder=lora", "seed=4"]).train.decoder == "lora"


def test_values_are_read_by_type(configs):
    config = load_config(
        ["train.lr=1e-4", "benchmarks=[a,b]", "target_iou=", "trainer.max_steps=5", "data.weights.rec=0.5", "ckpt=x=y"]
    )
    assert config.train.lr == 1e-4
    assert config.benchmarks == ["a", "b"]
    assert config.target_iou is None
    assert config.trainer == {"max_steps": 5}
    assert config.data.weights == {"rec": 0.5, "res": 2.0}
    assert config.ckpt == "x=y"


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("train.lrr=1", "train.lr"), ("sed=1", "seed"), ("model.decoder.layer=2", "model.decoder.layers")],
)
def test_unknown_key_names_the_nearest(word, nearest):
    with pytest.raises(ValueError, match=rf"unknown key '{word.split('=')[0]}'.*'{nearest}'"):
        load_config([word])


def test_all_problems_come_at_once():
    with pytest.raises(ValueError, match="unknown key") as error:
        load_config(["stage=3", "model=gpt", "sed=1", "train.lr=fast", "precision=fp8"])
    text = str(error.value)
    for word in ("stage=3", "model=gpt", "'sed'", "train.lr", "precision=fp8"):
        assert word in text, text


@pytest.mark.parametrize("word", ["--stage=1", "stage", "=1", "train.lr=[1", "ckpt=a: b: c", "train=5", "seed.x=1"])
def test_malformed_words_are_value_errors(word):
    with pytest.raises(ValueError, match=r"\S") as error:
        load_config([word])
    assert word.split("=")[0].strip("-") in str(error.value)


def test_unknown_key_in_a_file_is_refused(configs):
    (configs / "model" / "a.yaml").write_text("model: {name: a, layers: 3}\n")
    with pytest.raises(ValueError, match=r"model\.layers"):
        load_config([])


def test_save_and_load_are_inverse(tmp_path):
    config = load_config(["stage=2", "trainer.max_steps=7", "data.weights.rec=2", "train.lr=3e-5", "benchmarks=[x]"])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert config_from_file(tmp_path / "run" / "config.yaml") == config
    assert apply_overrides(config, []) == config
    assert apply_overrides(config, ["seed=9"]).seed == 9


def test_config_of_a_run_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="found no such file"):
        config_from_file(tmp_path / "config.yaml")


def test_a_mapping_replaces_the_one_of_the_group_file(configs):
    assert load_config(["data.weights.rec=3"]).data.weights == {"rec": 3, "res": 2}
    assert load_config(["data.weights={rec: 3}"]).data.weights == {"rec": 3}
