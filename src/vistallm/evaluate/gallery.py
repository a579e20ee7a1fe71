"""Predictions and images -> HTML cards: each image with the target's outline and the answer's fill, and the words.

Overlays are SVG in pixels of the original image over a JPEG (or a plain canvas when no image is at hand), so they stay
sharp at any zoom and their layers can be switched.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from vistallm.evaluate.confidence import answer_confidence
from vistallm.evaluate.targets import image_masks, target_regions
from vistallm.regions.masks import rle_to_mask
from vistallm.regions.outline import as_mask, outline_rings
from vistallm.schema import Prediction, Region

MAX_SIDE = 420  # pixels of an embedded image's longer side
_GROUP = re.compile(r"<([bpm])_st>.*?<\1_ed>", re.DOTALL)
_BINS = re.compile(r"(?:\s*<bin_\d+>){3,}")
_KINDS = {"b": "box", "p": "point", "m": "mask"}


def pick(predictions: Sequence[Prediction], per_group: int = 3) -> list[tuple[str, Prediction]]:
    """Return (group, prediction) of one benchmark: "unreadable" ones, then the worst, median and best readable ones."""
    unreadable = [p for p in predictions if p.parsed is None][:per_group]
    ranked = sorted((p for p in predictions if p.parsed is not None), key=lambda p: p.score or 0.0)
    middle = max(0, len(ranked) // 2 - per_group // 2)
    chosen: list[tuple[str, Prediction]] = [("unreadable", p) for p in unreadable]
    seen: set[int] = set()
    # best and worst first: with few samples they must not lose theirs to the median
    for group, part in (
        ("worst", ranked[:per_group]),
        ("best", ranked[::-1][:per_group]),
        ("median", ranked[middle : middle + per_group]),
    ):
        chosen += [(group, p) for p in part if id(p) not in seen]
        seen |= {id(p) for p in part}
    order = ["unreadable", "worst", "median", "best"]
    return sorted(chosen, key=lambda item: order.index(item[0]))


def shown(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return those predictions that the gallery shows, of every benchmark."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.benchmark, []).append(prediction)
    return [prediction for group in groups.values() for _, prediction in pick(group)]


def short_text(text: str, limit: int = 220) -> str:
    """Return an answer as safe HTML, its region groups replaced by "[mask, 12 points]" and loose bins by "...".

    >>> short_text("It is <p_st><bin_1><bin_2><p_ed>.")
    'It is <b>[point]</b>.'
    """

    def group(match: re.Match[str]) -> str:
        bins = match[0].count("<bin_")
        kind = _KINDS[match[1]]
        detail = f", {bins // 2} points" if kind == "mask" and bins else ", none" if not bins else ""
        return f"\x00[{kind}{detail}]\x01"

    text = _BINS.sub(" <bins…>", _GROUP.sub(group, text)).strip()
    text = text if len(text) <= limit else text[:limit] + "…"
    return html.escape(text, quote=False).replace("\x00", "<b>").replace("\x01", "</b>")


def card(prediction: Prediction, group: str, images: Sequence[np.ndarray] | None, title: str) -> str:
    """Return one gallery card; `images` holds the (H, W, 3) uint8 RGB images of the sample, None for a plain canvas."""
    pictures = "".join(
        _picture(prediction, index, None if images is None else images[index])
        for index in range(len(prediction.images))
    )
    said = prediction.text if prediction.parsed is None else prediction.text or prediction.parsed.answer
    words = (
        ""
        if prediction.target.get("regions")
        else f"<dt>Truth</dt><dd>{short_text(str(prediction.target['answer']))}</dd>"
    )
    failure = f'<dt>Unreadable</dt><dd class="bad">{html.escape(prediction.failure or "unknown")}</dd>' * (
        prediction.parsed is None
    )
    if (sure := answer_confidence(prediction)) is not None:
        words += f"<dt>Confidence</dt><dd>{100 * sure:.0f}%</dd>"
    score = prediction.score or 0.0
    return (
        f'<article class="card" data-task="{html.escape(prediction.benchmark)}" data-score="{score:.4f}" '
        f'data-group="{group}"><header><span>{html.escape(title)}</span><span class="tag {group}">{group}</span>'
        f'<span class="score">{100 * score:.0f}</span></header>'
        f'<div class="pictures n{min(len(prediction.images), 4)}">{pictures}</div>'
        f"<dl><dt>Prompt</dt><dd>{short_text(prediction.prompt)}</dd><dt>Answer</dt><dd>{short_text(said)}</dd>"
        f"{words}{failure}</dl><footer>{html.escape(prediction.id)}</footer></article>"
    )


def _picture(prediction: Prediction, index: int, image: np.ndarray | None) -> str:
    width, height = (int(prediction.images[index][side]) for side in ("width", "height"))
    back = f'<rect class="canvas" width="{width}" height="{height}"/>'
    if image is not None:
        back = f'<image href="{_data_uri(image)}" width="{width}" height="{height}"/>'
    target = [region for region in target_regions(prediction) if region.image == index]
    answer = [] if prediction.parsed is None else [r for r in prediction.parsed.regions if r.image == index]
    given = [Region.from_json(r) for r in prediction.target.get("given", []) if r.get("image", 0) == index]
    given += [Region(0, "box", box=tuple(box)) for box in prediction.target.get("candidates", []) if index == 0]
    layers = [f'<g class="given">{"".join(_shape(r, width, height) for r in given)}</g>' if given else ""]
    layers.append(f'<g class="answer">{"".join(_shape(r, width, height) for r in answer)}</g>')
    truth = "".join(_shape(r, width, height) for r in target if r.kind != "mask")
    if any(region.kind == "mask" for region in target):
        truth += _outline(rle_to_mask(image_masks(target, prediction)[index]))
    layers.append(f'<g class="truth under">{truth}</g><g class="truth">{truth}</g>')
    number = f' data-number="{index + 1}"' if len(prediction.images) > 1 else ""
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="overlay">{back}{"".join(layers)}</svg>'
    return f'<div class="picture"{number}>{drawing}</div>'


def _shape(region: Region, width: int, height: int) -> str:
    if region.kind == "mask" and region.polygons is not None:
        return _path(region.polygons)
    if region.kind == "mask" and region.rle is not None:
        return _outline(rle_to_mask(region.rle))
    if region.box is not None:
        x0, y0, x1, y1 = region.box
        return f'<rect x="{x0:g}" y="{y0:g}" width="{max(0, x1 - x0):g}" height="{max(0, y1 - y0):g}"/>'
    x, y = region.point or (0, 0)
    return f'<circle cx="{x:g}" cy="{y:g}" r="{max(width, height) / 45:g}"/>'


def _outline(mask: np.ndarray) -> str:
    # Half a pixel of slack removes the stair steps, which no reader needs.
    rings, _ = outline_rings(as_mask(mask), holes=True)
    return _path([cv2.approxPolyDP(ring.astype(np.float32), 0.8, True).reshape(-1, 2) for ring in rings])


def _path(rings: Sequence[np.ndarray]) -> str:
    parts = ("M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in ring.tolist()) + "Z" for ring in rings if len(ring))
    return f'<path d="{"".join(parts)}"/>'


def _data_uri(image: np.ndarray) -> str:
    scale = MAX_SIDE / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")


def gallery(
    groups: Mapping[str, Sequence[Prediction]],
    images: Mapping[str, Sequence[np.ndarray]] | None,
    titles: Mapping[str, str],
) -> str:
    """Return the cards of all benchmarks; `images` maps prediction ids to their images, absent ids get a canvas."""
    return "\n".join(
        card(prediction, group, (images or {}).get(prediction.id), titles[name])
        for name, predictions in groups.items()
        for group, prediction in pick(predictions)
    )
