"""tools/mask_ceiling.py: what it reads, and the numbers it prints."""

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from vistallm.coinit.shards import write_shard
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import ImageInfo, Region, Sample

TOOL = Path(__file__).parents[2] / "tools" / "mask_ceiling.py"


@pytest.fixture
def ceiling(monkeypatch, capsys):
    """Callable: words -> (exit code, stdout, stderr) of the tool; `.read_masks` is its reader."""
    spec = importlib.util.spec_from_file_location("mask_ceiling", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mask_ceiling.py", *map(str, words)])
        return tool.main(), *capsys.readouterr()

    call.read_masks = tool.read_masks
    return call


def disc(radius):
    mask = np.zeros((60, 80), np.uint8)
    cv2.circle(mask, (40, 30), radius, 1, -1)
    return mask_to_rle(mask)


BOX = mask_to_rle(np.pad(np.ones((10, 20), bool), ((5, 45), (5, 55))))
EMPTY = mask_to_rle(np.zeros((60, 80), bool))


@pytest.fixture
def shards(tmp_path):
    """Two shards of two samples each: masks of two objects, a box that is no mask, an empty mask."""
    picture = cv2.imencode(".png", np.zeros((60, 80, 3), np.uint8))[1].tobytes()
    contents = [
        [[Region(0, "mask", 0, rle=disc(20)), Region(0, "mask", 1, rle=BOX)], [Region(0, "box", 0, box=(1, 2, 3, 4))]],
        [[Region(0, "mask", 0, rle=EMPTY)], [Region(0, "mask", 0, rle=disc(9))]],
    ]
    for number, samples in enumerate(contents):
        written = [
            (Sample(f"{number}-{i}", "res", "made", [ImageInfo("0.png", 80, 60)], regions=r), [(picture, "png")])
            for i, r in enumerate(samples)
        ]
        write_shard(tmp_path, "train", number, written)
    return tmp_path


def test_shards_give_the_masks_of_their_samples_in_order(ceiling, shards):
    assert list(ceiling.read_masks(shards)) == [disc(20), BOX, EMPTY, disc(9)]
    assert list(ceiling.read_masks(shards / "train-000001.tar")) == [EMPTY, disc(9)]


def test_annotation_files_of_both_forms_give_their_masks(ceiling, tmp_path):
    path = tmp_path / "masks.json"
    box = [[5, 5, 25, 5, 25, 15, 5, 15]]
    path.write_text(json.dumps([{"segmentation": BOX}, {"segmentation": box, "height": 60, "width": 80}]))
    assert list(ceiling.read_masks(path)) == [BOX, BOX]
    coco = {
        "images": [{"id": 7, "height": 60, "width": 80}],
        "annotations": [{"image_id": 7, "segmentation": box}, {"image_id": 7, "segmentation": disc(9)}],
    }
    path.write_text(json.dumps(coco))
    assert list(ceiling.read_masks(path)) == [BOX, disc(9)]


def test_table_of_a_shard_folder(ceiling, shards):
    table = shards / "table.json"
    code, out, _ = ceiling(shards, "--points", 8, "--sampler", "adaptive", "--out", table)
    assert code == 0
    assert "3 masks, 1 empty ones left out" in out
    (row,) = json.loads(table.read_text())["rows"]
    assert out.splitlines()[-1].split()[:4] == ["adaptive", "8", "3", str(row["mean_iou"])]
    assert row["mean_iou"] == pytest.approx(np.mean(row["iou"]), abs=1e-5)
    assert row["iou"][1] == 1  # the box
    assert 0.8 < min(row["iou"]) < 1


def test_what_cannot_be_read_is_one_line_and_exit_code_one(ceiling, tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    (tmp_path / "none.json").write_text(json.dumps([{"segmentation": EMPTY}]))
    (tmp_path / "empty").mkdir()
    for path, said in (("bad.tar", "ReadError"), ("none.json", "not empty"), ("empty", "at least one mask")):
        code, _, err = ceiling(tmp_path / path)
        assert code == 1
        assert err.startswith("mask_ceiling: ")
        assert said in err
        assert len(err.splitlines()) == 1


def test_tracks_of_videos_with_fewer_frames_written(ceiling, tmp_path):
    picture = cv2.imencode(".png", np.zeros((60, 80, 3), np.uint8))[1].tobytes()

    def box(x, y):
        mask = np.zeros((60, 80), bool)
        mask[y : y + 16, x : x + 20] = True
        return mask_to_rle(mask)

    infos, fields = [ImageInfo(f"{i}.png", 80, 60) for i in range(5)], {"video": True, "expr": "it"}
    straight, turning = [(5 + 8 * i, 5 + 4 * i) for i in range(5)], [(5, 5), (45, 40), (5, 5), (45, 40), (5, 5)]
    written = [
        (Sample(name, "video_ref", "made", infos, fields=fields, regions=regions), [(picture, "png")] * 5)
        for name, path in (("straight", straight), ("turning", turning))
        for regions in [[Region(frame, "mask", 0, rle=box(*place)) for frame, place in enumerate(path)]]
    ]
    for number, one in enumerate(written):
        write_shard(tmp_path, "test", number, [one])
    for number, expected in ((0, [1, 1]), (1, [1, 3 / 5])):  # a straight motion is kept, two of five frames are wrong
        words = ("--keyframes", 1, 2, "--points", 8, "--sampler", "adaptive")
        code, out, _ = ceiling(tmp_path / f"test-{number:06d}.tar", *words)
        assert code == 0
        rows = [line.split() for line in out.splitlines()[2:]]
        assert [row[0] for row in rows] == ["1", "2"]
        assert [float(row[4]) for row in rows] == pytest.approx(expected, abs=0.06)
        assert float(rows[1][6]) < 0.7 * float(rows[0][6])
    code, _, err = ceiling(tmp_path / "test-000000.tar", "--keyframes", 1, "--points", 2)
    assert code == 1
    assert err.startswith("mask_ceiling: ")
