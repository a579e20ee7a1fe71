"""Families of a batch and its targets -> one summed loss, by Hungarian matching in each decoder layer.

Every figure is a sum over groups, objects and layers, so that a loss does not depend on how a batch is split over
micro-batches and ranks. Weights are those of VisionLLM v2 (arXiv 2406.08394): class 2, L1 5, GIoU 2, mask 5, dice 5,
keypoint L1 10, OKS 4; ours is that of phrases against patches, 10. Unlike there, a group without objects pays the class
loss: it teaches "no target".
Shape legend: D decoder layers, G groups, Q queries, P phrases, T objects of the largest group, M side of a mask, C
patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from vistallm.links import LINKS
from vistallm.links.decoder import Family, grid_boxes
from vistallm.schema import LinkBatch

WEIGHTS = {
    "patches": 10.0, "score": 2.0, "box_l1": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0,
    "keypoint_l1": 10.0, "oks": 4.0, "visible": 1.0,
}  # fmt: skip
PARTS = (*WEIGHTS, "objects", "unmatched")  # what `link_losses` reports
SIGMA = 0.05  # of object keypoint similarity, as a share of the object's size: the middle of COCO's .025 to .107


def link_losses(families: Sequence[Family], links: LinkBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the losses, () float32, and its parts, detached.

    The parts are the unweighted sums named in WEIGHTS, and `objects` and `unmatched`: of a group with more objects than
    queries the smallest are left out, and counted. Every weight of the decoder gets a gradient, if only of zeros.

    Raises:
        ValueError: a mask target is not of the decoder's side.
    """
    parts = dict.fromkeys(WEIGHTS, links.boxes.new_zeros(()))
    matched = 0
    for family in families:
        places = _places(family, links)
        group, phrase, objects = _targets(family, links, places)
        query = match(family, group, phrase, links.boxes[objects])
        matched += len(objects)
        found = _object_losses(family, links, group, objects, query)
        found["score"] = _score_loss(family, group, phrase, query)
        found["patches"] = _patch_loss(family, links, places)
        found |= _keypoint_losses(family, links, places, group, objects, query)
        parts = {name: value + found[name] for name, value in parts.items()}
    loss = sum((weight * parts[name] for name, weight in WEIGHTS.items()), links.boxes.new_zeros(()))
    counts = {"objects": len(links.boxes), "unmatched": len(links.boxes) - matched}
    logged = {name: value.detach() for name, value in parts.items()}
    return loss, logged | {name: links.boxes.new_tensor(float(count)) for name, count in counts.items()}


def _targets(family: Family, links: LinkBatch, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The V objects of a family, by group: group, phrase and number (V,) int64 of each; at most Q of a group."""
    group, phrase = places[links.object_link.cpu()].unbind(1)
    area = links.boxes[:, 2:].prod(1).cpu()
    order = torch.from_numpy(np.lexsort((-area.numpy(), group.numpy())))  # by group, the largest first
    order = order[group[order] >= 0]
    group, phrase = group[order], phrase[order]
    fits = torch.arange(len(group)) - torch.searchsorted(group, group) < family.boxes.shape[2]
    device = links.boxes.device
    return group[fits].to(device), phrase[fits].to(device), order[fits].to(device)


def _places(family: Family, links: LinkBatch) -> Tensor:
    """Group and phrase of each link, (L, 2) int64 on the CPU; -1 for a link of another family."""
    places = torch.full((len(links.kind), 2), -1)
    held = (family.links >= 0).nonzero()
    places[family.links[held[:, 0], held[:, 1]]] = held
    return places


@torch.no_grad()
def match(family: Family, group: Tensor, phrase: Tensor, boxes: Tensor) -> Tensor:
    """Assign each object a query of its group, in each layer: (D, V) int64.

    Hungarian matching on class, L1 and GIoU with the weights of the losses; masks take no part, as in VisionLLM v2. The
    one object of a SEG link is its first query's: where any of K may answer, each learns a Kth of the certainty.

    Args:
        family: the decoder's answers.
        group: (V,) int64, ascending.
        phrase: (V,) int64, of the group's phrases the one that the object answers.
        boxes: (V, 4) float32, centre x, y, width, height.
    """
    index = phrase.view(1, -1, 1, 1).expand(len(family.scores), -1, family.scores.shape[2], 1)
    scores = family.scores[:, group].gather(3, index).squeeze(3)
    share = scores.sigmoid()
    cost = WEIGHTS["score"] * ((1 - share) ** 2 * F.softplus(-scores) - share**2 * F.softplus(scores))
    guesses = family.boxes[:, group]  # (D, V, Q, 4)
    cost = cost + WEIGHTS["box_l1"] * (guesses - boxes[:, None]).abs().sum(-1)
    corners, wanted = box_convert(guesses, "cxcywh", "xyxy"), box_convert(boxes, "cxcywh", "xyxy")[:, None]
    cost = cost + WEIGHTS["giou"] * generalized_box_iou_loss(corners, wanted.expand_as(corners))
    cost[:, (family.kind == LINKS.index("SEG")).to(group.device)[group], 1:] = 1e6
    # The one transfer of a family. A loss that is not finite is for the trainer to skip.
    table = cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy()
    query, first = torch.zeros(table.shape[:2], dtype=torch.long), 0
    for count in group.unique_consecutive(return_counts=True)[1].tolist():
        for layer, costs in enumerate(table[:, first : first + count]):
            query[layer, first : first + count] = torch.from_numpy(linear_sum_assignment(costs)[1])
        first += count
    return query.to(group.device)


def _score_loss(family: Family, group: Tensor, phrase: Tensor, query: Tensor) -> Tensor:
    """Focal loss of every query and every phrase that names a class."""
    target = torch.zeros_like(family.scores)
    target[torch.arange(len(query), device=query.device)[:, None], group, query, phrase] = 1.0
    # alpha=-1: positives and negatives weigh the same, so that a score above one half says "more likely than not".
    return (sigmoid_focal_loss(family.scores, target, alpha=-1) * family.asked[:, None]).sum()


def _patch_loss(family: Family, links: LinkBatch, places: Tensor) -> Tensor:
    """Binary cross-entropy of phrases against patches: the mean over an image's patches, summed over phrases.

    The target of a patch is the largest share of it that an object of the phrase covers. An object without a mask has
    the patches around its box's centre, half the box's sides and at least one, as detectors sample centres; the other
    patches of its box count for nothing.
    """
    shown = family.patches
    group, phrase = places[links.object_link.cpu()].to(shown.device).unbind(1)
    held = (group >= 0).nonzero()[:, 0]
    grid, boxes, masked = round(shown.shape[2] ** 0.5), links.boxes[held, None], links.has_mask[held, None]
    covered = F.adaptive_avg_pool2d(links.masks[held].float().div(255)[:, None], grid).flatten(1)
    distance = (grid_boxes(grid, shown.device)[:, :2] - boxes[..., :2]).abs()
    central = (distance <= (boxes[..., 2:] / 4).clamp(min=0.5 / grid)).all(2)
    unknown = (~masked & ~central & (distance < boxes[..., 2:] / 2).all(2)).float()
    covered = torch.where(masked, covered, central.float())
    place = (group[held] * shown.shape[1] + phrase[held])[:, None].expand_as(covered)
    target, ignored = (
        torch.zeros_like(shown).flatten(0, 1).scatter_reduce(0, place, values, "amax").view_as(shown)
        for values in (covered, unknown)
    )
    counted = family.asked[..., None] * (1 - ignored * (target == 0))
    return (F.binary_cross_entropy_with_logits(shown, target, reduction="none") * counted).mean(2).sum()


def _object_losses(
    family: Family, links: LinkBatch, group: Tensor, objects: Tensor, query: Tensor
) -> dict[str, Tensor]:
    """Box and mask losses of the V matched objects, summed over objects and layers."""
    guess, wanted = family.boxes[:, group].gather(2, query[..., None, None].expand(-1, -1, 1, 4))[:, :, 0], links.boxes
    wanted = wanted[objects].expand_as(guess)
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (guess, wanted))
    known = links.has_mask[objects].nonzero()[:, 0]
    target, side = links.masks[objects[known]], family.pixels.shape[-1]
    if target.shape[-1] != side:
        raise ValueError(f"links.masks: expected a side of {side} (half of the pixels'), got {target.shape[-1]}")
    share = target.float().div(255).expand(len(query), -1, -1, -1)
    logits = family.masks(group[known], query[:, known, None]).squeeze(2).float()
    return {
        "box_l1": (guess - wanted).abs().sum(),
        "giou": generalized_box_iou_loss(*corners, reduction="sum"),
        "mask": F.binary_cross_entropy_with_logits(logits, share, reduction="none").mean((2, 3)).sum(),
        "dice": dice_loss(logits, share).sum(),
    }


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - 2 (p . t + .5) / (|p| + |t| + 1) over the last two axes, as DETR's."""
    share = logits.sigmoid()
    overlap = (share * target).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (share.sum((-2, -1)) + target.sum((-2, -1)) + 1)


def _keypoint_losses(
    family: Family, links: LinkBatch, places: Tensor, group: Tensor, objects: Tensor, query: Tensor
) -> dict[str, Tensor]:
    """L1, 1 - OKS and visibility of the keypoints of matched objects; means over an object's keypoints, summed."""
    row = torch.full((len(links.boxes),), -1).to(objects)
    row[objects] = torch.arange(len(objects), device=row.device)
    rows = row[links.keypoint_object]
    rows, chosen = rows[rows >= 0], (rows >= 0).nonzero()[:, 0]
    phrase = places.to(rows.device)[links.keypoint_link[chosen], 1]
    posed, place = rows.unique(return_inverse=True)
    found = family.keypoints(group[posed], query[:, posed, None])[:, place, 0, phrase]  # (D, n, 3)
    objects, target = objects[rows], links.keypoints[chosen]

    def share(counted: Tensor) -> Tensor:
        """Turn sums over keypoints (n,) into sums of each object's mean."""
        counts = counted.new_zeros(len(links.boxes)).index_add(0, objects, counted)
        return counted / counts.clamp(min=1)[objects]

    labelled, each = share((target[:, 2] > 0).float()), share(torch.ones_like(target[:, 2]))
    distance, visible = found[..., :2] - target[:, :2], (target[:, 2] == 2).float().expand(found.shape[:2])
    similarity = keypoint_similarity(distance, object_area(links)[objects])
    return {
        "keypoint_l1": (distance.abs().sum(-1) * labelled).sum(),
        "oks": ((1 - similarity) * labelled).sum(),
        "visible": (F.binary_cross_entropy_with_logits(found[..., 2], visible, reduction="none") * each).sum(),
    }


def keypoint_similarity(distance: Tensor, area: Tensor, sigma: float = SIGMA) -> Tensor:
    """COCO's similarity of each keypoint, (...) in [0, 1], from `distance` (..., 2) and the object's `area` (...)."""
    return torch.exp(-distance.square().sum(-1) / (2 * area * (2 * sigma) ** 2))


def object_area(links: LinkBatch) -> Tensor:
    """Area (O,) float32 of each object as a share of the square: of its mask, else 0.53 of its box, as is usual."""
    mask, box = links.masks.float().mean((1, 2)) / 255, links.boxes[:, 2:].prod(1)
    return torch.where(links.has_mask, mask, 0.53 * box).clamp(min=1e-6)
