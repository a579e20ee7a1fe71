"""A user's images and prompts: what is read, and what is refused."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vistallm.config import PAD_COLOUR
from vistallm.evaluate.prompt import make_sample, read_image
from vistallm.regions.masks import rle_to_mask

IMAGES = [np.zeros((50, 80, 3), np.uint8), np.zeros((30, 40, 3), np.uint8)]


def test_regions_become_placeholders_in_the_image_they_name():
    sample = make_sample(IMAGES, "Is { box : 1, 2 ,30,40 } at {point:5,6@2} in {mask:0,0,9,0,9,9;20,20,29,20,29,29}?")
    assert sample.instruction == "Is {regions:0} at {regions:1} in {regions:2}?"
    assert [(r.image, r.kind) for r in sample.regions] == [(0, "box"), (1, "point"), (0, "mask")]
    assert sample.regions[0].box == (1, 2, 30, 40)
    assert sample.regions[1].point == (5, 6)
    mask = rle_to_mask(sample.regions[2].rle)
    assert mask[:9, :9].sum() == pytest.approx(9 * 9 / 2, abs=5), "a triangle"
    assert mask[20:29, 20:29].sum() == mask[:9, :9].sum() == mask.sum() / 2
    assert make_sample(IMAGES, "Segment {point:5,6}.", "interactive", "link").instruction == "Segment {region:0:point}."


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        (" ", "expected a prompt"),
        ("{box:30,2,10,40}", "x0 < x1 and y0 < y1 do not hold"),
        ("{box:1,2,81,40}", "not inside image 1 of 80x50"),
        ("{point:41,6@2}", "not inside image 2 of 40x30"),
        ("{point:-1,6}", "not inside"),
        ("{point:nan,6}", "not inside"),
        ("{point:1,6@3}", "there are 2 image"),
        ("{point:1,6@0}", "there are 2 image"),
        ("{point:1}", "can't be read"),
        ("{box:1,2,3,4;1,2,3,4}", "can't be read"),
        ("{mask:1,2,3,4}", "can't be read"),
        ("{mask:all}", "can't be read"),
        ("{mask:1,2,1,2,1,2}", "covers no pixel"),
        ("the {mask} here", "is no region"),
        ("the {regions:0} here", "is no region"),
        ("the {box:1,2,3,4", "is no region"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(prompt, wrong):
    with pytest.raises(ValueError, match=wrong):
        make_sample(IMAGES, prompt)


@pytest.mark.parametrize(("task", "head"), [("vqa", "link"), (None, "link"), ("res", "links"), ("ress", "text")])
def test_a_head_or_task_that_does_not_exist_is_refused(task, head):
    with pytest.raises(ValueError, match="expected"):
        make_sample(IMAGES, "Why?", task, head)


def test_images_of_every_form_give_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 4), np.uint8)
    pixels[:5, :, 3], pixels[5:, :, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    want = pixels[..., :3].copy()
    want[:5] = PAD_COLOUR  # transparent pixels, whatever colour they hide
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png"), pixels):
        assert np.array_equal(read_image(image), want)
    assert np.array_equal(read_image(pixels[..., 0]), np.stack([pixels[..., 0]] * 3, 2))


def test_images_that_cannot_be_used_are_refused(tmp_path):
    noise, file = np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8), io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:-400])
    (tmp_path / "text.jpg").write_text("no image")
    Image.fromarray(np.zeros((6000, 9000), np.uint8)).save(tmp_path / "huge.png")
    for name, wrong in (
        ("cut.jpg", "cut off"),
        ("text.jpg", "expected a whole image"),
        ("huge.png", "pixels, got 9000x6000"),
    ):
        with pytest.raises(ValueError, match=wrong):
            read_image(tmp_path / name)
    for array in (noise.astype(float), noise[..., :2], noise[:0]):
        with pytest.raises(ValueError, match="uint8 RGB"):
            read_image(array, "image 1")


@pytest.mark.slow
def test_a_question_needs_no_library_of_training_or_scoring():
    words = "import sys, vistallm.api; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], check=True, capture_output=True, text=True)
    libraries = {"lightning", "torchmetrics", "matplotlib", "peft", "webdataset", "gradio", "pycocoevalcap"}
    assert not libraries & {*done.stdout.split()}


def test_neither_the_package_nor_reading_a_prompt_imports_torch():
    words = "import sys, vistallm, vistallm.evaluate.prompt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0
