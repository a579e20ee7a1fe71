from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from vistallm.coinit.tasks import TASKS
from vistallm.data import stream as module
from vistallm.data.datamodule import split_shards
from vistallm.data.sequence import SampleReject
from vistallm.data.stream import RejectLog, TrainStream, evaluation_sequences, read_shard, stage_weights

ONCE = dict.fromkeys(TASKS, 1.0)


@pytest.fixture
def shards(mini_root):
    return split_shards(mini_root, "train")


@pytest.fixture
def tasks(shards):
    """Sample id -> task of the training split, in file order."""
    records = [json.loads(raw["json"]) for shard in shards for raw in read_shard(shard)]
    return {record["id"]: record["task"] for record in records}


@pytest.fixture
def light(monkeypatch):
    """Streams that decode no image: `light(...)` yields lists of ids; ids that end in 7 are rejects if asked."""

    def build(sample, rng):
        if build.rejects and sample.id.endswith("7"):
            raise SampleReject("unlucky", sample.id)
        return SimpleNamespace(id=sample.id, input_ids=range(len(sample.id) + len(sample.regions)))

    build.rejects = False
    monkeypatch.setattr(module, "decode_sample", lambda raw: module.Sample.from_json(json.loads(raw["json"])))
    monkeypatch.setattr(module, "collate", lambda rows, vocabulary: [row.id for row in rows])

    def make(shards, weights=ONCE, worker=None, rejects=False, **settings):
        build.rejects = rejects
        info = None if worker is None else SimpleNamespace(id=worker)
        monkeypatch.setattr(module, "get_worker_info", lambda: info)
        settings = {"batch_size": 1, "buffer": 20, **settings}
        builder = SimpleNamespace(build=build, vocabulary=None)
        return iter(TrainStream(shards, builder, weights, rejects=RejectLog(None, 1.0), **settings))

    return make


def slots(ranks, workers):
    return [(rank, worker) for rank in range(ranks) for worker in (range(workers) if workers else [None])]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_epoch_meets_each_sample_once_over_ranks_and_workers(light, shards, tasks, ranks, workers):
    layout = {"world_size": ranks, "workers": workers}
    met = []
    places = slots(ranks, workers)
    for number, (rank, worker) in enumerate(places):
        dealt = len(range(number, len(shards), len(places)))  # shards of this slot, 17 samples each
        met += islice(light(shards, worker=worker, rank=rank, **layout), 17 * dealt)
    assert Counter(i for batch in met for i in batch) == Counter(tasks.keys())


def test_pools_keep_the_samples_of_an_epoch_apart(light, shards, tasks):
    for rank in range(2):
        batches = list(islice(light(shards, rank=rank, world_size=2, batch_size=4, pool=3), 36))  # 153 samples per rank
        met = [i for batch in batches for i in batch]
        assert len(met) == len(set(met)) == 144
        assert all(len(batch) == 4 for batch in batches)


def test_order_is_a_function_of_seed_epoch_and_slot(light, shards, tasks):
    first = list(islice(light(shards, seed=1), 2 * len(tasks)))
    assert first == list(islice(light(shards, seed=1), 2 * len(tasks)))
    assert first != list(islice(light(shards, seed=2), 2 * len(tasks)))
    one, two = first[: len(tasks)], first[len(tasks) :]
    assert one != two, "another epoch, another order"
    assert sorted(one) == sorted(two)
    # The buffer reaches over shards: a shard's samples don't come as a block.
    place = {i: n // 17 for n, i in enumerate(tasks)}
    assert max(Counter(place[batch[0]] for batch in one[:17]).values()) < 17


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("rejects", [False, True])
@pytest.mark.parametrize("pool", [1, 3])
def test_done_continues_exactly_there(light, shards, workers, rejects, pool):
    """As the loader asks its workers in turn, the stream after k batches is batch k, k + 1, ... of the unbroken one."""

    def loader(done):
        lanes = [
            light(shards, worker=w, workers=workers, done=done, batch_size=4, pool=pool, rejects=rejects)
            for w in (range(workers) if workers else [None])
        ]
        turn = 0
        while True:
            with pytest.MonkeyPatch.context() as patch:  # a generator asks for its worker at its first batch
                info = SimpleNamespace(id=turn % len(lanes)) if workers else None
                patch.setattr(module, "get_worker_info", lambda info=info: info)
                yield next(lanes[turn % len(lanes)])
            turn += 1

    whole = list(islice(loader(0), 100))  # into the second epoch: an epoch has 76 batches
    for done in (1, 2, 7, 80):
        assert list(islice(loader(done), 12)) == whole[done : done + 12], f"done={done}"


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_task_weights(light, shards, tasks, weight):
    count = Counter(tasks.values())
    met = Counter()
    weights = {"rec": 1.0, "res": weight}
    for (identity,) in islice(light(shards, weights), 10 * count["rec"]):
        met[identity] += 1
    assert {tasks[i] for i in met} == ({"rec"} if weight == 0 else {"rec", "res"})
    share = {task: sum(n for i, n in met.items() if tasks[i] == task) / count[task] for task in ("rec", "res")}
    assert share["res"] == pytest.approx(weight * share["rec"], rel=0.15)
    if weight == 2:
        assert set(Counter(i for (i,) in islice(light(shards, {"res": 2.0}), 2 * count["res"])).values()) == {2}
    if weight == 0.5:
        some = {i for (i,) in islice(light(shards, {"res": 0.5}), 3 * count["res"])}
        assert len(some) > 0.9 * count["res"], "other samples sit out in other epochs"


def test_layouts_without_a_shard_for_everyone_are_refused(light, shards):
    with pytest.raises(ValueError, match=r"18 training shards for 4 rank\(s\) x 5 worker\(s\).*lower data.workers"):
        light(shards, world_size=4, workers=5)


def test_stage_weights():
    one, two = stage_weights({}, 1), stage_weights({}, 2)
    assert set(two) == {"nlvr2", "coseg", "attcoseg"}
    assert set(one) == set(TASKS) - set(two)
    assert stage_weights({"rec": 2.0}, 1) == {"rec": 2.0}
    with pytest.raises(ValueError, match="rez"):
        stage_weights({"rez": 1.0}, 1)


# -- broken shards -----------------------------------------------------------------------------------------------------


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for members in samples:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def members(raw):
    return {f"{raw['__key__']}.{k}": v for k, v in raw.items() if isinstance(v, bytes)}


def broken(raw, how):
    files = members(raw)
    record = f"{raw['__key__']}.json"
    image = next(name for name in files if name != record)
    match how:
        case "missing-image":
            files.pop(image)
        case "broken-jpeg":
            files[image] = b"not an image"
        case "empty-jpeg":
            files[image] = b""
        case "bad-json":
            files[record] = b'{"version": 1,'
        case "no-json":
            files.pop(record)
        case "json-list":
            files[record] = b"[]"
        case "other-version":
            files[record] = files[record].replace(b'"version":1', b'"version":9')
    return files


BREAKS = {
    "missing-image": "missing-image",
    "broken-jpeg": "bad-image",
    "empty-jpeg": "bad-image",
    "bad-json": "bad-json",
    "no-json": "bad-json",
    "json-list": "bad-json",
    "other-version": "bad-json",
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_sample_is_a_counted_reject(builder, shards, tmp_path, how):
    raws = list(read_shard(shards[0]))
    write_tar(tmp_path / "train-000000.tar", [broken(raws[0], how), *map(members, raws[1:8])])
    rejects = RejectLog(tmp_path / "rejects.jsonl", max_share=0.5)
    stream = TrainStream(
        [tmp_path / "train-000000.tar"], builder, ONCE, batch_size=8, buffer=1, rejects=rejects, pool=1
    )
    batch = next(iter(stream))
    assert sorted(batch.ids) == sorted(json.loads(raw["json"])["id"] for raw in raws[1:8])
    assert rejects.counts == {BREAKS[how]: 1}
    (line,) = [json.loads(text) for text in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert (line["key"], line["reason"]) == (raws[0]["__key__"], BREAKS[how])
    assert line["shard"].endswith("train-000000.tar")
    assert raws[0]["__key__"] in line["error"] or how in ("bad-json", "no-json")


def test_too_many_rejects_stop_the_run(builder, shards, tmp_path):
    raws = list(read_shard(shards[0]))
    write_tar(tmp_path / "a.tar", [broken(raws[0], "bad-json"), *map(members, raws[1:5])])
    rejects = RejectLog(tmp_path / "rejects.jsonl", max_share=0.1)
    stream = TrainStream([tmp_path / "a.tar"], builder, ONCE, batch_size=5, buffer=1, rejects=rejects)
    batches = iter(stream)
    with pytest.raises(ValueError, match=r"of 10\d samples rejected \{'bad-json'.*max_reject_share=0.1.*check DIR"):
        list(islice(batches, 30))


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"train-000000\.tar: not a readable tar"):
        list(read_shard(tmp_path / "train-000000.tar"))


def test_rejects_do_not_move_the_place_in_the_stream(builder, shards, tmp_path):
    """With real batches and a broken sample in each pool, `done` still means the same place."""
    raws = list(read_shard(shards[0]))[:12]
    write_tar(tmp_path / "a.tar", [broken(r, "broken-jpeg") if i % 6 == 0 else members(r) for i, r in enumerate(raws)])
    settings = {"batch_size": 3, "buffer": 4, "pool": 2, "rejects": RejectLog(None, 1.0)}
    whole = list(islice(TrainStream([tmp_path / "a.tar"], builder, ONCE, **settings), 5))
    rest = list(islice(TrainStream([tmp_path / "a.tar"], builder, ONCE, done=3, **settings), 2))
    for one, two in zip(whole[3:], rest, strict=True):
        assert one.ids == two.ids
        assert torch.equal(one.input_ids, two.input_ids), "templates are drawn per sample, not in turn"
        assert torch.equal(one.images, two.images)


def test_evaluation_is_finite_and_in_file_order(builder, mini_root, samples):
    shards, rejects = split_shards(mini_root, "test"), RejectLog(None, 1.0)
    rows = list(evaluation_sequences(shards, builder, "rec", rejects))
    assert [row.sample.id for row in rows] == [sample.id for sample in samples["rec"]]
    assert len(list(evaluation_sequences(shards, builder, "rec", rejects, limit=1))) == 1
    assert rows[0].prompt == builder.build(samples["rec"][0]).prompt
