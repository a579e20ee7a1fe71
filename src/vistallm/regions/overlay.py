"""Regions drawn on their image: masks filled and outlined, boxes, points, keypoints, tagged; RGB in and out."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from vistallm.regions.masks import box_polygon, polygons_to_rle, rle_to_mask
from vistallm.schema import Region

COLOURS = ((255, 0, 200), (0, 120, 255), (0, 170, 60), (255, 140, 0), (120, 60, 220), (0, 180, 190))
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def draw_regions(
    image: np.ndarray,
    regions: Sequence[Region],
    scale: float = 1,
    labels: Sequence[str] = (),
    over: Sequence[Region] = (),
    prompts: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Draw regions on a scaled copy of their image, in the colours of their `object` numbers.

    Args:
        image: (H, W, 3) uint8 RGB.
        regions: regions of this image, in its pixels; a mask is taken from `rle`, else from `polygons`.
        scale: size of the copy relative to the image; returns (scale * H, scale * W, 3) uint8 RGB.
        labels: one tag per region; by default the objects' numbers, "" = no tag.
        over: regions drawn last, as thin white outlines with their vertices.
        prompts: masks of any size over the whole image, nonzero = shown by a region prompt; drawn in white.

    Keypoints are discs, rings where they are hidden, with their numbers from 0.
    """
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    canvas = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    line = max(2, round(max(size) / 250))
    for region, label in zip(regions, labels or [str(r.object) for r in regions], strict=True):
        colour = COLOURS[region.object % len(COLOURS)]
        rings = _outlines(canvas, region, scale, colour)
        for shade, width in (BLACK, line + 2), (colour, line):  # the dark rim shows the line on any image
            cv2.polylines(canvas, rings, True, shade, width, cv2.LINE_AA)
        if region.point is not None:
            rings.append(np.rint(np.reshape(region.point, (1, 2)) * scale).astype(np.int32))
            for shade, radius in (WHITE, 3 * line), (colour, 2 * line):
                cv2.circle(canvas, rings[-1][0].tolist(), radius, shade, -1, cv2.LINE_AA)
            rings[-1] = rings[-1] - 4 * line  # the tag stands beside the disc
        _draw_keypoints(canvas, region, scale, colour, line)
        if label and rings:
            _draw_tag(canvas, label, np.concatenate(rings).min(0), colour, line)
    for prompt in prompts:
        shown = cv2.resize((prompt != 0).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        canvas[shown > 0] = canvas[shown > 0] // 2 + 127
        cv2.drawContours(canvas, cv2.findContours(shown, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0], -1, BLACK, 1)
    for ring in (ring for region in over for ring in _outlines(canvas, region, scale, None)):
        cv2.polylines(canvas, [ring], True, WHITE, 1, cv2.LINE_AA)
        for x, y in ring.tolist():
            cv2.rectangle(canvas, (x - 1, y - 1), (x + 1, y + 1), WHITE, -1)
    return canvas


def draw_strip(images: Sequence[np.ndarray], regions: Sequence[Region], least: int = 1) -> np.ndarray:
    """Draw regions on their images, side by side, as high as the highest and at least `least` pixels: (H, W, 3) RGB."""
    height = max(least, *(image.shape[0] for image in images))
    panels, gap = list[np.ndarray](), np.full((height, 8, 3), 255, np.uint8)
    for index, image in enumerate(images):
        here = [region for region in regions if region.image == index]
        panels += [draw_regions(image, here, height / image.shape[0]), gap]
    return np.concatenate(panels[:-1], axis=1)


def _outlines(canvas: np.ndarray, region: Region, scale: float, fill: tuple[int, ...] | None) -> list[np.ndarray]:
    """Outlines of a mask or box, each (n, 2) int32 in pixels of the canvas; a mask is tinted with `fill` in place."""
    if region.rle is not None and region.kind == "mask":
        mask = cv2.resize(rle_to_mask(region.rle).view(np.uint8), canvas.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        outlines = [ring[:, 0] for ring in cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]]
    else:
        box = [] if region.box is None else [box_polygon(np.reshape(region.box, (2, 2)), 4)]
        rings = [np.asarray(ring) * scale for ring in region.polygons or box]
        mask = coco_mask.decode(polygons_to_rle(rings if region.polygons else [], *canvas.shape[:2]))
        outlines = [np.rint(ring).astype(np.int32) for ring in rings]
    if fill is not None:
        canvas[mask > 0] = (0.65 * canvas[mask > 0] + 0.35 * np.array(fill)).astype(np.uint8)
    return outlines


def _draw_keypoints(canvas: np.ndarray, region: Region, scale: float, colour: tuple[int, ...], line: int) -> None:
    for number, (x, y, v) in enumerate(region.keypoints or ()):
        if v:
            place = (round(x * scale), round(y * scale))
            cv2.circle(canvas, place, 2 * line + 1, WHITE, -1, cv2.LINE_AA)
            cv2.circle(canvas, place, 2 * line, colour, -1 if v == 2 else line, cv2.LINE_AA)
            corner = (place[0] + 2 * line, place[1] - line)
            for shade, width in (BLACK, line + 1), (WHITE, max(1, line // 2)):
                cv2.putText(
                    canvas, str(number), corner, cv2.FONT_HERSHEY_SIMPLEX, 0.2 * line, shade, width, cv2.LINE_AA
                )


def _draw_tag(canvas: np.ndarray, label: str, corner: np.ndarray, colour: tuple[int, ...], line: int) -> None:
    """Write a label in white on a plate of `colour`, above `corner` where the canvas has room for it."""
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.2 * line
    (width, height), below = cv2.getTextSize(label, font, size, max(1, line // 2))
    x = int(np.clip(corner[0], 0, max(0, canvas.shape[1] - width - 4)))
    y = max(int(corner[1]) - below, height + 2)
    cv2.rectangle(canvas, (x, y - height - 3), (x + width + 3, y + below), colour, -1)
    cv2.putText(canvas, label, (x + 2, y), font, size, WHITE, max(1, line // 2), cv2.LINE_AA)
