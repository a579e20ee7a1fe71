"""predictions.jsonl: the file scores as the run did; a line that can't be read costs its own benchmark only."""

import json

from vistallm.evaluate import benchmarks as B
from vistallm.evaluate import predictions as P

BENCHMARKS = B.load_benchmarks()


def test_scores_from_the_file_are_the_same(predictions, tmp_path):
    predictions[3].parsed, predictions[3].failure = None, "unclosed"
    path = tmp_path / "predictions.jsonl"
    P.write_predictions(predictions, path)
    read = P.read_predictions(path, P.Faults())
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
    faults = P.Faults()
    read = P.read_predictions(tmp_path / "predictions.jsonl", faults)
    assert set(faults.found) == {"mini_pope", ""}
    assert f"line {cut + 1}:" in faults.found["mini_pope"][0]
    scores = B.score(read, BENCHMARKS, None, faults)
    assert "target has 0 region(s)" in faults.found["mini_res"][0]
    assert "line " in faults.found["mini_res"][0]
    assert set(scores) == {p.benchmark for p in predictions}, "the rest of each benchmark is scored"
    incomplete = {name: (one.n, one.faults) for name, one in scores.items() if one.faults}
    assert incomplete == dict.fromkeys(("mini_pope", "mini_res"), (9, 1))


def test_every_fault_of_a_benchmark_is_named_and_blank_lines_are_not_one(predictions, tmp_path):
    chosen = sorted((p for p in predictions if p.task in ("res", "vqa")), key=lambda p: p.task)
    P.write_predictions([*chosen, chosen[0]], tmp_path / "p.jsonl")
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    lines[2], lines[4] = lines[2][:-9], lines[4].replace('"counts"', '"count"')
    lines[5:5] = ["", "  "]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    faults = P.Faults()
    read = P.read_predictions(tmp_path / "p.jsonl", faults)
    scores = B.score(read, BENCHMARKS, None, faults)
    numbers = [int(fault.split("line ")[1].split(":")[0]) for fault in faults.found["mini_res"]]
    assert sorted(numbers) == [3, 5, 23]
    assert {name: (one.n, one.faults) for name, one in scores.items()} == {"mini_res": (8, 3), "mini_vqa": (10, 0)}
