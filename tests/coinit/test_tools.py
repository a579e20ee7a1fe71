"""The commands: build_coinit.py and view_samples.py, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import cv2
import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def run(tool, *arguments):
    return subprocess.run(
        [sys.executable, TOOLS / tool, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("tools") / "mini"
    done = run("build_coinit.py", "mini", "--out", out, "--train", 60, "--val", 15, "--test", 30, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "val 15, test 30 samples" in done.stdout
    return out


def test_check_counts_and_finds_faults(shards):
    done = run("build_coinit.py", "check", shards)
    assert done.returncode == 0
    assert "no fault" in done.stdout
    assert "attcoseg" in done.stdout
    stray = shards / "extra-000000.tar"
    stray.touch()
    done = run("build_coinit.py", "check", shards)
    stray.unlink()
    assert done.returncode == 1
    assert "FAULT extra-000000.tar: not in index.json" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--out", "x"], "expected one of mini"),
        (["mini"], "expected --out"),
        (["check"], "expected a folder"),
        (["check", "no-such-folder"], "which is not there"),
    ],
)
def test_user_faults_are_one_line(arguments, message):
    done = run("build_coinit.py", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_viewer_writes_sheet_and_page(shards, tmp_path):
    done = run("view_samples.py", shards, "--n", 15, "--out", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] > 1000
    done = run("view_samples.py", shards, "--task", "gres", "--n", 3, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 3
    assert 'src="http' not in page


@pytest.mark.parametrize(("flag", "value"), [("--task", "rez"), ("--split", "nope"), ("--out", "sheet.gif")])
def test_viewer_faults_are_one_line(shards, tmp_path, flag, value):
    out = tmp_path / value if flag == "--out" else tmp_path / "a.png"
    done = run("view_samples.py", shards, "--out", out, *([flag, value] if flag != "--out" else []))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_build_leaves_a_folder_of_other_files_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    done = run("build_coinit.py", "mini", "--out", tmp_path / "mine")
    assert done.returncode == 1
    assert "choose another folder" in done.stderr
