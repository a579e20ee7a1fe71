"""A user's own data: the guide's lines and commands, the example that trains, and what lines may and may not say."""

import json
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest

from vistallm.coinit.shards import read_shard
from vistallm.regions.masks import rle_to_mask

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "custom"
GUIDE = (ROOT / "docs" / "custom_data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python (.*data/custom.*)$", GUIDE, re.MULTILINE)


def write(root, picture):
    """The guide's own sample lines over pictures of its names."""
    lines = [json.loads(line) for line in re.findall(r'^    (\{"id".*\})$', GUIDE, re.MULTILINE)]
    assert len(lines) == 5
    for line in lines:
        for name in line["images"]:
            picture(root / name, 160, 120)
    (root / "train.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


MADE = [("jsonl", "train", write)]


def test_lines_of_the_guide(build):
    samples = build(*MADE[0])
    mask = rle_to_mask(samples["jsonl-train-17"].regions[0].rle)
    assert mask.sum() == 25 * 23
    assert mask[75:98, 30:55].all()
    assert samples["jsonl-train-18"].regions[0].point == (120, 86)
    assert samples["jsonl-train-20"].meta["image_ids"] == ["jsonl:images/plate.jpg", "jsonl:images/cups.jpg"]
    assert samples["jsonl-train-21"].answer == "At {regions:0}."


@pytest.fixture(scope="module")
def example(tmp_path_factory, command):
    """The example, built and checked by the guide's first three commands."""
    out = tmp_path_factory.mktemp("custom")
    for line in COMMANDS[:3]:
        words = shlex.split(line.replace("data/custom", str(out / "data")).replace("examples/custom", str(EXAMPLE)))
        assert words[0] == "tools/build_coinit.py"
        assert command(*words[1:], "--workers", 1) == 0
    return out / "data"


@pytest.mark.slow
def test_the_example_trains(example, tiny_config, tmp_path):
    from vistallm.train.callbacks import read_metrics
    from vistallm.train.run import train

    words = [word for word in shlex.split(COMMANDS[4])[1:] if not word.startswith(("run_dir=", "model=", "data.root="))]
    assert "trainer.max_steps=2" in words
    train(tiny_config(*words, f"data.root={example}", f"run_dir={tmp_path / 'run'}", "trainer.accelerator=cpu"))
    losses = [float(row["loss"]) for row in read_metrics(tmp_path / "run" / "metrics.csv") if row["loss"]]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_every_task_of_the_example_builds_sequences(example, builder):
    answers = {}
    for path in sorted(example.glob("*.tar")):
        for sample, files in read_shard(path):
            sample.pixels = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) for data in files]
            answers[sample.id] = builder.build(sample).answer
    assert len(answers) == 16
    assert answers["jsonl-train-grec-none"] == "The bounding box is <b_st><b_ed>."
    assert answers["jsonl-train-gres-two"].count("<m_sep>") == 1
    assert "image 1: <m_st>" in answers["jsonl-train-same"]
    assert "image 2: <m_st>" in answers["jsonl-train-same"]


def line(**changes):
    record = {
        "id": "1",
        "task": "rec",
        "images": ["a.png"],
        "fields": {"expr": "it"},
        "regions": [{"box": [1, 2, 9, 9]}],
    }
    return {key: value for key, value in {**record, **changes}.items() if value is not None}


def writes(*lines):
    def write_lines(root, picture):
        picture(root / "a.png")
        picture(root / "mask.png", 30, 20)
        texts = [text if isinstance(text, str) else json.dumps(text) for text in lines]
        (root / "val.jsonl").write_text("\n".join(texts) + "\n")

    return write_lines


def test_regions_are_cut_numbered_and_counted_when_empty(build, rejects):
    lines = [
        line(id="cut", regions=[{"box": [-5, 2, 90, 9]}, {"object": 7, "point": [70, -1]}]),
        "",
        line(id="gone", regions=[{"box": [70, 2, 90, 9]}]),
        line(id="thin", task="res", regions=[{"polygons": [[1, 1, 5, 5]]}]),
        line(id="lost", images=["b.png"]),
        line(id="both", regions=[{"box": [1, 2, 9, 9], "kind": "box", "polygons": [[1, 2, 9, 2, 9, 9, 1, 9]]}]),
    ]
    samples = build("jsonl", "val", writes(*lines))
    assert list(samples) == ["jsonl-val-cut", "jsonl-val-both"]
    assert samples["jsonl-val-cut"].regions[0].box == (0, 2, 64, 9)
    assert (samples["jsonl-val-cut"].regions[1].object, samples["jsonl-val-cut"].regions[1].point) == (7, (64, 0))
    region = samples["jsonl-val-both"].regions[0]
    assert (region.kind, region.rle["size"]) == ("box", [48, 64])
    assert [reason for reason, _ in rejects("jsonl")] == ["empty-box", "empty-mask", "missing-image"]
    assert "val.jsonl, line 4" in rejects("jsonl")[1][1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "expected key 'id', got list"),
        (line(id=3), "expected 'id' to be str, got '3'"),
        (line(task="rez"), "expected a task of"),
        (line(images=[]), "at least one path"),
        (line(extra=1), "expected keys of id, task"),
        (line(image_ids=[]) | {"image_ids": ["a", "b"]}, "an entry in 'image_ids' per image"),
        (line(regions=[{"box": [1, 2, 3]}]), "region 0: expected 4 numbers"),
        (line(regions=[{"box": [1, 2, 3, "4"]}]), "region 0: "),
        (line(regions=[{"image": 1, "point": [1, 2]}]), "expected 'image' from 0 to 0, got 1"),
        (line(regions=[{"kind": "box"}]), "expected one of box, point, rle"),
        (line(regions=[{"kind": "mask", "box": [1, 2, 3, 4]}]), "a 'kind' that the region gives"),
        (line(regions=[{"bbox": [1, 2, 3, 4]}]), "expected keys of image, object"),
        (line(regions=[{"mask": "mask.png"}]), "of 64 x 48 pixels, got 30 x 20"),
        (line(regions=[{"rle": {"size": [9, 9], "counts": [81]}}]), "expected run lengths of size [48, 64]"),
    ],
)
def test_a_wrong_line_stops_the_build(refusal, record, message):
    error = refusal("jsonl", "val", writes(line(), record))
    assert message in error
    assert "val.jsonl, line 2" in error


def test_a_missing_file_and_unknown_settings(refusal):
    assert "expected test.jsonl there, got no such file" in refusal("jsonl", "test", writes(line()))
    assert "this source knows no setting" in refusal("jsonl", "val", writes(line()), "--set", "a=b")
