"""Rewards and edits of drawn answers, against the metrics, the codec and answers that are drawn again."""

import dataclasses
from itertools import permutations

import numpy as np
import pytest
import torch

from vistallm.coinit.shards import read_raw, split_shards
from vistallm.config import ReinforceConfig
from vistallm.data.images import decode_sample
from vistallm.data.sequence import build_codec, collate, collate_rollouts
from vistallm.data.vocabulary import Vocabulary
from vistallm.evaluate.grammar import rule_of
from vistallm.evaluate.rollouts import DrawnObject, RolloutSampler, Truth, boundary_iou, count_duplicates
from vistallm.metrics import METRICS
from vistallm.metrics.regions import box_iou
from vistallm.regions.masks import mask_to_rle, polygons_to_rle, rle_iou
from vistallm.schema import ImageInfo, Region, RolloutBatch, Sample
from vistallm.tasks import find_task
from vistallm.train.reinforce import masked_logprob

TASKS = ("res", "gres", "rec", "grec", "coseg", "attcoseg")


@pytest.fixture(scope="module")
def samples(mini_root):
    """Decoded test samples by task."""
    found = {}
    for shard in split_shards(mini_root, "test"):
        for raw in read_raw(shard):
            found.setdefault(raw.task, []).append(decode_sample(raw))
    return found


@pytest.fixture(scope="module")
def sampler(tiny_config, vocabulary):
    return RolloutSampler(tiny_config("points=12", "decode.max_new_tokens=null", "reinforce.moves=[1,3]"), vocabulary)


@pytest.fixture(scope="module")
def batch(samples, builder, vocabulary):
    """Two samples of each task that is rewarded by its objects, with their true answers as text."""
    sequences = [builder.build(sample) for task in TASKS for sample in samples[task]]
    return collate_rollouts(sequences, vocabulary, TASKS, replay=False)


def tokens(text, vocabulary):
    return vocabulary.lm(text, add_special_tokens=False).input_ids + [vocabulary.lm.eos_token_id]


def reward(sampler, batch, prompt, row):
    """By reading the answer's text again."""
    one, truth = sampler.read(batch, prompt, 0, row), Truth(batch.samples[prompt], sampler.own)
    return truth.reward([truth.overlaps(thing) for thing in sampler.find_objects(row, one.parsed)])


def test_the_true_answer_earns_the_ceiling_of_the_codec(sampler, batch, vocabulary):
    """The mean IoU of its objects as the codec writes them, by run lengths and boxes; for one object, the metric's."""
    for prompt, (sample, answer) in enumerate(zip(batch.samples, batch.answers, strict=True)):
        row = tokens(answer, vocabulary)
        read = sampler.read(batch, prompt, 0, row)
        assert read.parsed is not None, read.failure
        wanted = [Region.from_json(one) for one in read.target["regions"]]
        pairs = list(zip(sorted(read.parsed.regions, key=lambda one: one.image), wanted, strict=True))
        if find_task(sample.task).kind == "box":
            each = [float(box_iou(one.box, other.box)[0, 0]) for one, other in pairs]
        else:
            sizes = [(sample.images[one.image].height, sample.images[one.image].width) for one, _ in pairs]
            drawn = [polygons_to_rle(one.polygons, *size) for (one, _), size in zip(pairs, sizes, strict=True)]
            each = [rle_iou(rle, other.rle) for rle, (_, other) in zip(drawn, pairs, strict=True)]
        earned = reward(sampler, batch, prompt, row)
        assert earned == pytest.approx(np.mean(each) if each else 1, abs=1e-6)
        if sample.task in ("res", "rec"):
            metric = METRICS[find_task(sample.task).metric]()
            metric.update([read])
            value, weight = metric.rows()[0]["score"]
            assert earned == pytest.approx(value / weight, abs=1e-6)


def made(kind, *objects, images=1):
    """A sample whose objects are boxes, (image, x0, y0, x1, y1) in pixels of images of 32 x 32."""
    regions = []
    for number, (image, x0, y0, x1, y1) in enumerate(objects):
        mask = np.zeros((32, 32), bool)
        mask[y0:y1, x0:x1] = True
        own = {"rle": mask_to_rle(mask)} if kind == "mask" else {"box": (x0, y0, x1, y1)}
        regions.append(Region(image, kind, number, **own))
    task = {("mask", 1): "gres", ("box", 1): "grec"}.get((kind, images), "attcoseg")
    infos = [ImageInfo(f"{number}.png", 32, 32) for number in range(images)]
    return Sample("made", task, "test", infos, fields={"targets": list(range(len(objects)))}, regions=regions)


def test_text_coordinates_are_rewarded_and_have_no_edits(tiny_config):
    config = tiny_config("coords=text", "reinforce.loss=dr_grpo", "points=12")
    own = RolloutSampler(config, Vocabulary.build(config.model, build_codec(config)))
    text = " The mask is [4,4,11,4,12,12,4,13] ."
    batch = RolloutBatch(None, [made("mask", A)], [""], None)
    assert reward(own, batch, 0, tokens(text, own.vocabulary)) > 0.8
    with pytest.raises(ValueError, match="coords=tokens"):
        RolloutSampler(tiny_config("coords=text"), own.vocabulary)


def polygon(*values):
    return "".join(f"<bin_{value}>" for value in values)


A, B = (0, 4, 4, 12, 12), (0, 20, 16, 30, 28)
IN_A, IN_B = polygon(4, 4, 11, 4, 12, 12, 4, 13), polygon(20, 16, 29, 17, 30, 28, 21, 28)
BOX_A, BOX_B = polygon(3, 4, 12, 13), polygon(20, 15, 31, 27)
CASES = {
    "one": (made("mask", A), f" The mask is<m_st>{IN_A}<m_ed> ."),
    "two objects": (made("mask", A, B), f" The masks are<m_st>{IN_B}<m_sep>{IN_A}<m_ed> ."),
    "a duplicate": (made("mask", A), f" The masks are<m_st>{IN_A}<m_sep>{IN_A}<m_ed> ."),
    "two parts": (made("mask", A), f" The mask is<m_st>{IN_A}<m_part>{polygon(2, 20, 8, 20, 8, 26)}<m_ed> ."),
    "no target": (made("mask"), f" The mask is<m_st>{IN_A}<m_ed> ."),
    "missed": (made("mask", A, B), f" The mask is<m_st>{IN_A}<m_ed> ."),
    "said none": (made("mask", A), " The mask is<m_st><m_ed> ."),
    "boxes": (made("box", A, B), f" The bounding boxes are<b_st>{BOX_A}<b_sep>{BOX_B}<b_ed> ."),
    "images": (
        made("mask", A, (1, 16, 16, 30, 30), images=2),
        f" The images are 1 and 2 . The masks are image 1:<m_st>{IN_A}<m_sep>{IN_B}<m_ed> image 2:<m_st>{IN_B}<m_ed> .",
    ),
}  # fmt: skip


@pytest.fixture
def case(request, sampler, vocabulary):
    """One sample with a drawn answer: its batch, the answer's ids, its objects and its edits."""
    sample, text = CASES[request.param]
    batch = RolloutBatch(None, [sample], [""], None)
    row = tokens(text, vocabulary)
    grammar = sampler.grammars.constrain([rule_of(sample)])
    scores, allowed = torch.zeros(1, len(vocabulary.lm)), []
    for length in range(len(row)):
        allowed.append(
            grammar(torch.tensor([row[:length]], dtype=torch.long).view(1, -1), scores).isfinite()[0].numpy()
        )
    parsed = sampler.read(batch, 0, 0, row).parsed
    objects, truth = sampler.find_objects(row, parsed), Truth(sample, sampler.own)
    table = [truth.overlaps(one) for one in objects]
    edits = list(sampler.edits(row, objects, table, truth, np.array(allowed)))
    return batch, row, objects, edits, np.array(allowed)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_every_edit_changes_the_reward_as_the_answer_drawn_again(case, sampler, vocabulary):
    batch, row, objects, edits, allowed = case
    before = reward(sampler, batch, 0, row)
    for position, token, change, ends in edits:
        assert allowed[position, token]
        assert token != row[position]
        rest = row[position + 1 :]
        if ends:  # all up to the closing marker of the group goes
            stop = next(k for k in range(position, len(row)) if row[k] in sampler.stop_ids.values())
            rest = row[stop + 1 :]
        after = reward(sampler, batch, 0, [*row[:position], token, *rest])
        assert change == pytest.approx(after - before, abs=1e-9), (position, token)
    coordinates = sum(len(places) for one in objects for places in one.positions)
    assert len([edit for edit in edits if not edit[3]]) >= 3 * coordinates  # four moves, less at the rim


@pytest.mark.parametrize("case", ["no target", "a duplicate", "two objects"], indirect=True)
def test_ending_earlier_is_an_edit(case, request):
    gains = [change for _, _, change, ends in case[3] if ends]
    assert {"no target": max(gains) == 1, "a duplicate": max(gains) > 0.3, "two objects": max(gains) < 0}[
        request.node.callspec.params["case"]
    ]


def test_the_reward_knows_neither_order_nor_start_vertex(sampler):
    sample = made("mask", A, B)
    other = dataclasses.replace(sample, regions=sample.regions[::-1], fields={"targets": [1, 0]})
    parts = [np.array([[4, 4], [11, 4], [12, 12], [4, 13]], float), np.array([[20, 16], [30, 16], [30, 29]], float)]
    values = set()
    for truth in (Truth(sample, sampler.own), Truth(other, sampler.own)):
        for order in (parts, parts[::-1]):
            for turn in range(3):
                things = [DrawnObject(0, 0, [np.roll(part, turn, 0)]) for part in order]
                values.add(round(truth.reward([truth.overlaps(one) for one in things]), 9))
    assert len(values) == 1
    assert 0.5 < values.pop() < 1


def test_matching_is_the_best_of_all_and_duplicates_cost(sampler):
    truth = Truth(made("mask", A, B, (0, 0, 20, 6, 30)), sampler.own)
    table = np.random.default_rng(0).random((4, 3))
    best = max(sum(table[p, t] for t, p in enumerate(chosen)) for chosen in permutations(range(4), 3))
    assert truth.reward(list(table)) == pytest.approx(best / 4)
    assert truth.reward([]) == 0
    assert count_duplicates([np.array([0.9, 0.0]), np.array([0.8, 0.1]), np.array([0.0, 0.7])]) == 1


def test_power_and_boundary_terms():
    mask, other = np.zeros((2, 60, 60), bool)
    mask[10:40, 10:40] = other[12:40, 10:40] = True
    # within 2 pixels of the outlines, counted by hand
    inside, within = mask.copy(), other.copy()
    inside[12:38, 12:38] = within[14:38, 12:38] = False
    assert boundary_iou(mask, other) == pytest.approx((inside & within).sum() / (inside | within).sum())
    assert boundary_iou(mask, mask) == 1
    sample = made("mask", A)
    one = DrawnObject(0, 0, [np.array([[4, 4], [12, 4], [12, 10], [4, 10]], float)])
    plain = Truth(sample, ReinforceConfig()).overlaps(one)[0]
    assert plain == pytest.approx(48 / 64)
    assert Truth(sample, ReinforceConfig(power=2)).overlaps(one)[0] == pytest.approx(plain**2)
    assert Truth(sample, ReinforceConfig(boundary=1)).overlaps(one)[0] < plain


@pytest.mark.parametrize("loss", ["coordinate", "grpo"])
def test_drawn_answers_are_scored(tiny_config, vocabulary, samples, builder, tiny_model, loss):
    """Objects, words and choices; probabilities are those of a second pass, also of rows that end early."""
    config = tiny_config(f"reinforce.loss={loss}", "decode.max_new_tokens=90", "points=4")
    names = ["res", "attcoseg", "pope", "nlvr2"]
    sequences = [builder.build(sample) for name in names for sample in samples[name]]
    batch = collate_rollouts(sequences, vocabulary, names, replay=False)
    torch.manual_seed(0)
    found = RolloutSampler(config, vocabulary)(tiny_model, batch)
    assert len(found.reward) == 16
    assert found.valid.sum(1).unique().numel() > 2
    assert ((found.reward >= 0) & (found.reward <= 1)).all()
    assert (len(found.edits) > 0) == (loss == "coordinate")
    assert found.facts["unreadable"] == 0
    logits = tiny_model.answer_logits(found.prompts, found.drawn.ids)[1]
    again = masked_logprob(logits, found.drawn.allowed, config.reinforce.temperature)
    taken = again.gather(2, found.drawn.ids[..., None])[..., 0]
    ratio = (taken - found.drawn.logprob)[found.valid].exp()
    assert (ratio - 1).abs().max() < 1e-4


def test_greedy_drawing_is_generation(tiny_config, vocabulary, samples, builder, tiny_model):
    sampler = RolloutSampler(tiny_config(), vocabulary)
    sequences = [builder.build(sample) for name in ("res", "attcoseg", "vqa") for sample in samples[name]]
    prompts = collate(sequences, vocabulary, generation=True)
    rules = [rule_of(one.sample) for one in sequences]
    grammar = sampler.grammars.constrain(rules)
    drawn = tiny_model.draw(tiny_model.read_prompts(prompts, 1), grammar.limit, 1e-4, grammar)
    grammar = sampler.grammars.constrain(rules)
    made = tiny_model.generate(prompts, grammar.limit, logits_processor=[grammar])
    assert drawn.ids.tolist() == made.ids.tolist()
