"""The score of a checkpoint under every instruction template of a task: how much the wording of the prompt matters.

    python tools/template_sensitivity.py RUN [--benchmarks mini_res mini_vqa] [--templates N|mini|all] [--json OUT]
        [key=value ...]

Every benchmark is answered once per template (`decode.limit=200`: its first 200 samples) and scored by its headline.
A row gives the score of the fixed template that published scores use, then mean, standard deviation, lowest and highest
over all templates; `--json` also has every template's text and score. --templates defaults to those that the run drew
from in training (data.templates).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from vistallm.config import Config, apply_overrides, config_from_file
from vistallm.data.datamodule import data_root
from vistallm.evaluate.benchmarks import Benchmark, load_benchmarks, score, select_benchmarks
from vistallm.evaluate.generate import Pace, generate_predictions
from vistallm.model.checkpoint import find_checkpoint, load_run
from vistallm.model.vistallm import VistaLLM
from vistallm.tasks import TemplateRange, load_templates
from vistallm.train.run import quiet


def measure(model: VistaLLM, config: Config, root: Path, benchmark: Benchmark, number: int) -> dict[str, Any]:
    """Answer and score a benchmark with one template of its task; the scores are those of its headline."""
    config.decode.template = number
    predictions = list(generate_predictions(model, config, root, {benchmark.name: benchmark}, Pace()))
    found = score(predictions, {benchmark.name: benchmark})[benchmark.name]
    return {
        "template": number,
        "score": found.scores[found.headline],
        "unreadable": found.unreadable,
        "n": found.n,
        "headline": found.headline,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1), lowest and highest score of a benchmark's rows, and the fixed template's.

    Ties go to the lower number; a score of None (no sample counts) makes all of them None.

    >>> rows = [{"template": 0, "score": 0.5}, {"template": 1, "score": 0.7}, {"template": 2, "score": 0.3}]
    >>> {key: round(value, 3) for key, value in summarise(rows).items()}
    {'fixed': 0.5, 'mean': 0.5, 'std': 0.2, 'worst': 0.3, 'worst_template': 2, 'best': 0.7, 'best_template': 1}
    """
    names = ("fixed", "mean", "std", "worst", "worst_template", "best", "best_template")
    scores = [row["score"] for row in rows]
    if any(value is None for value in scores):
        return dict.fromkeys(names)
    worst, best = min(rows, key=lambda row: row["score"]), max(rows, key=lambda row: row["score"])
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    values = (scores[0], statistics.fmean(scores), spread, worst["score"], worst["template"])
    return dict(zip(names, (*values, best["score"], best["template"]), strict=True))


def told(name: str, found: dict[str, Any]) -> str:
    """One line of the table, scores in per cent, and the wording that is worst and best."""
    if found["mean"] is None:
        return f"{name:<18} no sample counts"
    numbers = "".join(f"{100 * found[key]:8.2f}" for key in ("fixed", "mean", "std", "worst", "best"))
    texts = [f"    {key:<6}{found[f'{key}_template']:>3}  {found[f'{key}_text']}" for key in ("worst", "best")]
    return "\n".join([f"{name:<18} {found['headline']:<16}{found['n']:>7}{len(found['rows']):>10}{numbers}", *texts])


def template_range(text: str) -> TemplateRange:
    """Read --templates: a number, "mini" or "all"; raises ValueError for anything else."""
    if text not in ("mini", "all") and not text.isdecimal():
        raise ValueError(f"--templates: expected a number, mini or all, got {text!r}")
    return None if text == "all" else "mini" if text == "mini" else int(text)


def main(argv: list[str]) -> None:
    """Measure, print a row as soon as it is there, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", help="run folder or checkpoint file")
    parser.add_argument("words", nargs="*", metavar="key=value", help="configuration, as for eval.py")
    parser.add_argument("--benchmarks", nargs="+", help="default: all of the run's data")
    parser.add_argument("--templates", metavar="N|mini|all", help="default: those of the run's training")
    parser.add_argument("--json", type=Path, help="write every template's score here")
    arguments = parser.parse_intermixed_args(argv)
    quiet()
    run = find_checkpoint(arguments.ckpt)[0]
    config = apply_overrides(config_from_file(run / "config.yaml"), [f"run_dir={run}", *arguments.words])
    config.data.templates = templates = template_range(arguments.templates or str(config.data.templates or "all"))
    chosen = select_benchmarks(load_benchmarks(), arguments.benchmarks, config.data.name)
    root = data_root(config)
    model = load_run(arguments.ckpt, config)[0].to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'benchmark':<18} {'score':<16}{'n':>7}{'templates':>10}   fixed    mean     std   worst    best")
    record: dict[str, Any] = {}
    for name, benchmark in chosen.items():
        texts = load_templates(benchmark.task, templates)
        rows = [measure(model, config, root, benchmark, number) for number in range(len(texts))]
        found = {"headline": rows[0]["headline"], "n": rows[0]["n"], **summarise(rows)}
        for key in ("worst", "best"):
            found[f"{key}_text"] = None if found["mean"] is None else texts[found[f"{key}_template"]]
        found["rows"] = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
        record[name] = found
        print(told(name, found), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"checkpoint": arguments.ckpt, "benchmarks": record}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"template_sensitivity.py: {error}")
