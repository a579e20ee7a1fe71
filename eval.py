"""Evaluate: `python eval.py ckpt=RUN [benchmarks=[...]] [key=value ...]` or `python eval.py predictions=FILE.jsonl`.

Writes predictions.jsonl (before any score), scores.json and report.html into run_dir= (default: the run's own folder).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from vistallm.config import Config, apply_overrides, config_from_file, load_config, save_config
from vistallm.data.datamodule import build_codec, data_root
from vistallm.evaluate import benchmarks as bench
from vistallm.evaluate.generate import Pace, generate_predictions
from vistallm.evaluate.report import write_report
from vistallm.schema import Prediction
from vistallm.train.checkpoint import find_checkpoint, load_run
from vistallm.train.run import quiet


def main(argv: list[str]) -> None:
    """Score a predictions file, or generate predictions with a checkpoint and score them."""
    quiet()
    config = load_eval_config(argv)
    out = Path(str(config.run_dir))
    out.mkdir(parents=True, exist_ok=True)
    if config.ckpt is not None and not (out / "config.yaml").is_file():
        save_config(config, out / "config.yaml")  # scoring the file again then uses the same coordinates
    pace = Pace()
    if config.predictions is None:
        chosen = bench.select_benchmarks(bench.load_benchmarks(), config.benchmarks, config.data.name)
        predictions = generate(config, chosen, out, pace)
    else:
        predictions = bench.read_predictions(Path(config.predictions))
        chosen = bench.load_benchmarks()
    scores = bench.score(predictions, chosen, build_codec(config))
    bench.write_predictions(predictions, out / "predictions.jsonl")
    run = {"checkpoint": config.ckpt or "none", "samples": len(predictions), **told(pace)}
    bench.write_scores(scores, out / "scores.json", run)
    write_report(
        out / "report.html",
        scores,
        predictions,
        pace.images,
        history=histories(config),
        run=run,
        config=(out / "config.yaml").read_text() if (out / "config.yaml").is_file() else "",
    )
    for one in scores.values():
        value = one.scores[one.headline]
        shown = "no sample counts" if value is None else f"{100 * value:6.1f}"
        print(f"{one.name:<18} {one.headline:<28} {shown}   n {one.n}, unreadable {100 * one.unreadable:.1f}%")
    print(f"look at {out / 'report.html'}")


def load_eval_config(argv: list[str]) -> Config:
    """The run's own configuration under `ckpt=`, else the defaults, with the words of `argv` on top.

    Results go beside the checkpoint or the predictions unless `argv` names a run_dir (a later word wins).
    """
    asked = load_config([word for word in argv if word.startswith(("ckpt=", "predictions="))])
    if asked.ckpt is not None:
        folder = find_checkpoint(asked.ckpt)[0]
        return apply_overrides(config_from_file(folder / "config.yaml"), [f"run_dir={folder}", *argv])
    if asked.predictions is None:
        raise ValueError("expected ckpt=RUN_OR_FILE or predictions=FILE.jsonl, got neither")
    path = Path(asked.predictions)
    if not path.is_file():
        raise ValueError(f"predictions={path}: no such file")
    own, words = path.parent / "config.yaml", [f"run_dir={path.parent}", *argv]
    return apply_overrides(config_from_file(own), words) if own.is_file() else load_config(words)


def generate(config: Config, chosen: dict[str, bench.Benchmark], out: Path, pace: Pace) -> list[Prediction]:
    """Generate and write predictions.jsonl, unscored."""
    root = data_root(config)
    model, _, _ = load_run(str(config.ckpt), config)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    predictions = list(generate_predictions(model, config, root, chosen, pace))
    bench.write_predictions(predictions, out / "predictions.jsonl")
    print(f"{len(predictions)} answers in {time.perf_counter() - start:.0f} s")
    return predictions


def told(pace: Pace) -> dict[str, object]:
    """Speed and rejects, for scores.json and the report."""
    if not pace.samples:
        return {}
    return {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "seconds of generation": round(pace.seconds, 1),
        "samples per second": round(pace.samples / pace.seconds, 1),
        "tokens per second": round(pace.tokens / pace.seconds, 1),
        "rejected samples": sum(pace.rejects.values()),
    }


def histories(config: Config) -> dict[str, Path]:
    """Label -> metrics.csv of the run and of the runs it started from, as far back as they are still on disk."""
    found: dict[str, Path] = {}
    ckpt = config.ckpt
    while ckpt is not None and Path(ckpt).exists():
        run_dir = find_checkpoint(ckpt)[0]
        run = config_from_file(run_dir / "config.yaml")
        found = {f"Stage {run.stage}": run_dir / "metrics.csv", **found}
        ckpt = run.ckpt if run.ckpt != ckpt else None
    return found


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"eval.py: {error}")
