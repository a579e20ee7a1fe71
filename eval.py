"""Evaluate: `python eval.py ckpt=RUN [benchmarks=[...]] [key=value ...]` or `python eval.py predictions=FILE.jsonl`.

Writes predictions.jsonl (before any score), scores.json, report.html and submission files (exports/) into run_dir=
(default: the run's own folder). A benchmark that can't be run or scored is told in a line, the others go on, and the
exit code is then 1.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from vistallm.coinit.shards import read_index
from vistallm.config import Config, apply_overrides, config_from_file, load_config, save_config
from vistallm.data.datamodule import MINI_ROOT, build_codec, data_root
from vistallm.evaluate import benchmarks as bench
from vistallm.evaluate.export import write_exports
from vistallm.evaluate.gallery import shown
from vistallm.evaluate.generate import Pace, generate_predictions, picked_images
from vistallm.evaluate.predictions import Faults, read_predictions, write_predictions
from vistallm.evaluate.report import write_report
from vistallm.model.checkpoint import find_checkpoint, load_run
from vistallm.schema import Prediction
from vistallm.train.run import quiet


def main(argv: list[str]) -> int:
    """Score a predictions file, or generate predictions with a checkpoint and score them; returns the exit code."""
    quiet()
    config = load_eval_config(argv)
    out = Path(str(config.run_dir))
    out.mkdir(parents=True, exist_ok=True)
    if config.ckpt is not None and not (out / "config.yaml").is_file():
        save_config(config, out / "config.yaml")  # scoring the file again then uses the same coordinates
    pace, faults = Pace(), Faults()
    known = bench.load_benchmarks()
    if config.predictions is None:
        predictions = generate(config, known, out, (pace, faults))
    else:
        predictions = read_predictions(Path(config.predictions), faults)
    malformed = bool(faults.found) and config.predictions is not None
    scores = bench.score(predictions, known, build_codec(config), faults)
    if not malformed:  # a file with lines that can't be read stays as it is, for its owner to look at
        write_predictions(predictions, out / "predictions.jsonl")
    run = {"checkpoint": config.ckpt or "none", "samples": len(predictions), **told(pace)}
    if faults.found:
        run["incomplete"] = ", ".join(filter(None, faults.found))
    bench.write_scores(scores, out / "scores.json", run)
    write_report(
        out / "report.html",
        scores,
        [prediction for prediction in predictions if prediction.benchmark in scores],
        picked_images(Path(config.data.root or MINI_ROOT), known, shown(predictions)),
        history=histories(config),
        run=run,
        config=(out / "config.yaml").read_text() if (out / "config.yaml").is_file() else "",
    )
    show(scores)
    export(known, scores, predictions, out / "exports")
    print(f"look at {out / 'report.html'}")
    for name, found in faults.found.items():
        for fault in found:
            state = "incomplete" if name in scores else "no score"
            print(f"eval.py: {name or 'no benchmark'}: {state}: {fault}", file=sys.stderr)
    return 1 if faults.found else 0


def show(scores: bench.Scores) -> None:
    """Print the headline of every benchmark."""
    for one in scores.values():
        value = one.scores[one.headline]
        result = "no sample counts" if value is None else f"{100 * value:6.1f}"
        hidden = f", {one.unlabelled} without a public answer" if one.unlabelled else ""
        print(f"{one.name:<26} {one.headline:<16} {result}   n {one.n}, unreadable {100 * one.unreadable:.1f}%{hidden}")


def export(known: dict[str, bench.Benchmark], scores: bench.Scores, predictions: list[Prediction], out: Path) -> None:
    """Write the submission files, and say which could not be written."""
    for name in scores:
        kind = known[name].export
        if kind is None:
            continue
        try:
            print(f"wrote {write_exports(out, kind, name, [p for p in predictions if p.benchmark == name])}")
        except ValueError as error:
            print(f"eval.py: no submission file of {name}: {error}", file=sys.stderr)


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


def generate(
    config: Config, known: dict[str, bench.Benchmark], out: Path, notes: tuple[Pace, Faults]
) -> list[Prediction]:
    """Generate and write predictions.jsonl, unscored; a benchmark that fails is added to the faults.

    Benchmarks that are asked for by name must be there; without names, those of `data.root` are run.
    """
    pace, faults = notes
    root = data_root(config) if config.data.root is None else Path(config.data.root)
    chosen = bench.select_benchmarks(known, config.benchmarks, config.data.name)
    absent = {name: why for name, one in chosen.items() if (why := missing(root, one)) is not None}
    if config.benchmarks is not None:
        for name, why in absent.items():
            faults.add(name, why)
    elif absent:
        print(f"{len(absent)} benchmark(s) have no data in {root} and are left out: {', '.join(absent)}")
    if len(absent) == len(chosen):
        raise ValueError(
            f"no benchmark to run, found none of {len(absent)}: {'; '.join(dict.fromkeys(absent.values()))}"
        )
    model, _, _ = load_run(str(config.ckpt), config)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    start, predictions = time.perf_counter(), list[Prediction]()
    for name, one in chosen.items():
        if name in absent:
            continue
        try:
            predictions += list(generate_predictions(model, config, root, {name: one}, pace))
        except ValueError as error:
            faults.add(name, str(error))
    write_predictions(predictions, out / "predictions.jsonl")
    print(f"{len(predictions)} answers in {time.perf_counter() - start:.0f} s")
    return predictions


def missing(root: Path, benchmark: bench.Benchmark) -> str | None:
    """Return what a benchmark's data lacks in `root`, or None when its shards hold samples of its task."""
    try:
        index = read_index(root / benchmark.shards)
    except ValueError as error:
        return str(error)
    tasks = index["tasks"].get(benchmark.split, {})
    if tasks.get(benchmark.task):
        return None
    had = ", ".join(tasks) or f"nothing; its splits are {', '.join(index['tasks'])}"
    return f"{root / benchmark.shards}: expected {benchmark.task} samples in split {benchmark.split}, it has {had}"


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
        "seconds per image": round(pace.seconds / pace.images, 4),
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
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"eval.py: {error}")
