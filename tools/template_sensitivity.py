"""The score of a checkpoint under every instruction template of a task: how much the wording of the prompt matters.

    python tools/template_sensitivity.py RUN [--benchmarks mini_res mini_vqa] [--templates N|mini|all] [--json OUT]
        [key=value ...]

Every benchmark is answered once per template (`decode.limit=200`: its first 200 samples) and scored by its headline.
A row gives the score of the fixed template that published scores use, then mean, standard deviation, lowest and highest
over all templates; `--json` also has every template's text and score.
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


def measure(model: VistaLLM, config: Config, root: Path, benchmark: Benchmark) -> dict[str, Any]:
    """Answer and score a benchmark with each of config's templates: headline, n, rows, and what `summarise` gives."""
    rows, one = [], {benchmark.name: benchmark}
    for number, text in enumerate(load_templates(benchmark.task, config.data.templates)):
        config.decode.template = number
        found = score(list(generate_predictions(model, config, root, one, Pace())), one)[benchmark.name]
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
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    summary = {"fixed": scores[0], "mean": statistics.fmean(scores), "std": spread}
    for key, extreme in (("worst", min), ("best", max)):
        row = extreme(rows, key=lambda row: row["score"])
        summary |= {key: row["score"], f"{key}_template": row["template"], f"{key}_text": row["text"]}
    return summary


def table_row(name: str, result: dict[str, Any]) -> str:
    """A benchmark's line of the table, scores in per cent, and the worst and best wording."""
    if result["mean"] is None:
        return f"{name:<18} no sample counts"
    numbers = "".join(f"{100 * result[key]:8.2f}" for key in ("fixed", "mean", "std", "worst", "best"))
    texts = [f"\n    {key:<6}{result[f'{key}_template']:>3}  {result[f'{key}_text']}" for key in ("worst", "best")]
    return f"{name:<18} {result['headline']:<16}{result['n']:>7}{len(result['rows']):>10}{numbers}" + "".join(texts)


def template_range(text: str) -> TemplateRange:
    """Read --templates: a number, "mini" or "all"; raises ValueError for anything else."""
    if text not in ("mini", "all") and not text.isdecimal():
        raise ValueError(f"--templates: expected a number, mini or all, got {text!r}")
    return None if text == "all" else "mini" if text == "mini" else int(text)


def main(argv: list[str]) -> None:
    """Measure, print a row as soon as it is there, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", help="run folder or checkpoint file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, as for eval.py")
    parser.add_argument("--benchmarks", nargs="+", help="default: all of the run's data")
    parser.add_argument("--templates", metavar="N|mini|all", help="default: those of the run's training")
    parser.add_argument("--json", type=Path, help="write every template's score here")
    arguments = parser.parse_intermixed_args(argv)
    quiet()
    run = find_checkpoint(arguments.ckpt)[0]
    config = apply_overrides(config_from_file(run / "config.yaml"), [f"run_dir={run}", *arguments.overrides])
    config.data.templates = template_range(arguments.templates or str(config.data.templates or "all"))
    chosen = select_benchmarks(load_benchmarks(), arguments.benchmarks, config.data.name)
    root = data_root(config)
    model = load_run(arguments.ckpt, config)[0].to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'benchmark':<18} {'score':<16}{'n':>7}{'templates':>10}   fixed    mean     std   worst    best")
    record: dict[str, Any] = {}
    for name, benchmark in chosen.items():
        record[name] = measure(model, config, root, benchmark)
        print(table_row(name, record[name]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"checkpoint": arguments.ckpt, "benchmarks": record}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"template_sensitivity.py: {error}")
