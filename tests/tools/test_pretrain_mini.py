"""tools/pretrain_mini.py writes what `model.encoder.weights=` and `model.tokenizer.weights=` load."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vistallm.config import load_config
from vistallm.data.sequence import build_codec
from vistallm.data.vocabulary import Vocabulary
from vistallm.mini.scene import COLOURS, HELD_OUT, SHAPES
from vistallm.model.build import build_model

ROOT = Path(__file__).parents[2]


def pretrain(part, out, *words):
    command = [sys.executable, ROOT / "tools/pretrain_mini.py", part, "--steps", 2, "--batch", 2, "--out", out, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_an_encoder_goes_on_near_its_former_tokens_with_shapes_in_unnamed_colours(tmp_path):
    out = tmp_path / "encoder.safetensors"
    done = pretrain(
        "encoder", out, "--init", ROOT / "assets/mini_encoder.safetensors", "--unnamed", 0.5, "--steps", 6, "--lr", 0.02
    )
    assert done.returncode == 0, done.stderr
    moved = [float(line.split("moved ")[1].split()[0]) for line in done.stdout.splitlines() if "moved" in line]
    assert moved[0] == 0 < moved[-1] < 0.1
    before, after = (load_file(path) for path in (ROOT / "assets/mini_encoder.safetensors", out))
    assert before.keys() == after.keys()


def test_unnamed_colours_never_show_a_held_out_pair():
    unnamed_colour = runpy.run_path(str(ROOT / "tools/pretrain_mini.py"), run_name="tool")["unnamed_colour"]
    rng, names = np.random.default_rng(0), list(COLOURS)
    for shape in SHAPES:
        drawn = np.array([unnamed_colour(rng, shape) for _ in range(200)])
        distance = np.abs(drawn[:, None] - np.array(list(COLOURS.values()))).sum(2)
        near = {names[i] for i in distance.argmin(1)[distance.min(1) < 30]}
        assert not {(shape, name) for name in near} & HELD_OUT
        assert len({names[i] for i in distance.argmin(1)}) >= 5


@pytest.mark.slow
def test_both_parts_are_written_and_load(tmp_path, mini_root):
    encoder, tokenizer = tmp_path / "encoder.safetensors", tmp_path / "tokenizer.safetensors"
    done = [pretrain("encoder", encoder), pretrain("tokenizer", tokenizer, "--root", mini_root)]
    for one in done:
        assert one.returncode == 0, one.stderr
        assert "step 1 " in one.stdout
        assert "box_error" in one.stdout
    words = [f"model.encoder.weights={encoder}", f"model.tokenizer.weights={tokenizer}"]
    models = []
    for chosen in (words, ["model.encoder.weights=", "model.tokenizer.weights="]):
        config = load_config(["model=mini", *chosen])
        torch.manual_seed(9)
        models.append(build_model(config, Vocabulary.build(config.model, build_codec(config))))
    one, two = (model.state_dict() for model in models)
    changed = {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])}
    assert changed == {"encoder", "tokenizer"}


def test_the_tokenizer_needs_a_set():
    done = pretrain("tokenizer", "unused")
    assert done.returncode == 2
    assert "required: --root" in done.stderr
