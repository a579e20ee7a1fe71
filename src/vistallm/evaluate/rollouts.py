"""Prompts -> drawn answers, their rewards, and the reward of each answer that differs from them by one token.

Regions are rewarded by the IoU of matched objects: sum over the best matching / max(predicted, true), before duplicates
are removed; where there is no target, an empty answer earns 1 and any other 0. Words are rewarded by their task's
metric. An answer that can't be read earns 0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from vistallm.config import Config, ReinforceConfig
from vistallm.data.sequence import build_codec
from vistallm.data.vocabulary import Vocabulary, token_ids
from vistallm.evaluate.generate import read_answer, target_of
from vistallm.evaluate.grammar import AnswerGrammars, Role, rule_of
from vistallm.metrics import METRICS
from vistallm.metrics.regions import box_iou, boxes_of
from vistallm.model.vistallm import VistaLLM
from vistallm.regions.codec import RegionCodec
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import polygons_to_mask, rle_to_mask
from vistallm.regions.tracks import fill_tracks
from vistallm.schema import Parsed, Prediction, Region, RolloutBatch, Sample
from vistallm.tasks import find_task
from vistallm.train.reinforce import Rollouts

# Metrics of the tasks that are rewarded by matched IoU.
BY_OBJECT = ("mask", "masks", "prompted", "context", "coseg", "box", "boxes")
Edit = tuple[int, int, float, bool]  # position, other token, change of the reward, whether it ends the group


@dataclass
class DrawnObject:
    """One object of a drawn answer: its parts as (n, 2) pixels, a box as one of two corners, and where it stands."""

    image: int
    group: int  # number of its region group in the answer
    parts: list[np.ndarray]
    positions: list[list[int]] = field(default_factory=list)  # of the coordinate tokens of each part


class Truth:
    """The true objects of a sample; rewards answers with any objects."""

    def __init__(self, sample: Sample, config: ReinforceConfig) -> None:
        self.config, self.kind = config, find_task(sample.task).kind
        self.sizes = [(image.height, image.width) for image in sample.images]
        regions = [Region.from_json(one) for one in target_of(sample, "")["regions"]]
        self.images = [region.image for region in regions]
        self.boxes = boxes_of(regions)
        self.masks = [rle_to_mask(one.rle) for one in regions if one.rle] if self.kind == "mask" else []
        self.areas = [np.count_nonzero(mask) for mask in self.masks]

    def overlaps(self, one: DrawnObject) -> np.ndarray:
        """Return (T,) float64, what an object earns when it is matched with each of the T true ones."""
        earned = np.zeros(len(self.images))
        if not self.images:
            return earned
        if self.kind == "box":
            corners = np.concatenate([one.parts[0].min(0), one.parts[0].max(0)])
            earned[:] = box_iou(corners, self.boxes)[0] * (np.array(self.images) == one.image)
            return earned**self.config.power
        height, width = self.sizes[one.image]
        points = np.concatenate(one.parts)
        low, high = points.min(0).astype(int), np.minimum(points.max(0).astype(int) + 2, (width, height))
        drawn = polygons_to_mask(one.parts, high[1], high[0])[low[1] :, low[0] :]
        area = np.count_nonzero(drawn)
        for number in (n for n, image in enumerate(self.images) if image == one.image):
            common = np.count_nonzero(drawn & self.masks[number][low[1] : high[1], low[0] : high[0]])
            union = int(area + self.areas[number] - common)
            earned[number] = (common / max(union, 1)) ** self.config.power
            if share := self.config.boundary:
                whole = polygons_to_mask(one.parts, height, width)
                earned[number] += share * (boundary_iou(whole, self.masks[number]) - earned[number])
        return earned

    def reward(self, rows: list[np.ndarray]) -> float:
        """Return the reward in [0, 1] of an answer whose P objects have these `overlaps`."""
        if not rows or not self.images:
            return float(len(rows) == len(self.images))
        if len(rows) == len(self.images) == 1:
            return float(rows[0][0])
        table = np.stack(rows)
        return float(table[linear_sum_assignment(table, maximize=True)].sum() / max(len(rows), len(self.images)))


def boundary_iou(mask: np.ndarray, other: np.ndarray) -> float:
    """IoU of the pixels near the outlines of two (H, W) bool masks: within 2% of the diagonal (arXiv 2103.16562)."""
    steps = max(1, round(0.02 * float(np.hypot(*mask.shape))))
    edges = []
    for one in (mask, other):
        framed = cv2.copyMakeBorder(one.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        edges.append(one & (cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=steps)[1:-1, 1:-1] == 0))
    return float((edges[0] & edges[1]).sum() / max((edges[0] | edges[1]).sum(), 1))


class RolloutSampler:
    """Draws answers of a batch's prompts by the grammar of their tasks, and scores them (a `train.reinforce.Sampler`).

    Raises ValueError for `reinforce.loss=coordinate` without coordinate tokens.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        if config.coords != "tokens" and config.reinforce.loss == "coordinate":
            raise ValueError("reinforce.loss=coordinate: expected coords=tokens, got coords=text; use grpo or dr_grpo")
        self.config, self.own, self.vocabulary = config, config.reinforce, vocabulary
        self.codec: RegionCodec = build_codec(config)
        self.grammars = AnswerGrammars(vocabulary, config.points, config.decode.max_new_tokens)
        stops = token_ids(vocabulary.lm, ["<m_ed>", "<b_ed>"]) if vocabulary.region_tokens else []
        self.stop_ids = dict(zip(("mask", "box"), stops, strict=False))
        self.bin_of = {token: number for number, token in enumerate(vocabulary.bin_ids)}

    def __call__(self, model: VistaLLM, batch: RolloutBatch) -> Rollouts:
        """Draw `reinforce.copies` answers for each prompt and score them."""
        copies, device = self.own.copies, batch.prompts.input_ids.device
        rules = [rule_of(one, "text", self.codec.keyframes) for one in batch.samples for _ in range(copies)]
        grammar = self.grammars.constrain(rules)
        sharded = self.config.strategy == "fsdp"
        prompts = model.read_prompts(batch.prompts, copies)
        drawn = model.draw(prompts, grammar.limit, self.own.temperature, grammar, sharded)
        ids, end = drawn.ids.tolist(), self.vocabulary.lm.eos_token_id
        rows = [row[: row.index(end) + 1] if end in row else row for row in ids]
        valid = torch.arange(drawn.ids.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]
        read = [self.read(batch, number // copies, number, row) for number, row in enumerate(rows)]
        rewards, shared = np.zeros(len(rows), np.float32), valid.clone()
        edits, facts = list[tuple[int, int, int, float, bool]](), {"length": float(valid.sum())}
        allowed = drawn.allowed.cpu().numpy()
        for first in range(0, len(rows), copies):
            sample = batch.samples[first // copies]
            if find_task(sample.task).metric not in BY_OBJECT or sample.video:
                rewards[first : first + copies] = metric_rewards(read[first : first + copies])
                continue
            truth = Truth(sample, self.own)
            for number in range(first, first + copies):
                if (parsed := read[number].parsed) is None:
                    continue
                objects = self.find_objects(rows[number], parsed)
                table = [truth.overlaps(one) for one in objects]
                rewards[number] = truth.reward(table)
                facts["empty"] = facts.get("empty", 0.0) + (not objects)
                facts["duplicates"] = facts.get("duplicates", 0.0) + count_duplicates(table)
                if self.own.loss == "coordinate":
                    roles = self.grammars.roles[rows[number]]
                    shared[number, : len(roles)] = torch.from_numpy((roles == Role.WORD) | (roles == Role.START))
                    found = self.edits(rows[number], objects, table, truth, allowed[number])
                    edits += [(number, *edit) for edit in found]
        groups = rewards.reshape(-1, copies)
        changes = np.array([edit[3] for edit in edits], np.float32)
        facts |= {"reward": float(rewards.sum()), "unreadable": float(sum(one.parsed is None for one in read))}
        facts |= {"flat_groups": float((np.ptp(groups, axis=1) == 0).sum() * copies)}
        facts |= {"change": float(np.abs(changes).mean() * len(rows)) if len(changes) else 0.0}
        reward, change = torch.from_numpy(rewards), torch.from_numpy(changes)
        if self.own.shuffle:
            reward, change = reward[torch.randperm(len(reward))], change[torch.randperm(len(change))]
        places = torch.tensor([edit[:3] for edit in edits], dtype=torch.long).view(-1, 3)
        ends = torch.tensor([edit[4] for edit in edits], dtype=torch.bool)
        tensors = (one.to(device) for one in (valid, reward, shared, places, change, ends))
        valid, reward, shared, places, change, ends = tensors
        return Rollouts(prompts, drawn, valid, reward, shared, places, change, ends, facts)

    def read(self, batch: RolloutBatch, prompt: int, number: int, row: list[int]) -> Prediction:
        """Read drawn token ids as the answer of a prompt."""
        sample, text = batch.samples[prompt], self.vocabulary.lm
        words = str(text.decode([token for token in row if token != text.eos_token_id], skip_special_tokens=False))
        letterboxes = [Letterbox(one.width, one.height, max(one.width, one.height)) for one in sample.images]
        parsed, failure = read_answer(words, letterboxes, self.codec, find_task(sample.task), sample.video)
        if parsed is not None and sample.video:
            parsed.regions = fill_tracks(parsed.regions, len(letterboxes), self.codec.keyframes)
        if row[-1] != text.eos_token_id:
            parsed, failure = None, "unended"
        sizes = [{"width": one.width, "height": one.height} for one in sample.images]
        target = target_of(sample, batch.answers[prompt])
        return Prediction(f"{sample.id}-{number}", "", sample.task, "", words, parsed, failure, sizes, target)

    def find_objects(self, row: list[int], parsed: Parsed) -> list[DrawnObject]:
        """Return the objects of an answer that can be read, with the places of their coordinates in its ids."""
        pairs = ((one, one.polygons or [np.reshape(one.box or (), (2, 2))]) for one in parsed.regions)
        objects = [DrawnObject(one.image, 0, parts) for one, parts in pairs]
        group = number = -1
        fresh = True
        for position, role in enumerate(self.grammars.roles[row].tolist()):  # coords=text has no such roles
            group += role == Role.START
            if role == Role.BIN:
                if fresh:
                    number += 1
                    objects[number].group = group
                    objects[number].positions.append([])
                objects[number].positions[-1].append(position)
            elif role == Role.PART:
                objects[number].positions.append([])
            fresh = role in (Role.START, Role.SEPARATOR)
        return objects

    def edits(
        self, row: list[int], objects: list[DrawnObject], table: list[np.ndarray], truth: Truth, allowed: np.ndarray
    ) -> Iterator[Edit]:
        """Yield the edits of an answer: coordinates moved by `reinforce.moves`, and groups that end earlier.

        `row`: its token ids; `objects`: what they draw, with their `overlaps` in `table`; `allowed`: (L, V) bool, the
        tokens that the grammar permits.
        """
        reward, bins, stop = truth.reward(table), self.vocabulary.bin_ids, self.stop_ids[truth.kind]
        for number, one in enumerate(objects):
            height, width = truth.sizes[one.image]
            letterbox = Letterbox(width, height, max(width, height))
            pixels = coordinate_table(len(bins), letterbox)
            corners = [np.array([self.bin_of[row[p]] for p in places]).reshape(-1, 2) for places in one.positions]
            parts = [np.stack([pixels[c[:, 0], 0], pixels[c[:, 1], 1]], 1) for c in corners]
            drawn = DrawnObject(one.image, one.group, parts)
            for part, places in enumerate(one.positions):
                for index, position in enumerate(places):
                    vertex, axis = divmod(index, 2)
                    old = drawn.parts[part][vertex, axis]
                    for move in (sign * step for step in self.own.moves for sign in (-1, 1)):
                        moved = int(corners[part][vertex, axis]) + move
                        if 0 <= moved < len(bins) and allowed[position, bins[moved]]:
                            drawn.parts[part][vertex, axis] = pixels[moved, axis]
                            other = truth.reward([*table[:number], truth.overlaps(drawn), *table[number + 1 :]])
                            yield position, bins[moved], other - reward, False
                    drawn.parts[part][vertex, axis] = old
            for position, row_table in self._endings(number, objects, drawn, table, truth):
                if allowed[position, stop]:
                    yield position, stop, truth.reward(row_table) - reward, True

    def _endings(
        self, number: int, objects: list[DrawnObject], drawn: DrawnObject, table: list[np.ndarray], truth: Truth
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yield where object `number` and its group could end, before each vertex, part and next object: what is left.

        `drawn` is the object as its tokens say; what is left is the table of overlaps.
        """
        one = objects[number]
        later = [row for other, row in zip(objects, table, strict=True) if other.group > one.group]
        first = number == 0 or objects[number - 1].group < one.group
        cuts = [(0, 0, one.positions[0][0])] if first else []  # parts kept whole, vertices of the next one, position
        for part, places in enumerate(one.positions):
            cuts += [(part, v, places[2 * v]) for v in range(3, len(places) // 2)] if truth.kind == "mask" else []
            if part + 1 < len(one.positions) or number + 1 < len(objects) and objects[number + 1].group == one.group:
                cuts.append((part + 1, 0, places[-1] + 1))
        for whole, vertices, position in cuts:
            kept = [*drawn.parts[:whole], *([drawn.parts[whole][:vertices]] if vertices else [])]
            own = [truth.overlaps(DrawnObject(one.image, one.group, kept))] if kept else []
            yield position, [*table[:number], *own, *later]


@functools.lru_cache(64)
def coordinate_table(num_bins: int, letterbox: Letterbox) -> np.ndarray:
    """Return (num_bins, 2) float64: the x and the y that each bin stands for, in pixels as predictions hold them."""
    return np.round(letterbox.to_pixels(np.repeat(np.arange(num_bins), 2) / (num_bins - 1)).astype(float), 3)


def count_duplicates(table: list[np.ndarray]) -> int:
    """Objects beyond the first that overlap one and the same true object most, with at least half of the reward."""
    best = [int(row.argmax()) for row in table if row.size and row.max() >= 0.5]
    return len(best) - len(set(best))


def metric_rewards(predictions: list[Prediction]) -> list[float]:
    """Return the score of each answer by its task's metric; all are of one task."""
    metric = METRICS[find_task(predictions[0].task).metric]()
    metric.update(predictions)
    scores = {row["id"]: row["score"] for row in metric.rows()}
    kept = [scores[one.id] if one.parsed is not None else (0.0, 1.0) for one in predictions]
    return [value / weight for value, weight in kept]
