"""predictions.jsonl: the file scores as the run did; a line that can't be read costs its own benchmark only."""

import json

from vistallm.evaluate import benchmarks as B
from vistallm.evaluate import predictions as P

BENCHMARKS = B.load_benchmarks()


def test_scores_from_the_file_are_the_same(predictions, tmp_path):
    predictions[3].parsed, predictions[3].failure = None, "unclosed"
    path = tmp_path / "predictions.jsonl"
    P.write_predictions(predictions, path)
    read = P.read_predictions(path)
    P.write_predictions(read, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()
    assert B.score(read, BENCHMARKS) == B.score(predictions, BENCHMARKS)
    B.write_scores(B.score(read, BENCHMARKS), tmp_path / "scores.json", {"seconds": 1.5})
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["run"] == {"seconds": 1.5}
    assert record["benchmarks"]["mini_res"]["n"] == 10


def test_a_fault_costs_its_own_benchmark_only(predictions, tmp_path):
    P.write_predictions(predictions, tmp_path / "predictions.jsonl")
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    record = next(json.loads(line) for line in lines if '"benchmark": "mini_res"' in line)
    record["target"]["regions"] = []
    cut = next(i for i, line in enumerate(lines) if '"benchmark": "mini_pope"' in line)
    lines[cut] = lines[cut][: lines[cut].index('"text"')]
    lines = [
        json.dumps(record) if '"benchmark": "mini_res"' in line and record["id"] in line else line for line in lines
    ]
    (tmp_path / "predictions.jsonl").write_text("\n".join([*lines, "{"]))
    faults: dict[str, str] = {}
    read = P.read_predictions(tmp_path / "predictions.jsonl", faults)
    assert set(faults) == {"mini_pope", lines[-1].split('"benchmark": "')[1].split('"')[0]}
    assert f"line {cut + 1}:" in faults["mini_pope"]
    scores = B.score(read, BENCHMARKS, None, faults)
    assert "target has 0 region(s)" in faults["mini_res"]
    assert not set(scores) & set(faults)
    assert set(scores) | set(faults) == {p.benchmark for p in predictions}
