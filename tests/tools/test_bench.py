"""tools/bench.py: every sub-command prints what it measures beside its baseline, and MFU beside the planner."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(capsys, monkeypatch):
    """Callable: words -> what the tool prints."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = runpy.run_path(str(ROOT / "tools/bench.py"))

    def call(*words):
        tool["main"]([str(word) for word in words])
        return capsys.readouterr().out

    return call


def rows(text):
    """Name of a row -> its share of the first one."""
    found = re.findall(r"^  (.+?) +[\d,]+\.\d \w+/s +(\d+\.\d+) of the first row$", text, re.MULTILINE)
    return {name: float(share) for name, share in found}


def test_masks_metrics_and_builders(bench, tmp_path, monkeypatch):
    drawn = rows(bench("masks", "--rounds", 1, "--count", 4))
    assert {"findContours", "uniform", "curvature", "adaptive", "fillPoly", "polygons_to_rle", "rle_iou"} <= set(drawn)
    scores = rows(bench("metrics", "--rounds", 1, "--count", 8))
    assert list(scores) == ["pycocotools", "all scores, from the file"]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert list(rows(bench("builders", "--rounds", 1, "--samples", 8))) == ["file copy", "builder"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_loader(bench):
    text = bench("loader", "data.batch_size=8", "data.pool_batches=2", "--rounds", 1, "--samples", 20, "--per-image", 5)
    assert list(rows(text)) == ["read and decode in full", "loader"]


@pytest.mark.slow
def test_generate(bench, mini_root):
    words = ["--root", mini_root, "--rounds", 1, "--samples", 1, "--batches", 4, 8]
    text = bench("generate", "--ckpt", ROOT / "assets/mini", *words)
    assert text.count("transformers' generate") == text.count("free decoding") == text.count("grammar") == 2
    assert "answers in batches of 8" in text
    with pytest.raises(ValueError, match="is not there"):
        bench("generate", "--ckpt", ROOT / "assets/mini", "--root", mini_root / "absent")


@pytest.mark.slow
def test_train_prints_mfu(bench, tiny_words):
    own = ["steps=2", "warm=1", "tokens=24", "supervised=6", "instruction=5", "images=2"]
    text = bench("train", *tiny_words, *own, "train.decoder=lora", "model.decoder.lora_rank=2", "train.compile=eager")
    assert "4 samples of 24 tokens, 6 supervised, 8 images a step" in text
    assert re.search(r"MFU \d+\.\d% of that", text)
