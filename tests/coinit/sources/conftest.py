"""Sources are tested on small copies of their real files on disk, built and checked by the command that users run.

A test module of a source lists its made datasets in `MADE`: (source, split, write, *words), where
`write(root, picture)` writes the dataset's files under `root` and `words` are further arguments of the command, in
which `{root}` stands for that folder.
`test_train.py` finds every `MADE` and trains on them all.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

BUILD = Path(__file__).parents[3] / "tools" / "build_coinit.py"


def draw_picture(path, width=64, height=48):
    """Write an image of noise, of the format that the name says."""
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), np.uint8)
    assert cv2.imwrite(str(path), pixels)


@pytest.fixture(scope="session")
def picture():
    """Callable: path, width, height -> an image file there."""
    return draw_picture


@pytest.fixture(scope="session")
def command():
    """tools/build_coinit.py as a callable: words -> exit code."""
    spec = importlib.util.spec_from_file_location("build_coinit", BUILD)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return lambda *words: tool.main([str(word) for word in words])


@pytest.fixture
def build(tmp_path, picture, command, capsys):
    """Callable: source, split, write, *words -> its samples by id, after `check` found no fault; see also `rejects`."""
    from vistallm.coinit.shards import read_index, read_shard

    def run(source, split, write, *words):
        root, out = tmp_path / "root", tmp_path / "data" / source
        if not root.exists():
            write(root, picture)
        words = [word.format(root=root) for word in words]
        code = command(
            source, "--root", root, "--split", split, "--out", out, "--workers", 1, "--max-rejects", 1, *words
        )
        assert code == 0, capsys.readouterr().err
        assert command("check", out, "--workers", 1) == 0, capsys.readouterr().out
        shards = [name for name, row in read_index(out)["shards"].items() if row["split"] == split]
        run.root, run.out = root, out
        return {sample.id: sample for name in shards for sample, _ in read_shard(out / name)}

    return run


@pytest.fixture
def rejects(tmp_path):
    """Callable: source -> the rejects of its last build, as (reason, where)."""
    import json

    def read(source):
        lines = (tmp_path / "data" / source / "rejects.jsonl").read_text().splitlines()
        return [(record["reason"], record["where"]) for record in map(json.loads, lines)]

    return read


@pytest.fixture
def refusal(tmp_path, picture, command, capsys):
    """Callable: source, split, write, *words -> the message with which the build stops."""

    def run(source, split, write, *words):
        root = tmp_path / "refused"
        if not root.exists():
            write(root, picture)
        out, words = tmp_path / "refused-shards", [word.format(root=root) for word in words]
        assert (
            command(source, "--root", root, "--split", split, "--out", out, "--workers", 1, "--max-rejects", 1, *words)
            == 1
        )
        return capsys.readouterr().err

    return run
