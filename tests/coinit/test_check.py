"""The check sees every kind of damage to a folder and every kind of fault in a sample, and leaks between folders."""

import json
from collections import Counter

import numpy as np
import pytest

from vistallm.coinit.build import read_ids
from vistallm.coinit.check import FIRST, broken_text, check, evaluation_images, sample_faults
from vistallm.coinit.shards import read_index, write_index, write_shard
from vistallm.mini.build import MiniRecipe, build_mini, make_sample
from vistallm.mini.link_tasks import LINK_MAKERS
from vistallm.regions.codec import RegionCodec
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import Region


@pytest.fixture
def pair():
    return make_sample(MiniRecipe(), "val", "gres", 7)


def write(root, split, pairs):
    """One shard of a split and the index of the folder."""
    root.mkdir(exist_ok=True)
    rows = read_index(root)["shards"] if (root / "index.json").exists() else {}
    name, row = write_shard(root, split, 0, pairs)
    write_index(root, {**rows, name: row})


def test_mini_set_is_sound_and_counted(tmp_path):
    build_mini(tmp_path, workers=1, links=False, train=60, val=15, test=30, samples_per_shard=20)
    report = check([tmp_path], workers=1)
    assert not report.totals
    assert not report.faults
    assert report.counts[str(tmp_path), "val"].total() == 15
    assert report.counts[str(tmp_path), "test"].total() == 30


def damage_hash(root):
    path = root / "val-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))


def damage_missing(root):
    (root / "val-000000.tar").unlink()


def damage_cut(root):
    path = root / "val-000000.tar"
    path.write_bytes(path.read_bytes()[:2000])


def damage_garbage(root):
    (root / "val-000000.tar").write_bytes(b"no tar at all " * 1000)


def damage_types(root):
    sample, images = make_sample(MiniRecipe(), "val", "gres", 7)
    sample.fields["targets"], sample.meta["image_ids"] = 5, 7
    write(root, "val", [(sample, images)])


def damage_stray(root):
    (root / "other-000000.tar").write_bytes(b"")


def damage_duplicate(root):
    write(root, "val", [make_sample(MiniRecipe(), "val", "res", 1)] * 3)


def damage_duplicate_across(root):
    write(root, "test", [make_sample(MiniRecipe(), "val", "gres", 7)])


def damage_count(root):
    index = read_index(root)
    index["shards"]["val-000000.tar"]["samples"] = 9
    (root / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "kind", "number", "message"),
    [
        (damage_hash, "bytes", 1, "bytes differ"),
        (damage_missing, "missing-shard", 1, "no such file"),
        (damage_cut, "record", 1, "val-000000"),
        (damage_garbage, "record", 1, "not checked"),
        (damage_types, "record", 1, "TypeError"),
        (damage_stray, "unlisted-shard", 1, "not in index.json"),
        (damage_duplicate, "duplicate-id", 2, "the same id"),
        (damage_duplicate_across, "duplicate-id", 1, "val-000000.tar"),
        (damage_count, "count", 1, "the index says"),
    ],
)
def test_verify_sees_damaged_folders(tmp_path, pair, damage, kind, number, message):
    write(tmp_path, "val", [pair])
    assert not check([tmp_path]).totals
    damage(tmp_path)
    report = check([tmp_path], workers=1)
    assert report.totals[kind] == number
    assert any(message in text for text in report.faults[kind])


def test_two_processes_report_the_same_and_keep_the_first(tmp_path):
    for split in ("val", "test"):
        pairs = [make_sample(MiniRecipe(), split, "rec", serial) for serial in range(FIRST + 2)]
        for sample, _ in pairs:
            sample.fields["expr"] = "the cafÃ© table"
            sample.instruction = "Where is the cafÃ© table?"
        write(tmp_path, split, pairs)
    one, two = check([tmp_path], workers=1), check([tmp_path], workers=2)
    assert (one.totals, one.faults) == (two.totals, two.faults)
    assert one.totals == Counter(mojibake=2 * (FIRST + 2))
    assert len(one.faults["mojibake"]) == FIRST


def with_image(split, name, serial=0):
    sample, images = make_sample(MiniRecipe(), split, "rec", serial)
    sample.meta["image_ids"] = [name]
    return sample, images


def test_leaks_are_seen_across_folders(tmp_path):
    write(tmp_path / "a", "train", [with_image("train", "vg:1|coco:5"), with_image("train", "vg:2", 1)])
    write(tmp_path / "b", "testA", [with_image("test", "coco:5")])
    assert not check([tmp_path / "a"]).totals
    report = check([tmp_path / "a", tmp_path / "b"], workers=1)
    assert report.totals == Counter(leak=1)
    assert "coco:5" in report.faults["leak"][0]
    assert "testA-000000.tar" in report.faults["leak"][0]
    assert check([tmp_path / "a"], frozenset({"vg:2", "coco:5"})).totals["leak"] == 2
    assert evaluation_images([tmp_path / "a", tmp_path / "b"]) == {"coco:5"}


def test_the_same_file_under_another_id_is_noted(tmp_path):
    sample, images = make_sample(MiniRecipe(), "train", "rec", 3)
    write(tmp_path, "train", [(sample, images), make_sample(MiniRecipe(), "train", "rec", 4)])
    other, _ = make_sample(MiniRecipe(), "train", "rec", 3)
    other.id, other.meta["image_ids"] = "other", ["coco:1"]
    write(tmp_path, "val", [(other, images)])
    report = check([tmp_path], workers=2)
    assert not report.totals
    assert ["1 image file(s)" in report.notes[0], "2 training sample(s)" in report.notes[1]] == [True, True]


def test_id_files(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("coco:5\nvg:1|coco:7\n")
    assert read_ids(path) == {"coco:5", "vg:1", "coco:7"}
    path.write_text("")
    with pytest.raises(ValueError, match="empty file"):
        read_ids(path)


def change_box(sample, files):
    sample.regions[0] = Region(0, "box", 0, box=(0, 0, 500, 5))


def change_to_shares(sample, files):
    sample.regions[0] = Region(0, "box", 0, box=(0.1, 0.2, 0.5, 0.6))


def change_rle(sample, files):
    sample.regions[0].rle = {"size": [3, 3], "counts": "09"}


def change_empty_rle(sample, files):
    sample.regions[0].rle = mask_to_rle(np.zeros((sample.images[0].height, sample.images[0].width), bool))


def change_point(sample, files):
    sample.regions[0] = Region(0, "point", 0, point=(-1.0, 5.0))


def change_task(sample, files):
    sample.task = "rez"


def change_size(sample, files):
    sample.images[0].width += 1
    sample.regions = []


def change_bytes(sample, files):
    files[0] = b"no image"


def change_targets(sample, files):
    sample.fields["targets"] = [0, 7]


def change_kind(sample, files):
    sample.answer = "It is at {regions:0:point}."


def change_fields(sample, files):
    sample.fields.pop("expr")


def change_text(sample, files):
    sample.answer = " "


def change_slot(sample, files):
    sample.answer = "The mask is {regions:zero}."


def change_round(sample, files):
    sample.fields["rounds"] = [["Where is it?", "{regions:9}"]]


def change_letters(sample, files):
    sample.answer = "It\x92s {regions:0}."


def change_ids(sample, files):
    sample.meta["image_ids"] = ["coco:1", "coco:2"]


def change_marker(sample, files):
    sample.answer = "The mask is <m_st> {regions:0}."


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (change_box, "region", "is not inside"),
        (change_to_shares, "region", "not shares of the image's sides"),
        (change_rle, "region", "expected size"),
        (change_empty_rle, "region", "holds no pixel"),
        (change_point, "region", "is not inside"),
        (change_task, "task", "unknown task"),
        (change_size, "image-size", "its record says"),
        (change_bytes, "image", "do not decode"),
        (change_targets, "placeholder", "names object 7"),
        (change_kind, "placeholder", "names object 0 as point"),
        (change_fields, "text", "needs field 'expr'"),
        (change_text, "empty-text", "answer is empty"),
        (change_slot, "placeholder", "expected {regions:0,2}"),
        (change_round, "placeholder", "the earlier answer has a wrong placeholder: a placeholder names object 9"),
        (change_letters, "mojibake", "read the source's texts as UTF-8"),
        (change_ids, "image-ids", "expected a list of 1 image ids"),
        (change_marker, "parse-back", "the answer"),
    ],
)
def test_checker_sees_each_fault(pair, change, kind, message):
    sample, files = pair[0], [data for data, _ in pair[1]]
    codec = RegionCodec(mask_sampler="uniform")
    assert list(sample_faults(sample, files, codec)) == []
    change(sample, files)
    assert any(k == kind and message in text for k, text in sample_faults(sample, files, codec))


@pytest.mark.parametrize("task", LINK_MAKERS)
def test_samples_of_links_are_sound(task):
    for serial in range(12):
        sample, files = make_sample(MiniRecipe(), "val", task, serial)
        assert list(sample_faults(sample, [data for data, _ in files], RegionCodec(mask_sampler="uniform"))) == []


@pytest.mark.parametrize(
    ("keypoints", "text", "message"),
    [
        (((5.0, 500.0, 2), (1.0, 1.0, 1)), None, "keypoint (5.0, 500.0) is not inside"),
        (((-1.0, -1.0, 0), (1.0, 1.0, 1)), "square {regions:0}, top {point:2}", "point 2 of object 0: it has 2"),
        (((1.0, 1.0, 2),), "square {regions:7}, top {point:0}", "names object 7"),
    ],
)
def test_faults_of_keypoints_are_seen(keypoints, text, message):
    sample, files = make_sample(MiniRecipe(), "val", "pose", 1)
    sample.answer, sample.regions[0].keypoints = text, keypoints
    faults = sample_faults(sample, [data for data, _ in files], RegionCodec())
    assert any(message in text for _, text in faults)


def test_a_region_prompt_needs_a_mask():
    sample, files = make_sample(MiniRecipe(), "val", "rec", 1)
    sample.instruction = "Box {region:0:circle}."
    ((kind, text),) = sample_faults(sample, [data for data, _ in files], RegionCodec())
    assert (kind, "region prompt circle of object 0: expected a mask" in text) == ("placeholder", True)


def test_a_character_that_was_lost_before_is_a_warning(tmp_path):
    """As in a public copy of VQA that holds "rainforest caf\ufffd": one warning each, and a sound set."""
    sample, images = make_sample(MiniRecipe(), "val", "vqa", 1)
    sample.fields["answer"] = "rainforest caf\ufffd"
    write(tmp_path, "val", [(sample, images)])
    report = check([tmp_path], workers=1)
    assert not report.totals
    assert report.warnings == {"lost-character": 1}
    assert sample.id in report.faults["lost-character"][0]


def test_a_sample_without_labels_needs_no_answer(pair):
    sample, files = pair[0], [data for data, _ in pair[1]]
    sample.task, sample.fields, sample.meta["unlabelled"] = "vqa", {"question": "What is it?"}, True
    assert list(sample_faults(sample, files, RegionCodec())) == []
    sample.meta["unlabelled"] = False
    assert [kind for kind, _ in sample_faults(sample, files, RegionCodec())] == ["text"]


def test_ids_that_come_again_are_named_by_their_places(tmp_path):
    pairs = [make_sample(MiniRecipe(), "val", "res", serial) for serial in (1, 2, 3, 2)]
    write(tmp_path, "test", pairs[:2])
    write(tmp_path, "val", pairs[2:])
    assert check([tmp_path], workers=2).faults == {
        "duplicate-id": [
            f"{tmp_path}/val-000000.tar, sample 1: the same id is that of {tmp_path}/test-000000.tar, sample 1"
        ]
    }


@pytest.mark.parametrize("text", ["cafÃ©", "itâ€™s", "\ufffd", "na\x85me", "Ã¼ber"])
def test_broken_texts_are_found(text):
    assert broken_text(f"a {text} b")


@pytest.mark.parametrize("text", ["café", "it’s", "naïve façade", "Ärger – “quoted” …", "日本語", "£5 ½", "a\nb\tc"])
def test_sound_texts_are_left_alone(text):
    assert broken_text(text) is None
