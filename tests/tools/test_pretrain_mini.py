"""tools/pretrain_mini.py writes what `model.encoder.weights=` and `model.tokenizer.weights=` load."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vistallm.config import load_config
from vistallm.data.sequence import build_codec
from vistallm.data.vocabulary import Vocabulary
from vistallm.model.build import build_model

ROOT = Path(__file__).parents[2]


def pretrain(part, out, *words):
    command = [sys.executable, ROOT / "tools/pretrain_mini.py", part, "--steps", 2, "--batch", 2, "--out", out, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


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
