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

_ENDINGS = {"JPEG": ("jpg", b"\xff\xd9"), "MPO": ("jpg", b"\xff\xd9"), "PNG": ("png", b"IEND\xaeB`\x82")}
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class ImageFile:
    """An encoded image: its bytes, their suffix ("jpg" or "png"), and its size in pixels as stored."""

    data: bytes
    suffix: str
    width: int
    height: int


def decode_pixels(data: bytes, name: object) -> np.ndarray:
    """The pixels of an encoded image, (H, W, 3) uint8 RGB; raises ValueError, with `name`, when it does not decode.

    The one rule for an EXIF orientation, here and wherever an image is read: it is not applied. Annotations are in the
    stored pixels (COCO's are), and so are shards, masks and answers.
    """
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if pixels is None:
        raise ValueError(f"{name}: expected a whole image, its {len(data)} bytes do not decode; is the file cut off?")
    return pixels


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation of an encoded image that decodes, 1 (upright) to 8."""
    with Image.open(io.BytesIO(data)) as header:
        return header.getexif().get(0x0112, 1)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, from its header; raises as `read_image` does."""
    with path.open("rb") as file:
        return _read_header(file, path)[1]


def read_image(path: Path) -> ImageFile:
    """Read a file, decoding it only where it may be cut off; formats other than JPEG and PNG become PNG.

    Raises:
        OSError: the file is not there or can't be read.
        ValueError: it is not a whole image.
    """
    data = path.read_bytes()
    kind, size = _read_header(io.BytesIO(data), path)
    suffix, ending = _ENDINGS.get(kind, ("png", b""))
    if kind in _ENDINGS and data.endswith(ending):  # a cut file has another ending, but some whole ones have it too
        return ImageFile(data, suffix, *size)
    pixels = decode_pixels(data, path)
    return ImageFile(data, suffix, *size) if kind in _ENDINGS else _encode(pixels, suffix)


def _read_header(file: BinaryIO, path: Path) -> tuple[str, tuple[int, int]]:
    """Format and size of the image as it is stored."""
    try:
        with Image.open(file) as header:
            return str(header.format), header.size
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError) as error:
        raise ValueError(f"{path}: expected an image, got {type(error).__name__} at its header") from error


def _encode(pixels: np.ndarray, suffix: str) -> ImageFile:
    settings = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if suffix == "jpg" else []
    data = cv2.imencode(f".{suffix}", pixels[:, :, ::-1], settings)[1].tobytes()
    return ImageFile(data, suffix, pixels.shape[1], pixels.shape[0])


def shrink(image: ImageFile, max_side: int, path: Path) -> ImageFile:
    """The image with its longer side at most `max_side` pixels; ValueError when it does not decode."""
    scale = max_side / max(image.width, image.height)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return _encode(cv2.resize(decode_pixels(image.data, path), size, interpolation=cv2.INTER_AREA), image.suffix)


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
