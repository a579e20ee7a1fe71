"""Model + benchmark shards -> predictions: greedy, batched, with the fixed evaluation template of each task."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from vistallm.coinit.frames import choose_frames
from vistallm.coinit.shards import RawSample, SampleReject, read_raw, split_shards
from vistallm.config import Config
from vistallm.data.images import decode_sample
from vistallm.data.sequence import Sequence, SequenceBuilder, build_sequencer, collate
from vistallm.data.stream import RejectLog, reject_log
from vistallm.evaluate.confidence import TokenLog, set_confidence
from vistallm.evaluate.grammar import AnswerGrammars, PooledBins, Role, Rule, rule_of
from vistallm.evaluate.links import read_link_answer
from vistallm.links.decoder import LinkAnswer
from vistallm.model.vistallm import VistaLLM
from vistallm.regions.codec import RegionCodec, RegionParseError
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import box_of
from vistallm.regions.tracks import fill_tracks
from vistallm.schema import Parsed, Prediction, Region, Sample
from vistallm.tasks import Task, find_task
from vistallm.tasks.answers import read_words

if TYPE_CHECKING:  # it brings torchmetrics, which an answer does not need
    from vistallm.evaluate.benchmarks import Benchmark

WINDOW = 4  # batches of samples that are read together, so that prompts of like length share a batch
ONE_REGION = ("box", "candidates")  # metrics of tasks whose answer is one region
Pace = Counter[str]  # of generation: samples, rejected ones, images, new tokens, milliseconds


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text without end and padding tokens, the number of tokens written, its confidences.

    cut: it had to end at the limit. regions: one confidence per region, in order; presence: see
    `vistallm.evaluate.confidence`; both empty under coords=text. links: what each link found, in order.
    """

    text: str
    tokens: int
    cut: bool
    regions: list[float] = field(default_factory=list)
    presence: float | None = None
    links: list[LinkAnswer] = field(default_factory=list)
    forced: bool = False  # the text is the true answer's


@dataclass(frozen=True)
class Unit:
    """The piece of work that one process does as a whole: a window of a benchmark's samples, numbered from 0."""

    benchmark: Benchmark
    number: int
    raws: list[RawSample] = field(default_factory=list)


@dataclass
class Answerer:
    """Answers of a model, by the grammar of its task (decode.grammar).

    sharded: the model's weights are shared out (FSDP), so all processes answer batches in step. forced: links are read
    behind the true answer's text. half: whether to compute in bf16; None = on an accelerator (on the CPU, small
    matrices leave bf16 nothing to gain).
    """

    model: VistaLLM
    config: Config
    sharded: bool = False
    forced: bool = False
    half: bool | None = None

    @functools.cached_property
    def grammars(self) -> AnswerGrammars:
        """The compiled grammars of this model's answers."""
        return AnswerGrammars(self.model.vocabulary, self.config.points, self.config.decode.max_new_tokens)

    @functools.cached_property
    def builder(self) -> SequenceBuilder:
        """Builds sequences of any length: `data.max_length` is for prompts here, the target's own length is free."""
        return replace(build_sequencer(self.config, self.model.vocabulary), max_length=sys.maxsize)

    def answer(
        self,
        sequences: list[Sequence],
        rules: list[Rule] | None = None,
        temperature: float = 0.0,
        watch: Callable[[Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer a batch, greedily or, at a temperature above 0, by sampling; `rules` default to those of the tasks.

        `watch` gets the answer to a batch of one as it grows, by a word or by a whole region.
        """
        text, decode = self.model.vocabulary.lm, self.config.decode
        if self.forced:
            return self._answer_forced(sequences)
        every = self.builder.codec.keyframes
        grammar = self.grammars.constrain(rules or [rule_of(one.sample, one.head, every) for one in sequences])
        log = TokenLog(self.grammars.roles, grammar if decode.grammar else None)
        processors: list[LogitsProcessor] = [log, *([Watch(log, text, watch)] if watch else ())]
        if decode.grammar and temperature == 0:
            processors.append(PooledBins(self.grammars.roles))
        limit, lengths = grammar.limit, [one.length for one in grammar.grammars]
        if not decode.grammar:
            limit = decode.max_new_tokens or limit
            lengths = [limit] * len(sequences)
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with self._precision():
            batch = collate(sequences, self.model.vocabulary, generation=True).to(self.model.bin_ids.device)
            options = sampled if temperature > 0 else {}
            made = self.model.generate(batch, limit, processors, synced_gpus=self.sharded, **options)
        ids, end = made.ids.tolist(), text.eos_token_id
        rows = [row[: row.index(end)] if end in row else row for row in ids]
        return [
            Answer(str(text.decode(row, skip_special_tokens=False)), len(row) + 1, len(row) >= length, *sure, links)
            for row, length, sure, links in zip(rows, lengths, log.read(rows), made.links, strict=True)
        ]

    def answer_all(
        self, sequences: list[Sequence], rules: list[Rule] | None = None, temperature: float = 0.0
    ) -> list[Answer]:
        """Answer any number of sequences, in their order, in batches of decode.batch_size.

        A batch holds the questions about the same images, which the encoder then reads once, and prompts of like
        length.
        """
        size, answers = self.config.decode.batch_size, dict[int, Answer]()
        images = [zlib.crc32(sequence.images.numpy().tobytes()) for sequence in sequences]
        longest = dict[int, int]()
        for key, sequence in zip(images, sequences, strict=True):
            longest[key] = max(longest.get(key, 0), sequence.prompt_length)
        order = sorted(range(len(sequences)), key=lambda i: (longest[images[i]], images[i], sequences[i].prompt_length))
        for rows in (order[first : first + size] for first in range(0, len(order), size)):
            own = rules and [rules[i] for i in rows]
            answers |= dict(zip(rows, self.answer([sequences[i] for i in rows], own, temperature), strict=True))
        return [answers[i] for i in range(len(sequences))]

    def _precision(self) -> torch.autocast:
        device = self.model.bin_ids.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" if self.half is None else self.half)

    def _answer_forced(self, sequences: list[Sequence]) -> list[Answer]:
        """What links find where the true answer is given; a published score of others is often of this kind."""
        if any(sequence.head != "link" for sequence in sequences):
            raise ValueError("decode.teacher_forced=true: expected benchmarks that links answer (answer=link)")
        batch = collate(sequences, self.model.vocabulary).to(self.model.bin_ids.device)
        with self._precision():
            found = self.model.find(batch)
        return [
            Answer(one.answer, 0, False, links=links, forced=True) for one, links in zip(sequences, found, strict=True)
        ]

    def answer_unit(self, unit: Unit, rejects: RejectLog) -> tuple[list[Prediction], Pace]:
        """Answer the samples of a unit: prompts of like length in one batch, predictions in the order of the data.

        The batches of a unit are always the same, so its answers depend on nothing else.
        """
        sequences, pace = [], Pace()
        for raw in unit.raws:
            rejects.read += 1
            try:
                sequences.append(self._prompt(raw, unit.benchmark.head))
            except SampleReject as reject:
                rejects.add(raw, reject)
        start = time.perf_counter()
        answers = self.answer_all(sequences)
        pace["milliseconds"] = round(1000 * (time.perf_counter() - start))
        pace["samples"], pace["rejected"] = len(sequences), len(unit.raws) - len(sequences)
        pace["images"] = sum(len(sequence.images) for sequence in sequences)
        pace["tokens"] = sum(answer.tokens for answer in answers)
        name, builder = unit.benchmark.name, self.builder
        made = [make_prediction(one, own, builder, name) for one, own in zip(sequences, answers, strict=True)]
        return made, pace

    def _prompt(self, raw: RawSample, head: str = "text") -> Sequence:
        sample, most = decode_sample(choose_frames(raw, self.builder.frames)), self.config.data.max_length
        sequence = self.builder.build(sample, head=head)
        if (length := sequence.prompt_length) > most:
            raise SampleReject("too-long", f"{raw.key}: a prompt of {length} tokens, data.max_length is {most}")
        return sequence


class Watch(LogitsProcessor):
    """Reports a growing answer (a batch of one) as often as it ends in a word or a whole region; changes no score."""

    def __init__(self, log: TokenLog, tokenizer: PreTrainedTokenizerBase, report: Callable[[Answer], None]) -> None:
        self.log, self.tokenizer, self.report = log, tokenizer, report

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as they are."""
        row = input_ids[0].tolist()
        if row and self.log.roles[row[-1]] in (Role.WORD, Role.SEPARATOR, Role.STOP):
            text = str(self.tokenizer.decode(row, skip_special_tokens=False))
            text = re.sub(r"<([bpm])_sep>\s*$", r"<\1_ed>", text)  # the group goes on; what it holds so far is whole
            self.report(Answer(text, len(row), False, *self.log.read([row])[0]))
        return scores


def read_units(
    root: Path, benchmarks: Iterable[Benchmark], size: int, limit: int | None, failed: dict[str, str]
) -> Iterator[Unit]:
    """Yield windows of `size` samples, at most `limit` samples of each benchmark; a shard is read once for all of them.

    Benchmarks whose shards can't be read are added to `failed`: name -> why.
    """
    folders: dict[tuple[str, str], list[Benchmark]] = {}
    for benchmark in benchmarks:
        folders.setdefault((benchmark.shards, benchmark.split), []).append(benchmark)
    for (folder, split), members in folders.items():
        try:
            yield from _read_folder(split_shards(root / folder, split), members, size, limit)
        except ValueError as error:
            failed |= {one.name: str(error) for one in members}


def _read_folder(
    shards: Iterable[str | Path], benchmarks: list[Benchmark], size: int, limit: int | None
) -> Iterator[Unit]:
    tasks, read = {one.task for one in benchmarks}, Counter[str | None]()
    windows = {one.name: Unit(one, 0) for one in benchmarks}
    for shard in shards:
        if limit is not None and all(read[task] >= limit for task in tasks):
            break
        for raw in read_raw(shard, tasks.__contains__):
            read[raw.task] += 1
            if limit is not None and read[raw.task] > limit:
                continue
            for one in benchmarks:
                if raw.task not in (one.task, None):  # None: it can't be read, a reject of all
                    continue
                unit = windows[one.name]
                unit.raws.append(raw)
                if len(unit.raws) == size:
                    windows[one.name] = Unit(one, unit.number + 1)
                    yield unit
    yield from (unit for unit in windows.values() if unit.raws)


def generate_predictions(
    model: VistaLLM, config: Config, root: Path, benchmarks: Mapping[str, Benchmark], pace: Pace
) -> Iterator[Prediction]:
    """Yield one prediction per sample of every benchmark, by this process alone; `pace` is filled on the way.

    Raises:
        ValueError: a benchmark's shards are missing, or too many samples are rejected.
    """
    answerer, failed = Answerer(model, config), dict[str, str]()
    rejects = {name: reject_log(config) for name in benchmarks}
    for unit in read_units(root, benchmarks.values(), WINDOW * config.decode.batch_size, config.decode.limit, failed):
        predictions, took = answerer.answer_unit(unit, rejects[unit.benchmark.name])
        pace.update(took)
        yield from predictions
    if failed:
        raise ValueError("; ".join(failed.values()))


def make_prediction(sequence: Sequence, answer: Answer, builder: SequenceBuilder, benchmark: str) -> Prediction:
    """Read a generated answer and set it beside its target."""
    sample = sequence.sample
    parsed, failure = read_reply(answer, sequence, builder.codec, find_task(sample.task))
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
        cut=answer.cut,
        head=sequence.head,
        forced=answer.forced,
    )


def read_reply(
    answer: Answer, sequence: Sequence, codec: RegionCodec, task: Task | None
) -> tuple[Parsed | None, str | None]:
    """Read the answer to a sequence as `read_answer` or `read_link_answer` does, with confidences.

    Without a task the regions of a text may be of any one kind, and its words are not cut down.
    """
    video = sequence.sample.video
    if task is not None and task.link and sequence.head == "link":
        parsed, failure = read_link_answer(answer.text, answer.links, sequence.letterboxes, task, video)
    elif task is not None:
        parsed, failure = read_answer(answer.text, sequence.letterboxes, codec, task, video)
    else:
        try:
            parsed, failure = codec.decode(answer.text, sequence.letterboxes, video=video), None
        except RegionParseError as error:
            parsed, failure = None, error.reason
    if parsed is not None and not answer.links:
        set_confidence(parsed, answer.regions, answer.presence)
        if video:
            filled = fill_tracks(parsed.regions, len(sequence.letterboxes), codec.keyframes)
            parsed.regions = [Region.from_json(region.to_json()) for region in filled]
    return parsed, failure


def read_answer(
    text: str, letterboxes: list[Letterbox], codec: RegionCodec, task: Task, video: bool = False
) -> tuple[Parsed | None, str | None]:
    """Read a generated answer: its text with markers, without the end token. Nothing is repaired or guessed.

    Returns:
        (Parsed, None), with regions in original pixels and, for a text task, `answer` cut down to the answer itself
        ("B", "yes", "True", "red"); or (None, reason), the reason being the codec's ("unclosed", "odd-count", ...) or
        "no-region", "wrong-kind", "wrong-count", "empty", "no-choice", "no-yes-or-no", "no-true-or-false".
    """
    try:
        kind = None if task.kind == "text" else task.kind
        parsed = codec.decode(text, letterboxes, kind, labels="{found}" in task.answer, video=video)
    except RegionParseError as error:
        return None, error.reason
    # rounded as in predictions.jsonl: the file scores exactly as the run behind it
    parsed.regions = [Region.from_json(region.to_json()) for region in parsed.regions]
    if task.kind == "text":
        answer, failure = read_words(parsed.answer, task.metric)
        return (None, failure) if answer is None else (replace(parsed, answer=answer), None)
    if parsed.kind == "text":
        return None, "no-region"
    if parsed.kind != task.kind and not (task.metric == "candidates" and parsed.kind == "point"):
        return None, "wrong-kind"
    if task.metric in ONE_REGION and len(parsed.regions) != 1:
        return None, "wrong-count"
    return parsed, None


def target_of(sample: Sample, answer: str) -> dict[str, Any]:
    """Return the `target` of a sample's Prediction, JSON-ready; `answer` is its rendered answer text.

    {"regions": the regions the answer names, "answer", "empty": whether it names none (a text task: False), "meta": the
    sample's own plain values, its `image_ids` and `frames`}, with "candidates" (boxes, in order), "given" (regions that
    only the question names) and "answers" (references) where there are any.
    """
    task = find_task(sample.task)
    wanted = sample.fields.get("targets", [0]) if task.kind != "text" else []
    if "{found}" in task.answer:  # a list of names with all that the sample has of each
        wanted = sorted({region.object for region in sample.regions})
    plain, listed = (bool, int, float, str), ("image_ids", "frames")
    meta = {key: value for key, value in sample.meta.items() if isinstance(value, plain) or key in listed}
    target: dict[str, Any] = {
        "regions": [one.to_json() for number in wanted for one in sample.regions if one.object == number],
        "answer": answer,
        "empty": task.kind != "text" and not wanted,
        "meta": meta,
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
    """Return prediction id -> its images, (H, W, 3) uint8 RGB, of those `predictions` whose shards are at hand."""
    wanted: dict[tuple[str, str], set[str]] = {}
    frames: dict[str, int] = {}
    for one in predictions:
        if (benchmark := benchmarks.get(one.benchmark)) is not None:
            frames[one.id] = len(one.images)
            wanted.setdefault((benchmark.shards, benchmark.split), set()).add(one.id)
    images: dict[str, list[np.ndarray]] = {}
    for (folder, split), ids in wanted.items():
        with contextlib.suppress(ValueError):  # no such shards here: the page draws on a plain canvas
            for raw in (raw for shard in split_shards(root / folder, split) for raw in read_raw(shard)):
                if ids <= images.keys():
                    break
                if raw.record and (key := raw.record.get("id")) in ids and key not in images:
                    images[key] = decode_sample(choose_frames(raw, frames[key])).pixels or []
    return images
