"""Model + benchmark shards -> predictions: greedy, batched, with the fixed evaluation template of each task."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vistallm.coinit.tasks import find_task
from vistallm.config import Config
from vistallm.data.collate import collate
from vistallm.data.datamodule import build_sequencer, reject_log, split_shards
from vistallm.data.sequence import SequenceBuilder
from vistallm.data.stream import evaluation_sequences
from vistallm.evaluate.benchmarks import Benchmark
from vistallm.evaluate.grammar import RegionGrammar, Rule
from vistallm.evaluate.parse import read_answer
from vistallm.evaluate.targets import target_of
from vistallm.model.vistallm import VistaLLM
from vistallm.schema import Prediction, Sequence


@dataclass
class Pace:
    """What generation took: samples, new tokens and seconds (model time only); `images` for the report's gallery."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    images: dict[str, list[np.ndarray]] = field(default_factory=dict)
    rejects: dict[str, int] = field(default_factory=dict)


def answer_texts(
    model: VistaLLM, sequences: list[Sequence], max_new_tokens: int, grammar: RegionGrammar | None = None
) -> tuple[list[str], int]:
    """Return the greedy answer of each sequence, without end and padding tokens, and the number of tokens written.

    `grammar` is one made for these very sequences; None decodes freely.
    """
    device = model.bin_ids.device
    batch = collate(sequences, model.vocabulary, generation=True).to(device)
    with _autocast(device):
        ids = model.generate(batch, max_new_tokens, logits_processor=[grammar] if grammar else []).tolist()
    text = model.vocabulary.text
    written = [row[: row.index(text.eos_token_id)] if text.eos_token_id in row else row for row in ids]
    return [str(text.decode(row, skip_special_tokens=False)) for row in written], sum(len(row) + 1 for row in written)


def generate_predictions(
    model: VistaLLM, config: Config, root: Path, benchmarks: dict[str, Benchmark], pace: Pace
) -> Iterator[Prediction]:
    """Yield one prediction per sample of every benchmark, in order; `pace` is filled on the way.

    Raises:
        ValueError: a benchmark's shards are missing or hold no sample of its task.
    """
    builder = build_sequencer(config, model.vocabulary)
    for name, benchmark in benchmarks.items():
        rejects = reject_log(config)
        shards = split_shards(root / benchmark.shards, benchmark.split)
        rows = evaluation_sequences(shards, builder, benchmark.task, rejects, config.decode.limit)
        task = find_task(benchmark.task)
        # REC, RES and candidate questions have one target by definition; GREC, GRES and the rest none, one or several.
        rule = Rule(task.kind if task.kind != "text" else None, task.metric in ("box", "mask", "candidates"))
        bar, found = tqdm(desc=name, unit=" answers", leave=False), 0
        while sequences := list(islice(rows, config.decode.batch_size)):
            start = time.perf_counter()
            grammar = region_grammar(model, config, [rule] * len(sequences))
            texts, tokens = answer_texts(model, sequences, config.decode.max_new_tokens, grammar)
            pace.seconds += time.perf_counter() - start
            pace.tokens += tokens
            pace.samples += len(sequences)
            found += len(sequences)
            bar.update(len(sequences))
            for sequence, text in zip(sequences, texts, strict=True):
                pace.images[sequence.sample.id] = sequence.sample.pixels or []
                yield make_prediction(sequence, text, builder, name)
        bar.close()
        if not found:
            raise ValueError(
                f"{name}: {root / benchmark.shards} has no {benchmark.task} sample in split {benchmark.split}"
            )
        for reason, number in rejects.counts.items():
            pace.rejects[reason] = pace.rejects.get(reason, 0) + number


def region_grammar(model: VistaLLM, config: Config, rules: list[Rule]) -> RegionGrammar | None:
    """Return the grammar of a batch, or None under decode.grammar=false or coords=text."""
    if not config.decode.grammar or not model.vocabulary.region_tokens:
        return None
    return RegionGrammar(model.vocabulary, rules, config.points, config.decode.max_new_tokens)


def make_prediction(sequence: Sequence, text: str, builder: SequenceBuilder, benchmark: str) -> Prediction:
    """Read a generated text and set it beside its target."""
    sample = sequence.sample
    parsed, failure = read_answer(text, sequence.frames, builder.codec, find_task(sample.task))
    return Prediction(
        id=sample.id,
        benchmark=benchmark,
        task=sample.task,
        prompt=sequence.prompt,
        text=text,
        parsed=parsed,
        failure=failure,
        images=[{"width": image.width, "height": image.height} for image in sample.images],
        target=target_of(sample, sequence.answer),
    )


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 on an accelerator; the CPU decodes in fp32, where small matrices leave bf16 nothing to gain."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()
