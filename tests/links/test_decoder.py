"""The link decoder: shapes, groups, gradients, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_convert

from vistallm.config import LinkConfig
from vistallm.links.decoder import Family, LinkDecoder, grid_boxes, link_answers, one_per_object
from vistallm.links.losses import link_losses

MIXED = [("GRD", 0, 1, 0), ("GRD", 0, 0, 0), ("SEG", 1, 2, 0), ("DET", 1, 2, 0), ("DET", 1, 0, 0), ("POSE", 2, 2, 3)]


@pytest.mark.parametrize("items", [MIXED, MIXED[:2], MIXED[3:5], [("GRD", 0, 0, 0)], []])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_every_weight_gets_a_finite_gradient(tiny_decoder, make_links, inputs, items, precision):
    links = make_links(items)
    states, features, pixels = inputs(len(links.kind), 3)
    tiny_decoder.to(torch.bfloat16 if precision == "bf16" else torch.float32)  # as fsdp casts its units
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        families = tiny_decoder(states, links, features, pixels)
    loss, _ = link_losses(families, links)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny_decoder.parameters())


def test_answers_come_in_the_order_of_the_links(tiny_decoder, make_links, inputs):
    links = make_links(MIXED)
    states, features, pixels = inputs(len(links.kind), 3)
    with torch.no_grad():
        own, scenes = tiny_decoder(states, links, features, pixels)
        scenes.boxes = grid_boxes(tiny_decoder.grid, pixels.device).expand_as(scenes.boxes)  # no two are one object
        answers = link_answers([own, scenes], len(links.kind), least=0.0, limit=5)
    assert [len(a.scores) for a in answers] == [4, 4, 1, 5, 5, 5, 5, 5, 5]  # K, one, or `limit` of the patches
    assert [a.keypoints is not None for a in answers] == [False] * 6 + [True] * 3  # the names behind the POSE link
    for answer in answers:
        count = len(answer.scores)
        assert answer.boxes.shape == (count, 4)
        assert answer.masks.shape == (count, 16, 16)
        assert (answer.scores.diff() <= 0).all()
    assert torch.equal(answers[5].boxes, answers[6].boxes)  # a pose's candidates have one order


def test_a_link_does_not_depend_on_the_rest_of_the_batch(tiny_decoder, make_links, inputs):
    states, features, pixels = inputs(9, 3)
    links = make_links(MIXED)
    with torch.no_grad():
        together = link_answers(tiny_decoder(states, links, features, pixels), 9)
        alone = make_links([("DET", 1, 2, 0), ("DET", 1, 0, 0)])
        both = link_answers(tiny_decoder(states[3:5], alone, features, pixels), 2)
    for a, b in zip(together[3:5], both, strict=True):
        torch.testing.assert_close(a.scores, b.scores)
        torch.testing.assert_close(a.masks, b.masks, rtol=1e-4, atol=1e-5)


def test_a_class_is_the_product_of_its_words(tiny_decoder, make_links, inputs):
    """Of a named class each word counts by itself; an expression, and a link without words, is what its slots say."""
    (star, red), none = torch.randn(2, 20, generator=torch.Generator().manual_seed(3)), torch.zeros(20)
    phrases = [[star, none], [red, none], [star, red], [red, star], [none, none], [star, red]]
    links = make_links([("SEG", 0, 1, 0)] * 5 + [("GRD", 0, 1, 0)])
    states, features, pixels = inputs(6, 1)
    states[:] = states[:1].clone()
    slots, words = states[:, :4], torch.stack([torch.stack(phrase) for phrase in phrases])
    with torch.no_grad():
        tiny_decoder.shown_any.normal_()
        shown = tiny_decoder(torch.cat([slots, words], 1), links, features, pixels)[0].patches[:, 0].double().sigmoid()
        other = tiny_decoder(torch.cat([slots + slots.flip(1), words], 1), links, features, pixels)[0].patches[:, 0]
        anything = shown[0] * shown[1] / shown[2]  # the share that both words have in common
        seen = (tiny_decoder.shown(_memory(tiny_decoder, features)) @ tiny_decoder.shown_any / 32**0.5)[0]
    torch.testing.assert_close(anything.float(), (seen + tiny_decoder.patch_bias).sigmoid(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(shown[2], shown[3])
    assert (shown[2] < shown[:2]).all()
    moved = (other.double().sigmoid() - shown).abs().amax(1) > 1e-4
    assert moved.tolist() == [False] * 4 + [True] * 2


def _memory(decoder, features):
    blocks = [norm(f) for norm, f in zip(decoder.block_norms, features, strict=True)]
    return decoder.memory(torch.cat(blocks, -1)) + decoder.place(grid_boxes(decoder.grid, features[0].device))


def test_without_stem_the_shapes_are_the_same_and_pixels_do_not_count(make_links, inputs):
    links = make_links(MIXED)
    states, features, pixels = inputs(9, 3)
    decoder = LinkDecoder(LinkConfig(width=32, layers=2, heads=2, stem=False), 2, 24, 4, 20)
    with torch.no_grad():
        first, second = (link_answers(decoder(states, links, features, p), 9) for p in (pixels, pixels.flip(0)))
    assert torch.equal(first[0].masks, second[0].masks)
    assert first[0].masks.shape[1:] == (16, 16)


def test_wrong_sizes_are_refused(tiny_decoder, make_links, inputs):
    with pytest.raises(ValueError, match="links.width=36"):
        LinkDecoder(LinkConfig(width=36, heads=4), 2, 24, 4, 20)
    states, features, pixels = inputs(1, 3)
    with pytest.raises(ValueError, match="links.image_size"):
        tiny_decoder(states, make_links(MIXED[:1]), features, pixels[..., :30, :30])


def _made(items, make_links):
    """Bright squares on dark images, one per image, as boxes, masks and two corners; states say which link it is."""
    links = make_links(items)
    pixels = torch.full((len(items), 3, 32, 32), -1.0)
    for number, (x, y, w, h) in enumerate((links.boxes * 8).round().mul(4).int().tolist()):
        x0, y0, x1, y1 = x - w // 2, y - h // 2, x + w // 2, y + h // 2
        pixels[number, :, y0:y1, x0:x1] = 1.0
        links.boxes[number] = torch.tensor([x0 + x1, y0 + y1, 2 * (x1 - x0), 2 * (y1 - y0)]) / 64
    links.masks, links.has_mask = (F.avg_pool2d(pixels[:, 0] / 2 + 0.5, 2) * 255).byte(), torch.ones(len(items)) > 0
    if len(links.keypoints):
        centre, size = links.boxes[links.keypoint_object].split(2, 1)
        sign = torch.tensor([[-0.5, -0.5], [0.5, 0.5]]).repeat(len(links.keypoints) // 2, 1)
        links.keypoints = torch.cat([centre + sign * size, torch.full((len(sign), 1), 2.0)], 1)
    patches = F.pad(F.unfold(F.avg_pool2d(pixels[:, :1], 2), 4, stride=4).transpose(1, 2), (0, 8))
    return links, [patches, patches], pixels


def test_near_candidates_are_one_object_with_the_sum_of_their_scores():
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.12, 0.1, 0.5, 0.5], [0.1, 0.12, 0.5, 0.52]])
    order, scores = one_per_object(boxes, torch.tensor([0.3, 0.8, 0.4, 0.25]))
    assert order.tolist() == [2, 1], "the best of three, which together are surer than the other"
    assert scores.tolist() == pytest.approx([0.95, 0.8])
    order, scores = one_per_object(boxes, torch.tensor([0.9, 0.1, 0.8, 0.7]))
    assert (order.tolist(), scores.tolist()) == ([0, 1], pytest.approx([1.0, 0.1]))


@pytest.mark.parametrize("kind", ["GRD", "POSE"])
def test_it_learns_boxes_masks_and_keypoints_of_made_images(make_links, kind):
    torch.manual_seed(0)
    links, features, pixels = _made([(kind, i, 1, 2 * (kind == "POSE")) for i in range(8)], make_links)
    decoder = LinkDecoder(LinkConfig(width=64, layers=2, heads=2), 2, 24, 4, 20)
    states = torch.randn(3, 5, 20).repeat(8, 1, 1)[: len(links.kind)] if kind == "POSE" else torch.randn(8, 5, 20)
    optimizer = torch.optim.AdamW(decoder.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 180)
    for _ in range(180):
        loss, _ = link_losses(decoder(states, links, features, pixels), links)
        optimizer.zero_grad()
        (loss / 8).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        answers = link_answers(decoder(states, links, features, pixels), len(links.kind), least=0.0)
    names = len(links.kind) // 8 - 1
    boxes = box_convert(torch.stack([a.boxes[0] for a in answers[:: names + 1]]), "xyxy", "cxcywh")
    assert (boxes - links.boxes).abs().mean() < 0.03
    masks = torch.stack([a.masks[0] > 0 for a in answers[:: names + 1]])
    wanted = links.masks > 127
    assert (masks & wanted).sum() / (masks | wanted).sum() > 0.9
    assert all(a.scores[0] > 0.5 > a.scores[1] for a in answers)
    if names:
        keypoints = torch.stack([a.keypoints[0] for a in answers if a.keypoints is not None])
        assert (keypoints - links.keypoints)[:, :2].abs().mean() < 0.04
        assert (keypoints[:, 2] > 0.5).all()


def _looking(heat, box, guess):
    """One query and one keypoint: its heat is `heat` (M, M), its first guess a share of the box."""
    readouts = torch.zeros(1, 1, 1, 3, 2)
    readouts[..., 0, 0], readouts[..., 1, 0] = guess
    return Family(
        kind=torch.tensor([3]),
        image=torch.tensor([0]),
        links=torch.tensor([[0]]),
        asked=torch.tensor([[True]]),
        patches=torch.zeros(1, 1, 1),
        coarse=None,
        boxes=torch.tensor(box).view(1, 1, 1, 4),
        scores=torch.zeros(1, 1, 1, 1),
        embeddings=torch.zeros(1, 1, 1, 2),
        pose=torch.tensor([1.0, 0.0]).view(1, 1, 1, 2),
        readouts=readouts,
        looks=torch.full((1, 1, 1, 1), 0.25),
        names=torch.full((1, 1, 1, 1), 0.75),
        pixels=heat[None, None],
    )


def test_a_keypoint_is_the_guess_on_an_even_map_and_the_bright_pixel_within_reach():
    first, query = torch.tensor([0]), torch.zeros(1, 1, 1, dtype=torch.long)
    box = [0.5, 0.5, 0.4, 0.2]
    x, y, _ = _looking(torch.zeros(64, 64), box, (0.25, -0.5)).keypoints(first, query)[0, 0, 0, 0]
    torch.testing.assert_close(torch.stack([x, y]), torch.tensor([0.6, 0.4]), atol=1e-4, rtol=0)
    heat = torch.zeros(64, 64)
    heat[24, 41] = 15.0  # the place (41.5, 24.5) / 64, .05 right of the guess: half a deviation
    heat[60, 60] = 15.0  # out of reach
    x, y, _ = _looking(heat, box, (0.25, -0.5)).keypoints(first, query)[0, 0, 0, 0]
    torch.testing.assert_close(torch.stack([x, y]), torch.tensor([41.5, 24.5]) / 64, atol=2e-3, rtol=0)
