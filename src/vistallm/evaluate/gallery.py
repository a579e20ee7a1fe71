"""Predictions and images -> gallery cards: each image with the target's outline and the answer's fill, and the texts.

Overlays are SVG in pixels of the original image over a WebP image (or a plain canvas where no image is at hand), so
they stay sharp at any zoom and their layers can be switched. The card itself is written in `report.html`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup, escape

from vistallm.evaluate.predictions import by_benchmark
from vistallm.links import LINKS, read_links
from vistallm.regions.contours import as_mask, outline_rings
from vistallm.regions.masks import box_of, rle_to_mask
from vistallm.schema import Prediction, Region

IMAGE_BYTES = 400_000  # of a page's images, so that many of them make it no heavier: they become smaller instead
SIZES = ((420, 75), (420, 50), (320, 50), (240, 45), (200, 35), (160, 35), (160, 25), (128, 20))  # side, WebP quality
_SLOTS = rf"\[(?P<link>{'|'.join(LINKS)})\](\s*\[[A-Z]+_\d+\])*"  # a link with its slots
_GROUP = re.compile(rf"<([bpm])_st>.*?<\1_ed>|{_SLOTS}", re.DOTALL)
_BINS = re.compile(r"(?:\s*<bin_\d+>){3,}")
_KINDS = {"b": "box", "p": "point", "m": "mask"}


def pick(predictions: Sequence[Prediction], per_group: int = 3) -> list[tuple[str, Prediction]]:
    """Return (group, prediction) of one benchmark: "unreadable" ones, then the worst, median and best readable ones."""
    ranked = sorted((p for p in predictions if p.parsed is not None), key=lambda p: p.score or 0.0)
    middle, top = max(0, len(ranked) // 2 - per_group // 2), len(ranked) - per_group
    groups = {
        "unreadable": [p for p in predictions if p.parsed is None][:per_group],
        "worst": ranked[:per_group],
        # with few samples worst and best keep theirs, the median has what is left
        "median": ranked[max(per_group, middle) : min(middle + per_group, top)],
        "best": ranked[max(per_group, top) :][::-1],
    }
    return [(group, prediction) for group, members in groups.items() for prediction in members]


def shown(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return those predictions that the gallery shows, of every benchmark."""
    return [one for group in by_benchmark(predictions).values() for _, one in pick(group)]


def short_text(text: str, limit: int = 220) -> Markup:
    """Return an answer as safe HTML: region groups become "[mask, 12 points]", links "[GRD]", loose bins "...".

    >>> print(short_text("It is <p_st><bin_1><bin_2><p_ed>."))
    It is <b>[point]</b>.
    """

    def group(match: re.Match[str]) -> str:
        if match["link"]:
            return f"\x00[{match['link']}]\x01"
        bins, kind = match[0].count("<bin_"), _KINDS[match[1]]
        detail = f", {bins // 2} points" if kind == "mask" and bins else "" if bins else ", none"
        return f"\x00[{kind}{detail}]\x01"

    text = _BINS.sub(" <bins…>", _GROUP.sub(group, text)).strip()
    text = text if len(text) <= limit else text[:limit] + "…"
    return Markup(str(escape(text)).replace("\x00", "<b>").replace("\x01", "</b>"))


def embed_images(images: Mapping[str, Sequence[np.ndarray]]) -> dict[str, list[str]]:
    """Turn the images of a page, prediction id -> each (H, W, 3) uint8 RGB, into data URIs of about IMAGE_BYTES.

    Several images of one prediction are shown, and kept, smaller than an image alone.
    """
    parts = {name: 1.0 if len(group) == 1 else 0.6 for name, group in images.items()}
    every = [(image, parts[name]) for name, group in images.items() for image in group]
    some = every[::8]  # enough to choose a size
    most = IMAGE_BYTES * len(some) / max(len(every), 1)
    sizes = (size for size in SIZES if sum(len(_data_uri(*one, *size)) for one in some) <= most)
    size = next(sizes, SIZES[-1])
    return {name: [_data_uri(image, parts[name], *size) for image in group] for name, group in images.items()}


def draw_pictures(prediction: Prediction, uris: Sequence[str] | None) -> list[dict[str, Any]]:
    """Draw one answer on its images, given as data URIs; None: on plain canvases.

    Returns, for each image, width and height in pixels, `image` as its data URI or None, and the SVG shapes of three
    layers: `given` in the prompt, `answer` and `truth`.
    """
    target, given = ([Region.from_json(row) for row in prediction.target.get(key, [])] for key in ("regions", "given"))
    given += [Region(0, "box", box=tuple(box)) for box in prediction.target.get("candidates", [])]
    layers = {"given": given, "answer": prediction.sure_regions, "truth": target}
    names = [link.phrase for link in read_links(prediction.text)][1:]  # of keypoints
    pictures = []
    for index, size in enumerate(prediction.images):
        width, height = int(size["width"]), int(size["height"])
        drawn: dict[str, Any] = {
            name: Markup("").join(_shape(one, max(width, height) / 45, names) for one in regions if one.image == index)
            for name, regions in layers.items()
        }
        uri = None if uris is None else uris[index]
        pictures.append(drawn | {"width": width, "height": height, "image": uri})
    return pictures


def _shape(region: Region, radius: float, names: Sequence[str] = ()) -> Markup:
    """A region as SVG with its label; `radius` of a point, in pixels of the image; `names` of its keypoints."""
    shape, label = _outline(region, radius), region.label
    for number, (x, y, v) in enumerate(region.keypoints or ()):
        name, kind = (names[number] if number < len(names) else f"keypoint {number + 1}"), ("hidden", "seen")[v > 1]
        if v > 0:
            dot = '<circle class="{}" cx="{:g}" cy="{:g}" r="{:g}"><title>{}</title></circle>'
            shape += Markup(dot).format(kind, x, y, radius / 1.5, name)
    if label is None:
        return shape
    x, y, *_ = box_of(region)
    sure = "" if region.confidence is None else f" {100 * region.confidence:.0f}%"
    text = '<text x="{:g}" y="{:g}" font-size="{:g}">{}</text>'
    named = Markup("<g><title>{}{}</title>{}</g>").format(label, sure, shape)
    return named + Markup(text).format(x, max(y, 0) + 2 * radius, 2 * radius, label)


def mask_path(region: Region) -> str:
    """Outline a mask as the `d` of an SVG path, in pixels of its image; holes run the other way."""
    rings = region.polygons
    if region.rle is not None:  # half a pixel of slack removes the stair steps, which no reader needs
        outlines = outline_rings(as_mask(rle_to_mask(region.rle)), holes=True)
        rings = [cv2.approxPolyDP(ring.astype(np.float32), 0.8, True).reshape(-1, 2) for ring in outlines]
    return "".join(
        "M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in ring.tolist()) + "Z" for ring in rings or () if len(ring)
    )


def _outline(region: Region, radius: float) -> Markup:
    if region.kind == "mask":
        return Markup(f'<path d="{mask_path(region)}"/>')
    if region.box is not None:
        x0, y0, x1, y1 = region.box
        return Markup(f'<rect x="{x0:g}" y="{y0:g}" width="{max(0, x1 - x0):g}" height="{max(0, y1 - y0):g}"/>')
    x, y = region.point or (0, 0)
    return Markup(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}"/>')


def _data_uri(image: np.ndarray, part: float, side: int, quality: int) -> str:
    scale = part * side / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".webp", image[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, quality])[1]
    return "data:image/webp;base64," + base64.b64encode(data.tobytes()).decode("ascii")
