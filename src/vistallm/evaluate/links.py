"""An answer's links, each with what the decoder found -> regions in pixels of the original images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
from torch import Tensor

from vistallm.links import Link, number_links, read_links
from vistallm.links.decoder import LinkAnswer
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import Parsed, Region, Rle
from vistallm.tasks import Task

THRESHOLD = 0.5  # an object is there from this score on
RANKED = {"detection": 0.05, "pose": 0.05}  # scores that rank their candidates take these from here on
SINGLE = ("box", "mask")  # metrics of tasks with exactly one target: the best candidate, whatever its score


def read_link_answer(
    text: str, found: Sequence[LinkAnswer], letterboxes: Sequence[Letterbox], task: Task, video: bool = False
) -> tuple[Parsed | None, str | None]:
    """Read an answer by links.

    Args:
        text: the answer, with its links.
        found: what each link found, in the order of the text.
        letterboxes: of the sample's images.
        task: says what the regions are, and whether there is exactly one.
        video: the images are frames, and each link is read in every one of them.

    Returns:
        (Parsed, None), whose regions hold their link's phrase as label where the task names phrases, and whose answer
        has the numbers of its regions in the place of the links; or (None, reason): "no-region", "cut-link" for a link
        whose slots the limit has cut, "bad-image" for an image that is not there.
    """
    written = links = read_links(text)
    if not links:
        return None, "no-region"
    if video:
        links = [replace(link, image=frame) for link in links for frame in range(len(letterboxes))]
    if len(links) != len(found):
        return None, "cut-link"
    if any(not 0 <= link.image < len(letterboxes) for link in links):
        return None, "bad-image"
    regions: list[Region] = []
    named: list[Region] = []  # objects whose keypoints the links behind them name
    owned: list[list[Region] | None] = []  # of each link; None names a keypoint
    for link, answer in zip(links, found, strict=True):
        if answer.keypoints is not None:
            points = np.column_stack(
                [letterboxes[link.image].to_pixels(answer.keypoints[:, :2].numpy()), np.full(len(answer.keypoints), 2)]
            )
            for region, point in zip(named, points.tolist(), strict=False):
                region.keypoints = (*(region.keypoints or ()), tuple(point))
            owned.append(None)
            continue
        named = _regions(link, answer, letterboxes[link.image], task)
        regions += named
        owned.append(named)
    for number, region in enumerate(regions):
        region.object = number
        if task.kind == "keypoints":
            region.keypoints = region.keypoints or ()
    presence = max(float(answer.scores.max()) for answer in found)
    rounded = [Region.from_json(region.to_json()) for region in regions]  # as in predictions.jsonl
    frames = len(links) // len(written)
    numbers = [
        None if owned[i] is None else [one.object for group in owned[i : i + frames] for one in group or () if one.sure]
        for i in range(0, len(owned), frames)
    ]
    return Parsed(task.kind, rounded, number_links(text, numbers), presence), None


def _regions(link: Link, answer: LinkAnswer, letterbox: Letterbox, task: Task) -> list[Region]:
    """The candidates of a link that count, by falling score."""
    scores = answer.scores.tolist()
    least = RANKED.get(task.metric, THRESHOLD)
    count = 1 if task.metric in SINGLE else sum(score >= least for score in scores)
    label = link.phrase if "{found}" in task.answer else None
    regions = []
    for score, box, mask in zip(scores[:count], answer.boxes, answer.masks, strict=False):
        corners = letterbox.to_pixels(box.double().numpy().reshape(2, 2)).reshape(-1)
        rle = full_mask(mask, letterbox) if task.kind == "mask" else None
        found = tuple(float(value) for value in corners)
        regions.append(Region(link.image, task.kind, box=found, rle=rle, label=label, confidence=score))
    return regions


def full_mask(logits: Tensor, letterbox: Letterbox) -> Rle:
    """Turn (M, M) logits on the letterbox square into the RLE of the original image; positive is inside."""
    whole = cv2.resize(logits.float().numpy(), (letterbox.side, letterbox.side), interpolation=cv2.INTER_LINEAR)
    left, top = letterbox.padding
    return mask_to_rle(whole[top : top + letterbox.height, left : left + letterbox.width] > 0)
