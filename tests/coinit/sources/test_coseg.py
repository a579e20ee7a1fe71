"""Co-segmentation folders: layouts, foreground rules, fixed groups for evaluation and drawn ones for training."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from vistallm.regions.masks import rle_to_mask

LAYOUTS = Path(__file__).parents[3] / "configs" / "coseg"
COLOURS = {"cow": (0, 0, 128), "plane": (192, 0, 0)}  # red, green, blue


def draw_mask(path, colour, x):
    """A rectangle of 10 x 8 pixels at (x, 4) on black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[4:12, x : x + 10] = colour
    assert cv2.imwrite(str(path), pixels[:, :, ::-1])


def write_icoseg(root, picture):
    for group, count in (("025 Airshows-helicopter", 5), ("043 Christ [A]", 2), ("alone", 1)):
        for i in range(count):
            picture(root / "images" / group / f"img{i}.jpg")
            draw_mask(root / "ground_truth" / group / f"img{i}.png", (255, 255, 255), 10 * i)


def write_pascal(root, picture):
    for name in ("aeroplane", "cat"):
        for i in range(3):
            picture(root / name / f"2008_00029{i}.jpg")
            draw_mask(root / name / "GroundTruth" / f"2008_00029{i}.png", (255, 255, 255), 10 * i)


def write_msrc(root, picture):
    for name, colour in COLOURS.items():
        for i in range(2):
            picture(root / name / f"{name}{i}.bmp")
            draw_mask(root / name / "GroundTruth" / f"{name}{i}.bmp", colour, 10 * i)


def layout(name):
    return "--set", f"layout={LAYOUTS / name}.yaml"


MADE = [
    ("coseg", "train", write_icoseg, *layout("icoseg")),
    ("coseg", "test", write_pascal, *layout("pascal")),
]


def test_evaluation_takes_every_image_once(build, rejects):
    samples = build("coseg", "test", write_icoseg, *layout("icoseg"))
    group = "coseg-test-icoseg-025 Airshows-helicopter"
    assert sorted(samples) == [f"{group}-0", f"{group}-1", "coseg-test-icoseg-043 Christ [A]-0"]
    first, second = samples[f"{group}-0"], samples[f"{group}-1"]
    assert (len(first.images), len(second.images)) == (3, 2)  # 5 = 3 + 2
    assert first.fields == {"targets": [0, 1, 2]}
    assert first.meta["class"] == "025 Airshows-helicopter"
    assert second.meta["image_ids"] == [f"icoseg:025 Airshows-helicopter/img{i}" for i in (3, 4)]
    mask = rle_to_mask(second.regions[1].rle)
    assert mask[4:12, 40:50].all()
    assert mask.sum() == 80
    assert [reason for reason, _ in rejects("coseg")] == ["lone-image"]


def test_training_groups_are_drawn_by_the_seed(build, command, tmp_path):
    samples = build("coseg", "train", write_icoseg, *layout("icoseg"))
    assert len(samples) == 5 + 2
    for sample in samples.values():
        ids = sample.meta["image_ids"]
        assert 2 <= len(ids) <= 4
        assert len(set(ids)) == len(ids)
    again = tmp_path / "again"
    words = ("--root", tmp_path / "root", "--split", "train", "--max-rejects", 1, *layout("icoseg"))
    assert command("coseg", *words, "--out", again) == 0
    names = ["train-000000.tar"]
    assert [(again / n).read_bytes() for n in names] == [(tmp_path / "data/coseg" / n).read_bytes() for n in names]


def test_an_image_in_two_classes_has_one_id(build):
    samples = build("coseg", "test", write_pascal, *layout("pascal"))
    assert {tuple(s.meta["image_ids"]) for s in samples.values()} == {tuple(f"pascal:2008_00029{i}" for i in range(3))}


def test_masks_in_the_colour_of_their_class(build, tmp_path):
    text, rule = (LAYOUTS / "msrc.yaml").read_text(), '{cow: "0,0,128", plane: "192,0,0"}'
    (tmp_path / "mine.yaml").write_text(text.replace('">127"', rule))
    samples = build("coseg", "test", write_msrc, "--set", f"layout={tmp_path / 'mine.yaml'}", "--set", "classes=plane")
    assert list(samples) == ["coseg-test-msrc-plane-0"]
    assert rle_to_mask(samples["coseg-test-msrc-plane-0"].regions[1].rle)[4:12, 10:20].all()
    assert samples["coseg-test-msrc-plane-0"].images[0].file == "0.png"  # bmp is written as png


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected name, from --set layout=configs/coseg/icoseg.yaml"),
        ((*layout("icoseg"), "--set", "image_glob=*.gif"), "no image matches image_glob '*.gif'"),
        ((*layout("icoseg"), "--set", "foreground=white"), "expected foreground as >127, as 64,0,0"),
        ((*layout("icoseg"), "--set", "classes=x"), "'x' is no folder of images"),
        (("--set", "layout=nowhere.yaml"), "expected a YAML file"),
    ],
)
def test_layouts_are_checked(refusal, words, message):
    assert message in refusal("coseg", "test", write_icoseg, *words)
