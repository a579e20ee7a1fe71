"""Model + benchmark shards -> predictions: greedy, batched, with the fixed evaluation template of each task."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vistallm.coinit.shards import read_raw
from vistallm.config import Config
from vistallm.data.datamodule import build_sequencer, reject_log, split_shards
from vistallm.data.images import decode_sample
from vistallm.data.sequence import Sequence, SequenceBuilder, collate
from vistallm.data.stream import evaluation_sequences
from vistallm.evaluate.benchmarks import Benchmark
from vistallm.evaluate.confidence import TokenLog, set_confidence
from vistallm.evaluate.grammar import RegionGrammar, Rule, rule_of
from vistallm.evaluate.parse import read_answer
from vistallm.evaluate.token_table import TokenTable
from vistallm.metrics.targets import box_of
from vistallm.model.vistallm import VistaLLM
from vistallm.schema import Prediction, Sample
from vistallm.tasks import find_task


@dataclass
class Pace:
    """What generation took: samples, their images, new tokens and seconds (model time only); rejects by reason."""

    samples: int = 0
    images: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rejects: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text without end and padding tokens, the number of tokens written, its confidences.

    regions: one per region, in order; presence: see `vistallm.evaluate.confidence`; both empty under coords=text.
    """

    text: str
    tokens: int
    regions: list[float] = field(default_factory=list)
    presence: float | None = None


@dataclass
class Answerer:
    """Greedy answers of a model, by the region grammar (decode.grammar) where coordinates are tokens."""

    model: VistaLLM
    config: Config

    @functools.cached_property
    def table(self) -> TokenTable | None:
        """What the grammar knows of the vocabulary, None under coords=text."""
        return TokenTable.build(self.model.vocabulary) if self.model.vocabulary.region_tokens else None

    def answer(self, sequences: list[Sequence], rules: list[Rule] | None = None) -> list[Answer]:
        """Answer a batch; `rules`, one per row, default to those of the sequences' tasks."""
        device, decode, text, log = self.model.bin_ids.device, self.config.decode, self.model.vocabulary.lm, None
        if self.table is not None:
            rules = rules or [rule_of(sequence.sample) for sequence in sequences]
            grammar = RegionGrammar(self.table, rules, self.config.points, decode.max_new_tokens)
            log = TokenLog(self.table, grammar if decode.grammar else None)
        batch = collate(sequences, self.model.vocabulary, generation=True).to(device)
        # bf16 on an accelerator; the CPU decodes in fp32, where small matrices leave bf16 nothing to gain
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            ids = self.model.generate(batch, decode.max_new_tokens, logits_processor=[log] if log else []).tolist()
        rows = [row[: row.index(text.eos_token_id)] if text.eos_token_id in row else row for row in ids]
        texts = [str(text.decode(row, skip_special_tokens=False)) for row in rows]
        sure: list[tuple[list[float], float | None]] = log.read(rows) if log else [([], None)] * len(rows)
        return [Answer(said, len(row) + 1, *one) for said, row, one in zip(texts, rows, sure, strict=True)]


def generate_predictions(
    model: VistaLLM, config: Config, root: Path, benchmarks: dict[str, Benchmark], pace: Pace
) -> Iterator[Prediction]:
    """Yield one prediction per sample of every benchmark, in order; `pace` is filled on the way.

    Raises:
        ValueError: a benchmark's shards are missing or hold no sample of its task.
    """
    builder, answerer = build_sequencer(config, model.vocabulary), Answerer(model, config)
    for name, benchmark in benchmarks.items():
        rejects = reject_log(config)
        shards = split_shards(root / benchmark.shards, benchmark.split, benchmark.task)
        rows = evaluation_sequences(shards, builder, benchmark.task, rejects, config.decode.limit)
        bar, found = tqdm(desc=name, unit=" answers", leave=False), 0
        while sequences := list(islice(rows, config.decode.batch_size)):
            start = time.perf_counter()
            answers = answerer.answer(sequences)
            pace.seconds += time.perf_counter() - start
            pace.tokens += sum(answer.tokens for answer in answers)
            pace.samples += len(sequences)
            pace.images += sum(len(sequence.images) for sequence in sequences)
            found += len(sequences)
            bar.update(len(sequences))
            for sequence, answer in zip(sequences, answers, strict=True):
                yield make_prediction(sequence, answer, builder, name)
        bar.close()
        if not found:
            raise ValueError(
                f"{name}: {root / benchmark.shards} has no {benchmark.task} sample in split {benchmark.split}"
            )
        for reason, number in rejects.counts.items():
            pace.rejects[reason] = pace.rejects.get(reason, 0) + number


def make_prediction(sequence: Sequence, answer: Answer, builder: SequenceBuilder, benchmark: str) -> Prediction:
    """Read a generated answer and set it beside its target."""
    sample = sequence.sample
    parsed, failure = read_answer(answer.text, sequence.letterboxes, builder.codec, find_task(sample.task))
    if parsed is not None:
        set_confidence(parsed, answer.regions, answer.presence)
    return Prediction(
        id=sample.id,
        benchmark=benchmark,
        task=sample.task,
        prompt=sequence.prompt,
        text=answer.text,
        parsed=parsed,
        failure=failure,
        images=[{"width": image.width, "height": image.height} for image in sample.images],
        target=target_of(sample, sequence.answer),
    )


def target_of(sample: Sample, answer: str) -> dict[str, Any]:
    """Return the `target` of a sample's Prediction, JSON-ready; `answer` is its rendered answer text.

    {"regions": the regions the answer names, "answer", "empty": whether it names none (a text task: False), "meta": the
    sample's own plain values, and its `image_ids`}, with "candidates" (boxes, in order), "given" (regions that only the
    question names) and "answers" (references) where there are any.
    """
    task = find_task(sample.task)
    wanted = sample.fields.get("targets", [0]) if task.kind != "text" else []
    regions = [region.to_json() for number in wanted for region in sample.regions if region.object == number]
    target: dict[str, Any] = {
        "regions": regions,
        "answer": answer,
        "empty": task.kind != "text" and not wanted,
        "meta": {
            key: value
            for key, value in sample.meta.items()
            if isinstance(value, (bool, int, float, str)) or key == "image_ids"
        },
    }
    if task.metric == "candidates":
        target["candidates"] = [list(box_of(region)) for region in sample.regions]
    elif given := [region.to_json() for region in sample.regions if region.object not in wanted]:
        target["given"] = given
    if "answers" in sample.fields:
        target["answers"] = list(sample.fields["answers"])
    return target


def picked_images(
    root: Path, benchmarks: Mapping[str, Benchmark], predictions: Iterable[Prediction]
) -> dict[str, list[np.ndarray]]:
    """Read the images of `predictions` (those a gallery shows) from their shards, at the end: none is kept before.

    Returns:
        Prediction id -> its images, (H, W, 3) uint8 RGB; without those whose shards are not at hand.
    """
    wanted: dict[tuple[str, str], set[str]] = {}
    for one in predictions:
        if (benchmark := benchmarks.get(one.benchmark)) is not None:
            wanted.setdefault((benchmark.shards, benchmark.split), set()).add(one.id)
    found: dict[str, list[np.ndarray]] = {}
    for (folder, split), ids in wanted.items():
        with contextlib.suppress(ValueError):  # no such shards here: the page draws on a plain canvas
            raws = (raw for shard in split_shards(root / folder, split) for raw in read_raw(shard))
            for raw in raws:
                if ids <= found.keys():
                    break
                if raw.record and (key := raw.record.get("id")) in ids and key not in found:
                    found[key] = decode_sample(raw).pixels or []
    return found
