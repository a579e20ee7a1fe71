from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from vistallm.coinit.shards import split_shards
from vistallm.data.datamodule import CoinItDataModule, data_root


def test_missing_and_empty_folders(tiny_config, tmp_path):
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=r"data\.root=.*index\.json.*build_coinit"):
            data_root(tiny_config(f"data.root={root}"))
    with pytest.raises(ValueError, match=r"data=coinit: give the shard folder as data\.root=DIR"):
        data_root(tiny_config("data.root=", "data.name=coinit"))


def test_shards_that_are_listed_but_gone(mini_root, tmp_path):
    shutil.copy(mini_root / "index.json", tmp_path)
    with pytest.raises(ValueError, match=r"18 shard\(s\) that are not there, first train-000000\.tar"):
        split_shards(tmp_path, "train")
    with pytest.raises(ValueError, match="no shard of split 'dev'"):
        split_shards(mini_root, "dev")


def test_an_index_without_shards(mini_root, tmp_path):
    index = json.loads((mini_root / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"shards": {}}))
    with pytest.raises(ValueError, match=r"0 shard\(s\)"):
        split_shards(tmp_path, "train")


def test_steps_of_an_epoch_follow_the_weights(tiny_config, vocabulary, mini_root):
    counts = json.loads((mini_root / "index.json").read_text())["tasks"]["train"]

    def steps(*words, world=1, accumulate=1):
        return CoinItDataModule(tiny_config(*words), vocabulary, mini_root).steps_per_epoch(world, accumulate)

    assert steps("data.weights.res=1") == counts["res"] // 4
    assert steps("data.weights.res=2", "data.weights.rec=0.5") == int((2 * counts["res"] + 0.5 * counts["rec"]) / 4)
    assert steps("data.weights.res=4", world=2, accumulate=2) == counts["res"] // 4
    assert steps("stage=2") == sum(counts[t] for t in ("nlvr2", "coseg", "attcoseg")) // 4
    with pytest.raises(ValueError, match="no training sample of the tasks rec"):
        steps("data.weights.rec=0")


def resumed(config, vocabulary, root, state, world, ready=0):
    """A data module that has taken up `state` on `world` ranks."""
    data = CoinItDataModule(config, vocabulary, root)
    progress = SimpleNamespace(total=SimpleNamespace(ready=ready))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(fit_loop=loop, world_size=world, global_rank=0)
    data.load_state_dict(state)
    return data


def test_resume_on_other_ranks_keeps_the_lanes_or_the_sample_count(tiny_config, vocabulary, mini_root, capsys):
    config = tiny_config("data.workers=1")
    state = {"seed": 0, "batch_size": 4, "batches_done": 40, "ready": 10, "lanes": 4}
    half = resumed(config, vocabulary, mini_root, state, world=2)
    assert (half.lanes, half.batches_done) == (4, 40)
    assert capsys.readouterr().out == ""
    half.trainer.fit_loop.epoch_loop.batch_progress.total.ready = 13  # three batches later on each of two ranks
    assert half.state_dict()["batches_done"] == 46
    third = resumed(config, vocabulary, mini_root, state, world=3)
    assert (third.lanes, third.batches_done) == (3, 40)
    assert "after the same 160 samples" in capsys.readouterr().out
    with pytest.raises(ValueError, match="depends on mixture abc -> "):
        resumed(config, vocabulary, mini_root, state | {"mixture": "abc"}, world=4)
