"""NLVR2: JSON lines, training images in numbered folders, groups of one sentence for consistency."""

import json

import pytest


def line(identifier, label="True", **more):
    record = {"validation": {"61": "False"}, "sentence": "The right image shows a dog. ", "label": label}
    record |= {"left_url": "https://host/a.jpg", "right_url": "https://host/b.jpg", "synset": "dog", "writer": "61"}
    return record | {"query": "some dogs38", "identifier": identifier, "extra_validations": {"154": "False"}, **more}


DEV = [line("dev-850-0-0"), line("dev-850-1-0", "False"), line("dev-850-0-1")]


def write(root, picture, dev=DEV):
    (root / "data" / "balanced").mkdir(parents=True)
    (root / "data" / "train.json").write_text(json.dumps(line("train-10171-0-0", directory=54)) + "\n")
    (root / "data" / "dev.json").write_text("".join(json.dumps(record) + "\n" for record in dev))
    (root / "data" / "balanced" / "balanced_dev.json").write_text(json.dumps(DEV[0]) + "\n")
    for side in (0, 1):
        picture(root / "images" / "train" / "54" / f"train-10171-0-img{side}.png", 64 - 8 * side)
        for pair in (0, 1):
            picture(root / "images" / "dev" / f"dev-850-{pair}-img{side}.png", 64 - 8 * side)


MADE = [("nlvr2", "train", write), ("nlvr2", "dev", write)]


def test_statements_about_two_images(build):
    samples = build("nlvr2", "dev", write)
    assert sorted(samples) == ["nlvr2-dev-850-0-0", "nlvr2-dev-850-0-1", "nlvr2-dev-850-1-0"]
    first, other = samples["nlvr2-dev-850-0-0"], samples["nlvr2-dev-850-1-0"]
    assert first.task == "nlvr2"
    assert first.fields == {"statement": "The right image shows a dog.", "answer": "True"}
    assert first.meta == {"group": "dev-850-0", "image_ids": ["nlvr2:dev-850-0-img0", "nlvr2:dev-850-0-img1"]}
    assert [(image.file, image.width) for image in first.images] == [("0.png", 64), ("1.png", 56)]
    assert (other.fields["answer"], other.meta["group"]) == ("False", "dev-850-0")  # the same sentence, another pair
    assert samples["nlvr2-dev-850-0-1"].meta["group"] == "dev-850-1"


def test_training_images_are_in_numbered_folders(build):
    assert list(build("nlvr2", "train", write)) == ["nlvr2-train-10171-0-0"]


def test_a_subset_is_named_by_its_file(build):
    words = ("--set", "file=data/balanced/balanced_dev.json")
    assert list(build("nlvr2", "dev", write, *words)) == ["nlvr2-dev-850-0-0"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            line("dev-850-0"),
            "record 1: expected identifier as dev-SET-PAIR-SENTENCE and label True or False, got 'dev-850-0'",
        ),
        (line("dev-850-0-3", "maybe"), "and label True or False, got 'dev-850-0-3' and 'maybe'"),
        ({"sentence": "x"}, "expected key 'identifier'"),
    ],
)
def test_records_that_differ_stop_the_build(refusal, record, message):
    def write_wrong(root, picture):
        write(root, picture, [DEV[0], record])

    assert message in refusal("nlvr2", "dev", write_wrong)
