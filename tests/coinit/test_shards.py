"""Shards: bytes, index, reading back, and that the check sees every kind of damage."""

import json
import tarfile

import numpy as np
import pytest

from vistallm.coinit.mini import MiniRecipe, build_mini, make_sample
from vistallm.coinit.shards import ShardWriter, read_index, read_shard, write_index, write_shard
from vistallm.coinit.verify import check_sample, verify
from vistallm.schema import Region


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini")
    build_mini(root, workers=1, train=60, val=15, test=30, samples_per_shard=20)
    return root


@pytest.fixture
def pair():
    return make_sample(MiniRecipe(), "val", "gres", 7)


def test_round_trip(tmp_path, pair):
    write_shard(tmp_path, "val", 3, [pair])
    ((sample, files),) = read_shard(tmp_path / "val-000003.tar")
    assert sample.to_json() == pair[0].to_json()
    assert files == [data for data, _ in pair[1]]
    with tarfile.open(tmp_path / "val-000003.tar") as tar:
        members = tar.getmembers()
    assert members[0].name == "val-000003-00000.json"
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert [p.name for p in tmp_path.iterdir()] == ["val-000003.tar"]


def test_writer_cuts_shards_and_keeps_other_splits(tmp_path):
    for split in ("train", "val"):
        with ShardWriter(tmp_path, split, max_samples=2) as writer:
            for serial in range(5):
                writer.write(*make_sample(MiniRecipe(), split, "nlvr2", serial))
    index = read_index(tmp_path)
    assert [row["samples"] for row in index["shards"].values()] == [2, 2, 1] * 2
    assert index["tasks"] == {"train": {"nlvr2": 5}, "val": {"nlvr2": 5}}
    assert verify(tmp_path).faults == []


def test_failed_writer_leaves_no_index(tmp_path):
    def fail():
        with ShardWriter(tmp_path, "train") as writer:
            writer.write(*make_sample(MiniRecipe(), "train", "res", 0))
            raise KeyError("source broke")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_mini_set_is_sound_and_counted(mini):
    report = verify(mini)
    assert report.faults == []
    assert report.counts["val"].total() == 15
    assert report.counts["test"].total() == 30
    assert {task for counts in report.counts.values() for task in counts} == set(report.counts["train"])


def damage_hash(root):
    path = root / "val-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))


def damage_missing(root):
    (root / "val-000000.tar").unlink()


def damage_stray(root):
    (root / "other-000000.tar").write_bytes(b"")


def damage_duplicate(root):
    samples = [make_sample(MiniRecipe(), "val", "res", 1)] * 2
    name, row = write_shard(root, "val", 0, samples)
    write_index(root, {name: row})


def damage_count(root):
    index = read_index(root)
    index["shards"]["val-000000.tar"]["samples"] = 9
    (root / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_hash, "bytes differ"),
        (damage_missing, "no such file"),
        (damage_stray, "not in index.json"),
        (damage_duplicate, "the same id"),
        (damage_count, "the index says"),
    ],
)
def test_verify_sees_damaged_folders(tmp_path, pair, damage, message):
    with ShardWriter(tmp_path, "val") as writer:
        writer.write(*pair)
    damage(tmp_path)
    assert any(message in fault for fault in verify(tmp_path).faults)


def change_box(sample, files):
    sample.regions[0] = Region(0, "box", 0, box=(0, 0, 500, 5))


def change_rle(sample, files):
    sample.regions[0].rle = {"size": [3, 3], "counts": "09"}


def change_empty_rle(sample, files):
    height, width = sample.images[0].height, sample.images[0].width
    from vistallm.regions.masks import mask_to_rle

    sample.regions[0].rle = mask_to_rle(np.zeros((height, width), bool))


def change_point(sample, files):
    sample.regions[0] = Region(0, "point", 0, point=(-1.0, 5.0))


def change_task(sample, files):
    sample.task = "rez"


def change_size(sample, files):
    sample.images[0].width += 1


def change_bytes(sample, files):
    files[0] = b"no image"


def change_targets(sample, files):
    sample.fields["targets"] = [0, 7]


def change_fields(sample, files):
    sample.fields.pop("expr")


def change_text(sample, files):
    sample.answer = " "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_box, "is not inside"),
        (change_rle, "expected size"),
        (change_empty_rle, "holds no pixel"),
        (change_point, "is not inside"),
        (change_task, "unknown task"),
        (change_size, "its record says"),
        (change_bytes, "does not decode"),
        (change_targets, "names object 7"),
        (change_fields, "needs field 'expr'"),
        (change_text, "answer of round 1 is empty"),
    ],
)
def test_check_sample_sees_each_fault(pair, change, message):
    sample, files = pair[0], [data for data, _ in pair[1]]
    assert list(check_sample(sample, files)) == []
    change(sample, files)
    assert any(message in fault for fault in check_sample(sample, files))


def test_read_index_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="build it with"):
        read_index(tmp_path)
    for text in ("{", '{"version": 1}', '{"version": 9, "shards": {}}', '{"version": 1, "shards": {}}', "[]"):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="again"):
            read_index(tmp_path)
