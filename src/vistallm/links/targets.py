"""Regions of a sample -> what its links have to find, as tensors; and links that have nothing to find (generation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor

from vistallm.links import LINKS, SCENE_LINKS
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import rle_box, rle_to_mask
from vistallm.schema import LinkBatch, Region, Rle


@dataclass
class LinkTarget:
    """What one link of a sequence has to find; coordinates are shares of the letterbox square."""

    kind: str  # one of LINKS
    image: int  # index in the sample
    boxes: np.ndarray  # (n, 4) float32, centre x, y, width, height
    masks: np.ndarray  # (n, M, M) uint8, how much of each pixel is covered, 255 = all; zeros where it is not known
    has_mask: np.ndarray  # (n,) bool
    keypoints: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.float32))  # (n, P, 3) of the objects
    shared: bool = False  # reads the slots of the link before: a later frame of a video
    keypoint: int | None = None  # this link names that keypoint of the link before it, whose objects it shares


def link_target(kind: str, image: int, objects: Sequence[Region], letterbox: Letterbox, size: int) -> LinkTarget:
    """Return the target of a link whose objects lie in one image; masks are `size` pixels a side.

    The objects of a SEG link are one target: all pixels that it asks for.

    Raises ValueError for an object that has neither box, mask nor keypoints.
    """
    boxes, masks = np.zeros((len(objects), 4), np.float32), np.zeros((len(objects), size, size), np.uint8)
    for number, region in enumerate(objects):
        box = region.box or (region.rle and rle_box(region.rle))
        if not box:
            raise ValueError(f"a link needs a region with a box or a mask, got {region}")
        low, high = letterbox.to_unit(np.array(box))
        boxes[number] = [*(low + high) / 2, *(high - low)]
        if region.rle is not None:
            masks[number] = square_mask(region.rle, letterbox, size)
    rows = [region.keypoints or () for region in objects]
    known = np.array([region.rle is not None for region in objects], bool)
    if kind == "SEG" and len(objects) > 1:
        low, high = (boxes[:, :2] - boxes[:, 2:] / 2).min(0), (boxes[:, :2] + boxes[:, 2:] / 2).max(0)
        boxes, masks = np.concatenate([(low + high) / 2, high - low])[None], masks.max(0, keepdims=True)
        known, rows = known[known.argsort()[:1]], []
    points = np.array(rows, np.float32) if rows and rows[0] else np.zeros((len(boxes), 0, 3), np.float32)
    for row in points:
        row[:, :2] = letterbox.to_unit(row[:, :2])
    return LinkTarget(kind, image, boxes, masks, known, points)


def square_mask(mask: Rle | np.ndarray, letterbox: Letterbox, size: int) -> np.ndarray:
    """Return a mask, RLE or (H, W) bool of the original image, on the letterbox square.

    The result, (size, size) uint8, is the share of each pixel that the mask covers, 255 = all of it: edges that lie
    within a pixel survive. On mini (60 a side for images of 120) a mask from 0 and 1 goes back to full size at an IoU
    of .92, one from shares at .98.
    """
    whole = mask if isinstance(mask, np.ndarray) else rle_to_mask(mask)
    left, top = letterbox.padding
    square = np.zeros((letterbox.side, letterbox.side), np.uint8)
    square[top : top + letterbox.height, left : left + letterbox.width] = 255 * whole.astype(np.uint8)
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA)


def make_links(rows: Sequence[Sequence[LinkTarget]], image_counts: Sequence[int], size: int) -> LinkBatch:
    """Collate the targets of a batch's rows, whose images lie one after another; masks are `size` pixels a side."""
    kinds, owners, images, objects, tokens = list[int](), list[int](), list[int](), list[int](), list[int]()
    points: list[tuple[float, ...]] = []
    masks, boxes, known, first = [], [], [], 0
    for row, (targets, count) in enumerate(zip(rows, image_counts, strict=True)):
        named = (0, 0, np.zeros((0, 0, 3), np.float32))  # the link, first object and keypoints that names refer to
        for target in targets:
            link = len(kinds)
            tokens.append(tokens[-1] if target.shared else tokens[-1] + 1 if tokens else 0)
            kinds.append(LINKS.index(target.kind))
            owners.append(row)
            images.append(first + target.image)
            if target.keypoint is None:
                named = (link, len(objects), target.keypoints)
                objects += [link] * len(target.boxes)
                masks.append(target.masks)
                boxes.append(target.boxes)
                known.append(target.has_mask)
            else:
                placed = named[2][:, target.keypoint] if named[2].size else ()
                points += [(named[1] + number, link, *point) for number, point in enumerate(placed)]
        first += count
    integers = [torch.tensor(values, dtype=torch.int64) for values in (kinds, owners, images, objects)]
    named_points = torch.tensor(points, dtype=torch.float32).reshape(-1, 5)
    return LinkBatch(
        kind=integers[0],
        row=integers[1],
        image=integers[2],
        group=group_numbers(*integers[:3]),
        object_link=integers[3],
        boxes=torch.from_numpy(np.concatenate([np.zeros((0, 4), np.float32), *boxes])),
        masks=torch.from_numpy(np.concatenate([np.zeros((0, size, size), np.uint8), *masks])),
        has_mask=torch.from_numpy(np.concatenate([np.zeros(0, bool), *known])),
        keypoint_object=named_points[:, 0].long(),
        keypoint_link=named_points[:, 1].long(),
        keypoints=named_points[:, 2:].contiguous(),
        token=torch.tensor(tokens, dtype=torch.int64),
    )


def links_to_find(
    kind: Sequence[int], row: Sequence[int], image: Sequence[int], size: int, token: Sequence[int] | None = None
) -> LinkBatch:
    """Return links without targets: kinds (indices in LINKS), rows and images of the batch; `size` of their masks.

    `token`: the routing token that each reads, where some share one.
    """
    tensors = [torch.tensor(values, dtype=torch.int64) for values in (kind, row, image)]
    links = make_links([], [], size)
    links.kind, links.row, links.image = tensors
    links.token = torch.arange(len(kind)) if token is None else torch.tensor(token, dtype=torch.int64)
    links.group = group_numbers(*tensors)
    return links


def group_numbers(kind: Tensor, row: Tensor, image: Tensor) -> Tensor:
    """Return (L,) int64: links of a scene (DET, POSE) are a group where kind, row and image are the same."""
    scene = torch.isin(kind, torch.tensor([LINKS.index(name) for name in SCENE_LINKS]))
    own = torch.where(scene, -1, torch.arange(len(kind)))
    keys = torch.stack([row, image, kind, own], 1)
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(key), len(numbers)) for key in keys.tolist()], dtype=torch.int64)
