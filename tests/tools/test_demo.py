"""tools/demo.py: uploads that a public page gets, records of an answer, and the page in a real headless browser."""

import io
import json
import os
import re
import runpy
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from vistallm.regions.masks import mask_to_rle, polygons_to_mask, rle_to_mask
from vistallm.regions.overlay import draw_strip
from vistallm.schema import Region

ROOT = Path(__file__).parents[2]
NASTY = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


@pytest.fixture(scope="module")
def demo():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tools/demo.py")))


def encode(pixels, kind="jpeg", **options):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


def photo(height=60, width=90):
    """Red at the top left, else grey."""
    pixels = np.full((height, width, 3), 120, np.uint8)
    pixels[: height // 2, : width // 2] = (220, 20, 20)
    return pixels


class Model:
    """Answers at once with a triangle, in one step by links and in two by text."""

    def __init__(self):
        self.model = SimpleNamespace(links=object())
        self.asked = []

    def stream(self, images, prompt, task, head):
        from vistallm.api import Answer, AnswerRegion

        self.asked.append((prompt, task, head))
        if "wrong" in prompt:
            raise ValueError(f"expected no {prompt}")
        corners = np.array([(10, 10), (50, 12.5), (30, 40)], np.float32)
        size = dict(zip(("height", "width"), images[0].shape, strict=False))
        shape = {"polygons": [corners]}
        if head == "link":
            shape = {"rle": mask_to_rle(polygons_to_mask([corners], *images[0].shape[:2]))}
        region = AnswerRegion(0, "mask", box=(10, 10, 50, 40), label=NASTY, confidence=0.75, **shape, **size)
        yield Answer(f"One{NASTY}", "")
        yield Answer(f"One{NASTY} [0]", "", "mask", [region], cut="long" in prompt)


def test_an_upload_is_decoded_upright_or_refused_in_one_line(demo):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    upright = demo.read_picture(encode(photo(), exif=exif, quality=95))
    assert upright.shape == (90, 60, 3)
    expected = np.rot90(photo(), -1)
    assert np.abs(upright.astype(int) - expected).mean() < 3
    clear = np.dstack([photo(), np.zeros((60, 90), np.uint8)])
    assert len(np.unique(demo.read_picture(encode(clear, "png")).reshape(-1, 3), axis=0)) == 1
    whole = encode(photo(400, 400) + np.random.default_rng(0).integers(0, 30, (400, 400, 3), np.uint8))
    for data in (b"", b"no image", whole[:200], whole[: len(whole) // 2], encode(photo(), "png")[:-40]):
        with pytest.raises(ValueError, match=r"^[^\n]*expected [^\n]*$"):
            demo.read_picture(data)


def test_a_header_of_too_many_pixels_is_refused_before_it_is_decoded(demo, monkeypatch):
    monkeypatch.setitem(demo.read_picture.__globals__, "DECODED", 5000)
    monkeypatch.setitem(demo.read_picture.__globals__, "decode_pixels", None)
    with pytest.raises(ValueError, match="got 90 x 60 pixels"):
        demo.read_picture(encode(photo()))


def test_large_images_are_shrunk_and_that_is_reported(demo, monkeypatch):
    monkeypatch.setitem(demo.read_picture.__globals__, "KEPT", 60 * 90 // 4)
    added = demo.Pictures().add(encode(photo()))
    assert (added["width"], added["height"], added["shrunk"]) == (45, 30, (90, 60))
    added = demo.Pictures().add(encode(photo(1, 9000), "png"))
    assert (added["width"], added["height"]) == (3486, 1)


def test_a_clip_becomes_evenly_spread_frames(demo, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 8, (64, 48))
    for number in range(24):
        writer.write(np.full((48, 64, 3), 10 * number, np.uint8))
    writer.release()
    data = (tmp_path / "clip.avi").read_bytes()
    frames = [demo.read_picture(one).mean() / 10 for one in demo.read_clip(data)]
    assert np.allclose(frames, range(1, 24, 3), atol=0.3)
    for wrong in (b"", b"no clip", data[:300]):
        with pytest.raises(ValueError, match="expected a"):
            demo.read_clip(wrong)


def test_the_oldest_uploads_go_and_examples_stay(demo, monkeypatch):
    data, pictures = encode(photo()), demo.Pictures()
    monkeypatch.setitem(demo.Pictures.add.__globals__, "HELD", 2 * len(data))
    fixed = pictures.add(data, fixed=True)["key"]
    keys = [pictures.add(data)["key"] for _ in range(3)]
    assert len(pictures.read([fixed, *keys[1:]])) == 3
    for wrong, message in (([keys[0]], "add it again"), (["x"], "add it again"), ([], "got 0"), ([fixed] * 9, "got 9")):
        with pytest.raises(ValueError, match=message):
            pictures.read(wrong)


def test_records_hold_what_the_page_draws_and_saves(demo):
    model, pictures = Model(), demo.Pictures()
    key = pictures.add(encode(photo()))["key"]
    first, last = demo.answer_records(model, pictures, [key], "Where?", "text", "res")
    assert model.asked == [("Where?", "res", "text")]
    assert (first["regions"], last["text"]) == ([], f"One{NASTY} [0]")
    (region,) = json.loads(json.dumps(last))["regions"]
    assert region["outline"] == "M10 10L50 12.5L30 40Z"
    assert (rle_to_mask(region["rle"]) == polygons_to_mask([np.array(region["polygons"][0])], 60, 90)).all()
    drawn = draw_strip(pictures.read([key] * 2), [Region.from_json(region)])
    assert drawn.shape == (60, 90 * 2 + 8, 3)
    assert np.abs(drawn[20, 30].astype(int) - drawn[20, 30 + 98]).max() > 20
    for question in ("wrong", "x" * 5000):
        assert "expected" in list(demo.answer_records(model, pictures, [key], question, "text", ""))[0]["error"]


@pytest.fixture(scope="module")
def served(demo):
    """A server of the page: its address and its model."""
    pytest.importorskip("gradio", reason="needs gradio: pip install -e .[demo]")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    model = Model()
    server = demo.make_server(model, "a model")
    _, address, _ = server.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield SimpleNamespace(address=address.rstrip("/"), model=model)
    server.get_blocks().close()


def send(address, body, kind="application/octet-stream"):
    """Post bytes: (status, reply)."""
    request = urllib.request.Request(address, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(address, key, question):
    """The whole answer, by gradio's own client."""
    from gradio_client import Client

    return Client(address, verbose=False).predict([key], question, "text", "", api_name="/ask")


@pytest.mark.slow
def test_limits_and_ten_users_at_once(served):
    assert served.address.startswith("http://127.0.0.1:")
    assert send(f"{served.address}/pictures", b"\xff\xd8" + bytes(33 << 20))[0] == 422
    assert send(f"{served.address}/pictures", encode(photo())[:300])[0] == 422
    pixels = np.full((6144, 8192, 3), 90, np.uint8)  # 50 megapixels
    status, (large,) = send(f"{served.address}/pictures", encode(pixels))
    assert (status, large["shrunk"]) == (200, [8192, 6144])
    assert "no frame" in send(f"{served.address}/pictures", encode(photo()), "video/mp4")[1]["error"]
    answers = {}

    def user(number):
        key = send(f"{served.address}/pictures", encode(photo()))[1][0]["key"]
        answers[number] = ask(served.address, key, f"Question {number}?")

    threads = [threading.Thread(target=user, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(answers) == list(range(10))
    assert all(len(answer["regions"]) == 1 for answer in answers.values())
    assert {question for question, *_ in served.model.asked} >= {f"Question {number}?" for number in range(10)}
    assert "add it again" in ask(served.address, "unknown", "Where?")["error"]


def downloaded(page, panel, name):
    with page.expect_download() as caught:
        panel.get_by_role("button", name=name, exact=True).click()
    return Path(caught.value.path()).read_bytes()


def put_question(page, text):
    page.locator("#prompt").focus()
    page.keyboard.press("Control+End")
    page.keyboard.insert_text(text)
    rounds = page.locator(".round").count()
    page.locator("#ask").click()
    page.locator(".round").nth(rounds).wait_for()
    page.locator("#ask:not([disabled])").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_page_in_a_browser(served, open_page, tmp_path, width):
    file = tmp_path / "a <b>photo<script>.png"
    file.write_bytes(encode(photo(), "png"))
    (tmp_path / "cut.jpg").write_bytes(encode(photo())[:300])
    page = open_page(width)
    loads = []
    page.on("request", lambda request: loads.append(request.url))
    page.goto(served.address)
    page.locator(".examples button").nth(1).click()
    assert page.locator("#stage svg").count() == 2
    assert page.locator("#task").input_value() == "attcoseg"
    page.locator("#clear").click()
    page.locator("#ask").click()
    assert "Add an image" in page.locator("#status").inner_text()
    page.locator("#files").set_input_files([file, tmp_path / "cut.jpg"])
    page.get_by_text("cut.jpg: expected a JPEG").or_(page.get_by_text("cut.jpg: the file: expected")).wait_for()
    assert file.name in page.locator("#stage figcaption").inner_text()

    # a point, a box and a scribble become chips of the prompt, in pixels of the image
    svg = page.locator("#stage svg")
    svg.scroll_into_view_if_needed()
    place = svg.bounding_box()
    scale = place["width"] / 90
    corners = [(place["x"] + x * scale, place["y"] + y * scale) for x, y in ((10, 20), (40, 50), (60, 30))]
    page.mouse.click(*corners[0])
    for tool in ("box", "scribble"):
        page.locator(f"[value={tool}]").check()
        svg.scroll_into_view_if_needed()
        assert svg.bounding_box() == place
        page.mouse.move(*corners[0])
        page.mouse.down()
        for corner in corners[1:] if tool == "scribble" else corners[1:2]:
            page.mouse.move(*corner, steps=4)
        page.mouse.up()
    assert page.locator(".chip").all_inner_texts() == ["point 1×", "box 2×", "scribble 3×"]
    assert page.locator("#stage .mark").count() == 3
    page.get_by_role("button", name="remove point 1").click()
    page.locator("#stage .mark.point").wait_for(state="detached")
    page.locator("#head").select_option("text link")
    put_question(page, f" long {NASTY}")
    (prompt, task, head), (_, _, linked) = served.model.asked[-2:]
    assert (task, head, linked) == (None, "text", "link")
    box, mask = re.fullmatch(r"\{box:([\d.,]+)\} \{mask:([\d.,]+)\} long <img.*script>", prompt).groups()
    assert np.allclose([float(v) for v in box.split(",")], (10, 20, 40, 50), atol=0.6)
    shown = polygons_to_mask([np.array(mask.split(","), float).reshape(-1, 2)], 60, 90)
    assert shown[20:23, 10:13].any()
    assert shown[48:52, 38:42].any()
    assert not shown[:15].any()

    # text and links side by side, each object on and off, nothing of a text is run
    panels = page.locator(".round .panel")
    assert panels.count() == 2
    assert f"One{NASTY} [0]" in panels.nth(0).inner_text()
    assert "75%" in panels.nth(1).inner_text()
    assert "limit of tokens" in panels.nth(0).inner_text()
    assert page.title() == "VistaLLM"
    lefts = [panels.nth(i).bounding_box()["x"] for i in (0, 1)]
    assert (lefts[0] < lefts[1]) == (width > 600)
    region = panels.nth(0).locator("path.region")
    assert region.is_visible()
    panels.nth(0).get_by_role("checkbox").uncheck()
    assert not region.is_visible()
    assert json.loads(downloaded(page, panels.nth(0), "JSON"))["regions"] == []

    # downloads
    (row,) = json.loads(downloaded(page, panels.nth(1), "COCO RLE"))["annotations"]
    expected = polygons_to_mask([np.array([(10, 10), (50, 12.5), (30, 40)])], 60, 90)
    assert (rle_to_mask(row["segmentation"]) == expected).all()
    assert (row["image_id"], row["bbox"], row["score"]) == (1, [10, 10, 40, 30], 0.75)
    saved = json.loads(downloaded(page, panels.nth(1), "JSON"))
    assert (saved["prompt"], saved["head"], saved["regions"][0]["label"]) == (prompt, "link", NASTY)
    pixels = [cv2.imdecode(np.frombuffer(downloaded(page, panels.nth(i), "PNG"), np.uint8), 1) for i in (0, 1)]
    assert [one.shape for one in pixels] == [(60, 90, 3)] * 2
    assert np.abs(pixels[0].astype(int) - pixels[1])[expected].mean() > 20

    # earlier rounds stay; an error is a line in its round; nothing is wider than the screen or loads from elsewhere
    page.locator("#head").select_option("text")
    put_question(page, " wrong")
    assert page.locator(".round").count() == 2
    assert "expected no" in page.locator(".round").nth(0).inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert all(load.startswith((served.address, "data:", "blob:")) for load in loads)
