from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from vistallm.coinit.shards import RawSample, read_raw, seal, split_shards, write_shard
from vistallm.config import DataConfig
from vistallm.data import stream as module
from vistallm.data.images import decode_sample
from vistallm.data.order import Mixture, Shard
from vistallm.data.stream import RejectLog, TrainStream, evaluation_sequences
from vistallm.schema import ImageInfo, Sample, SampleReject
from vistallm.tasks import TASKS

ONCE = dict.fromkeys(TASKS, 1.0)


@pytest.fixture
def shards(mini_root):
    return split_shards(mini_root, "train")


@pytest.fixture
def tasks(shards):
    """Sample id -> task of the training split, in file order."""
    return {raw.record["id"]: raw.task for shard in shards for raw in read_raw(shard)}


@pytest.fixture
def light(monkeypatch):
    """Streams that decode no image: `light(...)` yields lists of ids; ids that end in 7 are rejects if asked."""

    def build(sample, rng):
        if build.rejects and sample.id.endswith("7"):
            raise SampleReject("unlucky", sample.id)
        return SimpleNamespace(id=sample.id, input_ids=range(len(sample.id) + len(sample.regions)))

    build.rejects = False
    monkeypatch.setattr(module, "decode_sample", lambda raw, size, pixels: Sample.from_json(raw.record))

    def make(shards, weights=ONCE, worker=None, rejects=False, **settings):
        build.rejects = rejects
        info = None if worker is None else SimpleNamespace(id=worker)
        monkeypatch.setattr(module, "get_worker_info", lambda: info)
        builder = SimpleNamespace(build=build, vocabulary=None, image_size=48, frames=8)
        mixture = shards if isinstance(shards, Mixture) else mixture_of(shards, weights)
        return iter(stream_of(mixture, builder, RejectLog(None, 1.0), **{"mix": 4, "collate": ids_of, **settings}))

    return make


def stream_of(mixture, builder, rejects, *, batch_size=1, buffer=20, pool=1, mix=16, workers=0, lanes=None, **place):
    """A stream with the data settings that these tests are about."""
    data = DataConfig(batch_size=batch_size, shuffle_buffer=buffer, pool_batches=pool, mix_shards=mix)
    data.workers, data.lanes = workers, lanes
    return TrainStream(mixture, builder, data, rejects, **place)


def ids_of(rows, vocabulary):
    """Collate rows of a light builder."""
    return Ids(row.id for row in rows)


class Ids(list):
    """A batch that holds ids only."""


def mixture_of(paths, weights=ONCE):
    """The mixture of shard files, counted by reading them."""
    counts = [Counter(raw.task for raw in read_raw(path) if raw.task) for path in paths]
    shards = [Shard(str(path), ".", dict(tasks)) for path, tasks in zip(paths, counts, strict=True)]
    return Mixture(shards, {(".", task): weight for task, weight in weights.items()})


@pytest.fixture
def ranks(light, shards):
    """Callable: layout and `done` batches of the run -> the run's batches in order, as its ranks' loaders give them."""

    def run(world, workers, done=0, **settings):
        layout = {"world_size": world, "workers": workers, "done": done, **settings}
        places = [(rank, worker) for worker in (range(workers) if workers else [None]) for rank in range(world)]
        lanes = [light(shards, worker=w, rank=rank, **layout) for rank, w in places]
        turn = 0
        while True:
            rank, worker = places[turn % len(lanes)]
            with pytest.MonkeyPatch.context() as patch:  # a generator asks for its worker at its first batch
                info = None if worker is None else SimpleNamespace(id=worker)
                patch.setattr(module, "get_worker_info", lambda info=info: info)
                yield next(lanes[turn % len(lanes)])
            turn += 1

    return run


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 2), (2, 4), (8, 2)])
def test_an_epoch_meets_each_sample_once_over_ranks_and_workers(ranks, tasks, world, workers):
    lanes = world * max(workers, 1)
    met = Counter(i for batch in islice(ranks(world, workers), len(tasks) // lanes * lanes) for i in batch)
    assert set(met.values()) == {1}
    assert len(met) == len(tasks) // lanes * lanes, "all but what can't be dealt out evenly"


def test_pools_keep_the_samples_of_an_epoch_apart(ranks):
    batches = list(islice(ranks(2, 0, batch_size=4, pool=3), 72))  # 153 samples per rank
    met = [i for batch in batches for i in batch]
    assert len(met) == len(set(met)) == 288
    assert all(len(batch) == 4 for batch in batches)


def test_order_is_a_function_of_seed_and_epoch(ranks, tasks):
    first = list(islice(ranks(1, 0, seed=1), 2 * len(tasks)))
    assert first == list(islice(ranks(1, 0, seed=1), 2 * len(tasks)))
    assert first != list(islice(ranks(1, 0, seed=2), 2 * len(tasks)))
    one, two = first[: len(tasks)], first[len(tasks) :]
    assert one != two, "another epoch, another order"
    assert sorted(one) == sorted(two)
    place = {i: n // 17 for n, i in enumerate(tasks)}
    assert max(Counter(place[batch[0]] for batch in one[:17]).values()) < 10, "a shard does not come as a block"


@pytest.mark.parametrize("layout", [(1, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("settings", [{"rejects": True, "pool": 3}, {"pool": 1}])
def test_done_continues_exactly_there(ranks, layout, settings):
    whole = list(islice(ranks(*layout, batch_size=4, **settings), 100))  # into the second epoch, which begins at 76
    for done in (2, 14, 80):
        assert list(islice(ranks(*layout, done, batch_size=4, **settings), 12)) == whole[done : done + 12]


@pytest.mark.parametrize("layout", [(1, 0), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_any_layout_that_divides_the_lanes_gives_the_same_batches(ranks, layout):
    whole = list(islice(ranks(4, 1, batch_size=4, pool=2), 100))
    for done in (0, 12, 84):
        assert list(islice(ranks(*layout, done, batch_size=4, pool=2, lanes=4), 12)) == whole[done : done + 12]


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_task_weights(light, shards, tasks, weight):
    size = Counter(tasks.values())
    stream = light(shards, {"rec": 1.0, "res": weight})
    for _ in range(2):
        epoch = Counter(tasks[i] for (i,) in islice(stream, size["rec"] + int(weight * size["res"])))
        assert epoch["rec"] == size["rec"]
        assert epoch["res"] == int(weight * size["res"])


def test_layouts_are_checked(light, shards):
    with pytest.raises(ValueError, match=r"18 training shards for 20 lanes.*lower data.workers"):
        light(shards, world_size=4, workers=5)
    with pytest.raises(ValueError, match=r"data\.lanes=6: expected a multiple of 2 rank\(s\) x 2 worker\(s\)"):
        light(shards, world_size=2, workers=2, lanes=6)


# -- images that samples share -----------------------------------------------------------------------------------------


def shared_shards(root, shards=6, images=40, each=5, share=True):
    """Shards in which `each` neighbours use one image."""
    paths, rows = [], []
    for number in range(shards):
        made = [
            (Sample(f"{number}-{i}-{k}", "vqa", "made", [ImageInfo("0.jpg", 8, 8)]), [(b"%d %d" % (number, i), "jpg")])
            for i in range(images)
            for k in range(each)
        ]
        name, row = write_shard(root, "train", number, made, share)
        paths.append(root / name)
        rows.append(Shard(str(root / name), ".", row["tasks"], row["bytes"], row.get("images")))
    return paths, Mixture(rows, {(".", "vqa"): 1.0})


def gaps(ids):
    """Distances between consecutive samples of one image."""
    places = {}
    for place, name in enumerate(ids):
        places.setdefault(name.rpartition("-")[0], []).append(place)
    return sorted(b - a for used in places.values() for a, b in itertools.pairwise(used))


def test_samples_of_one_image_are_far_apart_and_resume_is_exact(light, tmp_path):
    _, mixture = shared_shards(tmp_path)
    assert mixture.samples_per_image == 5
    settings = {"buffer": 100, "mix": 6, "batch_size": 2}
    whole = list(islice(light(mixture, **settings), 1200))
    ids = [i for batch in whole for i in batch]
    assert len(set(ids[:1200])) == 1200, "an epoch sees each sample once"
    assert gaps(ids[:500])[0] > 60, "a block: 100 images, each 5 times at equal distances"
    assert np.median(gaps(ids[:1200])) > 90
    for done in (7, 251, 700):
        assert list(islice(light(mixture, done=done, **settings), 20)) == whole[done : done + 20]
    (tmp_path / "plain").mkdir()
    _, plain = shared_shards(tmp_path / "plain", share=False)
    before = [i for (i,) in islice(light(plain, **settings | {"batch_size": 1}), 1200)]
    assert np.median(gaps(before)) < 30, "without: neighbours in the shards stay near each other"


def test_a_buffered_image_is_held_once(tmp_path):
    paths, _ = shared_shards(tmp_path, shards=1)
    raws = list(read_raw(paths[0]))
    assert len({id(data) for raw in raws for data in raw.files.values()}) == 40
    assert len(raws) == 200


def test_a_shared_image_is_decoded_once_and_gives_the_same_batches(builder, tmp_path, monkeypatch):
    rng, shards = np.random.default_rng(0), []
    photographs = [cv2.imencode(".jpg", rng.integers(0, 255, (48, 64, 3), np.uint8))[1].tobytes() for _ in range(20)]
    for number in range(2):
        made = [
            (
                Sample(f"{i}", "vqa", "made", [ImageInfo("", 64, 48)], None, {"question": f"{i}?", "answer": "red"}),
                [(photographs[i // 6], "jpg")],
            )
            for i in range(60 * number, 60 * number + 60)
        ]
        name, row = write_shard(tmp_path, "train", number, made)
        shards.append(Shard(str(tmp_path / name), ".", row["tasks"], row["bytes"], row["images"]))
    mixture, settings = Mixture(shards, {(".", "vqa"): 1.0}), {"batch_size": 4, "pool": 3, "buffer": 20}
    decode, decoded = cv2.imdecode, []
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: decoded.append(data) or decode(data, flags))
    together = list(islice(stream_of(mixture, builder, rejects=RejectLog(None, 0.0), **settings), 30))
    assert len(decoded) == 20, "once each, not 120 times"
    real = module.read_raw
    monkeypatch.setattr(module, "read_raw", lambda *words: (replace(raw, squares=None) for raw in real(*words)))
    alone = list(islice(stream_of(mixture, builder, rejects=RejectLog(None, 0.0), **settings), 30))
    assert len(decoded) == 140
    for one, two in zip(together, alone, strict=True):
        assert one.ids == two.ids
        assert torch.equal(one.images, two.images)


# -- broken shards -----------------------------------------------------------------------------------------------------


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for members in samples:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def members(raw, **changes):
    record = {f"{raw.key}.json": seal(raw.record | changes, raw.files)}
    return record | {f"{raw.key}.{name}": data for name, data in raw.files.items()}


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def broken(raw, how):
    files = members(raw)
    record = f"{raw.key}.json"
    image = next(name for name in files if name != record)
    match how:
        case "missing-image":
            files.pop(image)
        case "broken-jpeg" | "empty-jpeg":
            content = b"not an image" if how == "broken-jpeg" else b""
            return members(replace(raw, files=dict.fromkeys(raw.files, content)))
        case "flipped-image":
            files[image] = flipped(files[image], len(files[image]) // 2)
        case "flipped-record" | "flipped-sum":
            at = files[record].index(b'"id":"') + 8 if how == "flipped-record" else -4
            files[record] = flipped(files[record], at % len(files[record]))
        case "old":
            files[record] = json.dumps({k: v for k, v in raw.record.items() if k != "crc32"}).encode()
        case "bad-json":
            files[record] = b'{"version": 1,'
        case "no-json":
            files.pop(record)
        case "json-list":
            files[record] = b"[]"
        case "other-version":
            return members(raw, version=9)
    return files


BREAKS = {
    "missing-image": "missing-image",
    "broken-jpeg": "bad-image",
    "empty-jpeg": "bad-image",
    "bad-json": "bad-json",
    "no-json": "bad-json",
    "json-list": "bad-json",
    "other-version": "bad-json",
    "flipped-image": "checksum",
    "flipped-record": "checksum",
    "flipped-sum": "checksum",
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_sample_is_a_counted_reject(builder, shards, tmp_path, how):
    raws = list(read_raw(shards[0]))
    path = tmp_path / "train-000000.tar"
    write_tar(path, map(members, raws[:8]))
    mixture = mixture_of([path])
    write_tar(path, [broken(raws[0], how), *map(members, raws[1:8])])
    rejects = RejectLog(tmp_path / "rejects.jsonl", max_share=0.5)
    batch = next(iter(stream_of(mixture, builder, batch_size=8, buffer=1, rejects=rejects)))
    assert sorted(batch.ids) == sorted(raw.record["id"] for raw in raws[1:8])
    assert rejects.counts == {BREAKS[how]: batch.rejects} == {BREAKS[how]: 1}
    (line,) = [json.loads(text) for text in rejects.path.read_text().splitlines()]
    assert (line["shard"], line["key"], line["reason"]) == (str(path), raws[0].key, BREAKS[how])
    assert raws[0].key in line["error"]


def test_shards_without_checksums_are_read(builder, shards, tmp_path):
    raws = list(read_raw(shards[0]))[:4]
    write_tar(tmp_path / "a.tar", [broken(raw, "old") for raw in raws])
    rejects = RejectLog(None, 1.0)
    batch = next(iter(stream_of(mixture_of([tmp_path / "a.tar"]), builder, batch_size=4, buffer=1, rejects=rejects)))
    assert (len(batch), rejects.counts) == (4, {})


def test_too_many_rejects_stop_the_run(builder, shards, tmp_path):
    raws = list(read_raw(shards[0]))
    write_tar(tmp_path / "a.tar", [*map(members, raws[:4]), broken(raws[4], "broken-jpeg")])
    rejects = RejectLog(tmp_path / "rejects.jsonl", max_share=0.1)
    batches = iter(stream_of(mixture_of([tmp_path / "a.tar"]), builder, batch_size=5, buffer=1, rejects=rejects))
    with pytest.raises(ValueError, match=r"of 10\d samples rejected \{'bad-image'.*max_reject_share=0.1.*check DIR"):
        list(islice(batches, 30))


def test_rejects_that_can_not_be_written_are_still_counted(tmp_path, capsys):
    rejects = RejectLog(tmp_path / "gone" / "rejects.jsonl", max_share=1.0)
    for _ in range(3):
        rejects.add(RawSample("a.tar", "k"), SampleReject("bad-json", "k: broken"))
    assert (rejects.counts.total(), rejects.unwritten) == (3, 3)
    assert capsys.readouterr().out.count("not written") == 1


def test_rejects_do_not_move_the_place_in_the_stream(builder, shards, tmp_path):
    """With real batches and a broken sample in each pool, `done` still means the same place."""
    raws = list(read_raw(shards[0]))[:12]
    write_tar(tmp_path / "a.tar", [broken(r, "broken-jpeg") if i % 6 == 0 else members(r) for i, r in enumerate(raws)])
    settings = {"batch_size": 3, "buffer": 4, "pool": 2, "rejects": RejectLog(None, 1.0)}
    mixture = mixture_of([tmp_path / "a.tar"])
    whole = list(islice(stream_of(mixture, builder, **settings), 5))
    rest = list(islice(stream_of(mixture, builder, done=3, **settings), 2))
    for one, two in zip(whole[3:], rest, strict=True):
        assert one.ids == two.ids
        assert torch.equal(one.input_ids, two.input_ids), "templates are drawn per sample, not in turn"
        assert torch.equal(one.images, two.images)


# What is done to a shard of 17 samples -> (rejects by reason; samples that are lost)
DAMAGE = {
    "cut": ({"changed-shard": 1, "missing-sample": 8, "broken-shard": 1}, 9),
    "replaced": ({"changed-shard": 1, "missing-sample": 12}, 12),
    "gone": ({"broken-shard": 1, "missing-sample": 16}, 17),
    "no-tar": ({"changed-shard": 1, "broken-shard": 1, "missing-sample": 16}, 17),
    "tricks": ({"changed-shard": 1, "bad-member": 3}, 0),
    "unknown-task": ({"unknown-task": 1}, 1),
    "other-task": ({"checksum": 1}, 1),
}


def damage(path, how):
    data, raws = path.read_bytes(), list(read_raw(path))
    match how:
        case "cut":
            place = data.index(f"{raws[8].key}.json".encode())
            path.write_bytes(data[: place + 700])
        case "replaced":
            write_tar(path, map(members, raws[:5]))
        case "gone":
            path.unlink()
        case "no-tar":
            path.write_bytes(b"x" * 2000)
        case "tricks":
            names = ["../../outside.json", "/etc/outside.json", "a/b.json"]
            write_tar(path, [{name: b"{}" for name in names}, *map(members, raws)])
        case "unknown-task":
            write_tar(path, [*map(members, raws[:3]), members(raws[3], task="?"), *map(members, raws[4:])])
        case "other-task":  # one bit makes another task of it: rec and res, vqa and vqe
            place = data.index(b'"task":"' + raws[3].task.encode()) + 8
            path.write_bytes(flipped(data, place + 2))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_loses_its_samples_aloud(light, shards, tmp_path, how):
    """Shards after the index was written: what is promised and not there is a counted reject, nothing else is lost."""
    paths = [shutil.copy(path, tmp_path) for path in shards[:3]]
    mixture = Mixture(
        [Shard(p, ".", Counter(r.task for r in read_raw(p)), Path(p).stat().st_size) for p in paths],
        {(".", task): 1.0 for task in TASKS},
    )
    damage(Path(paths[1]), how)
    light(shards)  # no images from here on
    real = module.decode_sample
    module.decode_sample = lambda raw, size, pixels: decode_sample(raw) if raw.fault else real(raw, size, pixels)

    def build(sample, rng):
        if sample.task not in TASKS:
            raise SampleReject("unknown-task", sample.id)
        return SimpleNamespace(id=sample.id, input_ids=[0])

    rejects, counts = RejectLog(tmp_path / "rejects.jsonl", 1.0), DAMAGE[how]
    builder = SimpleNamespace(build=build, vocabulary=None, image_size=48, frames=8)
    stream = stream_of(mixture, builder, batch_size=51, buffer=9, rejects=rejects, collate=ids_of)
    batch = next(iter(stream))
    assert len(batch) == len(set(batch)) == 51 - counts[1]
    assert rejects.counts == counts[0]
    lines = [json.loads(line) for line in rejects.path.read_text().splitlines()]
    assert all(line["shard"] == paths[1] and line["error"] for line in lines)


def test_evaluation_is_finite_and_in_file_order(builder, mini_root, samples):
    shards, rejects = split_shards(mini_root, "test"), RejectLog(None, 1.0)
    rows = list(evaluation_sequences(shards, builder, "rec", rejects))
    assert [row.sample.id for row in rows] == [sample.id for sample in samples["rec"]]
    assert len(list(evaluation_sequences(shards, builder, "rec", rejects, limit=1))) == 1
    assert rows[0].prompt == builder.build(samples["rec"][0]).prompt
    assert len(split_shards(mini_root, "test", "rec")) <= len(shards)
    assert split_shards(mini_root, "test", "flickr") == []
