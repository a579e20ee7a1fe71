"""Image files -> what a shard holds: the bytes as they are, or made smaller together with the sample's regions."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from vistallm.regions.masks import mask_to_rle, rle_to_mask
from vistallm.schema import Region

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF: values that swap width and height
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class ImageFile:
    """An encoded image: its bytes, their suffix ("jpg" or "png"), and its size in pixels as OpenCV decodes it."""

    data: bytes
    suffix: str
    width: int
    height: int


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, from its header; raises as `read_image` does."""
    with path.open("rb") as file:
        return _read_header(file, path)[1]


def read_image(path: Path) -> ImageFile:
    """Read a file without decoding it; formats other than JPEG and PNG become PNG.

    Raises:
        OSError: the file is not there or can't be read.
        ValueError: it is not an image.
    """
    data = path.read_bytes()
    kind, size = _read_header(io.BytesIO(data), path)
    return ImageFile(data, _SUFFIXES[kind], *size) if kind in _SUFFIXES else _encode(_decode(data, path), "png")


def _read_header(file: BinaryIO, path: Path) -> tuple[str, tuple[int, int]]:
    """Format and size of the image as it is decoded."""
    try:
        with Image.open(file) as header:
            kind, (width, height) = str(header.format), header.size
            # The decoder turns a picture as its EXIF tag says, and annotations are drawn on what one sees.
            if kind in ("JPEG", "MPO") and header.getexif().get(_ORIENTATION) in _TURNED:
                width, height = height, width
    except (UnidentifiedImageError, SyntaxError, OSError) as error:
        raise ValueError(f"{path}: not an image ({error})") from error
    return kind, (width, height)


def shrink(image: ImageFile, max_side: int, path: Path) -> ImageFile:
    """The image with its longer side at most `max_side` pixels; ValueError when it does not decode."""
    scale = max_side / max(image.width, image.height)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return _encode(cv2.resize(_decode(image.data, path), size, interpolation=cv2.INTER_AREA), image.suffix)


def scale_region(region: Region, old: tuple[int, int], new: tuple[int, int]) -> Region:
    """A region of an image of size `old` (width, height) at size `new`; raises ValueError when a mask is gone."""
    if old == new:
        return region
    sx, sy = new[0] / old[0], new[1] / old[1]
    box = None if region.box is None else tuple(v * s for v, s in zip(region.box, (sx, sy, sx, sy), strict=True))
    point = None if region.point is None else (region.point[0] * sx, region.point[1] * sy)
    rle = region.rle
    if rle is not None:
        # A pixel of the small mask is set when most of what it covers was.
        covered = cv2.resize(rle_to_mask(rle).astype(np.float32), new, interpolation=cv2.INTER_AREA)
        if not (covered >= 0.5).any():
            raise ValueError(f"the mask of object {region.object} has no pixel left at {new[0]} x {new[1]}")
        rle = mask_to_rle(covered >= 0.5)
    return replace(region, box=box, point=point, rle=rle)


def _decode(data: bytes, path: Path) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise ValueError(f"{path}: the image does not decode")
    return pixels


def _encode(pixels: np.ndarray, suffix: str) -> ImageFile:
    data = cv2.imencode(f".{suffix}", pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if suffix == "jpg" else [])[1]
    return ImageFile(data.tobytes(), suffix, pixels.shape[1], pixels.shape[0])
