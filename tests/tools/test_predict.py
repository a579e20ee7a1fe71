"""tools/predict.py on the shipped model: one prompt, prompts from the terminal, a batch file; what is refused."""

import io
import json
import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest

from vistallm import VistaLLM

MODEL = str(Path(__file__).parents[2] / "assets/mini")


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(Path(__file__).parents[2] / "tools/predict.py"))["main"]


@pytest.fixture(scope="module")
def asked(samples, tmp_path_factory):
    """An image file, and a prompt about it."""
    sample, path = samples["res"][0], tmp_path_factory.mktemp("images") / "scene.png"
    cv2.imwrite(str(path), sample.pixels[0][:, :, ::-1])
    return str(path), f"Segment {sample.fields['expr']}."


@pytest.fixture(scope="module")
def answer(asked):
    return VistaLLM.from_pretrained(MODEL).predict(*asked)


def test_masks_and_overlay_are_of_the_answer(main, asked, answer, tmp_path, capsys):
    image, prompt = asked
    words = ["--out", str(tmp_path / "new/o.png"), "--masks", str(tmp_path / "masks")]
    main(["--ckpt", MODEL, "--image", image, "--prompt", prompt, *words])
    text, record, *written = capsys.readouterr().out.splitlines()
    assert text == answer.text
    assert json.loads(record) == answer.to_json()
    assert len(written) == 1 + len(answer.regions) == 2
    mask = cv2.imread(str(tmp_path / "masks/scene-0.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(mask, answer.regions[0].mask() * 255)
    assert (tmp_path / "new/o.png").is_file()


def test_prompts_from_the_terminal(main, asked, answer, capsys, monkeypatch):
    image, prompt = asked
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{prompt}\nWhat is at {{point:-1,2}}?\n\nnot read\n"))
    main(["--ckpt", MODEL, "--image", image])
    text, record, wrong = capsys.readouterr().out.splitlines()
    assert (text, json.loads(record)) == (answer.text, answer.to_json())
    assert "not inside image 1" in wrong


def test_a_batch_file_is_answered_line_by_line(main, asked, answer, tmp_path, capsys):
    image, prompt = asked
    Path(tmp_path / "scene.png").write_bytes(Path(image).read_bytes())
    rows = [
        {"images": ["scene.png"], "prompt": prompt, "id": 7},
        {"images": ["gone.png"], "prompt": prompt},
        {"images": ["scene.png"], "prompt": "How many objects are there?", "task": "vqa"},
        {"prompt": prompt},
    ]
    path, out = tmp_path / "ask.jsonl", tmp_path / "out/answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n")
    with pytest.raises(ValueError, match="3 of 5 lines have no answer"):
        main(["--ckpt", MODEL, "--batch", str(path), "--out", str(out)])
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [("answer" in row, "error" in row) for row in made] == [
        (True, False),
        (False, True),
        (True, False),
        (False, True),
        (False, True),
    ]
    assert made[0]["id"] == 7
    assert made[0]["answer"]["regions"] == answer.to_json()["regions"]
    assert made[2]["answer"]["kind"] == "text"
    assert "gone.png" in made[1]["error"]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--prompt", " "], "expected a prompt"),
        (["--prompt", "x", "--out", "o.xyz"], "--out"),
        (["--prompt", "x", "--task", "ress"], "res, grec"),
        (["--prompt", "x", "--link", "vqa"], "links answer"),
        (["--prompt", "{mask:1}"], "can't be read"),
        (["--prompt", "x"], "--ckpt unused: expected a run folder"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_model_loads(main, asked, words, wrong):
    with pytest.raises(ValueError, match=wrong):
        main(["--ckpt", "unused", "--image", asked[0], *words])


def test_a_batch_needs_the_name_of_its_answers(main, tmp_path):
    for words in (["--out", "o.png"], [], ["--out", "o.jsonl", "--task", "res"]):
        with pytest.raises(ValueError, match="--batch"):
            main(["--ckpt", "unused", "--batch", __file__, *words])
