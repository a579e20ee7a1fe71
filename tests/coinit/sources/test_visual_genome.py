"""Visual Genome regions: boxes over the edge, phrases used twice, portions; its JSON list is read record by record."""

import json
import shutil

import pytest

from vistallm.coinit.sources import records
from vistallm.coinit.sources.base import SourceFormatError, SourceOptions
from vistallm.coinit.sources.genome import load_visual_genome
from vistallm.coinit.sources.records import stream_records

IMAGE_DATA = [
    {"image_id": 1, "url": "https://host/VG_100K_2/1.jpg", "width": 64, "height": 48, "coco_id": None},
    {"image_id": 2, "url": "https://host/VG_100K/2.jpg", "width": 64, "height": 48, "coco_id": 9, "flickr_id": 3},
]


def region(region_id, phrase, x, y, width, height, image_id=1):
    box = {"x": x, "y": y, "width": width, "height": height}
    return {"region_id": region_id, "image_id": image_id, "phrase": phrase, **box}


REGIONS = [
    {
        "id": 1,
        "regions": [
            region(1382, "the clock is  green\n", 42, 5, 30, 13),
            region(1383, "Man", 0, 0, 9, 9),
            region(1384, "man", 20, 20, 9, 9),
            region(1385, "outside", 70, 5, 10, 10),
            region(1386, "  ", 1, 1, 5, 5),
        ],
    },
    {"id": 2, "regions": [region(9, "a dog", -3, 2, 13, 6, 2)]},
]


def write(root, picture):
    picture(root / "VG_100K_2" / "1.jpg")
    picture(root / "images" / "VG_100K" / "2.jpg")
    (root / "image_data.json").write_text(json.dumps(IMAGE_DATA))
    (root / "region_descriptions.json").write_text(json.dumps(REGIONS))


MADE = [("visual-genome", "train", write)]


def test_regions_become_captions_and_expressions(build, rejects):
    samples = build("visual-genome", "train", write)
    assert sorted(samples) == [
        "visual-genome-train-1-1382-rec",
        "visual-genome-train-1-1382-reg",
        "visual-genome-train-1-1383-reg",
        "visual-genome-train-1-1384-reg",
        "visual-genome-train-2-9-rec",
        "visual-genome-train-2-9-reg",
    ]
    clock = samples["visual-genome-train-1-1382-rec"]
    assert (clock.task, clock.fields, clock.meta) == ("rec", {"expr": "the clock is green"}, {"image_ids": ["vg:1"]})
    assert clock.regions[0].box == (42, 5, 64, 18)  # x + width = 72 is cut to the image
    dog = samples["visual-genome-train-2-9-reg"]
    assert (dog.task, dog.regions[0].box, dog.meta["image_ids"]) == ("reg", (0, 2, 10, 8), ["vg:2|coco:9"])
    assert sorted(reason for reason, _ in rejects("visual-genome")) == [
        "ambiguous-phrase",
        "ambiguous-phrase",
        "empty-box",
        "empty-phrase",
    ]


def test_both_zips_unpacked_side_by_side(build, rejects):
    def write_zips(root, picture):
        write(root, picture)
        for name in ("images", "images2"):
            (root / "zips" / name).mkdir(parents=True)
        (root / "VG_100K_2").rename(root / "zips" / "images2" / "VG_100K_2")
        (root / "images" / "VG_100K").rename(root / "zips" / "images" / "VG_100K")

    for folder in ("zips", "zips/images"):
        samples = build("visual-genome", "train", write_zips, "--images", "{root}/" + folder)
        assert {sample.meta["image_ids"][0] for sample in samples.values()} == {"vg:1", "vg:2|coco:9"}
        assert "missing-image" not in [reason for reason, _ in rejects("visual-genome")]
        shutil.rmtree(build.out)


def test_version_1_0_is_named(refusal):
    def write_old(root, picture):
        write(root, picture)
        (root / "image_data.json").write_text(json.dumps([{"id": 1, "url": "https://host/VG_100K_2/1.jpg"}]))

    assert "as in Visual Genome 1.0; fetch version 1.2" in refusal("visual-genome", "train", write_old)


def test_portion_is_drawn_per_task_by_the_seed(tmp_path, picture):
    many = [{"id": 1, "regions": [region(i, f"thing {i}", 1, 1, 5, 5) for i in range(1000)]}]
    write(tmp_path, picture)
    (tmp_path / "region_descriptions.json").write_text(json.dumps(many))

    def ids(seed):
        settings = {"portion": "0.05"}
        source = load_visual_genome(SourceOptions(tmp_path, "train", None, seed, settings))
        return [draft.sample.id for draft in source.unit(0)]

    first = ids(0)
    assert 60 < len(first) < 140  # 2 tasks of 50
    assert {name[-3:] for name in first} == {"rec", "reg"}
    assert first == ids(0) != ids(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "portion=2"], "expected a share above 0"),
        (["--set", "tasks=res"], "expected some of reg,rec"),
        (["--set", "image_data=none.json"], "none.json"),
    ],
)
def test_settings_are_checked(refusal, words, message):
    assert message in refusal("visual-genome", "train", write, *words)


def test_a_record_that_differs_stops_the_build(refusal):
    def write_wrong(root, picture):
        write(root, picture)
        wrong = [REGIONS[0], {"id": 2, "regions": [{**region(9, "a dog", 1, 2, 3, 4), "x": "1"}]}]
        (root / "region_descriptions.json").write_text(json.dumps(wrong))

    message = refusal("visual-genome", "train", write_wrong)
    assert "region_descriptions.json, record 1, region 0: expected 'x' to be int, got '1'" in message


def test_a_list_is_read_record_by_record(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CHUNK", 7)  # smaller than a record: it is read on until the record is whole
    path = tmp_path / "a.json"
    path.write_text(' [\n{"a": "é]"} ,{"a": [1, {"b": "\\"}"}]}\n, {} ]\n'.lstrip())
    assert [record.data for record in stream_records(path)] == [{"a": "é]"}, {"a": [1, {"b": '"}'}]}, {}]
    path.write_text('[{"a": 1}, {"a": ')
    with pytest.raises(SourceFormatError, match="record 1: not JSON"):
        list(stream_records(path))
    path.write_text('{"a": 1}')
    with pytest.raises(SourceFormatError, match="expected a JSON list"):
        list(stream_records(path))
