from __future__ import annotations

import json

import pytest

from vistallm.config import Config, apply_overrides, load_config
from vistallm.data.mixture import build_mixture, find_folders, require_folders, stage_weights
from vistallm.tasks import TASKS

COUNTS = {"one": {"rec": 100, "res": 100}, "two": {"vqa": 400}, "three": {"caption": 50, "nlvr2": 9}}


@pytest.fixture
def root(tmp_path):
    """Three source folders that are an index only."""
    for source, tasks in COUNTS.items():
        (tmp_path / source).mkdir()
        row = {"split": "train", "samples": sum(tasks.values()), "bytes": 1, "sha256": "", "tasks": tasks}
        index = {"version": 1, "tasks": {"train": tasks}, "shards": {"train-000000.tar": row}}
        (tmp_path / source / "index.json").write_text(json.dumps(index))
    return tmp_path


def samples(root, *words):
    words = ["data.sources.one=1", "data.sources.two=0.5", "data.sources.three=2", *words]
    config = apply_overrides(Config(), words)
    return build_mixture(config, require_folders(config.data, str(root))).samples(0)


def test_source_weights_times_task_weights(root):
    assert samples(root) == {("one", "rec"): 100, ("one", "res"): 100, ("two", "vqa"): 200, ("three", "caption"): 100}
    assert samples(root, "data.weights.res=1.5", "data.weights.vqa=0.1") == {("one", "res"): 150, ("two", "vqa"): 20}
    assert samples(root, "stage=2") == {("three", "nlvr2"): 18}
    assert ("two", "vqa") not in samples(root, "data.sources.two=0")


def test_temperature_evens_the_sources_out_at_the_same_size(root):
    warm = samples(root, "data.temperature=2")
    plain = {"one": 200, "two": 200, "three": 100}
    sources = {s: sum(n for (source, _), n in warm.items() if source == s) for s in plain}
    roots = {s: n**0.5 for s, n in plain.items()}
    for source, value in roots.items():
        assert sources[source] == pytest.approx(500 * value / sum(roots.values()), abs=2)
    with pytest.raises(ValueError, match=r"data\.temperature=0"):
        samples(root, "data.temperature=0")


def test_a_cap_scales_a_task_down(root):
    assert samples(root, "data.max_per_task.rec=30", "data.max_per_task.vqa=1000")["one", "rec"] == 30
    with pytest.raises(ValueError, match="data.max_per_task: unknown task.*rez"):
        samples(root, "data.max_per_task.rez=30")


def test_missing_sources_stop_or_are_left_out_aloud(root, capsys):
    with pytest.raises(ValueError, match=r"1 of 4 sources are missing: four; build them"):
        samples(root, "data.sources.four=1")
    assert len(samples(root, "data.sources.four=1", "data.missing_sources=skip")) == 4
    assert "training without four" in capsys.readouterr().out
    assert len(samples(root, "data.sources.four=0")) == 4
    found, missing = find_folders(apply_overrides(Config(), ["data.sources.four=1"]).data, str(root))
    assert (found, missing) == ([], ["four"])


def test_a_root_with_an_index_is_one_source(root):
    assert samples(root / "one") == {(".", "rec"): 100, (".", "res"): 100}


def test_an_unknown_task_in_the_index_stops(root):
    path = root / "one" / "index.json"
    path.write_text(path.read_text().replace('"rec"', '"wreck"'))
    with pytest.raises(ValueError, match="unknown task.*one:wreck"):
        samples(root)


def test_stage_weights():
    one, two = stage_weights({}, 1), stage_weights({}, 2)
    assert set(two) == {name for name, task in TASKS.items() if task.multi_image}
    assert set(one) == set(TASKS) - set(two)
    assert stage_weights({"rec": 2.0}, 1) == {"rec": 2.0}
    with pytest.raises(ValueError, match="rez"):
        stage_weights({"rez": 1.0}, 1)


def test_the_mixture_of_the_release():
    one, two = (load_config(["data=coinit", f"stage={stage}"]).data.sources for stage in (1, 2))
    assert one["visual-genome"] == 0.05
    assert {s for s, w in two.items() if w} == {"nlvr2", "coseg", "attcoseg"}
    assert not {"pope", "nlvr2", "coseg"} & set(one), "POPE is an evaluation set"
    assert load_config(["data=coinit", "data.sources.refcoco+=0.5"]).data.sources["refcoco+"] == 0.5
