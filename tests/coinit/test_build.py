"""Builds: the same bytes whatever happens on the way; sizes, rejects and refusals."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from vistallm.coinit.build import BuildOptions, build
from vistallm.coinit.check import check
from vistallm.coinit.images import read_image
from vistallm.coinit.shards import read_index, read_raw, read_shard
from vistallm.coinit.sources.base import Draft, Packed, Reject, SourceFormatError, SourceImage, SourceOptions
from vistallm.coinit.sources.custom import load_jsonl
from vistallm.coinit.sources.records import Record
from vistallm.config import PAD_COLOUR
from vistallm.data.images import decode_sample
from vistallm.evaluate import prompt
from vistallm.regions.masks import mask_to_rle, merge_rles, rle_area, rle_to_mask, segmentation_to_rle
from vistallm.schema import ImageInfo, Region, Sample

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "build_coinit.py"
UNITS = 60


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(4):
        cv2.imwrite(str(root / f"{i}.jpg"), rng.integers(0, 255, (48, 64, 3), np.uint8))
    return root


class MadeSource:
    """Three samples per unit, every tenth unit rejected; `size` is what the annotations say of the images."""

    def __init__(self, options):
        self.options, self.root = options, options.images
        self.size = (80, 60) if options.settings.get("size") == "wrong" else (64, 48)

    def __len__(self):
        return 0 if self.options.split == "none" else UNITS

    def unit(self, index):
        if self.options.settings.get("breaks") == str(index):
            raise SourceFormatError(f"refs.json, record {index}: expected key 'box'")
        for i in range(3):
            if index % 10 == 3:
                yield Reject("odd", f"unit {index}")
                continue
            name = f"made-{self.options.split}-{index}-{i}"
            mask = mask_to_rle(np.pad(np.ones((20, 30), bool), ((10, 18), (20, 14))))
            region = Region(0, "mask", 0, box=(20.0, 10.0, 50.0, 30.0), rle=mask)
            meta = {"image_ids": [f"coco:{index % 4}"]}
            infos, fields = [ImageInfo("", *self.size)], {"expr": f"thing {index}"}
            file = self.options.settings.get("file", f"{index % 4}.jpg")
            sample = Sample(name, "res", "made", infos, fields=fields, regions=[region], meta=meta)
            yield Draft(sample, [self.root / file])


def make(out, pictures, split="train", settings=None, seed=0, **options):
    source = SourceOptions(out.parent, split, pictures, seed, settings or {})
    return build(
        "made",
        MadeSource,
        source,
        BuildOptions(out, **{"samples_per_shard": 10, "workers": 1, "max_rejects": 0.6, **options}),
    )


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def samples_of(out):
    return [sample for name in read_index(out)["shards"] for sample, _ in read_shard(out / name)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pictures):
    """The set built by one process without interruption."""
    out = tmp_path_factory.mktemp("whole") / "made"
    result = make(out, pictures)
    assert (result.samples, result.rejects) == (162, {"odd": 18})
    return out


def test_shards_hold_every_sample_once_in_shuffled_order(whole, tmp_path, pictures):
    numbers = [int(sample.id.split("-")[2]) for sample in samples_of(whole)]
    assert sorted(numbers) == [n for n in range(UNITS) if n % 10 != 3 for _ in range(3)]
    assert numbers != sorted(numbers)
    rejects = [json.loads(line) for line in (whole / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 18
    assert {"split": "train", "reason": "odd", "where": "unit 13"} in rejects
    assert not check([whole]).totals
    make(tmp_path / "val", pictures, split="val")
    numbers = [int(sample.id.split("-")[2]) for sample in samples_of(tmp_path / "val")]
    # The four images in the order of their first units (unit 3 is rejected), each one's units in their own order.
    assert numbers == sorted(numbers, key=lambda number: (number % 4, number))


def test_image_bytes_are_copied(whole, pictures):
    name = next(iter(read_index(whole)["shards"]))
    for sample, files in read_shard(whole / name):
        assert files == [(pictures / f"{int(sample.id.split('-')[2]) % 4}.jpg").read_bytes()]
        assert (sample.images[0].width, sample.images[0].height) == (64, 48)


def test_same_bytes_for_workers(whole, tmp_path, pictures):
    make(tmp_path / "two", pictures, workers=2)
    assert contents(tmp_path / "two") == contents(whole)


def test_another_seed_gives_another_order(whole, tmp_path, pictures):
    make(tmp_path / "seed", pictures, seed=1)
    assert {s.id for s in samples_of(tmp_path / "seed")} == {s.id for s in samples_of(whole)}
    assert [s.id for s in samples_of(tmp_path / "seed")] != [s.id for s in samples_of(whole)]


def test_splits_are_built_one_after_another(tmp_path, pictures):
    for split in ("train", "val"):
        make(tmp_path / "made", pictures, split=split)
    index = read_index(tmp_path / "made")
    assert index["tasks"] == {"train": {"res": 162}, "val": {"res": 162}}
    assert index["source"] == "made"


def test_a_missing_or_half_written_shard_is_written_again(whole, tmp_path, pictures):
    out = tmp_path / "made"
    make(out, pictures)
    (out / "train-000001.tar").unlink()
    (out / "train-000002.tar").write_bytes(b"half")
    (out / ".build" / "train" / "000003.json").write_text("{")
    (out / ".train-000004.tar.17.tmp").write_bytes(b"left behind")
    (out / ".build" / "train" / "000004.json").unlink()
    (out / "index.json").unlink()
    for stale in (".train-000000.tar.17.tmp", ".build/train/.000000.json.17.tmp", ".build/train/.000004.json.17.tmp"):
        (out / stale).write_bytes(b"left behind, also beside a shard that is done")
    make(out, pictures)
    assert contents(out) == contents(whole)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A jsonl source of 400 samples over three noise images, some of them large."""
    root = tmp_path_factory.mktemp("lines")
    rng = np.random.default_rng(1)
    for i, side in enumerate((64, 400, 900)):
        cv2.imwrite(str(root / f"{i}.png"), rng.integers(0, 255, (side, side, 3), np.uint8))
    records = [
        {"id": f"{i:03d}", "task": "rec", "images": [f"{i % 3}.png"], "fields": {"expr": f"part {i}"}}
        | {"regions": [{"box": [1, 2, 30 + i % 30, 40]}]}
        for i in range(400)
    ]
    (root / "train.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return root


@pytest.mark.slow
def test_five_kills_and_a_finished_build_give_the_same_bytes(lines, tmp_path):
    words = [sys.executable, str(TOOL), "jsonl", "--root", str(lines), "--split", "train", "--samples-per-shard", "8"]
    subprocess.run([*words, "--out", str(tmp_path / "whole"), "--workers", "1"], check=True, capture_output=True)
    out, rng, done = tmp_path / "killed", random.Random(0), []
    for attempt in range(5):
        builder = subprocess.Popen([*words, "--out", str(out), "--workers", "2"], stderr=subprocess.DEVNULL)
        # Wait for some shards more than the last attempt left, then kill at any moment.
        goal = len(list(out.glob("*.tar"))) + rng.randrange(2, 8)
        while builder.poll() is None and len(list(out.glob("*.tar"))) < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        os.kill(builder.pid, signal.SIGKILL)
        builder.wait()
        done.append(len(list(out.glob("*.tar"))))
        assert not (out / "index.json").exists(), f"attempt {attempt} came to its end"
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] <= 50
    finished = subprocess.run([*words, "--out", str(out), "--workers", "2"], check=True, capture_output=True, text=True)
    assert "400 samples" in finished.stdout
    assert "samples=400" in finished.stderr
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "none"}, "no unit in"),
        ({"settings": {"file": "gone.jpg"}}, "none is there, first"),
        ({"settings": {"size": "wrong"}}, "every sample was rejected"),
        ({"split": "val", "exclude": Path("ids.txt")}, "drops training samples"),
        ({"samples_per_shard": 0}, "of at least 1"),
        ({"settings": {"breaks": "17"}}, "record 17: expected key 'box'"),
        ({"settings": {"breaks": "17"}, "workers": 2}, "record 17: expected key 'box'"),
    ],
)
def test_refusals(tmp_path, pictures, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "made", pictures, **options)
    assert not (tmp_path / "made" / "index.json").exists()


def test_another_recipe_or_source_is_refused(tmp_path, pictures, lines):
    out = tmp_path / "made"
    make(out, pictures)
    for change in ({"seed": 1}, {"samples_per_shard": 30}):
        with pytest.raises(ValueError, match="another recipe"):
            make(out, pictures, **change)
    with pytest.raises(ValueError, match="source 'made' -> 'jsonl'"):
        build("jsonl", load_jsonl, SourceOptions(lines, "train"), BuildOptions(out))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="choose another folder"):
        make(tmp_path / "notes", pictures)


def test_excluded_images_are_dropped_and_counted(tmp_path, pictures):
    (tmp_path / "ids.txt").write_text("coco:1\ncoco:77\n")
    result = make(tmp_path / "made", pictures, exclude=tmp_path / "ids.txt")
    assert result.rejects["excluded"] == 3 * sum(n % 4 == 1 and n % 10 != 3 for n in range(UNITS))
    assert {image for s in samples_of(tmp_path / "made") for image in s.meta["image_ids"]} == {
        "coco:0",
        "coco:2",
        "coco:3",
    }


def test_images_that_are_missing_broken_or_of_another_size(tmp_path, pictures):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for name in ("0.jpg", "2.jpg"):
        (tmp_path / name).write_bytes((pictures / name).read_bytes())
    result = make(tmp_path / "made", tmp_path)
    assert set(result.rejects) == {"odd", "missing-image"}
    with pytest.raises(ValueError, match="every sample was rejected"):
        make(tmp_path / "other", tmp_path, settings={"file": "broken.jpg"})
    lines = (tmp_path / "other" / "rejects.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in lines} == {"odd", "broken-image"}


def test_other_formats_become_png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.bmp"), pixels)
    file = read_image(tmp_path / "a.bmp")
    assert (file.suffix, file.size) == ("png", (30, 20))
    assert (cv2.imdecode(np.frombuffer(file.data, np.uint8), cv2.IMREAD_COLOR) == pixels).all()


def write_jsonl(root, records, split="train"):
    text = "".join(
        json.dumps({"id": str(i), "task": "rec", "fields": {"expr": "it"}} | r) + "\n" for i, r in enumerate(records)
    )
    (root / f"{split}.jsonl").write_text(text)


def build_jsonl(root, out, **options):
    return build("jsonl", load_jsonl, SourceOptions(root, "train"), BuildOptions(out, workers=1, **options))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_never_applied(tmp_path, suffix, orientation):
    """Builder, check, loader, viewer and predict see the pixels as Pillow reads them, with the annotations on them."""
    pixels = np.full((48, 64, 3), 90, np.uint8)
    pixels[8:24, 4:20] = (240, 30, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    write_jsonl(tmp_path, [{"images": [f"a.{suffix}"], "regions": [{"box": [4, 8, 20, 24]}]}])
    assert build_jsonl(tmp_path, tmp_path / "out").samples == 1
    report = check([tmp_path / "out"], workers=1)
    assert not report.totals
    assert report.warnings == ({"exif-orientation": 1} if orientation > 1 else {})
    (raw,) = read_raw(tmp_path / "out" / "train-000000.tar")
    expected = np.asarray(Image.open(tmp_path / f"a.{suffix}"))
    loaded = decode_sample(raw)
    assert (loaded.images[0].width, loaded.images[0].height) == (64, 48)
    (shown,) = load_tool("view_samples").choose(tmp_path / "out", None, None, 1, 0)
    asked = prompt.read_image(tmp_path / f"a.{suffix}")
    for seen in (loaded.pixels[0], shown.pixels[0], asked):
        assert np.array_equal(seen, expected)
        assert seen[12:20, 8:16, 0].min() > 200 > 120 > seen[:, 32:, 0].max()


def test_transparent_pixels_have_the_colour_of_padding_in_training_and_in_predict(tmp_path):
    pixels = np.full((20, 30, 4), 200, np.uint8)
    pixels[0, :, 3], pixels[1, 0, 3], pixels[1, 1, 3] = 0, 255, 100
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).quantize(4).save(tmp_path / "b.png")
    write_jsonl(tmp_path, [{"images": [f"{name}.png"], "regions": [{"box": [4, 8, 20, 18]}]} for name in "ab"])
    build_jsonl(tmp_path, tmp_path / "out")
    for raw in read_raw(tmp_path / "out" / "train-000000.tar"):
        (seen,) = decode_sample(raw).pixels
        name = raw.record["meta"]["image_ids"][0].removeprefix("jsonl:")
        assert np.array_equal(prompt.read_image(tmp_path / name), seen)
        assert (abs(seen[0].astype(int) - PAD_COLOUR) <= 1).all()
        assert (seen[1, 0] == 200).all()
        assert (abs(seen[1, 1] - (100 * 200 + 155 * np.array(PAD_COLOUR)) / 255) <= 1).all()


@pytest.mark.parametrize(("suffix", "settings"), [("jpg", {}), ("jpg", {"progressive": True}), ("png", {})])
def test_images_that_are_cut_off_are_rejects_and_rejects_hold_no_addresses(tmp_path, suffix, settings):
    pixels = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8), (0, 0), 3)
    Image.fromarray(pixels).save(tmp_path / f"0.{suffix}", **settings)
    whole = (tmp_path / f"0.{suffix}").read_bytes()
    pieces = [whole[:-1], whole[:-7], whole[: len(whole) * 9 // 10], whole[: len(whole) // 2], whole[:5], b""]
    for i, data in enumerate([*pieces, whole + bytes(40)], 1):
        (tmp_path / f"{i}.{suffix}").write_bytes(data)
    write_jsonl(
        tmp_path, [{"images": [f"{i}.{suffix}"], "regions": [{"box": [1, 2, 9, 9]}]} for i in range(len(pieces) + 2)]
    )
    rejects = []
    for name in ("one", "two"):
        assert build_jsonl(tmp_path, tmp_path / name, max_rejects=1).rejects == {"broken-image": len(pieces)}
        assert {s.images[0].file for s in samples_of(tmp_path / name)} == {f"0.{suffix}"}
        assert not check([tmp_path / name], workers=1).totals
        rejects.append((tmp_path / name / "rejects.jsonl").read_bytes())
    assert rejects[0] == rejects[1]
    assert b"0x" not in rejects[0]


def test_boxes_of_another_convention_end_the_build_with_the_most_common_reason(tmp_path):
    """COCO's [x, y, width, height] in place of corners: most boxes are empty, and the set would be nearly so."""
    Image.fromarray(np.zeros((480, 640, 3), np.uint8)).save(tmp_path / "a.png")
    rng = np.random.default_rng(0)
    boxes = [[int(rng.integers(200, 500)), int(rng.integers(150, 400)), 90, 60] for _ in range(99)] + [[3, 2, 90, 60]]
    write_jsonl(tmp_path, [{"images": ["a.png"], "regions": [{"box": box}]} for box in boxes])
    with pytest.raises(
        ValueError, match=r"99 of 100 samples were rejected.*1\.0%; most often empty-box \(99\), as in '.*line"
    ):
        build_jsonl(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 99
    assert build_jsonl(tmp_path, tmp_path / "out", max_rejects=0.99).samples == 1
    assert read_index(tmp_path / "out")["tasks"] == {"train": {"rec": 1}}
    with pytest.raises(ValueError, match="99 of 100"):
        build_jsonl(tmp_path, tmp_path / "out")


def test_normalised_boxes_are_refused(tmp_path):
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "a.png")
    write_jsonl(tmp_path, [{"images": ["a.png"], "regions": [{"box": [0.1, 0.2, 0.5, 0.6]}]}])
    with pytest.raises(
        ValueError, match=r"normalised-box \(1\), as in .*expected boxes in pixels, got \[0.1, 0.2, 0.5, 0.6\]"
    ):
        build_jsonl(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("split", ["train", "val"])
def test_samples_of_one_image_are_neighbours_and_share_it(tmp_path, split):
    """Questions of 40 images in turn, as question files list them: 25 of each."""
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / f"{i}.png")
    write_jsonl(
        tmp_path, [{"images": [f"{i % 40}.png"], "regions": [{"box": [1, 2, 9, 9]}]} for i in range(1000)], split
    )
    out = tmp_path / "out"
    options = BuildOptions(out, workers=1, samples_per_shard=100)
    build("jsonl", load_jsonl, SourceOptions(tmp_path, split), options)
    stored, order = 0, []
    for name in read_index(out)["shards"]:
        with tarfile.open(out / name) as tar:
            stored += sum(member.size for member in tar if member.name.endswith(".png"))
        order += [int(sample.id.rpartition("-")[2]) % 40 for sample, _ in read_shard(out / name)]
    assert len(order) == 1000
    assert sum(a != b for a, b in pairwise(order)) == 39
    assert (order[::25] == list(range(40))) == (split == "val")
    assert stored == sum((tmp_path / f"{i}.png").stat().st_size for i in range(40))


def test_segmentations():
    square, other = [1, 1, 5, 1, 5, 5, 1, 5], [6, 6, 9, 6, 9, 9, 6, 9]
    both = segmentation_to_rle([square, other, [1, 1, 2, 2]], 10, 12)
    assert (both["size"], rle_area(both)) == ([10, 12], 16 + 9)
    assert rle_area(segmentation_to_rle([[1, 1, 2, 2]], 10, 12)) == 0
    crowd = segmentation_to_rle({"size": [10, 12], "counts": [11, 4, 105]}, 10, 12)
    assert np.argwhere(rle_to_mask(crowd)).tolist() == [[1, 1], [2, 1], [3, 1], [4, 1]]
    assert rle_area(segmentation_to_rle([both, crowd], 10, 12)) == rle_area(merge_rles([both, crowd])) == 25
    for wrong in ({"size": [12, 10], "counts": [120]}, {"size": [10, 12], "counts": [11]}, [[1, 2, 3]], "x"):
        with pytest.raises(ValueError, match="segmentation"):
            segmentation_to_rle(wrong, 10, 12)


def test_boxes_records_and_packed_lists():
    image = SourceImage(Path("a.jpg"), "set:a", 64, 48)
    assert image.cut((-3, -1, 5, 700), "here") == (0, 0, 5, 48)
    assert image.cut((64, 3, 90, 9), "here") == Reject(
        "empty-box", "here: nothing of [64, 3, 90, 9] is in the image, 64 x 48"
    )
    records = [{"a": [1, 2.5, None]}, {"b": "ß", "c": {"d": True}}]
    packed = Packed(records)
    assert [packed[i] for i in range(len(packed))] == list(packed) == records
    for record, kinds, message in ({}, int, "expected key 'a'"), ({"a": "1"}, int, "to be int"), ([], int, "got list"):
        with pytest.raises(SourceFormatError, match=message):
            Record(record, "refs.json, record 3").require("a", kinds)
    with pytest.raises(SourceFormatError, match="got 'True'"):
        Record({"a": True}, "refs.json, record 3").numbers("a")
