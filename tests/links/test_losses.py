"""Losses of links against brute force and other libraries."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from vistallm.links.losses import SIGMA, WEIGHTS, dice_loss, keypoint_similarity, link_losses, match
from vistallm.links.losses import _places as places_of
from vistallm.links.losses import _targets as targets_of

MIXED = [("GRD", 0, 1, 0), ("GRD", 0, 0, 0), ("SEG", 1, 2, 0), ("DET", 1, 2, 0), ("DET", 1, 0, 0), ("POSE", 2, 2, 3)]


def _run(decoder, links, made):
    return decoder(made[0], links, made[1], made[2])


def test_matching_is_the_cheapest_of_all_permutations(tiny_decoder, make_links, inputs):
    links = make_links([("GRD", 0, 3, 0), ("GRD", 1, 2, 0)])
    family = _run(tiny_decoder, links, inputs(2, 2))[0]
    group, phrase, objects = targets_of(family, links, places_of(family, links))
    query = match(family, group, phrase, links.boxes[objects])
    for layer, g in itertools.product(range(2), range(2)):
        mine = (group == g).nonzero()[:, 0]
        share, boxes = family.scores[layer, g, :, 0].sigmoid().detach(), family.boxes[layer, g].detach()
        wanted = links.boxes[objects[mine]]
        class_cost = -((1 - share) ** 2) * share.log() + share**2 * (1 - share).log()
        giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
        cost = 2 * class_cost[:, None] + 5 * torch.cdist(boxes, wanted, p=1) + 2 * (1 - giou)
        columns = list(range(len(mine)))
        best = min(
            itertools.permutations(range(4), len(mine)), key=lambda order: float(cost[list(order), columns].sum())
        )
        assert query[layer, mine].tolist() == list(best)


def test_a_segment_link_is_answered_by_its_first_query(tiny_decoder, make_links, inputs):
    links = make_links([("SEG", 0, 1, 0), ("GRD", 0, 1, 0)])
    family = _run(tiny_decoder, links, inputs(2, 1))[0]
    boxes = family.boxes.detach().clone()
    boxes[:, :, 3] = links.boxes  # the last query has each object's box
    family, places = dataclasses.replace(family, boxes=boxes), places_of(family, links)
    group, phrase, objects = targets_of(family, links, places)
    assert match(family, group, phrase, links.boxes[objects]).tolist() == [[0, 3], [0, 3]]


def test_mask_and_class_losses_are_those_of_transformers(tiny_decoder, make_links, inputs):
    from transformers.loss.loss_for_object_detection import dice_loss as their_dice

    logits, target = torch.randn(5, 16, 16), torch.randint(0, 2, (5, 16, 16)).float()
    assert dice_loss(logits, target).sum() == pytest.approx(float(their_dice(logits.flatten(1), target.flatten(1), 1)))
    links = make_links([("GRD", 0, 0, 0)])
    family = _run(tiny_decoder, links, inputs(1, 1))[0]
    share = family.scores.sigmoid()
    assert float(link_losses([family], links)[1]["score"]) == pytest.approx(
        float((-(share**2) * (1 - share).log()).sum().detach())
    )


def test_box_losses_of_one_made_object(tiny_decoder, make_links, inputs):
    links = make_links([("GRD", 0, 1, 0)])
    family = _run(tiny_decoder, links, inputs(1, 1))[0]
    same = dataclasses.replace(family, boxes=links.boxes.expand(2, 1, 4, 4))
    parts = link_losses([same], links)[1]
    assert float(parts["box_l1"]) == 0.0
    assert float(parts["giou"]) == pytest.approx(0.0, abs=1e-4)
    far = torch.tensor([0.9, 0.9, 0.1, 0.1])
    parts = link_losses([dataclasses.replace(family, boxes=far.expand(2, 1, 4, 4))], links)[1]
    giou = generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (far, links.boxes[0])))
    assert float(parts["box_l1"]) == pytest.approx(2 * float((far - links.boxes[0]).abs().sum()), rel=1e-5)
    assert float(parts["giou"]) == pytest.approx(2 * (1 - float(giou)), rel=1e-5)


def test_keypoint_similarity_is_that_of_pycocotools():
    import numpy as np
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = np.array([[10, 10, 2], [30, 12, 1], [20, 40, 2]]), np.array([[12, 10, 1], [30, 17, 1], [26, 44, 1]])
    area = 40.0 * 50.0
    record = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "area": area, "iscrowd": 0}
    annotation = {**record, "keypoints": truth.flatten().tolist(), "num_keypoints": 3}
    coco = COCO()
    coco.dataset = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [annotation]}
    coco.createIndex()
    guess = COCO()
    guess.dataset = {**coco.dataset, "annotations": [{**record, "score": 1.0, "keypoints": found.flatten().tolist()}]}
    guess.createIndex()
    evaluation = COCOeval(coco, guess, "keypoints")
    evaluation.params.kpt_oks_sigmas = np.full(3, SIGMA)
    evaluation._prepare()
    distance = torch.tensor(found[:, :2] - truth[:, :2]) / 100.0  # any unit, if the area has it too
    ours = keypoint_similarity(distance, torch.tensor(area / 100.0**2)).mean()
    assert float(ours) == pytest.approx(float(evaluation.computeOks(1, 1)[0, 0]), abs=1e-6)


def test_losses_are_sums_over_any_split_of_a_batch(tiny_decoder, make_links, inputs):
    links, (states, features, pixels) = make_links(MIXED), inputs(9, 3)
    loss, parts = link_losses(tiny_decoder(states, links, features, pixels), links)
    loss.backward()
    whole = {name: p.grad.clone() for name, p in tiny_decoder.named_parameters()}
    tiny_decoder.zero_grad()
    total = 0.0
    for images in ([0], [1, 2]):
        mine = torch.isin(links.image, torch.tensor(images))
        objects = mine[links.object_link]
        points = mine[links.keypoint_link]
        renumbered, objects_renumbered = mine.cumsum(0) - 1, objects.cumsum(0) - 1
        part = dataclasses.replace(
            links,
            **{name: getattr(links, name)[mine] for name in ("kind", "row", "image")},
            group=links.group[mine] - links.group[mine].min(),
            object_link=renumbered[links.object_link[objects]],
            **{name: getattr(links, name)[objects] for name in ("boxes", "masks", "has_mask")},
            keypoint_object=objects_renumbered[links.keypoint_object[points]],
            keypoint_link=renumbered[links.keypoint_link[points]],
            keypoints=links.keypoints[points],
        )
        own, _ = link_losses(tiny_decoder(states[mine], part, features, pixels), part)
        own.backward()
        total += float(own.detach())
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in tiny_decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-5, msg=name)
    assert all(float(parts[name]) > 0 for name in WEIGHTS)


def test_more_objects_than_queries_are_counted_and_the_largest_kept(tiny_decoder, make_links, inputs):
    links = make_links([("GRD", 0, 6, 0)])
    family = _run(tiny_decoder, links, inputs(1, 1))[0]
    objects = targets_of(family, links, places_of(family, links))[2]
    area = links.boxes[:, 2:].prod(1)
    assert set(objects.tolist()) == set(area.argsort(descending=True)[:4].tolist())
    parts = link_losses([family], links)[1]
    assert (float(parts["objects"]), float(parts["unmatched"])) == (6.0, 2.0)


def test_a_mask_of_another_side_is_refused(tiny_decoder, make_links, inputs):
    links = make_links([("GRD", 0, 2, 0)], side=8)
    with pytest.raises(ValueError, match="expected a side of 16"):
        link_losses(_run(tiny_decoder, links, inputs(1, 1)), links)


def test_patches_under_an_object_answer_its_phrase(tiny_decoder, make_links, inputs):
    links = make_links([("DET", 0, 1, 0), ("DET", 0, 1, 0), ("DET", 0, 0, 0), ("GRD", 0, 1, 0)])
    masks = torch.zeros_like(links.masks)
    masks[0, :4, :8] = 255  # of 4 x 4 patches of 4 pixels: the first two of the top row
    masks[0, 4:6, :4] = 255  # and half of the one below
    boxes = torch.tensor([[0.2, 0.2, 0.4, 0.4], [0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5]])
    links = dataclasses.replace(links, masks=masks, boxes=boxes, has_mask=torch.tensor([True, False, False]))
    families = _run(tiny_decoder, links, inputs(4, 1))
    first, second, third = torch.zeros(3, 4, 4)
    first[0, :2], first[1, 0] = 1.0, 0.5
    second[1:3, 1:3] = 1.0  # the middle of the box, which is the whole image; the rest of it counts for nothing
    third[:2, :2] = 1.0  # a quarter of the image: its centre lies on the corner of four patches
    every, expected = torch.ones(4, 4), 0.0
    wanted = [(families[0], 0, third, every), (families[1], 0, first, every), (families[1], 1, second, second)]
    for family, phrase, target, counted in [*wanted, (families[1], 2, torch.zeros(4, 4), every)]:
        share = family.patches[0, phrase].sigmoid().detach().view(4, 4)
        expected -= float(((target * share.log() + (1 - target) * (1 - share).log()) * counted).sum()) / 16
    assert float(link_losses(families, links)[1]["patches"]) == pytest.approx(expected, rel=1e-5)
