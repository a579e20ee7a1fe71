"""COCO captions: both kinds of annotation files, restval as training images, references together for evaluation."""

import json

import pytest

KARPATHY = {
    "dataset": "coco",
    "images": [
        {"cocoid": 391895, "filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "split": "test"}
        | {"sentids": [0, 1], "sentences": [{"raw": "A man with a\n red helmet"}, {"raw": "A man on a bike."}]},
        {"cocoid": 9, "filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "split": "train"}
        | {"sentids": [2, 3], "sentences": [{"raw": "Boxes of food."}, {"raw": " "}]},
        {"cocoid": 42, "filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "split": "restval"}
        | {"sentids": [4], "sentences": [{"raw": "A wicker basket."}]},
        {"cocoid": 73, "filepath": "val2014", "filename": "COCO_val2014_000000000073.jpg", "split": "val"}
        | {"sentids": [5], "sentences": [{"raw": "Two motorcycles."}]},
    ],
}


def write_karpathy(root, picture, data=KARPATHY):
    for image in KARPATHY["images"]:
        picture(root / image["filepath"] / image["filename"])
    (root / "dataset_coco.json").write_text(json.dumps(data))


def write_official(root, picture):
    picture(root / "val2014" / "COCO_val2014_000000391895.jpg", 40, 30)
    data = {
        "images": [{"id": 391895, "file_name": "COCO_val2014_000000391895.jpg", "width": 40, "height": 30}],
        "annotations": [
            {"image_id": 391895, "id": 770337, "caption": "A man with a red helmet"},
            {"image_id": 391895, "id": 770338, "caption": "A man on a bike."},
        ],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "captions_val2014.json").write_text(json.dumps(data))


MADE = [("coco-caption", "train", write_karpathy)]


def test_training_has_one_sample_per_caption(build, rejects):
    found = build("coco-caption", "train", write_karpathy)
    assert {key: sample.fields for key, sample in found.items()} == {
        "coco-caption-train-9-0": {"caption": "Boxes of food."},
        "coco-caption-train-42-0": {"caption": "A wicker basket."},
    }
    assert found["coco-caption-train-42-0"].meta == {"image_ids": ["coco:42"]}
    assert [(reason, "image 9" in where) for reason, where in rejects("coco-caption")] == [("empty-text", True)]


@pytest.mark.parametrize(
    ("split", "write", "words", "size"),
    [
        ("test", write_karpathy, (), (64, 48)),
        ("val", write_official, ("--set", "annotations=official"), (40, 30)),
    ],
)
def test_evaluation_has_all_captions_of_an_image(build, split, write, words, size):
    (sample,) = build("coco-caption", split, write, *words).values()
    assert (sample.id, sample.task) == (f"coco-caption-{split}-391895-0", "caption")
    captions = ["A man with a red helmet", "A man on a bike."]
    assert sample.fields == {"caption": captions[0], "answers": captions}
    assert sample.meta == {"image_ids": ["coco:391895"]}
    assert (sample.images[0].width, sample.images[0].height) == size


def test_official_files_without_the_setting_are_named(refusal):
    message = refusal("coco-caption", "train", lambda root, picture: root.mkdir())
    assert "for captions_*.json, give --set annotations=official" in message


def test_refusals(refusal):
    changed = json.loads(json.dumps(KARPATHY))
    changed["images"][1]["sentences"][0] = {"tokens": ["boxes"]}

    def write(root, picture):
        write_karpathy(root, picture, changed)

    assert "dataset_coco.json, image 1, sentence 0: expected key 'raw'" in refusal("coco-caption", "train", write)
    official = refusal("coco-caption", "val", write, "--set", "annotations=official", "--set", "year=2017")
    assert "captions_val2017.json" in official
    assert "one of train, val, got 'test'" in refusal("coco-caption", "test", write, "--set", "annotations=official")
