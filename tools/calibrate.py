"""Fit what a confidence is worth on validation answers, and write it beside the weights, where `VistaLLM` reads it.

    python tools/calibrate.py --ckpt RUN --root DIR [--benchmarks mini_res mini_rec mini_gres] [--out curve.png]

One benchmark of masks, one of boxes and one with samples that have no target, all answered on the validation split. A
logistic curve goes from the model's confidence to the chance of being right (IoU at least 0.5), or from its presence to
the chance that there is a target. Half of the answers fit it, the others measure the expected calibration error (ECE):
where it is larger behind the curve, the model's own values stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from vistallm.evaluate.benchmarks import load_benchmarks, score, select_benchmarks
from vistallm.evaluate.confidence import (
    RIGHT_FROM,
    answer_confidence,
    calibrate,
    calibration,
    fit_calibration,
    write_calibration,
)
from vistallm.evaluate.generate import Pace, generate_predictions
from vistallm.model.checkpoint import load_run
from vistallm.schema import Prediction

NAMES = {"mask": "mask", "box": "box", "masks": "presence", "boxes": "presence"}  # by metric


def pairs(predictions: list[Prediction], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (n,) float64 confidences, or presences, and (n,) bool: right, or a target is there."""
    if NAMES[metric] == "presence":
        rows = [(p.parsed.presence, not p.target["empty"]) for p in predictions if p.parsed]
    else:
        rows = [(answer_confidence(p), (p.score or 0) >= RIGHT_FROM[metric]) for p in predictions]
    known = [(sure, right) for sure, right in rows if sure is not None]
    return np.array([sure for sure, _ in known], float), np.array([right for _, right in known], bool)


def main(argv: list[str]) -> None:
    """Answer, fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint file or exported model")
    parser.add_argument("--root", type=Path, required=True, help="shard folder with a validation split")
    parser.add_argument("--benchmarks", nargs="+", default=["mini_res", "mini_rec", "mini_gres"])
    parser.add_argument("--split", default="val")
    parser.add_argument("--samples", type=int, default=400, help="of each benchmark")
    parser.add_argument("--out", type=Path, help="draw the curves into this picture")
    words = parser.parse_args(argv)
    known = select_benchmarks(load_benchmarks(), words.benchmarks, "")
    if wrong := [name for name, one in known.items() if one.metric not in NAMES or one.head != "text"]:
        raise ValueError(f"--benchmarks {', '.join(wrong)}: expected text answers of the metrics {', '.join(NAMES)}")
    chosen = {name: dataclasses.replace(one, split=words.split) for name, one in known.items()}
    model, config, checkpoint = load_run(words.ckpt)
    config.decode.limit, config.data.max_reject_share = words.samples, 1.0
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    predictions = list(generate_predictions(model, config, words.root, chosen, Pace()))
    score(predictions, chosen)
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    curves = {}
    for benchmark, one in chosen.items():
        sure, right = pairs([p for p in predictions if p.benchmark == benchmark], one.metric)
        name, half = NAMES[one.metric], np.arange(len(sure)) % 2 == 0
        slope, offset = fit_calibration(sure[half].tolist(), right[half].tolist())
        fitted = np.array([calibrate(value, slope, offset) for value in sure])
        before, after = (calibration(values[~half], right[~half])[3] for values in (sure, fitted))
        if after > before:  # the model's own values are better
            slope, offset, after, fitted = 1.0, 0.0, before, sure
        curves[name] = {"slope": slope, "offset": offset, "answers": len(sure), "ece": round(after, 4)}
        print(f"{name:<9} {len(sure)} answers, {right.mean():.1%} right, ECE {before:.1%} -> {after:.1%}")
        for values, style in (sure, ":"), (fitted, "-"):
            mean, share, count, _ = calibration(values[~half], right[~half])
            kept = count >= 5
            label = f"{name}, {'calibrated' if style == '-' else 'as generated'}"
            axes.plot(mean[kept], share[kept], style, marker="o", color=f"C{len(curves)}", label=label)
    print(write_calibration(checkpoint, curves))
    if words.out:
        axes.legend()
        figure.savefig(words.out, dpi=110)
        print(words.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"calibrate.py: {error}")
