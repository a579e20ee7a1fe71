"""RefCOCO family: pickles of Python 2, several parts, crowds, no targets; a split is built in one pass."""

import json
import os
import pickle
import pickletools
import shutil

import pytest
from pycocotools import mask as coco

from vistallm.coinit.sources import SOURCES
from vistallm.coinit.sources.base import SourceOptions
from vistallm.regions.masks import rle_to_mask

IMAGE = "COCO_train2014_000000000009.jpg"
CROWD = {"size": [48, 64], "counts": [48 * 32, 48 * 2, 48 * 30]}  # columns 32 and 33
ANNOTATIONS = [
    {"id": 71, "image_id": 9, "category_id": 1, "bbox": [10, 5, 20, 10], "iscrowd": 0, "area": 1.0}
    | {"segmentation": [[10, 5, 30, 5, 30, 15, 10, 15]]},
    {"id": 72, "image_id": 9, "category_id": 1, "bbox": [40, 20, 30, 20], "iscrowd": 0, "area": 1.0}  # over the edge
    | {"segmentation": [[40, 20, 50, 20, 50, 30, 40, 30], [60, 20, 70, 20, 70, 40, 60, 40], [1, 1, 2, 2]]},
    {
        "id": 73,
        "image_id": 9,
        "category_id": 2,
        "bbox": [32, 0, 2, 48],
        "iscrowd": 1,
        "area": 1.0,
        "segmentation": CROWD,
    },
    {"id": 74, "image_id": 9, "category_id": 2, "bbox": [3, 3, 4, 4], "segmentation": [[0, 0, 1, 0]]},  # two points
]
INSTANCES = {
    "images": [{"id": i, "file_name": IMAGE.replace("09.", f"{i:02d}."), "height": 48, "width": 64} for i in (9, 10)],
    "annotations": ANNOTATIONS,
    "categories": [{"id": 1, "name": "person"}],
}


def a_ref(ref_id, split, ann_id, *sentences):
    named = [
        {"tokens": s.split(), "raw": s.upper(), "sent_id": 10 * ref_id + i, "sent": s} for i, s in enumerate(sentences)
    ]
    file = f"COCO_train2014_000000000009_{ann_id}.jpg"  # with the annotation's id, as in the real file
    record = {"sent_ids": [s["sent_id"] for s in named], "file_name": file, "ann_id": ann_id, "ref_id": ref_id}
    return record | {"image_id": 9, "split": split, "sentences": named, "category_id": 1}


REFS = [
    a_ref(0, "train", 71, "the lady", "caf\u00e9 lady"),
    a_ref(1, "val", 72, "man on the right", "right man"),
    a_ref(2, "train", 74, "a dot"),
]


def python2_pickle(value):
    """Protocol 0 as Python 2 writes it: a text is a byte string ('S'), here with the bytes of UTF-8."""
    match value:
        case dict():
            return b"(d" + b"".join(python2_pickle(k) + python2_pickle(v) + b"s" for k, v in value.items())
        case list():
            return b"(l" + b"".join(python2_pickle(v) + b"a" for v in value)
        case str():
            return b"S" + repr(value.encode())[1:].encode() + b"\n"
        case int():
            return b"I%d\n" % value
    raise TypeError(value)


def write_refcoco(root, picture, folder="refcoco", split_by="unc", refs=REFS):
    picture(root / "train2014" / IMAGE)
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / f"refs({split_by}).p").write_bytes(python2_pickle(refs) + b".")
    (root / folder / "instances.json").write_text(json.dumps(INSTANCES))


GREFS = [
    {"ref_id": 1, "ann_id": [72, 71, 73], "category_id": [1, 1, 2], "image_id": 9, "split": "val", "file_name": IMAGE}
    | {"sentences": [{"sent_id": 4, "sent": "two people and the crowd", "tokens": [], "raw": "", "exist": True}]},
    {"ref_id": 2, "ann_id": [-1], "category_id": [-1], "image_id": 9, "split": "val"}
    | {"sentences": [{"sent": "the elephant", "exist": False}], "no_target": True},
    {"ref_id": 3, "ann_id": -1, "category_id": -1, "image_id": 10, "split": "train", "sentences": [{"sent": "a cow"}]},
]


def write_grefcoco(root, picture):
    for image in INSTANCES["images"]:
        picture(root / image["file_name"])
    (root / "grefs(unc).json").write_text(json.dumps(GREFS))
    (root / "instances.json").write_text(json.dumps(INSTANCES))


MADE = [
    ("refcoco", "train", write_refcoco),
    ("refcoco+", "train", lambda root, picture: write_refcoco(root, picture, "refcoco+")),
    ("refcocog", "train", lambda root, picture: write_refcoco(root, picture, "refcocog", "umd")),
    ("grefcoco", "val", write_grefcoco),
]


def test_training_samples(build, rejects):
    found = build("refcoco", "train", write_refcoco)
    assert list(sorted(found)) == sorted(
        [f"refcoco-train-0-{i}-{task}" for i in (0, 1) for task in ("rec", "res", "reg")]
        + ["refcoco-train-2-0-rec", "refcoco-train-2-0-reg"]
    )
    rec, res, reg = (found[f"refcoco-train-0-1-{task}"].to_json() for task in ("rec", "res", "reg"))
    meta = {"image_ids": ["coco:9"], "ref_id": 0, "sent_id": 1}
    box = {"image": 0, "kind": "box", "object": 0, "box": [10.0, 5.0, 30.0, 15.0]}
    assert rec == {"version": 1, "id": "refcoco-train-0-1-rec", "task": "rec", "source": "refcoco"} | {
        "images": [{"file": "train-000000-00000.0.jpg", "width": 64, "height": 48}],  # brought by an earlier sample
        "instruction": None,
        "fields": {"expr": "café lady"},
        "answer": None,
        "regions": [box],
        "meta": meta,
    }
    assert (reg["task"], reg["regions"], reg["fields"]) == ("reg", [box], {"expr": "café lady"})
    assert (res["task"], res["meta"]) == ("res", meta)
    mask = rle_to_mask(found["refcoco-train-0-1-res"].regions[0].rle)
    assert mask.sum() == 20 * 10
    assert mask[5:15, 10:30].all()
    reasons = sorted(reason for reason, _ in rejects("refcoco"))
    assert reasons == ["empty-mask", "short-polygon"]


def test_evaluation_has_all_expressions_of_an_object_at_once(build):
    found = build("refcoco", "val", write_refcoco)
    assert set(found) == {f"refcoco-val-1-{i}-{task}" for i in (0, 1) for task in ("rec", "res")} | {
        "refcoco-val-1-reg"
    }
    assert found["refcoco-val-1-1-rec"].regions[0].box == (40, 20, 64, 40)
    reg = found["refcoco-val-1-reg"]
    assert reg.fields == {"expr": "man on the right", "answers": ["man on the right", "right man"]}
    assert reg.meta == {"image_ids": ["coco:9"], "ref_id": 1}
    mask = rle_to_mask(found["refcoco-val-1-0-res"].regions[0].rle)
    assert mask.sum() == 10 * 10 + 4 * 20  # both parts, cut at the image's edge


def test_refcocog_s_tokens_are_joined(build):
    def tokens(root, picture):
        write_refcoco(root, picture, "refcocog", "umd", [a_ref(0, "train", 71, "a person ' s candle - holder")])

    samples = build("refcocog", "train", tokens)
    assert {sample.fields["expr"] for sample in samples.values()} == {"a person's candle-holder"}


def test_grefcoco_has_none_one_or_several_objects(build):
    found = build("grefcoco", "val", write_grefcoco)
    assert set(found) == {f"grefcoco-val-{r}-0-{task}" for r in (1, 2) for task in ("grec", "gres")}
    boxes, masks = found["grefcoco-val-1-0-grec"], found["grefcoco-val-1-0-gres"]
    assert boxes.fields == {"expr": "two people and the crowd", "targets": [0, 1, 2]}
    assert boxes.meta == {"image_ids": ["coco:9"], "ref_id": 1, "sent_id": 4}
    assert [tuple(r.box) for r in boxes.regions] == [(10, 5, 30, 15), (32, 0, 34, 48), (40, 20, 64, 40)]
    assert [int(coco.area(r.rle)) for r in masks.regions] == [200, 96, 180]  # left to right
    assert [r.object for r in masks.regions] == [0, 1, 2]
    empty = found["grefcoco-val-2-0-gres"]
    assert (empty.fields, empty.regions) == ({"expr": "the elephant", "targets": []}, [])
    (only,) = build("grefcoco", "train", write_grefcoco, "--set", "tasks=grec").values()
    assert (only.id, only.fields["targets"]) == ("grefcoco-train-3-0-grec", [])


def test_other_partitions_and_other_refusals(build, refusal):
    def google(root, picture):
        write_refcoco(root, picture, "refcocog", "google")

    def google_refcoco(root, picture):  # its split has a test part, those by unc have testA and testB
        write_refcoco(root, picture, "refcoco", "google", [a_ref(1, "test", 72, "man")])

    words = ("--set", "split_by=google", "--set", "tasks=rec")
    assert list(build("refcoco", "test", google_refcoco, *words)) == ["refcoco-test-1-0-rec"]
    shutil.rmtree(build.root)
    assert build("refcocog", "val", google, "--set", "split_by=google", "--set", "tasks=rec")
    assert "refs(umd).p" in refusal("refcocog", "val", google)
    assert "splits are ['train', 'val']" in refusal("refcocog", "test", google, "--set", "split_by=google")
    assert "expected one of unc, umd, google" in refusal("refcoco", "val", google, "--set", "split_by=me")
    assert "this source knows split_by, tasks" in refusal("refcoco", "val", google, "--set", "by=me")
    assert "expected one of train, val, testA, testB" in refusal("refcoco", "test", google)
    assert "expected one of train, val, test, got" in refusal("refcoco", "testA", google, "--set", "split_by=google")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda refs: refs[1].pop("ann_id"), "record 1: expected key 'ann_id'"),
        (lambda refs: refs[1].update(ann_id="72"), "record 1: expected 'ann_id' to be int, got '72'"),
        (lambda refs: refs[1].update(image_id=8), "record 1: expected id 8 among images of"),
        (lambda refs: refs[1].update(ann_id=8), "record 1: expected id 8 among annotations of"),
        (lambda refs: refs[1].update(image_id=10), "annotation 72: expected image 10 of"),
        (lambda refs: refs[1]["sentences"][1].pop("sent"), "record 1, sentence 1: expected key 'sent'"),
        (lambda refs: refs[1]["sentences"].insert(0, "x"), "record 1, sentence 0: expected key 'sent', got str"),
        (lambda refs: refs[1]["sentences"][1].update(sent_id="x"), "sentence 1: expected 'sent_id' to be int, got 'x'"),
    ],
)
def test_a_changed_format_stops_with_file_record_and_key(refusal, change, message):
    refs = json.loads(json.dumps(REFS))
    change(refs)
    said = refusal("refcoco", "val", lambda root, picture: write_refcoco(root, picture, refs=refs))
    assert message in said
    assert "refs(unc).p" in said or "instances.json" in said


class Harm:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, refusal):
    def write(root, picture):
        write_refcoco(root, picture)
        (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([Harm(tmp_path / "made")], protocol=2))

    assert f"it holds {os.mkdir.__module__}.mkdir" in refusal("refcoco", "val", write)
    assert not (tmp_path / "made").exists()


def test_the_made_pickle_is_of_python_2():
    codes = {code.name for code, _, _ in pickletools.genops(python2_pickle(REFS[1:]) + b".")}
    assert "STRING" in codes
    assert not codes & {"UNICODE", "BINUNICODE", "PROTO"}


def test_a_unit_is_a_pure_function_of_its_number(tmp_path, picture):
    write_refcoco(tmp_path, picture)
    source = SOURCES["refcoco"](SourceOptions(tmp_path, "train"))
    first, again = ([d.sample.to_json() for d in source.unit(0)] for _ in range(2))
    assert first == again
    assert len(source) == 2
