"""tools/template_sensitivity.py: every template is asked once, and the table says which wording is worst and best."""

from __future__ import annotations

import doctest
import importlib.util
import json
from pathlib import Path

import pytest

from vistallm.schema import Parsed, Prediction
from vistallm.tasks import load_templates

TOOL = Path(__file__).parents[2] / "tools" / "template_sensitivity.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("template_sensitivity", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_dir(tiny_config, tmp_path_factory):
    from vistallm.train.run import train

    folder = tmp_path_factory.mktemp("runs") / "one"
    train(tiny_config(f"run_dir={folder}", "trainer.max_steps=1"))
    return folder


def test_every_template_is_answered(tool, run_dir, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = [f"ckpt={run_dir}", "benchmarks=[mini_pope,mini_rec]", "decode.max_new_tokens=4"]
    tool.main([*words, "--json", str(out)])
    record = json.loads(out.read_text())["benchmarks"]
    assert [row["text"] for row in record["mini_pope"]["rows"]] == list(load_templates("pope")[:9])
    assert len(record["mini_rec"]["rows"]) == 10
    assert {row["n"] for one in record.values() for row in one["rows"]} == {1}, "decode.limit of the run"
    assert capsys.readouterr().out.count("worst") >= 3


def test_the_table_tells_wordings_apart(tool, run_dir, tmp_path, monkeypatch, capsys):
    """A stand-in for the model that reads the prompt: right twice where it is asked to look at the image, else once."""

    def answers(model, config, root, benchmarks, pace):
        from vistallm.data.datamodule import build_sequencer, split_shards
        from vistallm.data.stream import RejectLog, evaluation_sequences

        builder = build_sequencer(config, model.vocabulary)
        rows = evaluation_sequences(split_shards(root, "test"), builder, "vqa", RejectLog(None, 1.0))
        for number, row in enumerate(rows):
            truth = row.sample.fields["answer"]
            said = truth if number == 0 or "Look at the image" in row.prompt else "nothing"
            target = {"regions": [], "answer": truth, "empty": False}
            parsed = Parsed("text", [], said)
            yield Prediction(row.sample.id, "mini_vqa", "vqa", row.prompt, said, parsed, None, [], target)

    monkeypatch.setattr(tool, "generate_predictions", answers)
    out = tmp_path / "out.json"
    tool.main([f"ckpt={run_dir}", "benchmarks=[mini_vqa]", "data.templates=5", "--json", str(out)])
    found = json.loads(out.read_text())["benchmarks"]["mini_vqa"]
    assert [row["score"] for row in found["rows"]] == [0.5, 0.5, 0.5, 1.0, 0.5]
    assert (found["fixed"], found["worst"], found["best"], found["best_template"]) == (0.5, 0.5, 1.0, 3)
    assert found["mean"] == pytest.approx(0.6)
    assert found["std"] == pytest.approx(0.05**0.5)
    assert found["best_text"] == "Look at the image. {question}"
    assert "60.00   22.36   50.00  100.00" in capsys.readouterr().out


def test_a_benchmark_without_a_score(tool):
    rows = [{"template": number, "text": "", "score": score} for number, score in enumerate((0.5, None))]
    assert set(tool.summarise(rows).values()) == {None}
    assert tool.summarise(rows[:1])["std"] == 0
    assert doctest.testmod(tool).failed == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.templates=many"], "expected a number, mini or null"),
        (["benchmarks=[mini_vqu]"], "nearest: mini_vqa"),
        (["decode.limitt=3"], "decode.limit"),
    ],
)
def test_errors(tool, run_dir, words, message):
    with pytest.raises(ValueError, match=message):
        tool.main([f"ckpt={run_dir}", *words])
