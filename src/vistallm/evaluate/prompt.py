"""A user's images and prompt -> Sample; what is wrong with them is refused here, before torch is imported."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vistallm.coinit.images import decode_pixels, on_padding
from vistallm.config import DataConfig
from vistallm.regions.masks import polygons_to_rle, rle_area
from vistallm.schema import ImageInfo, Region, Sample
from vistallm.tasks import find_task

ImageLike = str | Path | Image.Image | np.ndarray
"""A file, a PIL image, or (H, W, 3) uint8 RGB pixels; also (H, W) grey and (H, W, 4) with opacity."""

_GIVEN = re.compile(r"\{\s*(box|point|mask)\s*:([^{}@]*)(?:@\s*(\d+)\s*)?\}")
_STRAY = re.compile(r"\{\s*(?:box|point|mask|regions?)\b[^{}]*\}?")
FORMS = "{box:x0,y0,x1,y1}, {point:x,y} or {mask:x0,y0,x1,y1,x2,y2,...;more parts}, with @k for image k"


def read_image(image: ImageLike, name: object = "image") -> np.ndarray:
    """Return the stored pixels, (H, W, 3) uint8 RGB; what is transparent has the colour of padding.

    Raises:
        OSError: a file that can't be read.
        ValueError: it is not a whole image, has too many pixels, or an array of another shape or dtype.
    """
    if isinstance(image, (str, Path)):
        data, name = Path(image).read_bytes(), image
        try:
            with Image.open(io.BytesIO(data)) as header:
                _check_size(*header.size, name)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name}: expected a whole image; its header is of another kind, or cut off") from error
        return decode_pixels(data, name)
    if isinstance(image, Image.Image):
        _check_size(*image.size, name)
        image = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    pixels = np.asarray(image)
    if (
        pixels.dtype != np.uint8
        or pixels.ndim not in (2, 3)
        or not pixels.size
        or pixels.shape[2:] not in ((), (3,), (4,))
    ):
        raise ValueError(f"{name}: expected (H, W, 3) uint8 RGB pixels, got {pixels.shape} {pixels.dtype}")
    _check_size(pixels.shape[1], pixels.shape[0], name)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return on_padding(pixels[..., :3], pixels[..., 3]) if pixels.shape[2] == 4 else pixels


def _check_size(width: int, height: int, name: object) -> None:
    if width * height > DataConfig.max_pixels:
        raise ValueError(f"{name}: expected at most {DataConfig.max_pixels:,} pixels, got {width}x{height}; resize it")


def make_sample(images: Sequence[np.ndarray], prompt: str, task: str | None = None, head: str = "text") -> Sample:
    """Turn a prompt and its images into a sample; the regions that it writes (`FORMS`) become placeholders.

    Args:
        images: each (H, W, 3) uint8 RGB; regions are in their pixels. For a task of videos they are the frames.
        prompt: the instruction.
        task: whose answer is expected, one of `vistallm.tasks.TASKS`; None = whatever the model answers.
        head: "text", or "link", to which regions are shown as region prompts.

    Raises:
        ValueError: no image, an empty prompt, a region that can't be read or lies outside its image.
    """
    if not images:
        raise ValueError("expected at least one image, got none")
    if not prompt.strip():
        raise ValueError("expected a prompt, got an empty one")
    link = "" if task is None else find_task(task).link
    if head not in ("text", "link") or (head == "link" and not link):
        raise ValueError(f"head={head}, task={task}: expected head=text, or link with a task that links answer")
    regions: list[Region] = []

    def placeholder(match: re.Match[str]) -> str:
        regions.append(_read_region(match, images, len(regions)))
        number, kind = len(regions) - 1, match[1]
        return f"{{region:{number}:{kind}}}" if head == "link" else f"{{regions:{number}}}"

    if stray := _STRAY.search(_GIVEN.sub("", prompt)):
        raise ValueError(f"prompt: {stray[0]} is no region; expected {FORMS}")
    text = _GIVEN.sub(placeholder, prompt)
    infos = [ImageInfo(f"{i}.png", image.shape[1], image.shape[0]) for i, image in enumerate(images)]
    fields = {"video": True} if task is not None and find_task(task).video else {}
    return Sample("prompt", task or "vqa", "user", infos, text, fields, regions=regions, pixels=list(images))


def _read_region(match: re.Match[str], images: Sequence[np.ndarray], number: int) -> Region:
    """Read one written region; ValueError says what is wrong with it."""
    kind, index = match[1], int(match[3] or 1) - 1
    least, most = {"box": (2, 2), "point": (1, 1), "mask": (3, 10_000)}[kind]
    try:
        parts = [np.array(part.split(","), float).reshape(-1, 2) for part in match[2].split(";")]
    except ValueError:
        parts = []
    wrong, size = "", images[index].shape[1::-1] if 0 <= index < len(images) else (0, 0)
    if not 0 <= index < len(images):
        wrong = f"there are {len(images)} image(s)"
    elif not parts or (kind != "mask" and len(parts) > 1) or any(not least <= len(part) <= most for part in parts):
        wrong = "it can't be read"
    elif not all(((part >= 0) & (part <= size)).all() for part in parts):
        wrong = f"it is not inside image {index + 1} of {size[0]}x{size[1]} pixels"
    elif kind == "box" and (np.diff(parts[0], axis=0) <= 0).any():
        wrong = "x0 < x1 and y0 < y1 do not hold"
    rle = polygons_to_rle(parts, size[1], size[0]) if kind == "mask" and not wrong else None
    if rle and not rle_area(rle):
        wrong = "it covers no pixel"
    if wrong:
        raise ValueError(f"prompt: {match[0]}: {wrong}; expected {FORMS}")
    if rle:
        return Region(index, kind, number, rle=rle)
    return Region.from_json({"image": index, "kind": kind, "object": number, kind: parts[0].ravel().tolist()})
