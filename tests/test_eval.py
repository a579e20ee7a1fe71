"""eval.py as a command: a fault is told, the other benchmarks are scored, the exit code says so."""

import json

from vistallm.coinit.shards import write_index
from vistallm.evaluate import benchmarks as B
from vistallm.evaluate import run
from vistallm.evaluate.predictions import write_predictions
from vistallm.schema import Parsed, Prediction


def prediction(benchmark, answer, meta):
    task = B.load_benchmarks()[benchmark].task
    target = {"regions": [], "answer": answer, "empty": False, "meta": meta}
    images = [{"width": 9, "height": 9}]
    return Prediction("a", benchmark, task, "", "yes", Parsed("text", [], "yes"), None, images, target)


def test_a_benchmark_without_targets_is_told_and_the_others_are_scored(tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    rows = [prediction("vqav2_val", "yes", {"question_id": 5}), prediction("pope_random", "yes", {})]
    write_predictions(rows, path)
    assert run.run([f"predictions={path}"]) == 0
    assert json.loads((tmp_path / "exports" / "vqav2_val.json").read_text()) == [{"question_id": 5, "answer": "yes"}]
    rows[1].target["answer"] = ""
    write_predictions(rows, path)
    path.write_text(path.read_text() + '{"benchmark": "vcr_val", "id"\n')
    before = path.read_text()
    assert run.run([f"predictions={path}"]) == 1
    told = capsys.readouterr().err
    assert "pope_random: no score" in told
    assert "line 2: prediction a: its target's answer" in told
    assert "vcr_val: no score" in told
    assert "line 3" in told
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["benchmarks"]) == ["vqav2_val"]
    assert "pope_random" in scores["run"]["incomplete"]
    assert path.read_text() == before


def test_what_a_benchmark_lacks_is_said(tmp_path):
    known = B.load_benchmarks()
    assert "build_coinit" in run.missing(tmp_path, known["refcoco_val_res"])
    row = {"split": "test", "samples": 3, "bytes": 1, "sha256": "0", "tasks": {"res": 3}}
    write_index(tmp_path, {"test-000000.tar": row})
    assert run.missing(tmp_path, known["mini_res"]) is None
    assert "expected gres samples in split test, it has res" in run.missing(tmp_path, known["mini_gres"])
