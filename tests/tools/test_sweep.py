from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path

import optuna
import pytest

from vistallm.ablation import runner as runner_module

spec = importlib.util.spec_from_file_location("sweep", Path(__file__).parents[2] / "tools" / "sweep.py")
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)

# The score has its top at a learning rate of 1e-3 and 16 points.
SCRIPT = """
import json, math, sys
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(words["run_dir"])
folder.mkdir(parents=True, exist_ok=True)
with open("calls.txt", "a") as calls:
    calls.write(Path(__file__).stem + "\\n")
if "ckpt" in words:
    words = dict(word.split("=", 1) for word in json.loads((Path(words["ckpt"]) / "words.json").read_text()))
    score = 1 - abs(math.log10(float(words["train.lr"])) + 3) / 10 - abs(int(words["points"]) - 16) / 100
    row = {"scores": {"miou": score}, "ceiling": None}
    (folder / "scores.json").write_text(json.dumps({"benchmarks": {"mini_res": row}}))
"""


def test_space():
    space, fixed = sweep.read_space(["train.lr=1e-4..1e-2:log", "train.warmup=0..0.5", "data.batch_size=8..16:int",
                                     "coords=tokens|text", "data.weights={rec: 1}", "run_dir=a..b"])  # fmt: skip
    assert fixed == ["data.weights={rec: 1}", "run_dir=a..b"]
    assert space["train.lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    assert space["train.warmup"] == optuna.distributions.FloatDistribution(0, 0.5)
    assert space["data.batch_size"] == optuna.distributions.IntDistribution(8, 16)
    assert space["coords"] == optuna.distributions.CategoricalDistribution(["tokens", "text"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["points=8"], "nothing to search"),
        (["train.lr=1e-2..1e-4"], "low < high"),
        (["train.lr=0..1e-4:log"], "above 0 for :log"),
        (["train.rl=1e-4..1e-2"], "unknown key 'train.rl'"),
    ],
)
def test_what_can_not_be_searched_is_told_before_anything_runs(words, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        sweep.main(["--metric", "mini_res.miou", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(ValueError, match="no benchmark 'mini_rez'"):
        sweep.main(["--metric", "mini_rez.miou", "--out", str(tmp_path / "out"), "points=8|16"])
    assert not (tmp_path / "out").exists()


def test_finds_the_top_and_goes_on(tmp_path, monkeypatch, capsys):
    for name in ("train.py", "eval.py"):
        (tmp_path / name).write_text(SCRIPT)
    monkeypatch.setattr(runner_module, "ROOT", tmp_path)
    words = ["train.lr=1e-5..1e-1:log", "points=8|16|32", "data.batch_size=4"]
    command = ["--metric", "mini_res.miou", "--out", str(tmp_path / "out"), "--jobs", "2", *words]
    sweep.main([*command, "--trials", "4"])
    assert (tmp_path / "calls.txt").read_text().split().count("train") == 4
    sweep.main([*command, "--trials", "14"])
    assert (tmp_path / "calls.txt").read_text().split().count("train") == 14, "the first four were kept"
    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").open()))
    scores = [float(row["mini_res.miou"]) for row in rows]
    assert len(scores) == 14
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.9
    assert re.search(r"best of 14: mini_res\.miou 0\.9\d+", capsys.readouterr().out)
    assert all("data.batch_size=4" in path.read_text() for path in (tmp_path / "out").rglob("words.json"))
