"""The commands as a user types them: train both stages, evaluate, score a file again, predict; and bad input."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import lightning as L
import numpy as np
import pytest
import torch

from vistallm.config import config_from_file
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.build import build_model

ROOT = Path(__file__).parents[1]
STEPS = ["model=mini", "trainer.max_steps=3", "checkpoint.every_n_steps=2"]
PROMPT = "Can you segment the red circle in this picture?"


def call(*words):
    """Run a command in a process of its own."""
    words = [str(word) for word in words]
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def call_here(capfd, monkeypatch):
    """Callable: run a command in this process, which is quicker; its exit code (or text) and what it prints."""

    def run(script, *words):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as left:
            code = left.code
        return SimpleNamespace(returncode=code or 0, **capfd.readouterr()._asdict())

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def images(runs):
    paths = [runs / "a.jpg", runs / "b.png"]
    for number, path in enumerate(paths):
        cv2.imwrite(str(path), np.full((60 + 30 * number, 90, 3), 100, np.uint8))
    return paths


@pytest.fixture(scope="module")
def stage_one(runs, tiny_words, mini_root):
    done = call("train.py", "stage=1", *STEPS, *tiny_words, f"data.root={mini_root}", f"run_dir={runs / 'one'}")
    assert done.returncode == 0, done.stderr
    return runs / "one", done


@pytest.fixture(scope="module")
def stage_two(runs, stage_one, tiny_words, mini_root):
    words = [f"data.root={mini_root}", f"run_dir={runs / 'two'}", f"ckpt={stage_one[0]}", "data.workers=1"]
    words.append("train.decoder=frozen")
    done = call("train.py", "stage=2", *STEPS, *tiny_words, *words)
    assert done.returncode == 0, done.stderr
    return runs / "two", done


@pytest.fixture(scope="module")
def evaluation(runs, stage_two):
    done = call(
        "eval.py", f"ckpt={stage_two[0]}", f"run_dir={runs / 'eval'}", "benchmarks=[mini_res,mini_pope,mini_nlvr2]"
    )
    assert done.returncode == 0, done.stderr
    return runs / "eval", done


@pytest.mark.slow
def test_training_says_what_trains_and_writes_its_files(stage_one, stage_two):
    for folder, done in (stage_one, stage_two):
        assert "parameters train" in done.stdout
        for name in ("config.yaml", "metrics.csv", "checkpoints/step-000003.ckpt", "vocabulary/vocabulary.json"):
            assert (folder / name).is_file(), name
        assert len((folder / "metrics.csv").read_text().splitlines()) == 4
    assert f"from {stage_one[0]}/checkpoints/step-000003.ckpt" in stage_two[1].stdout


@pytest.mark.slow
def test_stage_two_starts_from_what_stage_one_trained(stage_one, stage_two):
    one, two = (
        torch.load(folder / "checkpoints" / "step-000003.ckpt", weights_only=True)["state_dict"]
        for folder, _ in (stage_one, stage_two)
    )
    config = config_from_file(stage_one[0] / "config.yaml")
    L.seed_everything(config.seed, verbose=False)
    seeded = build_model(config, Vocabulary.load(stage_one[0] / "vocabulary")).state_dict()
    decoder, encoder = ([key for key in seeded if key.startswith(part)] for part in ("decoder.", "encoder."))
    assert all(torch.equal(one[f"model.{key}"], seeded[key]) for key in encoder), (
        "the seed gives the start of stage one"
    )
    assert not any(torch.equal(one[f"model.{key}"], seeded[key]) for key in decoder), "stage one trains all of it"
    assert all(torch.equal(one[f"model.{key}"], two[f"model.{key}"]) for key in decoder), "frozen in stage two"


@pytest.mark.slow
def test_evaluation_writes_predictions_scores_and_report(evaluation):
    folder, done = evaluation
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["benchmark"] for line in lines] == ["mini_res", "mini_pope", "mini_nlvr2"], "decode.limit=1"
    scores = json.loads((folder / "scores.json").read_text())
    for name in ("mini_res", "mini_pope", "mini_nlvr2"):
        assert name in json.dumps(scores)
        assert name in done.stdout
    assert "<html" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_predictions_file_gives_the_same_scores(evaluation, runs, call_here):
    folder, _ = evaluation
    done = call_here("eval.py", f"predictions={folder / 'predictions.jsonl'}", f"run_dir={runs / 'again'}")
    assert done.returncode == 0, done.err
    one, two = (json.loads((f / "scores.json").read_text()) for f in (folder, runs / "again"))
    one.pop("run", None), two.pop("run", None)
    assert one == two
    assert (runs / "again" / "report.html").is_file()


@pytest.mark.slow
def test_a_predictions_file_needs_no_run(evaluation, runs, call_here):
    folder, _ = evaluation
    alone = runs / "alone"
    alone.mkdir()
    for name in ("predictions.jsonl", "config.yaml"):
        shutil.copy(folder / name, alone / name)
    config = (alone / "config.yaml").read_text()
    (alone / "config.yaml").write_text(re.sub(r"^ckpt: .*$", "ckpt: gone/stage2", config, flags=re.MULTILINE))
    done = call_here("eval.py", f"predictions={alone / 'predictions.jsonl'}")
    assert done.returncode == 0, done.err
    one, two = (json.loads((f / "scores.json").read_text())["benchmarks"] for f in (folder, alone))
    assert one == two


@pytest.mark.slow
def test_predict_saves_an_overlay(stage_two, images, runs):
    out = runs / "new" / "overlay.png"
    done = call("tools/predict.py", "--ckpt", stage_two[0], "--image", *images, "--prompt", PROMPT, "--save", out)
    assert done.returncode == 0, done.stderr
    overlay = cv2.imread(str(out))
    assert overlay.shape == (240, 360 + 8 + 240, 3)


@pytest.mark.slow
def test_an_exported_run_is_small_and_starts_another(stage_one, runs, images, tiny_words, mini_root, call_here):
    done = call_here("tools/export.py", "--ckpt", stage_one[0], "--out", runs / "exported")
    assert done.returncode == 0, done.err
    file = runs / "exported" / "model.safetensors"
    assert file.stat().st_size < (stage_one[0] / "checkpoints" / "step-000003.ckpt").stat().st_size / 2
    answers = [
        call_here("tools/predict.py", "--ckpt", ckpt, "--image", images[0], "--prompt", PROMPT)
        for ckpt in (runs / "exported", stage_one[0])
    ]
    assert [a.returncode for a in answers] == [0, 0], answers[0].err
    words = ["stage=2", *tiny_words, f"data.root={mini_root}", f"run_dir={runs / 'bins'}", f"ckpt={runs / 'exported'}"]
    wrong = call_here("train.py", *words, "num_bins=21")
    assert "num_bins=21" in wrong.returncode, "one line of text: the exit code is 1"


# -- bad input: one clear line, exit code 1, no traceback --------------------------------------------------------------


@pytest.fixture
def refuse(call_here):
    """Callable: run a command; the text it leaves with, which may be followed by a line for each bad key."""

    def run(script, *words):
        done = call_here(script, *words)
        assert isinstance(done.returncode, str), "a text goes to stderr, and the exit code is 1"
        assert all(line.startswith("  ") for line in done.returncode.splitlines()[1:]), done.returncode
        assert "Traceback" not in done.err
        assert done.returncode.startswith(Path(script).name)
        return done.returncode

    return run


def test_exit_code_and_stderr_of_a_refusal():
    done = call("train.py", "stage=1", "train.lrr=1")
    assert done.returncode == 1
    assert done.stderr == "train.py: unknown key 'train.lrr'; the nearest known one is 'train.lr'\n"


def test_unknown_keys(refuse, stage_one):
    assert "'seed'" in refuse("train.py", "sed=1")
    assert "'seed'" in refuse("eval.py", f"ckpt={stage_one[0]}", "sed=1")
    assert "expected key=value" in refuse("train.py", "--stage", "1")


def test_missing_and_empty_shard_folders(refuse, tmp_path, stage_one):
    assert "found none" in refuse("train.py", f"data.root={tmp_path / 'gone'}", f"run_dir={tmp_path / 'r'}")
    assert "found none" in refuse("train.py", f"data.root={tmp_path}", f"run_dir={tmp_path / 'r'}")
    assert "found none" in refuse("eval.py", f"ckpt={stage_one[0]}", f"data.root={tmp_path}", f"run_dir={tmp_path}")
    assert "give the shard folder" in refuse("train.py", "data=coinit", f"run_dir={tmp_path / 'r'}")


def test_checkpoints(refuse, tmp_path, stage_one, tiny_words, mini_root):
    words = [*STEPS, *tiny_words, f"data.root={mini_root}", f"run_dir={tmp_path / 'r'}"]
    assert "another model" in refuse("train.py", *words, "model.decoder.hidden_size=32", f"ckpt={stage_one[0]}")
    assert "found nothing there" in refuse("train.py", *words, f"ckpt={tmp_path / 'gone'}")
    assert "another model" in refuse("eval.py", f"ckpt={stage_one[0]}", "model.decoder.layers=1", f"run_dir={tmp_path}")
    assert "found nothing there" in refuse("eval.py", f"ckpt={tmp_path / 'gone'}")
    assert "got neither" in refuse("eval.py")
    assert "found nothing there" in refuse("tools/export.py", "--ckpt", tmp_path / "gone", "--out", tmp_path / "out")
    older = shutil.copytree(stage_one[0], tmp_path / "older")
    (older / "config.yaml").write_text((older / "config.yaml").read_text().replace("bin_sigma:", "bin_width:"))
    for command in (("eval.py", f"ckpt={older}"), ("tools/export.py", "--ckpt", older, "--out", tmp_path / "out")):
        assert "of another version? Change there: unknown key 'train.bin_width'" in refuse(*command)
    assert "expected strategy=fsdp, got auto" in refuse("train.py", *words, "train.cpu_offload=true")


def test_predictions_files(refuse, tmp_path):
    assert "no such file" in refuse("eval.py", f"predictions={tmp_path / 'gone.jsonl'}")
    for text in ("", "{", '{"id": "a"}\n', "[]\n"):
        (tmp_path / "p.jsonl").write_text(text)
        assert "p.jsonl" in refuse("eval.py", f"predictions={tmp_path / 'p.jsonl'}")


def test_unknown_benchmark(refuse, stage_one, tmp_path):
    assert "mini_rez" in refuse("eval.py", f"ckpt={stage_one[0]}", "benchmarks=[mini_rez]", f"run_dir={tmp_path}")


def test_predict_refuses_broken_images(refuse, stage_one, images, tmp_path):
    ask = ["tools/predict.py", "--ckpt", stage_one[0], "--prompt", PROMPT]
    assert "o such file" in refuse(*ask, "--image", tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no image")
    assert "expected a whole image" in refuse(*ask, "--image", tmp_path / "text.png")
    whole = images[0].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert "cut off" in refuse(*ask, "--image", tmp_path / "cut.jpg")
    assert "found nothing there" in refuse(
        "tools/predict.py", "--ckpt", tmp_path / "x", "--image", images[0], "--prompt", PROMPT
    )


@pytest.mark.parametrize(
    "region",
    [
        "{point:4,5@3}",
        "{point:4,,5}",
        "{point:4,5@0}",
        "{box:a,b}",
        "{box:1,2,3}",
        "{point:91,5}",
        "{box:1,2,30,61}",
        "{box:9,9,9,20}",
    ],
)
def test_predict_refuses_regions_that_no_image_has(refuse, images, region):
    ask = ["tools/predict.py", "--ckpt", "unused", "--image", images[0], "--prompt"]
    assert "@k for image k" in refuse(*ask, f"What is at {region}?")


def test_predict_refuses_a_wrong_out_before_it_loads_anything(refuse, images, tmp_path):
    ask = ["tools/predict.py", "--ckpt", "unused", "--prompt", PROMPT, "--image", images[0], "--out"]
    assert "--out" in refuse(*ask, tmp_path / "o.xyz")
    (tmp_path / "file").write_text("")
    assert "File exists" in refuse(*ask, tmp_path / "file" / "o.png")
    assert "--out" in refuse(*ask, tmp_path)


def test_a_missing_image_in_a_shard_is_counted_and_too_many_stop_the_run(refuse, mini_root, tmp_path, tiny_words):

    root = shutil.copytree(mini_root, tmp_path / "mini")
    for path in root.glob("train-*.tar"):
        with tarfile.open(path) as old:
            kept = [(m, old.extractfile(m).read()) for m in old if not m.name.endswith((".0.jpg", ".0.png"))]
        with tarfile.open(path, "w") as new:
            for member, data in kept:
                new.addfile(member, io.BytesIO(data))
    said = refuse("train.py", *STEPS, *tiny_words, f"data.root={root}", f"run_dir={tmp_path / 'r'}")
    assert "missing-image" in said
    assert "rejects.jsonl" in said
    assert (tmp_path / "r" / "rejects.jsonl").is_file()
