"""The score of a checkpoint under every instruction template of a task: how much the wording of the prompt matters.

    python tools/template_sensitivity.py ckpt=RUN [benchmarks=[mini_res,mini_vqa]] [key=value ...] [--json OUT]

The words are those of eval.py. Every benchmark is answered once per template (`data.templates=5`: the first five,
`decode.limit=200`: the first 200 samples) and scored by its headline. A row gives the score of the fixed template that
published scores use, then mean, standard deviation, lowest and highest score over all templates. `--json` also has the
text and score of every template.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from vistallm.config import Config
from vistallm.data.datamodule import build_sequencer
from vistallm.evaluate.benchmarks import Benchmark, load_benchmarks, score
from vistallm.evaluate.generate import Pace, generate_predictions
from vistallm.evaluate.predictions import Faults
from vistallm.evaluate.run import evaluation_config, find_data
from vistallm.model.checkpoint import load_run
from vistallm.model.vistallm import VistaLLM
from vistallm.tasks import load_templates
from vistallm.train.run import quiet


def measure(model: VistaLLM, config: Config, root: Path, benchmark: Benchmark) -> dict[str, Any]:
    """Answer and score a benchmark with each of config's templates: headline, n, rows, and what `summarise` gives."""
    rows = []
    templates = build_sequencer(config, model.vocabulary).templates
    for number, text in enumerate(load_templates(benchmark.task, templates)):
        config.decode.template = number
        answers = list(generate_predictions(model, config, root, {benchmark.name: benchmark}, Pace()))
        found = score(answers, {benchmark.name: benchmark})[benchmark.name]
        value, unreadable = found.scores[found.headline], found.unreadable
        rows.append({"template": number, "score": value, "unreadable": unreadable, "n": found.n, "text": text})
    return {"headline": found.headline, "n": found.n, **summarise(rows), "rows": rows}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1), lowest and highest score of a benchmark's rows, and the fixed template's.

    Ties go to the lower number; a score of None (no sample counts) makes all of them None.

    >>> rows = [{"template": i, "text": "", "score": score} for i, score in enumerate((0.5, 0.7, 0.3))]
    >>> {key: round(value, 3) for key, value in summarise(rows).items() if value != ""}
    {'fixed': 0.5, 'mean': 0.5, 'std': 0.2, 'worst': 0.3, 'worst_template': 2, 'best': 0.7, 'best_template': 1}
    """
    scores = [row["score"] for row in rows]
    if any(value is None for value in scores):
        return dict.fromkeys(("fixed", "mean", "std", "worst", "best"))
    summary = {"fixed": scores[0], "mean": statistics.fmean(scores)}
    summary["std"] = statistics.stdev(scores) if len(scores) > 1 else 0.0
    for key, extreme in (("worst", min), ("best", max)):
        row = extreme(rows, key=lambda row: row["score"])
        summary |= {key: row["score"], f"{key}_template": row["template"], f"{key}_text": row["text"]}
    return summary


def main(argv: list[str]) -> None:
    """Measure, print a row as soon as it is there, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="key=value", help="ckpt=RUN and more configuration, as for eval.py")
    parser.add_argument("--json", type=Path, help="write every template's score here")
    arguments = parser.parse_intermixed_args(argv)
    quiet()
    config = evaluation_config(arguments.words)
    root, chosen = find_data(config, load_benchmarks(), Faults())
    model = load_run(str(config.ckpt), config)[0].to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'benchmark':<18} {'score':<16}{'n':>7}{'templates':>10}   fixed    mean     std   worst    best")
    record: dict[str, Any] = {}
    for name, benchmark in chosen.items():
        found = record[name] = measure(model, config, root, benchmark)
        if found["mean"] is None:
            print(f"{name:<18} no sample counts", flush=True)
            continue
        numbers = "".join(f"{100 * found[key]:8.2f}" for key in ("fixed", "mean", "std", "worst", "best"))
        print(f"{name:<18} {found['headline']:<16}{found['n']:>7}{len(found['rows']):>10}{numbers}")
        for key in ("worst", "best"):
            print(f"    {key:<6}{found[f'{key}_template']:>3}  {found[f'{key}_text']}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"checkpoint": config.ckpt, "benchmarks": record}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"template_sensitivity.py: {error}")
