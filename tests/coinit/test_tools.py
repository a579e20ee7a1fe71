"""The commands: build_coinit.py and view_samples.py, as a user runs them."""

import importlib.util
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


@pytest.fixture
def build_coinit(capsys):
    """Callable: words -> (exit code, stdout, stderr) of build_coinit.py, run in this process."""
    spec = importlib.util.spec_from_file_location("build_coinit", TOOLS / "build_coinit.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*words):
        code = tool.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("tools") / "mini"
    done = run("build_coinit.py", "mini", "--out", out, "--train", 60, "--val", 15, "--test", 30, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "val 22, test 44 samples" in done.stdout
    return out


def test_check_counts_and_finds_faults(shards, build_coinit):
    code, text, _ = build_coinit("check", shards, "--workers", 1)
    assert code == 0
    assert "no fault" in text
    assert "attcoseg" in text
    stray = shards / "extra-000000.tar"
    stray.touch()
    code, text, _ = build_coinit("check", shards, "--workers", 1)
    stray.unlink()
    assert code == 1
    assert "FAULT unlisted-shard: 1\n" in text
    assert "extra-000000.tar: not in index.json" in text
    assert "1 fault(s) in" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--out", "x"], "expected one of mini"),
        (["mini"], "expected --out"),
        (["check"], "expected a folder"),
        (["check", "no-such-folder"], "which is not there"),
        (["eval-images", "no-such-folder"], "expected --out"),
        (["jsonl", "--out", "x"], "expected --root DIR and --split NAME"),
        (["jsonl", "--out", "x", "--root", "no-such-folder", "--split", "train"], "check --root and --split"),
    ],
)
def test_user_faults_are_one_line(arguments, message, build_coinit):
    code, _, errors = build_coinit(*arguments)
    assert code == 1
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.slow
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


def test_build_leaves_a_folder_of_other_files_alone(tmp_path, build_coinit):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    code, _, errors = build_coinit("mini", "--out", tmp_path / "mine")
    assert code == 1
    assert "choose another folder" in errors


def test_evaluation_images_are_listed_and_excluded(tmp_path, build_coinit):
    """Shards of two splits on the same images: refused by check, sound once the list is excluded."""
    root, data, ids = TOOLS.parent / "examples" / "custom", tmp_path / "data", tmp_path / "ids.txt"
    (tmp_path / "root").mkdir()
    lines = (root / "train.jsonl").read_text().splitlines()
    (tmp_path / "root" / "train.jsonl").write_text("\n".join(lines[:6]))
    (tmp_path / "root" / "test.jsonl").write_text(lines[1])  # a question on plate.jpg, which lines 1 and 3 show
    (tmp_path / "root" / "masks").symlink_to(root / "masks")
    words = ["jsonl", "--root", tmp_path / "root", "--images", root, "--workers", 1]
    assert build_coinit(*words, "--split", "test", "--out", data / "test")[0] == 0
    assert build_coinit(*words, "--split", "train", "--out", data / "leaky")[0] == 0
    code, text, _ = build_coinit("check", data / "leaky", data / "test", "--workers", 1)
    assert code == 1
    assert "FAULT leak: 1\n" in text
    assert build_coinit("eval-images", data / "leaky", data / "test", "--out", ids)[0] == 0
    assert ids.read_text() == "jsonl:images/plate.jpg\n"
    assert build_coinit("check", data / "leaky", "--exclude", ids)[0] == 1
    code, text, _ = build_coinit(*words, "--split", "train", "--out", data / "clean", "--exclude", ids)
    assert "train has 4 samples" in text
    assert "rejected excluded                2" in text
    assert build_coinit("check", data / "clean", data / "test", "--exclude", ids, "--workers", 1)[0] == 0
