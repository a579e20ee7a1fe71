"""Measure generation: speed by batch size, time outside the language model, cost of the grammar, what a batch changes.

    python tools/bench_generate.py --ckpt RUN --data DIR [--batches 1 8 32 100] [--samples 8] [--rounds 3] [--json OUT]
    python tools/bench_generate.py --ckpt RUN --data DIR --untrained 10000 [--batches 200] [--new-tokens 32]

The first takes `--samples` test samples of every task of a shard folder and answers them at every batch size, with and
without the grammar, in turn (`--rounds` times: medians are printed, so that what else the machine does hits all alike).
An answer "differs" when its text is not that of the first batch size. The second counts the unreadable answers of
models with the checkpoint's configuration and random weights.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vistallm.config import Config
from vistallm.data.datamodule import build_sequencer, reject_log, split_shards
from vistallm.data.sequence import Sequence
from vistallm.data.stream import evaluation_sequences
from vistallm.evaluate.generate import Answerer
from vistallm.evaluate.grammar import RegionGrammar
from vistallm.evaluate.parse import read_answer
from vistallm.model.build import build_model
from vistallm.model.checkpoint import load_run
from vistallm.model.vistallm import VistaLLM
from vistallm.tasks import TASKS
from vistallm.train.run import quiet

has_accelerator = functools.cache(torch.cuda.is_available)  # asking takes longer than a step of the grammar


def now() -> float:
    """Seconds, once the accelerator has done what it was given."""
    if has_accelerator():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return `call`, which then adds what each call took to `seconds`."""

    def call_timed(*arguments: Any, **options: Any) -> Any:
        start = now()
        result = call(*arguments, **options)
        seconds.append(now() - start)
        return result

    return call_timed


def batched(sequences: list[Sequence], size: int) -> Iterator[list[Sequence]]:
    """Yield the sequences in batches of at most `size`."""
    for start in range(0, len(sequences), size):
        yield sequences[start : start + size]


def take(config: Config, model: VistaLLM, root: Path, number: int) -> list[Sequence]:
    """Return the first `number` test sequences of every task there is."""
    builder, rejects = build_sequencer(config, model.vocabulary), reject_log(config)
    shards = split_shards(root, "test")
    found = [s for task in TASKS for s in evaluation_sequences(shards, builder, task, rejects, number)]
    if not found:
        raise ValueError(f"--data {root}: no test sample of a known task")
    return found


def pace(answerer: Answerer, sequences: list[Sequence], size: int, grammar: bool) -> dict[str, Any]:
    """Answer all sequences in batches of `size`; returns the answers, seconds, tokens, and where the seconds went."""
    steps: list[float] = []
    masks: list[float] = []
    decoder = answerer.model.decoder
    start = now()
    with (
        patch.object(answerer.config.decode, "grammar", grammar),
        patch.object(decoder, "forward", timed(decoder.forward, steps)),
        patch.object(RegionGrammar, "__call__", timed(RegionGrammar.__call__, masks)),
    ):
        answers = [answer for batch in batched(sequences, size) for answer in answerer.answer(batch)]
    seconds = now() - start
    return {
        "texts": [answer.text for answer in answers],
        "samples per second": len(answers) / seconds,
        "tokens per second": sum(answer.tokens for answer in answers) / seconds,
        "seconds per step": seconds / len(steps),
        "outside the language model": 1 - sum(steps) / seconds,
        "in the grammar": sum(masks) / seconds,
    }


def compare(answerer: Answerer, sequences: list[Sequence], sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Return one row per batch size: medians over the rounds, and the share of answers that differ."""
    answerer.answer(sequences[: sizes[-1]])  # the first run allocates
    runs = [
        {(size, on): pace(answerer, sequences, size, on) for size, on in itertools.product(sizes, (True, False))}
        for _ in range(rounds)
    ]
    rows = []
    for size in sizes:
        on = [run[size, True] for run in runs]
        row = {name: statistics.median(one[name] for one in on) for name in on[0] if name != "texts"}
        ratios = [run[size, True]["seconds per step"] / run[size, False]["seconds per step"] for run in runs]
        first, texts = runs[0][sizes[0], True]["texts"], on[0]["texts"]
        changed = Counter(s.sample.task for s, a, b in zip(sequences, first, texts, strict=True) if a != b)
        row |= {"grammar on / off": statistics.median(ratios), "differ": sum(changed.values()) / len(texts)}
        rows.append({"batch": size, **row, "differ by task": dict(changed)})
    return rows


def unreadable(answerer: Answerer, sequences: list[Sequence], size: int, number: int) -> Counter[str]:
    """Count how `number` answers of models with random weights fail to be read, a new model for every pass."""
    config, vocabulary = answerer.config, answerer.model.vocabulary
    builder, failures = build_sequencer(config, vocabulary), Counter[str]()
    for seed in itertools.count():
        left = number - failures.total()
        if not left:
            break
        torch.manual_seed(seed)
        model = build_model(config, vocabulary).to(answerer.model.bin_ids.device).eval()
        for parameter in model.decoder.parameters():  # answers that vary, instead of one token over and over
            if parameter.ndim > 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        random = Answerer(model, config)
        for batch in batched(sequences[:left], size):
            for sequence, answer in zip(batch, random.answer(batch), strict=True):
                task = TASKS[sequence.sample.task]
                failures[read_answer(answer.text, sequence.letterboxes, builder.codec, task)[1] or "readable"] += 1
    return failures


def main(argv: list[str]) -> None:
    """Print a table, or the counts, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder or checkpoint file")
    parser.add_argument("--data", type=Path, required=True, help="shard folder with a test split")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 100])
    parser.add_argument("--samples", type=int, default=8, help="of every task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--untrained", type=int, help="answers of random models to read instead")
    parser.add_argument("--new-tokens", type=int, help="instead of decode.max_new_tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    quiet()
    model, config, _ = load_run(arguments.ckpt)
    config.decode.max_new_tokens = arguments.new_tokens or config.decode.max_new_tokens
    answerer = Answerer(model.to("cuda" if has_accelerator() else "cpu"), config)
    if answerer.table is None:
        raise ValueError(f"--ckpt {arguments.ckpt}: the grammar needs coords=tokens, got coords={config.coords}")
    sequences = take(config, model, arguments.data, arguments.samples)
    if arguments.untrained is not None:
        result: Any = dict(unreadable(answerer, sequences, arguments.batches[-1], arguments.untrained))
        print(f"{sum(result.values())} answers of random models: {result}")
    else:
        result = compare(answerer, sequences, arguments.batches, arguments.rounds)
        for row in result:
            print("   ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench_generate.py: {error}")
