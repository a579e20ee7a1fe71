"""Image files -> what a shard holds: the bytes as they are, or made smaller together with the sample's regions."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from vistallm.config import PAD_COLOUR
from vistallm.regions.masks import mask_to_rle, rle_to_mask
from vistallm.schema import Region

_ENDINGS = {"JPEG": ("jpg", b"\xff\xd9"), "MPO": ("jpg", b"\xff\xd9"), "PNG": ("png", b"IEND\xaeB`\x82")}
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class ImageFile:
    """An encoded image: its bytes, their suffix ("jpg" or "png"), its (width, height) in pixels, and its file's."""

    data: bytes
    suffix: str
    size: tuple[int, int]
    file_size: tuple[int, int]


def decode_pixels(data: bytes, name: object) -> np.ndarray:
    """The pixels of an encoded image, (H, W, 3) uint8 RGB; raises ValueError, with `name`, when it does not decode.

    The one rule for an EXIF orientation, here and wherever an image is read: it is not applied. Annotations are in the
    stored pixels (COCO's are), and so are shards, masks and answers. What is transparent has the colour of padding.
    """
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if pixels is None:
        raise ValueError(f"{name}: expected a whole image, its {len(data)} bytes do not decode; is the file cut off?")
    with Image.open(io.BytesIO(data)) as image:
        if not image.has_transparency_data:
            return pixels
        opacity = np.asarray(image.convert("RGBA").getchannel("A"))[..., None] / 255
    return np.rint(opacity * pixels + (1 - opacity) * PAD_COLOUR).astype(np.uint8)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, from its header; raises as `read_image` does."""
    with path.open("rb") as file:
        return _read_header(file, path)[1]


def _read_header(file: BinaryIO, path: Path) -> tuple[str, tuple[int, int]]:
    """Format ("" where a shard can't hold the bytes as they are) and size of the image as it is stored."""
    try:
        with Image.open(file) as header:
            return "" if header.has_transparency_data else str(header.format), header.size
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError) as error:
        raise ValueError(f"{path}: expected an image, got {type(error).__name__} at its header") from error


def read_image(path: Path, max_side: int | None = None) -> ImageFile:
    """Read a file; one with a side of over `max_side` pixels is made smaller.

    JPEG stays JPEG; all else is PNG, without transparency.

    Raises:
        OSError: the file is not there or can't be read.
        ValueError: it is not a whole image.
    """
    data = path.read_bytes()
    kind, size = _read_header(io.BytesIO(data), path)
    suffix, ending = _ENDINGS.get(kind, ("png", b""))
    scale = min(1, (max_side or max(size)) / max(size))
    if scale == 1 and kind in _ENDINGS:
        if not data.endswith(ending):  # a cut file has another ending, but some whole ones have it too
            decode_pixels(data, path)
        return ImageFile(data, suffix, size, size)
    pixels = decode_pixels(data, path)
    if scale < 1:
        new = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        pixels = cv2.resize(pixels, new, interpolation=cv2.INTER_AREA)
    settings = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if suffix == "jpg" else []
    encoded = cv2.imencode(f".{suffix}", pixels[:, :, ::-1], settings)[1].tobytes()
    return ImageFile(encoded, suffix, (pixels.shape[1], pixels.shape[0]), size)


def scale_region(region: Region, image: ImageFile) -> Region:
    """A region of the file as one of the image made from it; raises ValueError when a mask is gone."""
    if image.size == image.file_size:
        return region
    sx, sy = image.size[0] / image.file_size[0], image.size[1] / image.file_size[1]
    box = None if region.box is None else tuple(v * s for v, s in zip(region.box, (sx, sy, sx, sy), strict=True))
    point = None if region.point is None else (region.point[0] * sx, region.point[1] * sy)
    rle = region.rle
    if rle is not None:
        # A pixel of the small mask is set when most of what it covers was.
        covered = cv2.resize(rle_to_mask(rle).astype(np.float32), image.size, interpolation=cv2.INTER_AREA)
        if not (covered >= 0.5).any():
            raise ValueError(f"the mask of object {region.object} has no pixel left at {image.size}")
        rle = mask_to_rle(covered >= 0.5)
    return replace(region, box=box, point=point, rle=rle)
